//! The launches of this library's helper kernels, which run before and after cuDNN's plan on the same stream:
//! they convert inputs to the forms that cuDNN takes, and write the results that cuDNN does not promise.

use attention_core::{CallProblem, DType, Error, Role};
use attention_cuda::cudarc::driver::result::memset_d8_async;
use attention_cuda::cudarc::driver::{DriverError, LaunchConfig};
use attention_cuda::parameters::{Integers, dtype_code};
use attention_cuda::{Addresses, KernelError, failure, launch};
use attention_kernels::{DTypeCode, Helper};

use crate::NAME;
use crate::arguments::{
    Arguments, BiasSources, CleanRows, ClearGradients, ClearPacked, FinishForward, Intervals, KeepMask,
    LogitStrides, MadeBias, MakeBias, PrepareBackward, RowStrides, SeeingRows, Seen, SinkGradient, Structure,
    ToFloats,
};
use crate::graph::Type;
use crate::key::{Bias, right_bound};
use crate::large;
use crate::runtime::Runtime;
use crate::sequences::Sequences;
use crate::slot::Side;

/// The maximum number of threads per block: the launch bound that the kernels are compiled with.
const THREADS: u32 = Helper::LAUNCHED.threads;
/// The number of threads per block that add up the gradient of a sink: what its kernel is compiled with.
const SUMMING_THREADS: u32 = Helper::LAUNCHED.summing_threads;
/// Rows per block of `attention_make_bias`: the `STRIP` of its source.
const STRIP: u64 = 16;
/// The maximum number of blocks of kernels whose threads loop over the work: far more than run at once on any
/// device.
const MOST_BLOCKS: u64 = 1 << 14;

/// The number that stands for negative infinity in a bias. It is finite, since cuDNN computes NaN from
/// infinities, and less than any other element of the bias. Its sums with logits stay finite, also after
/// cuDNN multiplies them with log2(e).
const MASKED: f32 = -1e30;
/// The value that smaller elements of a bias are raised to: far enough above `MASKED` that a masked key has
/// weight 0 in every row that sees another key.
const LEAST: f32 = -1e29;

/// Why a kernel did not run.
#[derive(Debug)]
enum LaunchError {
    Kernel(KernelError),
    Driver(DriverError),
}

impl From<KernelError> for LaunchError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

impl From<DriverError> for LaunchError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl From<LaunchError> for Error {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Kernel(error) => failure(NAME, "compiling a kernel", error),
            LaunchError::Driver(error) => failure(NAME, "running a kernel", error),
        }
    }
}

/// The addresses of the tensors that a bias is computed from; 0 for those that the call lacks.
pub(crate) struct SourceAddresses {
    pub(crate) mask: u64,
    pub(crate) bias: u64,
    pub(crate) slopes: u64,
}

/// The bound that stands for "no bound" of a window: larger than any distance of two positions, whose lengths
/// and offsets are below 2^31.
const FAR: i64 = 1 << 40;

/// A launch of `count` blocks of `threads` threads along the first two axes. If a count exceeds the limit of
/// a grid, the driver reports an error.
fn blocks(count: [u64; 2], threads: [u32; 2]) -> LaunchConfig {
    let [x, y] = count.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads[0], threads[1], 1), shared_mem_bytes: 0 }
}

/// A launch of enough blocks for `count` threads.
fn grid(count: u64) -> LaunchConfig {
    blocks([count.div_ceil(u64::from(THREADS)).max(1), 1], [THREADS, 1])
}

/// What the helper kernels of a call share. All addresses are of memory on the stream's device; 0 stands for
/// none.
pub(crate) struct Kernels<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) problem: CallProblem<'a>,
    pub(crate) sequences: Sequences,
    /// The flags that [`make_bias`](Self::make_bias) writes: which rows and keys are visible.
    pub(crate) seen: Seen,
    /// The number of heads that the flags have: 1, or that of the query heads.
    pub(crate) seen_heads: i64,
    /// The row stride of the bias, and of the flags of keys, in elements.
    pub(crate) bias_row: i64,
}

