//! Which implementation runs, which are refused, and the reasons given.

use std::sync::Arc;

use attention::core::{Alignment, SumLimit};
use attention::{
    Attention, AttentionBackend, Cause, Choice, DType, DeviceKind, Dimensions, Error, Gradients,
    Implementation, NumericsClass, Pass, Problem, Reason, Refusal, Registry, Tensor, Unsupported, Verdict,
};

use crate::support::{Toy, registry};

fn x() -> Tensor {
    Tensor::zeros::<f32>([1, 2, 2, 4]).unwrap()
}

fn problem() -> Problem {
    let dims = Dimensions {
        batch: 1,
        query_length: 2,
        key_length: 2,
        query_heads: 2,
        key_heads: 2,
        head_dim: 4,
        value_head_dim: 4,
    };
    dims.problem(DType::F32).build().unwrap()
}

/// One of each kind that an automatic choice passes over, then two that serve.
fn crowd() -> Registry {
    let mut narrow = Toy::new("narrow");
    narrow.capabilities.forward.max_head_dim = Some(2);
    registry([
        Toy::new("gpu").device(DeviceKind::Cuda).arc(),
        Toy::new("lib").missing("libtoy is missing", &["libtoy.so.1", "libtoy.so"]).arc(),
        Toy::new("tf32").numerics(&[(DType::F32, NumericsClass::Tf32)]).arc(),
        Toy::new("half").numerics(&[(DType::F16, NumericsClass::HalfF32)]).arc(),
        narrow.arc(),
        Toy::new("hungry").scratch(1001).arc(),
        Toy::new("first").scratch(1000).arc(),
        Toy::new("second").arc(),
    ])
}

const REFUSALS: [(&str, Cause, &str); 6] = [
    ("gpu", Cause::Device, "gpu works on cuda memory, the call is on cpu"),
    ("lib", Cause::Unavailable, "lib is not available: libtoy is missing; looked for libtoy.so.1, libtoy.so"),
    ("tf32", Cause::Numerics, "tf32 computes f32 in class Tf32, class F32 was asked for"),
    ("half", Cause::Unsupported, "half does not take f32 operands, only f16"),
    ("narrow", Cause::Unsupported, "narrow does not support head dimension 4: it takes at most 2"),
    ("hungry", Cause::ScratchLimit, "hungry needs 1001 bytes of scratch, the limit is 1000"),
];

#[test]
fn auto_takes_the_first_that_serves() {
    let registry = crowd();
    let call = Attention::new().registry(&registry).scratch_limit(1000);
    let selection = call.plan(&problem()).unwrap();
    assert_eq!(selection.backend().name(), "first");
    assert_eq!(selection.reason(), Reason::FirstInOrder);
    assert_eq!((selection.numerics(), selection.scratch_bytes()), (NumericsClass::F32, 1000));
    // Without the limit, the hungry one is first.
    let call = call.scratch_limit(None);
    assert_eq!(call.plan(&problem()).unwrap().backend().name(), "hungry");
    assert!(call.forward(&x(), &x(), &x()).is_ok());
}

#[test]
fn an_explanation_has_every_verdict_and_reason() {
    let registry = crowd();
    let explanation =
        Attention::new().registry(&registry).scratch_limit(1000).explain(&x(), &x(), &x()).unwrap();
    for (name, cause, reason) in REFUSALS {
        let candidate = explanation.candidate(name).unwrap();
        assert_eq!(candidate.verdict, Verdict::Refused(cause), "{name}");
        assert_eq!(candidate.reason, reason);
    }
    let chosen = explanation.chosen().unwrap();
    assert_eq!((chosen.name.as_str(), chosen.verdict), ("first", Verdict::Chosen(Reason::FirstInOrder)));
    assert_eq!(explanation.candidate("second").unwrap().verdict, Verdict::Eligible);
    let expected = "\
forward f32 B1 T2 S2 N2 K2 H4 on cpu
asked for: auto, with at most 1000 B of scratch
implementation  version  device  verdict   class  scratch  reason
--------------  -------  ------  --------  -----  -------  --------------------------------------------------------------------------
gpu             1.2.3    cuda    refused   F32    -        gpu works on cuda memory, the call is on cpu
lib             1.2.3    cpu     refused   F32    -        lib is not available: libtoy is missing; looked for libtoy.so.1, libtoy.so
tf32            1.2.3    cpu     refused   Tf32   -        tf32 computes f32 in class Tf32, class F32 was asked for
half            1.2.3    cpu     refused   -      -        half does not take f32 operands, only f16
narrow          1.2.3    cpu     refused   F32    -        narrow does not support head dimension 4: it takes at most 2
hungry          1.2.3    cpu     refused   F32    -        hungry needs 1001 bytes of scratch, the limit is 1000
first           1.2.3    cpu     chosen    F32    1000 B   the first in order of preference that serves the problem
second          1.2.3    cpu     eligible  F32    0 B      first comes before it";
    assert_eq!(explanation.to_string(), expected);
}

