//! Where a cache keeps its keys and values.

use attention_core::{DType, Device, Dims, Element, F8E4M3, F8E5M2, HostView, InvalidCall, View};
use bytemuck::Pod;
use half::{bf16, f16};

use super::error::CacheError;
use crate::{IntoView, Tensor};

/// Memory that holds the keys and values of a cache, and does what a step changes there: all of it by one
/// [`Update`], which is one pass over host memory and may be one kernel on a device. Tables and lengths are
/// numbers of the host whatever the memory is.
///
/// [`HostMemory`] is this crate's, as is `CudaMemory` with the feature `cuda`; `attention-candle` has memory
/// of candle's tensors. Memory of your own is given to
/// [`PagedKvCache::with_memory`](super::PagedKvCache::with_memory) or
/// [`KvCache::with_memory`](super::KvCache::with_memory).
///
/// # Duties
/// - [`keys`](Self::keys) and [`values`](Self::values) have the shapes that the constructor asked for, on
///   [`device`](Self::device), for as long as the memory lives. The cache checks it once, when it is made.
/// - Only [`update`](Self::update) changes what they hold, at the places that the update names and nowhere
///   else.
/// - An update that fails may have written some of its places: those hold no token of a sequence. It must not
///   have written any other.
/// - A clone, where there is one, is memory of its own.
pub trait CacheMemory {
    /// Keys or values: those that the memory holds, and new ones that it copies from.
    type Tensor<'a>: CacheTensor;

    /// Where the memory is. New tokens come from there.
    fn device(&self) -> Device;

    /// `[pages, page_size, K, H]`, or `[B, capacity, K, H]`.
    fn keys(&self) -> Self::Tensor<'_>;

    /// `[pages, page_size, K, Hv]`, or `[B, capacity, K, Hv]`.
    fn values(&self) -> Self::Tensor<'_>;

    /// Does the copies, then the writes. Places and tokens were checked: all places are inside the memory,
    /// new tokens have its dtype, device, heads and widths, and no place is written twice.
    ///
    /// # Errors
    /// Where the memory fails: [`CacheError::Memory`].
    fn update(&mut self, update: &Update<'_, Self::Tensor<'_>>) -> Result<(), CacheError>;
}

/// A tensor of a cache's memory, as far as a cache looks at it: new tokens are checked by it.
pub trait CacheTensor: Sized {
    /// Where it is.
    fn device(&self) -> Device;

    /// The type of its elements.
    fn dtype(&self) -> DType;

    /// Its axes.
    fn shape(&self) -> Dims;

    /// The same with an axis of size 1 in front.
    ///
    /// # Errors
    /// [`InvalidCall::Rank`] for a tensor of four axes.
    fn unsqueeze(self) -> Result<Self, InvalidCall>;
}

/// What appends to a cache with memory `M` take as keys or values: in host memory, anything that is
/// [`IntoView`].
pub trait IntoCacheTensor<'a, M: CacheMemory> {
    /// The tensor.
    ///
    /// # Errors
    /// Where it is none, as a slice that does not fit its shape.
    fn into_cache_tensor(self) -> Result<M::Tensor<'a>, InvalidCall>;
}

/// What one step changes in the memory of a cache.
#[derive(Clone, Debug)]
pub struct Update<'a, T = View<'a>> {
    pub(super) copies: &'a [PageCopy],
    pub(super) writes: &'a [Write],
    pub(super) keys: T,
    pub(super) values: T,
}

/// Copies the first slots of a page, keys and values, to a page that no sequence has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageCopy {
    /// The page that is copied.
    pub from: usize,
    /// The page that it is copied to, which is another one.
    pub to: usize,
    /// How many slots are copied, from the first.
    pub slots: usize,
}

/// Writes new tokens to neighbouring places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Write {
    /// The first two indices of the first new token.
    pub from: [usize; 2],
    /// The first two indices of its place.
    pub to: [usize; 2],
    /// How many tokens follow each other along the second axis of both; may be 0.
    pub count: usize,
}

