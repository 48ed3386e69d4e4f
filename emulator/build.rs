//! Compiles the kernels of `node/src/kernels/cuda` as plain C++.

const KERNELS: &str = "../node/src/kernels/cuda/cu";

fn main() {
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed={KERNELS}");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").define("EMULATED", None).include("src").include(KERNELS).file("src/simt.cpp");
    // fibers jump between stacks, and tests cannot wait for code that is not optimized
    build.flag("-U_FORTIFY_SOURCE").flag_if_supported("-Wno-unknown-pragmas").opt_level(2).compile("simt");
}
