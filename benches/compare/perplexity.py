#!/usr/bin/env python3
"""Perplexity of a fixed text: a Tidegate node beside llama.cpp, on the same GGUF, the same tokens and the same windows.

    pip install -r benches/compare/requirements.txt
    tidegate node --listen 127.0.0.1:18800 &
    benches/compare/perplexity.py --gguf PATH/OF/THE/NODE'S/MODEL.gguf [--url http://127.0.0.1:18800]

Method: llama.cpp cuts the text into tokens (the node's own /tokenize must agree); the tokens are cut into windows, each opened by the
model's begin token where it has one; every token after the first of its window is scored in the context of those before it in the
window. The node gives its log-probabilities through `POST /v1/completions` (`echo`, `logprobs`, `max_tokens` 0), llama.cpp its logits,
from which they are computed in double precision. Ends with 1 when the two perplexities differ by more than --tolerance.
Loopback only. The text is the first three chapters of Carroll's "Alice's Adventures in Wonderland" (1865), which is in the public domain.
"""

import argparse
import json
import math
import pathlib
import sys
import urllib.error
import urllib.parse
import urllib.request

import llama_cpp
import numpy

TEXT = pathlib.Path(__file__).with_name("text.txt")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(url, path, body):
    """The JSON that the node answers; none when it does not know the path."""
    request = urllib.request.Request(url.geturl() + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with OPENER.open(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise SystemExit(f"{path} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from error


def tokenize(reference, url, text):
    """Tokens without any that the text does not have."""
    tokens = reference.tokenize(text.encode(), add_bos=False, special=False)
    told = post(url, "/tokenize", {"prompt": text, "add_special_tokens": False})
    if told is None:
        print("the node has no /tokenize, so its tokenizer is not compared")
    elif told["tokens"] != tokens:
        at = next((i for i, (a, b) in enumerate(zip(told["tokens"], tokens)) if a != b), min(len(told["tokens"]), len(tokens)))
        raise SystemExit(f"the tokenizers disagree from token {at} on: node {told['tokens'][at:at + 8]}, llama.cpp {tokens[at:at + 8]}")
    return tokens


def load_reference(path, window, threads):
    """llama.cpp with weights as the file has them: its repacked form for AMX ends in a segmentation fault in some releases."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def as_stored():
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = as_stored
    return llama_cpp.Llama(
        path, n_ctx=window, n_batch=window, n_ubatch=window, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )


def windows(tokens, size, begin):
    """Consecutive windows; a last one of fewer than two tokens has nothing to score."""
    head = [] if begin is None else [begin]
    step = size - len(head)
    cut = [head + tokens[at:at + step] for at in range(0, len(tokens), step)]
    return [window for window in cut if len(window) > 1]


def of_node(url, window):
    """Log-probabilities of all tokens of the window but the first."""
    body = {"prompt": window, "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
    answer = post(url, "/v1/completions", body)
    if answer is None:
        raise SystemExit("the server has no /v1/completions")
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    if len(logprobs) != len(window) or logprobs[0] is not None:
        raise SystemExit(f"{len(window)} tokens were sent, {len(logprobs)} log-probabilities came, the first of them {logprobs[0]}")
    return numpy.array(logprobs[1:], dtype=numpy.float64)


def of_reference(reference, window):
    """The same by llama.cpp."""
    reference.reset()
    reference.eval(window)
    logits = reference.scores[: len(window) - 1].astype(numpy.float64)
    peak = logits.max(axis=1)
    total = peak + numpy.log(numpy.exp(logits - peak[:, None]).sum(axis=1))
    return logits[numpy.arange(len(window) - 1), window[1:]] - total


def report(node, reference):
    """Prints both perplexities; how far they are apart, relative to the reference."""
    gap = node - reference
    ours, theirs = math.exp(-node.mean()), math.exp(-reference.mean())
    apart = ours / theirs - 1
    print(f"tokens scored            {len(node)}")
    print(f"perplexity, node         {ours:.4f}")
    print(f"perplexity, llama.cpp    {theirs:.4f}")
    print(f"relative difference      {apart:+.4%} (standard error {gap.std() / math.sqrt(len(gap)):.4%})")
    print(f"log-probability a token  mean |difference| {abs(gap).mean():.5f}, greatest {abs(gap).max():.4f}")
    return abs(apart)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", type=urllib.parse.urlparse, default="http://127.0.0.1:18800")
    parser.add_argument("--gguf", required=True, help="the file that the node has loaded")
    parser.add_argument("--text", type=pathlib.Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows-max", type=int, default=0, help="score only so many; 0 for all")
    parser.add_argument("--tolerance", type=float, default=0.005, help="relative difference that is still right")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    args = parser.parse_args()
    if args.url.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"{args.url.geturl()} is not on this machine; this tool sends load to loopback only")
    reference = load_reference(args.gguf, args.window, args.threads)
    begins = reference.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    cut = windows(tokenize(reference, args.url, args.text.read_text()), args.window, reference.token_bos() if begins else None)
    cut = cut[: args.windows_max or None]
    print(f"{pathlib.Path(args.gguf).name}, {args.text.name}, {len(cut)} windows of at most {args.window} tokens, begin token: {begins}")
    node = numpy.concatenate([of_node(args.url, window) for window in cut])
    apart = report(node, numpy.concatenate([of_reference(reference, window) for window in cut]))
    sys.exit(1 if apart > args.tolerance else 0)


if __name__ == "__main__":
    main()
