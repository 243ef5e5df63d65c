//! What a problem is where nothing was said, and what the builder's methods change.

use super::{DIMS, builder, built, called};
use crate::{
    Alignment, CallData, CallProblem, DType, Device, Dimensions, Dropout, Feature, FeatureSet, Gradients,
    InvalidCall, OffsetRange, Pass, QueryOffset, Role, TensorDesc, View, Window,
};

#[test]
fn a_plain_problem_is_a_forward_pass_on_the_host() {
    let problem = built(builder());
    assert_eq!(problem.pass(), Pass::Forward);
    assert_eq!(problem.device(), Device::Cpu);
    assert_eq!(problem.dims(), DIMS);
    assert_eq!(problem.dtype(), DType::F32);
    assert_eq!(problem.default_scale(), 1.0 / 8f64.sqrt());
    assert!(!problem.any_scale());
    assert!(!problem.causal());
    assert_eq!(problem.alignment(), Alignment::TopLeft);
    assert_eq!(problem.window(), Window::UNBOUNDED);
    assert!(problem.window().is_unbounded());
    assert!(!problem.has_softcap());
    assert!(!problem.rows_vary());
    assert_eq!((problem.dropout_rate(), problem.drop_threshold()), (None, None));
    assert_eq!(problem.dropout_at(1, 2), None);
    assert!(!problem.deterministic() && !problem.batch_invariant());
    assert_eq!(problem.gradients(), Gradients::NONE);
    assert_eq!(problem.features(), FeatureSet::EMPTY);
    let present: Vec<_> = Role::ALL.into_iter().filter(|&role| problem.has(role)).collect();
    assert_eq!(present, [Role::Query, Role::Key, Role::Value, Role::Out]);
    assert_eq!(problem.to_string(), "forward f32 B2 T3 S5 N4 K4 H8 on cpu");

    // And a plain call of it.
    let data = CallData::default();
    let call = called(&problem, &data);
    assert!(std::ptr::eq(call.problem(), &problem));
    assert_eq!(call.scale(), 1.0 / 8f64.sqrt());
    assert_eq!((call.softcap(), call.dropout_stream()), (None, None));
    assert_eq!((call.query_len(1), call.key_value_len(1), call.offset(1)), (3, 5, 0));
}

#[test]
fn every_option_is_reported_as_given() {
    let (queries, keys) = ([1usize, 2], [5i32, 0]);
    let data = CallData {
        scale: Some(-0.5),
        softcap: Some(30.0),
        query_offset: QueryOffset::Fixed(-2),
        query_lengths: Some(View::from_slice(&queries, [2]).unwrap()),
        key_value_lengths: Some(View::from_slice(&keys, [2]).unwrap()),
        dropout: Some(Dropout::new(0.25, 9).with_offset(4)),
        ..CallData::default()
    };
    let problem = built(
        builder()
            .device(Device::Cuda(1))
            .causal(true)
            .window(Window { left: Some(3), right: None })
            .deterministic(true)
            .batch_invariant(true)
            .lse(true)
            .data(&data),
    );
    assert_eq!(problem.device(), Device::Cuda(1));
    assert!(problem.causal());
    assert_eq!(problem.window(), Window { left: Some(3), right: None });
    assert!(problem.deterministic() && problem.batch_invariant());
    // What there is, and of which kind.
    assert!(problem.any_scale() && problem.has_softcap() && problem.rows_vary());
    assert_eq!(problem.alignment(), Alignment::Offset(OffsetRange::Near));
    assert_eq!(problem.dtype_of(Role::QueryLengths), Some(DType::I64));
    assert_eq!(problem.dtype_of(Role::KeyValueLengths), Some(DType::I32));
    assert_eq!(problem.device_of(Role::QueryLengths), Device::Cpu);
    assert_eq!((problem.dropout_rate(), problem.drop_threshold()), (Some(0.25), Some(16384)));
    assert_eq!(problem.dropout_at(9, 4), data.dropout);
    // And the numbers.
    let call = called(&problem, &data);
    assert_eq!((call.scale(), call.softcap(), call.offset(0)), (-0.5, Some(30.0), -2));
    assert_eq!((call.query_len(1), call.key_value_len(1)), (2, 0));
    assert_eq!(call.dropout_stream(), Some(Dropout::new(0.25, 9).with_offset(4).stream().unwrap()));
    assert_eq!(
        problem.to_string(),
        "forward f32 B2 T3 S5 N4 K4 H8 on cuda:1, causal, query offset, window left, query lengths, \
         key/value lengths, softcap, dropout, lse output, deterministic, batch invariant"
    );
}

#[test]
fn scales_of_zero_and_below_are_honoured() {
    for scale in [0.0f64, -0.0, -3.0, 1e30] {
        let data = CallData { scale: Some(scale), ..CallData::default() };
        let problem = built(builder().data(&data));
        assert_eq!(called(&problem, &data).scale().to_bits(), scale.to_bits());
    }
    // What was announced before is forgotten.
    let data = CallData { scale: Some(-2.0), ..CallData::default() };
    assert_eq!(built(builder().data(&data).data(&CallData::default())), built(builder()));
    let plain = built(builder());
    assert_eq!(called(&plain, &CallData::default()).scale(), 1.0 / 8f64.sqrt());
}

