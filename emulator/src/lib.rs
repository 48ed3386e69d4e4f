//! A CPU in the place of a GPU: runs the node's CUDA kernels, thread by thread, so that their arithmetic and addresses are tested on
//! machines without one. It shows nothing of time, and little of races.
// the kernels are C++
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};

unsafe extern "C" {
    fn simt_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        arguments: *mut *mut c_void,
    ) -> c_int;
}

/// Runs a kernel to its end: `grid` blocks of `threads` threads, each block with `shared_bytes` of dynamic shared memory. False when
/// there is no kernel of this name.
///
/// # Safety
/// `arguments` point to values of the kernel's parameter types, and what those point to is memory that the kernel may use.
pub unsafe fn launch(
    name: &CStr,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    arguments: &mut [*mut c_void],
) -> bool {
    // SAFETY: the caller's promises
    unsafe { simt_launch(name.as_ptr(), grid.as_ptr(), threads, shared_bytes, arguments.as_mut_ptr()) == 0 }
}