#[test]
fn a_named_one_runs_or_fails_with_its_reason() {
    let registry = crowd();
    let named =
        |name: &'static str| Attention::new().registry(&registry).scratch_limit(1000).implementation(name);
    for (name, cause, reason) in REFUSALS {
        match cause {
            // Asked for by name, a class is the caller's own decision.
            Cause::Numerics => assert!(named(name).forward(&x(), &x(), &x()).is_ok()),
            _ => assert_eq!(named(name).forward(&x(), &x(), &x()).unwrap_err().to_string(), reason),
        }
    }
    let error = named("lib").forward(&x(), &x(), &x()).unwrap_err();
    assert!(matches!(error, Error::Core(attention::core::Error::Unavailable(_))));
    let error = named("gpu").forward(&x(), &x(), &x()).unwrap_err();
    assert!(matches!(error, Error::Core(attention::core::Error::Unsupported(Unsupported::Device { .. }))));
    assert_eq!(named("second").plan(&problem()).unwrap().reason(), Reason::Named);
    let error = named("abacus").forward(&x(), &x(), &x()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no implementation is named 'abacus'; there are: gpu, lib, tf32, half, narrow, hungry, first, second"
    );
    // What it says in a table: the others would serve, and were not asked for.
    let explanation = named("abacus").explain_problem(&problem());
    assert_eq!((explanation.chosen(), explanation.asked_for.as_str()), (None, "abacus"));
    assert_eq!(explanation.candidates[0].verdict, Verdict::Refused(Cause::NotRegistered));
    assert_eq!(explanation.candidate("second").unwrap().reason, "not asked for");
    assert_eq!(explanation.candidates.len(), 9);
}

/// A slip of the pen is an error wherever it stands: what comes after it is not what the caller prefers.
#[test]
fn a_name_that_nothing_has_is_an_error_in_a_list_too() {
    let registry = registry([Toy::new("toy").arc(), Toy::new("own").arc()]);
    let call = Attention::new().registry(&registry);
    let deep = Implementation::Prefer(vec!["toy".into(), Implementation::from(["own", "chunkd"])]);
    for list in [Implementation::from(["chunkd", "toy"]), ["toy", "chunkd"].into(), deep] {
        let call = call.clone().implementation(list);
        let error = call.forward(&x(), &x(), &x()).unwrap_err();
        assert_eq!(error.to_string(), "no implementation is named 'chunkd'; there are: toy, own");
        assert!(matches!(error, Error::UnknownImplementation { .. }));
        // An explanation says the same of the call.
        let explanation = call.explain_problem(&problem());
        assert_eq!((explanation.chosen(), &explanation.choice), (None, &None));
        assert_eq!(explanation.candidate("chunkd").unwrap().verdict, Verdict::Refused(Cause::NotRegistered));
        let toy = explanation.candidate("toy").unwrap();
        assert_eq!(toy.verdict, Verdict::Eligible);
        assert_eq!(toy.reason, "the call fails: no implementation is named 'chunkd'; there are: toy, own");
    }
}

