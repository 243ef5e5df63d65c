//! The argument of the fused attention kernels: a call's problem, numbers and addresses, in the layout and
//! with the field names of `fused/parameters.cuh` in `attention-kernels`.

use attention_core::{Alignment, CallProblem, DType, OffsetRange, Problem, Role, RowLayout, TensorDesc};
use attention_kernels::DTypeCode;
use cudarc::driver::DeviceRepr;

use crate::Addresses;
use crate::numbers::StoredNumbers;
use crate::sequences::{INLINE_ROWS, is_on_device, uniform_sequence};
pub use crate::sequences::{SequenceRows, sequences};

/// A dtype as the kernels number it.
pub fn dtype_code(dtype: DType) -> DTypeCode {
    match dtype {
        DType::F64 => DTypeCode::F64,
        DType::F32 => DTypeCode::F32,
        DType::F16 => DTypeCode::F16,
        DType::Bf16 => DTypeCode::Bf16,
        DType::I32 => DTypeCode::I32,
        DType::U32 => DTypeCode::U32,
        DType::I64 => DTypeCode::I64,
        DType::F8E4M3 => DTypeCode::F8E4M3,
        DType::F8E5M2 => DTypeCode::F8E5M2,
        other => unreachable!("no tensor of floats or integers is {other} in a checked problem"),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Tensor {
    address: u64,
    stride: [i64; 4],
}

/// Integers in device memory, `Integers` of the kernels (`common/integers.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Integers {
    /// The address of the integer at index 0; 0 where the call has none in device memory.
    data: u64,
    stride: i64,
    dtype: i32,
    padding: i32,
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernels; the
// size is asserted on both sides.
unsafe impl DeviceRepr for Integers {}

const _: () = assert!(size_of::<Integers>() == 24);

impl Integers {
    /// Those of a role of [`Role::is_data`] in a problem's calls, without an address, and with the stride
    /// along the last axis. None where the problem has none in device memory.
    pub fn of(problem: &Problem, role: Role) -> Self {
        match problem.tensor(role).filter(|_| is_on_device(problem, role)) {
            Some(desc) => Self {
                stride: desc.strides().last().map_or(0, |&stride| stride as i64),
                dtype: dtype_code(desc.dtype()).code(),
                ..Self::default()
            },
            None => Self::default(),
        }
    }

    /// Of 64 bits without gaps.
    pub(crate) fn stored_at(address: u64) -> Self {
        Self { data: address, stride: 1, dtype: DTypeCode::I64.code(), padding: 0 }
    }

    /// The same at this address.
    #[must_use]
    pub fn at(self, address: u64) -> Self {
        Self { data: address, ..self }
    }
}

/// The rows and keys of a sequence that are real.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RowLengths {
    queries: i32,
    keys: i32,
}

/// Those of each batch row.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct InlineLengths([RowLengths; INLINE_ROWS]);

impl Default for InlineLengths {
    fn default() -> Self {
        Self([RowLengths::default(); INLINE_ROWS])
    }
}

/// The scales of 8-bit keys or values, `Scales` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Scales {
    /// The address of that of the first head of the first sequence; 0 where all heads have one that the host
    /// knows.
    data: u64,
    batch_stride: i64,
    head_stride: i64,
}

impl Scales {
    /// Those of a role in a problem's calls, without an address. Zeros where the problem has none in device
    /// memory.
    fn of(problem: &Problem, role: Role) -> Self {
        let Some(desc) = problem.tensor(role).filter(|_| is_on_device(problem, role)) else {
            return Self::default();
        };
        let strides = desc.strides();
        match desc.shape()[..] {
            [1] => Self::default(),
            [_] => Self { head_stride: strides[0] as i64, ..Self::default() },
            _ => Self { batch_stride: strides[0] as i64, head_stride: strides[1] as i64, ..Self::default() },
        }
    }

    /// As [`StoredNumbers`] has them, the upper half of eight bytes unused.
    fn stored_at(problem: &Problem, role: Role, address: u64) -> Self {
        let shape = problem.tensor(role).map(TensorDesc::shape);
        let heads = shape.and_then(|shape| shape.last().copied()).unwrap_or(0) as i64;
        let batch_stride = if shape.is_some_and(|shape| shape.rank() == 2) { 2 * heads } else { 0 };
        Self { data: address, batch_stride, head_stride: 2 }
    }
}

