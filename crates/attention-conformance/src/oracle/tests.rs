use attention_core::{DType, FeatureSet, Inputs, Pass, View};

use super::*;
use crate::cases::{self, Case};

/// Query, key and value by hand: one row, two keys, one dimension.
#[test]
fn two_keys_by_hand() {
    let (query, key, value) = ([2.0f64], [0.5f64, -0.5], [10.0f64, 20.0]);
    let inputs = Inputs::new(
        View::from_slice(&query, [1, 1, 1, 1]).unwrap(),
        View::from_slice(&key, [1, 2, 1, 1]).unwrap(),
        View::from_slice(&value, [1, 2, 1, 1]).unwrap(),
    );
    let problem = inputs.problem().lse(true).build().unwrap();
    let oracle = Oracle::new(&problem, &inputs);
    // Logits 1 and -1: the first weighs e^2 / (e^2 + 1).
    let p = 2f64.exp() / (2f64.exp() + 1.0);
    assert!((oracle.out()[0] - (10.0 * p + 20.0 * (1.0 - p))).abs() < 1e-14);
    assert!((oracle.lse()[0] - (1f64.exp() + (-1f64).exp()).ln()).abs() < 1e-15);
    // The derivative of the output for x_0 is p (1 - p) (10 - 20); x_0 = q k_0 and x_1 = q k_1.
    let gradients = oracle.gradients(&Dense::new(&[1, 1, 1, 1], vec![1.0]), None);
    let slope = -10.0 * p * (1.0 - p);
    assert!((gradients.dk[0] - 2.0 * slope).abs() < 1e-13);
    assert!((gradients.dk[1] + 2.0 * slope).abs() < 1e-13);
    assert!((gradients.dq[0] - slope).abs() < 1e-13);
    assert!((gradients.dv[0] - p).abs() < 1e-15 && (gradients.dv[1] - (1.0 - p)).abs() < 1e-15);
}

/// A row without keys, with and without a sink.
#[test]
fn empty_rows_by_hand() {
    let (query, key, value, sinks, lens) = ([1.0f64; 2], [1.0f64; 1], [3.0f64; 1], [0.7f64], [1i32]);
    let mut inputs = Inputs::new(
        View::from_slice(&query, [1, 2, 1, 1]).unwrap(),
        View::from_slice(&key, [1, 1, 1, 1]).unwrap(),
        View::from_slice(&value, [1, 1, 1, 1]).unwrap(),
    );
    let blocked = [false];
    inputs.mask = Some(View::from_slice(&blocked, [1]).unwrap());
    let problem = inputs.problem().build().unwrap();
    let oracle = Oracle::new(&problem, &inputs);
    assert_eq!(oracle.out(), [0.0, 0.0]);
    assert_eq!(oracle.lse(), [f64::NEG_INFINITY; 2]);

    inputs.sinks = Some(View::from_slice(&sinks, [1]).unwrap());
    inputs.data.query_lengths = Some(View::from_slice(&lens, [1]).unwrap());
    let problem = inputs.problem().build().unwrap();
    let oracle = Oracle::new(&problem, &inputs);
    assert_eq!(oracle.out(), [0.0, 0.0]);
    assert_eq!(oracle.lse(), [0.7, f64::NEG_INFINITY], "the padded row stays at -inf");
    let d_lse = Dense::new(&[1, 2, 1], vec![5.0, 7.0]);
    let gradients = oracle.gradients(&Dense::new(&[1, 2, 1, 1], vec![1.0, 1.0]), Some(&d_lse));
    assert_eq!(gradients.dsinks, [5.0]);
    assert_eq!((gradients.dq, gradients.dv), (vec![0.0, 0.0], vec![0.0]));
}

/// The scalar that the gradients are derivatives of: `<d_out, out> + <d_lse, lse>` over rows that have any.
fn loss(case: &Case, data: &cases::CaseData, d_out: &Dense, d_lse: Option<&Dense>) -> f64 {
    let problem = case.problem(data, Pass::Forward, FeatureSet::all()).unwrap();
    let oracle = Oracle::new(&problem, &data.inputs());
    let dot = |gradient: &Dense, values: Vec<f64>| -> f64 {
        let finite = gradient.data.iter().zip(values).filter(|(_, value)| value.is_finite());
        finite.map(|(gradient, value)| gradient * value).sum()
    };
    dot(d_out, oracle.out()) + d_lse.map_or(0.0, |d_lse| dot(d_lse, oracle.lse()))
}

/// Every gradient against central differences, on random cases with every option.
#[test]
fn gradients_are_central_differences() {
    const STEP: f64 = 1e-5;
    let mut checked = 0;
    for seed in 0..60 {
        let mut case = cases::case_from_seed(seed);
        let d = case.dims;
        if d.batch * d.query_length * d.key_length * d.query_heads * d.head_dim > 40_000 {
            continue;
        }
        // Differences need finite numbers everywhere, and dtypes that can hold the step.
        case.content.garbage = false;
        case.content.values = cases::Values::Normal;
        case.options.bias_dtype = Some(DType::F64);
        let data = case.data(DType::F64);
        let problem = case.problem(&data, Pass::Backward, FeatureSet::all()).unwrap();
        let d_out = Dense::read(&data.d_out.view());
        let d_lse = data.d_lse.as_ref().map(|d_lse| Dense::read(&d_lse.view()));
        let gradients = Oracle::new(&problem, &data.inputs()).gradients(&d_out, d_lse.as_ref());

        let mut rng = crate::rng::Rng::new(seed);
        type Tensor = fn(&mut cases::CaseData) -> &mut crate::tensor::HostTensor;
        let tensors: [(&[f64], Tensor); 5] = [
            (&gradients.dq, |data| &mut data.query),
            (&gradients.dk, |data| &mut data.key),
            (&gradients.dv, |data| &mut data.value),
            (&gradients.dbias, |data| data.bias.as_mut().unwrap()),
            (&gradients.dsinks, |data| data.sinks.as_mut().unwrap()),
        ];
        for (which, (gradient, tensor)) in tensors.into_iter().enumerate() {
            for _ in 0..4.min(gradient.len()) {
                let index = rng.below(gradient.len());
                let mut moved = data.clone();
                let value = tensor(&mut moved).values()[index];
                if !value.is_finite() {
                    assert_eq!(gradient[index], 0.0);
                    continue;
                }
                tensor(&mut moved).set(index, value + STEP);
                let above = loss(&case, &moved, &d_out, d_lse.as_ref());
                tensor(&mut moved).set(index, value - STEP);
                let below = loss(&case, &moved, &d_out, d_lse.as_ref());
                let difference = (above - below) / (2.0 * STEP);
                let error = (difference - gradient[index]).abs();
                assert!(
                    error < 1e-7 * (1.0 + difference.abs()),
                    "{} tensor {which} element {index}: {} by formula, {difference} by differences",
                    case.name,
                    gradient[index]
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 400, "{checked}");
}
