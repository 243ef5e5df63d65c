//! Random calls of every kind and size of number, checked in every way that the suite knows.
//!
//! A seed is a case: sizes (empty axes, tails of every block, few rows over many keys, many heads), every
//! option and layout, and numbers of every order of magnitude in queries, keys, scale, softcap, bias, slopes
//! and sinks. Each case runs forward and backward on each backend, and is compared
//! - with the f64 oracle, inside the derived bounds, with canaries around every output and behind the scratch
//!   memory;
//! - with what no rounding may move: an output lies between the values that it is a mean of, and the
//!   probabilities of a row sum to 1;
//! - with itself, bit by bit: planned again, after a call with other lengths, offsets, scale and seed, on
//!   other numbers of threads, a batch row alone, with more padding, with other strides, with NaN in memory
//!   that nothing may read, and with NaN in one element, for all that does not depend on it.
//!
//! Calls that are wrong must be refused by a typed error, and nothing may panic. A fault is printed as a
//! test:
//!
//! ```no_run
//! # fn backend() -> &'static dyn attention_core::AttentionBackend { unimplemented!() }
//! use attention_conformance::fuzz;
//!
//! fuzz::assert_seed(backend(), 1000714);
//! ```

mod case;
mod check;
mod counts;
mod invalid;
mod invalid_sequences;
mod magnitudes;
mod variations;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use attention_core::{DType, Pass};

pub use case::{FuzzCase, Simplification};
pub use counts::{Count, Counts};

use crate::rng::Rng;
use crate::suite::Subject;
use check::Prepared;

/// The most runs of a case that making it simpler may take.
const ATTEMPTS: usize = 120;

/// A check that failed. Displays as a test that fails.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The backend.
    pub backend: String,
    /// The case, as simple as it still fails.
    pub case: FuzzCase,
    /// The pass; `None` where a wrong call was not refused.
    pub pass: Option<Pass>,
    /// What was wrong.
    pub reason: String,
}

impl Fault {
    /// The seed.
    pub fn seed(&self) -> u64 {
        self.case.seed()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seed, name) = (self.seed(), self.backend.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
        let pass = self.pass.map_or_else(String::new, |pass| format!(" {pass}"));
        writeln!(f, "/// {}{pass}: {}", self.backend, self.reason)?;
        writeln!(f, "///")?;
        writeln!(f, "/// {}.", self.case)?;
        writeln!(f, "#[test]\nfn fuzz_{seed}_on_{name}() {{")?;
        let simplifications = self.case.simplifications();
        if simplifications.is_empty() {
            writeln!(f, "    attention_conformance::fuzz::assert_seed(&backend, {seed});")?;
        } else {
            let list: Vec<String> = simplifications.iter().map(|one| format!("{one:?}")).collect();
            writeln!(
                f,
                "    use attention_conformance::fuzz::{{FuzzCase, Simplification::*, assert_case}};"
            )?;
            writeln!(f, "    let case = FuzzCase::from_seed({seed}).simplified(&[{}]);", list.join(", "))?;
            writeln!(f, "    assert_case(&backend, &case);")?;
        }
        write!(f, "}}")
    }
}

/// Runs cases on backends and counts what was checked.
///
/// ```no_run
/// use attention_conformance::fuzz::Fuzz;
/// use attention_conformance::suite::Subject;
///
/// # fn run(backend: &dyn attention_core::AttentionBackend) {
/// let mut fuzz = Fuzz::new(vec![Subject::new(backend)]);
/// for seed in 0..1000 {
///     for fault in fuzz.seed(seed) {
///         println!("{fault}");
///     }
/// }
/// println!("{}", fuzz.counts());
/// # }
/// ```
#[derive(Debug)]
pub struct Fuzz<'a> {
    subjects: Vec<Subject<'a>>,
    counts: Counts,
}

impl<'a> Fuzz<'a> {
    /// A run over these backends.
    pub fn new(subjects: Vec<Subject<'a>>) -> Self {
        Self { subjects, counts: Counts::default() }
    }

