//! Makes the tensors of a case.

use attention_core::{DType, FeatureSet, Pass, Role};

use super::far::{self, QueryRow};
use super::{AlibiShape, BiasContent, Case, CaseData, Grid, MaskContent, Numbers, Sizes, Values};
use crate::oracle::Structure;
use crate::rng::Rng;
use crate::tensor::{HostTensor, unravel};

impl Case {
    /// The tensors of this case for operands of `dtype`.
    ///
    /// # Panics
    /// For a dtype that operands cannot have, and for a case that is no valid call; generated ones are.
    pub fn data(&self, dtype: DType) -> CaseData {
        self.laid_out(&self.padded_data(dtype)).into_owned()
    }

    /// As [`data`](Self::data), of the padded call where sequences are packed or in pages.
    pub(crate) fn padded_data(&self, dtype: DType) -> CaseData {
        let (d, options, seed) = (&self.dims, &self.options, self.content.seed);
        let normal = |role: Role, dtype: DType, shape: &[usize], factor: f64| {
            let mut rng = Rng::named(seed, role.name());
            let shape = attention_core::Dims::from_slice(shape).expect("at most four axes");
            HostTensor::from_values(dtype, shape, self.layouts.of(role), |_| factor * rng.normal())
        };
        let (query_factor, key_factor, value_factor) = match self.content.values {
            Values::Normal | Values::NanInOneQuery | Values::NanInOneKey | Values::NanInOneValue => {
                (1.0, 1.0, 1.0)
            }
            Values::Amplified(factor) => (factor, 1.0, 1.0),
            Values::Scaled(factor) => (1.0, factor, factor / 16.0),
            Values::Identity => (0.0, 1.0, 1.0),
            // Replaced below. Keys are small beside a large scale, whose product with the gradient of a logit
            // must be finite too.
            Values::Whole(Grid::Powers { key, .. }) if key < 0 => (0.0, 0.0, 1.0 / 256.0),
            Values::Whole(_) => (0.0, 0.0, 1.0),
        };
        // A number above the largest of 8 bits becomes NaN, which those that are drawn here are far from.
        let cached = options.eight_bit.map_or(dtype, |cache| cache.dtype);
        let extra = options.bias_dtype.unwrap_or(dtype);
        // f16 has few magnitudes.
        let wide = options.bias_dtype.unwrap_or(dtype.accumulator());
        let heads = |role: Role, sizes: Sizes, shape: &[usize], factor: f64| match sizes {
            Sizes::Normal => normal(role, extra, shape, factor),
            Sizes::Far { start } => {
                let of_shape = attention_core::Dims::from_slice(shape).expect("at most four axes");
                HostTensor::from_values(wide, of_shape, self.layouts.of(role), |index| {
                    let index = start + index;
                    let magnitude = far::magnitude(dtype.accumulator(), wide, index);
                    match role {
                        Role::Sinks => far::sink(index, magnitude),
                        _ => far::slope(index, magnitude, dtype.accumulator(), wide),
                    }
                })
            }
        };
        let query_shape = [d.batch, d.query_length, d.query_heads, d.head_dim];
        let value_shape = [d.batch, d.key_length, d.key_heads, d.value_head_dim];
        let out_shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        let mut data = CaseData {
            query: normal(Role::Query, dtype, &query_shape, query_factor),
            key: normal(Role::Key, cached, &[d.batch, d.key_length, d.key_heads, d.head_dim], key_factor),
            value: normal(Role::Value, cached, &value_shape, value_factor),
            mask: self.mask(),
            bias: self.bias(dtype),
            alibi_slopes: options.alibi.map(|shape| {
                let shape: &[usize] = match shape {
                    AlibiShape::Heads => &[d.query_heads],
                    AlibiShape::BatchHeads => &[d.batch, d.query_heads],
                };
                heads(Role::AlibiSlopes, self.content.slopes, shape, 0.25)
            }),
            sinks: (options.sinks).then(|| heads(Role::Sinks, self.content.sinks, &[d.query_heads], 1.0)),
            numbers: Numbers::of(self),
            d_out: normal(Role::DOut, dtype, &out_shape, 1.0),
            d_lse: options.d_lse.then(|| normal(Role::DLse, dtype.accumulator(), &query_shape[..3], 1.0)),
            garbage: self.content.garbage,
        };
        match self.content.values {
            Values::Identity => {
                for index in 0..value_shape.iter().product() {
                    let [_, key, _, dim] = unravel(index, &value_shape)[..] else { unreachable!() };
                    data.value.set(index, f64::from(u8::from(key == dim)));
                }
            }
            Values::Whole(grid) => {
                let start = match self.content.bias {
                    BiasContent::Far { start, .. } => start,
                    _ => 0,
                };
                let scale = options.scale.unwrap_or((d.head_dim as f64).sqrt().recip());
                let wide = options.bias_dtype.unwrap_or(dtype.accumulator());
                let mut rng = Rng::named(seed, "whole queries");
                for row in 0..query_shape[..3].iter().product() {
                    let [b, t, n] = unravel(row, &query_shape[..3])[..] else { unreachable!() };
                    let index = start + far::row_index(d, [b, t, n]);
                    let magnitude = far::magnitude(dtype.accumulator(), wide, index);
                    let of_row = QueryRow { index, magnitude, dtype, scale };
                    for dim in 0..d.head_dim {
                        data.query.set(row * d.head_dim + dim, grid.query(&of_row, dim, &mut rng));
                    }
                }
                let mut rng = Rng::named(seed, "whole keys");
                let shape = data.key.desc().shape();
                for index in 0..shape.iter().product() {
                    let [_, j, _, dim] = unravel(index, &shape)[..] else { unreachable!() };
                    data.key.set(index, grid.key(dtype, j, d.key_length, dim, &mut rng));
                }
            }
            Values::NanInOneQuery if !data.query.desc().is_empty() => data.query.set(0, f64::NAN),
            Values::NanInOneKey if !data.key.desc().is_empty() => {
                data.key.set(d.key_length / 2 * d.key_heads * d.head_dim, f64::NAN);
            }
            Values::NanInOneValue if !data.value.desc().is_empty() => {
                data.value.set(d.key_length / 2 * d.key_heads * d.value_head_dim, f64::NAN);
            }
            _ => {}
        }
        if self.content.garbage {
            self.add_garbage(&mut data, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]);
        }
        self.share(&mut data);
        data
    }

    fn mask(&self) -> Option<HostTensor> {
        let shape = self.options.mask?.shape(&self.dims);
        let mut rng = Rng::named(self.content.seed, Role::Mask.name());
        let content = self.content.mask;
        Some(HostTensor::from_bools(
            attention_core::Dims::from_slice(&shape)?,
            self.layouts.of(Role::Mask),
            |index| {
                let draw = rng.unit();
                match content {
                    MaskContent::Random => draw < 0.7,
                    MaskContent::Sparse => draw < 0.15,
                    MaskContent::AllTrue => true,
                    MaskContent::AllFalse => false,
                    MaskContent::EmptyRows => draw < 0.7 && row(index, &shape) % 3 != 1,
                }
            },
        ))
    }

    fn bias(&self, operands: DType) -> Option<HostTensor> {
        let shape = self.options.bias?.shape(&self.dims);
        let is_far = matches!(self.content.bias, BiasContent::Far { .. });
        let own = if is_far { operands.accumulator() } else { operands };
        let dtype = self.options.bias_dtype.unwrap_or(own);
        let mut rng = Rng::named(self.content.seed, Role::Bias.name());
        let content = self.content.bias;
        let keys = shape[shape.len() - 1];
        let rows: usize = shape[..shape.len() - 1].iter().product();
        let magnitudes: Vec<f64> = match content {
            BiasContent::Far { start, .. } => {
                (start..start + rows).map(|row| far::magnitude(operands.accumulator(), dtype, row)).collect()
            }
            _ => Vec::new(),
        };
        Some(HostTensor::from_values(
            dtype,
            attention_core::Dims::from_slice(&shape)?,
            self.layouts.of(Role::Bias),
            |index| {
                let (value, draw) = (rng.normal(), rng.unit());
                match content {
                    BiasContent::NegativeInfinity if draw < 0.3 => f64::NEG_INFINITY,
                    BiasContent::NegativeInfinityRows if row(index, &shape) % 3 == 1 => f64::NEG_INFINITY,
                    BiasContent::LargeNegative if draw < 0.3 => -1e4,
                    BiasContent::Far { far, start } => {
                        let row = index / keys;
                        far.bias(start + row, index % keys, keys, magnitudes[row])
                    }
                    _ => value,
                }
            },
        ))
    }

    /// Puts one of these numbers wherever the semantics say that memory does not matter. Tensors whose
    /// indices share elements are left alone: there the same memory matters elsewhere.
    pub(crate) fn add_garbage(&self, data: &mut CaseData, garbage: &[f64]) {
        let problem = self.problem(data, Pass::Forward, FeatureSet::EMPTY).expect("cases are valid");
        let structure = Structure::read(&problem, &data.inputs());
        let dead = self.dead(&structure, data);
        let d = &self.dims;
        let mut rng = Rng::named(self.content.seed, "garbage");
        let mut spoil = |role: Role, tensor: &mut HostTensor, is_dead: &dyn Fn(&[usize]) -> bool| {
            if self.layouts.of(role).is_broadcast() {
                return;
            }
            let shape = tensor.desc().shape();
            for index in 0..tensor.desc().element_count().unwrap_or(0) {
                if is_dead(&unravel(index, &shape)) {
                    tensor.set(index, rng.pick(garbage));
                }
            }
        };
        let dead_query = |at: &[usize]| dead.query(at[0], at[1], at[2]);
        let dead_key = |at: &[usize]| dead.key(at[0], at[1], at[2]);
        spoil(Role::Query, &mut data.query, &dead_query);
        spoil(Role::Key, &mut data.key, &dead_key);
        spoil(Role::Value, &mut data.value, &dead_key);
        // With a sink, the incoming gradients of an empty row matter: its logsumexp is the sink.
        let dead_result =
            |at: &[usize]| structure.is_padded(at[0], at[1]) || (!self.options.sinks && dead_query(at));
        spoil(Role::DOut, &mut data.d_out, &dead_result);
        if let Some(d_lse) = &mut data.d_lse {
            spoil(Role::DLse, d_lse, &dead_result);
        }
        if let (Some(bias), Some(broadcast)) = (&mut data.bias, self.options.bias) {
            let logits = d.logits();
            // An element is dead where no position that it is broadcast to is allowed by anything else.
            let mut alive = vec![false; bias.desc().element_count().unwrap_or(0)];
            let shape = broadcast.shape(d);
            for position in 0..logits.iter().product() {
                let [b, n, t, j] = unravel(position, &logits)[..] else { unreachable!() };
                if structure.allows_without_bias(b, n, t, j) {
                    alive[broadcast.index(&shape, [b, n, t, j])] = true;
                }
            }
            let flat = |at: &[usize]| at.iter().zip(&shape).fold(0, |flat, (&i, &size)| flat * size + i);
            spoil(Role::Bias, bias, &|at| !alive[flat(at)]);
        }
    }
}

/// The row of a mask or bias that an element belongs to: keys are the last axis.
fn row(index: usize, shape: &[usize]) -> usize {
    let keys = shape[shape.len() - 1];
    // Where there is one row, single keys stand for rows.
    if shape.iter().product::<usize>() == keys { index } else { index / keys.max(1) }
}
