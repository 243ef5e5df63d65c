//! Each feature is reported for the option that needs it, and for nothing else.

use std::collections::HashSet;

use super::{DIMS, builder, built};
use crate::{
    Alignment, DType, Device, Dimensions, Feature, FeatureSet, Gradients, OffsetRange, Problem,
    ProblemBuilder, Role, TensorDesc, Window,
};

/// The builder that needs exactly the feature, beside those in the list. No wildcard: a new feature needs a
/// case.
fn needing(feature: Feature) -> (ProblemBuilder, Vec<Feature>) {
    let float = |shape: &[usize]| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape).unwrap());
    let strided = |strides: [isize; 4]| TensorDesc::strided(DType::F32, [2, 3, 4, 8], strides).unwrap();
    let alone = |builder| (builder, vec![]);
    match feature {
        Feature::GroupedHeads => alone(Dimensions { key_heads: 2, ..DIMS }.problem(DType::F32)),
        Feature::ValueHeadDim => alone(Dimensions { value_head_dim: 4, ..DIMS }.problem(DType::F32)),
        Feature::Causal => alone(builder().causal(true)),
        Feature::QueryOffset => alone(builder().alignment(Alignment::Offset(OffsetRange::Near))),
        Feature::QueryOffsets => alone(builder().query_offsets(OffsetRange::Any, DType::I32)),
        Feature::BottomRight => alone(builder().alignment(Alignment::BottomRight)),
        Feature::WindowLeft => alone(builder().window(Window { left: Some(0), right: None })),
        Feature::WindowRight => alone(builder().window(Window { left: None, right: Some(0) })),
        Feature::Mask => alone(builder().mask(TensorDesc::contiguous(DType::Bool, [5]))),
        Feature::Bias => alone(builder().bias(float(&[4, 1, 1]))),
        Feature::QueryLengths => alone(builder().query_lengths(DType::U32)),
        Feature::KeyValueLengths => alone(builder().key_value_lengths(DType::I64)),
        Feature::Softcap => alone(builder().softcap(true)),
        Feature::Alibi => alone(builder().alibi_slopes(float(&[2, 4]))),
        Feature::Sinks => alone(builder().sinks(float(&[4]))),
        Feature::Dropout => alone(builder().dropout_rate(0.0)),
        Feature::Lse => alone(builder().lse(true)),
        Feature::DLse => alone(builder().gradients(Gradients::VALUE).d_lse(true)),
        Feature::DBias => (builder().bias(float(&[3, 5])).gradients(Gradients::BIAS), vec![Feature::Bias]),
        Feature::DSinks => (builder().sinks(float(&[4])).gradients(Gradients::SINKS), vec![Feature::Sinks]),
        Feature::Deterministic => alone(builder().deterministic(true)),
        Feature::BatchInvariant => alone(builder().batch_invariant(true)),
        Feature::InnerStride => alone(builder().layout(Role::Query, strided([96, 32, 1, 4]))),
        Feature::DeviceData => {
            (builder().device(Device::Cuda(0)).query_lengths(DType::I32), vec![Feature::QueryLengths])
        }
        Feature::NegativeStrides => alone(builder().layout(Role::Query, strided([96, -32, 8, 1]))),
        Feature::PackedQueries => {
            let packed = Problem::builder(float(&[6, 4, 8]), float(&[2, 5, 4, 8]), float(&[2, 5, 4, 8]));
            let packed = packed.packed_queries(2, DType::I32).key_value_lengths(DType::I32);
            (packed, vec![Feature::KeyValueLengths])
        }
        Feature::PackedKeys => {
            let packed = Problem::builder(float(&[6, 4, 8]), float(&[9, 4, 8]), float(&[9, 4, 8]));
            let packed = packed.packed_queries(2, DType::U32).packed_keys(2, DType::I64);
            (packed, vec![Feature::PackedQueries])
        }
        Feature::PagedKeys => {
            let paged = Problem::builder(float(&[2, 3, 4, 8]), float(&[9, 5, 4, 8]), float(&[9, 5, 4, 8]));
            (paged.paged(2, 3, DType::U32), vec![Feature::KeyValueLengths])
        }
        Feature::EightBitKeys => {
            let key = TensorDesc::contiguous(DType::F8E4M3, [2, 5, 4, 8]);
            alone(Problem::builder(float(&[2, 3, 4, 8]), key, key))
        }
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
    let by_name = [Feature::EightBitKeys, Feature::BatchInvariant];
    assert!(by_name.iter().all(|&feature| !FeatureSet::all().contains(feature)));
    let all = by_name.into_iter().fold(FeatureSet::all(), FeatureSet::with);
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

/// Whether numbers are in device memory is asked of each.
#[test]
fn numbers_in_host_memory_are_no_device_data() {
    let on_device = || {
        let seed = TensorDesc::contiguous(DType::I64, [1]);
        let builder = builder().device(Device::Cuda(0)).dropout_rate(0.5).layout(Role::DropoutSeed, seed);
        builder.query_lengths(DType::I32).key_value_lengths(DType::I32)
    };
    let numbers = [Role::QueryLengths, Role::KeyValueLengths, Role::DropoutSeed];
    assert!(built(on_device()).features().contains(Feature::DeviceData));
    for kept in numbers {
        // All but one on the host.
        let builder =
            numbers.into_iter().fold(on_device(), |builder, role| builder.in_host_memory(role, role != kept));
        let problem = built(builder);
        assert!(problem.features().contains(Feature::DeviceData), "{kept}");
        assert_eq!(problem.device_of(kept), Device::Cuda(0));
    }
    let host = numbers.into_iter().fold(on_device(), |builder, role| builder.in_host_memory(role, true));
    assert!(!built(host.clone()).features().contains(Feature::DeviceData));
    // There is nothing else in a problem on the host.
    assert!(!built(host.device(Device::Cpu)).features().contains(Feature::DeviceData));
}

/// Strides of numbers say nothing about the operands.
#[test]
fn strides_of_numbers_are_no_features() {
    let lengths = TensorDesc::strided(DType::I32, [2], [3]).unwrap();
    let problem = built(builder().layout(Role::KeyValueLengths, lengths));
    assert_eq!(problem.features(), FeatureSet::EMPTY.with(Feature::KeyValueLengths));
    let reversed = TensorDesc::strided(DType::I32, [2], [-1]).unwrap();
    let problem = built(builder().layout(Role::KeyValueLengths, reversed));
    assert_eq!(problem.features(), FeatureSet::EMPTY.with(Feature::KeyValueLengths));
}
