//! The conformance suite and the golden sets, on one and on several threads: results must agree with the oracle,
//! and with each other to the bit.

use std::sync::Arc;

use attention_conformance::assert_conforms_over;
use attention_conformance::suite::Subject;
use attention_cpu::{CpuBackend, CpuConfig};

#[test]
fn conforms_on_any_number_of_threads() {
    // A pool of its own: more threads than most problems have tasks, whatever the machine has.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().expect("a pool of five threads");
    let five = CpuBackend::with_config(CpuConfig::default().pool(Arc::new(pool)));
    let one = CpuBackend::with_config(CpuConfig::default().threads(1));
    let default = CpuBackend::new();
    assert_conforms_over(Subject::new(&default).same_as("one thread", &one).same_as("five threads", &five));
}
