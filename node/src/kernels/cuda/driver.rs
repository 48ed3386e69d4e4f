//! A GPU by the CUDA driver. The driver and cuBLAS are opened when a GPU is asked for, so this binary starts where there is neither.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::{CStr, c_void},
    ptr::{from_ref, null_mut},
    sync::{Arc, Mutex},
    time::Instant,
};

use cudarc::{
    cublas::{result as blas, sys as blas_sys},
    driver::{
        result::{self, DriverError},
        sys,
    },
};

use super::device::{Device, ProductSizes};

/// All kernels, for each generation of GPUs that `build.rs` was asked for.
static KERNELS: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The driver reads words.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

/// Dynamic shared memory that a kernel gets without asking.
const SHARED_BYTES: u32 = 48 << 10;

/// Why a GPU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver on this machine.
    #[error(
        "node.device is \"cuda\", and this machine has no NVIDIA driver (libcuda.so.1): install it, or set node.device = \"cpu\""
    )]
    NoDriver,
    /// The driver knows no such GPU.
    #[error("node.gpu is {index}, and the driver finds {count} of them, which count from 0")]
    NoGpu {
        /// The GPU asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is of a generation that the kernels were not built for.
    #[error(
        "GPU {index} ({name}) is of compute capability {major}.{minor}, which this build's kernels do not run on; build with TIDEGATE_CUDA_ARCHS={major}{minor}"
    )]
    NoKernels {
        /// The GPU asked for.
        index: usize,
        /// Its name.
        name: String,
        /// Its compute capability.
        major: i32,
        /// Its lesser part.
        minor: i32,
    },
    /// Anything else that the driver says.
    #[error("the NVIDIA driver says {0:?}")]
    Driver(DriverError),
}

impl From<DriverError> for GpuError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

/// One GPU.
pub struct Gpu {
    /// Its name, such as `NVIDIA H200`.
    pub name: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static CStr, sys::CUfunction>>,
    blas: Option<blas_sys::cublasHandle_t>,
}

// SAFETY: the driver's handles may be used from any thread that has made the context its own, as `here` does
unsafe impl Send for Gpu {}
// SAFETY: as above; cuBLAS's handle is used by the one thread that computes
unsafe impl Sync for Gpu {}

thread_local! {
    /// The context that this thread has made its own.
    static BOUND: Cell<sys::CUcontext> = const { Cell::new(null_mut()) };
}

