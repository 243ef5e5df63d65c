//! Errors, grouped by who can do something about them.
//!
//! `Debug` of each is its text: it is what a program prints whose `main` returns the error.

mod unsupported;

pub use unsupported::Unsupported;

use crate::{DType, Device, Dims, Gradients, Pass, Role, Strides, TensorDesc};

/// Prints errors with `{:?}` as with `{}`, so that a `main` that returns one ends with a sentence.
macro_rules! debug_is_the_text {
    ($($error:ty),* $(,)?) => {$(
        impl std::fmt::Debug for $error {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    )*};
}
debug_is_the_text!(Error, InvalidCall, Unsupported, Unavailable, BackendFailure, OutOfMemory);

/// Why a call did not run. Each variant names a culprit; nothing was written to any output for the first
/// three.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The call itself is wrong: no backend would accept it.
    #[error("invalid call: {0}")]
    InvalidCall(#[from] InvalidCall),
    /// The call is fine, and this backend cannot serve it.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The backend's library or device is not there.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The backend failed while running.
    #[error(transparent)]
    Backend(#[from] BackendFailure),
    /// The allocator refused.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// The caller's mistake, with the numbers in it.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidCall {
    /// A tensor has the wrong number of axes.
    #[error("{role} has rank {rank} (shape {shape}), expected rank {expected}")]
    Rank {
        /// Which tensor.
        role: Role,
        /// Its rank.
        rank: usize,
        /// Its shape.
        shape: Dims,
        /// The rank that is accepted.
        expected: &'static str,
    },
    /// More axes than any tensor of a call has.
    #[error("rank {rank} is above the largest supported rank of {max}")]
    RankTooLarge {
        /// The rank given.
        rank: usize,
        /// The limit.
        max: usize,
    },
    /// Shape and strides have different lengths.
    #[error("shape has {shape} axes and strides have {strides}")]
    StridesRank {
        /// Axes of the shape.
        shape: usize,
        /// Axes of the strides.
        strides: usize,
    },
    /// A tensor has the wrong shape.
    #[error("{role} has shape {shape}, expected {expected} ({why})")]
    Shape {
        /// Which tensor.
        role: Role,
        /// Its shape.
        shape: Dims,
        /// The shape it must have.
        expected: Dims,
        /// What the expectation follows from.
        why: &'static str,
    },
    /// A tensor does not broadcast to the logits.
    #[error(
        "{role} of shape {shape} does not broadcast to {target} ({axes}): axis {axis} must be {}, is {size}",
        one_or(*.expected)
    )]
    NotBroadcastable {
        /// Which tensor.
        role: Role,
        /// Its shape.
        shape: Dims,
        /// The shape to broadcast to.
        target: Dims,
        /// The names of the target's axes.
        axes: &'static str,
        /// The offending axis, counted in `shape`.
        axis: usize,
        /// Its size.
        size: usize,
        /// The size it must have if not 1.
        expected: usize,
    },
    /// A tensor has a dtype that it cannot have.
    #[error("{role} has dtype {dtype}, expected {expected}")]
    DType {
        /// Which tensor.
        role: Role,
        /// Its dtype.
        dtype: DType,
        /// What is accepted.
        expected: String,
    },
    /// Query heads are no multiple of the key/value heads.
    #[error(
        "{} not a multiple of {}",
        are(*.query_heads, "query head"),
        counted(*.key_heads, "key/value head")
    )]
    HeadsNotDivisible {
        /// `N`.
        query_heads: usize,
        /// `K`.
        key_heads: usize,
    },
    /// A head dimension is zero.
    #[error("{role} has head dimension 0 (shape {shape}), expected at least 1")]
    ZeroHeadDim {
        /// Which tensor.
        role: Role,
        /// Its shape.
        shape: Dims,
    },
    /// A number that must be finite is not, in f64 or in the precision of the logits.
    #[error("{what} is {}, which is not finite in {dtype}", number(.value))]
    NotFinite {
        /// Which option.
        what: &'static str,
        /// The value given.
        value: f64,
        /// The precision it is used in.
        dtype: DType,
    },
    /// A softcap must be above zero.
    #[error("softcap is {}, expected a number above 0 (leave it out for no softcap)", number(.value))]
    SoftcapNotPositive {
        /// The value given.
        value: f64,
    },
    /// A dropout rate outside `[0, 1)`, or one that rounds to dropping everything.
    #[error("dropout rate is {}, expected 0 <= rate < 1 - 2^-17 (it is applied in steps of 1/65536)", number(.rate))]
    DropoutRate {
        /// The rate given.
        rate: f64,
    },
    /// More positions than the dropout stream's 32-bit counters can number.
    #[error("dropout numbers {what} with 32 bits, {value} does not fit")]
    DropoutCounter {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        value: usize,
    },
    /// A scale for which no kernel was planned.
    #[error(
        "scale is {}, and the problem was made for scales from {} to {} (`any_scale` takes others)",
        number(.value),
        number(.least),
        number(.most)
    )]
    NotOrdinaryScale {
        /// The value given.
        value: f64,
        /// The smallest that the problem takes.
        least: f64,
        /// The largest.
        most: f64,
    },
    /// An offset outside of what was planned for.
    #[error("query offset is {offset}, and the problem was made for offsets from -{most} to {most}")]
    OffsetOutOfRange {
        /// The offset given.
        offset: i64,
        /// The largest, either way.
        most: i64,
    },
    /// A number of the call that its problem does not have, or has otherwise.
    #[error("{what} of the call: {given}; of its problem: {planned}")]
    OtherData {
        /// Which number.
        what: &'static str,
        /// What the call gave.
        given: String,
        /// What the problem announces.
        planned: String,
    },
    /// A length exceeds the tensor, or is negative.
    #[error("{which} length {length} of batch row {batch} is not between 0 and the tensor's length {max}")]
    LengthOutOfRange {
        /// `query` or `key/value`.
        which: &'static str,
        /// The batch row.
        batch: usize,
        /// The length given.
        length: i64,
        /// The largest legal length.
        max: usize,
    },
    /// Dense, packed or paged queries and keys in a combination that no call has.
    #[error("{what}")]
    Sequences {
        /// What is wrong.
        what: &'static str,
    },
    /// The start of a packed sequence does not rise, or is not a row of its tensor.
    #[error(
        "{which} start {index} is {start}, expected {least} to {most}: starts rise from 0 to at most the rows of the tensor"
    )]
    StartOutOfRange {
        /// `query` or `key/value`.
        which: &'static str,
        /// Which start, of `B + 1`.
        index: usize,
        /// The row given.
        start: i64,
        /// The start before it, or 0.
        least: i64,
        /// The rows of the tensor; 0 for the first start.
        most: i64,
    },
    /// A sequence is longer than the longest that the problem was made for.
    #[error(
        "sequence {batch} has {length} {which}, and the problem was made for at most {longest} (`longest`)"
    )]
    SequenceTooLong {
        /// `query rows` or `keys`.
        which: &'static str,
        /// The sequence.
        batch: usize,
        /// How many it has.
        length: i64,
        /// The most.
        longest: usize,
    },
    /// A key/value length is more than a packed or paged sequence has keys, or negative.
    #[error("sequence {batch} has room for {room} keys, and its key/value length is {length}")]
    UsedKeysOutOfRange {
        /// The sequence.
        batch: usize,
        /// The length given.
        length: i64,
        /// How many keys it has, or its row of the block table has room for.
        room: usize,
    },
    /// An entry of a block table that a sequence needs is no page.
    #[error("block table entry {index} of sequence {batch} is {page}, which is none of {pages} pages")]
    NoSuchPage {
        /// The sequence.
        batch: usize,
        /// Which of its pages.
        index: usize,
        /// The entry.
        page: i64,
        /// How many pages there are.
        pages: usize,
    },
    /// Gradients of a call with 8-bit keys and values.
    #[error("keys and values of {dtype} have no backward pass")]
    EightBitGradients {
        /// The dtype of keys and values.
        dtype: DType,
    },
    /// Scales of keys or values that are not of 8 bits.
    #[error("{role} are for a {of} of 8 bits, and the {of} has dtype {dtype}")]
    ScalesWithoutEightBit {
        /// Key scales or value scales.
        role: Role,
        /// What they would be the scales of.
        of: Role,
        /// Its dtype.
        dtype: DType,
    },
    /// A scale of 8-bit keys or values that is NaN or infinite.
    #[error("{role} have {} at {index}, expected finite numbers", number(&f64::from(*.value)))]
    ScaleNotFinite {
        /// Key scales or value scales.
        role: Role,
        /// Where.
        index: Dims,
        /// The scale given.
        value: f32,
    },
    /// Element counts or offsets overflow the address space.
    #[error("{what} of shape {shape} overflows the address space")]
    Overflow {
        /// Which tensor, or the logits.
        what: &'static str,
        /// Its shape.
        shape: Dims,
    },
    /// A slice holds too few elements for the view.
    #[error(
        "a view of shape {shape} and strides {strides} from offset {offset} needs elements {first} to {last}, the slice has {available}"
    )]
    BufferTooSmall {
        /// The shape wanted.
        shape: Dims,
        /// The strides wanted.
        strides: Strides,
        /// The offset of the first element.
        offset: usize,
        /// The lowest element touched.
        first: i128,
        /// The highest element touched.
        last: i128,
        /// The slice's length.
        available: usize,
    },
    /// A slice without strides must have exactly the elements of the shape.
    #[error("shape {shape} has {expected} elements, the slice has {available}")]
    BufferLength {
        /// The shape wanted.
        shape: Dims,
        /// Its element count.
        expected: usize,
        /// The slice's length.
        available: usize,
    },
    /// A pointer is null or not aligned to its element.
    #[error("pointer {address:#x} is null or not aligned to the {align} bytes of {dtype}")]
    Pointer {
        /// The address.
        address: usize,
        /// The dtype.
        dtype: DType,
        /// The alignment needed.
        align: usize,
    },
    /// An axis that a view does not have, or a range beyond it.
    #[error("{what} is out of range for a view of shape {shape}")]
    ViewIndex {
        /// What was asked for.
        what: String,
        /// The view's shape.
        shape: Dims,
    },
    /// An output in which two indices reach the same element.
    #[error("output of shape {shape} and strides {strides} overlaps itself")]
    SelfOverlap {
        /// The shape.
        shape: Dims,
        /// The strides.
        strides: Strides,
    },
    /// An output shares memory with another tensor of the call.
    #[error("{first} and {second} overlap in memory")]
    Overlap {
        /// An output.
        first: Role,
        /// The other tensor.
        second: Role,
    },
    /// The tensors of a call are on different devices.
    #[error("{role} is on {device}, the call is on {expected}")]
    Device {
        /// Which tensor.
        role: Role,
        /// Where it is.
        device: Device,
        /// Where the problem is.
        expected: Device,
    },
    /// The problem has a tensor that the call was not given.
    #[error("the problem has {role}, the call was given none")]
    Missing {
        /// Which tensor.
        role: Role,
    },
    /// The call was given a tensor that the problem does not have.
    #[error("the call was given {role}, the problem has none{}", asked_for_with(*.role))]
    Unexpected {
        /// Which tensor.
        role: Role,
    },
    /// A tensor differs from what the problem says of it.
    #[error("{role} is {given}, the problem says {expected}")]
    NotAsInProblem {
        /// Which tensor.
        role: Role,
        /// The tensor of the call.
        given: TensorDesc,
        /// The tensor of the problem.
        expected: TensorDesc,
    },
    /// A forward call was made of a backward problem, or the reverse.
    #[error("the problem is a {problem} problem, this is a {call} call")]
    WrongPass {
        /// The problem's pass.
        problem: Pass,
        /// The call's pass.
        call: Pass,
    },
    /// A plan was given a call of another problem than it was made for.
    #[error("the plan is of `{planned}`, the call is of {}", other_than(planned, call))]
    OtherProblem {
        /// The plan's problem, in words.
        planned: String,
        /// The call's, in words.
        call: String,
    },
    /// A gradient of a tensor that the problem does not have.
    #[error("{gradient} was asked for, the problem has no {role}")]
    GradientWithoutTensor {
        /// Which gradient.
        gradient: Gradients,
        /// The missing tensor.
        role: Role,
    },
    /// A backward problem without any gradient.
    #[error("no gradient was asked for")]
    NoGradient,
    /// The scratch memory is too small.
    #[error("scratch of {given} bytes is too small, {needed} are needed")]
    ScratchTooSmall {
        /// Bytes needed.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
    /// The scratch memory is not aligned.
    #[error("scratch at {address:#x} is not aligned to {align} bytes")]
    ScratchMisaligned {
        /// Its address.
        address: usize,
        /// The alignment needed.
        align: usize,
    },
    /// The scratch memory is on another device than the call.
    #[error("scratch is on {device}, the call is on {expected}")]
    ScratchDevice {
        /// Where the scratch is.
        device: Device,
        /// Where the call is.
        expected: Device,
    },
}

