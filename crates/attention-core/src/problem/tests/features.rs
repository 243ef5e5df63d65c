//! Each feature is reported for the option that needs it, and for nothing else.

use std::collections::HashSet;

use super::{DIMS, builder, built};
use crate::{
    DType, Dimensions, Dropout, Feature, FeatureSet, Gradients, ProblemBuilder, QueryOffset, Role,
    TensorDesc, Window,
};

/// The builder that needs exactly the feature, beside those in the list. No wildcard: a new feature needs a case.
fn needing(feature: Feature) -> (ProblemBuilder, Vec<Feature>) {
    let float = |shape: &[usize]| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape).unwrap());
    let strided = |strides: [isize; 4]| TensorDesc::strided(DType::F32, [2, 3, 4, 8], strides).unwrap();
    let alone = |builder| (builder, vec![]);
    match feature {
        Feature::GroupedHeads => alone(Dimensions { key_heads: 2, ..DIMS }.problem(DType::F32)),
        Feature::ValueHeadDim => alone(Dimensions { value_head_dim: 4, ..DIMS }.problem(DType::F32)),
        Feature::Causal => alone(builder().causal(true)),
        Feature::QueryOffset => alone(builder().query_offset(QueryOffset::Fixed(1))),
        Feature::BottomRight => alone(builder().query_offset(QueryOffset::BottomRight)),
        Feature::WindowLeft => alone(builder().window(Window { left: Some(0), right: None })),
        Feature::WindowRight => alone(builder().window(Window { left: None, right: Some(0) })),
        Feature::Mask => alone(builder().mask(TensorDesc::contiguous(DType::Bool, [5]))),
        Feature::Bias => alone(builder().bias(float(&[4, 1, 1]))),
        Feature::QueryLengths => alone(builder().query_lengths([3, 3])),
        Feature::KeyValueLengths => alone(builder().key_value_lengths([5, 1])),
        Feature::Softcap => alone(builder().softcap(1.0)),
        Feature::Alibi => alone(builder().alibi_slopes(float(&[2, 4]))),
        Feature::Sinks => alone(builder().sinks(float(&[4]))),
        Feature::Dropout => alone(builder().dropout(Dropout::new(0.0, 0))),
        Feature::Lse => alone(builder().lse(true)),
        Feature::DLse => alone(builder().gradients(Gradients::VALUE).d_lse(true)),
        Feature::DBias => (builder().bias(float(&[3, 5])).gradients(Gradients::BIAS), vec![Feature::Bias]),
        Feature::DSinks => (builder().sinks(float(&[4])).gradients(Gradients::SINKS), vec![Feature::Sinks]),
        Feature::Deterministic => alone(builder().deterministic(true)),
        Feature::InnerStride => alone(builder().layout(Role::Query, strided([96, 32, 1, 4]))),
        Feature::NegativeStrides => alone(builder().layout(Role::Query, strided([96, -32, 8, 1]))),
    }
}

#[test]
fn each_feature_is_found_alone() {
    for &feature in Feature::ALL {
        let (builder, implied) = needing(feature);
        let want: FeatureSet = implied.into_iter().chain([feature]).collect();
        assert_eq!(built(builder).features(), want, "{feature}");
    }
}

#[test]
fn backward_gradients_of_the_operands_and_reading_lse_are_no_features() {
    assert_eq!(built(builder().gradients(Gradients::QKV)).features(), FeatureSet::EMPTY);
}

#[test]
fn strides_that_are_never_stepped_are_no_features() {
    let ones = Dimensions { batch: 1, head_dim: 1, value_head_dim: 1, ..DIMS };
    let query = TensorDesc::strided(DType::F32, [1, 3, 4, 1], [-7, 4, 1, -9]).unwrap();
    assert_eq!(built(ones.problem(DType::F32).layout(Role::Query, query)).features(), FeatureSet::EMPTY);
    // A broadcast mask or a bias with another inner stride is left to the backend; a negative stride is not.
    let bias = |strides: [isize; 2]| TensorDesc::strided(DType::F32, [3, 5], strides).unwrap();
    assert_eq!(built(builder().bias(bias([1, 3]))).features(), FeatureSet::EMPTY.with(Feature::Bias));
    assert!(built(builder().bias(bias([5, -1]))).features().contains(Feature::NegativeStrides));
}

#[test]
fn an_expanded_head_dimension_has_another_inner_stride() {
    let query = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [12, 4, 1, 0]).unwrap();
    let features = built(builder().layout(Role::Query, query)).features();
    assert_eq!(features, FeatureSet::EMPTY.with(Feature::InnerStride));
}

#[test]
fn sets_of_features_behave_as_sets() {
    let all = FeatureSet::all();
    assert_eq!(all.iter().collect::<Vec<_>>(), Feature::ALL);
    let names: HashSet<_> = Feature::ALL.iter().map(|feature| feature.name()).collect();
    assert_eq!(names.len(), Feature::ALL.len());
    for &feature in Feature::ALL {
        let without = all.without(feature);
        assert!(!without.contains(feature) && without.with(feature) == all);
        assert_eq!(all.difference(without), FeatureSet::EMPTY.with(feature));
    }
    assert!(FeatureSet::EMPTY.is_empty() && !all.is_empty());
    assert_eq!(FeatureSet::from(Vec::from(all)), all);
    assert_eq!(format!("{:?}", FeatureSet::EMPTY.with(Feature::Alibi)), "{Alibi}");
}

#[test]
fn sets_of_gradients_behave_as_sets() {
    let set = Gradients::QKV.without(Gradients::KEY) | Gradients::SINKS;
    assert!(set.contains(Gradients::QUERY) && !set.contains(Gradients::QKV) && set.contains(Gradients::NONE));
    assert_eq!(format!("{set:?} {}", Gradients::NONE), "Gradients(dq dv dsinks) none");
    assert_eq!(Gradients::try_from(Vec::from(set)), Ok(set));
    assert_eq!(Gradients::try_from(vec![Role::Out]), Err("out is not a gradient of an input".to_owned()));
    assert!(Gradients::default().is_empty());
}
