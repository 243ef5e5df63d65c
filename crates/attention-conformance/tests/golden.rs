//! The golden sets against a right backend, and what is said of sets that are wrong.

mod support;

use std::path::{Path, PathBuf};

use attention_conformance::golden::{GoldenSet, own_sets};
use attention_conformance::report::Outcome;
use attention_core::{DType, Pass};
use support::{Flaw, Naive};

/// f32 operands with f64 in between: what f32 results can be at best.
fn wide() -> Naive {
    Naive { wide: true, ..Naive::new(Flaw::None) }
}

#[test]
fn own_sets_pass() {
    for directory in own_sets() {
        let set = GoldenSet::open(&directory).unwrap();
        assert!(set.len() >= 19 && set.names().len() == set.len());
        let mut seen = 0;
        let report = set.run(&wide(), &DType::FLOATS, None, |_| seen += 1);
        let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{}: {}\n{}", directory.display(), report.totals(), failures.join("\n"));
        assert_eq!(seen, 2 * 4 * set.len());
        // What is skipped says why: inputs that halves cannot hold.
        for result in &report.results {
            if let Outcome::Skipped { reason } = &result.outcome {
                let in_pages = reason.contains("keys in pages have no backward pass");
                let inexact = reason.contains("not exact in half precision");
                assert!(in_pages && result.pass == Pass::Backward || inexact, "{result}");
                assert!(in_pages || matches!(result.dtype, DType::F16 | DType::Bf16));
            }
        }
    }
}

#[test]
fn wrong_backends_fail() {
    for directory in own_sets() {
        let set = GoldenSet::open(&directory).unwrap();
        for dtype in DType::FLOATS {
            let report = set.run(&Naive::new(Flaw::OutputOff(1.05)), &[dtype], Some("0"), |_| {});
            for result in report.results.iter().filter(|result| result.pass == Pass::Forward) {
                // Without keys or queries there is nothing to be wrong.
                let empty = result.case.contains("no_") || result.case.contains("empty");
                assert!(!matches!(result.outcome, Outcome::Passed { .. }) || empty, "{result}");
            }
        }
    }
}

/// A copy of one case of the JAX set whose manifest an edit makes wrong.
struct Copy(PathBuf);

impl Copy {
    fn new(name: &str, edit: impl FnOnce(&mut serde_json::Value)) -> Self {
        let source = &own_sets()[0];
        let directory = std::env::temp_dir().join(format!("attention-golden-{name}-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("cases")).unwrap();
        let text = std::fs::read_to_string(source.join("manifest.json")).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let case = manifest["cases"][0].clone();
        let file = case["file"].as_str().unwrap().to_owned();
        manifest["cases"] = serde_json::json!([case]);
        manifest["n_cases"] = 1.into();
        edit(&mut manifest);
        std::fs::copy(source.join(&file), directory.join(&file)).unwrap();
        std::fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
        Self(directory)
    }

    fn open_error(&self) -> String {
        GoldenSet::open(&self.0).unwrap_err().to_string()
    }

    /// The reason of the first case's failure.
    fn failure(&self) -> String {
        let report = GoldenSet::open(&self.0).unwrap().run(&wide(), &[DType::F64], None, |_| {});
        match &report.results[0].outcome {
            Outcome::Failed { reason, .. } => reason.clone(),
            _ => panic!("{}", report.results[0]),
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn unknown_keys_are_errors() {
    for (name, edit, words) in [
        ("top", (|m| m["novel"] = 1.into()) as fn(&mut serde_json::Value), "unknown field `novel`"),
        ("entry", |m| m["cases"][0]["novel"] = 1.into(), "unknown field `novel`"),
        ("params", |m| m["cases"][0]["params"]["sparsity"] = 2.into(), "unknown field `sparsity`"),
        ("dims", |m| m["cases"][0]["dims"]["Z"] = 2.into(), "unknown field `Z`"),
        (
            "tensor",
            |m| m["cases"][0]["tensors"]["w"] = serde_json::json!(["float32", [1]]),
            "tensor 'w' is unknown",
        ),
        ("format", |m| m["format"] = 4.into(), "format 4 is unknown"),
        ("sequences", |m| m["cases"][0]["params"]["sequences"] = "packed".into(), "are of format 3"),
        ("format-of-another", |m| m["format"] = 3.into(), "do not say how 'sequences' lie"),
        // Whatever else another format has.
        (
            "format-keys",
            |m| {
                m["format"] = 4.into();
                m["novel"] = 1.into();
            },
            "format 4 is unknown",
        ),
        ("count", |m| m["n_cases"] = 2.into(), "n_cases is 2, there are 1"),
        ("rank", |m| m["cases"][0]["rank"] = 5.into(), "rank 5 with layout BTNH"),
        (
            "offset",
            |m| m["cases"][0]["params"]["query_offset"] = "middle".into(),
            "query_offset 'middle' is unknown",
        ),
        ("convention", |m| m["cases"][0]["convention"] = "mean".into(), "convention 'mean' is unknown"),
        ("alibi", |m| m["cases"][0]["params"]["alibi"] = "q".into(), "unknown variant `q`"),
        ("sinks", |m| m["cases"][0]["params"]["sinks"] = true.into(), "params need the tensor 'sinks'"),
        (
            "grads",
            |m| m["cases"][0]["grads"] = serde_json::json!(["dw_f64"]),
            "'dw_f64' is not among the tensors",
        ),
        ("missing", |m| drop(m["cases"][0].as_object_mut().unwrap().remove("dims")), "missing field `dims`"),
    ] {
        let error = Copy::new(name, edit).open_error();
        assert!(error.contains(words), "{name}: {error}");
        assert!(error.contains("manifest.json"), "{error}");
    }
}

#[test]
fn files_that_contradict_the_manifest_fail_their_case() {
    let shape =
        Copy::new("shape", |m| m["cases"][0]["tensors"]["q"] = serde_json::json!(["float32", [1, 2]]));
    assert!(shape.failure().contains("the manifest says float32 [1, 2]"), "{}", shape.failure());
    let dtype = Copy::new("dtype", |m| m["cases"][0]["tensors"]["q"][0] = "float64".into());
    assert!(dtype.failure().contains("the tensor 'q' is F32"), "{}", dtype.failure());
    let dims = Copy::new("dims-file", |m| m["cases"][0]["dims"]["H"] = 99.into());
    assert!(dims.failure().contains("dims and params give"), "{}", dims.failure());
    let missing = Copy::new("missing-file", |m| m["cases"][0]["file"] = "cases/none.safetensors".into());
    assert!(missing.failure().contains("cannot read"), "{}", missing.failure());
    let not = Copy::new("not-safetensors", |m| m["cases"][0]["file"] = "manifest.json".into());
    assert!(not.failure().contains("manifest.json: "), "{}", not.failure());
    let listed = Copy::new("listed", |m| {
        m["cases"][0]["tensors"]["d_lse"] = serde_json::json!(["float32", [1, 8, 2]]);
        m["cases"][0]["params"]["d_lse"] = true.into();
    });
    assert!(
        listed.failure().contains("the tensor 'd_lse' of the manifest is missing"),
        "{}",
        listed.failure()
    );
    // A call that is not what the values were computed for.
    let causal = Copy::new("causal", |m| m["cases"][0]["params"]["is_causal"] = true.into());
    assert!(causal.failure().contains("out of bounds"), "{}", causal.failure());
}

#[test]
fn a_directory_without_a_manifest_is_an_error() {
    let error = GoldenSet::open(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read /nonexistent"), "{error}");
}
