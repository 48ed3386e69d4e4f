//! What runs kernels: a GPU by its driver, or in tests a CPU in its place.

use std::{
    ffi::{CStr, c_void},
    marker::PhantomData,
    sync::Arc,
};

/// Threads of a block where an operation has no reason for another number.
pub(super) const THREADS: u32 = 128;

/// A device with memory of its own and one queue of work: what is asked for happens in that order.
///
/// A device that fails is not usable any more, so every failure is a panic that says what was asked of it.
pub trait Device: Send + Sync + 'static {
    /// Devices of one class give the same answers.
    fn class(&self) -> String;

    /// Memory of `bytes` bytes, aligned to 256.
    fn allocate(&self, bytes: usize) -> u64;

    /// # Safety
    /// `at` came from [`Device::allocate`], and nothing uses it any more.
    unsafe fn free(&self, at: u64);

    /// # Safety
    /// As many bytes are there.
    unsafe fn upload(&self, to: u64, bytes: &[u8]);

    /// Waits for all work before it.
    ///
    /// # Safety
    /// As many bytes are there.
    unsafe fn download(&self, from: u64, to: &mut [u8]);

    /// Fills with zeros.
    ///
    /// # Safety
    /// As many bytes are there.
    unsafe fn clear(&self, at: u64, bytes: usize);

    /// Runs a kernel on `grid` blocks of `threads` threads with `shared_bytes` of dynamic shared memory.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameters, and what those point to is the device's memory.
    unsafe fn launch(
        &self,
        kernel: &'static CStr,
        grid: [u32; 2],
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    );

    /// `out[T, N] = x[T, K] @ w[N, K]^T`, or added to it, with bf16 in and f32 out and `stride` from row to row of `out`. False when the
    /// device has nothing for it that is better with many rows than our own kernels.
    ///
    /// # Safety
    /// The matrices are there.
    unsafe fn product(&self, x: u64, w: u64, out: u64, sizes: ProductSizes) -> bool;
}

/// Sizes of [`Device::product`].
#[derive(Debug, Clone, Copy)]
pub struct ProductSizes {
    /// Rows, `T`.
    pub rows: usize,
    /// Outputs, `N`.
    pub outputs: usize,
    /// Inputs, `K`.
    pub inputs: usize,
    /// From row to row of the outputs.
    pub stride: usize,
    /// Whether to add to what is there.
    pub add: bool,
}

/// Launches a kernel with arguments of any types: device addresses as u64, whole numbers as i32, `#[repr(C)]` structures.
macro_rules! launch {
    ($device:expr, $kernel:expr, $grid:expr, $threads:expr, $shared:expr; $($argument:expr),* $(,)?) => {
        $device.launch($kernel, $grid, $threads, $shared, &mut [$(std::ptr::from_mut(&mut { $argument }).cast()),*])
    };
}
pub(super) use launch;

/// Values in the device's memory.
pub(super) struct Buffer<D: Device, T> {
    device: Arc<D>,
    at: u64,
    capacity: usize,
    of: PhantomData<T>,
}

/// What can be copied to and from a device byte by byte.
pub(super) trait Plain: Copy + Send + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for half::f16 {}
impl Plain for half::bf16 {}

impl<D: Device, T: Plain> Buffer<D, T> {
    pub(super) fn new(device: &Arc<D>, capacity: usize) -> Self {
        let at = if capacity == 0 { 0 } else { device.allocate(capacity * size_of::<T>()) };
        Self { device: device.clone(), at, capacity, of: PhantomData }
    }

    pub(super) fn of(device: &Arc<D>, values: &[T]) -> Self {
        let mut buffer = Self::new(device, values.len());
        buffer.write(values);
        buffer
    }

    /// Zeros.
    pub(super) fn zeros(device: &Arc<D>, capacity: usize) -> Self {
        let buffer = Self::new(device, capacity);
        if capacity > 0 {
            // SAFETY: the buffer has so many bytes
            unsafe { device.clear(buffer.at, capacity * size_of::<T>()) };
        }
        buffer
    }

    /// Makes room for so many values; what was there may be lost.
    pub(super) fn reserve(&mut self, count: usize) {
        if count > self.capacity {
            *self = Self::new(&self.device, count);
        }
    }

    /// Writes values at its beginning.
    pub(super) fn write(&mut self, values: &[T]) {
        if values.is_empty() {
            return;
        }
        self.reserve(values.len());
        // SAFETY: plain values are bytes, and the buffer has room for as many
        unsafe {
            let bytes = std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values));
            self.device.upload(self.at, bytes);
        }
    }

    /// Reads as many values as `to` holds.
    pub(super) fn read(&self, to: &mut [T]) {
        self.read_from(0, to);
    }

    /// The same from its `first`th value on. Waits for the device, but not for nothing.
    pub(super) fn read_from(&self, first: usize, to: &mut [T]) {
        if to.is_empty() {
            return;
        }
        assert!(first + to.len() <= self.capacity, "only what is there is read");
        // SAFETY: plain values are bytes, any bytes are such values, and the buffer has as many
        unsafe {
            let bytes = std::slice::from_raw_parts_mut(to.as_mut_ptr().cast(), size_of_val(to));
            self.device.download(self.at_value(first), bytes);
        }
    }

    /// Where it lies in the device's memory.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Where its `i`th value lies.
    pub(super) fn at_value(&self, i: usize) -> u64 {
        self.at + (i * size_of::<T>()) as u64
    }
}

impl<D: Device, T> Drop for Buffer<D, T> {
    fn drop(&mut self) {
        if self.at != 0 {
            // SAFETY: it came from the device, and its one owner is gone
            unsafe { self.device.free(self.at) };
        }
    }
}
