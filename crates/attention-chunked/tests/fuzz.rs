//! Random calls at every level of the machine, checked in every way that the suite knows. `cargo xtask fuzz`
//! runs more of them, `cargo xtask sanitize` these under the address sanitizer.

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_conformance::fuzz;
use attention_conformance::suite::Subject;

/// How many seeds to run: `ATTENTION_FUZZ_SEEDS`, or as many as take some seconds.
fn seeds() -> u64 {
    let given = std::env::var("ATTENTION_FUZZ_SEEDS").ok();
    given.map_or(60, |count| count.parse().expect("ATTENTION_FUZZ_SEEDS is a number"))
}

#[test]
fn random_calls_are_right_at_every_level() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool of three threads");
    let pool = Arc::new(pool);
    for level in Level::available() {
        let config = || ChunkedConfig::default().level(level);
        let one = ChunkedBackend::with_config(config().threads(1));
        let three = ChunkedBackend::with_config(config().pool(pool.clone()));
        let small_chunks = ChunkedBackend::with_config(config().query_chunk(1).budget(1));
        let default = ChunkedBackend::with_config(config());
        let subject = Subject::new(&default)
            .same_as("one thread", &one)
            .same_as("three threads", &three)
            .same_as("the smallest chunks", &small_chunks);
        println!("at {level}: {}", fuzz::assert_seeds(subject.clone(), 0..seeds()));
        // A gradient of a bias of one element, whose sum once followed the chunks; with what is around it.
        fuzz::assert_seeds(subject.clone(), 1250..1300);
        // Logits beyond the range of f64, of which -inf is no mask: only what does not ask which keys a row
        // reads is compared.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(101_171));
        // A gradient of a bias in f64 below all numbers of the f32 that it is computed in.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(2_010_317));
        // A scale of 3e-37 and queries of 3e35: gradients of products times queries are beyond f32, dk is
        // not.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(730_022_008));
        // Dropout of 0.999 in f16: outputs beyond its largest number, of which the infinities that were
        // stored leave no gradients.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(12_015_560));
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(12_019_001));
        // Queries of bf16 some of which are subnormal, beside a scale of 5e36: AMX takes them as 0, decoding
        // does not.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(12_000_939));
        // A negative scale, and keys that no query sees: the sign of their gradient, 0, once followed the
        // chunks.
        fuzz::assert_case(subject.clone(), &fuzz::FuzzCase::from_seed(5_000_037));
        // A scale of 1.3e308 and a d_lse of 1.8: their product is beyond f64, dq is not. The reference was
        // wrong.
        fuzz::assert_case(subject, &fuzz::FuzzCase::from_seed(3946));
    }
}
