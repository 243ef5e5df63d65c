//! Rows whose logsumexp is so large that its rounding would be seen in their gradients: their own maxima and sums, in scratch, for the
//! kernels behind cuDNN's, which takes the logsumexp for what it says.

use attention_core::{Error, Pass, Problem, Role};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use attention_cuda::failure;
use attention_cuda::parameters::ProblemParameters;

use crate::CudnnConfig;
use crate::backend::NAME;
use crate::contain::{self, defines};
use crate::key::Key;
use crate::memory::Memory;
use crate::runtime::Runtime;

/// Rows of a block, two warps: so few that the tiles of the largest heads fit into the shared memory that every block has.
const ROWS: usize = 32;
const WARPS: u32 = 2;

/// Keys of a tile: what kernels are compiled for here.
const KEYS: usize = 32;

/// `FAR` of the kernels, for halves: the logsumexp from which a row is such.
pub(crate) const FAR: f32 = 1024.0;

/// `attention_sum_rows` for a problem.
#[derive(Debug)]
pub(crate) struct FarRows {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// Whether a problem needs it: in backward, where the logsumexp [may be large](contain::may_be_large) and results can be computed
/// again, and for the gradient of sinks.
pub(crate) fn is_needed(problem: &Problem, key: &Key, config: &CudnnConfig) -> bool {
    let of_large = contain::may_be_large(problem) && contain::is_needed(problem, key, config);
    problem.pass() == Pass::Backward && (of_large || problem.has(Role::DSinks))
}

/// Numbers that it leaves: an offset, one that is not used, and a score of each row, then one for each head (`gradients.cuh`).
pub(crate) fn numbers(problem: &Problem) -> Option<usize> {
    let dims = problem.dims();
    let of_head = dims.query_length.checked_mul(3)?.checked_add(1)?;
    dims.batch.checked_mul(dims.query_heads)?.checked_mul(of_head)
}

/// The addresses of its numbers, which begin here: offsets, scores, and those of heads.
pub(crate) fn places(problem: &Problem, start: u64) -> [u64; 3] {
    let dims = problem.dims();
    let rows = 4 * (dims.batch * dims.query_heads * dims.query_length) as u64;
    [start, start + 2 * rows, start + 3 * rows]
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
        let defines = defines(problem, [ROWS, KEYS], WARPS, 1);
        let defines: Vec<&str> = defines.iter().map(String::as_str).collect();
        let function = runtime
            .function("attention_backward_sums.cu", &defines, "attention_sum_rows")
            .map_err(|error| failure(NAME, "compiling a kernel", error))?;
        let parameters = ProblemParameters::new(problem, runtime.device.stream())
            .map_err(|error| failure(NAME, "sending lengths to the device", error))?;
        let config = LaunchConfig {
            grid_dim: (u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1),
            block_dim: (32 * WARPS, 1, 1),
            shared_mem_bytes: shared_bytes(dims.head_dim) as u32,
        };
        Ok(Some(Self { parameters, function, config }))
    }

    /// Puts it on the stream, behind what clears the heads' numbers.
    ///
    /// # Safety
    /// The addresses are those of a checked call of the problem; `start` has room for its [`numbers`].
    pub(crate) unsafe fn run(
        &self,
        runtime: &Runtime,
        problem: &Problem,
        memory: &Memory,
        start: u64,
    ) -> Result<(), Error> {
        let mut parameters = self.parameters.of_call();
        for role in Role::ALL {
            parameters.set(role, memory.at(role));
        }
        set(&mut parameters, problem, start);
        let mut launch = runtime.device.stream().launch_builder(&self.function);
        launch.arg(&parameters);
        // SAFETY: the kernel takes this one struct, whose tensors are the call's, by the caller's word; it reads operands inside the
        // shapes that the struct gives, and writes the numbers of rows and heads.
        unsafe { launch.launch(self.config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        Ok(())
    }
}

/// Tells kernels where the numbers are.
pub(crate) fn set(parameters: &mut attention_cuda::parameters::Parameters, problem: &Problem, start: u64) {
    let [offsets, scores, _] = places(problem, start);
    // The kernels have row terms in front of the scores.
    (parameters.first, parameters.second) = (offsets, offsets + (scores - offsets) / 2);
}

/// Shared memory of a block: a tile of queries and one of keys, with 16 bytes behind each row.
fn shared_bytes(head_dim: usize) -> usize {
    (ROWS + KEYS) * (head_dim.next_multiple_of(32) * 2 + 16)
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, Device, Gradients, TensorDesc};

    use super::*;

    #[test]
    fn the_tiles_of_every_head_fit_into_what_every_block_has() {
        assert!((1..=256).all(|head| shared_bytes(head) <= 48 << 10));
    }

    #[test]
    fn numbers_of_rows_and_heads_follow_each_other() {
        let desc = TensorDesc::contiguous(DType::Bf16, [2, 5, 3, 8]);
        let builder = Problem::builder(desc, desc, desc).device(Device::Cuda(0));
        let problem = builder.gradients(Gradients::QKV).build().expect("valid");
        assert_eq!(places(&problem, 64), [64, 64 + 4 * 60, 64 + 4 * 90]);
        assert_eq!(numbers(&problem), Some(96));
    }
}
