//! Products and sums for few query rows: each key and value is read once, as it lies, for all rows. Decoding
//! lives here, where memory is the limit and packing would triple its traffic.

use std::ops::Range;

use crate::elementary::Compute;
use crate::operand::{Head, InOrder, Read, Reader, borrow_row};
use crate::simd::{Kernel, dispatch};

/// Keys that are worked on side by side: enough to hide the latency of sums, few enough for registers.
pub(crate) const KEYS: usize = 4;

/// Accumulators of a dot product.
const LANES: usize = 16;

/// `products[row * stride + i] = scale * <queries[row], key i of the range>`; `room` holds [`KEYS`] rows.
pub(crate) fn products<E: Read>(
    keys: &Head<'_, E>,
    range: Range<usize>,
    queries: &[E::Compute],
    scale: E::Compute,
    room: &mut [E::Compute],
    products: &mut [E::Compute],
    stride: usize,
) {
    dispatch(Products { keys, range, queries, scale, room, products, stride });
}

struct Products<'b, 'a, E: Read> {
    keys: &'b Head<'a, E>,
    range: Range<usize>,
    queries: &'b [E::Compute],
    scale: E::Compute,
    room: &'b mut [E::Compute],
    products: &'b mut [E::Compute],
    stride: usize,
}

impl<E: Read> Kernel for Products<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.keys.read(self.range.start, ProductsOf::<_, FMA>(self));
    }
}

struct ProductsOf<K, const FMA: bool>(K);

impl<'a, E: Read, const FMA: bool> Reader<'a, E::Element> for ProductsOf<Products<'_, 'a, E>, FMA> {
    #[inline(always)]
    fn read(self, mut keys: impl InOrder<'a, E::Element>) {
        let Products { keys: head, range, queries, scale, room, products, stride } = self.0;
        let width = head.width();
        let blocks = range.len() / KEYS;
        for block in 0..blocks {
            let keys = borrow_block::<E>(&mut keys, width, room);
            for (row, query) in queries.chunks_exact(width).enumerate() {
                let products = &mut products[row * stride + block * KEYS..][..KEYS];
                for (product, dot) in products.iter_mut().zip(dots::<_, FMA>(query, &keys)) {
                    *product = scale * dot;
                }
            }
        }
        for column in blocks * KEYS..range.len() {
            let key = borrow_row::<E>(keys.next(), &mut room[..width]);
            for (row, query) in queries.chunks_exact(width).enumerate() {
                products[row * stride + column] = scale * dot::<_, FMA>(query, key);
            }
        }
    }
}

/// `sums[row] = sum over the range of weights[row * stride + i] * value i`, leaving out values whose weight
/// is [`Compute::DISALLOWED`]; `room` holds [`KEYS`] rows.
pub(crate) fn weighted_sums<E: Read>(
    values: &Head<'_, E>,
    range: Range<usize>,
    weights: &[E::Compute],
    stride: usize,
    room: &mut [E::Compute],
    sums: &mut [E::Compute],
) {
    sums.fill(E::Compute::ZERO);
    dispatch(WeightedSums { values, range, weights, stride, room, sums });
}

struct WeightedSums<'b, 'a, E: Read> {
    values: &'b Head<'a, E>,
    range: Range<usize>,
    weights: &'b [E::Compute],
    stride: usize,
    room: &'b mut [E::Compute],
    sums: &'b mut [E::Compute],
}

impl<E: Read> Kernel for WeightedSums<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.values.read(self.range.start, SumsOf::<_, FMA>(self));
    }
}

struct SumsOf<K, const FMA: bool>(K);

impl<'a, E: Read, const FMA: bool> Reader<'a, E::Element> for SumsOf<WeightedSums<'_, 'a, E>, FMA> {
    #[inline(always)]
    fn read(self, mut values: impl InOrder<'a, E::Element>) {
        let WeightedSums { values: head, range, weights, stride, room, sums } = self.0;
        let width = head.width();
        let blocks = range.len() / KEYS;
        for block in 0..blocks {
            let values = borrow_block::<E>(&mut values, width, room);
            for (row, sums) in sums.chunks_exact_mut(width).enumerate() {
                add_block::<_, FMA>(sums, &weights[row * stride + block * KEYS..], &values);
            }
        }
        for column in blocks * KEYS..range.len() {
            let value = borrow_row::<E>(values.next(), &mut room[..width]);
            for (row, sums) in sums.chunks_exact_mut(width).enumerate() {
                add_allowed::<_, FMA>(sums, weights[row * stride + column], value);
            }
        }
    }
}

/// The next [`KEYS`] rows, of `width` elements each.
#[inline(always)]
fn borrow_block<'s, 'a: 's, E: Read>(
    rows: &mut impl InOrder<'a, E::Element>,
    width: usize,
    room: &'s mut [E::Compute],
) -> [&'s [E::Compute]; KEYS] {
    let (a, room) = room.split_at_mut(width);
    let (b, room) = room.split_at_mut(width);
    let (c, d) = room.split_at_mut(width);
    [
        borrow_row::<E>(rows.next(), a),
        borrow_row::<E>(rows.next(), b),
        borrow_row::<E>(rows.next(), c),
        borrow_row::<E>(rows.next(), &mut d[..width]),
    ]
}

