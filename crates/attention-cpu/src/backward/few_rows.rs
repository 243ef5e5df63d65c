//! The gradients of few query rows: keys and values are read once, as they lie, and their gradients written
//! once.

use std::ops::Range;

use attention_core::HostViewMut;

use super::block::GradientOf;
use super::pieces::Scratch;
use super::shared::{Shared, Task};
use crate::elementary::Compute;
use crate::logits::Rows;
use crate::operand::{Head, Operand, write_row};
use crate::packed::Columns;
use crate::simd::{Kernel, dispatch};
use crate::{cut, direct};

impl<E: Operand> Shared<'_, E> {
    /// As [`task`](Self::task), for the `rows` of a whole group against `keys`. Padding is the caller's to
    /// fill.
    pub(super) fn few_rows(
        &self,
        task: &mut Task<'_, E::Element>,
        rows: &Rows,
        keys: Range<usize>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) {
        let dims = self.problem.dims();
        let places = self.problem.key_places(task.batch);
        let key_head = Head::<E>::new(&self.key, places, task.key_head);
        let value_head = Head::<E>::new(&self.value, places, task.key_head);
        [&key_head, &value_head].into_iter().for_each(|rows| rows.count_borrowed(E::runs(self.runs)));
        let columns = Columns { start: keys.start, count: keys.len() };
        let stride = cut::logits_stride(keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        let (one, (before, factor)) = (E::Compute::ONE, self.terms.gradient_scale);
        let (block, room) = (&mut scratch.block, &mut *scratch.row);

        let states = self.read_rows(rows, block);
        let queries = &block.query[..rows.len() * dims.head_dim];
        let d_out = &block.d_out[..rows.len() * dims.value_head_dim];
        direct::products(
            &key_head,
            keys.clone(),
            queries,
            self.terms.scale,
            room,
            block.probabilities,
            stride,
        );
        direct::products(&value_head, keys.clone(), d_out, one, room, block.d_logits, stride);
        self.softmax_gradient(GradientOf::Products, rows, &columns, &states, stride, block);

        if !task.dq.is_empty() {
            let sums = &mut block.dq[..rows.len() * dims.head_dim];
            direct::weighted_sums(&key_head, keys.clone(), block.d_logits, stride, room, sums);
            for ((head, query), row) in rows.iter().zip(sums.chunks_exact_mut(dims.head_dim)) {
                row.iter_mut().for_each(|sum| *sum = *sum * factor + E::Compute::ZERO);
                write_row::<E>(task.dq[head - rows.heads.start].row_mut(&[query]), row);
            }
        }
        let queries = &block.query[..rows.len() * dims.head_dim];
        let d_out = &block.d_out[..rows.len() * dims.value_head_dim];
        // A scale in two factors leaves the range where the second meets the first before the queries do.
        let factors = if before == one { [factor, one] } else { [one, factor] };
        for (gradient, weights, values, factors, width) in [
            (&mut task.dk, &*block.d_logits, queries, factors, dims.head_dim),
            (&mut task.dv, &*block.probabilities, d_out, [one, one], dims.value_head_dim),
        ] {
            let Some(gradient) = gradient else { continue };
            let sums = &mut room[..width];
            let keys = keys.clone();
            dispatch(Columnwise::<E> { gradient, keys, weights, stride, values, factors, sums });
        }
    }
}

/// Writes the sum over rows of `weights[row][key] * values[row]` for each key, weights times the first factor
/// and sums times the second, leaving out rows in which the key takes no part.
struct Columnwise<'b, 'a, E: Operand> {
    gradient: &'b mut HostViewMut<'a, E::Element>,
    keys: Range<usize>,
    weights: &'b [E::Compute],
    stride: usize,
    values: &'b [E::Compute],
    factors: [E::Compute; 2],
    sums: &'b mut [E::Compute],
}

impl<E: Operand> Kernel for Columnwise<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { gradient, keys, weights, stride, values, factors: [of_weights, of_sums], sums } = self;
        for (column, key) in keys.enumerate() {
            sums.fill(E::Compute::ZERO);
            for (row, values) in values.chunks_exact(sums.len()).enumerate() {
                let weight = weights[row * stride + column];
                if !weight.is_disallowed() {
                    direct::add_weighted::<_, FMA>(sums, of_weights * weight, values);
                }
            }
            if of_sums != E::Compute::ONE {
                sums.iter_mut().for_each(|sum| *sum = of_sums * *sum);
            }
            write_row::<E>(gradient.row_mut(&[key]), sums);
        }
    }
}
