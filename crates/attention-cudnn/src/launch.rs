//! Kernels of our own that run before and after cuDNN's, on the same stream: they bring operands to the forms that it takes,
//! and make good what it does not promise.

use attention_core::{DType, Error, Problem, Role, TensorDesc};
use attention_cuda::cudarc::driver::result::memset_d8_async;
use attention_cuda::cudarc::driver::{CudaFunction, DriverError, LaunchConfig, PushKernelArg};
use attention_cuda::parameters::dtype_code;
use attention_cuda::{KernelError, failure};
use attention_kernels::{DTypeCode, Helper, Variant};

use crate::NAME;
use crate::graph::Type;
use crate::key::{Bias, right_bound};
use crate::large;
use crate::runtime::Runtime;

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

/// Four strides as the kernels take them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Strides([i64; 4]);

// SAFETY: `repr(C)`, four 64-bit integers, as the kernels declare it.
unsafe impl attention_cuda::cudarc::driver::DeviceRepr for Strides {}

/// As the kernel `attention_make_bias` declares it; the numbers of elements are 32 bits wide there, with 32 more that
/// nobody reads.
#[derive(Clone, Copy)]
#[repr(C)]
struct MadeBias {
    to: u64,
    element: i64,
    shape: [i64; 4],
    row: i64,
    masked: f32,
    least: f32,
}

/// As the kernel declares it.
#[derive(Clone, Copy)]
#[repr(C)]
struct DeviceTerms {
    mask: u64,
    mask_strides: Strides,
    bias: u64,
    bias_element: i64,
    bias_strides: Strides,
    slopes: u64,
    slopes_batch: i64,
}

/// As the kernel declares it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Structure {
    rows: u64,
    keys: u64,
    positions: u64,
    left: i64,
    right: i64,
}

// SAFETY: `repr(C)` without padding, addresses and numbers as the kernel declares them, on little-endian machines, which
// are the only ones with this driver.
unsafe impl attention_cuda::cudarc::driver::DeviceRepr for MadeBias {}
// SAFETY: as above.
unsafe impl attention_cuda::cudarc::driver::DeviceRepr for DeviceTerms {}
// SAFETY: as above.
unsafe impl attention_cuda::cudarc::driver::DeviceRepr for Structure {}

/// The addresses of what a bias is made of; 0 for what there is not.
pub(crate) struct Terms {
    pub(crate) mask: u64,
    pub(crate) bias: u64,
    pub(crate) slopes: u64,
}

/// Which rows and keys a mask or a bias leaves something, as the kernels declare it: addresses of bytes, 0 where neither is
/// made one tensor.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Seen {
    /// `[B, N, T]`.
    pub(crate) rows: u64,
    /// `[B, K, S]`, in rows of the bias.
    pub(crate) keys: u64,
}

// SAFETY: as above.
unsafe impl attention_cuda::cudarc::driver::DeviceRepr for Seen {}

/// Further than any two positions are apart.
const FAR: i64 = 1 << 40;

/// Strides over batch, head, row and key of a tensor that is broadcast to the logits; 0 where it is absent.
fn broadcast_strides(desc: Option<&TensorDesc>) -> Strides {
    Strides(std::array::from_fn(|axis| {
        desc.map_or(0, |desc| if desc.shape()[axis] == 1 { 0 } else { desc.strides()[axis] as i64 })
    }))
}

/// Strides of the first axes of a tensor; 0 where it is absent.
fn strides<const AXES: usize>(desc: Option<&TensorDesc>) -> [i64; AXES] {
    std::array::from_fn(|axis| desc.map_or(0, |desc| desc.strides()[axis] as i64))
}

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
    pub(crate) problem: &'a Problem,
    /// First row and end of the rows that see a key, for each batch row.
    pub(crate) rows: u64,
    /// First key and end of the keys that any row sees, for each batch row.
    pub(crate) keys: u64,
    /// Query lengths, one for each batch row.
    pub(crate) query_lengths: u64,
    /// Where row 0 of each batch row stands among the keys.
    pub(crate) positions: u64,
    /// Marked by [`make_bias`](Self::make_bias), for one head or for each, in rows of so many keys.
    pub(crate) seen: Seen,
    pub(crate) seen_heads: i64,
    pub(crate) bias_row: i64,
}

