//! The operation graphs of attention, forward and backward, in the patterns that cuDNN's fused engines
//! recognise.

use attention_core::{Pass, Role};

use crate::graph::{Finished, Graph, Op, Overrides, Reduction, Shape, Tensor, Type, packed};
use crate::key::{Diagonal, Drops, Key, Stats};
use crate::library::{Cudnn, CudnnError};
use crate::slot::{Side, Slot};

/// The source text of the graph builder. It is a part of the key of plans on disk, so that plans which
/// another version of it made are not loaded.
pub(crate) const SOURCE: &str = concat!(include_str!("pattern.rs"), include_str!("graph.rs"));

/// The graph of a problem.
pub(crate) fn of(cudnn: &Cudnn, key: &Key) -> Result<Finished, CudnnError> {
    let mut builder = Builder::new(cudnn, key)?;
    match key.pass {
        Pass::Forward => builder.forward()?,
        Pass::Backward => builder.backward()?,
    }
    Ok(builder.graph.finish())
}

/// Dropout in a graph.
#[derive(Clone, Copy)]
struct Kept {
    /// The keep mask: 1 for probabilities that are kept, else 0.
    bits: Tensor,
    /// The number that kept probabilities are multiplied by.
    scale: Tensor,
}

/// The tensors of ragged offsets that a graph has so far, each by its side and its row stride.
#[derive(Default)]
struct Ragged(Vec<(Side, i64, Tensor)>);

impl Ragged {
    /// The offsets of a tensor of this side whose rows are this far apart; `None` if it is not packed.
    fn of(
        &mut self,
        graph: &mut Graph,
        key: &Key,
        side: Side,
        row: i64,
    ) -> Result<Option<Tensor>, CudnnError> {
        if !key.places.packs(side) {
            return Ok(None);
        }
        if let Some(&(.., made)) = self.0.iter().find(|&&(of, apart, _)| (of, apart) == (side, row)) {
            return Ok(Some(made));
        }
        let shape = [key.dims.batch as i64 + 1, 1, 1, 1];
        let made = graph.real(Slot::RaggedOffsets { side, row }, Type::Int64, shape, [1; 4])?;
        self.0.push((side, row, made));
        Ok(Some(made))
    }
}

/// The builder of a graph, with the tensors that both passes use.
struct Builder<'k> {
    key: &'k Key,
    graph: Graph,
    ragged: Ragged,
    /// The batch size.
    b: i64,
    /// The number of query heads.
    h: i64,
    /// The query length.
    s: i64,
    /// The key length.
    t: i64,
    /// The shape of a tensor with one number per row.
    rows: Shape,
    query: Tensor,
    /// The keys with the last two axes exchanged.
    key_transposed: Tensor,
    /// The block table, if keys are in pages.
    table: Option<Tensor>,
    /// The query lengths and the key lengths, if the graph takes them.
    lengths: Option<[Tensor; 2]>,
    /// The number -inf, once it is needed.
    minus_infinity: Option<Tensor>,
}

