//! Where a cache keeps its keys and values.

use attention_core::{DType, Device, Dims, HostView, InvalidCall, Scalar, TensorDesc, View};
use half::{bf16, f16};

use super::error::CacheError;
use super::token::{NewTokens, TokenShape};
use crate::Tensor;

mod sealed {
    pub trait Sealed {}
}

/// Memory that holds the keys and values of a cache, and does what a step changes there: all of it by one
/// [`Update`], which is one pass over host memory and may be one kernel on a device. Sealed: which memory
/// there is is for this crate to say. Tables and lengths are numbers of the host whatever the memory is.
pub trait CacheMemory: sealed::Sealed {
    /// Where the memory is. New tokens come from there.
    fn device(&self) -> Device;

    /// `[pages, page_size, K, H]`, or `[B, capacity, K, H]`.
    fn keys(&self) -> View<'_>;

    /// `[pages, page_size, K, Hv]`, or `[B, capacity, K, Hv]`.
    fn values(&self) -> View<'_>;

    /// Does the copies, then the writes. Places and tokens were checked.
    ///
    /// # Errors
    /// Where the memory fails: nothing that a sequence holds was changed then.
    fn update(&mut self, update: &Update<'_>) -> Result<(), CacheError>;
}

/// What one step changes in the memory of a cache.
pub struct Update<'a> {
    pub(super) copies: &'a [PageCopy],
    pub(super) writes: &'a [Write],
    pub(super) tokens: NewTokens<'a>,
}

/// Copies the first slots of a page, keys and values, to a page that no sequence has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct PageCopy {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) slots: usize,
}

/// Writes new tokens to neighbouring places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Write {
    /// The first two indices of the first new token.
    pub(super) from: [usize; 2],
    /// The first two indices of its place.
    pub(super) to: [usize; 2],
    /// How many tokens follow each other along the second axis of both.
    pub(super) count: usize,
}

/// Host memory, allocated by the library.
#[derive(Clone, Debug)]
pub struct HostMemory {
    keys: Tensor,
    values: Tensor,
}

impl HostMemory {
    /// Zeroed memory for `[outer, inner, K, H]` and `[outer, inner, K, Hv]`. The system maps it when it is
    /// first touched.
    pub(super) fn new(token: &TokenShape, [outer, inner]: [usize; 2]) -> Result<Self, CacheError> {
        let of = |what, width| {
            let shape = Dims::from([outer, inner, token.key_heads, width]);
            let desc = TensorDesc::contiguous(token.dtype, shape);
            let overflow = InvalidCall::Overflow { what, shape };
            let count = desc.span().and_then(|_| desc.element_count()).ok_or(overflow)?;
            Ok::<_, CacheError>(Tensor::zeroed(token.dtype, shape, count)?)
        };
        Ok(Self {
            keys: of("the keys of a cache", token.head_dim)?,
            values: of("the values of a cache", token.value_head_dim)?,
        })
    }
}

impl sealed::Sealed for HostMemory {}

impl CacheMemory for HostMemory {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn keys(&self) -> View<'_> {
        self.keys.view()
    }

    fn values(&self) -> View<'_> {
        self.values.view()
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), CacheError> {
        for (memory, tokens) in
            [(&mut self.keys, update.tokens.keys), (&mut self.values, update.tokens.values)]
        {
            match memory.dtype() {
                DType::F64 => apply::<f64>(memory, update, &tokens),
                DType::F32 => apply::<f32>(memory, update, &tokens),
                DType::F16 => apply::<f16>(memory, update, &tokens),
                DType::Bf16 => apply::<bf16>(memory, update, &tokens),
                other => unreachable!("a cache of {other} was refused when it was made"),
            }
        }
        Ok(())
    }
}

/// Changes keys, or values.
fn apply<T: Scalar>(memory: &mut Tensor, update: &Update<'_>, tokens: &View<'_>) {
    let [_, inner, heads, width] = memory.shape()[..] else { unreachable!("four axes") };
    let (Some(memory), Some(tokens)) = (memory.as_mut_slice::<T>(), tokens.host::<T>()) else {
        unreachable!("new tokens have the dtype and the device of the cache")
    };
    let row = heads * width;
    let place = |[outer, slot]: [usize; 2]| (outer * inner + slot) * row;
    for copy in update.copies {
        let from = place([copy.from, 0]);
        memory.copy_within(from..from + copy.slots * row, place([copy.to, 0]));
    }
    for write in update.writes.iter().filter(|write| write.count > 0) {
        let to = &mut memory[place(write.to)..][..write.count * row];
        match side_by_side(&tokens, write.from) {
            Some(from) => to.copy_from_slice(&from[..to.len()]),
            None => copy_rows(&tokens, write.from, to),
        }
    }
}

/// The elements from a token on, where the tokens that follow along the second axis are in one piece with it.
fn side_by_side<'a, T: Scalar>(tokens: &HostView<'a, T>, [outer, first]: [usize; 2]) -> Option<&'a [T]> {
    let (&[_, _, heads, width], &[_, token, head, element]) = (&tokens.shape()[..], &tokens.strides()[..])
    else {
        unreachable!("new tokens have four axes")
    };
    let fits = token == (heads * width) as isize && head == width as isize && element == 1;
    let (from, ..) = tokens.matrix(&[outer, first, 0, 0], 1, 3).filter(|_| fits)?;
    Some(from)
}

/// Copies tokens of any strides.
fn copy_rows<T: Scalar>(tokens: &HostView<'_, T>, [outer, first]: [usize; 2], to: &mut [T]) {
    let (heads, width) = (tokens.shape()[2], tokens.shape()[3]);
    for (index, to) in to.chunks_exact_mut(width).enumerate() {
        let from = tokens.row(&[outer, first + index / heads, index % heads]);
        match from.contiguous() {
            Some(from) => to.copy_from_slice(from),
            None => to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to = from),
        }
    }
}
