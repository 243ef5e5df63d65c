//! Rows whose logsumexp is so large that its rounding would be seen in their gradients: their own maxima and sums, in scratch, for the
//! kernels behind cuDNN's, which takes the logsumexp for what it says.

use attention_core::{CallProblem, Error, Pass, Problem, Role};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{Addresses, failure};
use attention_kernels::Variant;

use crate::contain;
use crate::key::Key;
use crate::large;
use crate::runtime::Runtime;
use crate::{CudnnConfig, NAME};

/// Rows of a block, two warps: so few that the tiles of the largest heads fit into the shared memory that every block has.
const ROWS: usize = 32;
const WARPS: usize = 2;

/// Keys of a tile: what kernels are compiled for here.
const KEYS: usize = 32;

/// `attention_sum_rows` for a problem.
#[derive(Debug)]
pub(crate) struct FarRows {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// Whether a problem needs it: in backward, where the logsumexp [may be large](large::may_be_large) and
/// results can be computed again, and for the gradient of sinks.
pub(crate) fn is_needed(problem: &Problem, key: &Key, config: &CudnnConfig) -> bool {
    let of_large = large::may_be_large(problem) && contain::is_needed(problem, key, config);
    problem.pass() == Pass::Backward && (of_large || problem.has(Role::DSinks))
}

impl FarRows {
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
        let variant = contain::fused(problem).tile(ROWS, KEYS).warps(WARPS);
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

    /// Puts it on the stream, behind what clears the heads' numbers.
    ///
    /// # Safety
    /// The addresses are those of a checked call of the problem, whose stored numbers are at `stored`;
    /// `start` has room for its [`numbers`](large::numbers).
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
        let mut launch = runtime.device.stream().launch_builder(&self.function);
        launch.arg(&parameters);
        // SAFETY: the kernel takes this one struct, whose tensors are the call's, by the caller's word; it reads operands inside the
        // shapes that the struct gives, and writes the numbers of rows and heads.
        unsafe { launch.launch(self.config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        Ok(())
    }
}

/// Shared memory of a block: a tile of queries and one of keys, with 16 bytes behind each row.
fn shared_bytes(head_dim: usize) -> usize {
    (ROWS + KEYS) * (head_dim.next_multiple_of(32) * 2 + 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiles_of_every_head_fit_into_what_every_block_has() {
        assert!((1..=256).all(|head| shared_bytes(head) <= 48 << 10));
    }
}