/// A name of this library's is none of a slip: alone it is told which feature it needs, and in a list it is
/// passed over.
#[test]
fn a_name_of_this_library_that_is_not_here_is_told_its_feature() {
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    for (name, feature, built) in [
        ("chunked", "chunked", cfg!(feature = "chunked")),
        ("cpu", "cpu", cfg!(feature = "cpu")),
        ("cudnn", "cuda", cfg!(feature = "cuda")),
        ("chunked-cuda", "cuda", cfg!(feature = "cuda")),
    ] {
        let alone = call.clone().implementation(name);
        let error = alone.forward(&x(), &x(), &x()).unwrap_err();
        let (text, cause) = if built {
            (format!("no implementation is named '{name}'; there are: toy"), Cause::NotRegistered)
        } else {
            let text = format!(
                "implementation '{name}' is not in this build: feature `{feature}` of the crate `attention` adds it; there \
                 are: toy"
            );
            (text, Cause::NotBuilt)
        };
        assert_eq!(error.to_string(), text);
        let explanation = alone.explain_problem(&problem());
        assert_eq!(explanation.candidates[0].verdict, Verdict::Refused(cause));
        let listed = call.clone().implementation([name, "toy"]);
        let selection = listed.plan(&problem()).unwrap();
        assert_eq!(selection.backend().name(), "toy");
        assert_eq!(Cause::from(&selection.passed_over()[0]), cause);
        assert_eq!(listed.explain_problem(&problem()).chosen().unwrap().name, "toy");
        let stored = Choice::Implementation {
            name: name.to_owned(),
            version: None,
            dtype: DType::F32,
            numerics: NumericsClass::F32,
        };
        assert_eq!(registry.resolve(&stored).unwrap_err().to_string(), text);
    }
}

#[test]
fn an_empty_list_is_said_to_be_empty() {
    let registry = registry([Toy::new("toy").arc()]);
    let nested = Implementation::Prefer(vec![Implementation::Prefer(vec![])]);
    for list in [Implementation::Prefer(vec![]), Vec::<&str>::new().into(), nested] {
        let call = Attention::new().registry(&registry).implementation(list);
        let error = call.forward(&x(), &x(), &x()).unwrap_err();
        assert_eq!(error.to_string(), "the list of implementations is empty; there are: toy");
        let explanation = call.explain_problem(&problem());
        assert!(explanation.asked_for.ends_with("an empty list"), "{explanation}");
        assert_eq!(explanation.chosen(), None);
    }
}

#[test]
fn a_class_holds_for_every_way_of_asking() {
    let registry = crowd();
    let call = Attention::new().registry(&registry);
    let tf32 = call.clone().numerics(NumericsClass::Tf32);
    let selection = tf32.plan(&problem()).unwrap();
    assert_eq!((selection.backend().name(), selection.reason()), ("tf32", Reason::FirstOfClass));
    let by_class = call.clone().implementation(NumericsClass::Tf32);
    assert_eq!(by_class.plan(&problem()).unwrap().backend().name(), "tf32");
    let error = tf32.clone().implementation("first").plan(&problem()).unwrap_err();
    assert_eq!(error.to_string(), "first computes f32 in class F32, class Tf32 was asked for");
    let error = by_class.numerics(NumericsClass::F32).plan(&problem()).unwrap_err();
    assert!(matches!(error, Error::NoImplementation { .. }));
    let explanation = tf32.explain_problem(&problem());
    assert!(explanation.to_string().contains("asked for: auto, in class Tf32\n"), "{explanation}");
}

