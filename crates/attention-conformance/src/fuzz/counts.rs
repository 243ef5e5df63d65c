//! How much was checked.

use std::fmt;

use attention_core::{DType, Pass};

/// What was checked in one dtype and pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls that were compared with the oracle, one for each case and backend.
    pub cases: usize,
    /// Calls that the backend does not claim to serve.
    pub skipped: usize,
    /// Elements that were compared with the oracle's.
    pub elements: u64,
    /// Calls whose outputs were compared bit by bit with those of another call.
    pub bitwise: usize,
    /// Checks that failed.
    pub faults: usize,
}

impl Count {
    fn add(&mut self, other: &Self) {
        self.cases += other.cases;
        self.skipped += other.skipped;
        self.elements += other.elements;
        self.bitwise += other.bitwise;
        self.faults += other.faults;
    }
}

/// What was checked, by dtype and pass. Displays as the closing line of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    calls: [[Count; 2]; DType::FLOATS.len()],
    /// Calls and problems that are wrong, each refused with the typed error that it should be refused with.
    pub invalid: usize,
    /// Wrong ones that were not, and problems too large for any machine that made a backend panic.
    pub invalid_faults: usize,
}

impl Counts {
    pub(super) fn of(&mut self, dtype: DType, pass: Pass) -> &mut Count {
        &mut self.calls[position(dtype)][usize::from(pass == Pass::Backward)]
    }

    /// Adds what another run checked.
    pub fn add(&mut self, other: &Self) {
        for (count, other) in self.calls.iter_mut().flatten().zip(other.calls.iter().flatten()) {
            count.add(other);
        }
        self.invalid += other.invalid;
        self.invalid_faults += other.invalid_faults;
    }

    /// The count of a dtype and pass.
    pub fn get(&self, dtype: DType, pass: Pass) -> Count {
        self.calls[position(dtype)][usize::from(pass == Pass::Backward)]
    }

    /// All dtypes and passes together.
    pub fn total(&self) -> Count {
        let mut total = Count::default();
        self.calls.iter().flatten().for_each(|count| total.add(count));
        total
    }

    /// Checks that failed, of every kind.
    pub fn faults(&self) -> usize {
        self.total().faults + self.invalid_faults
    }
}

fn position(dtype: DType) -> usize {
    DType::FLOATS.iter().position(|&float| float == dtype).expect("operands are floats")
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        write!(
            f,
            "{} cases, {} elements, {} bitwise comparisons, {} wrong calls, {} faults",
            total.cases,
            total.elements,
            total.bitwise,
            self.invalid,
            self.faults()
        )
    }
}
