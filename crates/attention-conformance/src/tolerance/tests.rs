use attention_core::{DType, FeatureSet, NumericsClass, Pass};

use super::*;
use crate::cases::{self, BiasContent, Values};
use crate::oracle::{Dense, Oracle};

fn class(dtype: DType) -> NumericsClass {
    NumericsClass::standard(dtype).expect("a dtype of operands")
}

/// The largest bound of a tensor as a fraction of its largest element.
fn relative(bounds: &[f64], values: &[f64]) -> f64 {
    let largest = |values: &[f64]| {
        values.iter().filter(|value| value.is_finite()).fold(0.0f64, |max, value| max.max(value.abs()))
    };
    let bound =
        bounds.iter().fold(0.0f64, |max, &bound| if bound.is_nan() { f64::INFINITY } else { max.max(bound) });
    if bound == 0.0 { 0.0 } else { bound / largest(values).max(0.05) }
}

/// Bounds of ordinary data are small beside the results: a bound as wide as the results would accept
/// anything.
#[test]
fn bounds_are_small_beside_the_results() {
    for (dtype, most) in [(DType::F64, 1e-12), (DType::F32, 1e-3), (DType::F16, 0.1), (DType::Bf16, 0.5)] {
        let precision = Precision::new(dtype, class(dtype));
        let (mut wide, mut all) = (0, 0);
        for case in cases::all() {
            // Large logits carry large errors, whoever computes them; large keys make gradients of large
            // terms.
            let ordinary = matches!(case.content.values, Values::Normal)
                && case.content.bias != BiasContent::LargeNegative
                && !case.name.starts_with("large/");
            if !ordinary {
                continue;
            }
            let mut case = case;
            case.content.garbage = false;
            let data = case.data(dtype);
            let problem = case.problem(&data, Pass::Backward, FeatureSet::all()).unwrap();
            let oracle = Oracle::new(&problem, &data.inputs());
            let d_out = Dense::read(&data.d_out.view());
            let d_lse = data.d_lse.as_ref().map(|d_lse| Dense::read(&d_lse.view()));
            let out = oracle.out();
            let rounded: Vec<f64> = out.iter().map(|x| x * (1.0 + unit_roundoff(dtype))).collect();
            let saved = SavedErrors::between(&rounded, &oracle.lse(), &oracle);
            let forward = precision.forward(&oracle);
            let backward = precision.backward(&oracle, &d_out, d_lse.as_ref(), &saved);
            let want = oracle.gradients(&d_out, d_lse.as_ref());
            for (bounds, values) in [
                (&forward.out, &out),
                (&forward.lse, &oracle.lse()),
                (&backward.dv, &want.dv),
                (&backward.dq, &want.dq),
                (&backward.dk, &want.dk),
            ] {
                all += 1;
                wide += usize::from(relative(bounds, values) > most);
            }
        }
        // Gradients can cancel (one key, a scale of 0), and then any bound is large beside them.
        assert!(wide * 20 <= all, "{dtype}: {wide} of {all} tensors have bounds above {most} of their size");
    }
}

#[test]
fn nothing_to_compute_leaves_no_room() {
    let case = cases::all().into_iter().find(|case| case.name == "mask/all-false").unwrap();
    let data = case.data(DType::F32);
    let problem = case.problem(&data, Pass::Forward, FeatureSet::all()).unwrap();
    let oracle = Oracle::new(&problem, &data.inputs());
    let bounds = Precision::new(DType::F32, NumericsClass::F32).forward(&oracle);
    assert!(bounds.out.iter().chain(&bounds.lse).all(|&bound| bound == 0.0));
}

#[test]
fn errors_of_probabilities_stay_finite() {
    assert_eq!(probability_error(f64::NEG_INFINITY, 0.0, 3.0), 0.0);
    assert_eq!(probability_error(-1e9, 0.0, 1e3), 0.0);
    assert!((probability_error(0.0, 1.0, 1e-9) - 1e-9).abs() < 1e-17);
    assert!(probability_error(-700.0, (-700f64).exp(), 690.0) < 1e-4);
}

#[test]
fn classes_order_by_width() {
    let wide = |class| {
        let case = cases::case_from_seed(3);
        let data = case.data(DType::F16);
        let problem = case.problem(&data, Pass::Forward, FeatureSet::all()).unwrap();
        let oracle = Oracle::new(&problem, &data.inputs());
        Precision::new(DType::F16, class).forward(&oracle).out.iter().sum::<f64>()
    };
    assert!(wide(NumericsClass::F32) < wide(NumericsClass::HalfF32));
    assert!(wide(NumericsClass::HalfF32) < wide(NumericsClass::HalfRounded));
}
