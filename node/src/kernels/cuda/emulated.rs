//! A CPU in the place of a GPU, for tests.

use std::{
    alloc::{Layout, alloc, dealloc},
    collections::HashMap,
    ffi::{CStr, c_void},
    sync::Mutex,
};

use super::device::{Device, ProductSizes};

/// Its memory is this process's.
#[derive(Default)]
pub(crate) struct Emulated {
    sizes: Mutex<HashMap<u64, usize>>,
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 256).unwrap()
}

impl Device for Emulated {
    fn class(&self) -> String {
        "cuda-emulated".into()
    }

    fn allocate(&self, bytes: usize) -> u64 {
        // SAFETY: there are bytes to allocate
        let at = unsafe { alloc(layout(bytes)) };
        // what nobody wrote is no number
        unsafe { at.write_bytes(0xff, bytes) };
        self.sizes.lock().unwrap().insert(at as u64, bytes);
        at as u64
    }

    unsafe fn free(&self, at: u64) {
        let bytes = self.sizes.lock().unwrap().remove(&at).expect("it was allocated here");
        // SAFETY: as allocated
        unsafe { dealloc(at as *mut u8, layout(bytes)) };
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) {
        assert!(to != 0 && !bytes.is_empty(), "a driver may refuse to copy nothing");
        // SAFETY: the caller's promise
        unsafe { (to as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) {
        assert!(from != 0 && !to.is_empty(), "a driver may refuse to copy nothing");
        // SAFETY: the caller's promise
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
    }

    unsafe fn clear(&self, at: u64, bytes: usize) {
        assert!(at != 0 && bytes > 0, "a driver may refuse to clear nothing");
        // SAFETY: the caller's promise
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
    }

    unsafe fn launch(
        &self,
        kernel: &'static CStr,
        [x, y]: [u32; 2],
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) {
        assert!(x > 0 && y > 0, "a driver refuses {kernel:?} on an empty grid");
        // SAFETY: the caller's promises
        let is_there = unsafe { tidegate_emulator::launch(kernel, [x, y, 1], threads, shared_bytes, arguments) };
        assert!(is_there, "there is no kernel {kernel:?}");
    }

    unsafe fn product(&self, _: u64, _: u64, _: u64, _: ProductSizes) -> bool {
        false
    }
}
