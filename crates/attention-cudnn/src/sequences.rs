//! Which rows see which keys by structure, in the form that the helper kernels take. If all batch rows are
//! alike, the kernels get it as numbers. If a call has lengths or packed sequences, in host or device memory,
//! the kernel `attention_sequences` writes it to the call's scratch first, with where sequences begin in
//! packed tensors. Block tables are written by `attention_block_table`.

use attention_core::{CallProblem, Error, Problem};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{Addresses, failure};
use attention_kernels::{DTypeCode, Fused, Variant};

use crate::NAME;
use crate::arguments::{Intervals, RaggedOffsets, SEQUENCES, SequenceArrays, Starts};
use crate::key::Key;
use crate::places::Pages;
use crate::runtime::Runtime;
use crate::seen::{seen_keys, seen_rows};
use crate::slot::{Side, Slot};

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
    /// Where sequences begin among packed query rows and keys.
    pub(crate) query_starts: Starts,
    pub(crate) key_starts: Starts,
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
            query_starts: Starts { of: at(Slot::QueryStarts) },
            key_starts: Starts { of: at(Slot::KeyStarts) },
        }
    }
}

/// The arrays of ragged offsets of a side, whose addresses `at` gives.
fn ragged_offsets<const COUNT: usize>(
    key: &Key,
    side: Side,
    at: impl Fn(Slot) -> Option<u64>,
) -> [RaggedOffsets; COUNT] {
    let rows = key.ragged_rows(side);
    // One for each tensor of the side that a pass can have, scratch included.
    debug_assert!(rows.len() <= COUNT);
    std::array::from_fn(|index| {
        let of = rows.get(index).map(|&row| (row, at(Slot::RaggedOffsets { side, row }).unwrap_or(0)));
        of.map_or(RaggedOffsets::default(), |(row, to)| RaggedOffsets { to, row })
    })
}

/// The kernel `attention_sequences` for a problem, and `attention_block_table` if its keys are in pages.
#[derive(Debug)]
pub(crate) struct SequenceKernel {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
    table: Option<(CudaFunction, Pages)>,
}

/// The variant of the kernels for dense rows; for other layouts it has that layout. It is the same for every
/// problem, since it reads no operands: any dtype and head dimension will do. 4 warps are enough threads for
/// the batch rows of most calls.
const VARIANT: Fused = Fused::new(DTypeCode::F16, 32).warps(4);

/// The maximum number of blocks that write a block table, whose threads loop over its entries.
const MOST_BLOCKS: usize = 1 << 12;

impl SequenceKernel {
    pub(crate) fn of(runtime: &Runtime, problem: &Problem, key: &Key) -> Result<Self, Error> {
        let variant = Variant::Fused(VARIANT.layout(key.places.layout()));
        let function = |name: &str| {
            runtime
                .function(SEQUENCES, variant, name)
                .map_err(|error| failure(NAME, "compiling a kernel", error))
        };
        let pages = |pages: Pages| function("attention_block_table").map(|function| (function, pages));
        Ok(Self {
            parameters: ProblemParameters::new(problem),
            function: function("attention_sequences")?,
            // A thread for each batch row, and one for the end of the last sequence.
            config: threads(problem.dims().batch.saturating_add(1), usize::MAX),
            table: key.places.pages.map(pages).transpose()?,
        })
    }

    /// Enqueues the kernels, before the work that reads the arrays. `at` gives the addresses of the arrays
    /// that the scratch has.
    ///
    /// # Safety
    /// `call` is a call of the problem that this kernel was made for, and `memory` has a tensor of the
    /// problem's description for each of its roles. `stored` is 0 or the address of the call's stored
    /// numbers. The arrays of lengths have one `i32` per batch row; those of offsets and intervals are 0, or
    /// have one and two; those of starts are 0 or have one more `i32` than there are batch rows. `at` gives
    /// the addresses of ragged offsets, with as many `i64`, and of the block table, with as many `i32` per
    /// batch row as the key's pages say. All of it is valid on the device's stream until the work is done.
    pub(crate) unsafe fn run(
        &self,
        runtime: &Runtime,
        (call, key): (&CallProblem<'_>, &Key),
        memory: &Addresses,
        stored: u64,
        arrays: &Sequences,
        at: impl Fn(Slot) -> Option<u64>,
    ) -> Result<(), Error> {
        let mut parameters = self.parameters.of_call(call, stored);
        parameters.set_all(memory);
        let arrays = SequenceArrays {
            query_lengths: arrays.query_lengths,
            key_lengths: arrays.key_lengths,
            rows: arrays.rows.of,
            keys: arrays.keys.of,
            offsets: arrays.offsets,
            query_starts: arrays.query_starts.of,
            key_starts: arrays.key_starts.of,
            of_queries: ragged_offsets(key, Side::Queries, &at),
            of_keys: ragged_offsets(key, Side::Keys, &at),
        };
        let mut launch = runtime.device.stream().launch_builder(&self.function);
        launch.arg(&parameters).arg(&arrays);
        // SAFETY: the kernel takes these two structs. It reads the call's lengths and starts, which the
        // caller promised, and writes one or two numbers per batch row to each array that is not 0, and one
        // more to those of starts and ragged offsets, for which the caller promised memory.
        unsafe { launch.launch(self.config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        let (Some((function, pages)), Some(to)) = (&self.table, at(Slot::BlockTable)) else {
            return Ok(());
        };
        let config = threads(call.dims().batch.saturating_mul(pages.most as usize), MOST_BLOCKS);
        let mut launch = runtime.device.stream().launch_builder(function);
        launch.arg(&parameters).arg(&to).arg(&pages.most);
        // SAFETY: the kernel takes the struct, an address and a number. It reads the call's block table and
        // lengths, which the caller promised, and writes `most` entries per batch row, for which the caller
        // promised memory.
        unsafe { launch.launch(config) }.map_err(|error| failure(NAME, "running a kernel", error))?;
        Ok(())
    }
}

/// A launch of at most so many blocks for `count` threads.
fn threads(count: usize, most_blocks: usize) -> LaunchConfig {
    let threads = VARIANT.threads();
    let blocks = u32::try_from(count.div_ceil(threads).clamp(1, most_blocks)).unwrap_or(u32::MAX);
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 }
}
