//! The conformance suite and the golden sets, on one and on several threads: results must agree with the
//! oracle, and with each other to the bit.

use std::sync::Arc;

use attention_conformance::assert_conforms;
use attention_conformance::golden::{GoldenSet, Limits, own_sets};
use attention_conformance::suite::Subject;
use attention_core::DType;
use attention_cpu::{CpuBackend, CpuConfig};

#[test]
fn conforms_on_any_number_of_threads() {
    // A pool of its own: more threads than most problems have tasks, whatever the machine has.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().expect("a pool of five threads");
    let five = CpuBackend::with_config(CpuConfig::default().pool(Arc::new(pool)));
    let one = CpuBackend::with_config(CpuConfig::default().threads(1));
    let default = CpuBackend::new();
    assert_conforms(Subject::new(&default).same_as("one thread", &one).same_as("five threads", &five));
}

/// Not only inside the derived bounds: f64 to 1e-12, and f32 no further from the truth than twice JAX's own
/// f32.
#[test]
fn is_as_exact_as_the_golden_sets_ask() {
    for directory in own_sets() {
        let set = GoldenSet::open(&directory).expect("the sets of the suite can be read").limits(Limits::Jax);
        let report = set.run(&CpuBackend::new(), &[DType::F64, DType::F32], None, |_| {});
        let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        // Every pass of each case in both dtypes.
        assert_eq!(report.totals().passed, 2 * set.passes());
    }
}