/// Number of roles whose tensors are among the parameters: all but the numbers and the places of sequences,
/// which come last.
const ROLES: usize = Role::ALL.len() - Role::DATA.len() - Role::SEQUENCES.len();

/// The roles of tensors, in the order of the parameters.
fn tensor_roles() -> impl Iterator<Item = Role> {
    Role::ALL.into_iter().filter(|role| !role.is_data())
}

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

/// The addresses in scratch of what the kernel for all three gradients has of each tile of query rows
/// (`fused/backward/one_pass/turns.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryTiles {
    /// Sums of the gradient of queries, in f32, as many for each tile as it has numbers.
    pub sums: u64,
    /// Two numbers of 32 bits for each tile, and one for all.
    pub turns: u64,
    /// Tiles of all heads and sequences.
    pub count: i64,
}

/// Bytes of a `ScheduledTile` of the kernels (`fused/schedule.cuh`), and its alignment.
pub const SCHEDULED_TILE: usize = 64;

/// The one argument of every fused attention kernel. Fields have the names that the kernels give them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Parameters {
    /// In the order of [`Role::ALL`].
    tensors: [Tensor; ROLES],
    query_lengths: Integers,
    key_value_lengths: Integers,
    query_offsets: Integers,
    dropout_seed: Integers,
    dropout_offset: Integers,
    /// Of every batch row, unless `rows_vary`. Of packed rows and pages, which keys a row sees, unless
    /// sequences have offsets of their own or `is_bottom_right`.
    uniform_sequence: SequenceRows,
    query_offset: i64,
    least_offset: i64,
    most_offset: i64,
    /// A row sees the keys from `keys_before` before its position to before `keys_after` behind it.
    keys_before: u64,
    keys_after: u64,
    /// A union of two addresses, see [`ScratchAddresses`].
    partial_out_or_row_offsets: u64,
    /// As above.
    partial_state_or_row_deltas: u64,
    query_sums: u64,
    query_turns: u64,
    query_tiles: i64,
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
    rows_vary: i32,
    has_lengths: i32,
    is_bottom_right: i32,
    /// Tiles of the forward kernel, all splits and slices of them, where its blocks go over several.
    pub forward_tiles: i32,
    lengths: InlineLengths,
    /// From here on, of packed rows and pages alone: kernels of dense rows take no more than what is above.
    query_starts: Integers,
    key_value_starts: Integers,
    block_table: Integers,
    /// The stride from sequence to sequence.
    block_table_row: i64,
    /// Rows of packed tensors, all sequences together; 0 where they are dense.
    query_rows: i64,
    key_rows: i64,
    pages: i64,
    page_size: i64,
    /// Keys that a sequence's part of the table holds; 0 where there are no pages.
    most_keys: i64,
    /// Where the tiles of packed rows are listed, entries of [`SCHEDULED_TILE`] bytes; 0 unless set, where no
    /// kernel reads it.
    pub schedule: u64,
    /// From here on, of 8-bit keys and values alone.
    key_scales: Scales,
    value_scales: Scales,
    /// Where [`Scales`] have no address; 1 without scales.
    key_scale: f32,
    value_scale: f32,
}

// SAFETY: plain numbers, in the layout of the struct of the same name in the kernels; the size is asserted on
// both sides.
unsafe impl DeviceRepr for Parameters {}

const _: () = assert!(size_of::<Parameters>() == 1752);

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
    /// Number of heads, or batch rows, whose tiles take turns. Divides the number of heads (batch rows); 1
    /// for no swizzle.
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
            // Tiles of packed rows are of no batch row before a block looks.
            (1, _) if dims.batch > 1 && problem.query_layout() == RowLayout::Dense => {
                Self { count: most(dims.batch), batch: true }
            }
            _ => none,
        }
    }
}

/// The first factor of [`CallProblem::scale_of_gradients`], which gradients of logits are multiplied by
/// before their products with queries and keys are summed, and its inverse. Both are normal numbers of f32:
/// at most 2^126, and in f64, whose range is wide enough with any part of a scale, no more than that.
fn balance(problem: &CallProblem<'_>) -> (f32, f32) {
    let end = 126f64.exp2();
    let (before, _) = problem.scale_of_gradients();
    let balance = before.clamp(end.recip(), end) as f32;
    (balance, balance.recip())
}

