//! The results that calls on host memory must have, computed in f64, and their error bounds.

use crate::call::{Call, Results};
use crate::data::{Data, units};

/// The errors in the results of a call whose d_out is 1 everywhere. Rows are compared with a softmax in f64
/// of logits that are rounded as the backend rounds them, with a tolerance for one more rounding of each
/// logit. The sum of dv over the keys must be the number of rows.
pub(crate) fn fault(call: &Call, results: &Results) -> Option<String> {
    let [_, t, s, _, _, width] = call.sizes;
    let (unit, logit_unit) = units(call.dtype);
    for row in [0, t - 1] {
        let (out, lse) = call.row([0, row, 0]);
        let logits = call.logits([0, row, 0]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Logits whose weight is not 0, and the change of the weight by one more rounding.
        let slack = (4.0 * logit_unit * largest.abs()).exp_m1().min(1.0);
        let got = results.out.part(row * width..(row + 1) * width);
        let most = out.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let inside = got.iter().all(|x| x.abs() <= 2.0 * (1.0 + 4.0 * unit));
        if !(most <= 4.0 * slack + 8.0 * unit + 1e-4 * f64::from(u8::from(unit > 1e-12)) && inside) {
            return Some(format!("row {row} is off by {most}"));
        }
        let got = results.lse.part(row..row + 1)[0];
        let close = (got - lse).abs() <= 4.0 * logit_unit * lse.abs() + 1e-5;
        if !close {
            return Some(format!("the logsumexp of row {row} is {got} for {lse}"));
        }
    }
    let [dq, dk, dv] = results.gradients.as_ref()?.each_ref().map(Data::to_f64);
    for column in [0, width - 1] {
        let sum: f64 = (0..s).map(|j| dv[j * width + column]).sum();
        let off = (sum / t as f64 - 1.0).abs();
        let close = off <= 4.0 * unit + 1e-4;
        if !close {
            return Some(format!("dv sums to {sum} for {t}"));
        }
    }
    // At most twice the sum over a value's columns, times a key.
    let most = dq.iter().chain(&dk).map(|x| x.abs()).fold(0.0, f64::max);
    let finite = dq.iter().chain(&dk).chain(&dv).all(|x| x.is_finite());
    (!finite || most > 8.0 * (width * t) as f64).then(|| format!("a gradient of {most}, finite: {finite}"))
}

/// The results in f64 of a batch row and head of a causal call, in one list: the outputs of every query, then
/// the gradients of queries, keys and values. Each comes with its change by an error of one unit in the
/// numbers that it is computed from.
pub(crate) fn results_of(call: &Call, [b, n]: [usize; 2]) -> [Vec<(f64, f64)>; 4] {
    let [_, t, s, heads, key_heads, width] = call.sizes;
    assert!(call.causal && call.bias.is_none() && heads == key_heads, "what is computed here");
    let row = |operand: usize, length: usize, position: usize| {
        let at = ((b * length + position) * heads + n) * width;
        call.operands[operand].part(at..at + width)
    };
    let dot = |x: &[f64], y: &[f64]| -> (f64, f64) {
        x.iter().zip(y).fold((0.0, 0.0), |(sum, size), (x, y)| (sum + x * y, size + (x * y).abs()))
    };
    let add = |to: &mut [(f64, f64)], factor: (f64, f64), row: &[f64]| {
        for (to, x) in to.iter_mut().zip(row) {
            *to = (to.0 + factor.0 * x, to.1 + factor.1 * x.abs());
        }
    };
    let scale = 1.0 / (width as f64).sqrt();
    let [mut out, mut dq] = [(); 2].map(|()| vec![(0.0, 0.0); t * width]);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![(0.0, 0.0); s * width]);
    for i in 0..t {
        let (query, d_out) = (row(0, t, i), row(3, t, i));
        let logits = call.logits([b, i, n]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
        let here = i * width..(i + 1) * width;
        for (j, x) in logits.iter().enumerate() {
            let p = (x - largest).exp() / total;
            add(&mut out[here.clone()], (p, p), &row(2, s, j));
            add(&mut dv[j * width..][..width], (p, p), &d_out);
        }
        let of_row: Vec<f64> = out[here.clone()].iter().map(|&(x, _)| x).collect();
        let delta = dot(&d_out, &of_row);
        for (j, x) in logits.iter().enumerate() {
            let p = scale * (x - largest).exp() / total;
            let incoming = dot(&d_out, &row(2, s, j));
            let change = (p * (incoming.0 - delta.0), p * (incoming.1 + delta.1));
            add(&mut dq[here.clone()], change, &row(1, s, j));
            add(&mut dk[j * width..][..width], change, &query);
        }
    }
    [out, dq, dk, dv]
}