#[test]
fn a_list_goes_in_order_and_no_further() {
    let registry = crowd();
    let call = Attention::new().registry(&registry);
    let listed = call.clone().implementation(["cudnn", "gpu", "second", "first"]);
    let selection = listed.plan(&problem()).unwrap();
    assert_eq!((selection.backend().name(), selection.reason()), ("second", Reason::Preferred(3)));
    let explanation = listed.explain_problem(&problem());
    assert_eq!(
        explanation.chosen().unwrap().reason,
        "number 3 of the caller's list, the first that serves the problem"
    );
    assert_eq!(explanation.asked_for, "the first of cudnn, gpu, second, first");
    assert_eq!(explanation.candidate("first").unwrap().reason, "second comes before it");
    assert_eq!(explanation.candidate("hungry").unwrap().reason, "not asked for");

    let error = call.clone().implementation(vec!["gpu", "narrow"]).plan(&problem()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no implementation serves: forward f32 B1 T2 S2 N2 K2 H4 on cpu\n  gpu works on cuda memory, the call is on \
         cpu\n  narrow does not support head dimension 4: it takes at most 2"
    );
    let Error::NoImplementation { refusals, .. } = error else { unreachable!() };
    assert!(matches!(&refusals[1], Refusal::Unsupported(Unsupported::Limit { .. })));
    // Anything can be in the list, an automatic choice too.
    let toy: Arc<dyn AttentionBackend> = Toy::new("own").device(DeviceKind::Cuda).arc();
    let mixed = vec![Implementation::from(toy), Implementation::Auto];
    let selection = call.implementation(Implementation::Prefer(mixed)).plan(&problem()).unwrap();
    assert_eq!((selection.backend().name(), selection.reason()), ("hungry", Reason::Preferred(2)));
}

/// Two values of one name and two configurations are two candidates; the same value is one, however often it
/// is named.
#[test]
fn a_list_may_hold_one_name_twice() {
    let registry = registry([Toy::new("toy").scratch(500).arc()]);
    let (large, small) = (Toy::new("toy").scratch(2000).arc(), Toy::new("toy").scratch(10).arc());
    let list = vec![Implementation::from(large), Implementation::from(small), "toy".into(), "toy".into()];
    let call = Attention::new().registry(&registry).scratch_limit(1000).implementation(list);
    assert_eq!(call.plan(&problem()).unwrap().scratch_bytes(), 10);
    let explanation = call.explain_problem(&problem());
    let scratch: Vec<_> = explanation.candidates.iter().map(|candidate| candidate.scratch_bytes).collect();
    assert_eq!(scratch, [None, Some(10), Some(500)]);
    assert_eq!(explanation.chosen().unwrap().scratch_bytes, Some(10));

    // Asked in two classes, it has two verdicts.
    let classes = [NumericsClass::Tf32, NumericsClass::F32];
    let call = Attention::new().registry(&registry).implementation(classes);
    let explanation = call.explain_problem(&problem());
    assert_eq!(explanation.candidates.len(), 2);
    assert_eq!(explanation.chosen().unwrap().verdict, Verdict::Chosen(Reason::Preferred(2)));
}

#[test]
fn calls_and_errors_cross_threads() {
    fn sendable<T: Send + Sync>() {}
    sendable::<(Attention<'static>, Registry, Error, attention::AttentionPlan, attention::Explanation, Tensor)>(
    );
}

#[test]
fn a_third_party_joins_by_value() {
    let own = Toy::new("own").arc();
    // Without joining: given as it is.
    let exactly = Attention::new().implementation(own.clone());
    assert_eq!(exactly.plan(&problem()).unwrap().reason(), Reason::Given);
    exactly.forward(&x(), &x(), &x()).unwrap();
    assert_eq!(own.runs(), 1);
    let explanation = exactly.explain_problem(&problem());
    assert_eq!(explanation.asked_for, "exactly own 1.2.3");
    assert_eq!(explanation.chosen().unwrap().reason, "given by the caller");
    // Its refusal is the call's error.
    let gpu = Toy::new("gpu").device(DeviceKind::Cuda).arc();
    let error = Attention::new().implementation(gpu).forward(&x(), &x(), &x()).unwrap_err();
    assert_eq!(error.to_string(), "gpu works on cuda memory, the call is on cpu");

    // Joined: found by name, and automatically where it comes first.
    let registry = Registry::default().with(own.clone());
    assert_eq!(registry.names().last().map(String::as_str), Some("own"));
    let call = Attention::new().registry(&registry).implementation(String::from("own"));
    assert_eq!(call.plan(&problem()).unwrap().backend().name(), "own");
    let registry = Registry::default().with_preferred(own);
    let selection = Attention::new().registry(&registry).plan(&problem()).unwrap();
    assert_eq!(selection.backend().name(), "own");
}