impl Parameters {
    /// Everything but the numbers and the addresses of a call.
    fn of(problem: &Problem) -> Self {
        let dims = problem.dims();
        let mut tensors = [Tensor::default(); ROLES];
        let mut aligned = 0;
        for (index, role) in tensor_roles().enumerate() {
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
        let at_bounds = CallProblem::at_bounds(problem);
        let dropout = at_bounds.dropout_stream();
        let swizzle = Swizzle::of(problem);
        let window = problem.window();
        let structured = problem.causal() || !window.is_unbounded();
        // The window holds the row's own position, and no offset reaches further than the largest number.
        let keys_after = match window.right {
            _ if problem.causal() => 1,
            Some(right) => (right as u64).saturating_add(1),
            None => u64::MAX,
        };
        let (least_offset, most_offset) = match problem.alignment() {
            Alignment::Offsets(OffsetRange::Near) => (-OffsetRange::NEAR, OffsetRange::NEAR),
            _ => (i64::MIN, i64::MAX),
        };
        Self {
            tensors,
            query_lengths: Integers::of(problem, Role::QueryLengths),
            key_value_lengths: Integers::of(problem, Role::KeyValueLengths),
            query_offsets: Integers::of(problem, Role::QueryOffsets),
            dropout_seed: Integers::of(problem, Role::DropoutSeed),
            dropout_offset: Integers::of(problem, Role::DropoutOffset),
            least_offset,
            most_offset,
            keys_before: window.left.map_or(u64::MAX, |left| left as u64),
            keys_after,
            batch: dims.batch as i64,
            query_length: dims.query_length as i64,
            key_length: dims.key_length as i64,
            query_heads: dims.query_heads as i64,
            key_heads: dims.key_heads as i64,
            bias_size,
            keep_scale: dropout.map_or(1.0, |stream| stream.keep_scale()),
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
            swizzle: swizzle.count as i32,
            swizzles_batch: i32::from(swizzle.batch),
            is_bottom_right: i32::from(problem.alignment() == Alignment::BottomRight),
            ..Self::default()
        }
        .with_places(problem)
    }

    /// Where the rows of packed sequences and pages are, as far as the problem says.
    fn with_places(mut self, problem: &Problem) -> Self {
        for role in Role::SEQUENCES {
            *self.integers(role) = Integers::of(problem, role);
        }
        for role in Role::SCALES {
            *self.scales(role) = Scales::of(problem, role);
        }
        let size = |role: Role, axis: usize| problem.tensor(role).map_or(0, |desc| desc.shape()[axis] as i64);
        if problem.query_layout() == RowLayout::Packed {
            self.query_rows = size(Role::Query, 1);
        }
        match problem.key_layout() {
            RowLayout::Dense => {}
            RowLayout::Packed => self.key_rows = size(Role::Key, 1),
            RowLayout::Paged { page_size } => {
                self.pages = size(Role::Key, 0);
                self.page_size = page_size as i64;
                let most_pages = if self.pages > 0 { size(Role::BlockTable, 1) } else { 0 };
                // The problem checked that the product does not overflow.
                self.most_keys = most_pages * self.page_size;
                self.block_table_row =
                    problem.tensor(Role::BlockTable).map_or(0, |table| table.strides()[0] as i64);
            }
        }
        self
    }

    /// Sets the numbers of a call that the host knows.
    fn set_numbers(&mut self, problem: &CallProblem<'_>, stored: u64) {
        self.scale = problem.scale();
        self.softcap = problem.softcap().unwrap_or(0.0);
        (self.balance, self.unbalance) = balance(problem);
        if let Some(stream) = problem.dropout_stream() {
            (self.drop_key, self.drop_offset) = stream.words();
        }
        self.set_scales(problem, stored);
        if let Some(uniform) = uniform_sequence(problem) {
            self.uniform_sequence = uniform;
            return;
        }
        self.rows_vary = 1;
        if Role::SEQUENCES.into_iter().any(|role| problem.has(role)) && problem.dims().batch > 0 {
            self.uniform_sequence = SequenceRows::of(&problem.sequence(0));
        }
        // Where batch rows have offsets of their own, kernels read those.
        let batch = problem.dims().batch;
        self.query_offset = match problem.alignment() {
            Alignment::Offset(_) | Alignment::Offsets(_) if batch > 0 => problem.offset(0),
            _ => 0,
        };
        let on_host = |role: Role| problem.has(role) && !is_on_device(problem, role);
        if batch <= INLINE_ROWS && (on_host(Role::QueryLengths) || on_host(Role::KeyValueLengths)) {
            self.has_lengths = 1;
            for (batch, lengths) in self.lengths.0.iter_mut().enumerate().take(batch) {
                // Kernels are launched for lengths of 31 bits alone.
                let (queries, keys) = (problem.query_len(batch), problem.key_value_len(batch));
                *lengths = RowLengths { queries: queries as i32, keys: keys as i32 };
            }
        }
        for (role, address) in StoredNumbers::of(problem).places(stored) {
            if Role::SCALES.contains(&role) {
                continue;
            }
            *self.integers(role) = Integers::stored_at(address);
            if role == Role::BlockTable {
                self.block_table_row = problem.tensor(role).map_or(0, |table| table.shape()[1] as i64);
            }
        }
    }

    /// Sets the scales of 8-bit keys and values that the host knows: one of all heads, or where those of each
    /// are stored.
    fn set_scales(&mut self, problem: &CallProblem<'_>, stored: u64) {
        let is_one = |role: Role| problem.tensor(role).is_some_and(|scales| scales.shape()[..] == [1]);
        self.key_scale = if is_one(Role::KeyScales) { problem.key_scale(0, 0) } else { 1.0 };
        self.value_scale = if is_one(Role::ValueScales) { problem.value_scale(0, 0) } else { 1.0 };
        if !Role::SCALES.into_iter().any(|role| problem.has(role)) {
            return;
        }
        for (role, address) in StoredNumbers::of(problem).places(stored) {
            if Role::SCALES.contains(&role) {
                *self.scales(role) = Scales::stored_at(problem, role, address);
            }
        }
    }

    fn scales(&mut self, role: Role) -> &mut Scales {
        match role {
            Role::KeyScales => &mut self.key_scales,
            Role::ValueScales => &mut self.value_scales,
            _ => unreachable!("{role} is no scale"),
        }
    }

    fn integers(&mut self, role: Role) -> &mut Integers {
        match role {
            Role::QueryLengths => &mut self.query_lengths,
            Role::KeyValueLengths => &mut self.key_value_lengths,
            Role::QueryOffsets => &mut self.query_offsets,
            Role::DropoutSeed => &mut self.dropout_seed,
            Role::DropoutOffset => &mut self.dropout_offset,
            Role::QueryStarts => &mut self.query_starts,
            Role::KeyValueStarts => &mut self.key_value_starts,
            Role::BlockTable => &mut self.block_table,
            _ => unreachable!("{role} is a tensor, or a scale"),
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

    /// Sets the scratch of the kernel for all three gradients of a backward pass.
    pub fn set_query_tiles(&mut self, QueryTiles { sums, turns, count }: QueryTiles) {
        (self.query_sums, self.query_turns, self.query_tiles) = (sums, turns, count);
    }

    /// Puts the addresses of a call's tensors, and of its numbers in device memory, in their places.
    pub fn set_all(&mut self, tensors: &Addresses) {
        for (role, address) in tensors.iter() {
            self.set(role, address);
        }
    }

    /// The same without a place for the gradient of queries.
    #[must_use]
    pub fn without_gradient_of_queries(&self) -> Self {
        let mut other = *self;
        other.tensors[Role::DQuery as usize].address = 0;
        other
    }

    /// Puts the address of a tensor in its place. Rows count as aligned only where the address is too.
    pub fn set(&mut self, role: Role, address: u64) {
        if Role::SCALES.contains(&role) {
            self.scales(role).data = address;
            return;
        }
        if role.is_data() {
            self.integers(role).data = address;
            return;
        }
        self.tensors[role as usize].address = address;
        if !address.is_multiple_of(16) {
            self.aligned &= !(1 << role as usize);
        }
    }
}

/// The parameters of a problem's calls.
#[derive(Clone, Debug)]
pub struct ProblemParameters {
    parameters: Parameters,
}

impl ProblemParameters {
    /// All that calls of the problem share.
    pub fn new(problem: &Problem) -> Self {
        Self { parameters: Parameters::of(problem) }
    }

    /// Those of a call, but for its addresses ([`Parameters::set_all`]). Where the problem has
    /// [`StoredNumbers`], `stored` is where [`NumberStore::store`](crate::NumberStore::store) puts those of
    /// the call, in its scratch; elsewhere it is not used.
    pub fn of_call(&self, problem: &CallProblem<'_>, stored: u64) -> Parameters {
        let mut parameters = self.parameters;
        parameters.set_numbers(problem, stored);
        parameters
    }

    /// What calls share, to be set for all of them.
    pub fn of_calls(&mut self) -> &mut Parameters {
        &mut self.parameters
    }
}

#[cfg(test)]
mod tests;