impl Gpu {
    /// Opens the GPU that the driver counts as `index`.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or none of our kernels for it.
    pub fn open(index: usize) -> Result<Arc<Self>, GpuError> {
        // SAFETY: looking for a library does nothing else
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        result::init()?;
        let count = usize::try_from(result::device::get_count()?).unwrap_or(0);
        if index >= count {
            return Err(GpuError::NoGpu { index, count });
        }
        let device = result::device::get(index as i32)?;
        let name = result::device::get_name(device)?;
        // SAFETY: the driver has been started, and the device and its context are there
        unsafe {
            let context = result::primary_ctx::retain(device)?;
            result::ctx::set_current(context)?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            let capability = |part| result::device::get_attribute(device, part);
            let major = capability(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = capability(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let module = result::module::load_data(KERNELS.0.as_ptr().cast()).map_err(|_| GpuError::NoKernels {
                index,
                name: name.clone(),
                major,
                minor,
            })?;
            let blas = open_blas(stream);
            tracing::info!(
                gpu = name,
                capability = format!("{major}.{minor}"),
                cublas = blas.is_some(),
                "the GPU computes"
            );
            Ok(Arc::new(Self { name, context, stream, module, functions: Mutex::default(), blas }))
        }
    }

    /// Bytes of its memory that are free, and all of them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.here();
        Ok(result::mem_get_info()?)
    }

    /// Bytes per second that pass through its memory, read and written together, as it copies a GiB: what bounds a step that reads
    /// every weight once.
    ///
    /// # Errors
    /// What the driver says, as when there is no room for two GiB.
    pub fn copied_bytes_per_s(&self) -> Result<f64, GpuError> {
        const BYTES: usize = 1 << 30;
        const COPIES: usize = 20;
        self.here();
        // SAFETY: both places hold as many bytes, and nothing uses them after the stream is done
        unsafe {
            let (from, to) = (result::malloc_sync(BYTES)?, result::malloc_sync(BYTES)?);
            let copy = || result::memcpy_dtod_async(to, from, BYTES, self.stream);
            copy()?;
            result::stream::synchronize(self.stream)?;
            let began = Instant::now();
            (0..COPIES).try_for_each(|_| copy())?;
            result::stream::synchronize(self.stream)?;
            let rate = (2 * BYTES * COPIES) as f64 / began.elapsed().as_secs_f64();
            result::free_sync(from)?;
            result::free_sync(to)?;
            Ok(rate)
        }
    }

    /// Makes its context this thread's own.
    fn here(&self) {
        if BOUND.get() != self.context {
            // SAFETY: the context lives as long as `self`
            self.check("use the GPU", unsafe { result::ctx::set_current(self.context) });
            BOUND.set(self.context);
        }
    }

    fn check<T>(&self, what: &str, result: Result<T, DriverError>) -> T {
        result.unwrap_or_else(|e| panic!("{} cannot {what}: {e:?}", self.name))
    }

    fn function(&self, kernel: &'static CStr, shared_bytes: u32) -> sys::CUfunction {
        let mut functions = self.functions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *functions.entry(kernel).or_insert_with(|| {
            // SAFETY: the module is loaded
            let function = unsafe { result::module::get_function(self.module, kernel.to_owned()) };
            let function = self.check(&format!("find {kernel:?}"), function);
            if shared_bytes > SHARED_BYTES {
                let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is there
                let set = unsafe { result::function::set_function_attribute(function, most, shared_bytes as i32) };
                self.check(&format!("give {kernel:?} {shared_bytes} bytes of shared memory"), set);
            }
            function
        })
    }
}

/// cuBLAS, where it is installed.
fn open_blas(stream: sys::CUstream) -> Option<blas_sys::cublasHandle_t> {
    // SAFETY: looking for a library does nothing else; the stream is there
    unsafe {
        if !blas_sys::is_culib_present() {
            return None;
        }
        let handle = blas::create_handle().ok()?;
        blas::set_stream(handle, stream.cast()).ok()?;
        Some(handle)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.here();
        // SAFETY: nothing uses them any more; what the driver says now helps nobody
        unsafe {
            let _ = self.blas.map(|handle| blas::destroy_handle(handle));
            let _ = result::module::unload(self.module);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

impl Device for Gpu {
    fn class(&self) -> String {
        format!("cuda-{}", self.name.to_ascii_lowercase().replace(' ', "-"))
    }

    fn allocate(&self, bytes: usize) -> u64 {
        self.here();
        // SAFETY: nothing reads it before it is written
        self.check(&format!("give {bytes} bytes of memory"), unsafe { result::malloc_sync(bytes) })
    }

    unsafe fn free(&self, at: u64) {
        self.here();
        // SAFETY: the caller's promise; the driver waits for work that uses it
        let _ = unsafe { result::free_sync(at) };
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) {
        self.here();
        // SAFETY: the caller's promise; from pageable memory the driver copies before it returns
        self.check("take data", unsafe { result::memcpy_htod_async(to, bytes, self.stream) });
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) {
        self.here();
        // SAFETY: the caller's promise, and the copy is waited for
        unsafe {
            self.check("give data", result::memcpy_dtoh_async(to, from, self.stream));
            self.check("compute", result::stream::synchronize(self.stream));
        }
    }

    unsafe fn clear(&self, at: u64, bytes: usize) {
        self.here();
        // SAFETY: the caller's promise
        self.check("clear memory", unsafe { result::memset_d8_async(at, 0, bytes, self.stream) });
    }

    unsafe fn launch(
        &self,
        kernel: &'static CStr,
        [x, y]: [u32; 2],
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [*mut c_void],
    ) {
        self.here();
        let function = self.function(kernel, shared_bytes);
        // SAFETY: the caller's promises
        let launched = unsafe {
            result::launch_kernel(function, (x, y, 1), (threads, 1, 1), shared_bytes, self.stream, arguments)
        };
        self.check(&format!("run {kernel:?}"), launched);
    }

    unsafe fn product(&self, x: u64, w: u64, out: u64, sizes: ProductSizes) -> bool {
        let Some(handle) = self.blas else { return false };
        self.here();
        let ProductSizes { rows, outputs, inputs, stride, add } = sizes;
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let (bf16, f32) = (blas_sys::cudaDataType_t::CUDA_R_16BF, blas_sys::cudaDataType_t::CUDA_R_32F);
        // cuBLAS counts along columns: out^T[N, T] = w[N, K] @ x^T[K, T]
        // SAFETY: the caller's promises
        let multiplied = unsafe {
            blas::gemm_ex(
                handle,
                blas_sys::cublasOperation_t::CUBLAS_OP_T,
                blas_sys::cublasOperation_t::CUBLAS_OP_N,
                outputs as i32,
                rows as i32,
                inputs as i32,
                from_ref(&one).cast(),
                w as *const c_void,
                bf16,
                inputs as i32,
                x as *const c_void,
                bf16,
                inputs as i32,
                from_ref(&beta).cast(),
                out as *mut c_void,
                f32,
                stride as i32,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        };
        if let Err(e) = multiplied {
            panic!("{} cannot multiply {rows} rows by {outputs} x {inputs} weights: {e:?}", self.name);
        }
        true
    }
}
