#!/usr/bin/env python3
"""What it costs the balancer that a stream can go on elsewhere: CPU for each streamed token, and memory of many open streams.

    relay.py [--binary target/release/tidegate] [--streams 1000] [--tokens 2000] [--rounds 3]

One balancer at a time, a node that is none but writes its wire, and clients that only count. Each setting carries the same streams at the same
pace; the settings alternate, round after round. `on` is the default, and `off` keeps no tokens (`max_resumes = 0`). CPU is user and system time of the
balancer's process while the tokens pass; memory is what is resident when every stream has had all its tokens and is still open, beside
what was resident before the first.
"""

import argparse
import asyncio
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

NODE_PORT, EDGE_PORT, ADMIN_PORT = 23900, 23901, 23902
MODEL = "stand-in"
SETTINGS = {"on": "", "off": "max_resumes = 0"}

HEALTH = (
    b'{"status":"healthy","uptime":1,"node":"n1","model":"stand-in","version":"","color":"blue","site":"local","build":"0","device":"none",'
    b'"context":8192,"running":0,"waiting":0,"kv_blocks_free":1,"kv_blocks_total":1,"step":0}'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DATA = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"stand-in",'
    b'"system_fingerprint":"stand-in","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
WAIT = b": wait\n\n"
BODY = b'{"model":"stand-in","stream":true,"messages":[{"role":"user","content":"Speak."}]}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


class Node(asyncio.Protocol):
    """Answers `GET /health`; holds every other request open as a stream."""

    streams = []

    def connection_made(self, transport):
        self.transport, self.seen = transport, b""

    def data_received(self, data):
        self.seen += data
        if self.seen.startswith(b"GET ") and self.seen.endswith(b"\r\n\r\n"):
            self.seen = b""
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(HEALTH), HEALTH))
        elif self.seen.endswith(BODY):
            self.seen = b""
            self.transport.write(HEAD)
            Node.streams.append(self.transport)


async def node(streams, tokens, interval):
    """Once all streams are there, a token for each of them every `interval` seconds; then none, until a line comes by standard input."""
    await (await asyncio.get_running_loop().create_server(Node, "127.0.0.1", NODE_PORT)).start_serving()
    while len(Node.streams) < streams:
        await asyncio.sleep(0.5)
        write_all(chunk(WAIT))
    print("begin", flush=True)
    due = time.monotonic()
    for offset in range(tokens):
        write_all(chunk(b"id: 0:%d:%d\n" % (offset, 1000 + offset) + DATA))
        due = max(due + interval, time.monotonic())
        await asyncio.sleep(due - time.monotonic())
    print("done", flush=True)
    line = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    while not line.done():
        write_all(chunk(WAIT))
        await asyncio.wait([line], timeout=0.9)
    write_all(chunk(b"id: end\ndata: [DONE]\n\n") + b"0\r\n\r\n")
    await asyncio.sleep(1)


def write_all(data):
    for stream in Node.streams:
        stream.write(data)


class Client(asyncio.Protocol):
    """Counts the events of all clients."""

    events = 0
    ended = 0

    def connection_made(self, transport):
        transport.write(REQUEST)

    def data_received(self, data):
        Client.events += data.count(b"data: {")
        Client.ended += data.count(b"[DONE]")


class Balancer:
    """A running balancer, and what the system says of it."""

    def __init__(self, binary, folder, setting):
        config = pathlib.Path(folder) / "relay.toml"
        config.write_text(
            f"""
[cluster.registry]
kind = "static"
nodes = [{{ id = "n1", address = "127.0.0.1:{NODE_PORT}", model = "{MODEL}" }}]
[balancer]
listen = "127.0.0.1:{EDGE_PORT}"
admin.listen = "127.0.0.1:{ADMIN_PORT}"
limits = {{ max_concurrent_requests = 100000, max_connections_per_address = 100000 }}
[balancer.relay]
request_timeout = "1h"
{SETTINGS[setting]}
[log]
level = "warn"
"""
        )
        self.process = subprocess.Popen([binary, "balancer", "--config", config])

    def is_ready(self):
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{ADMIN_PORT}/readyz", timeout=1):
                return True
        except OSError:
            return False

    def cpu_s(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self):
        lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def end(self):
        self.process.terminate()
        self.process.wait(60)


async def measure(args, setting):
    """Microseconds of CPU for each token, bytes resident for each stream, bytes resident before."""
    Client.events = Client.ended = 0
    words = ["--streams", args.streams, "--tokens", args.tokens, "--interval", args.interval, "--node"]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    node = await asyncio.create_subprocess_exec(sys.executable, __file__, *map(str, words), **pipes)
    with tempfile.TemporaryDirectory() as folder:
        balancer = Balancer(args.binary, folder, setting)
        try:
            while not await asyncio.to_thread(balancer.is_ready):
                await asyncio.sleep(0.1)
            idle = balancer.resident_bytes()
            loop = asyncio.get_running_loop()
            clients = [(await loop.create_connection(Client, "127.0.0.1", EDGE_PORT))[0] for _ in range(args.streams)]
            assert await node.stdout.readline() == b"begin\n"
            before = balancer.cpu_s()
            assert await node.stdout.readline() == b"done\n"
            await until(lambda: Client.events, args.streams * args.tokens)
            cpu, resident = balancer.cpu_s() - before, balancer.resident_bytes()
            node.stdin.write(b"\n")
            await until(lambda: Client.ended, args.streams)
            for client in clients:
                client.close()
        finally:
            balancer.end()
            node.terminate()
            await node.wait()
    return cpu / (args.streams * args.tokens) * 1e6, (resident - idle) / args.streams, idle


async def until(count, wanted):
    """Every stream must come through whole, or the figures mean nothing."""
    deadline = time.monotonic() + 30
    while count() < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"only {count()} of {wanted} came through")
        await asyncio.sleep(0.05)


async def compare(args):
    seen = {setting: [] for setting in SETTINGS}
    for turn in range(args.rounds):
        for setting in list(SETTINGS)[:: 1 if turn % 2 == 0 else -1]:
            cpu, memory, idle = await measure(args, setting)
            seen[setting].append((cpu, memory))
            print(f"round {turn + 1}, {setting:<3}: {cpu:.2f} us a token, {memory / 1024:.1f} KiB a stream, {idle / 2**20:.1f} MiB before", flush=True)
    print(f"\n{args.streams} streams of {args.tokens} tokens, one each {args.interval} s; medians of {args.rounds} rounds")
    print(f"{'resume':<8}{'us of CPU a token':>20}{'KiB a stream':>16}")
    middle = {setting: [statistics.median(column) for column in zip(*rows)] for setting, rows in seen.items()}
    for setting, (cpu, memory) in middle.items():
        print(f"{setting:<8}{cpu:>20.2f}{memory / 1024:>16.1f}")
    print(f"{'more':<8}{middle['on'][0] / middle['off'][0] - 1:>20.1%}{middle['on'][1] / middle['off'][1] - 1:>16.1%}")


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--binary", default="target/release/tidegate")
    words.add_argument("--streams", type=int, default=1000)
    words.add_argument("--tokens", type=int, default=2000)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--interval", type=float, default=0.06, help="seconds between two tokens of a stream")
    words.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    args = words.parse_args()
    asyncio.run(node(args.streams, args.tokens, args.interval) if args.node else compare(args))


if __name__ == "__main__":
    main()
