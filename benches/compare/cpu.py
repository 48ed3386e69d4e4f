#!/usr/bin/env python3
"""Tidegate beside llama.cpp on this machine's CPU: `make bench-cpu`.

Alternates ours and theirs round after round, on the same model files and the same number of threads, and prints the ratio of each round
as median (least..greatest). Three parts, each alone with --only:

  engine  whole forward passes without a server (benches/engine; llama-bench and llama-batched-bench), and our share of the machine's limits
  server  streams through HTTP at 1, 8 and 32 at once, and 32 that share a prefix: tokens/s, time to the first token, peak memory
  edge    32 streams to a node, straight and through a balancer on the same cores

The first time it fetches and builds llama.cpp. Standard library only; needs cmake, a C++ compiler, cargo and pip. Loopback only.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import llama  # noqa: E402
import servers  # noqa: E402
import streams  # noqa: E402
from report import Report, ratios, spread, table  # noqa: E402

PARTS = ["engine", "server", "edge"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
PREFILL, LEVELS, BEHIND, TOKENS = 512, [1, 8, 32], 128, 32

# Through HTTP: words that come to prompts of about 125 tokens and to a shared prefix of about 500, tokens of each answer, and positions
# of a sequence that hold all of them.
PROMPT_WORDS, PREFIX_WORDS, ANSWER, POSITIONS = 117, 495, 64, 768
SERVED = {"1": (1, 0), "8": (8, 0), "32": (32, 0), "32 with a prefix": (32, PREFIX_WORDS)}
SLOTS = 32


def alternate(round_, first, second):
    """Runs both, the other one first in every second round."""
    for one in (first, second) if round_ % 2 == 0 else (second, first):
        one()


def engine_program(args):
    """The benchmark's program, built as the release is."""
    if args.engine:
        return args.engine
    command = ["cargo", "bench", "--locked", "--quiet", "--bench", "engine", "--no-run", "--message-format", "json"]
    lines = llama.run(command, cwd=ROOT).splitlines()
    found = [m["executable"] for m in map(json.loads, lines) if m.get("executable") and m["target"]["name"] == "engine"]
    return pathlib.Path(found[-1])


def default_model(args):
    """The GGUF file of the default model; fetched when it is not there."""
    command = [args.tidegate, "model", "pull", "smollm2-135m"]
    return pathlib.Path(llama.run(command).splitlines()[-1])


class Engine:
    """The first part."""

    def __init__(self, args, report, peers, files):
        self.args, self.report, self.peers, self.files = args, report, peers, files
        self.program = engine_program(args)

    def round(self, number):
        for form, file in self.files.items():
            alternate(number, lambda: self.ours(form, file), lambda: self.theirs(form, file))

    def ours(self, form, file):
        command = [self.program, "--model", file, "--threads", self.args.threads, "--prefill", PREFILL,
                   "--decode", ",".join(map(str, LEVELS)), "--behind", BEHIND, "--tokens", TOKENS, "--json"]
        told = json.loads(llama.run(command))
        limits, prefill, decode = told["limits"], told["prefill"][str(PREFILL)], told["decode"]
        self.note("ours", form, prefill, {level: decode[str(level)] for level in LEVELS})
        self.report.add("engine", f"{form} memory bytes/s", limits["read_bytes_per_s"])
        self.report.add("engine", f"{form} decode limit", limits["read_bytes_per_s"] / limits["step_bytes"])
        if limits["int8_macs_per_s"] and limits["token_macs"]:
            macs = limits["token_macs"] + limits["head_macs"] / PREFILL
            self.report.add("engine", f"{form} int8 MAC/s", limits["int8_macs_per_s"])
            self.report.add("engine", f"{form} prefill limit", limits["int8_macs_per_s"] / macs)

    def theirs(self, form, file):
        for name, programs in self.peers.items():
            prefill = llama.prefill(programs, file, PREFILL, self.args.threads)
            self.note(name, form, prefill, llama.decode(programs, file, LEVELS, BEHIND, TOKENS, self.args.threads))

    def note(self, who, form, prefill, decode):
        self.report.add("engine", f"{who} {form} prefill", middle(prefill))
        for level, rates in decode.items():
            self.report.add("engine", f"{who} {form} decode {level}", middle(rates))

    def print(self):
        get = lambda name: self.report.get("engine", name)
        measures = ["prefill"] + [f"decode {level}" for level in LEVELS]
        for peer in self.peers:
            beside = lambda label, ours, theirs: [label, spread(ours), spread(theirs), spread(ratios(ours, theirs), 2)]
            rows = [beside(f"{form} {m}", get(f"ours {form} {m}"), get(f"{peer} {form} {m}")) for form in self.files for m in measures]
            # what we make of the default file against the format that llama.cpp is best at
            rows += [beside(f"Q4_1 : Q4_0 {m}", get(f"ours Q4_1 {m}"), get(f"{peer} Q4_0 {m}")) for m in measures]
            title = f"Engine: tokens/s, prompt of {PREFILL} and decode of so many sequences at {BEHIND} positions; llama.cpp {peer}"
            table(title, ["", "ours", "llama.cpp", "ratio"], rows)
        rows = [self.share(form, m) for form in self.files for m in ("decode", "prefill")]
        table("Share of the machine's limits, measured in the same run", ["", "machine", "limit, tokens/s", "ours, %"], rows)
        print("  decode alone: memory bandwidth over the weights' bytes; prefill: int8 products (vpdpbusd) of all layers, and the head once")

    def share(self, form, measure):
        name, unit, which = ("decode 1", "memory bytes/s", "GB/s") if measure == "decode" else ("prefill", "int8 MAC/s", "GMAC/s")
        limit = self.report.get("engine", f"{form} {measure} limit")
        if not limit:
            return [f"{form} {measure}", "not measured", "", ""]
        shares = [100 * r for r in ratios(self.report.get("engine", f"ours {form} {name}"), limit)]
        machine = [value / 1e9 for value in self.report.get("engine", f"{form} {unit}")]
        return [f"{form} {measure}", f"{spread(machine)} {which}", spread(limit), spread(shares)]


