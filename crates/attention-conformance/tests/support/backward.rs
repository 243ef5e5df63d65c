use attention_core::{BackwardCall, Feature, Role, Scalar, ViewMut};

use super::arithmetic::{Real, clamp, read, write};
use super::{Flaw, Naive};

impl Naive {
    pub(crate) fn run_backward<T: Scalar, A: Real>(&self, call: BackwardCall<'_>) {
        let (problem, inputs, saved, outputs) = call.into_parts();
        let d = problem.dims();
        let zero = A::from_f64(0.0);
        let scale = A::from_f64(match self.flaw {
            Flaw::ScaleOff(factor) => problem.scale() * factor,
            _ => problem.scale(),
        });
        let empty =
            |role: Role| vec![zero; problem.tensor(role).map_or(0, |desc| desc.element_count().unwrap())];
        let like = |role: Role, gradient: Role| if problem.has(gradient) { empty(role) } else { Vec::new() };
        let (mut dq, mut dk, mut dv) = (empty(Role::Query), empty(Role::Key), empty(Role::Value));
        let (mut dbias, mut dsinks) = (like(Role::Bias, Role::DBias), like(Role::Sinks, Role::DSinks));
        let round =
            |x: A| if A::DTYPE == T::DTYPE { x } else { A::from_f64(T::from_f64(x.to_f64()).to_f64()) };

        for b in 0..d.batch {
            for t in 0..d.query_length {
                for n in 0..d.query_heads {
                    let row = [b, t, n];
                    let kv = self.key_head(problem, n);
                    let keys = self.keys(problem, &inputs, row);
                    let sink = self.sink::<A>(problem, &inputs, b, t, n);
                    if keys.is_empty() && sink.is_none() {
                        continue;
                    }
                    let lse = read::<A>(&saved.lse, &[b, t, n]);
                    let d_lse = saved.d_lse.filter(|_| !self.flaw.ignores(Feature::DLse));
                    let mut delta = d_lse.map_or(zero, |d_lse| -read::<A>(&d_lse, &[b, t, n]));
                    for dim in 0..d.value_head_dim {
                        delta +=
                            read::<A>(&saved.d_out, &[b, t, n, dim]) * read::<A>(&saved.out, &[b, t, n, dim]);
                    }
                    for j in keys {
                        let logit = self.logit::<A>(problem, &inputs, row, j);
                        if logit.value.to_f64() == f64::NEG_INFINITY {
                            continue;
                        }
                        let p = (logit.value - lse).exp();
                        let kept = self.kept::<A>(problem, row, j);
                        let mut dp = zero;
                        if kept.to_f64() != 0.0 {
                            for dim in 0..d.value_head_dim {
                                let at = ((b * d.key_length + j) * d.key_heads + kv) * d.value_head_dim + dim;
                                let incoming = read::<A>(&saved.d_out, &[b, t, n, dim]);
                                dp += incoming * read::<A>(&inputs.value, &[b, j, kv, dim]);
                                dv[at] += round(p * kept) * incoming;
                            }
                        }
                        let ds = p * (dp * kept - delta);
                        if let (Some(bias), false) = (inputs.bias, dbias.is_empty()) {
                            let shape = bias.shape();
                            let at = clamp(&bias, [b, n, t, j]);
                            let flat =
                                at.iter().zip(shape.iter()).fold(0, |flat, (&i, &size)| flat * size + i);
                            if self.flaw == Flaw::BiasGradientNotSummed {
                                dbias[flat] = ds;
                            } else {
                                dbias[flat] += ds;
                            }
                        }
                        let ds = round(ds * logit.slope);
                        for h in 0..d.head_dim {
                            let at_query = ((b * d.query_length + t) * d.query_heads + n) * d.head_dim + h;
                            let at_key = ((b * d.key_length + j) * d.key_heads + kv) * d.head_dim + h;
                            dq[at_query] += ds * scale * read::<A>(&inputs.key, &[b, j, kv, h]);
                            dk[at_key] += ds * scale * read::<A>(&inputs.query, &[b, t, n, h]);
                        }
                    }
                    if let (Some(sink), false) = (sink, dsinks.is_empty()) {
                        dsinks[n] += -((sink - lse).exp() * delta);
                    }
                }
            }
        }
        let factor = match self.flaw {
            Flaw::GradientOff(factor) => factor,
            _ => 1.0,
        };
        let store = |view: Option<ViewMut<'_>>, values: &[A]| {
            if let Some(view) = view {
                let values: Vec<f64> = values.iter().map(|value| value.to_f64() * factor).collect();
                write(view, &values);
            }
        };
        store(outputs.dq, &dq);
        store(outputs.dk, &dk);
        if self.flaw != Flaw::PoisonLeft {
            store(outputs.dv, &dv);
        }
        store(outputs.dbias, &dbias);
        store(outputs.dsinks, &dsinks);
    }
}