    /// What was checked so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Runs the case of a seed on every backend: at most one fault for each, made as simple as it still
    /// fails.
    pub fn seed(&mut self, seed: u64) -> Vec<Fault> {
        let case = FuzzCase::from_seed(seed);
        let mut faults = self.wrong_calls(&case);
        let prepared = Prepared::new(&case);
        for subject in &self.subjects {
            if let Err(failure) = prepared.check(subject, &mut self.counts) {
                let backend = subject.backend.name().to_owned();
                let first =
                    Fault { backend, case: case.clone(), pass: Some(failure.pass), reason: failure.reason };
                faults.push(simplified(subject, first));
            }
        }
        faults
    }

    fn wrong_calls(&mut self, case: &FuzzCase) -> Vec<Fault> {
        let mut rng = Rng::named(case.seed(), "wrong calls");
        let mut faults = Vec::new();
        let mut note = |backend: &str, outcome: Result<usize, String>| match outcome {
            Ok(count) => self.counts.invalid += count,
            Err(reason) => {
                self.counts.invalid_faults += 1;
                faults.push(Fault { backend: backend.to_owned(), case: case.clone(), pass: None, reason });
            }
        };
        note("core", invalid::problems(&case.case.dims, case.dtype(), &mut rng));
        note("core", invalid::numbers(&case.case.dims, case.dtype(), &mut rng));
        note("core", invalid_sequences::calls(case.dtype(), &mut rng));
        for subject in &self.subjects {
            let mut rng = rng.clone();
            note(subject.backend.name(), invalid::huge(subject.backend, case.dtype(), &mut rng));
        }
        faults
    }
}

/// The first failure of a case on a backend.
fn failure(subject: &Subject<'_>, case: &FuzzCase) -> Option<check::Failure> {
    // What a simplification makes of a case may be more than the generator ever draws.
    let checked =
        catch_unwind(AssertUnwindSafe(|| Prepared::new(case).check(subject, &mut Counts::default())));
    checked.ok()?.err()
}

/// Takes away whatever the case fails without.
fn simplified(subject: &Subject<'_>, mut fault: Fault) -> Fault {
    let mut attempts = 0;
    loop {
        let before = attempts;
        let mut simpler_found = false;
        for simplification in Simplification::ALL {
            let mut simpler = fault.case.clone();
            if attempts >= ATTEMPTS || !simpler.simplify(simplification) {
                continue;
            }
            attempts += 1;
            if let Some(failure) = failure(subject, &simpler) {
                fault = Fault { case: simpler, pass: Some(failure.pass), reason: failure.reason, ..fault };
                simpler_found = true;
            }
        }
        if !simpler_found || attempts == before {
            return fault;
        }
    }
}

/// Runs the case of a seed with all its checks.
///
/// # Panics
/// Where a check fails.
pub fn assert_seed<'a>(subject: impl Into<Subject<'a>>, seed: u64) {
    assert_case(subject, &FuzzCase::from_seed(seed));
}

/// Runs a case with all its checks.
///
/// # Panics
/// Where a check fails.
pub fn assert_case<'a>(subject: impl Into<Subject<'a>>, case: &FuzzCase) {
    let subject = subject.into();
    if let Some(fault) = Fuzz::new(vec![subject.clone()]).wrong_calls(case).pop() {
        panic!("{}: {}\n{case}", fault.backend, fault.reason);
    }
    let checked = Prepared::new(case).check(&subject, &mut Counts::default());
    if let Err(failure) = checked {
        panic!("{} {}: {}\n{case}", subject.backend.name(), failure.pass, failure.reason);
    }
}

/// Runs many seeds on a backend.
///
/// # Panics
/// Where one fails, with every fault as a test; where a dtype or pass was never run, which would prove
/// nothing.
pub fn assert_seeds<'a>(subject: impl Into<Subject<'a>>, seeds: std::ops::Range<u64>) -> Counts {
    let mut fuzz = Fuzz::new(vec![subject.into()]);
    let faults: Vec<String> = seeds.flat_map(|seed| fuzz.seed(seed)).map(|fault| fault.to_string()).collect();
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    let counts = fuzz.counts().clone();
    for dtype in DType::FLOATS {
        let (forward, backward) = (counts.get(dtype, Pass::Forward), counts.get(dtype, Pass::Backward));
        let checked = |count: Count| count.elements > 0 || count.skipped > 0;
        let checked = checked(forward) && checked(backward);
        assert!(checked, "nothing was checked in {dtype}: {counts}");
    }
    counts
}

#[cfg(test)]
mod tests;
