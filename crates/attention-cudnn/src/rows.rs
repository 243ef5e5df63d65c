//! What kernels of our own do beside cuDNN: mend rows that see nothing, and bring the logsumexp from one layout to the
//! other.

use std::sync::Arc;

use attention_core::{DType, Problem, Role, TensorDesc};
use attention_cuda::cudarc::driver::{CudaStream, DriverError, LaunchConfig, PushKernelArg};
use attention_cuda::{KernelCache, KernelError};

use crate::key::{seen_keys, seen_rows};

/// Threads of a block.
const THREADS: u32 = 128;

/// First row and end of the rows that see a key, for each batch row.
pub(crate) fn intervals(problem: &Problem) -> Vec<i32> {
    (0..problem.dims().batch)
        .flat_map(|batch| {
            let rows = seen_rows(problem, batch);
            [rows.start as i32, rows.end as i32]
        })
        .collect()
}

/// First key and end of the keys that any row sees, for each batch row.
pub(crate) fn key_intervals(problem: &Problem) -> Vec<i32> {
    (0..problem.dims().batch)
        .flat_map(|batch| {
            let keys = seen_keys(problem, batch);
            [keys.start as i32, keys.end as i32]
        })
        .collect()
}

/// Query lengths, then key lengths.
pub(crate) fn lengths(problem: &Problem) -> Vec<i32> {
    let batch = problem.dims().batch;
    let query = (0..batch).map(|batch| problem.query_len(batch) as i32);
    query.chain((0..batch).map(|batch| problem.key_value_len(batch) as i32)).collect()
}

/// Why a kernel did not run.
#[derive(Debug)]
pub(crate) enum LaunchError {
    Kernel(KernelError),
    Driver(DriverError),
}

impl From<LaunchError> for Box<dyn std::error::Error + Send + Sync> {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Kernel(error) => error.into(),
            LaunchError::Driver(error) => error.into(),
        }
    }
}

/// The arguments that both kernels share.
pub(crate) struct Rows<'a> {
    pub(crate) kernels: &'a KernelCache,
    pub(crate) stream: &'a Arc<CudaStream>,
    pub(crate) problem: &'a Problem,
    /// [`intervals`] on the device.
    pub(crate) intervals: u64,
    /// `[B, N, T]` without gaps, f32.
    pub(crate) stats: u64,
}

impl Rows<'_> {
    fn config(&self) -> LaunchConfig {
        let dims = self.problem.dims();
        let rows = dims.batch * dims.query_heads * dims.query_length;
        LaunchConfig {
            grid_dim: (u32::try_from(rows.div_ceil(THREADS as usize)).unwrap_or(u32::MAX), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    fn function(&self, name: &str) -> Result<attention_cuda::cudarc::driver::CudaFunction, LaunchError> {
        let source = attention_kernels::source("attention_rows.cu")
            .unwrap_or_else(|| unreachable!("the source is in the package"));
        self.kernels.function(self.stream.context(), source, &[], name).map_err(LaunchError::Kernel)
    }

    /// After a forward pass: zeros and -inf for rows that see nothing, and the logsumexp to the caller's tensor, where
    /// there is one.
    ///
    /// # Safety
    /// `out` is the problem's output and `lse`, where it is not 0, its logsumexp, on the stream's device.
    pub(crate) unsafe fn finish_forward(&self, out: u64, lse: u64) -> Result<(), LaunchError> {
        let dims = self.problem.dims();
        let function = self.function("attention_finish_forward")?;
        let strides = |role: Role| -> [i64; 4] {
            self.problem.tensor(role).map_or([0; 4], |desc| {
                std::array::from_fn(|axis| if axis < desc.rank() { desc.strides()[axis] as i64 } else { 0 })
            })
        };
        let (o, l) = (strides(Role::Out), strides(Role::Lse));
        let [b, t, n, e] =
            [dims.batch, dims.query_length, dims.query_heads, dims.value_head_dim].map(|x| x as i64);
        debug_assert!(matches!(self.problem.dtype(), DType::F16 | DType::Bf16));
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&out).arg(&o[0]).arg(&o[1]).arg(&o[2]).arg(&lse).arg(&l[0]).arg(&l[1]).arg(&l[2]);
        launch.arg(&self.stats).arg(&self.intervals).arg(&b).arg(&t).arg(&n).arg(&e);
        // SAFETY: the arguments are those of the kernel; it writes the output, the logsumexp and nothing else.
        unsafe { launch.launch(self.config()) }.map(|_| ()).map_err(LaunchError::Driver)
    }

    /// Copies an operand to scratch without gaps, zeros where it is masked.
    ///
    /// # Safety
    /// `from` is a tensor of this description on the stream's device, whose rows begin at multiples of 4 bytes, and `to`
    /// has room for its elements.
    pub(crate) unsafe fn clean(&self, desc: &TensorDesc, from: u64, to: u64) -> Result<(), LaunchError> {
        let function = self.function("attention_clean_rows")?;
        let (shape, strides) = (desc.shape(), desc.strides());
        let [b, t, n, h] = std::array::from_fn(|axis| shape[axis] as i64);
        let [sb, st, sn] = std::array::from_fn(|axis| strides[axis] as i64);
        let pairs = h / 2;
        let count = (b * t * n * pairs).unsigned_abs().div_ceil(u64::from(THREADS));
        let config = LaunchConfig {
            // Enough for any device; each thread goes on until all is done.
            grid_dim: (u32::try_from(count).unwrap_or(u32::MAX).clamp(1, 1 << 14), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&from).arg(&sb).arg(&st).arg(&sn).arg(&to).arg(&self.intervals);
        launch.arg(&b).arg(&t).arg(&n).arg(&pairs);
        // SAFETY: the arguments are those of the kernel; it writes the copy and nothing else.
        unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::Driver)
    }

    /// Before a backward pass: the logsumexp to scratch, +inf where a row sees nothing, so that its probabilities are 0.
    ///
    /// # Safety
    /// `lse` is the problem's logsumexp on the stream's device, and `stats` has room for it.
    pub(crate) unsafe fn prepare_backward(&self, lse: u64) -> Result<(), LaunchError> {
        let dims = self.problem.dims();
        let function = self.function("attention_prepare_backward")?;
        let desc = self.problem.tensor(Role::Lse);
        let l: [i64; 3] = desc.map_or([0; 3], |desc| std::array::from_fn(|axis| desc.strides()[axis] as i64));
        let [b, t, n] = [dims.batch, dims.query_length, dims.query_heads].map(|x| x as i64);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&lse).arg(&l[0]).arg(&l[1]).arg(&l[2]);
        launch.arg(&self.stats).arg(&self.intervals).arg(&b).arg(&t).arg(&n);
        // SAFETY: the arguments are those of the kernel; it writes the scratch and nothing else.
        unsafe { launch.launch(self.config()) }.map(|_| ()).map_err(LaunchError::Driver)
    }
}
