//! Problems through serde.

use serde_json::{Value, json};

use super::{builder, built};
use crate::{
    DType, Device, Dropout, FeatureSet, Gradients, Lengths, Problem, ProblemBuilder, QueryOffset, Role,
    TensorDesc, Window,
};

fn full() -> ProblemBuilder {
    builder()
        .device(Device::Cuda(2))
        .scale(0.3)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .window(Window { left: Some(7), right: None })
        .softcap(50.0)
        .mask(TensorDesc::contiguous(DType::Bool, [3, 5]))
        .bias(TensorDesc::contiguous(DType::F64, [2, 1, 1, 5]))
        .alibi_slopes(TensorDesc::contiguous(DType::F32, [2, 4]))
        .sinks(TensorDesc::contiguous(DType::F32, [4]))
        .query_lengths([1, 3])
        .dropout(Dropout::new(0.125, u64::MAX).with_offset(7))
        .deterministic(true)
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
    for problem in [builder(), full(), full().lse(true), backward].map(built) {
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
            &["sequences", "dense", "query"][..],
            json!({"per_batch": [1, 4]}),
            "query length 4 of batch row 1 exceeds the tensor's length 3",
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
        (&["softcap"], json!(-1.0), "softcap is -1, expected a number above 0 (leave it out for no softcap)"),
        (
            &["dropout", "rate"],
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
        (&["sequences", "dense", "blocks"], json!("full")),
        (&["window", "lfet"], json!(3)),
        (&["dropout", "keep"], json!(0.9)),
    ] {
        let message = tampered(path, value);
        assert!(message.contains("unknown field") || message.contains("unknown variant"), "{message}");
    }
}

/// A list of values in the place of named fields, and a name that is there twice, of which one would be ignored.
#[test]
fn options_are_loaded_by_name_and_once() {
    for (path, value, message) in [
        (&["window"][..], json!([7, null]), "invalid type: sequence, expected the fields of Window by name"),
        (&["window"], json!([]), "invalid type: sequence, expected the fields of Window by name"),
        (&["dropout"], json!([0.5, 1, 2]), "invalid type: sequence, expected the fields of Dropout by name"),
    ] {
        assert_eq!(tampered(path, value), message, "{path:?}");
    }
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
    let set = FeatureSet::all();
    assert_eq!(serde_json::from_value::<FeatureSet>(serde_json::to_value(set).unwrap()).unwrap(), set);
    for role in Role::ALL {
        assert_eq!(serde_json::from_value::<Role>(serde_json::to_value(role).unwrap()).unwrap(), role);
    }
}
