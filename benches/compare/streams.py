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
import typing
import urllib.parse

WORDS = "the tide comes in and the gate goes up while boats wait for water under the bridge at night".split()


class Level(typing.NamedTuple):
    """What so many streams at once came to."""

    rate: float  # tokens/s of all together
    firsts: list  # seconds to the first token of each, ascending
    prompt_tokens: int  # of the first stream, as the server counts them; 0 when it does not

    def first(self, percent):
        """A percentile of the times to the first token."""
        return self.firsts[min(len(self.firsts) - 1, len(self.firsts) * percent // 100)]


def text(i, words):
    return " ".join(WORDS[(i + k * k) % len(WORDS)] for k in range(words))


def prompts(serial, concurrency, words, prefix=0):
    """Prompts of about `words` words that no other prompt begins with; with `prefix`, all begin with the same so many words first."""
    shared = f"Book number {serial}: {text(serial, prefix)} " if prefix else ""
    return [f"{shared}Story number {serial * 1000 + k}: {text(serial * 1000 + k, words)}" for k in range(concurrency)]


class Stream(threading.Thread):
    """One streaming completion. The events are only kept while it runs, and read afterwards, so as to leave the cores to the server."""

    def __init__(self, url, prompt, tokens, model):
        super().__init__()
        self.url, self.tokens = url, tokens
        self.body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                     "stream_options": {"include_usage": True}}
        if model:
            self.body["model"] = model
        self.events, self.first, self.error = [], None, None

    def run(self):
        try:
            self.request()
        except (OSError, http.client.HTTPException) as error:
            self.error = f"{self.url.geturl()}: {error!r}"

    def request(self):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=300)
        began = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(self.body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            self.error = f"{self.url.geturl()} answered {response.status}: {response.read()[:300]}"
            return
        for line in response:
            if line.startswith(b"data: {"):
                self.events.append(line)
                if self.first is None and b'"choices":[{' in line.replace(b": ", b":"):
                    self.first = time.monotonic() - began
        connection.close()

    def usage(self):
        """What the server says it counted; else what was asked for."""
        for line in reversed(self.events):
            usage = json.loads(line[6:]).get("usage")
            if usage:
                return usage
        return {"completion_tokens": self.tokens}


def level(url, asked, tokens, model=None):
    """Sends all prompts at once, and waits for all answers.

    Stops the program when a stream fails: a figure without it would be wrong.
    """
    streams = [Stream(url, prompt, tokens, model) for prompt in asked]
    began = time.monotonic()
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    took = time.monotonic() - began
    for stream in streams:
        if stream.error or stream.first is None:
            raise SystemExit(stream.error or f"{url.geturl()} ended a stream without a token: {stream.events[-1:]}")
    usages = [stream.usage() for stream in streams]
    rate = sum(usage["completion_tokens"] for usage in usages) / took
    return Level(rate, sorted(stream.first for stream in streams), usages[0].get("prompt_tokens", 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="+", type=urllib.parse.urlparse)
    parser.add_argument("--concurrency", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=100, help="words of each prompt")
    parser.add_argument("--prefix", type=int, default=0, help="words that all prompts of a level begin with")
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
                asked = prompts(serial, concurrency, args.prompt, args.prefix)
                figures.setdefault((url.geturl(), concurrency), []).append(level(url, asked, args.tokens, args.model))
    print(f"{'server':<28} {'streams':>7} {'tokens/s':>9} {'x alone':>8} {'TTFT p50 ms':>12} {'p95 ms':>8}")
    for url in args.url:
        alone = statistics.median(f.rate for f in figures[url.geturl(), args.concurrency[0]])
        for concurrency in args.concurrency:
            rounds = figures[url.geturl(), concurrency]
            rate = statistics.median(f.rate for f in rounds)
            together = Level(rate, sorted(t for f in rounds for t in f.firsts), 0)
            p50, p95 = together.first(50) * 1e3, together.first(95) * 1e3
            print(f"{url.geturl():<28} {concurrency:>7} {rate:>9.1f} {rate / alone:>8.2f} {p50:>12.1f} {p95:>8.1f}")


if __name__ == "__main__":
    main()