impl<'k> Builder<'k> {
    fn new(cudnn: &Cudnn, key: &'k Key) -> Result<Self, CudnnError> {
        let dims = key.dims;
        let [b, h, hk, s, t, d] =
            [dims.batch, dims.query_heads, dims.key_heads, dims.query_length, dims.key_length, dims.head_dim]
                .map(|size| size as i64);
        let mut graph = Graph::new(cudnn);
        let element = key.element_type();
        let strides =
            |role: Role| key.strides_of(role).unwrap_or_else(|| unreachable!("a call has its {role}"));
        let mut ragged = Ragged::default();
        let of_query = strides(Role::Query);
        let offsets = ragged.of(&mut graph, key, Side::Queries, of_query[2])?;
        let query = graph.real_ragged(Slot::Query, element, [b, h, s, d], of_query, offsets)?;
        let [kb, kh, kt, kd] = strides(Role::Key);
        let held = match key.places.pages {
            Some(pages) => {
                graph.real(Slot::Key, element, [pages.count, hk, pages.size, d], strides(Role::Key))?
            }
            None => {
                let offsets = ragged.of(&mut graph, key, Side::Keys, kt)?;
                graph.real_ragged(Slot::Key, element, [b, hk, d, t], [kb, kh, kd, kt], offsets)?
            }
        };
        let lengths = if key.lengths {
            let shape = [b, 1, 1, 1];
            let query = graph.real(Slot::QueryLengths, Type::Int32, shape, [1; 4])?;
            Some([query, graph.real(Slot::KeyLengths, Type::Int32, shape, [1; 4])?])
        } else {
            None
        };
        let (mut table, mut key_transposed) = (None, held);
        if let (Some(pages), Some([_, lengths])) = (key.places.pages, lengths) {
            let of_table = [pages.most, pages.most, 1, 1];
            let entries = graph.real(Slot::BlockTable, Type::Int32, [b, 1, pages.most, 1], of_table)?;
            let across = [hk * t * d, t * d, 1, d];
            key_transposed = graph.virtual_strided(element, [b, hk, d, t], across)?;
            graph.load_pages(held, entries, lengths, key_transposed)?;
            table = Some(entries);
        }
        Ok(Self {
            key,
            graph,
            ragged,
            b,
            h,
            s,
            t,
            rows: [b, h, s, 1],
            query,
            key_transposed,
            table,
            lengths,
            minus_infinity: None,
        })
    }

    /// The strides of a tensor that every call of the pass has.
    fn strides(&self, role: Role) -> Shape {
        self.key.strides_of(role).unwrap_or_else(|| unreachable!("a call has its {role}"))
    }

    /// Adds a tensor of one side of the call in memory, with offsets if that side is packed.
    fn of_side(
        &mut self,
        side: Side,
        slot: Slot,
        element: Type,
        shape: Shape,
        strides: Shape,
    ) -> Result<Tensor, CudnnError> {
        let offsets = self.ragged.of(&mut self.graph, self.key, side, strides[2])?;
        self.graph.real_ragged(slot, element, shape, strides, offsets)
    }

    /// Adds a tensor in memory that every call of the pass has.
    fn of_role(&mut self, slot: Slot, role: Role, shape: Shape) -> Result<Tensor, CudnnError> {
        let (element, strides) = (self.key.element_type(), self.strides(role));
        self.of_side(Side::of(role), slot, element, shape, strides)
    }

    /// The strides of a tensor in scratch, without gaps: `[B, N, T, width]`, or `[total, N, width]` if its
    /// side is packed.
    fn scratch_strides(&self, side: Side, shape: Shape) -> Shape {
        let [_, heads, longest, width] = shape;
        match self.key.places.packs(side) {
            true => [longest * heads * width, width, heads * width, 1],
            false => packed(shape),
        }
    }

    /// Adds a tensor of query rows in scratch, in f32.
    fn of_rows(&mut self, slot: Slot, shape: Shape) -> Result<Tensor, CudnnError> {
        let strides = self.scratch_strides(Side::Queries, shape);
        self.of_side(Side::Queries, slot, Type::Float, shape, strides)
    }

    /// Adds a gradient. One that the call does not ask for is written to scratch, without gaps.
    fn gradient(&mut self, slot: Slot, role: Role, shape: Shape) -> Result<Tensor, CudnnError> {
        let side = Side::of(role);
        let strides = self.key.strides_of(role).unwrap_or_else(|| self.scratch_strides(side, shape));
        self.of_side(side, slot, self.key.element_type(), shape, strides)
    }

