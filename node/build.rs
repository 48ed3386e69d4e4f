//! With the feature `cuda`, compiles the kernels by nvcc: found in `CUDA_HOME` or on the PATH, for the generations of GPUs that
//! `TIDEGATE_CUDA_ARCHS` lists (`80,86,89,90` unless it says otherwise).

use std::{env, path::PathBuf, process::Command};

const KERNELS: &str = "src/kernels/cuda/cu";
const ARCHS: &str = "80,86,89,90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for input in ["TIDEGATE_CUDA_ARCHS", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={input}");
    }
    println!("cargo:rerun-if-changed={KERNELS}");
    let home = env::var_os("CUDA_HOME").map(PathBuf::from);
    let nvcc = home.map_or(PathBuf::from("nvcc"), |home| home.join("bin/nvcc"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where")).join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "--threads", "0", "-fatbin", "-o"])
        .arg(out)
        .arg(format!("{KERNELS}/kernels.cu"));
    for arch in env::var("TIDEGATE_CUDA_ARCHS").as_deref().unwrap_or(ARCHS).split(',') {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} ended with {status}", nvcc.display()),
        Err(e) => panic!(
            "{}: {e}\n  fix: set CUDA_HOME to a CUDA toolkit, or run `make cuda-build`, which fetches nvcc",
            nvcc.display()
        ),
    }
}
