//! Backends by features.

use std::fmt;

use attention_core::Feature;

use super::{CaseResult, Outcome, Report};

/// A table of text, for any printer. `Display` aligns the columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The names of the columns.
    pub header: Vec<String>,
    /// As many cells as the header has.
    pub rows: Vec<Vec<String>>,
}

/// One row a feature, one column a backend: the worst error as a fraction of its bound, over the cases that
/// have the feature. Failures are counted instead; `skipped` where no case ran, `-` where there is none.
pub fn table(reports: &[Report]) -> Table {
    let header = std::iter::once("feature".to_owned())
        .chain(reports.iter().map(|report| report.backend.clone()))
        .collect();
    let mut rows = vec![row("none", reports, |result| result.features.is_empty())];
    for &feature in Feature::ALL {
        rows.push(row(feature.name(), reports, |result| result.features.contains(&feature)));
    }
    rows.push(row("all", reports, |_| true));
    Table { header, rows }
}

fn row(name: &str, reports: &[Report], belongs: impl Fn(&CaseResult) -> bool) -> Vec<String> {
    let cells = reports.iter().map(|report| cell(report.results.iter().filter(|result| belongs(result))));
    std::iter::once(name.to_owned()).chain(cells).collect()
}

fn cell<'a>(results: impl Iterator<Item = &'a CaseResult>) -> String {
    let (mut worst, mut failed, mut skipped) = (None, 0, 0);
    for result in results {
        match &result.outcome {
            Outcome::Passed { worst: fraction, .. } => worst = Some(worst.unwrap_or(0.0f64).max(*fraction)),
            Outcome::Failed { .. } => failed += 1,
            Outcome::Skipped { .. } => skipped += 1,
        }
    }
    match (failed, worst, skipped) {
        (0, Some(worst), _) => format!("{worst:.3}"),
        (0, None, 0) => "-".to_owned(),
        (0, None, _) => "skipped".to_owned(),
        (count, ..) => format!("{count} FAILED"),
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let widths: Vec<usize> = (0..self.header.len())
            .map(|column| lines().map(|line| line[column].chars().count()).max().unwrap_or(0))
            .collect();
        for line in lines() {
            let cells: Vec<String> =
                line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}