impl Kernels<'_> {
    fn function(&self, file: &str, name: &str) -> Result<CudaFunction, LaunchError> {
        Ok(self.runtime.function(file, Variant::Helper(Helper::LAUNCHED), name)?)
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
        let function = self.function("attention_rows.cu", "attention_finish_forward")?;
        let o: [i64; 3] = strides(self.problem.tensor(Role::Out));
        let l: [i64; 3] = strides(self.problem.tensor(Role::Lse));
        let [b, t, n] = self.row_axes();
        let width = self.problem.dims().value_head_dim as i64;
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(&out).arg(&o[0]).arg(&o[1]).arg(&o[2]).arg(&lse).arg(&l[0]).arg(&l[1]).arg(&l[2]);
        launch.arg(&stats).arg(&self.rows).arg(&self.seen.rows).arg(&self.seen_heads);
        launch.arg(&sinks).arg(&self.query_lengths);
        launch.arg(&b).arg(&t).arg(&n).arg(&width);
        // SAFETY: the arguments are those of the kernel; it writes the output, the logsumexp and nothing else.
        Ok(unsafe { launch.launch(self.row_grid()) }.map(|_| ()).map_err(LaunchError::from)?)
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
        let function = self.function("attention_rows.cu", "attention_prepare_backward")?;
        let l: [i64; 3] = strides(self.problem.tensor(Role::Lse));
        let [b, t, n] = self.row_axes();
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        let far_heads = states.map_or(0, |start| large::places(self.problem, start)[2]);
        launch.arg(&lse).arg(&l[0]).arg(&l[1]).arg(&l[2]).arg(&stats).arg(&far_heads);
        launch.arg(&self.rows).arg(&self.seen.rows).arg(&self.seen_heads);
        launch.arg(&b).arg(&t).arg(&n);
        // SAFETY: the arguments are those of the kernel; it writes the scratch and nothing else.
        Ok(unsafe { launch.launch(self.row_grid()) }.map(|_| ()).map_err(LaunchError::from)?)
    }

    /// Copies an operand to scratch without gaps, zeros where it is masked for everybody.
    ///
    /// # Safety
    /// `from` is the problem's tensor of this role, whose rows begin at multiples of 16 bytes and are as long, and `to` has
    /// room for its elements. `stats` is by [`prepare_backward`](Self::prepare_backward), or 0.
    pub(crate) unsafe fn clean(&self, role: Role, from: u64, to: u64, stats: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let function = self.function("attention_rows.cu", "attention_clean_rows")?;
        let is_key = matches!(role, Role::Key | Role::Value);
        let (intervals, flags, stats) = if is_key { (self.keys, self.seen.keys, 0) } else { (0, 0, stats) };
        let flag_heads = if self.seen_heads == 1 { 1 } else { self.problem.dims().key_heads as i64 };
        let [b, t, n, h] = std::array::from_fn(|axis| desc.shape()[axis] as i64);
        let [sb, st, sn] = strides(Some(desc));
        let parts = h / 8;
        let across = u32::try_from(parts).unwrap_or(THREADS).clamp(1, THREADS);
        let rows = THREADS / across;
        let deep = (b * t * n).unsigned_abs().div_ceil(u64::from(rows));
        let config = blocks([deep.clamp(1, MOST_BLOCKS), 1], [across, rows]);
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(&from).arg(&sb).arg(&st).arg(&sn).arg(&to).arg(&intervals);
        launch.arg(&flags).arg(&flag_heads).arg(&self.bias_row).arg(&stats);
        launch.arg(&b).arg(&t).arg(&n).arg(&parts);
        // SAFETY: the arguments are those of the kernel; it writes the copy and nothing else.
        Ok(unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::from)?)
    }

    /// Makes one tensor of mask, bias, and ALiBi where `slopes` are given; and marks the rows and keys that take part.
    ///
    /// # Safety
    /// `mask` and `bias` are the problem's, where it has them; `slopes` holds its slopes without gaps; `to` has room for
    /// what `made` describes, and [`Kernels::seen`] for what is [marked](Bias::seen_rows).
    pub(crate) unsafe fn make_bias(&self, made: Bias, from: Terms, to: u64) -> Result<(), Error> {
        let function = self.function("attention_terms.cu", "attention_make_bias")?;
        let dims = self.problem.dims();
        let (mask, bias) = (self.problem.tensor(Role::Mask), self.problem.tensor(Role::Bias));
        let slopes = self.problem.tensor(Role::AlibiSlopes);
        let [batch, heads, positions, keys] = made.shape;
        let (marked_rows, marked_keys) = (made.seen_rows(dims), made.seen_keys(dims));
        let float = made.element == Type::Float;
        let made = MadeBias {
            to,
            element: if float { DTypeCode::F32 } else { DTypeCode::Bf16 }.code().into(),
            shape: [batch, heads, positions, keys],
            row: made.strides[2],
            masked: MASKED,
            least: LEAST,
        };
        let terms = DeviceTerms {
            mask: from.mask,
            mask_strides: broadcast_strides(mask),
            bias: from.bias,
            bias_element: bias.map_or(0, |bias| dtype_code(bias.dtype()).code()).into(),
            bias_strides: broadcast_strides(bias),
            slopes: from.slopes,
            slopes_batch: if slopes.is_some_and(|slopes| slopes.rank() == 2) {
                dims.query_heads as i64
            } else {
                0
            },
        };
        let far = |bound: Option<usize>| bound.map_or(FAR, |bound| FAR.min(bound as i64));
        let structure = Structure {
            rows: self.rows,
            keys: self.keys,
            positions: self.positions,
            left: far(self.problem.window().left),
            right: far(right_bound(self.problem)),
        };
        let [b, n, group, t] =
            [dims.batch, dims.query_heads, dims.group_size(), dims.query_length].map(|size| size as i64);
        let stream = self.runtime.device.stream();
        for (at, shape) in [(self.seen.rows, marked_rows), (self.seen.keys, marked_keys)] {
            // SAFETY: room for so many bytes by the caller's word.
            unsafe { memset_d8_async(at, 0, shape.iter().product(), stream.cu_stream()) }
                .map_err(LaunchError::from)?;
        }
        let mut launch = stream.launch_builder(&function);
        launch.arg(&made).arg(&terms).arg(&structure).arg(&self.seen);
        launch.arg(&b).arg(&n).arg(&group).arg(&t);
        let strips = (batch * heads).unsigned_abs() * t.unsigned_abs().div_ceil(STRIP);
        let vectors = made.row.unsigned_abs() / 8;
        let threads = u32::try_from(vectors.next_multiple_of(32)).unwrap_or(THREADS).min(THREADS);
        let config = blocks([strips, vectors.div_ceil(u64::from(threads))], [threads, 1]);
        // SAFETY: the arguments are those of the kernel; it writes what `made` describes and the flags.
        Ok(unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::from)?)
    }

    /// Brings slopes or sinks to f32 without gaps.
    ///
    /// # Safety
    /// `from` is the problem's tensor of this role, and `to` has room for as many floats.
    pub(crate) unsafe fn to_floats(&self, role: Role, from: u64, to: u64) -> Result<(), Error> {
        let Some(desc) = self.problem.tensor(role) else { return Ok(()) };
        let function = self.function("attention_terms.cu", "attention_to_floats")?;
        let (shape, lies) = (desc.shape(), desc.strides());
        let last = desc.rank() - 1;
        let (columns, column_stride) = (shape[last] as i64, lies[last] as i64);
        let (rows, row_stride) = if last == 1 { (shape[0] as i64, lies[0] as i64) } else { (1, 0) };
        let from_element = dtype_code(desc.dtype()).code();
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(&to).arg(&from).arg(&from_element).arg(&rows).arg(&columns);
        launch.arg(&row_stride).arg(&column_stride);
        let config = grid((rows * columns).unsigned_abs());
        // SAFETY: the arguments are those of the kernel; it writes a float for each element and nothing else.
        Ok(unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::from)?)
    }

    /// Writes the keep bits of the problem's dropout as ones and zeros, in rows of whole blocks of eight keys.
    ///
    /// # Safety
    /// `to` has room for them.
    pub(crate) unsafe fn keep_mask(&self, to: u64) -> Result<(), Error> {
        let Some(stream) = self.problem.dropout_stream() else { return Ok(()) };
        let function = self.function("attention_terms.cu", "attention_keep_mask")?;
        let dims = self.problem.dims();
        let one: u32 = if self.problem.dtype() == DType::F16 { 0x3c00 } else { 0x3f80 };
        let rows = (dims.batch * dims.query_heads) as i64;
        let (positions, eights) = (dims.query_length as i64, dims.key_length.div_ceil(8) as i64);
        let threshold = stream.threshold();
        let ([low, high], offset) = stream.words();
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(&to).arg(&one).arg(&rows).arg(&positions).arg(&eights);
        launch.arg(&threshold).arg(&low).arg(&high).arg(&offset);
        let across = u32::try_from(eights).unwrap_or(THREADS).next_power_of_two().min(32);
        let deep = THREADS / across;
        let config = blocks([(rows * positions).unsigned_abs().div_ceil(u64::from(deep)), 1], [across, deep]);
        // SAFETY: the arguments are those of the kernel; it writes the mask and nothing else.
        Ok(unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::from)?)
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
        let function = self.function("attention_terms.cu", "attention_sink_gradient")?;
        let l: [i64; 3] = strides(self.problem.tensor(Role::Lse));
        let [b, t, n] = self.row_axes();
        let (to_element, [to_stride]) = (dtype_code(desc.dtype()).code(), strides(Some(desc)));
        let mut launch = self.runtime.device.stream().launch_builder(&function);
        launch.arg(&to).arg(&to_element).arg(&to_stride).arg(&sinks).arg(&delta);
        launch.arg(&lse).arg(&l[0]).arg(&l[1]).arg(&l[2]).arg(&self.query_lengths);
        let ([offsets, scores, _], far_from) = (large::places(self.problem, states), large::FAR);
        launch.arg(&scores).arg(&offsets).arg(&far_from).arg(&b).arg(&n).arg(&t);
        let config = blocks([n.unsigned_abs(), 1], [SUMMING_THREADS, 1]);
        // SAFETY: the arguments are those of the kernel; it writes a number for each head and nothing else.
        Ok(unsafe { launch.launch(config) }.map(|_| ()).map_err(LaunchError::from)?)
    }
}
