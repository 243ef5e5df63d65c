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

#[test]
fn options() {
    round_trip(&Options::default());
    round_trip(&Options {
        scale: Some(-0.1),
        causal: true,
        query_offset: QueryOffset::Fixed(-3),
        window: Window { left: None, right: Some(2) },
        softcap: Some(30.0),
        query_lengths: Lengths::from([1, 2]),
        key_value_lengths: Lengths::Full,
        dropout: Some(Dropout::new(0.1, u64::MAX)),
        deterministic: true,
    });
    let short: Options = serde_json::from_str(r#"{"causal":true}"#).unwrap();
    assert_eq!(short, Options { causal: true, ..Options::default() });
    assert!(serde_json::from_str::<Options>(r#"{"casual":true}"#).is_err());
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
        .implementation(["missing", "lib", "toy"])
        .scratch_limit(100)
        .explain(&x, &x, &x)
        .unwrap();
    let text = round_trip(&explanation);
    assert!(text.contains(r#""verdict":{"refused":"unavailable"}"#), "{text}");
    assert!(text.contains(r#""verdict":{"chosen":{"preferred":3}}"#), "{text}");
}
