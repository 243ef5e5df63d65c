//! The argument of the fused attention kernels: the problem and the addresses of a call, in the layout and
//! with the field names of `fused/parameters.cuh` in `attention-kernels`.

use std::sync::Arc;

use attention_core::{DType, Problem, Role, TensorDesc};
use attention_kernels::DTypeCode;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError};

use crate::Addresses;

/// Positions are this far from anything at most: with the lengths added, no sum overflows.
const FAR: i128 = 1 << 40;

/// A dtype as the kernels number it.
pub fn dtype_code(dtype: DType) -> DTypeCode {
    match dtype {
        DType::F64 => DTypeCode::F64,
        DType::F32 => DTypeCode::F32,
        DType::F16 => DTypeCode::F16,
        DType::Bf16 => DTypeCode::Bf16,
        other => unreachable!("no tensor of floats is {other} in a checked problem"),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Tensor {
    address: u64,
    stride: [i64; 4],
}

/// Where the rows of one sequence are, and which keys a row sees.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceRows {
    /// Query row `t` stands at `t + offset`.
    offset: i64,
    /// Row `t` sees the keys from `t + low` to before `t + high` that exist.
    low: i64,
    high: i64,
    /// The numbers of query rows and of keys that exist.
    queries: i32,
    keys: i32,
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernels; the
// size is asserted on both sides.
unsafe impl DeviceRepr for SequenceRows {}

const _: () = assert!(size_of::<SequenceRows>() == 32);

/// Number of roles, each of which has a tensor among the parameters.
const ROLES: usize = Role::ALL.len();

/// The addresses of a call's scratch. The kernels have one pair of fields for all passes, as a union.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScratchAddresses {
    /// Of a forward pass with split keys.
    Partials {
        /// Partial outputs, `[split, B, N, T, Hv]`.
        out: u64,
        /// Row max and row sum, `[split, B, N, T, 2]`.
        state: u64,
    },
    /// Of a backward pass, and of the kernels that recompute rows behind cuDNN.
    Rows {
        /// Offset per row, `[B, N, T]`. Behind cuDNN's forward pass: its logsumexp.
        offsets: u64,
        /// Row terms and scores, `[B, N, T]` each, then a number per head that says whether it has a far row
        /// (`fused/backward/gradients.cuh`). 0 behind cuDNN's forward pass.
        deltas: u64,
    },
}

/// The one argument of every fused attention kernel. Fields have the names that the kernels give them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Parameters {
    /// In the order of [`Role::ALL`].
    tensors: [Tensor; ROLES],
    /// The address of a [`SequenceRows`] for each batch row, or 0 where `uniform_sequence` is that of all.
    sequences: u64,
    uniform_sequence: SequenceRows,
    /// A union of two addresses, see [`ScratchAddresses`].
    partial_out_or_row_offsets: u64,
    /// As above.
    partial_state_or_row_deltas: u64,
    batch: i64,
    query_length: i64,
    key_length: i64,
    query_heads: i64,
    key_heads: i64,
    bias_size: [i64; 4],
    scale: f64,
    softcap: f64,
    keep_scale: f64,
    balance: f32,
    unbalance: f32,
    head_dim: i32,
    value_head_dim: i32,
    group: i32,
    /// Query heads whose rows share tiles (pack GQA); 1 unless set.
    pub pack_gqa: i32,
    /// Splits of the keys (split-KV); 1 unless set.
    pub splits: i32,
    aligned: u32,
    bias_dtype: i32,
    slopes_dtype: i32,
    sinks_dtype: i32,
    hides_keys: i32,
    drop_threshold: u32,
    drop_key: [u32; 2],
    drop_offset: u32,
    swizzle: i32,
    swizzles_batch: i32,
}

// SAFETY: plain numbers, in the layout of the struct of the same name in the kernels; the size is asserted on both sides.
unsafe impl DeviceRepr for Parameters {}

const _: () = assert!(size_of::<Parameters>() == 864);

impl SequenceRows {
    fn of(problem: &Problem, batch: usize) -> Self {
        let offset = problem.offset(batch);
        let window = problem.window();
        let far = |position: i128| position.clamp(-FAR, FAR) as i64;
        let left = window.left.map_or(-FAR, |left| i128::from(offset) - left as i128);
        let right = window.right.map(|right| i128::from(offset) + right as i128);
        let last = match (right, problem.causal()) {
            (Some(right), true) => Some(right.min(i128::from(offset))),
            (None, true) => Some(i128::from(offset)),
            (right, false) => right,
        };
        Self {
            offset: offset.clamp(-(1 << 60), 1 << 60),
            low: far(left),
            high: last.map_or(FAR as i64, |last| far(last + 1)),
            queries: problem.query_len(batch) as i32,
            keys: problem.key_value_len(batch) as i32,
        }
    }