    /// The values, of this width.
    fn values(&mut self, width: i64) -> Result<Tensor, CudnnError> {
        let heads = self.key.dims.key_heads as i64;
        let shape = [self.b, heads, self.t, width];
        let (Some(pages), Some(table), Some([_, lengths])) =
            (self.key.places.pages, self.table, self.lengths)
        else {
            return self.of_role(Slot::Value, Role::Value, shape);
        };
        let held = [pages.count, heads, pages.size, width];
        let element = self.key.element_type();
        let held = self.graph.real(Slot::Value, element, held, self.strides(Role::Value))?;
        let values = self.graph.virtual_(element, shape)?;
        self.graph.load_pages(held, table, lengths, values)?;
        Ok(values)
    }

    /// The lengths of a matrix product's axes: 0 stands for the query lengths, 1 for the key lengths.
    fn overrides(&self, m: Option<usize>, n: Option<usize>, k: Option<usize>) -> Overrides {
        let length =
            |which: Option<usize>| which.and_then(|which| self.lengths.map(|lengths| lengths[which]));
        Overrides { m: length(m), n: length(n), k: length(k) }
    }

    fn minus_infinity(&mut self) -> Result<Tensor, CudnnError> {
        if self.minus_infinity.is_none() {
            self.minus_infinity = Some(self.graph.number(Slot::MinusInfinity, Type::Float)?);
        }
        self.minus_infinity.map_or_else(|| unreachable!("just made"), Ok)
    }

    /// The scaled products of queries and keys, plus bias and ALiBi.
    fn logits(&mut self) -> Result<Tensor, CudnnError> {
        let products = self.graph.virtual_(Type::Float, [self.b, self.h, self.s, self.t])?;
        let overrides = self.overrides(Some(0), Some(1), None);
        self.graph.matmul(self.query, self.key_transposed, products, overrides)?;
        let scale = self.graph.number(Slot::Scale, Type::Float)?;
        let logits = self.graph.binary(Op::Mul, products, scale)?;
        let logits = self.add_bias(logits)?;
        self.add_alibi(logits)
    }

    fn add_bias(&mut self, logits: Tensor) -> Result<Tensor, CudnnError> {
        let Some(bias) = self.key.bias else { return Ok(logits) };
        let added = self.graph.real(Slot::Bias, bias.element, bias.shape, bias.strides)?;
        self.graph.binary(Op::Add, logits, added)
    }

    /// Subtracts the slope of a head times the distance between row and key, for keys at or before the row.
    fn add_alibi(&mut self, logits: Tensor) -> Result<Tensor, CudnnError> {
        if !self.key.slopes {
            return Ok(logits);
        }
        let shape = [1, self.h, 1, 1];
        let row = self.graph.index(logits, 2)?;
        let column = self.graph.index(logits, 3)?;
        let ahead = self.graph.integers(Op::Sub, column, row)?;
        let slopes = self.graph.real(Slot::Slopes, Type::Float, shape, packed(shape))?;
        let added = self.graph.binary(Op::Mul, ahead, slopes)?;
        self.graph.binary(Op::Add, logits, added)
    }

    /// Sets the logits beyond the lengths to negative infinity.
    fn mask_lengths(&mut self, logits: Tensor) -> Result<Tensor, CudnnError> {
        let Some([query, key]) = self.lengths else { return Ok(logits) };
        let (row, column) = (self.graph.index(logits, 2)?, self.graph.index(logits, 3)?);
        let rows = self.graph.truth(Op::Less, row, query)?;
        let columns = self.graph.truth(Op::Less, column, key)?;
        let inside = self.graph.truth(Op::And, rows, columns)?;
        let minus_infinity = self.minus_infinity()?;
        self.graph.select(inside, logits, minus_infinity)
    }

