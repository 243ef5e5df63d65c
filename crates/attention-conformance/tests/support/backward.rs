use attention_conformance::oracle::Dense;
use attention_core::{BackwardCall, Feature, Role, Scalar, View, ViewMut};

use super::arithmetic::{Loaded, Real, clamp, epsilon, read, write};
use super::sequences::{laid_out, padded};
use super::{Flaw, NaivePlan};

impl NaivePlan {
    pub(crate) fn run_backward<T: Scalar, A: Real>(&self, call: BackwardCall<'_>) {
        let (problem, views, saved, outputs) = call.into_parts();
        let inputs = Loaded::new(&problem, &views, self.flaw);
        let load = |role: Role, view: View<'_>| padded(&problem, role, Dense::read(&view), self.flaw);
        let (out, lse) = (load(Role::Out, saved.out), load(Role::Lse, saved.lse));
        let d_out = load(Role::DOut, saved.d_out);
        let d_lse =
            saved.d_lse.filter(|_| !self.flaw.ignores(Feature::DLse)).map(|d_lse| load(Role::DLse, d_lse));
        let d = problem.dims();
        let zero = A::from_f64(0.0);
        let scale = A::from_f64(self.scale(&problem));
        let like = |role: Role, gradient: Role| {
            let count = problem.tensor(role).map_or(0, |desc| desc.element_count().unwrap());
            if problem.has(gradient) { vec![zero; count] } else { Vec::new() }
        };
        let empty = |tensor: &Dense| vec![zero; tensor.data.len()];
        let (mut dq, mut dk, mut dv) = (empty(&inputs.query), empty(&inputs.key), empty(&inputs.value));
        let (mut dbias, mut dsinks) = (like(Role::Bias, Role::DBias), like(Role::Sinks, Role::DSinks));
        let round =
            |x: A| if T::DTYPE.size() >= 4 { x } else { A::from_f64(T::from_f64(x.to_f64()).to_f64()) };

        for b in 0..d.batch {
            let reversed = self.flaw == Flaw::OrdersRowsByTheirBound && d.query_length.is_multiple_of(2);
            for t in 0..d.query_length {
                let t = if reversed { d.query_length - 1 - t } else { t };
                for n in 0..d.query_heads {
                    let row = [b, t, n];
                    let kv = self.key_head(&problem, n);
                    let keys = self.keys(&problem, &inputs, row);
                    let sink = self.sink::<A>(&problem, &inputs, b, t, n);
                    if keys.is_empty() && sink.is_none() {
                        continue;
                    }
                    let row_lse = read::<A>(&lse, &[b, t, n]);
                    let mut delta = d_lse.as_ref().map_or(zero, |d_lse| -read::<A>(d_lse, &[b, t, n]));
                    for dim in 0..d.value_head_dim {
                        delta += read::<A>(&d_out, &[b, t, n, dim]) * read::<A>(&out, &[b, t, n, dim]);
                    }
                    let logits: Vec<_> = (keys.into_iter())
                        .map(|j| (j, self.logit::<A>(&problem, &inputs, row, j)))
                        .filter(|(_, logit)| logit.value.to_f64() != f64::NEG_INFINITY)
                        .collect();
                    let sink = sink.filter(|sink| sink.to_f64() != f64::NEG_INFINITY);
                    // A large logsumexp has lost the digits that tell its keys apart: their own sum has them.
                    let all = || logits.iter().map(|(_, logit)| logit.value).chain(sink);
                    let max =
                        all().fold(A::from_f64(f64::NEG_INFINITY), |max, x| if x > max { x } else { max });
                    let mut sum = zero;
                    for x in all() {
                        sum += (x - max).exp();
                    }
                    let distance = (max + sum.ln() - row_lse).to_f64().abs();
                    let size = row_lse.to_f64().abs();
                    let is_own = size > 128.0 && distance <= 4.0 * epsilon::<A>() * size;
                    let probability = |x: A| {
                        if is_own && self.flaw != Flaw::StoredLseWhateverItsDigits {
                            (x - max).exp() / sum
                        } else {
                            (x - row_lse).exp()
                        }
                    };
                    for (j, logit) in logits {
                        let p = probability(logit.value);
                        let kept = self.kept::<A>(&problem, row, j);
                        let mut dp = zero;
                        if kept.to_f64() != 0.0 {
                            let at = ((b * d.key_length + j) * d.key_heads + kv) * d.value_head_dim;
                            let (incoming, value) = (d_out.row(&[b, t, n]), inputs.value.row(&[b, j, kv]));
                            for dim in 0..d.value_head_dim {
                                let g = A::from_f64(incoming[dim]);
                                dp += g * A::from_f64(value[dim]);
                                dv[at + dim] += round(p * kept) * g;
                            }
                        }
                        let ds = p * (dp * kept - delta);
                        if let (Some(bias), false) = (&inputs.bias, dbias.is_empty()) {
                            let shape = &bias.shape;
                            let at = clamp(bias, [b, n, t, j]);
                            let flat =
                                at.iter().zip(shape.iter()).fold(0, |flat, (&i, &size)| flat * size + i);
                            if self.flaw == Flaw::BiasGradientNotSummed {
                                dbias[flat] = ds;
                            } else {
                                dbias[flat] += ds;
                            }
                        }
                        let ds = round(ds * logit.slope);
                        let at_query = ((b * d.query_length + t) * d.query_heads + n) * d.head_dim;
                        let at_key = ((b * d.key_length + j) * d.key_heads + kv) * d.head_dim;
                        let (query, key) = (inputs.query.row(&[b, t, n]), inputs.key.row(&[b, j, kv]));
                        for h in 0..d.head_dim {
                            dq[at_query + h] += ds * scale * A::from_f64(key[h]);
                            dk[at_key + h] += ds * scale * A::from_f64(query[h]);
                        }
                    }
                    if let (Some(sink), false) = (sink, dsinks.is_empty()) {
                        dsinks[n] += -(probability(sink) * delta);
                    }
                }
            }
        }
        let factor = match self.flaw {
            Flaw::GradientOff(factor) => factor,
            _ => 1.0,
        };
        let store = |role: Role, view: Option<ViewMut<'_>>, values: &[A]| {
            if let Some(view) = view {
                let values: Vec<f64> = values.iter().map(|value| value.to_f64() * factor).collect();
                let is_row = !matches!(role, Role::DBias | Role::DSinks);
                write(view, &if is_row { laid_out(&problem, role, values, self.flaw) } else { values });
            }
        };
        store(Role::DQuery, outputs.dq, &dq);
        store(Role::DKey, outputs.dk, &dk);
        if self.flaw != Flaw::PoisonLeft {
            store(Role::DValue, outputs.dv, &dv);
        }
        store(Role::DBias, outputs.dbias, &dbias);
        store(Role::DSinks, outputs.dsinks, &dsinks);
    }
}
