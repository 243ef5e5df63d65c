//! How large the numbers of a case are: every order of magnitude that the dtypes hold.

use std::fmt;

use attention_core::DType;

use crate::cases::{AlibiShape, Broadcast, Case, CaseData};
use crate::rng::Rng;
use crate::tensor::{HostTensor, unravel};

/// Nothing that the generator draws is further from 0, in standard deviations.
const WIDEST: f64 = 3.5;

/// What the drawn numbers are multiplied by, and the patterns that additive masks have in practice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Magnitudes {
    query: f64,
    key: f64,
    value: f64,
    d_out: f64,
    /// Every value is 1, so that every output is 1 whatever the probabilities.
    ones: bool,
    bias: BiasPattern,
    slopes: f64,
    sinks: Option<f64>,
}

/// Where a bias holds one large number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum BiasPattern {
    /// As the case draws it.
    Drawn,
    /// As the case draws it, times a factor.
    Times(f64),
    /// Everywhere: a padded query row of an additive mask.
    Every(f64),
    /// On the first keys: left padding.
    First(usize, f64),
    /// On all keys but the last.
    AllButLast(f64),
    /// On one key alone.
    One(f64),
    /// On every third element.
    EveryThird(f64),
}

/// The largest number of a float dtype.
pub(super) fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MAX,
        DType::F32 => f64::from(f32::MAX),
        DType::Bf16 => f64::from(half::bf16::MAX),
        _ => f64::from(half::f16::MAX),
    }
}

/// The smallest normal number of a float dtype.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MIN_POSITIVE,
        DType::F16 => f64::from(half::f16::MIN_POSITIVE),
        _ => f64::from(f32::MIN_POSITIVE),
    }
}

/// One of 1 to 9 times a power of ten from `10^low` to below `10^high`.
fn power(rng: &mut Rng, low: i32, high: i32) -> f64 {
    let exponent = low + rng.below((high - low).max(1) as usize) as i32;
    (1 + rng.below(9)) as f64 * 10f64.powi(exponent)
}

/// The power of ten below the largest number of a dtype.
fn decades(dtype: DType) -> i32 {
    largest(dtype).log10().floor() as i32
}

impl Magnitudes {
    /// Numbers of the order of 1.
    pub(super) fn ordinary() -> Self {
        Self {
            query: 1.0,
            key: 1.0,
            value: 1.0,
            d_out: 1.0,
            ones: false,
            bias: BiasPattern::Drawn,
            slopes: 1.0,
            sinks: None,
        }
    }

    /// Draws sizes, and adds the options to the case that carry them.
    pub(super) fn draw(rng: &mut Rng, case: &mut Case, dtype: DType) -> Self {
        let mut sizes = Self::ordinary();
        sizes.ones = rng.chance(0.1);
        if rng.chance(0.3) {
            sizes.value = power(rng, -3, 3);
            sizes.d_out = power(rng, -3, 2);
        }
        if rng.chance(0.4) {
            return sizes;
        }
        for _ in 0..1 + rng.below(2) {
            match rng.below(7) {
                0 | 1 => sizes.operands(rng, case, dtype),
                2 => sizes.scale(rng, case, dtype),
                3 => {
                    let (low, high) =
                        if rng.chance(0.5) { (-3, 3) } else { (-30, decades(dtype.accumulator())) };
                    case.options.softcap = Some(power(rng, low, high));
                }
                4 => {
                    case.options
                        .alibi
                        .get_or_insert_with(|| rng.pick(&[AlibiShape::Heads, AlibiShape::BatchHeads]));
                    let most = decades(case.options.bias_dtype.unwrap_or(dtype)).min(20);
                    sizes.slopes = power(rng, -2, most);
                }
                5 => {
                    case.options.sinks = true;
                    let value = power(rng, 0, decades(dtype.accumulator()));
                    let value = value.min(largest(case.options.bias_dtype.unwrap_or(dtype)));
                    sizes.sinks = Some(rng.pick(&[value, -value, -value, f64::NEG_INFINITY]));
                }
                _ => sizes.bias(rng, case, dtype),
            }
        }
        sizes
    }

    /// Queries and keys whose products have any size.
    fn operands(&mut self, rng: &mut Rng, case: &Case, dtype: DType) {
        let logit = power(rng, -3, decades(dtype.accumulator()) - 3);
        let share = rng.unit();
        let clip = |size: f64| size.clamp(16.0 * smallest(dtype), largest(dtype) / 8.0);
        self.query = clip(logit.powf(share));
        let terms = case.dims.head_dim as f64;
        let most = largest(dtype.accumulator()) / 64.0 / (WIDEST * WIDEST * terms * self.query);
        self.key = clip((logit / self.query).min(most));
    }