    /// The position of each row among the keys.
    fn position(&mut self, logits: Tensor) -> Result<Tensor, CudnnError> {
        let row = self.graph.index(logits, 2)?;
        match self.key.diagonal {
            Diagonal::TopLeft => Ok(row),
            Diagonal::Fixed => {
                let shift = self.graph.number(Slot::RowShift, Type::Int32)?;
                self.graph.integers(Op::Add, row, shift)
            }
            Diagonal::BottomRight => {
                let [query, key] = match self.lengths {
                    Some(lengths) => lengths,
                    None => [
                        self.graph.number(Slot::QueryLength, Type::Int32)?,
                        self.graph.number(Slot::KeyLength, Type::Int32)?,
                    ],
                };
                let row = self.graph.integers(Op::Add, row, key)?;
                self.graph.integers(Op::Sub, row, query)
            }
        }
    }

    /// Sets the logits outside the window to negative infinity.
    fn mask_window(&mut self, mut logits: Tensor) -> Result<Tensor, CudnnError> {
        if let Some(causal) = self.key.right {
            let mut row = self.position(logits)?;
            let column = self.graph.index(logits, 3)?;
            if !causal {
                let right = self.graph.number(Slot::Right, Type::Int32)?;
                row = self.graph.integers(Op::Add, row, right)?;
            }
            let inside = self.graph.truth(Op::GreaterEqual, row, column)?;
            let minus_infinity = self.minus_infinity()?;
            logits = self.graph.select(inside, logits, minus_infinity)?;
        }
        if self.key.left {
            let (row, column) = (self.graph.index(logits, 2)?, self.graph.index(logits, 3)?);
            let reach = match (self.key.diagonal, self.lengths) {
                (Diagonal::BottomRight, Some([query, key])) => {
                    let left = self.graph.number(Slot::LeftInteger, Type::Int32)?;
                    let reach = self.graph.integers(Op::Add, column, left)?;
                    let reach = self.graph.integers(Op::Sub, reach, key)?;
                    self.graph.integers(Op::Add, reach, query)?
                }
                // The number includes the shift of the diagonal (`Slot::Left`).
                _ => {
                    let left = self.graph.number(Slot::Left, Type::Float)?;
                    self.graph.binary(Op::Add, column, left)?
                }
            };
            let inside = self.graph.truth(Op::Greater, reach, row)?;
            let minus_infinity = self.minus_infinity()?;
            logits = self.graph.select(inside, logits, minus_infinity)?;
        }
        Ok(logits)
    }

    /// The keep mask of dropout and the scale of kept probabilities.
    fn kept(&mut self) -> Result<Option<Kept>, CudnnError> {
        let Some(drops) = self.key.dropout else { return Ok(None) };
        let shape = [self.b, self.h, self.s, self.t];
        let bits = match drops {
            Drops::Published => {
                let element = self.key.element_type();
                self.graph.real(Slot::Kept, element, shape, self.key.kept_strides())?
            }
            Drops::Own { threshold } => {
                let seed = self.graph.number(Slot::Seed, Type::Int64)?;
                let offset = self.graph.number(Slot::Offset, Type::Int64)?;
                let keep = 1.0 - f64::from(threshold) / 65536.0;
                self.graph.bernoulli(keep, seed, offset, shape)?
            }
        };
        Ok(Some(Kept { bits, scale: self.graph.number(Slot::KeepScale, Type::Float)? }))
    }

