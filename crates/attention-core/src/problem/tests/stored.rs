//! Problems through serde.

use serde_json::{Value, json};

use super::{builder, built};
use crate::{
    Alignment, DType, Device, Dropout, FeatureSet, Gradients, Lengths, OffsetRange, Problem, ProblemBuilder,
    Role, TensorDesc, Window,
};

fn full() -> ProblemBuilder {
    builder()
        .device(Device::Cuda(2))
        .causal(true)
        .alignment(Alignment::BottomRight)
        .window(Window { left: Some(7), right: None })
        .softcap(true)
        .mask(TensorDesc::contiguous(DType::Bool, [3, 5]))
        .bias(TensorDesc::contiguous(DType::F64, [2, 1, 1, 5]))
        .alibi_slopes(TensorDesc::contiguous(DType::F32, [2, 4]))
        .sinks(TensorDesc::contiguous(DType::F32, [4]))
        .query_lengths(DType::I32)
        .in_host_memory(Role::QueryLengths, true)
        .key_value_lengths(DType::I64)
        .dropout_rate(0.125)
        .layout(Role::DropoutSeed, TensorDesc::contiguous(DType::I64, [1]))
        .deterministic(true)
        .batch_invariant(true)
}

fn store(problem: &Problem) -> Value {
    serde_json::to_value(problem).unwrap()
}

fn load(value: Value) -> Result<Problem, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

#[test]
fn problems_come_back_equal() {
    let backward = full().gradients(Gradients::QKV | Gradients::SINKS).d_lse(true);
    let offsets =
        [OffsetRange::Near, OffsetRange::Any].map(|range| builder().query_offsets(range, DType::U32));
    let offset = builder().alignment(Alignment::Offset(OffsetRange::Any)).any_scale(true);
    let tokens =
        |shape: &[usize]| TensorDesc::contiguous(DType::F32, crate::Dims::from_slice(shape).unwrap());
    let packed = Problem::builder(tokens(&[6, 4, 8]), tokens(&[9, 2, 8]), tokens(&[9, 2, 8]));
    let packed = packed.packed_queries(2, DType::I32).packed_keys(2, DType::I64);
    let paged = Problem::builder(tokens(&[2, 3, 4, 8]), tokens(&[7, 5, 2, 8]), tokens(&[7, 5, 2, 8]));
    let paged = paged.paged(2, 3, DType::U32).longest(None, 12);
    let packed_backward = packed.clone().longest(4, None).gradients(Gradients::QKV).d_lse(true);
    let problems = [builder(), full(), full().lse(true), backward, offset].into_iter().chain(offsets);
    let problems = problems.chain([packed, packed_backward, paged]);
    for problem in problems.map(built) {
        let text = serde_json::to_string(&problem).unwrap();
        assert_eq!(serde_json::from_str::<Problem>(&text).unwrap(), problem, "{text}");
        assert_eq!(load(store(&problem)), Ok(problem));
    }
}

#[test]
fn stored_problems_name_tensors_and_gradients() {
    let stored = store(&built(builder().gradients(Gradients::QUERY | Gradients::VALUE)));
    assert_eq!(stored["gradients"], json!(["d_query", "d_value"]));
    assert_eq!(
        stored["tensors"]["d_query"],
        json!({"dtype": "f32", "shape": [2, 3, 4, 8], "strides": [96, 32, 8, 1]})
    );
    let mut roles: Vec<_> = stored["tensors"].as_object().unwrap().keys().map(String::as_str).collect();
    roles.sort_unstable();
    assert_eq!(roles, ["d_out", "d_query", "d_value", "key", "lse", "out", "query", "value"]);
    assert_eq!(store(&built(full()))["device"], json!({"cuda": 2}));
}

/// A problem that was stored before there was the promise does not ask for it.
#[test]
fn batch_invariance_is_stored_where_it_is_asked_for() {
    assert_eq!(store(&built(builder())).get("batch_invariant"), None);
    let mut stored = store(&built(full()));
    assert_eq!(stored["batch_invariant"], json!(true));
    stored.as_object_mut().unwrap().remove("batch_invariant");
    assert_eq!(load(stored), Ok(built(full().batch_invariant(false))));
}

