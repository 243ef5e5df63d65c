//! Kernels of our own that run before and after cuDNN's, on the same stream: they bring operands to the forms that it takes,
//! and make good what it does not promise.

use attention_core::{CallProblem, DType, Error, Role};
use attention_cuda::cudarc::driver::result::memset_d8_async;
use attention_cuda::cudarc::driver::{DriverError, LaunchConfig, PushKernelArg};
use attention_cuda::parameters::{Integers, dtype_code};
use attention_cuda::{Addresses, KernelError, failure};
use attention_kernels::{DTypeCode, Helper, Variant};

use crate::NAME;
use crate::arguments::{
    Arguments, BiasSources, CleanRows, ClearGradients, FinishForward, Intervals, KeepMask, LogitStrides,
    MadeBias, MakeBias, PrepareBackward, RowStrides, SeeingRows, Seen, SinkGradient, Structure, ToFloats,
};
use crate::graph::Type;
use crate::key::{Bias, right_bound};
use crate::large;
use crate::runtime::Runtime;
use crate::sequences::Sequences;

/// Threads of a block, at most: the bound that the kernels are compiled with.
const THREADS: u32 = Helper::LAUNCHED.threads;
/// Threads of a block that adds up the gradient of a sink.
const SUMMING_THREADS: u32 = Helper::LAUNCHED.summing_threads;
/// Rows of a block of `attention_make_bias`.
const STRIP: u64 = 16;
/// Blocks enough for any device, where each thread goes on until all is done.
const MOST_BLOCKS: u64 = 1 << 14;

/// What stands for negative infinity in a bias: less than any other value, and finite, since cuDNN makes NaN of
/// infinities. Sums with logits, and those in units of ln 2, stay finite as well.
const MASKED: f32 = -1e30;
/// The least that other values of a bias count as.
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

/// The addresses of the tensors that a bias is made of; 0 for those that the call lacks.
pub(crate) struct SourceAddresses {
    pub(crate) mask: u64,
    pub(crate) bias: u64,
    pub(crate) slopes: u64,
}

/// Further than any two positions are apart.
const FAR: i64 = 1 << 40;

/// So many blocks of so many threads along the first two axes. More blocks than there can be are an error of the driver's.
fn blocks(count: [u64; 2], threads: [u32; 2]) -> LaunchConfig {
    let [x, y] = count.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads[0], threads[1], 1), shared_mem_bytes: 0 }
}

/// Blocks enough for `count` threads.
fn grid(count: u64) -> LaunchConfig {
    blocks([count.div_ceil(u64::from(THREADS)).max(1), 1], [THREADS, 1])
}

/// What the kernels of a call share. All addresses are of memory on the stream's device; 0 stands for none.
pub(crate) struct Kernels<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) problem: CallProblem<'a>,
    pub(crate) sequences: Sequences,
    /// Marked by [`make_bias`](Self::make_bias), for one head or for each, in rows of so many keys.
    pub(crate) seen: Seen,
    pub(crate) seen_heads: i64,
    pub(crate) bias_row: i64,
}