#[test]
fn a_name_stands_for_one_implementation() {
    let mut registry = registry([Toy::new("a").arc(), Toy::new("b").arc()]);
    let mut configured = Toy::new("a");
    configured.version = "2".to_owned();
    let replaced = registry.register(configured.arc()).unwrap();
    assert_eq!(replaced.version(), "1.2.3");
    assert_eq!(registry.get("a").unwrap().version(), "2");
    assert_eq!(registry.names(), ["a", "b"]);
    assert_eq!(registry.clone().with_preferred(Toy::new("b").arc()).names(), ["b", "a"]);
    assert!(registry.get("c").is_none());
    assert_eq!(registry.backends().len(), 2);
}

#[test]
fn scratch_is_given_as_asked_for() {
    // The toy checks that it gets what it asked for.
    for bytes in [0, 1, 64, 100_000] {
        let registry = registry([Toy::new("toy").scratch(bytes).arc()]);
        Attention::new().registry(&registry).forward(&x(), &x(), &x()).unwrap();
        Attention::new().registry(&registry).backward_recompute(&x(), &x(), &x(), &x()).unwrap();
    }
    let registry = registry([Toy::new("toy").scratch(usize::MAX / 2).arc()]);
    let error = Attention::new().registry(&registry).forward(&x(), &x(), &x()).unwrap_err();
    assert_eq!(error.to_string(), format!("no memory for scratch of {} bytes", usize::MAX / 2));
    let error = Attention::new()
        .registry(&registry)
        .scratch_limit(1 << 30)
        .implementation("toy")
        .forward(&x(), &x(), &x())
        .unwrap_err();
    assert!(error.to_string().ends_with("bytes of scratch, the limit is 1073741824"), "{error}");
}

#[test]
fn a_choice_moves_to_another_machine_or_says_why_not() {
    let here = registry([Toy::new("fast").arc(), Toy::new("toy").arc()]);
    let call = Attention::new().registry(&here);
    let choice = call.plan(&problem()).unwrap().choice();
    assert_eq!(
        choice,
        Choice::Implementation {
            name: "fast".to_owned(),
            version: Some("1.2.3".to_owned()),
            dtype: DType::F32,
            numerics: NumericsClass::F32,
        }
    );
    assert_eq!(call.explain_problem(&problem()).choice, Some(choice.clone()));
    assert_eq!(
        call.clone()
            .implementation(here.resolve(&choice).unwrap())
            .plan(&problem())
            .unwrap()
            .backend()
            .name(),
        "fast"
    );

    let without = registry([Toy::new("toy").arc()]);
    let error = without.resolve(&choice).unwrap_err();
    assert_eq!(error.to_string(), "no implementation is named 'fast'; there are: toy");
    let other_class = registry([Toy::new("fast").numerics(&[(DType::F32, NumericsClass::Tf32)]).arc()]);
    let error = other_class.resolve(&choice).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the stored choice has fast computing f32 in class F32, here it computes in class Tf32"
    );
    let other_dtype = registry([Toy::new("fast").numerics(&[(DType::F64, NumericsClass::F64)]).arc()]);
    let error = other_dtype.resolve(&choice).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the stored choice has fast computing f32 in class F32, here fast does not take f32"
    );
    let mut newer = Toy::new("fast");
    newer.version = "2.0.0".to_owned();
    let newer = registry([newer.arc()]);
    let error = newer.resolve(&choice).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the stored choice is for fast 1.2.3, here is version 2.0.0 (a choice without a version takes any)"
    );
    assert!(newer.resolve(&choice.any_version()).is_ok());
}

#[test]
fn a_stored_class_takes_any_of_that_class() {
    let choice = Choice::Numerics(NumericsClass::F32);
    assert_eq!(choice.numerics(), NumericsClass::F32);
    let tf32 = || Toy::new("tf32").numerics(&[(DType::F32, NumericsClass::Tf32)]).arc();
    let here = registry([tf32(), Toy::new("toy").arc()]);
    let call = Attention::new().registry(&here).implementation(here.resolve(&choice).unwrap());
    assert_eq!(call.plan(&problem()).unwrap().backend().name(), "toy");
    let error = registry([tf32()]).resolve(&choice).unwrap_err();
    assert_eq!(error.to_string(), "no implementation here computes in class F32; there are: tf32");
}