#[test]
fn finite_is_judged_in_the_precision_of_the_logits() {
    let scaled = CallData { scale: Some(1e300), ..CallData::default() };
    let capped = CallData { softcap: Some(1e-300), ..CallData::default() };
    let problem = built(DIMS.problem(DType::F64).data(&scaled));
    assert_eq!(called(&problem, &scaled).scale(), 1e300);
    let problem = built(DIMS.problem(DType::F64).data(&capped));
    assert_eq!(called(&problem, &capped).softcap(), Some(1e-300));
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let refused = |data: CallData<'_>| -> InvalidCall {
            CallProblem::new(&built(DIMS.problem(dtype).data(&data)), &data).unwrap_err()
        };
        assert_eq!(refused(scaled).to_string(), "scale is 1e300, which is not finite in f32");
        let error = refused(capped).to_string();
        assert!(error.contains("expected a number above 0"), "{error}");
    }
}

#[test]
fn outputs_are_contiguous_unless_told_otherwise() {
    for (dtype, statistics) in [(DType::F64, DType::F64), (DType::Bf16, DType::F32), (DType::F16, DType::F32)]
    {
        let problem = built(DIMS.problem(dtype).lse(true));
        assert_eq!(problem.tensor(Role::Out), Some(&TensorDesc::contiguous(dtype, [2, 3, 4, 8])));
        assert_eq!(problem.tensor(Role::Lse), Some(&TensorDesc::contiguous(statistics, [2, 3, 4])));
    }
    let stored_bnth = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [96, 8, 24, 1]).unwrap();
    assert_eq!(built(builder().layout(Role::Out, stored_bnth)).tensor(Role::Out), Some(&stored_bnth));
}

#[test]
fn backward_problems_read_the_forward_and_write_what_was_asked_for() {
    let bias = TensorDesc::contiguous(DType::F16, [3, 5]);
    let sinks = TensorDesc::contiguous(DType::F64, [4]);
    let with_all = || builder().bias(bias).sinks(sinks);
    let all = Gradients::QKV | Gradients::BIAS | Gradients::SINKS;
    let problem = built(with_all().gradients(all).d_lse(true));
    assert_eq!((problem.pass(), problem.gradients()), (Pass::Backward, all));
    let shape = |role| problem.tensor(role).map(|desc| (desc.dtype(), desc.shape().to_vec()));
    assert_eq!(shape(Role::Out), Some((DType::F32, vec![2, 3, 4, 8])));
    assert_eq!(shape(Role::Lse), Some((DType::F32, vec![2, 3, 4])));
    assert_eq!(shape(Role::DOut), Some((DType::F32, vec![2, 3, 4, 8])));
    assert_eq!(shape(Role::DLse), Some((DType::F32, vec![2, 3, 4])));
    assert_eq!(shape(Role::DQuery), Some((DType::F32, vec![2, 3, 4, 8])));
    assert_eq!(shape(Role::DKey), Some((DType::F32, vec![2, 5, 4, 8])));
    assert_eq!(shape(Role::DValue), Some((DType::F32, vec![2, 5, 4, 8])));
    assert_eq!(shape(Role::DBias), Some((DType::F16, vec![1, 1, 3, 5])));
    assert_eq!(shape(Role::DSinks), Some((DType::F64, vec![4])));

    for (single, role) in all.iter() {
        let problem = built(with_all().gradients(single));
        let written = [Role::DQuery, Role::DKey, Role::DValue, Role::DBias, Role::DSinks];
        let present: Vec<_> = written.into_iter().filter(|&role| problem.has(role)).collect();
        assert_eq!(present, [role], "{single}");
        assert!(!problem.has(Role::DLse));
    }
}

#[test]
fn a_backward_variant_of_a_forward_problem_keeps_its_options_and_layouts() {
    let stored_bnth = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [96, 8, 24, 1]).unwrap();
    let forward = built(builder().causal(true).softcap(true).lse(true).layout(Role::Out, stored_bnth));
    let backward = built(forward.to_builder().gradients(Gradients::QKV));
    assert_eq!(backward.pass(), Pass::Backward);
    assert_eq!(backward.tensor(Role::Out), Some(&stored_bnth));
    assert!(backward.causal() && backward.has_softcap());
    assert_eq!(backward.default_scale(), forward.default_scale());
    assert_eq!(backward.features(), [Feature::Causal, Feature::Softcap].into_iter().collect());
    assert_eq!(built(forward.to_builder()), forward);
    // Whether the forward's problem had an LSE output makes no difference to the backward's.
    assert_eq!(built(forward.to_builder().lse(false).gradients(Gradients::QKV)), backward);
}

#[test]
fn the_layout_of_a_bias_gradient_may_leave_out_axes_as_the_bias_does() {
    let bias = TensorDesc::contiguous(DType::F32, [3, 5]);
    let transposed = TensorDesc::strided(DType::F32, [3, 5], [1, 3]).unwrap();
    let problem = built(builder().bias(bias).gradients(Gradients::BIAS).layout(Role::DBias, transposed));
    let dbias = problem.tensor(Role::DBias).unwrap();
    assert_eq!((&dbias.shape()[..], &dbias.strides()[2..]), (&[1, 1, 3, 5][..], &[1, 3][..]));
}

#[test]
fn group_sizes_and_flops() {
    let grouped = Dimensions { key_heads: 2, value_head_dim: 4, ..DIMS };
    assert_eq!(grouped.group_size(), 2);
    assert_eq!(grouped.to_string(), "B2 T3 S5 N4 K2 H8 Hv4");
    assert_eq!(Dimensions { query_heads: 0, key_heads: 0, ..DIMS }.group_size(), 1);
    assert_eq!(built(grouped.problem(DType::F32)).flops(), 2.0 * 120.0 * 12.0);
    assert_eq!(
        built(grouped.problem(DType::F32).gradients(Gradients::KEY)).flops(),
        2.5 * 2.0 * 120.0 * 12.0
    );
}
