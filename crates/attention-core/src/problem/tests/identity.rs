//! Problems as keys of caches.

use std::collections::{HashMap, HashSet};

use super::{DIMS, builder, built};
use crate::{
    Alignment, CallData, DType, Device, Dropout, Gradients, OffsetRange, Problem, QueryOffset, Role,
    TensorDesc, View, Window,
};

/// Problems that each differ from the plain one in one thing.
fn variants() -> Vec<Problem> {
    let float = |shape: [usize; 1]| TensorDesc::contiguous(DType::F32, shape);
    let stored_bnth = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [96, 8, 24, 1]).unwrap();
    let one = |dtype| TensorDesc::contiguous(dtype, [1]);
    let spread = TensorDesc::strided(DType::I32, [2], [2]).unwrap();
    [
        builder(),
        DIMS.problem(DType::F64),
        builder().device(Device::Cuda(0)),
        builder().device(Device::Cuda(1)),
        builder().any_scale(true),
        builder().causal(true),
        builder().alignment(Alignment::Offset(OffsetRange::Near)),
        builder().alignment(Alignment::Offset(OffsetRange::Any)),
        builder().alignment(Alignment::BottomRight),
        builder().query_offsets(OffsetRange::Near, DType::I32),
        builder().query_offsets(OffsetRange::Any, DType::I32),
        builder().query_offsets(OffsetRange::Near, DType::I64),
        builder().window(Window { left: Some(1), right: None }),
        builder().window(Window { left: None, right: Some(1) }),
        builder().window(Window::new(1, 1)),
        builder().softcap(true),
        builder().mask(TensorDesc::contiguous(DType::Bool, [5])),
        builder().bias(float([5])),
        builder().alibi_slopes(float([4])),
        builder().sinks(float([4])),
        builder().query_lengths(DType::I32),
        builder().query_lengths(DType::U32),
        builder().query_lengths(DType::I64),
        builder().layout(Role::QueryLengths, spread),
        builder().key_value_lengths(DType::I32),
        builder().query_lengths(DType::I32).key_value_lengths(DType::I32),
        builder().device(Device::Cuda(0)).query_lengths(DType::I32),
        builder().device(Device::Cuda(0)).query_lengths(DType::I32).in_host_memory(Role::QueryLengths, true),
        builder().dropout_rate(0.0),
        builder().dropout_rate(-0.0),
        builder().dropout_rate(0.0).layout(Role::DropoutSeed, one(DType::I64)),
        builder().dropout_rate(0.0).layout(Role::DropoutSeed, one(DType::I32)),
        builder().dropout_rate(0.0).layout(Role::DropoutOffset, one(DType::I64)),
        builder().deterministic(true),
        builder().batch_invariant(true),
        builder().lse(true),
        builder().layout(Role::Query, stored_bnth),
        builder().layout(Role::Out, stored_bnth),
        builder().gradients(Gradients::QUERY),
        builder().gradients(Gradients::KEY),
        builder().gradients(Gradients::KEY).d_lse(true),
    ]
    .map(built)
    .into()
}

#[test]
fn whatever_differs_is_another_key() {
    let problems = variants();
    let keys: HashSet<_> = problems.iter().cloned().collect();
    assert_eq!(keys.len(), problems.len());
    let mut cache: HashMap<Problem, usize> = HashMap::new();
    for (index, problem) in problems.iter().enumerate() {
        assert_eq!(cache.insert(problem.clone(), index), None, "{problem}");
    }
    for (index, problem) in variants().iter().enumerate() {
        assert_eq!(cache.get(problem), Some(&index), "{problem}");
    }
}

#[test]
fn ways_of_saying_the_same_are_one_key() {
    let bias = |shape: &[usize]| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape).unwrap());
    assert_eq!(built(builder().layout(Role::Bias, bias(&[5]))), built(builder().bias(bias(&[5]))));
    let contiguous = TensorDesc::contiguous(DType::F32, [2, 3, 4, 8]);
    assert_eq!(built(builder().layout(Role::Out, contiguous)), built(builder()));
    // A layout for a tensor that the pass does not have is no part of it.
    assert_eq!(built(builder().layout(Role::DQuery, contiguous)), built(builder()));
    assert_eq!(
        built(builder().lse(false).gradients(Gradients::KEY)),
        built(builder().lse(true).gradients(Gradients::KEY))
    );
}

/// Calls that differ in their numbers alone have one problem, and so one plan.
#[test]
fn numbers_of_a_call_are_no_part_of_the_key() {
    let lengths = |lengths: &'static [i32; 2]| Some(View::from_slice(lengths, [2]).unwrap());
    let (near, far) = (OffsetRange::NEAR, OffsetRange::NEAR + 1);
    let with = |data: CallData<'_>| built(builder().data(&data));
    let plain = CallData::default();
    let scale = |scale: f64| with(CallData { scale: Some(scale), ..plain });
    assert_eq!(scale(0.5), scale(1e30));
    assert_eq!(scale(0.5), with(plain));
    assert_eq!(scale(0.0), scale(-0.0));
    assert_eq!(scale(f64::NAN), built(builder().any_scale(true)));
    let softcap = |softcap: f64| with(CallData { softcap: Some(softcap), ..plain });
    assert_eq!(softcap(1.0), softcap(50.0));
    let offset = |offset: i64| with(CallData { query_offset: QueryOffset::Fixed(offset), ..plain });
    assert_eq!(offset(1), offset(-near));
    assert_eq!(offset(far), offset(i64::MIN));
    assert_eq!(offset(0), with(plain));
    assert_ne!(offset(near), offset(far));
    assert_eq!(offset(far), built(builder().alignment(Alignment::Offset(OffsetRange::Any))));
    let keys = |view| with(CallData { key_value_lengths: view, ..plain });
    assert_eq!(keys(lengths(&[1, 2])), keys(lengths(&[3, 0])));
    assert_eq!(keys(lengths(&[1, 2])), built(builder().key_value_lengths(DType::I32)));
    let dropout = |dropout: Dropout| with(CallData { dropout: Some(dropout), ..plain });
    assert_eq!(dropout(Dropout::new(0.5, 1)), dropout(Dropout::new(0.5, 2).with_offset(7)));
    assert_ne!(dropout(Dropout::new(0.5, 1)), dropout(Dropout::new(0.25, 1)));
}

/// Where numbers are is a question of problems on a device alone, and of numbers alone.
#[test]
fn host_memory_is_forgotten_where_it_says_nothing() {
    let lengths = || builder().key_value_lengths(DType::I32);
    let on_host = |builder: crate::ProblemBuilder| builder.in_host_memory(Role::KeyValueLengths, true);
    assert_eq!(built(on_host(lengths())), built(lengths()));
    let device = Device::Cuda(1);
    assert_ne!(built(on_host(lengths()).device(device)), built(lengths().device(device)));
    // Of numbers that there are not, and of tensors that are no numbers.
    assert_eq!(built(on_host(builder()).device(device)), built(builder().device(device)));
    let query = built(builder().device(device).in_host_memory(Role::Query, true));
    assert_eq!(query, built(builder().device(device)));
    assert_eq!(query.device_of(Role::Query), device);
    // A problem on the host that is moved to a device has its numbers there.
    let moved = built(built(on_host(lengths())).to_builder().device(device));
    assert_eq!(moved.device_of(Role::KeyValueLengths), device);
}