/// Adds weighted values to the sums of a row, in the order in which they would be added one by one.
#[inline(always)]
fn add_block<C: Compute, const FMA: bool>(sums: &mut [C], weights: &[C], values: &[&[C]; KEYS]) {
    let [wa, wb, wc, wd] = [weights[0], weights[1], weights[2], weights[3]];
    if wa.is_disallowed() | wb.is_disallowed() | wc.is_disallowed() | wd.is_disallowed() {
        for (&weight, value) in [wa, wb, wc, wd].iter().zip(values) {
            add_allowed::<_, FMA>(sums, weight, value);
        }
        return;
    }
    let count = sums.len();
    let [a, b, c, d] = [&values[0][..count], &values[1][..count], &values[2][..count], &values[3][..count]];
    for index in 0..count {
        let sum = wa.scaled_plus::<FMA>(a[index], sums[index]);
        let sum = wb.scaled_plus::<FMA>(b[index], sum);
        let sum = wc.scaled_plus::<FMA>(c[index], sum);
        sums[index] = wd.scaled_plus::<FMA>(d[index], sum);
    }
}

/// Adds a weighted value, unless it takes no part.
#[inline(always)]
fn add_allowed<C: Compute, const FMA: bool>(sums: &mut [C], weight: C, value: &[C]) {
    if !weight.is_disallowed() {
        add_weighted::<_, FMA>(sums, weight, value);
    }
}

/// Adds a weighted value.
#[inline(always)]
pub(crate) fn add_weighted<C: Compute, const FMA: bool>(sums: &mut [C], weight: C, value: &[C]) {
    for (sum, &value) in sums.iter_mut().zip(value) {
        *sum = weight.scaled_plus::<FMA>(value, *sum);
    }
}

/// Adds `factor` times a weighted value. The value is weighted first, as in the sums that `gemm` makes: of a
/// scale in two factors, the second would leave the range with the first alone.
pub(crate) fn add_scaled<C: Compute>(sums: &mut [C], factor: C, weight: C, value: &[C]) {
    for (sum, &value) in sums.iter_mut().zip(value) {
        *sum += factor * (weight * value);
    }
}

/// The products of a row with [`KEYS`] others, each summed as by [`dot`].
#[inline(always)]
fn dots<C: Compute, const FMA: bool>(row: &[C], others: &[&[C]; KEYS]) -> [C; KEYS] {
    let (chunks, tail) = row.as_chunks::<LANES>();
    let [a, b, c, d] = others;
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let ((c, c_tail), (d, d_tail)) = (c.as_chunks::<LANES>(), d.as_chunks::<LANES>());
    // Four arrays by name: LLVM keeps each in a vector register, which it does not do for an array of arrays.
    let (mut in_a, mut in_b) = ([C::ZERO; LANES], [C::ZERO; LANES]);
    let (mut in_c, mut in_d) = ([C::ZERO; LANES], [C::ZERO; LANES]);
    for ((((row, a), b), c), d) in chunks.iter().zip(a).zip(b).zip(c).zip(d) {
        accumulate::<_, FMA>(&mut in_a, row, a);
        accumulate::<_, FMA>(&mut in_b, row, b);
        accumulate::<_, FMA>(&mut in_c, row, c);
        accumulate::<_, FMA>(&mut in_d, row, d);
    }
    [
        finish::<_, FMA>(in_a, tail, a_tail),
        finish::<_, FMA>(in_b, tail, b_tail),
        finish::<_, FMA>(in_c, tail, c_tail),
        finish::<_, FMA>(in_d, tail, d_tail),
    ]
}

/// The product of two rows.
#[inline(always)]
fn dot<C: Compute, const FMA: bool>(row: &[C], other: &[C]) -> C {
    let ((chunks, tail), (others, other_tail)) = (row.as_chunks::<LANES>(), other.as_chunks::<LANES>());
    let mut sums = [C::ZERO; LANES];
    for (row, other) in chunks.iter().zip(others) {
        accumulate::<_, FMA>(&mut sums, row, other);
    }
    finish::<_, FMA>(sums, tail, other_tail)
}

#[inline(always)]
fn accumulate<C: Compute, const FMA: bool>(sums: &mut [C; LANES], a: &[C; LANES], b: &[C; LANES]) {
    for lane in 0..LANES {
        sums[lane] = a[lane].scaled_plus::<FMA>(b[lane], sums[lane]);
    }
}

/// Adds what is left behind the last whole chunk, and folds the accumulators by halves.
#[inline(always)]
fn finish<C: Compute, const FMA: bool>(mut sums: [C; LANES], a: &[C], b: &[C]) -> C {
    if !a.is_empty() {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = a.scaled_plus::<FMA>(b, *sum);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}