/// A number of things: "1 query head", "2 query heads".
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn are(count: usize, what: &str) -> String {
    format!("{} {}", counted(count, what), if count == 1 { "is" } else { "are" })
}

/// How a problem gets a tensor that a call may have been given in vain.
fn asked_for_with(role: Role) -> &'static str {
    match role {
        Role::Lse => ": build it with `.lse(true)`",
        Role::DLse => ": build it with `.d_lse(true)`",
        Role::DQuery | Role::DKey | Role::DValue | Role::DBias | Role::DSinks => {
            ": build it with that gradient in `.gradients(..)`"
        }
        Role::Mask | Role::Bias | Role::AlibiSlopes | Role::Sinks => {
            ": build it from the inputs that have it (`Inputs::problem`)"
        }
        role if role.is_data() => ": build it from the inputs that have it (`Inputs::problem`)",
        _ => "",
    }
}

fn one_or(size: usize) -> String {
    if size == 1 { "1".to_owned() } else { format!("1 or {size}") }
}

/// The problem of a call that is not its plan's, in words that show a difference.
fn other_than(planned: &str, call: &str) -> String {
    let alike = "one with the same sizes and options on tensors of another layout";
    if planned == call { alike.to_owned() } else { format!("`{call}`") }
}

/// A number for a message: without hundreds of digits.
fn number(value: &f64) -> String {
    let readable = *value == 0.0 || (1e-6..1e16).contains(&value.abs());
    if readable { value.to_string() } else { format!("{value:e}") }
}

/// A library or device that is not there.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{backend} is not available: {what}; looked for {}", .looked_for.join(", "))]
pub struct Unavailable {
    /// The backend.
    pub backend: String,
    /// What is missing, too old or broken.
    pub what: String,
    /// The names and places that were tried.
    pub looked_for: Vec<String>,
}

/// Host memory that the allocator refused.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no memory for {what} of {bytes} bytes")]
pub struct OutOfMemory {
    /// What the memory was for.
    pub what: &'static str,
    /// Bytes asked for; `usize::MAX` where an address space does not hold them.
    pub bytes: usize,
}

/// A failure of the machine or of a library while a backend ran.
#[derive(thiserror::Error)]
#[error("{backend} failed in {operation}: {source}")]
pub struct BackendFailure {
    /// The backend.
    pub backend: String,
    /// What was being done.
    pub operation: String,
    /// What the machine or the library said.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

#[cfg(test)]
mod tests;