    /// A scale of any size, and queries that bring the logits back where they can.
    fn scale(&mut self, rng: &mut Rng, case: &mut Case, dtype: DType) {
        let scale = match rng.below(4) {
            // From here on a scale times log2(e) is infinite.
            0 => largest(dtype.accumulator()) * (0.6 + 0.4 * rng.unit()),
            1 => power(rng, -decades(dtype.accumulator()), 0),
            _ => power(rng, 0, decades(dtype.accumulator())),
        };
        let logit = power(rng, -2, 4);
        self.query = (logit / scale).clamp(16.0 * smallest(dtype), largest(dtype) / 64.0);
        if scale > 1e6 {
            // So that gradients, which are multiplied by the scale, fit the dtype.
            self.d_out = 1e-3;
            self.value = 1.0;
        }
        case.options.scale = Some(if rng.chance(0.3) { -scale } else { scale });
    }

    fn bias(&mut self, rng: &mut Rng, case: &mut Case, dtype: DType) {
        let d = case.dims;
        case.options.bias.get_or_insert_with(|| rng.pick(&Broadcast::all()));
        let own = case.options.bias_dtype.unwrap_or(dtype);
        let mut value = -power(rng, 0, decades(own) + 1).min(largest(own));
        if rng.chance(0.4) {
            // The constants that additive masks are made of.
            let constants = [f64::MAX, largest(DType::F32), largest(DType::Bf16), 65504.0, 1e9, 1e4];
            value = -rng.pick(&constants).min(largest(own));
        }
        let above = value.abs().min(largest(dtype.accumulator()) / 16.0);
        self.bias = match rng.below(8) {
            0 => BiasPattern::Times(above / WIDEST / 16.0),
            1 | 2 => BiasPattern::Every(rng.pick(&[value, value, above])),
            3 | 4 => {
                let first = rng.pick(&[1, 2, 256, 300, d.key_length / 2]).min(d.key_length);
                BiasPattern::First(first, value)
            }
            5 => BiasPattern::AllButLast(value),
            6 => BiasPattern::One(above),
            _ => BiasPattern::EveryThird(value),
        };
    }

    /// Whether products that are no result may leave the range of the accumulator, whatever the logits: those
    /// of queries and keys before the scale, and of queries and the scale.
    pub(super) fn products_overflow(&self, case: &Case, dtype: DType) -> bool {
        let scale = case.options.scale.unwrap_or(1.0).abs();
        let most = largest(dtype.accumulator()) / 4.0;
        WIDEST * WIDEST * self.query * self.key * case.dims.head_dim as f64 > most
            || WIDEST * self.query.max(self.key) * scale > most
    }

    /// Brings the drawn tensors to these sizes.
    pub(super) fn apply(&self, case: &Case, data: &mut CaseData) {
        times(&mut data.query, self.query);
        times(&mut data.key, self.key);
        times(&mut data.value, self.value);
        times(&mut data.d_out, self.d_out);
        if self.ones {
            set_all(&mut data.value, |_, _| 1.0);
        }
        if let Some(slopes) = &mut data.alibi_slopes {
            // Never negative: logits that grow with the distance have no largest one to count from.
            let slopes_dtype = slopes.desc().dtype();
            set_all(slopes, |_, slope| (slope.abs() * self.slopes).min(largest(slopes_dtype)));
        }
        if let (Some(sinks), Some(value)) = (&mut data.sinks, self.sinks) {
            set_all(sinks, |_, _| value);
        }
        let Some(bias) = &mut data.bias else { return };
        let shape = bias.desc().shape();
        let keys = shape[shape.rank() - 1];
        let pattern = self.bias;
        let chosen = case.content.seed as usize % keys.max(1);
        set_all(bias, |index, drawn| {
            let key = unravel(index, &shape).last().copied().unwrap_or(0);
            let hit = match pattern {
                BiasPattern::Drawn => return drawn,
                BiasPattern::Times(factor) => return drawn * factor,
                BiasPattern::Every(value) => Some(value),
                BiasPattern::First(count, value) => (key < count).then_some(value),
                BiasPattern::AllButLast(value) => (key + 1 < keys).then_some(value),
                BiasPattern::One(value) => (key == chosen).then_some(value),
                BiasPattern::EveryThird(value) => (index % 3 == 0).then_some(value),
            };
            hit.unwrap_or(if drawn.is_finite() && drawn > -100.0 { drawn } else { 0.0 })
        });
    }
}

/// Only what is out of the ordinary.
impl fmt::Display for Magnitudes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, size) in [
            ("query", self.query),
            ("key", self.key),
            ("value", self.value),
            ("d_out", self.d_out),
            ("slopes", self.slopes),
        ] {
            if size != 1.0 {
                write!(f, ", {name} times {size:e}")?;
            }
        }
        if self.ones {
            write!(f, ", values of 1")?;
        }
        if let Some(sinks) = self.sinks {
            write!(f, ", every sink {sinks:e}")?;
        }
        if self.bias != BiasPattern::Drawn {
            write!(f, ", bias {:?}", self.bias)?;
        }
        Ok(())
    }
}

fn times(tensor: &mut HostTensor, factor: f64) {
    if factor != 1.0 {
        set_all(tensor, |_, value| value * factor);
    }
}

/// Replaces every element; `value` is given the row-major index and what was there.
pub(super) fn set_all(tensor: &mut HostTensor, mut value: impl FnMut(usize, f64) -> f64) {
    let before = tensor.values();
    for (index, &before) in before.iter().enumerate() {
        tensor.set(index, value(index, before));
    }
}
