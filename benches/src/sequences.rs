//! Calls of sequences of different lengths, and the ways in which their rows lie in memory.

use std::fmt;

use attention_core::{DType, Dims, InvalidCall, Problem, ProblemBuilder, Role, TensorDesc, View};

use crate::buffer::{Buffer, random};

/// Sequences of a call: how many query rows and keys each of them has, and the heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// Query rows and keys of each sequence.
    pub lengths: Vec<[usize; 2]>,
    /// How many heads the query has.
    pub query_heads: usize,
    /// How many heads keys and values have.
    pub key_heads: usize,
    /// The width of a head of query, key and value.
    pub head_dim: usize,
}

/// How the rows of sequences lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[B, longest, heads, H]` and no lengths: a call that computes the padding too, as one whose library
    /// has nothing but rectangles. Of sequences that are equally long, the dense call of the same work.
    Rectangle,
    /// The same with lengths, which tell where the padding begins.
    Padded,
    /// One after the other, `[total, heads, H]`, with the starts.
    Packed,
    /// Query rows as in a rectangle; keys and values in pages of this many tokens, which lie in the pool in
    /// an order of their own.
    Paged {
        /// Tokens of a page.
        page_size: usize,
    },
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rectangle => f.pad("rectangle"),
            Self::Padded => f.pad("padded"),
            Self::Packed => f.pad("packed"),
            Self::Paged { page_size } => f.pad(&format!("page {page_size}")),
        }
    }
}

/// Numbers of a call that say where sequences are, by role, in host memory: lengths, starts or a block table.
#[derive(Clone, Debug, Default)]
pub struct Places(Vec<(Role, Buffer)>);

impl Places {
    /// The tensor of a role; `None` where a call has no such numbers.
    pub(crate) fn view(&self, role: Role) -> Result<Option<View<'_>>, InvalidCall> {
        self.0.iter().find(|(of, _)| *of == role).map(|(_, numbers)| numbers.view()).transpose()
    }

    /// Every tensor, with its role.
    ///
    /// # Errors
    /// None: the tensors have the shapes that they were made with.
    pub fn views(&self) -> Result<Vec<(Role, View<'_>)>, InvalidCall> {
        self.0.iter().map(|(role, numbers)| Ok((*role, numbers.view()?))).collect()
    }
}

impl Sequences {
    /// `count` sequences of as many query rows as keys, drawn uniformly from 1 to `longest`, the same ones at
    /// every call.
    pub fn uniform(
        count: usize,
        longest: usize,
        query_heads: usize,
        key_heads: usize,
        head_dim: usize,
    ) -> Self {
        let length = |index| {
            let length = 1 + (random(0x5e9, index) % longest as u64) as usize;
            [length, length]
        };
        Self { lengths: (0..count).map(length).collect(), query_heads, key_heads, head_dim }
    }

    /// `count` sequences of `queries` rows and `keys` keys.
    pub fn equal(
        count: usize,
        [queries, keys]: [usize; 2],
        query_heads: usize,
        key_heads: usize,
        head_dim: usize,
    ) -> Self {
        Self { lengths: vec![[queries, keys]; count], query_heads, key_heads, head_dim }
    }

    /// The most query rows, and the most keys, of a sequence.
    pub fn longest(&self) -> [usize; 2] {
        [0, 1].map(|side| self.lengths.iter().map(|lengths| lengths[side]).max().unwrap_or(0))
    }

    /// Floating-point operations of a forward pass that is not causal, those of padding left out.
    pub fn forward_flops(&self) -> f64 {
        let pairs: f64 = self.lengths.iter().map(|&[queries, keys]| queries as f64 * keys as f64).sum();
        4.0 * pairs * (self.query_heads * self.head_dim) as f64
    }