impl Kernels<'_> {
    /// Launches the kernel that takes these arguments.
    ///
    /// # Safety
    /// Each address in the arguments is 0, where the kernel's source allows null, or that of memory on the
    /// stream's device with the shape and strides that the arguments give. It is valid until the work is
    /// done, and nothing else uses what the kernel writes, but for work on the same stream.
    unsafe fn launch<A: Arguments>(&self, arguments: &A, config: LaunchConfig) -> Result<(), LaunchError> {
        let function = self.runtime.helper(A::KERNEL)?;
        let stream = self.runtime.device.stream();
        // SAFETY: the kernel takes this one struct, whose layout is that of the kernel's struct
        // (`Arguments`). The caller promised that its addresses are of memory with the shapes that it gives.
        Ok(unsafe { launch(stream, function, arguments, config) }?)
    }

    fn seeing_rows(&self) -> SeeingRows {
        SeeingRows { intervals: self.sequences.rows, flags: self.seen.rows, flag_heads: self.seen_heads }
    }

    /// The batch size, the query length and the number of query heads. If queries are packed, the length is
    /// the number of rows of all sequences together.
    fn row_axes(&self) -> [i64; 3] {
        let dims = self.problem.dims();
        let packed = self.problem.tensor(Role::QueryStarts).and(self.problem.tensor(Role::Query));
        let length = packed.map_or(dims.query_length, |query| query.shape()[1]);
        [dims.batch, length, dims.query_heads].map(|axis| axis as i64)
    }

    /// A launch of enough blocks for one thread per query row and head.
    fn row_grid(&self) -> LaunchConfig {
        let [batch, length, heads] = self.row_axes();
        let batch = if self.problem.has(Role::QueryStarts) { 1 } else { batch };
        grid((batch * length * heads).unsigned_abs())
    }

    /// After a forward pass: writes zeros to output rows that see no key, and copies the logsumexp from
    /// `stats` to the caller's tensor, if there is one. A row that sees no key gets -inf there, or its head's
    /// sink.
    ///
    /// # Safety
    /// `out` and `lse` are the addresses of the problem's output and logsumexp (0 if the call has none).
    /// `stats` has `[B, N, T]` floats, or `[total, N]` if queries are packed, and `sinks` is 0 or has `[N]`.
    /// The addresses of `sequences` and `seen`
    /// are 0 or of arrays that work on the stream has written. All of it is valid until the work is done.
    pub(crate) unsafe fn finish_forward(
        &self,
        out: u64,
        lse: u64,
        stats: u64,
        sinks: u64,
    ) -> Result<(), Error> {
        let [batch, positions, heads] = self.row_axes();
        let arguments = FinishForward {
            out,
            out_strides: RowStrides::of(self.problem.tensor(Role::Out)),
            lse,
            lse_strides: RowStrides::of(self.problem.tensor(Role::Lse)),
            stats,
            seeing: self.seeing_rows(),
            sinks,
            lengths: self.sequences.query_lengths,
            starts: self.sequences.query_starts,
            batch,
            positions,
            heads,
            width: self.problem.dims().value_head_dim as i64,
        };
        // SAFETY: the caller promised `out`, `lse`, `stats`, `sinks` and the arrays, with the shapes of the
        // problem, which the arguments give; the kernel writes the output, the logsumexp and `stats` inside
        // them.
        Ok(unsafe { self.launch(&arguments, self.row_grid()) }?)
    }

    /// Before a backward pass: copies the logsumexp to scratch, with +inf for rows that see no key, so that
    /// their probabilities are 0. If there are `states`, it sets their number of each head to 0.
    ///
    /// # Safety
    /// `lse` is the address of the problem's logsumexp, `stats` that of `[B, N, T]` floats, or of `[total,
    /// N]` if queries are packed, and `states`, if there are any, that of as many floats as
    /// [`large::numbers`] says. The addresses of `sequences` and `seen` are 0 or of arrays that work on the
    /// stream has written. All of it is valid until the work is done.
    pub(crate) unsafe fn prepare_backward(
        &self,
        lse: u64,
        stats: u64,
        states: Option<u64>,
    ) -> Result<(), Error> {
        let [batch, positions, heads] = self.row_axes();
        let arguments = PrepareBackward {
            lse,
            lse_strides: RowStrides::of(self.problem.tensor(Role::Lse)),
            stats,
            far_heads: states.map_or(0, |start| large::places(&self.problem, start)[2]),
            seeing: self.seeing_rows(),
            starts: self.sequences.query_starts,
            batch,
            positions,
            heads,
        };
        // SAFETY: the caller promised `lse`, `stats`, `states` and the arrays, with the shapes of the
        // problem, which the arguments give; the kernel writes `stats` and one float per head of `states`
        // inside them.
        Ok(unsafe { self.launch(&arguments, self.row_grid()) }?)
    }

    /// Copies an operand to scratch without gaps, with zeros in rows that are masked for every query or key.
    ///
    /// # Safety
    /// `from` is the address of the problem's tensor of this role, whose rows begin at multiples of 16 bytes
    /// and are whole multiples of 16 bytes, and `to` that of memory for its elements. `stats` is 0 or the
    /// address that [`prepare_backward`](Self::prepare_backward) wrote to. The addresses of `sequences` and
    /// `seen` are 0 or of arrays that work on the stream has written. All of it is valid until the work is
    /// done.
    pub(crate) unsafe fn clean(&self, role: Role, from: u64, to: u64, stats: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let is_key = matches!(role, Role::Key | Role::Value);
        let (intervals, flags, stats) =
            if is_key { (self.sequences.keys, self.seen.keys, 0) } else { (Intervals::ALL, 0, stats) };
        let [batch, positions, heads, width] = std::array::from_fn(|axis| desc.shape()[axis] as i64);
        let arguments = CleanRows {
            from,
            from_strides: RowStrides::of(Some(desc)),
            to,
            intervals,
            flags,
            flag_heads: if self.seen_heads == 1 { 1 } else { self.problem.dims().key_heads as i64 },
            flag_row: self.bias_row,
            stats,
            batch,
            positions,
            heads,
            vectors: width / 8,
        };
        let across = u32::try_from(arguments.vectors).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (batch * positions * heads).unsigned_abs().div_ceil(u64::from(rows));
        let config = blocks([deep.clamp(1, MOST_BLOCKS), 1], [across, rows]);
        // SAFETY: the caller promised the tensor, memory for its copy, `stats` and the arrays, and that rows
        // are whole vectors of 16 bytes; the kernel writes the copy, as many vectors as the tensor has.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes zeros to a gradient in batch rows without keys.
    ///
    /// # Safety
    /// `to` is the address of the problem's tensor of this role, whose rows begin at multiples of 16 bytes
    /// and are whole multiples of 16 bytes. The key lengths of `sequences` are an array that work on the
    /// stream has written. All of it is valid until the work is done.
    pub(crate) unsafe fn clear_gradient(&self, role: Role, to: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let [batch, positions, heads, width] = std::array::from_fn(|axis| desc.shape()[axis] as i64);
        let arguments = ClearGradients {
            to,
            to_strides: RowStrides::of(Some(desc)),
            key_lengths: self.sequences.key_lengths,
            batch,
            positions,
            heads,
            vectors: width / 8,
        };
        let across = u32::try_from(arguments.vectors).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (positions * heads).unsigned_abs().div_ceil(u64::from(rows));
        // At most 32 blocks per batch row, since most batch rows have keys and need no zeros; along its
        // second axis a grid has at most 65535 blocks.
        let config = blocks([deep.clamp(1, 32), batch.unsigned_abs().clamp(1, 65535)], [across, rows]);
        // SAFETY: the caller promised the tensor and the lengths, and that rows are whole vectors of 16
        // bytes; the kernel writes rows of the tensor, with the shape and strides of its description.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes zeros to the rows of a packed gradient that take no part: those of queries that see no key,
    /// those of keys that no row sees, and those behind the last sequence.
    ///
    /// # Safety
    /// `to` is the address of the problem's packed tensor of this role, whose rows begin at multiples of 16
    /// bytes and are whole multiples of 16 bytes. The starts and the intervals of `sequences` for its side
    /// are arrays that work on the stream has written. All of it is valid until the work is done.
    pub(crate) unsafe fn clear_packed(&self, role: Role, to: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let [_, positions, heads, width] = std::array::from_fn(|axis| desc.shape()[axis] as i64);
        let (starts, intervals) = match Side::of(role) {
            Side::Queries => (self.sequences.query_starts, self.sequences.rows),
            Side::Keys => (self.sequences.key_starts, self.sequences.keys),
        };
        let arguments = ClearPacked {
            to,
            to_strides: RowStrides::of(Some(desc)),
            intervals,
            starts,
            batch: self.problem.dims().batch as i64,
            positions,
            heads,
            vectors: width / 8,
        };
        let across = u32::try_from(arguments.vectors).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (positions * heads).unsigned_abs().div_ceil(u64::from(rows));
        let config = blocks([deep.clamp(1, MOST_BLOCKS), 1], [across, rows]);
        // SAFETY: the caller promised the tensor, the starts and the intervals, and that rows are whole
        // vectors of 16 bytes; the kernel writes rows of the tensor, with the shape and strides of its
        // description.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes one bias tensor computed from mask, bias and, if `slopes` are given, ALiBi. It also sets the
    /// flags of rows that see a key and of keys that a row sees.
    ///
    /// # Safety
    /// `mask` and `bias` in `from` are the addresses of the problem's tensors, or 0 if it has none; `slopes`
    /// is 0 or the address of the problem's slopes in f32 without gaps. `to` is that of memory for what
    /// `made` describes, and those of [`Kernels::seen`] are of memory for the flags ([`Bias::seen_rows`],
    /// [`Bias::seen_keys`]). The addresses of `sequences` are 0 or of arrays that work on the stream has
    /// written. All of it is valid until the work is done.
    pub(crate) unsafe fn make_bias(&self, made: Bias, from: SourceAddresses, to: u64) -> Result<(), Error> {
        let dims = self.problem.dims();
        let (mask, bias) = (self.problem.tensor(Role::Mask), self.problem.tensor(Role::Bias));
        let slopes = self.problem.tensor(Role::AlibiSlopes);
        let slopes_batch =
            if slopes.is_some_and(|slopes| slopes.rank() == 2) { dims.query_heads as i64 } else { 0 };
        let far = |bound: Option<usize>| bound.map_or(FAR, |bound| FAR.min(bound as i64));
        let (batch, positions, heads) =
            (dims.batch as i64, dims.query_length as i64, dims.query_heads as i64);
        let made_dtype = if made.element == Type::Float { DTypeCode::F32 } else { DTypeCode::Bf16 };
        let arguments = MakeBias {
            made: MadeBias {
                to,
                batch: made.shape[0],
                heads: made.shape[1],
                positions: made.shape[2],
                keys: made.shape[3],
                row: made.strides[2],
                masked: MASKED,
                least: LEAST,
            },
            sources: BiasSources {
                mask: from.mask,
                mask_strides: LogitStrides::of(mask),
                bias: from.bias,
                bias_strides: LogitStrides::of(bias),
                slopes: from.slopes,
                slopes_batch,
            },
            structure: Structure {
                rows: self.sequences.rows,
                keys: self.sequences.keys,
                offsets: self.sequences.offsets,
                offset: self.sequences.offset,
                left: far(self.problem.window().left),
                right: far(right_bound(&self.problem)),
            },
            seen: self.seen,
            made_dtype: made_dtype.code(),
            bias_dtype: bias.map_or(0, |bias| dtype_code(bias.dtype()).code()),
            batch,
            heads,
            group: dims.group_size() as i64,
            positions,
        };
        let stream = self.runtime.device.stream();
        for (at, shape) in [(self.seen.rows, made.seen_rows(dims)), (self.seen.keys, made.seen_keys(dims))] {
            // SAFETY: the caller promised that the flags have the bytes of this shape, until the work on this
            // stream is done.
            unsafe { memset_d8_async(at, 0, shape.iter().product(), stream.cu_stream()) }
                .map_err(LaunchError::from)?;
        }
        let strips =
            (made.shape[0] * made.shape[1]).unsigned_abs() * positions.unsigned_abs().div_ceil(STRIP);
        let vectors = arguments.made.row.unsigned_abs() / 8;
        let threads = u32::try_from(vectors.next_multiple_of(32)).unwrap_or(THREADS).min(THREADS);
        let config = blocks([strips, vectors.div_ceil(u64::from(threads))], [threads, 1]);
        // SAFETY: the caller promised the sources, the arrays, and memory for the bias and the flags, with
        // the shapes that the arguments give; the kernel writes the bias and the flags inside them.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Converts slopes or sinks to f32 without gaps.
    ///
    /// # Safety
    /// `from` is the address of the problem's tensor of this role, and `to` that of memory for as many floats
    /// as the tensor has elements. Both are valid until the work is done.
    pub(crate) unsafe fn to_floats(&self, role: Role, from: u64, to: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let (shape, strides) = (desc.shape(), desc.strides());
        let last = desc.rank() - 1;
        let (rows, row_stride) = if last == 1 { (shape[0] as i64, strides[0] as i64) } else { (1, 0) };
        let arguments = ToFloats {
            to,
            from,
            rows,
            columns: shape[last] as i64,
            row_stride,
            column_stride: strides[last] as i64,
            dtype: dtype_code(desc.dtype()).code(),
            padding: 0,
        };
        let config = grid((rows * arguments.columns).unsigned_abs());
        // SAFETY: the caller promised the tensor and memory for one float per element, which the kernel
        // writes.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes the keep mask of the call's dropout as ones and zeros, in rows of whole blocks of eight keys.
    ///
    /// # Safety
    /// The seed and the offset of dropout in `memory` are 0 or the addresses of the problem's tensors. `to`
    /// is that of memory for `[B, N, T]` rows of the keys, rounded up to a multiple of eight, in the
    /// operands' dtype. All of it is valid until the work is done.
    pub(crate) unsafe fn keep_mask(&self, memory: &Addresses, to: u64) -> Result<(), Error> {
        let Some(stream) = self.problem.dropout_stream() else { return Ok(()) };
        let dims = self.problem.dims();
        let (key, stream_offset) = stream.words();
        let number = |role: Role| Integers::of(&self.problem, role).at(memory.at(role));
        let arguments = KeepMask {
            to,
            rows: (dims.batch * dims.query_heads) as i64,
            positions: dims.query_length as i64,
            blocks: dims.key_length.div_ceil(8) as i64,
            seed: number(Role::DropoutSeed),
            offset: number(Role::DropoutOffset),
            // The bits of 1 in f16 and in bf16.
            one: if self.problem.dtype() == DType::F16 { 0x3c00 } else { 0x3f80 },
            threshold: stream.threshold(),
            key,
            stream_offset,
            padding: 0,
        };
        let across = u32::try_from(arguments.blocks).unwrap_or(THREADS).next_power_of_two().min(32);
        let deep = THREADS / across;
        let rows = (arguments.rows * arguments.positions).unsigned_abs();
        let config = blocks([rows.div_ceil(u64::from(deep)), 1], [across, deep]);
        // SAFETY: the caller promised the seed and the offset, where they are in device memory, and memory
        // for the mask, of which the kernel writes whole blocks of eight keys.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Computes the gradient of the sinks from the row sums `<d_out, out>` that cuDNN has written to `delta`.
    ///
    /// # Safety
    /// `to` and `lse` are the addresses of the problem's `dsinks` and logsumexp. `sinks` has `[N]` and
    /// `delta` `[B, N, T]` floats, and `states` as many as [`large::numbers`] says, which work on the stream
    /// has written. The addresses of `sequences` are 0 or of arrays that it has written. All of it is valid
    /// until the work is done.
    pub(crate) unsafe fn sink_gradient(
        &self,
        to: u64,
        sinks: u64,
        delta: u64,
        lse: u64,
        states: u64,
    ) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(Role::DSinks) else { return Ok(()) };
        let [batch, positions, heads] = self.row_axes();
        let [offsets, scores, _] = large::places(&self.problem, states);
        let arguments = SinkGradient {
            to,
            to_stride: desc.strides()[0] as i64,
            sinks,
            delta,
            lse,
            lse_strides: RowStrides::of(self.problem.tensor(Role::Lse)),
            rows: self.sequences.rows,
            scores,
            offsets,
            batch,
            heads,
            positions,
            far: large::FAR,
            dtype: dtype_code(desc.dtype()).code(),
        };
        let config = blocks([heads.unsigned_abs(), 1], [SUMMING_THREADS, 1]);
        // SAFETY: the caller promised the tensors, the floats and the arrays, with the shapes of the problem,
        // which the arguments give; the kernel writes one element of `dsinks` per head.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }
}
