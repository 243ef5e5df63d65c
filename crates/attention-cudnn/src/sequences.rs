//! Which rows see which keys by structure, in the form that the helper kernels take. If all batch rows are
//! alike, the kernels get it as numbers. If a call has lengths, in host or device memory, the kernel
//! `attention_sequences` writes it to the call's scratch first.

use attention_core::{CallProblem, Error, Problem};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{Addresses, failure};
use attention_kernels::{DTypeCode, Fused, Variant};

use crate::NAME;
use crate::arguments::{Intervals, SEQUENCES, SequenceArrays};
use crate::runtime::Runtime;
use crate::seen::{seen_keys, seen_rows};
use crate::slot::Slot;

/// The sequences of a call, as arguments of kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences {
    /// The rows that see a key.
    pub(crate) rows: Intervals,
    /// The keys that any row sees.
    pub(crate) keys: Intervals,
    /// The address of the offset of each batch row, which is added to a row to give its position; 0 if
    /// `offset` is that of all batch rows.
    pub(crate) offsets: u64,
    pub(crate) offset: i64,
    /// The address of the query length of each batch row; 0 if the plan takes no lengths.
    pub(crate) query_lengths: u64,
    /// The address of the key length of each batch row; 0 if the plan takes no lengths.
    pub(crate) key_lengths: u64,
}

impl Sequences {
    /// The sequences of a call; `at` gives the addresses of the arrays that its scratch has.
    pub(crate) fn of(call: &CallProblem<'_>, at: impl Fn(Slot) -> Option<u64>) -> Self {
        let at = |slot: Slot| at(slot).unwrap_or(0);
        // The kernels read these numbers only if there are no arrays.
        let first = call.sequence(0);
        Self {
            rows: Intervals::new(at(Slot::RowIntervals), seen_rows(&first)),
            keys: Intervals::new(at(Slot::KeyIntervals), seen_keys(&first)),
            offsets: at(Slot::QueryOffsets),
            offset: first.offset(),
            query_lengths: at(Slot::QueryLengths),
            key_lengths: at(Slot::KeyLengths),
        }
    }
}

/// The kernel `attention_sequences` for a problem.
#[derive(Debug)]
pub(crate) struct SequenceKernel {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// The variant of the kernel, the same for every problem, since it reads no operands: any dtype and head
/// dimension will do. 4 warps are enough threads for the batch rows of most calls.
const VARIANT: Fused = Fused::new(DTypeCode::F16, 32).warps(4);

impl SequenceKernel {
    pub(crate) fn of(runtime: &Runtime, problem: &Problem) -> Result<Self, Error> {
        let function = runtime
            .function(SEQUENCES, Variant::Fused(VARIANT), "attention_sequences")
            .map_err(|error| failure(NAME, "compiling a kernel", error))?;
        let threads = VARIANT.threads() as u32;
        let blocks = u32::try_from(problem.dims().batch).unwrap_or(u32::MAX).div_ceil(threads);
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        Ok(Self { parameters: ProblemParameters::new(problem), function, config })
    }

    /// Enqueues the kernel, before the work that reads the arrays.
    ///
    /// # Safety
    /// `call` is a call of the problem that this kernel was made for, and `memory` has a tensor of the
    /// problem's description for each of its roles. `stored` is 0 or the address of the call's stored
    /// numbers. The arrays of lengths have one `i32` per batch row; those of offsets and intervals are 0, or
    /// have one and two. All of it is valid on the device's stream until the work is done.
    pub(crate) unsafe fn run(
        &self,
        runtime: &Runtime,
        call: &CallProblem<'_>,
        memory: &Addresses,
        stored: u64,
        arrays: &Sequences,
    ) -> Result<(), Error> {
        let mut parameters = self.parameters.of_call(call, stored);
        parameters.set_all(memory);
        let arrays = SequenceArrays {
            query_lengths: arrays.query_lengths,
            key_lengths: arrays.key_lengths,
            rows: arrays.rows.of,
            keys: arrays.keys.of,
            offsets: arrays.offsets,
        };
        let mut launch = runtime.device.stream().launch_builder(&self.function);
        launch.arg(&parameters).arg(&arrays);
        // SAFETY: the kernel takes these two structs. It reads the call's lengths, which the caller promised,
        // and writes one or two numbers per batch row to each array that is not 0, for which the caller
        // promised memory.
        unsafe { launch.launch(self.config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        Ok(())
    }
}