class Served:
    """The second part: both servers are started anew each round; levels ascend, and the peak of memory is counted for each."""

    def __init__(self, args, report, peers, files):
        self.args, self.report = args, report
        self.model, (self.peer, programs) = files["Q4_1"], next(iter(peers.items()))
        self.theirs = [programs / "llama-server", "-m", self.model, "--host", "127.0.0.1", "--port", args.port + 1,
                       "-t", args.threads, "-np", SLOTS, "-c", SLOTS * POSITIONS]
        self.serial, self.counts_peaks = 0, True

    def round(self, number):
        config = write_config(self.args, self.model)
        with contextlib.ExitStack() as running:
            start = lambda name, command, port: running.enter_context(
                servers.started(command, port, self.args.cache / f"{name}.log"))
            ours = start("node", [self.args.tidegate, "node", "--config", config], self.args.port)
            theirs = start("llama-server", self.theirs, self.args.port + 1)
            for server in (ours, theirs):
                streams.level(server.url, ["Once upon a time"], 8)
            for name in SERVED:
                alternate(number, lambda: self.measure("ours", ours, name), lambda: self.measure("theirs", theirs, name))

    def measure(self, who, server, name):
        concurrency, prefix = SERVED[name]
        self.serial += 1
        self.counts_peaks &= server.forget_peak()
        found = streams.level(server.url, streams.prompts(self.serial, concurrency, PROMPT_WORDS, prefix), ANSWER)
        note = lambda what, value: self.report.add("server", f"{who} {name} {what}", value)
        note("tokens/s", found.rate)
        note("first p50 ms", found.first(50) * 1e3)
        note("first p95 ms", found.first(95) * 1e3)
        note("prompt tokens", found.prompt_tokens)
        if server.peak_bytes():
            note("peak MB", server.peak_bytes() / 1e6)

    def print(self):
        get = lambda who, name, what: self.report.get("server", f"{who} {name} {what}")
        for what, title in (("tokens/s", "tokens/s"), ("first p50 ms", "time to the first token, median, ms"),
                            ("first p95 ms", "time to the first token, 95th percentile, ms"), ("peak MB", "peak of resident memory, MB")):
            rows = [[name, *self.row(get("ours", name, what), get("theirs", name, what))] for name in SERVED]
            table(f"Server, {self.model.name}: {title}", ["streams", "ours", f"llama.cpp {self.peer}", "ratio"], rows)
        sizes = {name: get("ours", name, "prompt tokens")[-1] for name in SERVED}
        print(f"  prompts of {sizes['1']:.0f} tokens, {sizes['32 with a prefix']:.0f} with the prefix; {ANSWER} tokens out; "
              f"llama-server with {SLOTS} slots of {POSITIONS} positions; a node with its defaults")
        print("  peak: VmHWM, " + ("counted anew at each level" if self.counts_peaks else "since the start of the round (levels ascend)"))

    def row(self, ours, theirs):
        if not (ours and theirs):
            return ["not measured", "", ""]
        return [spread(ours), spread(theirs), spread(ratios(ours, theirs), 2)]