/// Changes one entry of a stored problem and loads it.
fn tampered(path: &[&str], value: Value) -> String {
    let mut stored = store(&built(full()));
    let (last, path) = path.split_last().unwrap();
    let entry = path.iter().fold(&mut stored, |entry, key| &mut entry[*key]);
    entry[*last] = value;
    load(stored).unwrap_err()
}

#[test]
fn loading_checks_again() {
    for (path, value, message) in [
        (
            &["tensors", "query_lengths", "shape"][..],
            json!([3]),
            "query lengths has shape [3], expected [2] ([B])",
        ),
        (
            &["tensors", "key", "shape"],
            json!([2, 5, 4, 7]),
            "key has shape [2, 5, 4, 7], expected [2, 5, 4, 8] ([B, S, K, H]; B and H of the query)",
        ),
        (
            &["tensors", "query"],
            Value::Null,
            "invalid type: null, expected a tensor's dtype, shape and strides",
        ),
        (&["tensors", "query", "strides"], json!([1]), "shape has 4 axes and strides have 1"),
        (&["tensors", "query", "shape"], json!([1, 2, 3, 4, 5]), "rank 5 is above 4"),
        (
            &["tensors", "query_lengths", "dtype"],
            json!("f32"),
            "query lengths has dtype f32, expected i32, u32 or i64",
        ),
        (
            &["alignment"],
            json!({"offsets": "near"}),
            "the problem has query offsets, the call was given none",
        ),
        (&["softcap"], json!(-1.0), "invalid type: floating point `-1.0`, expected a boolean"),
        (
            &["dropout_rate"],
            Value::Null,
            "the call was given dropout seed, the problem has none: build it from the inputs that have it \
             (`Inputs::problem`)",
        ),
        (
            &["dropout_rate"],
            json!(1.0),
            "dropout rate is 1, expected 0 <= rate < 1 - 2^-17 (it is applied in steps of 1/65536)",
        ),
        (&["gradients"], json!(["out"]), "out is not a gradient of an input"),
    ] {
        assert_eq!(tampered(path, value), message, "{path:?}");
    }
}

/// What a later version stored is refused by this one rather than left out.
#[test]
fn what_this_version_does_not_know_is_refused() {
    for (path, value) in [
        (&["temperature"][..], json!(1.0)),
        (&["tensors", "page_table"], json!({"dtype": "f32", "shape": [1], "strides": [1]})),
        (&["tensors", "query", "scale"], json!(1.0)),
        (&["gradients"], json!(["d_alibi"])),
        (&["sequences"], json!({"packed": {}})),
        (&["alignment"], json!({"pages": "near"})),
        (&["alignment"], json!({"offset": "far"})),
        (&["in_host_memory"], json!(["page_table"])),
        (&["longest_keys"], json!(9)),
        (&["window", "lfet"], json!(3)),
        (&["dropout"], json!({"rate": 0.1, "keep": 0.9})),
    ] {
        let message = tampered(path, value);
        assert!(message.contains("unknown field") || message.contains("unknown variant"), "{message}");
    }
}

