#!/usr/bin/env python3
"""Tokens per second of OpenAI-compatible servers at several concurrencies, side by side in one run.

    benches/compare/streams.py http://127.0.0.1:18789 [http://127.0.0.1:8080 ...]

Every server gets the same requests in turn, round after round, so that what the machine does meanwhile falls on all of them alike.
Prints, for each server and concurrency, the median over the rounds of tokens/s, of the time to the first token and its 95th
percentile; and the ratio to one stream. Only the standard library is needed. Loopback only.
"""

import argparse
import http.client
import json
import statistics
import threading
import time
import urllib.parse

WORDS = "the tide comes in and the gate goes up while boats wait for water under the bridge at night".split()


def prompt(i, words):
    """A prompt of about `words` tokens that no other request begins with."""
    return f"Story number {i}: " + " ".join(WORDS[(i + k * k) % len(WORDS)] for k in range(words))


def stream(url, i, args, first, counts):
    """Runs one streaming completion; notes its time to the first token and its number of tokens."""
    body = {"prompt": prompt(i, args.prompt), "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    if args.model:
        body["model"] = args.model
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
    began = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{url.geturl()} answered {response.status}: {response.read()[:300]}")
    tokens = None
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and first[i] is None:
            first[i] = time.monotonic() - began
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    counts[i] = tokens if tokens is not None else args.tokens
    connection.close()


def level(url, concurrency, serial, args):
    """`concurrency` streams at once; tokens/s and the times to the first token."""
    first, counts = {}, {}
    ids = [serial * 1000 + k for k in range(concurrency)]
    first.update(dict.fromkeys(ids))
    threads = [threading.Thread(target=stream, args=(url, i, args, first, counts)) for i in ids]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts.values()) / (time.monotonic() - began), sorted(t for t in first.values() if t is not None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="+", type=urllib.parse.urlparse)
    parser.add_argument("--concurrency", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=100, help="words of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="model name, for servers that need one")
    args = parser.parse_args()
    for url in args.url:
        if url.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise SystemExit(f"{url.geturl()} is not on this machine; this tool sends load to loopback only")
    figures = {}
    serial = 0
    for _ in range(args.rounds):
        for concurrency in args.concurrency:
            for url in args.url:
                serial += 1
                figures.setdefault((url.geturl(), concurrency), []).append(level(url, concurrency, serial, args))
    print(f"{'server':<28} {'streams':>7} {'tokens/s':>9} {'x alone':>8} {'TTFT p50 ms':>12} {'p95 ms':>8}")
    for url in args.url:
        alone = statistics.median(f[0] for f in figures[url.geturl(), args.concurrency[0]])
        for concurrency in args.concurrency:
            rounds = figures[url.geturl(), concurrency]
            rate = statistics.median(f[0] for f in rounds)
            times = sorted(t for f in rounds for t in f[1])
            p50, p95 = times[len(times) // 2], times[min(len(times) - 1, len(times) * 95 // 100)]
            print(f"{url.geturl():<28} {concurrency:>7} {rate:>9.1f} {rate / alone:>8.2f} {p50 * 1e3:>12.1f} {p95 * 1e3:>8.1f}")


if __name__ == "__main__":
    main()
