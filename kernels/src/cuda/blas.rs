//! cuBLASLt, loaded at run time: the product of many rows with a matrix.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use super::device::{DeviceError, Product};

/// What the library may use of the device's memory; NVIDIA's advice for compute capability 9.0.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// The library and what it has found out about shapes.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    /// How each shape is multiplied.
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: the library allows one handle in several threads; all calls below are under the lock of `plans`.
unsafe impl Send for Blas {}
// SAFETY: likewise.
unsafe impl Sync for Blas {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    has_bias: bool,
}

/// Descriptors are the library's, and kept for as long as the program runs: there are as many as shapes.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Shapes whose way is remembered. A step has four products per layer, all layers alike, and as many numbers of rows
/// as there are sizes of chunks.
const PLANS_MAX: usize = 4096;

fn refused(asked: &str) -> impl Fn(lt::CublasError) -> DeviceError {
    let asked = asked.to_string();
    move |error| DeviceError::Refused { asked: asked.clone(), reason: format!("cuBLASLt: {error:?}") }
}

impl Blas {
    /// The library, if the machine has it.
    ///
    /// # Errors
    /// What it says when it is there and cannot be used.
    pub(super) fn open() -> Result<Option<Self>, DeviceError> {
        // SAFETY: it opens and closes the library, whose initialisers may run at any time.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let handle = lt::create_handle().map_err(refused("open cuBLASLt"))?;
        Ok(Some(Self { handle, plans: Mutex::default() }))
    }

    /// Starts a product on a stream.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Safety
    /// The addresses begin matrices of the stated shapes; `workspace` begins [`WORKSPACE_BYTES`] that only this
    /// stream uses; the device's context is current.
    pub(super) unsafe fn multiply(
        &self,
        product: &Product,
        workspace: u64,
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        let Product { x, w, bias, out, m, n, k, add } = *product;
        let shape = Shape { m, n, k, has_bias: bias != 0 };
        let mut plans = self.plans.lock().expect("nobody panics with it");
        if plans.len() >= PLANS_MAX {
            for (_, plan) in plans.drain() {
                plan.destroy();
            }
        }
        let plan = match plans.entry(shape) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(free) => free.insert(self.plan(shape)?),
        };
        if shape.has_bias {
            // SAFETY: the descriptor lives in the table; the attribute is a pointer.
            unsafe { set(plan.operation, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias) }?;
        }
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let value = |number: &f32| std::ptr::from_ref(number).cast::<c_void>();
        // SAFETY: by this function's contract; descriptors live in the table, alpha and beta until the call returns.
        unsafe {
            lt::matmul(
                self.handle,
                plan.operation,
                value(&alpha),
                value(&beta),
                w as *const c_void,
                plan.w,
                x as *const c_void,
                plan.x,
                out as *const c_void,
                plan.out,
                out as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(refused("multiply"))
    }

    /// The library counts columns first: out^T `[n, m]` = w^T^T `[n, k]` times x^T `[k, m]`.
    fn plan(&self, shape: Shape) -> Result<Plan, DeviceError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let failed = refused("describe a product");
        let Shape { m, n, k, has_bias } = shape;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = lt::create_matmul_desc(compute, CUDA_R_32F).map_err(&failed)?;
        let transposed = 1i32; // CUBLAS_OP_T
        // SAFETY: the descriptor was just made, the values have the attributes' types.
        unsafe { set(operation, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed) }?;
        if has_bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            // SAFETY: likewise.
            unsafe { set(operation, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue) }?;
        }
        let layout = |dtype, rows: usize, columns: usize| {
            lt::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64).map_err(&failed)
        };
        let (w, x, out) = (layout(CUDA_R_16BF, k, n)?, layout(CUDA_R_16BF, k, m)?, layout(CUDA_R_32F, n, m)?);
        let preference = lt::create_matmul_pref().map_err(&failed)?;
        let workspace = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: the preference was just made; the attribute is a size.
        unsafe { lt::set_matmul_pref_attribute(preference, workspace, (&raw const bytes).cast(), size_of_val(&bytes)) }
            .map_err(&failed)?;
        // SAFETY: everything was just made.
        let found = unsafe { lt::get_matmul_algo_heuristic(self.handle, operation, w, x, out, out, preference) };
        // SAFETY: made above, used by nobody else.
        unsafe { lt::destroy_matmul_pref(preference) }.map_err(&failed)?;
        let found = found.map_err(refused(&format!("multiply [{m}, {k}] with [{n}, {k}]")))?;
        Ok(Plan { operation, w, x, out, algorithm: found.algo })
    }
}

impl Plan {
    fn destroy(self) {
        // SAFETY: made in `plan`, used under the lock that is held. A failure leaves a few bytes of host memory.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.operation);
            for layout in [self.w, self.x, self.out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

use sys::cublasLtMatmulDescAttributes_t as Attribute;

/// # Safety
/// `operation` exists, and `value` has the type of the attribute.
unsafe fn set<T>(operation: sys::cublasLtMatmulDesc_t, attribute: Attribute, value: &T) -> Result<(), DeviceError> {
    // SAFETY: by this function's contract.
    unsafe { lt::set_matmul_desc_attribute(operation, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(refused("describe a product"))
}

impl Drop for Blas {
    fn drop(&mut self) {
        for (_, plan) in self.plans.get_mut().expect("nobody panics with it").drain() {
            plan.destroy();
        }
        // SAFETY: made in `open`, used by nobody else.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}
