//! What is said about calls that do not run.

use attention_candle::{Attention, Dropout, Error, cause};
use candle_core::{DType, Device, Result, Tensor};

fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::zeros(shape, dtype, &Device::Cpu)
}

/// The text of the error: candle's, with one of this crate inside.
fn refused(call: &Attention, query: &Tensor, key: &Tensor, value: &Tensor) -> String {
    let error = call.forward(query, key, value).unwrap_err();
    let ours = cause(&error).unwrap_or_else(|| panic!("not an error of this crate: {error}"));
    assert!(error.to_string().starts_with(&ours.to_string()), "{error}");
    let explained = call.explain(query, key, value);
    if let Err(explained) = explained {
        assert_eq!(cause(&explained).unwrap().to_string(), ours.to_string());
    }
    ours.to_string()
}

#[test]
fn wrong_dtypes() -> Result<()> {
    let floats = zeros(&[1, 2, 3, 4], DType::F32)?;
    let integers = zeros(&[1, 2, 3, 4], DType::U32)?;
    let call = Attention::bnth();
    assert_eq!(
        refused(&call, &integers, &floats, &floats),
        "query has dtype u32, expected f64, f32, f16 or bf16"
    );
    assert_eq!(
        refused(&call, &floats, &floats, &zeros(&[1, 2, 3, 4], DType::BF16)?),
        "invalid call: value has dtype bf16, expected f32 as the query has"
    );
    let mask = |dtype| Attention::bnth().mask(&zeros(&[3, 3], dtype).unwrap());
    let text = refused(&mask(DType::F32), &floats, &floats, &floats);
    assert!(text.starts_with("mask has dtype f32, expected u8, 0 for masked: `mask.ne(0.)?`"), "{text}");
    assert!(
        text.contains("Keras") && text.ends_with("floats that are added to the logits are a bias"),
        "{text}"
    );
    // What it says to do.
    let mask_of = |dtype| zeros(&[3, 3], dtype).unwrap().ne(0.).unwrap();
    assert!(Attention::bnth().mask(&mask_of(DType::I64)).forward(&floats, &floats, &floats).is_ok());
    assert!(Attention::bnth().mask(&mask_of(DType::F32)).forward(&floats, &floats, &floats).is_ok());
    // A bias of booleans is no bias.
    let bias = Attention::bnth().bias(&zeros(&[3, 3], DType::U8)?);
    assert_eq!(
        refused(&bias, &floats, &floats, &floats),
        "bias has dtype u8, expected f64, f32, f16 or bf16"
    );
    assert!(refused(&mask(DType::I64), &floats, &floats, &floats).starts_with("mask has dtype i64"));
    Ok(())
}

#[test]
fn wrong_shapes() -> Result<()> {
    let f32s = |shape: &[usize]| zeros(shape, DType::F32);
    let x = f32s(&[2, 4, 3, 8])?;
    let call = Attention::bnth();
    let text = refused(&call, &x, &f32s(&[1, 4, 3, 8])?, &x);
    assert_eq!(
        text,
        "invalid call: key has shape [1, 4, 3, 8], expected [2, 4, 3, 8] ([B, K, S, H]; B and H of the query)"
    );
    let text = refused(&call, &x, &f32s(&[2, 3, 2, 8])?, &f32s(&[2, 3, 2, 8])?);
    assert_eq!(text, "invalid call: 4 query heads are not a multiple of 3 key/value heads");
    let (one, three) = (f32s(&[2, 1, 5, 8])?, f32s(&[2, 3, 4, 8])?);
    let text = refused(&call, &one, &three, &three);
    assert_eq!(text, "invalid call: 1 query head is not a multiple of 3 key/value heads");
    // Right for the other order of axes: the error names it.
    let (query, key) = (f32s(&[1, 5, 8, 4])?, f32s(&[1, 12, 2, 4])?);
    let text = refused(&call, &query, &key, &key);
    assert!(
        text.contains(
            "query [1, 5, 8, 4], key [1, 12, 2, 4] and value [1, 12, 2, 4] were read as [B, N, T, H]"
        )
    );
    assert!(text.ends_with("say so with `Attention::btnh()`"), "{text}");
    assert!(Attention::btnh().forward(&query, &key, &key).is_ok());
    let text = refused(&call, &x, &f32s(&[4, 3, 8])?, &x);
    assert!(text.contains("have different ranks"), "{text}");
    let text = refused(&call, &f32s(&[1, 2, 4, 3, 8])?, &x, &x);
    assert_eq!(text, "query has 5 axes (shape [1, 2, 4, 3, 8]), no tensor of a call has more than 4");
    let flat = f32s(&[8])?;
    let text = refused(&call, &flat, &flat, &flat);
    assert!(text.starts_with("invalid call: query has rank 1 (shape [8])"), "{text}");
    let scalar = f32s(&[])?;
    let text = refused(&call, &scalar, &scalar, &scalar);
    assert!(text.starts_with("invalid call: query has rank 0"), "{text}");
    let text = refused(&Attention::bnth().mask(&zeros(&[3, 5], DType::U8)?), &x, &x, &x);
    assert!(text.contains("mask of shape [3, 5] does not broadcast to [2, 4, 3, 3]"), "{text}");
    let text = refused(&Attention::bnth().sinks(&f32s(&[3])?), &x, &x, &x);
    assert!(text.contains("sinks has shape [3], expected [4]"), "{text}");
    let text = refused(&call, &f32s(&[2, 4, 3, 0])?, &f32s(&[2, 4, 3, 0])?, &x);
    assert!(text.contains("head dimension 0"), "{text}");
    Ok(())
}

