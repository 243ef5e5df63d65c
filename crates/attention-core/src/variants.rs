//! Which code paths a backend may choose, and how often each was run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The variants of a backend: every code path that its plans may choose (a kernel with its tile sizes, an
/// instruction set, a split of the keys and the merge behind it), each with a count of its runs.
///
/// A backend lists what may be chosen on this machine and counts where it launches, so that a test suite can
/// hold one against the other: a variant that no case has run is one that the suite says nothing about.
/// Counts only grow, and clones of a backend may share them.
///
/// ```
/// use attention_core::Variants;
///
/// let variants = Variants::new(["forward tile", "forward decode"]);
/// let tile = variants.counter("forward tile");
/// tile.count();
/// let runs: Vec<_> = variants.runs().into_iter().map(|variant| (variant.name, variant.runs)).collect();
/// assert_eq!(runs, [("forward decode".to_owned(), 0), ("forward tile".to_owned(), 1)]);
/// ```
#[derive(Debug, Default)]
pub struct Variants(Mutex<BTreeMap<String, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    listed: bool,
    counter: VariantCounter,
}

/// Counts the runs of one variant: kept by a plan, so that counting is one addition.
#[derive(Clone, Debug, Default)]
pub struct VariantCounter(Arc<AtomicU64>);

impl VariantCounter {
    /// One more run.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A variant and how often it was run.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VariantRuns {
    /// What the backend calls it.
    pub name: String,
    /// Whether the backend lists it. One that was run and is not listed is a fault of the list.
    pub listed: bool,
    /// How often it was run.
    pub runs: u64,
}

impl Variants {
    /// A list of these names, none of them run yet.
    pub fn new<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        let variants = Self::default();
        variants.list(names);
        variants
    }

    /// Adds to the list, for backends that know what may be chosen only once they have seen the device. A
    /// name that is listed already stays as it is.
    pub fn list<N: Into<String>>(&self, names: impl IntoIterator<Item = N>) {
        let mut entries = self.entries();
        for name in names {
            entries.entry(name.into()).or_default().listed = true;
        }
    }

    /// The counter of a variant. A name that is not in the list gets a counter too, and stands in
    /// [`runs`](Self::runs) as not listed.
    pub fn counter(&self, name: &str) -> VariantCounter {
        let mut entries = self.entries();
        if let Some(entry) = entries.get(name) {
            return entry.counter.clone();
        }
        entries.entry(name.to_owned()).or_default().counter.clone()
    }

    /// All variants in the order of their names: those that are listed, and those that were run or asked for
    /// besides.
    pub fn runs(&self) -> Vec<VariantRuns> {
        let runs = |(name, entry): (&String, &Entry)| VariantRuns {
            name: name.clone(),
            listed: entry.listed,
            runs: entry.counter.0.load(Ordering::Relaxed),
        };
        self.entries().iter().map(runs).collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // No code that holds the lock can leave the map half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, listed: bool, runs: u64) -> VariantRuns {
        VariantRuns { name: name.to_owned(), listed, runs }
    }

    #[test]
    fn what_is_run_and_not_listed_is_told_from_the_list() {
        let variants = Variants::new(["a"]);
        variants.counter("b").count();
        assert_eq!(variants.runs(), [of("a", true, 0), of("b", false, 1)]);
        variants.list(["b"]);
        assert_eq!(variants.runs(), [of("a", true, 0), of("b", true, 1)]);
    }

    #[test]
    fn counters_of_one_name_count_together() {
        let variants = Variants::new(["a"]);
        let (one, two) = (variants.counter("a"), variants.counter("a"));
        one.count();
        two.count();
        assert_eq!(variants.runs(), [of("a", true, 2)]);
    }
}