/// A list of values in the place of named fields, and a name that is there twice, of which one would be
/// ignored.
#[test]
fn options_are_loaded_by_name_and_once() {
    for (path, value, message) in [
        (&["window"][..], json!([7, null]), "invalid type: sequence, expected the fields of Window by name"),
        (&["window"], json!([]), "invalid type: sequence, expected the fields of Window by name"),
    ] {
        assert_eq!(tampered(path, value), message, "{path:?}");
    }
    let dropout = serde_json::from_value::<Dropout>(json!([0.5, 1, 2])).unwrap_err().to_string();
    assert_eq!(dropout, "invalid type: sequence, expected the fields of Dropout by name");
    let unknown = json!({"rate": 0.5, "seed": 1, "offset": 2, "keep": 0.9});
    let dropout = serde_json::from_value::<Dropout>(unknown).unwrap_err().to_string();
    assert!(dropout.contains("unknown field `keep`"), "{dropout}");
    let text = serde_json::to_string(&built(builder())).unwrap();
    let query = r#""query":{"dtype":"f32","shape":[2,3,4,8],"strides":[96,32,8,1]}"#;
    let twice = text.replace(query, &format!("{query},{query}"));
    assert_ne!(text, twice);
    let error = serde_json::from_str::<Problem>(&twice).unwrap_err().to_string();
    assert!(error.contains("duplicate tensor `query`"), "{error}");
    let twice = text.replace(r#""causal":false"#, r#""causal":false,"causal":true"#);
    assert!(serde_json::from_str::<Problem>(&twice).unwrap_err().to_string().contains("duplicate field"));
}

#[test]
fn dimensions_and_capabilities_have_no_other_fields() {
    use crate::{Capabilities, DeviceKind, Dimensions, PassCapabilities, ScratchGrowth};
    let dims = serde_json::to_value(built(builder()).dims()).unwrap();
    let pass = PassCapabilities::new(FeatureSet::all());
    let capabilities = Capabilities::new(DeviceKind::Cpu, [], pass.clone(), ScratchGrowth::Constant);
    let refused = |mut value: Value, load: fn(Value) -> Option<serde_json::Error>| {
        assert!(load(value.clone()).is_none());
        value["paged"] = json!(true);
        assert!(load(value).unwrap().to_string().contains("unknown field `paged`"));
    };
    refused(dims, |value| serde_json::from_value::<Dimensions>(value).err());
    refused(serde_json::to_value(pass).unwrap(), |value| {
        serde_json::from_value::<PassCapabilities>(value).err()
    });
    refused(serde_json::to_value(capabilities).unwrap(), |value| {
        serde_json::from_value::<Capabilities>(value).err()
    });
}

#[test]
fn a_missing_operand_is_named() {
    let mut stored = store(&built(builder()));
    stored["tensors"].as_object_mut().unwrap().remove("value");
    assert_eq!(load(stored).unwrap_err(), "the problem has value, the call was given none");
}

#[test]
fn a_stored_forward_problem_has_no_gradients() {
    let mut stored = store(&built(builder()));
    stored["gradients"] = json!(["d_query"]);
    assert_eq!(load(stored), Ok(built(builder())));
}

#[test]
fn options_and_sets_come_back_equal() {
    let lengths: Lengths = [1usize, 2].into();
    assert_eq!(serde_json::from_value::<Lengths>(serde_json::to_value(&lengths).unwrap()).unwrap(), lengths);
    let dropout = Dropout::new(0.125, u64::MAX).with_offset(7);
    assert_eq!(serde_json::from_value::<Dropout>(serde_json::to_value(dropout).unwrap()).unwrap(), dropout);
    let set = FeatureSet::all();
    assert_eq!(serde_json::from_value::<FeatureSet>(serde_json::to_value(set).unwrap()).unwrap(), set);
    for role in Role::every() {
        assert_eq!(serde_json::from_value::<Role>(serde_json::to_value(role).unwrap()).unwrap(), role);
    }
}

/// Where numbers are is stored for problems on a device, and only where it is not the device.
#[test]
fn numbers_in_host_memory_come_back_there() {
    let lengths =
        || builder().device(Device::Cuda(1)).query_lengths(DType::I32).key_value_lengths(DType::I32);
    let on_device = store(&built(lengths()));
    assert_eq!(on_device.get("in_host_memory"), None);
    let problem = built(lengths().in_host_memory(Role::KeyValueLengths, true));
    let stored = store(&problem);
    assert_eq!(stored["in_host_memory"], json!(["key_value_lengths"]));
    let loaded = load(stored.clone()).unwrap();
    assert_eq!(loaded, problem);
    assert_eq!(loaded.device_of(Role::KeyValueLengths), Device::Cpu);
    assert_eq!(loaded.device_of(Role::QueryLengths), Device::Cuda(1));

    // A stored problem cannot have other tensors on the host, and one on the host says nothing.
    let mut query = stored.clone();
    query["in_host_memory"] = json!(["query", "key_value_lengths"]);
    assert_eq!(load(query), Ok(problem));
    let mut host = stored;
    host["device"] = json!("cpu");
    let host = load(host).unwrap();
    assert_eq!(host, built(lengths().device(Device::Cpu)));
    assert_eq!(store(&host).get("in_host_memory"), None);
}