class Edge:
    """The third part: what a balancer on the same cores takes from its node."""

    def __init__(self, args, report, files):
        self.args, self.report, self.model, self.serial = args, report, files["Q4_1"], 0

    def round(self, number):
        config, cache = write_config(self.args, self.model), self.args.cache
        with servers.started([self.args.tidegate, "node", "--config", config], self.args.port, cache / "node.log") as node, \
                servers.started([self.args.tidegate, "balancer", "--config", config], self.args.port + 2, cache / "balancer.log") as edge:
            for server in (node, edge):
                streams.level(server.url, ["Once upon a time"], 8)
            for turn in range(2):
                alternate(number + turn, lambda: self.measure("straight", node), lambda: self.measure("balanced", edge))

    def measure(self, who, server):
        self.serial += 1
        found = streams.level(server.url, streams.prompts(self.serial, SLOTS, PROMPT_WORDS), ANSWER)
        self.report.add("edge", f"{who} tokens/s", found.rate)
        self.report.add("edge", f"{who} first p95 ms", found.first(95) * 1e3)

    def print(self):
        get = lambda name: self.report.get("edge", name)
        rows = []
        for what in ("tokens/s", "first p95 ms"):
            straight, balanced = get(f"straight {what}"), get(f"balanced {what}")
            change = [100 * (ratio - 1) for ratio in ratios(balanced, straight)]
            rows.append([what, spread(straight), spread(balanced), spread(change, 1)])
        table(f"Edge: {SLOTS} streams", ["", "node", "through a balancer", "change, %"], rows)


def write_config(args, model):
    """One file for node and balancer: a list of one node, all on loopback."""
    file = args.cache / "cluster.toml"
    listen = [f"127.0.0.1:{args.port + i}" for i in range(4)]
    file.write_text(f"""\
[cluster.registry]
kind = "static"
[[cluster.registry.nodes]]
id = "n1"
address = "{listen[0]}"
model = "bench"
[node]
id = "n1"
listen = "{listen[0]}"
admin.listen = "off"
model = {json.dumps(str(model))}
served_model_name = "bench"
threads = {args.threads}
[balancer]
listen = "{listen[2]}"
admin.listen = "{listen[3]}"
""")
    return file


def middle(values):
    return sorted(values)[len(values) // 2]


def processor():
    """The processor's name, as far as the system tells."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=15, help="no round begins that would end later, but for the first")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be given twice")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side [all cores]")
    parser.add_argument("--llama", default="auto", help="builds of llama.cpp, comma between: native, no-amx; the first one serves "
                        "[auto: native unless it dies]")
    parser.add_argument("--tidegate", type=pathlib.Path, default=ROOT / "target/release/tidegate")
    parser.add_argument("--engine", type=pathlib.Path, help="a program of benches/engine [built by cargo bench]")
    parser.add_argument("--port", type=int, default=18870, help="the first of four ports on loopback")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "target/bench-cpu", help="llama.cpp, models, logs and results")
    args = parser.parse_args()
    args.llama = args.llama.split(",")
    unknown = set(args.llama) - {"auto", *llama.BUILDS} or ("auto" in args.llama and len(args.llama) > 1)
    if unknown:
        parser.error("--llama takes auto, or a list of " + ", ".join(llama.BUILDS))
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not args.tidegate.is_file():
        parser.error(f"{args.tidegate} is not there: run `make build`, or name one with --tidegate")
    return args


def run_rounds(running, args):
    """Runs rounds of all parts, as many as asked for, or as fit into the time; how many."""
    began, longest = time.monotonic(), 0.0
    for number in range(args.rounds):
        start = time.monotonic()
        if number and start - began + longest > args.minutes * 60:
            print(f"no time for more than {number} rounds in {args.minutes:g} minutes (--minutes)")
            return number
        for name, part in running.items():
            print(f"round {number + 1} of {args.rounds}, {name}", flush=True)
            part.round(number)
        longest = max(longest, time.monotonic() - start)
    return args.rounds


def main():
    args = parse()
    args.cache.mkdir(parents=True, exist_ok=True)
    peers, files = llama.peers(args.cache, default_model(args), args.llama)
    report = Report()
    make = {"engine": lambda: Engine(args, report, peers, files), "server": lambda: Served(args, report, peers, files),
            "edge": lambda: Edge(args, report, files)}
    running = {part: make[part]() for part in PARTS if part in (args.only or PARTS)}
    rounds = run_rounds(running, args)
    print(f"\n{processor()}, {args.threads} threads, {rounds} rounds, {llama.PACKAGE} {llama.VERSION} ({', '.join(peers)})")
    for part in running.values():
        part.print()
    out = args.cache / "result.json"
    report.write(out, {"processor": processor(), "threads": args.threads, "llama": {"version": llama.VERSION, "builds": list(peers)}})
    print(f"\nevery round's figures: {out}")


if __name__ == "__main__":
    main()
