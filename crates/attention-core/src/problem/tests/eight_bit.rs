//! Keys and values of 8 bits beside queries of another dtype, and their scales.

use super::{DIMS, built, called};
use crate::{
    CallData, CallProblem, DType, Device, Dims, F8E4M3, Feature, FeatureSet, Inputs, InvalidCall,
    PassCapabilities, Problem, ProblemBuilder, Role, ScratchGrowth, TensorDesc, Unsupported, View,
};
use crate::{Capabilities, DeviceKind, NumericsClass};

/// B = 2, T = 3, S = 5, N = 4, K = 2, H = 8, Hv = 6.
fn eight_bit(query: DType, key: DType) -> ProblemBuilder {
    Problem::builder(
        TensorDesc::contiguous(query, [2, 3, 4, 8]),
        TensorDesc::contiguous(key, [2, 5, 2, 8]),
        TensorDesc::contiguous(key, [2, 5, 2, 6]),
    )
}

fn scales(shape: &[usize]) -> TensorDesc {
    TensorDesc::contiguous(DType::F32, Dims::from_slice(shape).unwrap())
}

#[test]
fn keys_of_8_bits_go_with_queries_of_every_float() {
    for key in DType::EIGHT_BIT {
        for query in DType::FLOATS {
            let problem = built(eight_bit(query, key).lse(true));
            assert_eq!(problem.dtype(), query);
            let dtypes = [Role::Key, Role::Value, Role::Out, Role::Lse].map(|role| problem.dtype_of(role));
            assert_eq!(dtypes, [key, key, query, query.accumulator()].map(Some));
            assert!(problem.features().contains(Feature::EightBitKeys));
        }
    }
    let text = built(eight_bit(DType::Bf16, DType::F8E5M2)).to_string();
    assert_eq!(
        text,
        "forward bf16 (f8e5m2 keys) B2 T3 S5 N4 K2 H8 Hv6 on cpu, grouped heads, value head dim != head dim, \
         8-bit keys and values"
    );
}

#[test]
fn they_may_be_packed_and_in_pages() {
    let desc = |dtype: DType, shape: [usize; 3]| TensorDesc::contiguous(dtype, shape);
    let key = desc(DType::F8E4M3, [9, 4, 8]);
    let packed = Problem::builder(desc(DType::F16, [6, 4, 8]), key, key);
    let packed =
        built(packed.packed_queries(2, DType::U32).packed_keys(2, DType::I64).key_scales(scales(&[2, 4])));
    assert!(packed.features().contains(Feature::EightBitKeys));
    let pages = TensorDesc::contiguous(DType::F8E4M3, [9, 5, 4, 8]);
    let paged = Problem::builder(TensorDesc::contiguous(DType::F16, [2, 3, 4, 8]), pages, pages);
    let paged = built(paged.paged(2, 3, DType::U32).value_scales(scales(&[4])));
    assert!(paged.features().contains(Feature::PagedKeys) && paged.has(Role::ValueScales));
}

/// Problems that do the same are equal, and scales of another shape do not.
#[test]
fn a_scalar_is_a_scale_of_one_axis() {
    let builder = || eight_bit(DType::F32, DType::F8E4M3);
    let scalar = built(builder().key_scales(scales(&[])));
    assert_eq!(scalar, built(builder().key_scales(scales(&[1]))));
    assert_eq!(scalar.tensor(Role::KeyScales).unwrap().shape(), [1].into());
    for shape in [&[2][..], &[2, 2]] {
        let other = built(builder().key_scales(scales(shape)));
        assert_ne!(other, scalar);
        assert_ne!(other, built(builder().value_scales(scales(shape))));
        // As a set of features they are all the same.
        assert_eq!(other.features(), scalar.features());
    }
    // A scalar of a call fits.
    let one = [0.5f32];
    let data = CallData { key_scales: View::from_slice(&one, []).ok(), ..CallData::default() };
    assert_eq!(called(&scalar, &data).key_scale(1, 1), 0.5);
    assert_eq!(called(&scalar, &data).value_scale(1, 1), 1.0);
}

