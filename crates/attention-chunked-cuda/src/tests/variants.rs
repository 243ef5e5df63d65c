//! The list of variants, beside what plans choose and what the suite reaches.

use std::collections::BTreeSet;

use attention_conformance::cases;
use attention_core::{AttentionBackend, DType, FeatureSet, Pass};

use super::{AMPERE, HOPPER, SMALL, every_kind_of_problem, on_device, problems};
use crate::ChunkedCudaBackend;
use crate::launches::Launches;
use crate::tiles::{Machine, Shape};
use crate::variants::variants;

#[test]
fn every_variant_that_a_plan_chooses_is_listed() {
    for machine in [SMALL, AMPERE, HOPPER, Machine { tf32_split: false, warpgroups: false, ..HOPPER }] {
        let listed = variants(machine);
        for problem in every_kind_of_problem() {
            let plan = Launches::of(&problem, machine).unwrap();
            // The backend refuses the others.
            if plan.kernels.iter().any(|kernel| kernel.shared_bytes > machine.shared_bytes) {
                continue;
            }
            for kernel in &plan.kernels {
                for name in [kernel.axes(&plan), vec![kernel.variant(&plan)]].concat() {
                    assert!(listed.contains(&name), "{problem} on {machine:?}: {name}");
                }
            }
        }
        assert!((40..900).contains(&listed.len()), "{}: {listed:#?}", listed.len());
    }
}

/// Every kernel's names in the plans of the suite's cases are listed, and every name that is listed is that of
/// some plan: for Hopper in the configurations that docs/gpu-runs/run.sh runs, and for other devices.
#[test]
fn every_variant_that_is_listed_is_chosen_by_a_case_of_the_suite() {
    let plain = Machine { warpgroups: false, tf32_split: false, ..HOPPER };
    let machines = [
        HOPPER,
        Machine { tf32_split: false, ..HOPPER },
        Machine { warpgroups: false, ..HOPPER },
        plain,
        AMPERE,
        SMALL,
        Machine { tf32_split: false, ..SMALL },
    ];
    let backend = ChunkedCudaBackend::default();
    let listed = machines.map(variants);
    let mut missing = listed.clone();
    // What the script runs of the second and the third machine, beside all of the first: these families, in
    // the dtypes that are computed otherwise there.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/gpu-runs/run.sh");
    let script = std::fs::read_to_string(script).unwrap();
    let families = script.split("for family in ").find(|rest| rest.starts_with("tile/ large/")).unwrap();
    let families: Vec<&str> = families.split(';').next().unwrap().split(' ').collect();
    let is_run = |index: usize, dtype: DType, name: &str| match index {
        0 => true,
        1 => dtype == DType::F32 && families.iter().any(|family| name.contains(family)),
        2 => {
            dtype != DType::F32 && dtype != DType::F64 && families.iter().any(|family| name.contains(family))
        }
        _ => false,
    };
    let mut not_run: BTreeSet<String> = listed[..3].iter().flatten().cloned().collect();
    // The families of magnitudes and bits have much data, and sizes that others have.
    let cases = (cases::all().into_iter())
        .filter(|case| !["magnitude/", "bits/"].iter().any(|family| case.name.starts_with(family)))
        .chain(cases::of_sequences())
        .chain(cases::of_eight_bits())
        .chain(cases::of_batch_invariance());
    for (case, dtype) in cases.flat_map(|case| DType::FLOATS.map(|dtype| (case.clone(), dtype))) {
        let data = case.data(dtype);
        let data = case.laid_out(&data);
        for &pass in case.passes() {
            let problem = on_device(&case.problem(&data, pass, FeatureSet::all()).unwrap());
            if backend.supports(&problem).is_err() {
                continue;
            }
            for (index, machine) in machines.into_iter().enumerate() {
                let Ok(plan) = Launches::of(&problem, machine) else { continue };
                // The backend refuses the others.
                if plan.kernels.iter().any(|kernel| kernel.shared_bytes > machine.shared_bytes) {
                    continue;
                }
                for kernel in &plan.kernels {
                    for name in [kernel.axes(&plan), vec![kernel.variant(&plan)]].concat() {
                        missing[index].remove(&name);
                        if is_run(index, dtype, &case.name) {
                            not_run.remove(&name);
                        }
                        assert!(listed[index].contains(&name), "{} on {machine:?}: {name}", case.name);
                    }
                }
            }
        }
    }
    let missing: Vec<_> = machines.iter().zip(&missing).filter(|(_, names)| !names.is_empty()).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(not_run.is_empty(), "{not_run:#?}");
}

#[test]
fn options_alone_have_kernels_of_their_own() {
    let mut seen = std::collections::BTreeSet::new();
    for (_, problem) in problems(DType::Bf16, Pass::Forward) {
        seen.extend(Shape::of(&problem).map(|shape| shape.features.bits()));
    }
    // 16 is dropout; 32 stands for logits that are made one by one, which a scale below 0 asks for as well.
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 16, 32, 33, 34, 36, 40, 48, 63]);
}
