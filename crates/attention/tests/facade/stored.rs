//! Options, choices and explanations as JSON.

use attention::{
    Attention, Choice, DType, Dropout, Explanation, Lengths, NumericsClass, Options, QueryOffset, Tensor,
    Window,
};

use crate::support::{Toy, registry};

fn round_trip<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(
    value: &T,
) -> String {
    let text = serde_json::to_string(value).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), value);
    text
}

#[test]
fn choices() {
    let choice = Choice::Implementation {
        name: "cpu".to_owned(),
        version: Some("0.1.0".to_owned()),
        dtype: DType::Bf16,
        numerics: NumericsClass::HalfF32,
    };
    assert_eq!(
        round_trip(&choice),
        r#"{"implementation":{"name":"cpu","version":"0.1.0","dtype":"bf16","numerics":"HalfF32"}}"#
    );
    assert_eq!(
        round_trip(&choice.any_version()),
        r#"{"implementation":{"name":"cpu","dtype":"bf16","numerics":"HalfF32"}}"#
    );
    assert_eq!(round_trip(&Choice::Numerics(NumericsClass::F32)), r#"{"numerics":"F32"}"#);
    // A key that nobody knows is an error, not ignored.
    let unknown = r#"{"implementation":{"name":"cpu","dtype":"f32","numerics":"F32","chunk":8}}"#;
    assert!(serde_json::from_str::<Choice>(unknown).unwrap_err().to_string().contains("chunk"));
}

/// A machine writes what it chose, and others read it.
#[test]
fn a_stored_choice_runs_elsewhere_or_says_why_not() {
    let stored = {
        let mut fast = Toy::new("fast");
        fast.version = "1.2.3".to_owned();
        let here = registry([fast.arc(), Toy::new("slow").arc()]);
        let x = Tensor::zeros::<f32>([1, 2, 2, 4]).unwrap();
        let explanation = Attention::new().registry(&here).explain(&x, &x, &x).unwrap();
        serde_json::to_string(&explanation.choice.unwrap()).unwrap()
    };
    assert_eq!(
        stored,
        r#"{"implementation":{"name":"fast","version":"1.2.3","dtype":"f32","numerics":"F32"}}"#
    );
    let there = |text: &str, toy: Toy| {
        let there = registry([Toy::new("other").arc(), toy.arc()]);
        let choice: Choice = serde_json::from_str(text).unwrap();
        let x = Tensor::zeros::<f32>([1, 2, 2, 4]).unwrap();
        let call = Attention::new().registry(&there).implementation(there.resolve(&choice)?);
        Ok(call.explain(&x, &x, &x)?.chosen().unwrap().name.clone())
    };
    let said = |text: &str, toy: Toy| -> String {
        let result: Result<String, attention::Error> = there(text, toy);
        result.unwrap_or_else(|error| error.to_string())
    };
    let fast = |version: &str| {
        let mut fast = Toy::new("fast");
        fast.version = version.to_owned();
        fast
    };
    assert_eq!(said(&stored, fast("1.2.3")), "fast");
    assert_eq!(said(&stored, Toy::new("slow")), "no implementation is named 'fast'; there are: other, slow");
    assert_eq!(
        said(&stored, fast("1.2.3").numerics(&[(DType::F32, NumericsClass::Tf32)])),
        "the stored choice has fast computing f32 in class F32, here it computes in class Tf32"
    );
    assert_eq!(
        said(&stored, fast("1.3.0")),
        "the stored choice is for fast 1.2.3, here is version 1.3.0 (a choice without a version takes any)"
    );
    // Without a version, as `any_version` stores it; and a class alone.
    let any_version = stored.replace(r#""version":"1.2.3","#, "");
    assert_eq!(said(&any_version, fast("1.3.0")), "fast");
    let tf32 = || Toy::new("tf32").numerics(&[(DType::F32, NumericsClass::Tf32)]);
    assert_eq!(said(r#"{"numerics":"F32"}"#, tf32()), "other");
    assert_eq!(said(r#"{"numerics":"Tf32"}"#, tf32()), "tf32");
    assert_eq!(
        said(r#"{"numerics":"HalfF32"}"#, fast("1")),
        "no implementation here computes in class HalfF32; there are: other, fast"
    );
    // A class of a later version of this library is an error, not another class.
    let unknown = serde_json::from_str::<Choice>(r#"{"numerics":"F8"}"#).unwrap_err().to_string();
    assert!(unknown.contains("unknown variant `F8`"), "{unknown}");
}

#[test]
fn options() {
    round_trip(&Options::default());
    round_trip(&Options {
        scale: Some(-0.1),
        causal: true,
        query_offset: QueryOffset::Fixed(-3),
        query_offsets: Some([2, -4].into()),
        window: Window { left: None, right: Some(2) },
        softcap: Some(30.0),
        query_lengths: Lengths::from([1, 2]),
        key_value_lengths: Lengths::Full,
        query_starts: Some([0, 3, 5].into()),
        key_value_starts: Some([0, 4, 9].into()),
        longest_query: Some(3),
        longest_key: None,
        dropout: Some(Dropout::new(0.1, u64::MAX)),
        deterministic: true,
        batch_invariant: true,
    });
    let short: Options = serde_json::from_str(r#"{"causal":true}"#).unwrap();
    assert_eq!(short, Options { causal: true, ..Options::default() });
    let window: Options = serde_json::from_str(r#"{"window":{"left":3}}"#).unwrap();
    assert_eq!(window.window, Window { left: Some(3), right: None });
    for (text, message) in [
        (r#"{"casual":true}"#, "unknown field `casual`"),
        (r#"{"window":{"left":3,"rigth":0}}"#, "unknown field `rigth`"),
        (r#"{"dropout":{"rate":0.1,"seed":1,"offset":0,"keep":0.9}}"#, "unknown field `keep`"),
        (r#"{"window":[3,0]}"#, "expected the fields of Window by name"),
        (r#"{"dropout":[0.1,1,0]}"#, "expected the fields of Dropout by name"),
        ("[]", "expected the fields of Options by name"),
        (r#"[0.5,true]"#, "expected the fields of Options by name"),
        (r#"{"causal":true,"causal":false}"#, "duplicate field `causal`"),
        (r#"{"query_lengths":{"per_batch":[1],"per_row":[1]}}"#, "expected"),
    ] {
        let error = serde_json::from_str::<Options>(text).unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
}

#[test]
fn explanations() {
    let registry = registry([
        Toy::new("lib").missing("libtoy is missing", &["libtoy.so"]).arc(),
        Toy::new("toy").scratch(64).arc(),
        Toy::new("other").arc(),
    ]);
    let x = Tensor::zeros::<f32>([1, 2, 2, 4]).unwrap();
    let explanation: Explanation = Attention::new()
        .registry(&registry)
        .implementation(["cudnn", "lib", "toy"])
        .scratch_limit(100)
        .explain(&x, &x, &x)
        .unwrap();
    let text = round_trip(&explanation);
    assert!(text.contains(r#""verdict":{"refused":"unavailable"}"#), "{text}");
    assert!(text.contains(r#""verdict":{"chosen":{"preferred":3}}"#), "{text}");
    // Of a version that had no notes.
    let older = text.replace(r#""notes":[],"#, "");
    assert!(older.len() < text.len());
    assert_eq!(serde_json::from_str::<Explanation>(&older).unwrap(), explanation);
}