    /// The keys that row `t` sees, as kernels compute them.
    pub fn keys_of(&self, t: usize) -> std::ops::Range<usize> {
        if t as i64 >= i64::from(self.queries) {
            return 0..0;
        }
        let clamped = |shift: i64| (t as i64 + shift).clamp(0, i64::from(self.keys)) as usize;
        clamped(self.low)..clamped(self.high)
    }
}

/// The rows of each batch row's sequence, or one element where all sequences are alike.
pub fn sequences(problem: &Problem) -> Vec<SequenceRows> {
    let mut rows: Vec<SequenceRows> =
        (0..problem.dims().batch).map(|batch| SequenceRows::of(problem, batch)).collect();
    if rows.windows(2).all(|two| two[0] == two[1]) {
        rows.truncate(1);
    }
    rows
}

/// Whether rows of a tensor can be read 16 bytes at a time, as far as its layout says.
fn has_aligned_rows(desc: &TensorDesc) -> bool {
    let chunk = 16 / desc.dtype().size();
    let (shape, strides) = (desc.shape(), desc.strides());
    desc.rank() == 4
        && shape[3].is_multiple_of(chunk)
        && strides[3] == 1
        && (0..3).all(|axis| shape[axis] <= 1 || strides[axis] % chunk as isize == 0)
}

/// Which tiles are scheduled round-robin, so that they share reads of a mask or bias in L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swizzle {
    /// Number of heads, or batch rows, whose tiles take turns. Divides the number of heads (batch rows); 1 for
    /// no swizzle.
    pub count: usize,
    /// Whether batch rows take turns instead of heads.
    pub batch: bool,
}

impl Swizzle {
    /// At most four heads (batch rows) that read the same mask or bias, since L2 has to hold their keys and
    /// values as well.
    pub fn of(problem: &Problem) -> Self {
        let dims = problem.dims();
        let none = Self { count: 1, batch: false };
        let term = [Role::Bias, Role::Mask].into_iter().find_map(|role| problem.tensor(role));
        let Some(shape) = term.map(TensorDesc::shape).filter(|shape| shape[2] > 1) else { return none };
        let most =
            |total: usize| [4, 3, 2].into_iter().find(|&count| total.is_multiple_of(count)).unwrap_or(1);
        match (shape[0], shape[1]) {
            // A count of 0 has no blocks.
            (_, 1) if dims.key_heads > 1 => Self { count: most(dims.key_heads), batch: false },
            (1, _) if dims.batch > 1 => Self { count: most(dims.batch), batch: true },
            _ => none,
        }
    }
}

/// The power of two that gradients of logits are multiplied by before their products with queries and keys are summed: about the
/// square root of the scale, so that neither they nor the products leave the range of f32 on the way.
fn balance(scale: f64) -> f32 {
    // At most 127, and 511 for f64, whose range takes any half of that.
    let exponent = scale.abs().log2().floor() as i32;
    2f32.powi((exponent / 2).clamp(0, 126))
}

impl Parameters {
    /// Everything but addresses.
    fn of(problem: &Problem, uniform_sequence: SequenceRows) -> Self {
        let dims = problem.dims();
        let mut tensors = [Tensor::default(); ROLES];
        let mut aligned = 0;
        for (index, role) in Role::ALL.into_iter().enumerate() {
            let Some(desc) = problem.tensor(role) else { continue };
            let strides = desc.strides();
            let stride = |axis: usize| if axis < desc.rank() { strides[axis] as i64 } else { 0 };
            tensors[index].stride = match role {
                // One for all batch rows, or one for each.
                Role::AlibiSlopes if desc.rank() == 1 => [0, stride(0), 0, 0],
                _ => std::array::from_fn(|axis| {
                    // Masks and biases of size 1 are broadcast, whatever their stride is.
                    let broadcast =
                        matches!(role, Role::Mask | Role::Bias | Role::DBias) && desc.shape()[axis] == 1;
                    if broadcast { 0 } else { stride(axis) }
                }),
            };
            if has_aligned_rows(desc) {
                aligned |= 1 << index;
            }
        }
        let dtype = |role| problem.tensor(role).map_or(0, |desc| dtype_code(desc.dtype()).code());
        let bias_size = problem.tensor(Role::Bias).map_or([0; 4], |bias| {
            let shape = bias.shape();
            std::array::from_fn(|axis| shape[axis] as i64)
        });
        let dropout = problem.dropout_stream();
        let (drop_key, drop_offset) = dropout.map_or(([0; 2], 0), |stream| stream.words());
        let swizzle = Swizzle::of(problem);
        let structured = problem.causal() || !problem.window().is_unbounded();
        Self {
            tensors,
            uniform_sequence,
            batch: dims.batch as i64,
            query_length: dims.query_length as i64,
            key_length: dims.key_length as i64,
            query_heads: dims.query_heads as i64,
            key_heads: dims.key_heads as i64,
            bias_size,
            scale: problem.scale(),
            softcap: problem.softcap().unwrap_or(0.0),
            keep_scale: dropout.map_or(1.0, |stream| stream.keep_scale()),
            balance: balance(problem.scale()),
            unbalance: 1.0 / balance(problem.scale()),
            head_dim: dims.head_dim as i32,
            value_head_dim: dims.value_head_dim as i32,
            group: dims.group_size() as i32,
            pack_gqa: 1,
            splits: 1,
            aligned,
            bias_dtype: dtype(Role::Bias),
            slopes_dtype: dtype(Role::AlibiSlopes),
            sinks_dtype: dtype(Role::Sinks),
            hides_keys: i32::from(structured || problem.has(Role::Mask) || problem.has(Role::Bias)),
            drop_threshold: dropout.map_or(0, |stream| stream.threshold()),
            drop_key,
            drop_offset,
            swizzle: swizzle.count as i32,
            swizzles_batch: i32::from(swizzle.batch),
            ..Self::default()
        }
    }

