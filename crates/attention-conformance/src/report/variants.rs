//! Which variants of a backend a run has reached.

use std::collections::{BTreeMap, BTreeSet};

use attention_core::{AttentionBackend, VariantRuns, Variants};

use super::{Report, Table};

/// The counts of some backends before a run. Counts only grow, and backends may share them.
pub(crate) struct Counting<'a>(Vec<(&'a Variants, Vec<VariantRuns>)>);

impl<'a> Counting<'a> {
    /// From now on.
    pub(crate) fn start(backends: impl IntoIterator<Item = &'a dyn AttentionBackend>) -> Self {
        let mut lists: Vec<(&Variants, Vec<VariantRuns>)> = Vec::new();
        for variants in backends.into_iter().filter_map(|backend| backend.variants()) {
            if !lists.iter().any(|(other, _)| std::ptr::eq(*other, variants)) {
                lists.push((variants, variants.runs()));
            }
        }
        Self(lists)
    }

    /// What was run since; `None` where no backend lists variants.
    pub(crate) fn finish(self) -> Option<Vec<VariantRuns>> {
        let since = self.0.iter().map(|(variants, before)| {
            let before: BTreeMap<&str, u64> =
                before.iter().map(|variant| (variant.name.as_str(), variant.runs)).collect();
            let mut runs = variants.runs();
            for variant in &mut runs {
                variant.runs -= before.get(variant.name.as_str()).copied().unwrap_or(0);
            }
            runs
        });
        (!self.0.is_empty()).then(|| sum(since.flatten()))
    }
}

/// The same variants of several runs added up.
fn sum(runs: impl IntoIterator<Item = VariantRuns>) -> Vec<VariantRuns> {
    let mut sums: BTreeMap<String, VariantRuns> = BTreeMap::new();
    for variant in runs {
        match sums.get_mut(&variant.name) {
            None => drop(sums.insert(variant.name.clone(), variant)),
            Some(sum) => {
                sum.runs += variant.runs;
                sum.listed |= variant.listed;
            }
        }
    }
    sums.into_values().collect()
}

/// What is wrong with the variants of one backend that these runs together have reached: those that it lists
/// and that no case has run, and those that were run and that it does not list. `None` where nothing is,
/// where it lists none, and where no case was run at all.
pub fn uncovered(reports: &[Report]) -> Option<String> {
    let totals: super::Totals = reports.iter().map(Report::totals).sum();
    let runs = sum(reports.iter().flat_map(|report| report.variants.iter().flatten().cloned()));
    let names = |chosen: fn(&VariantRuns) -> bool| -> Vec<&str> {
        runs.iter().filter(|&variant| chosen(variant)).map(|variant| variant.name.as_str()).collect()
    };
    let missing = names(|variant| variant.listed && variant.runs == 0);
    let unlisted = names(|variant| !variant.listed && variant.runs > 0);
    let mut sentences = Vec::new();
    if !missing.is_empty() {
        sentences.push(format!("{} of its variants were not run: {}", missing.len(), missing.join(", ")));
    }
    if !unlisted.is_empty() {
        sentences.push(format!(
            "{} variants were run that it does not list: {}",
            unlisted.len(),
            unlisted.join(", ")
        ));
    }
    (totals.passed + totals.failed > 0 && !sentences.is_empty()).then(|| sentences.join("; "))
}

/// One row a variant, one column a backend: how often it was run, `NOT RUN` where it is listed and was not,
/// `-` where the backend does not list it. Without rows where no backend lists any.
pub fn coverage(reports: &[Report]) -> Table {
    let listing: Vec<&Report> = reports.iter().filter(|report| report.variants.is_some()).collect();
    let header = std::iter::once("variant".to_owned())
        .chain(listing.iter().map(|report| report.backend.clone()))
        .collect();
    let variants = |report: &Report| report.variants.clone().into_iter().flatten();
    let names: BTreeSet<String> =
        listing.iter().flat_map(|report| variants(report)).map(|one| one.name).collect();
    let cell = |report: &Report, name: &str| match variants(report).find(|variant| variant.name == name) {
        None => "-".to_owned(),
        Some(VariantRuns { listed: true, runs: 0, .. }) => "NOT RUN".to_owned(),
        Some(VariantRuns { listed: true, runs, .. }) => runs.to_string(),
        Some(VariantRuns { runs: 0, .. }) => "-".to_owned(),
        Some(VariantRuns { runs, .. }) => format!("{runs}, NOT LISTED"),
    };
    let rows = (names.iter())
        .map(|name| {
            std::iter::once(name.clone()).chain(listing.iter().map(|report| cell(report, name))).collect()
        })
        .collect();
    Table { header, rows }
}
