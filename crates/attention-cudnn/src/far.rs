//! Far rows: rows whose logsumexp is so large that its rounding error would show in their gradients. A kernel
//! computes their row maxima and row sums into scratch, for the kernels that run after cuDNN's plan; cuDNN
//! takes the rounded logsumexp as exact.

use attention_core::{CallProblem, Error, Pass, Problem, Role};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig};
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{Addresses, failure, launch};
use attention_kernels::Variant;

use crate::key::Key;
use crate::large;
use crate::nan_isolation;
use crate::runtime::Runtime;
use crate::{CudnnConfig, NAME};

/// Rows per block, for two warps: the tiles of the largest heads then fit into the 48 KiB of shared memory
/// that every block may use (a test checks this).
const ROWS: usize = 32;
const WARPS: usize = 2;

/// Keys per tile: as small as the rows, for the same limit of shared memory.
const KEYS: usize = 32;

/// The kernel `attention_sum_rows` for a problem.
#[derive(Debug)]
pub(crate) struct FarRows {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// Whether a problem needs the kernel: in backward, if the logsumexp [may be large](large::may_be_large) and
/// results can be recomputed, or for the gradient of sinks.
pub(crate) fn is_needed(problem: &Problem, key: &Key, config: &CudnnConfig) -> bool {
    let of_large = large::may_be_large(problem) && nan_isolation::is_needed(problem, key, config);
    problem.pass() == Pass::Backward && (of_large || problem.has(Role::DSinks))
}

impl FarRows {
    /// The kernel for a problem, or `None` if the problem does not need it.
    pub(crate) fn of(
        runtime: &Runtime,
        problem: &Problem,
        key: &Key,
        config: &CudnnConfig,
    ) -> Result<Option<Self>, Error> {
        let dims = problem.dims();
        let blocks =
            dims.query_length.div_ceil(ROWS).saturating_mul(dims.query_heads).saturating_mul(dims.batch);
        if !is_needed(problem, key, config) || blocks == 0 {
            return Ok(None);
        }
        let variant = nan_isolation::fused(problem).tile(ROWS, KEYS).warps(WARPS);
        let function = runtime
            .function("attention_backward_sums.cu", Variant::Fused(variant), "attention_sum_rows")
            .map_err(|error| failure(NAME, "compiling a kernel", error))?;
        let config = LaunchConfig {
            grid_dim: (u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1),
            block_dim: (variant.threads() as u32, 1, 1),
            shared_mem_bytes: shared_bytes(dims.head_dim) as u32,
        };
        Ok(Some(Self { parameters: ProblemParameters::new(problem), function, config }))
    }

    /// Enqueues the kernel; `prepare_backward`, which sets the numbers of the heads to 0, must have been
    /// enqueued before.
    ///
    /// # Safety
    /// `call` is a call of the problem that this kernel was made for, and `memory` has a tensor of the
    /// problem's description for each of its roles. `stored` is 0 or the address of the call's stored
    /// numbers, and `start` is that of as many floats of scratch as [`numbers`](large::numbers) says. All of
    /// it is valid on the device's stream until the work is done.
    pub(crate) unsafe fn run(
        &self,
        runtime: &Runtime,
        call: &CallProblem<'_>,
        memory: &Addresses,
        stored: u64,
        start: u64,
    ) -> Result<(), Error> {
        let mut parameters = self.parameters.of_call(call, stored);
        parameters.set_all(memory);
        large::set(&mut parameters, call, start);
        let stream = runtime.device.stream();
        // SAFETY: the kernel takes this one struct. The caller promised that `memory` has the tensors that
        // the problem describes and that the numbers at `stored` and `start` are valid; the kernel reads
        // operands inside the shapes that the struct gives, and writes the numbers of rows and heads at
        // `start`.
        unsafe { launch(stream, &self.function, &parameters, self.config) }
            .map_err(|error| failure(NAME, "running a kernel", error))
    }
}

/// The shared memory of a block in bytes: a tile of queries and one of keys, whose rows are padded by 16
/// bytes.
fn shared_bytes(head_dim: usize) -> usize {
    (ROWS + KEYS) * (head_dim.next_multiple_of(32) * 2 + 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiles_of_every_head_dimension_fit_into_48_kib() {
        assert!((1..=256).all(|head| shared_bytes(head) <= 48 << 10));
    }
}
