use attention_core::{DType, Feature, Pass, Role, VariantRuns};

use super::*;

fn report() -> Report {
    let result = |case: &str, features: Vec<Feature>, outcome: Outcome| CaseResult {
        case: case.to_owned(),
        dtype: DType::F32,
        pass: Pass::Forward,
        features,
        outcome,
        ms: 0.5,
    };
    let difference = Difference {
        tensor: Role::Out,
        index: vec![0, 1, 2, 3],
        got: f64::NAN,
        want: f64::NEG_INFINITY,
        bound: 0.0,
    };
    Report {
        backend: "<toy>".to_owned(),
        version: "1".to_owned(),
        about: About {
            started: "2026-03-21T14:05:09Z".to_owned(),
            machine: "one <processor>".to_owned(),
            command: "run --filter causal".to_owned(),
            filters: vec!["names that contain 'causal'".to_owned()],
            ..About::default()
        },
        variants: Some(vec![
            VariantRuns { name: "tile".to_owned(), listed: true, runs: 3 },
            VariantRuns { name: "merge".to_owned(), listed: true, runs: 0 },
            VariantRuns { name: "new".to_owned(), listed: false, runs: 1 },
        ]),
        results: vec![
            result("a", vec![], Outcome::Passed { worst: 0.25, tensor: Some(Role::Out) }),
            result("b", vec![Feature::Causal], Outcome::Passed { worst: 0.5, tensor: Some(Role::Lse) }),
            result(
                "c",
                vec![Feature::Mask],
                Outcome::Failed {
                    reason: "1 of 9 elements are out of bounds".into(),
                    differences: vec![difference],
                },
            ),
            result("d", vec![Feature::Sinks], Outcome::Skipped { reason: "no sinks".into() }),
        ],
    }
}

#[test]
fn the_closing_line_counts() {
    let totals = report().totals() + report().totals();
    assert_eq!(totals.to_string(), "4 passed, 2 failed, 2 skipped");
}

#[test]
fn the_table_shows_worst_failed_skipped_and_absent() {
    let table = table(&[report()]);
    let cell = |name: &str| table.rows.iter().find(|row| row[0] == name).map(|row| row[1].clone()).unwrap();
    assert_eq!(cell("none"), "0.250");
    assert_eq!(cell("causal"), "0.500");
    assert_eq!(cell("mask"), "1 FAILED");
    assert_eq!(cell("sinks"), "skipped");
    assert_eq!(cell("bias"), "-");
    let text = table.to_string();
    assert!(text.starts_with("feature") && text.contains("\ncausal  "), "{text}");
}

#[test]
fn json_reads_back_with_numbers_that_json_lacks() {
    let text = json(&[report()]);
    assert!(text.contains("\"NaN\"") && text.contains("\"outcome\": \"failed\""), "{text}");
    let back: Vec<Report> = serde_json::from_str(&text).unwrap();
    assert_eq!(back[0].results[3], report().results[3]);
    let Outcome::Failed { differences, .. } = &back[0].results[2].outcome else { panic!() };
    assert!(differences[0].got.is_nan() && differences[0].want == f64::NEG_INFINITY);
}

#[test]
fn the_page_is_whole_and_escaped() {
    let page = html(&[report()]);
    assert!(page.contains("<svg") && page.contains("&lt;toy&gt;") && !page.contains("<toy>"));
    assert!(page.contains("2 passed, 1 failed, 1 skipped"));
    assert!(!page.contains("http://") || page.matches("http://").count() == 1, "only the SVG namespace");
}

#[test]
fn failures_list_their_elements() {
    let text = report().failures().next().unwrap().to_string();
    assert_eq!(
        text,
        "c f32 forward: FAILED, 1 of 9 elements are out of bounds\n    out[0, 1, 2, 3]: got NaN, want -inf within 0.000e0"
    );
}

#[test]
fn what_was_not_run_is_named() {
    let fault = uncovered(&[report()]).unwrap();
    assert_eq!(
        fault,
        "1 of its variants were not run: merge; 1 variants were run that it does not list: new"
    );
    // Another run of the same backend may have run it.
    let mut other = report();
    other.variants = Some(vec![VariantRuns { name: "merge".to_owned(), listed: true, runs: 2 }]);
    assert_eq!(uncovered(&[report(), other]).unwrap(), "1 variants were run that it does not list: new");
    let mut skipped = report();
    skipped.results.retain(|result| matches!(result.outcome, Outcome::Skipped { .. }));
    assert_eq!(uncovered(&[skipped]), None, "no case was run");
    let none = Report { variants: None, ..report() };
    assert_eq!(uncovered(std::slice::from_ref(&none)), None);
    assert!(html(&[none]).contains("&lt;toy&gt; lists no variants"));
    let text = coverage(&[report()]).to_string();
    assert!(text.contains("merge    NOT RUN") && text.contains("new      1, NOT LISTED"), "{text}");
}

#[test]
fn a_filtered_run_says_so_and_where_it_was_made() {
    let page = html(&[report(), report()]);
    assert_eq!(page.matches("names that contain 'causal'").count(), 1, "the same for both");
    for part in [
        "2026-03-21T14:05:09Z",
        "one &lt;processor&gt;",
        "run --filter causal",
        "merge<td class=\"bad\">NOT RUN",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let text = json(&[report()]);
    assert!(text.contains("\"filters\": [\n        \"names that contain 'causal'\""), "{text}");
}