#[test]
fn wrong_options() -> Result<()> {
    let x = zeros(&[2, 4, 3, 8], DType::F32)?;
    let text = refused(&Attention::bnth().key_value_lengths([3, 4]), &x, &x, &x);
    assert!(text.contains('4') && text.contains('3'), "{text}");
    let lengths = |numbers: &[i64]| Tensor::new(numbers, &Device::Cpu).unwrap();
    let text = refused(&Attention::bnth().query_lengths(lengths(&[3, -1])), &x, &x, &x);
    assert_eq!(
        text,
        "invalid call: query length -1 of batch row 1 is not between 0 and the tensor's length 3"
    );
    let text = refused(&Attention::bnth().query_lengths(lengths(&[3])), &x, &x, &x);
    assert_eq!(text, "invalid call: query lengths has shape [1], expected [2] ([B])");
    let text = refused(&Attention::bnth().query_offsets(&zeros(&[2], DType::F32)?), &x, &x, &x);
    assert_eq!(text, "query offsets has dtype f32, expected u32, i32 or i64");
    let text = refused(&Attention::bnth().dropout_seed(&lengths(&[3])), &x, &x, &x);
    assert!(text.starts_with("invalid call: the call was given dropout seed"), "{text}");
    let text = refused(&Attention::bnth().dropout(Dropout::new(1.0, 0)), &x, &x, &x);
    assert!(text.contains("expected 0 <= rate"), "{text}");
    let text = refused(&Attention::bnth().scale(f64::NAN), &x, &x, &x);
    assert!(text.contains("NaN"), "{text}");
    let text = refused(&Attention::bnth().implementation("abacus"), &x, &x, &x);
    assert!(text.starts_with("no implementation is named 'abacus'; there are: "), "{text}");
    let text = refused(&Attention::bnth().scratch_limit(0), &x, &x, &x);
    assert!(text.contains("no implementation serves: "), "{text}");
    Ok(())
}

/// Shapes are said as the caller has them, whatever the order.
#[test]
fn shapes_are_in_the_order_of_the_call() -> Result<()> {
    let x = zeros(&[2, 4, 3, 8], DType::F32)?;
    let wrong = zeros(&[2, 4, 3, 7], DType::F32)?;
    for (call, axes) in [
        (Attention::bnth(), "[B, K, S, H]; B and H of the query"),
        (Attention::btnh(), "[B, S, K, H]; B and H of the query"),
    ] {
        let text = call.forward(&x, &wrong, &x).unwrap_err().to_string();
        let said = format!("key has shape [2, 4, 3, 7], expected [2, 4, 3, 8] ({axes})");
        assert!(text.contains(&said), "{text}");
        assert!(text.ends_with("\n\"attention, forward\""), "{text}");
    }
    Ok(())
}

#[test]
fn what_fails_backward_is_an_error_of_backward() -> Result<()> {
    /// Serves forward calls.
    use attention::core::{Capabilities, FeatureSet, PassCapabilities};
    #[derive(Debug)]
    struct ForwardOnly(attention::chunked::ChunkedBackend, Capabilities);
    impl attention::core::Delegate for ForwardOnly {
        fn inner(&self) -> &dyn attention::AttentionBackend {
            &self.0
        }
        fn name(&self) -> &str {
            "forward-only"
        }
        fn capabilities(&self) -> &Capabilities {
            &self.1
        }
        fn supports(&self, problem: &attention::Problem) -> std::result::Result<(), attention::Unsupported> {
            self.1.check(self.name(), problem)
        }
        fn scratch_bytes(
            &self,
            problem: &attention::Problem,
        ) -> std::result::Result<usize, attention::Unsupported> {
            self.supports(problem)?;
            self.inner().scratch_bytes(problem)
        }
        fn plan(
            &self,
            problem: &attention::Problem,
        ) -> std::result::Result<std::sync::Arc<dyn attention::core::Plan>, attention::core::Error> {
            self.supports(problem)?;
            self.inner().plan(problem)
        }
    }
    let inner = attention::chunked::ChunkedBackend::default();
    let numerics = attention::AttentionBackend::capabilities(&inner).numerics.clone();
    let capabilities = Capabilities::new(
        attention::DeviceKind::Cpu,
        numerics,
        PassCapabilities::new(FeatureSet::all()),
        attention::core::ScratchGrowth::Linear,
    );
    let backend = std::sync::Arc::new(ForwardOnly(inner, capabilities));
    let x = candle_core::Var::zeros((1, 2, 3, 4), DType::F32, &Device::Cpu)?;
    let out = Attention::bnth().implementation(backend as std::sync::Arc<dyn attention::AttentionBackend>);
    let out = out.forward(&x, &x, &x)?;
    let Err(error) = out.sum_all()?.backward() else { panic!("there is no backward pass") };
    assert!(matches!(cause(&error), Some(Error::Call(_))), "{error}");
    assert!(error.to_string().contains("attention, backward"), "{error}");
    assert!(error.to_string().starts_with("forward-only "), "{error}");
    Ok(())
}