    fn forward(&mut self) -> Result<(), CudnnError> {
        let element = self.key.element_type();
        let kept = self.kept()?;
        let logits = self.logits()?;
        let logits = self.mask_lengths(logits)?;
        let logits = self.mask_window(logits)?;
        let sinks = [1, self.h, 1, 1];
        let sinks = (self.key.sinks)
            .then(|| self.graph.real(Slot::Sinks, Type::Float, sinks, packed(sinks)))
            .transpose()?;
        // The logsumexp: the engines recognise the graph only with these nodes, also if nothing reads it.
        let stats = match self.key.stats {
            Stats::Unwanted => self.graph.virtual_(Type::Float, self.rows)?,
            Stats::Packed => self.of_rows(Slot::Stats, self.rows)?,
            Stats::Direct(strides) => self.graph.real(Slot::Stats, Type::Float, self.rows, strides)?,
        };
        let graph = &mut self.graph;
        let mut largest = graph.reduce_rows(Reduction::Max, logits)?;
        if let Some(sinks) = sinks {
            largest = graph.binary(Op::Max, largest, sinks)?;
        }
        let shifted = graph.binary(Op::Sub, logits, largest)?;
        let powers = graph.unary(Op::Exp, shifted)?;
        let mut sums = graph.reduce_rows(Reduction::Add, powers)?;
        if let Some(sinks) = sinks {
            let shifted = graph.virtual_(Type::Float, largest.shape)?;
            graph.binary_into(Op::Sub, sinks, largest, shifted)?;
            let power = graph.unary(Op::Exp, shifted)?;
            sums = graph.binary(Op::Add, sums, power)?;
        }
        let logarithm = graph.unary(Op::Log, sums)?;
        graph.binary_into(Op::Add, largest, logarithm, stats)?;
        let probabilities = graph.virtual_(element, logits.shape)?;
        if let Some(Kept { bits, scale }) = kept {
            let all = graph.binary(Op::Div, powers, sums)?;
            // The orders that the engines recognise for a mask in memory and for cuDNN's own generator.
            if self.key.writes_kept() {
                let scaled = graph.binary(Op::Mul, all, scale)?;
                graph.binary_into(Op::Mul, scaled, bits, probabilities)?;
            } else {
                let left = graph.binary(Op::Mul, all, bits)?;
                graph.binary_into(Op::Mul, left, scale, probabilities)?;
            }
        } else {
            graph.binary_into(Op::Div, powers, sums, probabilities)?;
        }
        let e = self.key.dims.value_head_dim as i64;
        let value = self.values(e)?;
        let out = self.of_role(Slot::Out, Role::Out, [self.b, self.h, self.s, e])?;
        let overrides = self.overrides(Some(0), None, Some(1));
        self.graph.matmul(probabilities, value, out, overrides)
    }

