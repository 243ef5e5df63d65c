//! Problems as keys of caches.

use std::collections::{HashMap, HashSet};

use super::{DIMS, builder, built};
use crate::{DType, Device, Dropout, Gradients, Problem, QueryOffset, Role, Sequences, TensorDesc, Window};

/// Problems that each differ from the plain one in one thing.
fn variants() -> Vec<Problem> {
    let float = |shape: [usize; 1]| TensorDesc::contiguous(DType::F32, shape);
    let stored_bnth = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [96, 8, 24, 1]).unwrap();
    let sequences = Sequences::Dense { query: [3, 3].into(), key_value: [5, 5].into() };
    [
        builder(),
        DIMS.problem(DType::F64),
        builder().device(Device::Cuda(0)),
        builder().device(Device::Cuda(1)),
        builder().scale(0.0),
        builder().scale(-0.0),
        builder().causal(true),
        builder().query_offset(QueryOffset::Fixed(1)),
        builder().query_offset(QueryOffset::BottomRight),
        builder().window(Window { left: Some(1), right: None }),
        builder().window(Window { left: None, right: Some(1) }),
        builder().window(Window::new(1, 1)),
        builder().softcap(1.0),
        builder().mask(TensorDesc::contiguous(DType::Bool, [5])),
        builder().bias(float([5])),
        builder().alibi_slopes(float([4])),
        builder().sinks(float([4])),
        builder().query_lengths([3, 3]),
        builder().key_value_lengths([5, 5]),
        builder().sequences(sequences),
        builder().dropout(Dropout::new(0.0, 0)),
        builder().dropout(Dropout::new(-0.0, 0)),
        builder().dropout(Dropout::new(0.0, 1)),
        builder().dropout(Dropout::new(0.0, 0).with_offset(1)),
        builder().deterministic(true),
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