    /// Has kernels recompute rows whose results are not finite, whether or not a mask, a bias or structure
    /// hides keys.
    pub fn check_results(&mut self) {
        self.hides_keys = 1;
    }

    /// Sets the addresses of scratch; kernels without scratch need none.
    pub fn set_scratch(&mut self, scratch: ScratchAddresses) {
        (self.partial_out_or_row_offsets, self.partial_state_or_row_deltas) = match scratch {
            ScratchAddresses::Partials { out, state } => (out, state),
            ScratchAddresses::Rows { offsets, deltas } => (offsets, deltas),
        };
    }

    /// Puts the addresses of a call's tensors in their places.
    pub fn set_all(&mut self, tensors: &Addresses) {
        for (role, address) in tensors.iter() {
            self.set(role, address);
        }
    }

    /// Puts the address of a tensor in its place. Rows count as aligned only where the address is too.
    pub fn set(&mut self, role: Role, address: u64) {
        self.tensors[role as usize].address = address;
        if !address.is_multiple_of(16) {
            self.aligned &= !(1 << role as usize);
        }
    }
}

/// The parameters of a problem's calls, with the device memory that they point to.
#[derive(Debug)]
pub struct ProblemParameters {
    parameters: Parameters,
    /// Where the batch rows' sequences differ.
    _sequences: Option<CudaSlice<SequenceRows>>,
}

impl ProblemParameters {
    /// For calls on this stream.
    ///
    /// # Errors
    /// The driver's, where batch rows differ and the copy of their [`SequenceRows`] to the device fails.
    pub fn new(problem: &Problem, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let rows = sequences(problem);
        if let [] | [_] = rows[..] {
            let uniform = rows.first().copied().unwrap_or_default();
            return Ok(Self { parameters: Parameters::of(problem, uniform), _sequences: None });
        }
        let rows = stream.clone_htod(&rows)?;
        let mut parameters = Parameters::of(problem, SequenceRows::default());
        parameters.sequences = rows.device_ptr(stream).0;
        Ok(Self { parameters, _sequences: Some(rows) })
    }

    /// Those of a call, but for its addresses. What they point to lives as long as `self`.
    pub fn of_call(&self) -> Parameters {
        self.parameters
    }

    /// The same, to be set for all calls.
    pub fn of_calls(&mut self) -> &mut Parameters {
        &mut self.parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text that every fused kernel begins with.
    fn text() -> &'static str {
        attention_kernels::source("attention_forward.cu").expect("it is in the package").text
    }

    /// The field of a role's tensor in the kernels, without underscores.
    fn field(role: Role) -> String {
        match role {
            Role::AlibiSlopes => "slopes".to_owned(),
            role => format!("{role:?}").to_lowercase(),
        }
    }

    #[test]
    fn tensors_are_in_the_order_of_the_kernels() {
        let (_, after) = text().split_once("struct Parameters {\n    Tensor ").unwrap();
        let (names, _) = after.split_once(';').unwrap();
        let names: Vec<String> = names.split(',').map(|name| name.trim().replace('_', "")).collect();
        assert_eq!(names, Role::ALL.map(field));
    }

    #[test]
    fn the_bits_of_aligned_tensors_are_those_of_the_kernels() {
        let defines = text().lines().filter_map(|line| line.strip_prefix("#define ALIGNED_"));
        let mut count = 0;
        for (name, bit) in defines.map(|define| define.split_once(' ').unwrap()) {
            let name = name.replace('_', "").to_lowercase();
            let role = Role::ALL.into_iter().find(|&role| field(role) == name).unwrap();
            assert_eq!(bit, format!("(1 << {})", role as usize), "{name}");
            count += 1;
        }
        assert_eq!(count, 10);
    }
}