#[test]
fn a_call_knows_the_scale_of_each_head_of_each_sequence() {
    let (by_head, by_sequence) = ([0.5f32, 2.0], [1.0f32, 2.0, 3.0, -4.0]);
    let data = CallData {
        key_scales: View::from_slice(&by_head, [2]).ok(),
        value_scales: View::strided(&by_sequence, 3, [2, 2], [-2, -1]).ok(),
        ..CallData::default()
    };
    let keys = vec![F8E4M3::default(); 2 * 5 * 2 * 8];
    let query = vec![0.0f32; 2 * 3 * 4 * 8];
    let key = View::from_slice(&keys, [2, 5, 2, 8]).unwrap();
    let inputs = Inputs { data, ..Inputs::new(View::from_slice(&query, [2, 3, 4, 8]).unwrap(), key, key) };
    let problem = inputs.problem().build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    let all = [(0, 0), (0, 1), (1, 0), (1, 1)];
    assert_eq!(all.map(|(batch, head)| call.key_scale(batch, head)), [0.5, 2.0, 0.5, 2.0]);
    assert_eq!(all.map(|(batch, head)| call.value_scale(batch, head)), [-4.0, 3.0, 2.0, 1.0]);
    let bounds = CallProblem::at_bounds(&problem);
    assert_eq!((bounds.key_scale(0, 1), bounds.value_scale(0, 1)), (1.0, 1.0));
}

#[test]
fn scales_that_are_not_finite_are_refused_where_the_host_has_them() {
    let problem = built(eight_bit(DType::F16, DType::F8E4M3).value_scales(scales(&[2, 2])));
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let numbers = [1.0, 2.0, value, 0.0];
        let data = CallData { value_scales: View::from_slice(&numbers, [2, 2]).ok(), ..CallData::default() };
        let error = CallProblem::new(&problem, &data).unwrap_err();
        let InvalidCall::ScaleNotFinite { role: Role::ValueScales, index, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(*index, [1, 0].into());
    }
    // Zero and negative scales are honoured.
    let numbers = [0.0f32, -2.0, -0.0, 1.0];
    let data = CallData { value_scales: View::from_slice(&numbers, [2, 2]).ok(), ..CallData::default() };
    assert_eq!(called(&problem, &data).value_scale(0, 1), -2.0);
}

#[test]
fn scales_may_be_in_host_memory_or_on_the_device() {
    let builder = || {
        let builder = eight_bit(DType::F16, DType::F8E4M3).device(Device::Cuda(0));
        builder.key_scales(scales(&[1])).value_scales(scales(&[2]))
    };
    let both = built(builder());
    assert!(both.features().contains(Feature::DeviceData));
    assert_eq!(both.device_of(Role::KeyScales), Device::Cuda(0));
    let host = Role::SCALES.into_iter().fold(builder(), |builder, role| builder.in_host_memory(role, true));
    assert!(!built(host).features().contains(Feature::DeviceData));
}

/// A backend that was written before 8-bit keys declares `FeatureSet::all()` and its dtypes, and meets none.
#[test]
fn a_backend_serves_8_bit_keys_where_it_lists_them() {
    assert!(!FeatureSet::all().contains(Feature::EightBitKeys));
    let with = |features| {
        let pass = PassCapabilities::new(features);
        Capabilities::new(DeviceKind::Cpu, NumericsClass::STANDARD, pass, ScratchGrowth::Constant)
    };
    for key in DType::EIGHT_BIT {
        for query in DType::FLOATS {
            let problem = built(eight_bit(query, key));
            let refusal = with(FeatureSet::all()).check("other", &problem).unwrap_err();
            assert!(matches!(&refusal, Unsupported::Feature { feature: Feature::EightBitKeys, .. }));
            let text = "other does not support 8-bit keys and values in its forward pass";
            assert_eq!(refusal.to_string(), text);
            with(FeatureSet::all().with(Feature::EightBitKeys)).check("this", &problem).unwrap();
        }
    }
    assert!(!built(DIMS.problem(DType::F32)).features().contains(Feature::EightBitKeys));
}

#[cfg(feature = "serde")]
#[test]
fn a_stored_problem_keeps_its_scales() {
    let problem = built(eight_bit(DType::F16, DType::F8E5M2).key_scales(scales(&[2])));
    let stored = serde_json::to_value(&problem).unwrap();
    assert_eq!(stored["tensors"]["key_scales"]["shape"], serde_json::json!([2]));
    assert_eq!(serde_json::from_value::<Problem>(stored).unwrap(), problem);
}