impl<T> Update<'_, T> {
    /// The copies, which are done before the writes. None reads what another one writes.
    pub fn copies(&self) -> &[PageCopy] {
        self.copies
    }

    /// The writes, none of which overlap.
    pub fn writes(&self) -> &[Write] {
        self.writes
    }

    /// The new keys, `[outer, n, K, H]` of any strides.
    pub fn keys(&self) -> &T {
        &self.keys
    }

    /// The new values, `[outer, n, K, Hv]` of any strides.
    pub fn values(&self) -> &T {
        &self.values
    }
}

/// Host memory, allocated by the library.
#[derive(Clone, Debug)]
pub struct HostMemory {
    keys: Tensor,
    values: Tensor,
}

impl HostMemory {
    /// Zeroed memory of these shapes, whose sizes were checked. The system maps it when it is first touched.
    pub(super) fn new(dtype: DType, [keys, values]: [Dims; 2]) -> Result<Self, CacheError> {
        let of = |shape: Dims| Tensor::zeroed(dtype, shape, shape.iter().product());
        Ok(Self { keys: of(keys)?, values: of(values)? })
    }
}

impl CacheMemory for HostMemory {
    type Tensor<'a> = View<'a>;

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn keys(&self) -> View<'_> {
        self.keys.view()
    }

    fn values(&self) -> View<'_> {
        self.values.view()
    }

    fn update(&mut self, update: &Update<'_, View<'_>>) -> Result<(), CacheError> {
        for (memory, tokens) in [(&mut self.keys, update.keys), (&mut self.values, update.values)] {
            match memory.dtype() {
                DType::F64 => apply::<f64>(memory, update, &tokens),
                DType::F32 => apply::<f32>(memory, update, &tokens),
                DType::F16 => apply::<f16>(memory, update, &tokens),
                DType::Bf16 => apply::<bf16>(memory, update, &tokens),
                DType::F8E4M3 => apply::<F8E4M3>(memory, update, &tokens),
                DType::F8E5M2 => apply::<F8E5M2>(memory, update, &tokens),
                other => unreachable!("a cache of {other} was refused when it was made"),
            }
        }
        Ok(())
    }
}

impl CacheTensor for View<'_> {
    fn device(&self) -> Device {
        View::device(self)
    }

    fn dtype(&self) -> DType {
        self.desc().dtype()
    }

    fn shape(&self) -> Dims {
        View::shape(self)
    }

    fn unsqueeze(self) -> Result<Self, InvalidCall> {
        View::unsqueeze(&self)
    }
}

impl<'a, T: IntoView<'a>> IntoCacheTensor<'a, HostMemory> for T {
    fn into_cache_tensor(self) -> Result<View<'a>, InvalidCall> {
        self.into_view()
    }
}

/// Changes keys, or values.
fn apply<T: Element + Pod>(memory: &mut Tensor, update: &Update<'_, View<'_>>, tokens: &View<'_>) {
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
fn side_by_side<'a, T: Element + Pod>(
    tokens: &HostView<'a, T>,
    [outer, first]: [usize; 2],
) -> Option<&'a [T]> {
    let (&[_, _, heads, width], &[_, token, head, element]) = (&tokens.shape()[..], &tokens.strides()[..])
    else {
        unreachable!("new tokens have four axes")
    };
    let fits = token == (heads * width) as isize && head == width as isize && element == 1;
    let (from, ..) = tokens.matrix(&[outer, first, 0, 0], 1, 3).filter(|_| fits)?;
    Some(from)
}

/// Copies tokens of any strides.
fn copy_rows<T: Element + Pod>(tokens: &HostView<'_, T>, [outer, first]: [usize; 2], to: &mut [T]) {
    let (heads, width) = (tokens.shape()[2], tokens.shape()[3]);
    for (index, to) in to.chunks_exact_mut(width).enumerate() {
        let from = tokens.row(&[outer, first + index / heads, index % heads]);
        match from.contiguous() {
            Some(from) => to.copy_from_slice(from),
            None => to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to = from),
        }
    }
}