impl Kernels<'_> {
    /// Launches the kernel that takes these arguments.
    ///
    /// # Safety
    /// The arguments are what the kernel's source asks for: addresses of memory on the stream's device with
    /// room for the shapes that they give.
    unsafe fn launch<A: Arguments>(&self, arguments: &A, config: LaunchConfig) -> Result<(), LaunchError> {
        let (source, entry_point) = A::KERNEL;
        let function = self.runtime.function(source, Variant::Helper(Helper::LAUNCHED), entry_point)?;
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(arguments);
        // SAFETY: the kernel takes this one struct, whose layout is the kernel's; what it holds, the caller
        // promised.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    fn seeing_rows(&self) -> SeeingRows {
        SeeingRows { intervals: self.sequences.rows, flags: self.seen.rows, flag_heads: self.seen_heads }
    }

    /// Batch, rows and heads.
    fn row_axes(&self) -> [i64; 3] {
        let dims = self.problem.dims();
        [dims.batch, dims.query_length, dims.query_heads].map(|axis| axis as i64)
    }

    fn row_grid(&self) -> LaunchConfig {
        grid(self.row_axes().iter().product::<i64>().unsigned_abs())
    }

    /// After a forward pass: zeros and -inf (or the sink) for rows that see nothing, and the logsumexp from `stats` to
    /// the caller's tensor, where there is one.
    ///
    /// # Safety
    /// `out` is the problem's output and `lse` its logsumexp; `stats` holds `[B, N, T]` and `sinks` `[N]` numbers.
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
            batch,
            positions,
            heads,
            width: self.problem.dims().value_head_dim as i64,
        };
        // SAFETY: the caller promised the tensors and scratch; the kernel writes the output, the logsumexp
        // and `stats`.
        Ok(unsafe { self.launch(&arguments, self.row_grid()) }?)
    }

    /// Before a backward pass: the logsumexp to scratch, +inf where a row sees nothing, so that its probabilities are 0.
    ///
    /// # Safety
    /// `lse` is the problem's; `stats` has room for `[B, N, T]` numbers, and `states`, if they are there, for those of far rows.
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
            batch,
            positions,
            heads,
        };
        // SAFETY: the caller promised the tensor and scratch; the kernel writes the scratch.
        Ok(unsafe { self.launch(&arguments, self.row_grid()) }?)
    }

    /// Copies an operand to scratch without gaps, zeros where it is masked for everybody.
    ///
    /// # Safety
    /// `from` is the problem's tensor of this role, whose rows begin at multiples of 16 bytes and are as long, and `to` has
    /// room for its elements. `stats` is by [`prepare_backward`](Self::prepare_backward), or 0.
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
            parts: width / 8,
        };
        let across = u32::try_from(arguments.parts).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (batch * positions * heads).unsigned_abs().div_ceil(u64::from(rows));
        let config = blocks([deep.clamp(1, MOST_BLOCKS), 1], [across, rows]);
        // SAFETY: the caller promised the tensor and the copy, and `stats`; the kernel writes the copy.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes zeros to a gradient in batch rows without keys.
    ///
    /// # Safety
    /// `to` is the problem's tensor of this role, whose rows begin at multiples of 16 bytes and are as long,
    /// and the sequences have key lengths.
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
            parts: width / 8,
        };
        let across = u32::try_from(arguments.parts).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (positions * heads).unsigned_abs().div_ceil(u64::from(rows));
        // Few blocks for each batch row: mostly they have nothing to do.
        let config = blocks([deep.clamp(1, 32), batch.unsigned_abs().clamp(1, 65535)], [across, rows]);
        // SAFETY: the caller promised the tensor and the lengths; the kernel writes rows of the tensor.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Makes one tensor of mask, bias, and ALiBi where `slopes` are given; and marks the rows and keys that take part.
    ///
    /// # Safety
    /// `mask` and `bias` are the problem's, where it has them; `slopes` holds its slopes without gaps; `to` has room for
    /// what `made` describes, and [`Kernels::seen`] for what is [marked](Bias::seen_rows).
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
            // SAFETY: the caller promised room for this many bytes.
            unsafe { memset_d8_async(at, 0, shape.iter().product(), stream.cu_stream()) }
                .map_err(LaunchError::from)?;
        }
        let strips =
            (made.shape[0] * made.shape[1]).unsigned_abs() * positions.unsigned_abs().div_ceil(STRIP);
        let vectors = arguments.made.row.unsigned_abs() / 8;
        let threads = u32::try_from(vectors.next_multiple_of(32)).unwrap_or(THREADS).min(THREADS);
        let config = blocks([strips, vectors.div_ceil(u64::from(threads))], [threads, 1]);
        // SAFETY: the caller promised the tensors and scratch; the kernel writes the bias that is made and
        // the flags.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Brings slopes or sinks to f32 without gaps.
    ///
    /// # Safety
    /// `from` is the problem's tensor of this role, and `to` has room for as many floats.
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
        // SAFETY: the caller promised the tensor and the floats; the kernel writes a float for each element.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// Writes the keep bits of the call's dropout as ones and zeros, in rows of whole blocks of eight keys.
    ///
    /// # Safety
    /// `memory` is the call's, and `to` has room for the bits.
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
        // SAFETY: the caller promised the seed and room for the mask, which the kernel writes.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }

    /// The gradient of the sinks, from the row terms that cuDNN left.
    ///
    /// # Safety
    /// `to` and `lse` are the problem's, `sinks` holds `[N]` and `delta` `[B, N, T]` numbers, and `states` those of far rows.
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
        // SAFETY: the caller promised the tensors and scratch; the kernel writes a number for each head.
        Ok(unsafe { self.launch(&arguments, config) }?)
    }
}