    /// The problem of a layout, queries of one dtype beside keys and values of another, and the numbers of
    /// its calls, of dtype i32.
    ///
    /// # Errors
    /// [`InvalidCall`] where a length, a start or a page is not an i32.
    pub fn problem(
        &self,
        layout: Layout,
        dtype: DType,
        key_dtype: DType,
    ) -> Result<(ProblemBuilder, Places), InvalidCall> {
        let batch = self.lengths.len();
        let [rows, keys] = self.longest();
        let side = |side: usize| -> Vec<usize> { self.lengths.iter().map(|lengths| lengths[side]).collect() };
        let tensor = |dtype: DType, [outer, inner]: [usize; 2], heads: usize| {
            TensorDesc::contiguous(dtype, [outer, inner, heads, self.head_dim])
        };
        let builder = |query: [usize; 2], key: [usize; 2]| {
            let key = tensor(key_dtype, key, self.key_heads);
            Problem::builder(tensor(dtype, query, self.query_heads), key, key)
        };
        let lengths = |of: Vec<usize>| Buffer::numbers([of.len()], of);
        let starts = |of: Vec<usize>| {
            let starts: Vec<usize> = std::iter::once(0)
                .chain(of.iter().scan(0, |end, length| {
                    *end += length;
                    Some(*end)
                }))
                .collect();
            Buffer::numbers([starts.len()], starts)
        };
        let rectangle = builder([batch, rows], [batch, keys]);
        Ok(match layout {
            Layout::Rectangle => (rectangle, Places::default()),
            Layout::Padded => (
                rectangle.query_lengths(DType::I32).key_value_lengths(DType::I32),
                Places(vec![
                    (Role::QueryLengths, lengths(side(0))?),
                    (Role::KeyValueLengths, lengths(side(1))?),
                ]),
            ),
            Layout::Packed => (
                builder([1, side(0).iter().sum()], [1, side(1).iter().sum()])
                    .packed_queries(batch, DType::I32)
                    .packed_keys(batch, DType::I32)
                    .longest(rows, keys),
                Places(vec![(Role::QueryStarts, starts(side(0))?), (Role::KeyValueStarts, starts(side(1))?)]),
            ),
            Layout::Paged { page_size } => {
                let most = keys.div_ceil(page_size);
                let pages: usize = side(1).iter().map(|keys| keys.div_ceil(page_size)).sum();
                let order = shuffled(pages);
                let mut next = order.iter().copied();
                let table = (side(1).iter())
                    .flat_map(|keys| (0..most).map(move |page| page < keys.div_ceil(page_size)))
                    .map(|taken| if taken { next.next().unwrap_or(0) } else { 0 })
                    .collect();
                let table = Buffer::numbers([batch, most], table)?;
                (
                    builder([batch, rows], [pages, page_size]).paged(batch, most, DType::I32),
                    Places(vec![(Role::BlockTable, table), (Role::KeyValueLengths, lengths(side(1))?)]),
                )
            }
        })
    }
}

/// The numbers below `count`, in an order that has no pattern (Fisher and Yates).
fn shuffled(count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, (random(0x0dd, last) % (last as u64 + 1)) as usize);
    }
    order
}

impl Buffer {
    /// Lengths, starts or pages.
    fn numbers(shape: impl Into<Dims>, numbers: Vec<usize>) -> Result<Self, InvalidCall> {
        let shape = shape.into();
        let numbers: Option<Vec<i32>> = numbers.into_iter().map(|number| number.try_into().ok()).collect();
        let overflow = InvalidCall::Overflow { what: "a length, start or page of an i32", shape };
        Ok(Self::of_numbers(shape, numbers.ok_or(overflow)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_drawn_from_one_to_the_longest() {
        let drawn = Sequences::uniform(1000, 64, 8, 8, 64);
        let lengths = || {
            drawn.lengths.iter().map(|&[queries, keys]| {
                assert_eq!(queries, keys);
                queries
            })
        };
        assert_eq!((lengths().min(), lengths().max()), (Some(1), Some(64)));
        let mean = lengths().sum::<usize>() as f64 / 1e3;
        assert!((30.0..35.0).contains(&mean), "{mean}");
        assert_eq!(drawn, Sequences::uniform(1000, 64, 8, 8, 64));
    }

    #[test]
    fn every_page_is_used_once() {
        let mut pages = shuffled(100);
        assert_ne!(pages, (0..100).collect::<Vec<_>>());
        pages.sort_unstable();
        assert_eq!(pages, (0..100).collect::<Vec<_>>());
    }
}
