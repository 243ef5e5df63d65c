//! Random calls, checked in every way that the suite knows. `cargo xtask fuzz` runs more of them, `cargo
//! xtask sanitize` these under the address sanitizer.

use std::sync::Arc;

use attention_conformance::fuzz;
use attention_conformance::suite::Subject;
use attention_cpu::{CpuBackend, CpuConfig};

/// How many seeds to run: `ATTENTION_FUZZ_SEEDS`, or as many as take some seconds.
fn seeds() -> u64 {
    let given = std::env::var("ATTENTION_FUZZ_SEEDS").ok();
    given.map_or(60, |count| count.parse().expect("ATTENTION_FUZZ_SEEDS is a number"))
}

#[test]
fn random_calls_are_right() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool of three threads");
    let three = CpuBackend::with_config(CpuConfig::default().pool(Arc::new(pool)));
    let one = CpuBackend::with_config(CpuConfig::default().threads(1));
    let default = CpuBackend::new();
    let subject = Subject::new(&default).same_as("one thread", &one).same_as("three threads", &three);
    println!("{}", fuzz::assert_seeds(subject.clone(), 0..seeds()));
    // The gradient of a bias over a part of the keys, whose last panel ends among keys that the row sees.
    fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(750_009_346));
    // A scale of 3e-37 and queries of 3e35: gradients of products times queries are beyond f32, dk is not.
    fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(730_022_008));
    // A scale of 3e38 in two factors and few rows: the second factor times a gradient with the first is
    // beyond f32, dk is not.
    fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(20_265_138_390));
    // The gradient of a bias of -3e38 everywhere, in two parts of the keys: the logsumexp of a part is that
    // of the row, whose own sum is not.
    fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(20_261_151_982));
    // A scale of 1.3e308 and a d_lse of 1.8: their product is beyond f64, dq is not. The reference was wrong.
    fuzz::assert_case(subject, &fuzz::FuzzCase::from_seed(3946));
}
