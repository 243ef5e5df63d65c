//! The number of cases of the conformance suite that the backend refuses, by reason, for each target that it
//! was tested on. If a change of the backend refuses other cases than before, a file here changes. On a GPU
//! of such a kind, the suite runs exactly the cases that are served.
//!
//! `UPDATE_EXPECTED=1 cargo test -p attention-cudnn --test expected` writes the files anew.

use std::collections::BTreeMap;
use std::path::Path;

use attention_conformance::cases;
use attention_core::{AttentionBackend, DType, Device, FeatureSet};
use attention_cudnn::{CudnnBackend, CudnnConfig, Target};

/// The ordinal of a device that no machine has, so that the answers are those for the assumed target.
const NOWHERE: u32 = 4000;

fn answers(target: Target) -> String {
    let config = CudnnConfig::default().device(NOWHERE as usize);
    let backend = CudnnBackend::new(config).assuming(target);
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    for dtype in [DType::F16, DType::Bf16] {
        for case in cases::all().into_iter().chain(cases::of_sequences()) {
            let data = case.data(dtype);
            for &pass in case.passes() {
                let declared =
                    backend.capabilities().pass(pass).map_or(FeatureSet::EMPTY, |pass| pass.features);
                let problem = case.problem(&data, pass, declared).expect("cases are valid");
                let problem = problem.to_builder().device(Device::Cuda(NOWHERE)).build().expect("anywhere");
                let answer = match backend.supports(&problem) {
                    Ok(()) => "served".to_owned(),
                    Err(refusal) => refusal.rule(),
                };
                *counts.entry((pass.to_string(), answer)).or_default() += 1;
            }
        }
    }
    counts.into_iter().map(|((pass, answer), count)| format!("{count:5} {pass}: {answer}\n")).collect()
}

#[test]
fn the_suite_is_served_as_recorded() {
    for (target, file) in [
        (Target::default(), "9.19.0-sm90.txt"),
        (Target { version: [9, 12, 0], capability: (9, 0) }, "9.12.0-sm90.txt"),
        (Target { version: [9, 19, 0], capability: (8, 0) }, "9.19.0-sm80.txt"),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/expected").join(file);
        let got = answers(target);
        if std::env::var_os("UPDATE_EXPECTED").is_some() {
            std::fs::write(&path, got).expect("the folder is there");
            continue;
        }
        let want = std::fs::read_to_string(&path).expect("a recorded file");
        assert_eq!(got, want, "{target}: see the head of this file");
    }
}
