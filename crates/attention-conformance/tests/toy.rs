//! The toy backend conforms, and the guide that walks through it shows its code.

#[path = "../examples/toy_backend.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod toy_backend;

use attention_conformance::report::{Outcome, html, json, table};
use attention_core::{AttentionBackend, DType, Feature, Pass};
use toy_backend::Toy;

#[test]
fn the_toy_conforms_to_what_it_declares() {
    let reports = attention_conformance::assert_conforms(&Toy::default());
    let suite = &reports[0];
    let (mut passed, mut skipped) = (0, 0);
    for result in &suite.results {
        match &result.outcome {
            Outcome::Passed { .. } => {
                passed += 1;
                assert_eq!((result.dtype, result.pass), (DType::F32, Pass::Forward));
                assert!(!result.features.contains(&Feature::Mask));
            }
            Outcome::Skipped { reason } => {
                skipped += 1;
                assert!(reason.starts_with("toy "), "the reason is the backend's own: {reason}");
            }
            Outcome::Failed { .. } => unreachable!("asserted"),
        }
    }
    assert!(passed > 150, "{passed} passed");
    assert_eq!(passed + skipped, suite.results.len());
    // Everything that people look at can be made of the reports.
    assert!(table(&reports[..1]).to_string().contains("softcap                     skipped"));
    assert!(html(&reports).contains("toy does not take f64 operands"));
    assert!(json(&reports).len() > 1000);
}

#[test]
fn the_toy_reports_as_absent_what_it_lacks() {
    let toy = Toy::default();
    assert!(toy.available().is_ok());
    assert!(toy.capabilities().backward.is_none());
}

/// Every part of the example that the guide quotes is quoted word for word.
#[test]
fn the_guide_shows_the_code_of_the_example() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    // A published crate comes without the guide.
    let guide = std::fs::read_to_string(root.join("../../docs/adding-a-backend.md"))
        .expect("this test needs the repository");
    let example = include_str!("../examples/toy_backend.rs");
    let mut parts = 0;
    for start in example.split("// ANCHOR: ").skip(1) {
        let (name, rest) = start.split_once('\n').unwrap();
        let (code, _) = rest.split_once(&format!("// ANCHOR_END: {name}")).unwrap();
        assert!(guide.contains(code.trim()), "the guide does not show part '{name}' as it is");
        parts += 1;
    }
    assert_eq!(parts, 6);
}
