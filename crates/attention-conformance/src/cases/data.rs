//! Makes the tensors of a case.

use attention_core::{DType, FeatureSet, Inputs, Pass, Role};

use super::{AlibiShape, BiasContent, Case, MaskContent, Values};
use crate::oracle::Structure;
use crate::rng::Rng;
use crate::tensor::{HostTensor, unravel};

/// The tensors that a call of a case reads, but for what its forward pass left.
#[derive(Clone, Debug)]
pub struct CaseData {
    /// `[B, T, N, H]`.
    pub query: HostTensor,
    /// `[B, S, K, H]`.
    pub key: HostTensor,
    /// `[B, S, K, Hv]`.
    pub value: HostTensor,
    /// The mask, if there is one.
    pub mask: Option<HostTensor>,
    /// The bias, if there is one.
    pub bias: Option<HostTensor>,
    /// The slopes, if there are any.
    pub alibi_slopes: Option<HostTensor>,
    /// The sinks, if there are any.
    pub sinks: Option<HostTensor>,
    /// The incoming gradient of the output.
    pub d_out: HostTensor,
    /// The incoming gradient of the logsumexp, if there is one.
    pub d_lse: Option<HostTensor>,
    /// Whether garbage lies where it must not matter.
    pub garbage: bool,
}

impl CaseData {
    /// The inputs that forward and backward share.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_ref().map(HostTensor::view),
            bias: self.bias.as_ref().map(HostTensor::view),
            alibi_slopes: self.alibi_slopes.as_ref().map(HostTensor::view),
            sinks: self.sinks.as_ref().map(HostTensor::view),
            ..Inputs::new(self.query.view(), self.key.view(), self.value.view())
        }
    }
}

impl Case {
    /// The tensors of this case for operands of `dtype`.
    ///
    /// # Panics
    /// For a dtype that operands cannot have, and for a case that is no valid call; generated ones are.
    pub fn data(&self, dtype: DType) -> CaseData {
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
        };
        let extra = options.bias_dtype.unwrap_or(dtype);
        let query_shape = [d.batch, d.query_length, d.query_heads, d.head_dim];
        let value_shape = [d.batch, d.key_length, d.key_heads, d.value_head_dim];
        let out_shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        let mut data = CaseData {
            query: normal(Role::Query, dtype, &query_shape, query_factor),
            key: normal(Role::Key, dtype, &[d.batch, d.key_length, d.key_heads, d.head_dim], key_factor),
            value: normal(Role::Value, dtype, &value_shape, value_factor),
            mask: self.mask(),
            bias: self.bias(extra),
            alibi_slopes: options.alibi.map(|shape| match shape {
                AlibiShape::Heads => normal(Role::AlibiSlopes, extra, &[d.query_heads], 0.25),
                AlibiShape::BatchHeads => normal(Role::AlibiSlopes, extra, &[d.batch, d.query_heads], 0.25),
            }),
            sinks: options.sinks.then(|| normal(Role::Sinks, extra, &[d.query_heads], 1.0)),
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
            self.add_garbage(&mut data);
        }
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

    fn bias(&self, dtype: DType) -> Option<HostTensor> {
        let shape = self.options.bias?.shape(&self.dims);
        let mut rng = Rng::named(self.content.seed, Role::Bias.name());
        let content = self.content.bias;
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
                    _ => value,
                }
            },
        ))
    }

    /// Puts NaN, infinities and huge numbers wherever the semantics say that memory does not matter. Tensors whose
    /// indices share elements are left alone: there the same memory matters elsewhere.
    fn add_garbage(&self, data: &mut CaseData) {
        let problem = self.problem(data, Pass::Forward, FeatureSet::EMPTY).expect("cases are valid");
        let structure = Structure::read(&problem, &data.inputs());
        let dead = structure.dead();
        let d = &self.dims;
        let without_weight = self.keys_without_weight(data, &structure);
        let mut rng = Rng::named(self.content.seed, "garbage");
        let mut spoil = |role: Role, tensor: &mut HostTensor, is_dead: &dyn Fn(&[usize]) -> bool| {
            if self.layouts.of(role).is_broadcast() {
                return;
            }
            let shape = tensor.desc().shape();
            for index in 0..tensor.desc().element_count().unwrap_or(0) {
                if is_dead(&unravel(index, &shape)) {
                    tensor.set(index, rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]));
                }
            }
        };
        let dead_query = |at: &[usize]| dead.query(at[0], at[1], at[2]);
        let dead_key = |at: &[usize]| dead.key(at[0], at[1], at[2]);
        spoil(Role::Query, &mut data.query, &dead_query);
        spoil(Role::Key, &mut data.key, &dead_key);
        // A key that every row's bias takes away with -inf is not allowed either; its logit must still be -inf, so
        // only its value can hold anything.
        let dead_value = |at: &[usize]| without_weight[(at[0] * d.key_length + at[1]) * d.key_heads + at[2]];
        spoil(Role::Value, &mut data.value, &dead_value);
        // With a sink, the incoming gradients of an empty row matter: its logsumexp is the sink.
        let dead_result =
            |at: &[usize]| structure.is_padded(at[0], at[1]) || (!self.options.sinks && dead_query(at));
        spoil(Role::DOut, &mut data.d_out, &dead_result);
        if let Some(d_lse) = &mut data.d_lse {
            spoil(Role::DLse, d_lse, &dead_result);
        }
        if let (Some(bias), Some(broadcast)) = (&mut data.bias, self.options.bias) {
            let logits = d.logits();
            // An element is dead where no position that it is broadcast to is allowed.
            let mut alive = vec![false; bias.desc().element_count().unwrap_or(0)];
            let shape = broadcast.shape(d);
            for position in 0..logits.iter().product() {
                let [b, n, t, j] = unravel(position, &logits)[..] else { unreachable!() };
                if structure.allows(b, n, t, j) {
                    alive[broadcast.index(&shape, [b, n, t, j])] = true;
                }
            }
            let flat = |at: &[usize]| at.iter().zip(&shape).fold(0, |flat, (&i, &size)| flat * size + i);
            spoil(Role::Bias, bias, &|at| !alive[flat(at)]);
        }
    }

    /// For `[B, S, K]`: the keys that no row attends to, by structure, mask or a bias of -inf.
    fn keys_without_weight(&self, data: &CaseData, structure: &Structure) -> Vec<bool> {
        let d = &self.dims;
        let logits = d.logits();
        let bias = self
            .options
            .bias
            .zip(data.bias.as_ref())
            .map(|(broadcast, bias)| (broadcast, broadcast.shape(d), bias.values()));
        let mut without = vec![true; d.batch * d.key_length * d.key_heads];
        for position in 0..logits.iter().product() {
            let [b, n, t, j] = unravel(position, &logits)[..] else { unreachable!() };
            let bias_allows = bias.as_ref().is_none_or(|(broadcast, shape, values)| {
                values[broadcast.index(shape, [b, n, t, j])] != f64::NEG_INFINITY
            });
            if bias_allows && structure.allows(b, n, t, j) {
                without[(b * d.key_length + j) * d.key_heads + n / d.group_size()] = false;
            }
        }
        without
    }
}

/// The row of a mask or bias that an element belongs to: keys are the last axis.
fn row(index: usize, shape: &[usize]) -> usize {
    let keys = shape[shape.len() - 1];
    // Where there is one row, single keys stand for rows.
    if shape.iter().product::<usize>() == keys { index } else { index / keys.max(1) }
}
