//! Which rows see which keys by structure. Where all batch rows are alike, kernels are given it as numbers;
//! where a call has lengths, a kernel writes it to the call's scratch first, wherever the lengths are.

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

/// The sequences of a call, as kernels are given them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences {
    /// The rows that see a key.
    pub(crate) rows: Intervals,
    /// The keys that any row sees.
    pub(crate) keys: Intervals,
    /// The address of what is added to a row to give its position, for each batch row; 0 where `offset` is
    /// that of all.
    pub(crate) offsets: u64,
    pub(crate) offset: i64,
    /// The addresses of the lengths, for each batch row; 0 where the plan takes none.
    pub(crate) query_lengths: u64,
    pub(crate) key_lengths: u64,
}

impl Sequences {
    /// Of a call, with the addresses of the arrays that its scratch has.
    pub(crate) fn of(call: &CallProblem<'_>, at: impl Fn(Slot) -> Option<u64>) -> Self {
        let at = |slot: Slot| at(slot).unwrap_or(0);
        // Not read where there are arrays.
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

/// `attention_sequences` for a problem.
#[derive(Debug)]
pub(crate) struct SequenceKernel {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// What it is compiled with, whatever the problem: it reads no operands.
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

    /// Puts it on the stream, before what reads the arrays.
    ///
    /// # Safety
    /// The addresses are those of a checked call of the problem, whose stored numbers are at `stored`;
    /// `arrays` are where the scratch has room for them.
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
        // SAFETY: the kernel takes these two structs; it reads the call's lengths, by the caller's word, and writes a number or two
        // for each batch row to each array, which have room for them by the caller's word too.
        unsafe { launch.launch(self.config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        Ok(())
    }
}