    fn backward(&mut self) -> Result<(), CudnnError> {
        let element = self.key.element_type();
        let kept = self.kept()?;
        let dims = self.key.dims;
        let (b, h, s, t) = (self.b, self.h, self.s, self.t);
        let [hk, d, e] = [dims.key_heads, dims.head_dim, dims.value_head_dim].map(|size| size as i64);
        // The row sums `<d_out, out>` (delta).
        let out = self.of_role(Slot::Out, Role::Out, [b, h, s, e])?;
        let d_out = self.of_role(Slot::DOut, Role::DOut, [b, h, s, e])?;
        let both = self.graph.binary(Op::Mul, d_out, out)?;
        let row_sums = self.graph.reduce_rows(Reduction::Add, both)?;
        // With its own generator, cuDNN multiplies by the keep scale after it has subtracted delta. So delta
        // is multiplied with the inverse of the keep scale here.
        let scales_late = kept.is_some() && !self.key.writes_kept();
        let one = self.graph.number(if scales_late { Slot::KeepShare } else { Slot::One }, Type::Float)?;
        let delta = self.of_rows(Slot::Delta, self.rows)?;
        self.graph.binary_into(Op::Mul, row_sums, one, delta)?;
        // Probabilities.
        let logits = self.logits()?;
        let stats = self.of_rows(Slot::Stats, self.rows)?;
        let shifted = self.graph.binary(Op::Sub, logits, stats)?;
        let shifted = self.mask_lengths(shifted)?;
        let shifted = self.mask_window(shifted)?;
        let powers = self.graph.unary(Op::Exp, shifted)?;
        let transposed = [b, h, t, s];
        let across = [h * s * t, s * t, 1, t];
        let weights = match kept {
            Some(Kept { bits, scale }) => {
                let weights = self.graph.binary(Op::Mul, powers, bits)?;
                self.graph.binary(Op::Mul, weights, scale)?
            }
            None => powers,
        };
        let probabilities = self.graph.virtual_strided(element, transposed, across)?;
        self.graph.reshape(weights, probabilities)?;
        // dv.
        let overrides = self.overrides(Some(1), None, Some(0));
        self.key_gradient(Slot::DValue, Role::DValue, probabilities, d_out, [b, hk, t, e], overrides)?;
        // The gradient of the logits.
        let [vb, vh, vt, ve] = self.strides(Role::Value);
        let offsets = self.ragged.of(&mut self.graph, self.key, Side::Keys, vt)?;
        let across_values = [vb, vh, ve, vt];
        let value = self.graph.real_ragged(Slot::Value, element, [b, hk, e, t], across_values, offsets)?;
        let d_probabilities = self.graph.virtual_(Type::Float, [b, h, s, t])?;
        let overrides = self.overrides(Some(0), Some(1), None);
        self.graph.matmul(d_out, value, d_probabilities, overrides)?;
        let d_probabilities = match kept {
            Some(Kept { bits, scale }) => {
                let left = self.graph.binary(Op::Mul, d_probabilities, bits)?;
                if scales_late { left } else { self.graph.binary(Op::Mul, left, scale)? }
            }
            None => d_probabilities,
        };
        let centred = self.graph.binary(Op::Sub, d_probabilities, delta)?;
        let mut gradient = self.graph.binary(Op::Mul, centred, powers)?;
        if let Some(Kept { scale, .. }) = kept.filter(|_| scales_late) {
            gradient = self.graph.binary(Op::Mul, gradient, scale)?;
        }
        let scale = self.graph.number(Slot::Scale, Type::Float)?;
        let gradient = self.graph.binary(Op::Mul, gradient, scale)?;
        // dk.
        let gradient_transposed = self.graph.virtual_strided(element, transposed, across)?;
        self.graph.reshape(gradient, gradient_transposed)?;
        let overrides = self.overrides(Some(1), None, Some(0));
        let query = self.query;
        self.key_gradient(Slot::DKey, Role::DKey, gradient_transposed, query, [b, hk, t, d], overrides)?;
        // dq, summed up in f32.
        let keys = match self.key.places.packed_keys {
            true => {
                let [_, _, row, _] = self.strides(Role::Key);
                let offsets = self.ragged.of(&mut self.graph, self.key, Side::Keys, row)?;
                self.graph.virtual_ragged(element, [b, hk, t, d], self.strides(Role::Key), offsets)?
            }
            false => self.graph.virtual_(element, [b, hk, t, d])?,
        };
        self.graph.reshape(self.key_transposed, keys)?;
        let shape = [b, h, s, d];
        let sum = self.of_rows(Slot::DQuerySum, shape)?;
        let overrides = self.overrides(Some(0), None, Some(1));
        self.graph.matmul(gradient, keys, sum, overrides)?;
        let d_query = self.gradient(Slot::DQuery, Role::DQuery, shape)?;
        self.graph.unary_into(Op::Identity, sum, d_query)
    }

    /// A gradient of keys or values: a product, summed over the query heads of a group.
    fn key_gradient(
        &mut self,
        slot: Slot,
        role: Role,
        left: Tensor,
        right: Tensor,
        shape: Shape,
        overrides: Overrides,
    ) -> Result<(), CudnnError> {
        let element = self.key.element_type();
        let [b, heads, t, width] = shape;
        let to = self.gradient(slot, role, shape)?;
        if heads == self.h {
            return self.graph.matmul(left, right, to, overrides);
        }
        // In the operands' dtype: cuDNN 9.19 stores the gradient of each head in it, whatever type is set
        // here.
        let all = self.graph.virtual_(element, [b, self.h, t, width])?;
        self.graph.matmul(left, right, all, overrides)?;
        self.graph.reduce_into(Reduction::Add, all, to)
    }
}