#[test]
fn the_default_registry_has_what_the_features_say() {
    let names: Vec<&str> = [
        ("chunked", cfg!(feature = "chunked")),
        ("cpu", cfg!(feature = "cpu")),
        ("cudnn", cfg!(feature = "cuda")),
        ("chunked-cuda", cfg!(feature = "cuda")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect();
    assert_eq!(Registry::shared().names(), names);
    let explanation = attention::explain(&problem());
    let Some(chosen) = explanation.chosen() else {
        let on_host = names.iter().find(|name| ["chunked", "cpu"].contains(name));
        return assert_eq!(on_host, None, "{explanation}");
    };
    assert!(names.contains(&&*chosen.name));
    assert_eq!(chosen.numerics, Some(NumericsClass::F32));
}

/// With CUDA in the build, calls on host memory go where they went, and calls on device memory to a backend
/// for it or nowhere.
#[test]
#[cfg(feature = "cuda")]
fn cuda_takes_device_memory_alone() {
    use attention::Device;

    let desc = attention::TensorDesc::contiguous(DType::Bf16, [1, 64, 2, 64]);
    let on = |device: Device| attention::Problem::builder(desc, desc, desc).device(device).build().unwrap();
    let host = attention::explain(&on(Device::Cpu));
    assert!(host.chosen().is_none_or(|chosen| !["cudnn", "chunked-cuda"].contains(&&*chosen.name)), "{host}");
    assert!(host.to_string().contains("cudnn works on cuda memory, the call is on cpu"), "{host}");
    let device = attention::explain(&on(Device::Cuda(0)));
    match device.chosen() {
        Some(chosen) => assert!(["cudnn", "chunked-cuda"].contains(&&*chosen.name), "{device}"),
        None => assert!(device.to_string().contains("cudnn is not available"), "{device}"),
    }
}

/// One query over a cache, without an offset: it sees the first key alone, and what is printed says so.
#[test]
fn an_explanation_tells_of_keys_that_a_causal_call_hides() {
    let desc = |length| attention::TensorDesc::contiguous(DType::F32, [1, length, 1, 8]);
    let problem = |alignment| {
        let problem = Problem::builder(desc(1), desc(12), desc(12)).causal(true);
        problem.alignment(alignment).build().unwrap()
    };
    let explanation = attention::explain(&problem(Alignment::TopLeft));
    assert_eq!(explanation.notes.len(), 1);
    assert!(explanation.notes[0].contains("hides the last 11 keys from every query row"), "{explanation}");
    assert!(
        explanation.to_string().contains("\nnote: the call is causal with T = 1, S = 12"),
        "{explanation}"
    );
    let meant = attention::explain(&problem(Alignment::BottomRight));
    assert!(meant.notes.is_empty() && !meant.to_string().contains("note:"), "{meant}");

    // By lengths, it is for each call to say.
    let (query, keys) =
        (Tensor::zeros::<f32>([1, 1, 1, 8]).unwrap(), Tensor::zeros::<f32>([1, 12, 1, 8]).unwrap());
    let call = |length| Attention::new().causal(true).key_value_lengths([length]);
    let explanation = call(5).explain(&query, &keys, &keys).unwrap();
    assert!(explanation.notes[0].contains("hides the last 4 keys from every query row"), "{explanation}");
    assert!(call(5).explain_problem(&explanation.problem).notes.is_empty());
    assert!(call(1).explain(&query, &keys, &keys).unwrap().notes.is_empty());
}

/// Long calls go to the memory-efficient implementation, whatever else there is.
#[test]
#[cfg(all(feature = "chunked", feature = "cpu"))]
fn long_calls_go_to_chunked() {
    let desc = attention::TensorDesc::contiguous(DType::Bf16, [1, 4096, 8, 64]);
    for causal in [false, true] {
        let problem = attention::Problem::builder(desc, desc, desc).causal(causal);
        let forward = problem.clone().build().unwrap();
        let backward = problem.gradients(attention::Gradients::QKV).build().unwrap();
        for problem in [forward, backward] {
            let explanation = attention::explain(&problem);
            assert_eq!(explanation.chosen().unwrap().name, "chunked", "{explanation}");
        }
    }
}

#[test]
#[cfg(not(any(feature = "chunked", feature = "cpu", feature = "cuda")))]
fn a_build_without_features_has_no_implementation() {
    assert!(Registry::shared().names().is_empty());
    let text = attention::explain(&problem()).to_string();
    assert!(text.ends_with("no implementation is registered"), "{text}");
}

/// An implementation whose class holds for rows of up to 64 keys and for 32 query rows in backward, before
/// one without a limit; and a problem of so many query rows and keys.
fn with_sum_limits() -> (Registry, impl Fn(usize, usize, Pass) -> Problem) {
    let mut drifting = Toy::new("drifting").numerics(&[(DType::F16, NumericsClass::HalfF32)]);
    drifting.capabilities = drifting.capabilities.with_sum_limits([SumLimit::new(DType::F16, 64, 32)]);
    let exact = Toy::new("exact").numerics(&[(DType::F16, NumericsClass::HalfF32)]);
    let problem = |query_length, key_length, pass| {
        let dims = Dimensions { query_length, key_length, ..problem().dims() };
        let builder = dims.problem(DType::F16);
        match pass {
            Pass::Forward => builder.build(),
            Pass::Backward => builder.gradients(Gradients::QKV).build(),
        }
        .unwrap()
    };
    (registry([drifting.arc(), exact.arc()]), problem)
}

#[test]
fn auto_does_not_leave_the_class_for_long_sums() {
    let (registry, problem) = with_sum_limits();
    let auto = Attention::new().registry(&registry);
    for (queries, keys, pass, name) in [
        (1000, 64, Pass::Forward, "drifting"),
        (1000, 65, Pass::Forward, "exact"),
        (32, 64, Pass::Backward, "drifting"),
        (33, 64, Pass::Backward, "exact"),
        (32, 65, Pass::Backward, "exact"),
    ] {
        let problem = problem(queries, keys, pass);
        assert_eq!(auto.plan(&problem).unwrap().backend().name(), name, "{problem}");
        let explanation = auto.explain_problem(&problem);
        assert_eq!(explanation.chosen().unwrap().name, name, "{problem}");
        assert!(explanation.notes.is_empty());
    }
    let explanation = auto.explain_problem(&problem(1, 65, Pass::Forward));
    let passed_over = explanation.candidate("drifting").unwrap();
    assert_eq!(passed_over.verdict, Verdict::Refused(Cause::Numerics));
    assert_eq!(
        passed_over.reason,
        "drifting does not compute f16 in class HalfF32 over 65 keys: its long sums drift, and the class holds \
         for up to 64; asked for by name it serves the call"
    );
}

#[test]
fn a_name_serves_long_sums_and_a_class_refuses_them_with_the_numbers() {
    let (registry, problem) = with_sum_limits();
    let long = problem(33, 65, Pass::Backward);
    let named = Attention::new().registry(&registry).implementation("drifting");
    assert_eq!(named.plan(&long).unwrap().reason(), Reason::Named);
    let explanation = named.explain_problem(&long);
    assert_eq!(explanation.chosen().unwrap().name, "drifting");
    assert!(matches!(&explanation.notes[..], [note] if note.contains("over 65 keys")), "{explanation}");
    let both = named.numerics(NumericsClass::HalfF32);
    let error = both.plan(&long).unwrap_err();
    let Some(&Unsupported::LongSums { dtype, class, what, length, limit, .. }) = error.unsupported() else {
        panic!("{error}")
    };
    assert_eq!((dtype, class), (DType::F16, NumericsClass::HalfF32));
    assert_eq!((what, length, limit), ("keys", 65, 64));
    let error = both.plan(&problem(33, 64, Pass::Backward)).unwrap_err();
    assert!(error.to_string().contains("over 33 query rows"), "{error}");
    assert!(both.plan(&problem(32, 64, Pass::Backward)).is_ok());
}
