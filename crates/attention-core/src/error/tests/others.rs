//! The errors of backends: each variant's message, with the numbers in it.

use std::collections::HashSet;
use std::error::Error as _;

use super::{assert_all_seen, variants};
use crate::{
    BackendFailure, Capabilities, DType, Device, DeviceKind, Dimensions, Error, Feature, FeatureSet,
    Gradients, InvalidCall, NumericsClass, OutOfMemory, Pass, PassCapabilities, ProblemBuilder,
    ScratchGrowth, Unavailable, Unsupported,
};

variants!(
    Unsupported, UNSUPPORTED, name_of_unsupported:
    Device, DType, Feature, Pass, Limit, ScratchLimit, LentScratch, Numerics, LongSums,
);
variants!(Error, ERRORS, name_of_error: InvalidCall, Unsupported, Unavailable, Backend, OutOfMemory);

fn sized(dtype: DType, head_dim: usize, value_head_dim: usize) -> ProblemBuilder {
    let dims = Dimensions {
        batch: 1,
        query_length: 2,
        key_length: 3,
        query_heads: 4,
        key_heads: 4,
        head_dim,
        value_head_dim,
    };
    dims.problem(dtype)
}

/// A backend of limited means.
fn capabilities() -> Capabilities {
    let forward =
        PassCapabilities::new(FeatureSet::all().without(Feature::Softcap)).with_max_head_dims(128, 96);
    let numerics = [(DType::F32, NumericsClass::F32), (DType::F16, NumericsClass::HalfF32)];
    Capabilities::new(DeviceKind::Cpu, numerics, forward, ScratchGrowth::Constant)
}

#[test]
fn every_unsupported_variant_names_the_limit_and_the_value() {
    let check = |builder: ProblemBuilder| capabilities().check("toy", &builder.build().unwrap()).unwrap_err();
    let problem = || sized(DType::F32, 64, 64);
    let backend = || "toy".to_owned();
    let cases = [
        (check(problem().device(Device::Cuda(3))), "toy works on cpu memory, the call is on cuda:3"),
        (check(sized(DType::F64, 8, 8)), "toy does not take f64 operands, only f32, f16"),
        (check(problem().softcap(true)), "toy does not support softcap in its forward pass"),
        (check(problem().gradients(Gradients::QKV)), "toy has no backward pass"),
        (check(sized(DType::F32, 129, 8)), "toy does not support head dimension 129: it takes at most 128"),
        (
            check(sized(DType::F32, 128, 97)),
            "toy does not support value head dimension 97: it takes at most 96",
        ),
        (
            Unsupported::ScratchLimit { backend: backend(), needed: 4096, limit: 1024 },
            "toy needs 4096 bytes of scratch, the limit is 1024",
        ),
        (
            Unsupported::LentScratch { backend: backend(), device: Device::Cuda(1), needed: 64 },
            "toy lends no scratch, and a call of it needs 64 bytes on cuda:1",
        ),
        (
            Unsupported::Numerics {
                backend: backend(),
                dtype: DType::F32,
                class: NumericsClass::Tf32,
                wanted: NumericsClass::F32,
            },
            "toy computes f32 in class Tf32, class F32 was asked for",
        ),
        (
            Unsupported::LongSums {
                backend: backend(),
                dtype: DType::F16,
                class: NumericsClass::HalfF32,
                what: "keys",
                length: 65,
                limit: 64,
            },
            "toy does not compute f16 in class HalfF32 over 65 keys: its long sums drift, and the class holds \
             for up to 64; asked for by name it serves the call",
        ),
    ];
    let mut seen = HashSet::new();
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
        assert_eq!(format!("{error:?}"), message);
        seen.insert(name_of_unsupported(&error));
    }
    assert_all_seen(UNSUPPORTED, &seen);
}

#[test]
fn capabilities_accept_what_they_declare() {
    let at_the_limits = sized(DType::F16, 128, 96).causal(true).build().unwrap();
    assert_eq!(capabilities().check("toy", &at_the_limits), Ok(()));
    assert_eq!(capabilities().numerics_of(DType::F16), Some(NumericsClass::HalfF32));
    assert_eq!(capabilities().numerics_of(DType::Bf16), None);
    assert_eq!(capabilities().pass(Pass::Forward), Some(&capabilities().forward));
    assert_eq!(capabilities().pass(Pass::Backward), None);
}

#[test]
fn errors_show_their_culprit() {
    let failure = BackendFailure {
        backend: "toy".to_owned(),
        operation: "matrix product".to_owned(),
        source: "out of tea".into(),
    };
    let unavailable = Unavailable {
        backend: "toy".to_owned(),
        what: "libtoy is missing".to_owned(),
        looked_for: vec!["libtoy.so.9".to_owned(), "libtoy.so".to_owned()],
    };
    let unsupported = Unsupported::Pass { backend: "toy".to_owned(), pass: Pass::Backward };
    let no_memory = OutOfMemory { what: "a dropout mask", bytes: 1 << 40 };
    let cases: [(Error, &str); 5] = [
        (InvalidCall::NoGradient.into(), "invalid call: no gradient was asked for"),
        (unsupported.into(), "toy has no backward pass"),
        (unavailable.into(), "toy is not available: libtoy is missing; looked for libtoy.so.9, libtoy.so"),
        (failure.into(), "toy failed in matrix product: out of tea"),
        (no_memory.into(), "no memory for a dropout mask of 1099511627776 bytes"),
    ];
    let mut seen = HashSet::new();
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
        // What a `main` prints that returns the error.
        assert_eq!(format!("{error:?}"), message);
        seen.insert(name_of_error(&error));
        if let Error::Backend(_) = &error {
            assert_eq!(error.source().unwrap().to_string(), "out of tea");
        }
    }
    assert_all_seen(ERRORS, &seen);
}

/// Errors go through `?` into boxed and threaded code, and backends are shared objects.
#[test]
fn errors_and_backends_cross_threads() {
    fn crosses<T: Send + Sync + ?Sized>() -> &'static str {
        std::any::type_name::<T>()
    }
    assert!(crosses::<Error>().ends_with("Error"));
    assert!(crosses::<dyn crate::AttentionBackend>().ends_with("AttentionBackend"));
    let boxed: Box<dyn std::error::Error + Send + Sync> = Error::from(InvalidCall::NoGradient).into();
    assert!(boxed.downcast::<Error>().is_ok());
}
