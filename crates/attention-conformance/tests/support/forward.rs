use std::sync::atomic::Ordering;

use attention_core::{ForwardCall, Role, RowLayout, Scalar};

use super::arithmetic::{Loaded, Real, epsilon, read, write};
use super::sequences::laid_out;
use super::{Flaw, NaivePlan};

impl NaivePlan {
    pub(crate) fn run_forward<T: Scalar, A: Real>(&self, call: ForwardCall<'_>) {
        let (problem, views, mut outputs) = call.into_parts();
        let inputs = Loaded::new(&problem, &views, self.flaw);
        let d = problem.dims();
        let zero = A::from_f64(0.0);
        let mut factor = match self.flaw {
            Flaw::OutputOff(factor) => factor,
            _ => 1.0,
        };
        let earlier = match self.flaw {
            Flaw::ChangesFromCallToCall => self.calls.fetch_add(1, Ordering::Relaxed),
            Flaw::ChangesFromPlanToPlan => self.earlier_plans,
            _ => 0,
        };
        if earlier % 2 == 1 {
            factor = 1.0 + f64::EPSILON;
        }
        if self.flaw == Flaw::DependsOnTheBatch && d.batch == 1 {
            factor = 1.0 - f64::EPSILON;
        }
        let touched = match self.flaw {
            Flaw::DependsOnPadding => d.key_length.is_multiple_of(2),
            Flaw::DependsOnStrides => {
                views.bias.is_some_and(|bias| bias.desc().strides().last().is_some_and(|&stride| stride != 1))
            }
            Flaw::DependsOnTheLayout => problem.key_layout() != RowLayout::Dense,
            Flaw::DependsOnMaskedMemory => inputs.value.data.iter().any(|x| x.is_nan()),
            // As many as the suite puts into one row, rather than into padding.
            Flaw::DependsOnOtherRows => inputs.query.data.iter().filter(|x| x.is_nan()).count() == 1,
            _ => false,
        };
        if touched {
            factor = 1.0 - f64::EPSILON;
        }
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for b in 0..d.batch {
            for t in 0..d.query_length {
                for n in 0..d.query_heads {
                    let row = [b, t, n];
                    let terms: Vec<(usize, A)> = (self.keys(&problem, &inputs, row).into_iter())
                        .map(|j| (j, self.logit::<A>(&problem, &inputs, row, j).value))
                        .filter(|(_, x)| x.to_f64() != f64::NEG_INFINITY)
                        .collect();
                    let sink = self.sink::<A>(&problem, &inputs, b, t, n);
                    let all = || terms.iter().map(|&(_, x)| x).chain(sink);
                    let max =
                        all().fold(A::from_f64(f64::NEG_INFINITY), |max, x| if x > max { x } else { max });
                    let (log2, ln2) =
                        (A::from_f64(std::f64::consts::LOG2_E), A::from_f64(std::f64::consts::LN_2));
                    let weight = |x: A| match self.flaw {
                        Flaw::BaseTwoBeforeTheShift => ((x * log2 - max * log2) * ln2).exp(),
                        _ => (x - max).exp(),
                    };
                    let mut sum = zero;
                    for x in all() {
                        sum += weight(x);
                    }
                    let empty = terms.is_empty();
                    let row_lse = match (empty, sink) {
                        (true, None) => f64::NEG_INFINITY,
                        _ => (max + sum.ln()).to_f64(),
                    };
                    lse.push(if self.flaw == Flaw::LseInBaseTwo { row_lse / 2f64.ln() } else { row_lse });
                    let kv = self.key_head(&problem, n);
                    // Probabilities rounded to the operands' dtype, as the class of halves allows.
                    let round = |p: A| {
                        if T::DTYPE.size() >= 4 { p } else { A::from_f64(T::from_f64(p.to_f64()).to_f64()) }
                    };
                    let weights: Vec<(usize, A)> = (terms.iter())
                        .map(|&(j, x)| (j, round(weight(x) / sum * self.kept::<A>(&problem, row, j))))
                        .filter(|(_, p)| p.to_f64() != 0.0)
                        .collect();
                    for dim in 0..d.value_head_dim {
                        let mut parts = [zero; 2];
                        for &(j, p) in &weights {
                            let part = self.flaw == Flaw::CutsKeysByTheirBound && 2 * j >= d.key_length;
                            parts[usize::from(part)] += p * read::<A>(&inputs.value, &[b, j, kv, dim]);
                        }
                        let mut total = parts[0] + parts[1];
                        if self.flaw == Flaw::MaskedByMultiplication {
                            for j in 0..d.key_length {
                                total += zero * read::<A>(&inputs.value, &[b, j, kv, dim]);
                            }
                        }
                        if self.flaw == Flaw::EmptyRowsAreMeans && empty && d.key_length > 0 {
                            total = read::<A>(&inputs.value, &[b, 0, kv, dim]);
                        }
                        // The flaws that change a single bit do so in the output's own precision.
                        let rounded = T::from_f64(total.to_f64());
                        let value =
                            if factor > 1.0 && factor < 1.0 + 1e-9 || factor < 1.0 && factor > 1.0 - 1e-9 {
                                rounded.to_f64() * (1.0 + (factor - 1.0).signum() * 1.5 * epsilon::<T>())
                            } else {
                                total.to_f64() * factor
                            };
                        out.push(value);
                    }
                }
            }
        }
        if self.flaw == Flaw::WritesOutside && !out.is_empty() {
            let desc = problem.tensor(Role::Out).unwrap();
            let last = desc.span().unwrap().1;
            // SAFETY: the element is outside the view, on purpose. The suite allocates guard elements after
            // the last one, in the same allocation, and reads them only after the call.
            unsafe { outputs.out.as_mut_ptr().cast::<T>().offset(last + 1).write(T::from_f64(0.0)) };
        }
        if self.flaw == Flaw::PoisonLeft {
            // All rows but the last batch row.
            let rows = d.query_length * d.query_heads * d.value_head_dim;
            out.truncate(out.len().saturating_sub(rows));
        }
        let out =
            if self.flaw == Flaw::PoisonLeft { out } else { laid_out(&problem, Role::Out, out, self.flaw) };
        write(outputs.out.reborrow(), &out);
        if let Some(view) = outputs.lse {
            write(view, &laid_out(&problem, Role::Lse, lse, self.flaw));
        }
    }
}
