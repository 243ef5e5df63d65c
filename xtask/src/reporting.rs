//! Reports on the terminal: a progress bar, a table, the failures, and the closing line.

use std::collections::BTreeMap;
use std::fmt::{Arguments, Display};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;

use attention_conformance::report::{Outcome, Report, Totals, coverage, table, uncovered};
use attention_conformance::suite::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// How many failing cases are printed in full; every one is in the JSON and HTML reports.
const SHOWN_FAILURES: usize = 50;

/// A progress bar on a terminal, and nothing elsewhere.
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    /// A bar named after a backend.
    pub(crate) fn new(name: &str) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let template = "{prefix} [{bar:40}] {pos}/{len} {elapsed} {wide_msg}";
        let style = ProgressStyle::with_template(template).expect("the template is well-formed");
        let bar = ProgressBar::new(0).with_style(style.progress_chars("=> "));
        bar.set_prefix(name.to_owned());
        Self(Some(bar))
    }

    /// Moves on by a case.
    pub(crate) fn show(&self, progress: Progress<'_>) {
        if let Some(bar) = &self.0 {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
            let result = progress.result;
            bar.set_message(format!("{} {} {}", result.case, result.dtype, result.pass));
        }
    }
}

impl Bar {
    /// Shows how many of some measurements are done, and what is measured now.
    pub(crate) fn say(&self, done: usize, total: usize, what: &str) {
        if let Some(bar) = &self.0 {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message(what.to_owned());
        }
    }

    /// Prints something else while the bar is away.
    pub(crate) fn aside(&self, print: impl FnOnce()) {
        match &self.0 {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// How a shell reports a command that a closed pipe has ended: 128 and the number of SIGPIPE.
const PIPE_CLOSED: i32 = 141;

/// Prints a line; what `println!` is in this crate.
pub(crate) fn print_line(line: Arguments<'_>) {
    match writeln!(std::io::stdout().lock(), "{line}") {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(PIPE_CLOSED),
        Err(error) => {
            eprintln!("error: standard output cannot be written: {error}");
            std::process::exit(2)
        }
    }
}

/// Prints a line to standard error; what `eprintln!` is in this crate. Where even that fails, there is no one
/// to tell.
pub(crate) fn print_error_line(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints one line for each item.
pub(crate) fn print_lines(lines: impl IntoIterator<Item = impl Display>) {
    lines.into_iter().for_each(|line| println!("{line}"));
}

/// Prints a table with borders.
pub(crate) fn print_cells(header: &[String], rows: &[Vec<String>]) {
    let mut cells = comfy_table::Table::new();
    cells.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
    cells.set_header(header);
    cells.add_rows(rows);
    println!("{cells}");
}

/// Prints backends by features.
pub(crate) fn print_table(reports: &[Report]) {
    let table = table(reports);
    print_cells(&table.header, &table.rows);
}

/// Prints how often each variant was run; whether the whole suite, where it was run, has run all that is
/// listed and nothing else. A filtered run says that it is one.
pub(crate) fn print_variants(reports: &[Report]) -> bool {
    let table = coverage(reports);
    if !table.rows.is_empty() {
        println!("Runs of each variant:");
        print_cells(&table.header, &table.rows);
    }
    let mut covered = true;
    for report in reports {
        let backend = &report.backend;
        if report.variants.is_none() && report.totals().passed > 0 {
            println!("{backend}: lists no variants");
        }
        let Some(fault) = uncovered(std::slice::from_ref(report)) else { continue };
        if report.about.is_whole() {
            println!("{backend}: FAILED, {fault}");
            covered = false;
        } else {
            println!("{backend}: {fault} (not judged: the run was filtered)");
        }
    }
    if let Some(report) = reports.iter().find(|report| !report.about.is_whole()) {
        println!("filtered: {}", report.about.filters.join("; "));
    }
    covered
}

/// Prints what failed, with the first differing elements, and what was skipped and why.
pub(crate) fn print_details(report: &Report) {
    for result in report.failures().take(SHOWN_FAILURES) {
        println!("{}: {result}", report.backend);
    }
    let hidden = report.failures().count().saturating_sub(SHOWN_FAILURES);
    if hidden > 0 {
        println!("{}: {hidden} more failures", report.backend);
    }
    for (reason, count) in skips(report) {
        println!("{}: skipped {count}: {reason}", report.backend);
    }
}

/// How often each reason for skipping occurs.
fn skips(report: &Report) -> BTreeMap<&str, usize> {
    let mut reasons = BTreeMap::new();
    for result in &report.results {
        if let Outcome::Skipped { reason } = &result.outcome {
            *reasons.entry(reason.as_str()).or_default() += 1;
        }
    }
    reasons
}

/// Prints the closing line; whether nothing failed.
pub(crate) fn close(reports: &[Report]) -> bool {
    let totals: Totals = reports.iter().map(Report::totals).sum();
    println!("{totals}");
    totals.failed == 0
}

/// Makes the folders of files that are to be written, before the work whose results go there, and says which
/// it made.
///
/// # Errors
/// Where a folder cannot be made, or a file would take the place of a folder.
pub(crate) fn make_folders_of<'p>(paths: impl IntoIterator<Item = &'p Path>) -> crate::Result<()> {
    for path in paths {
        let refused = |error: &dyn Display| format!("{} cannot be written: {error}", path.display());
        if path.is_dir() {
            return Err(refused(&"it is a folder").into());
        }
        let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else { continue };
        if !folder.exists() {
            std::fs::create_dir_all(folder).map_err(|error| refused(&error))?;
            eprintln!("{}: folder made", folder.display());
        }
    }
    Ok(())
}

/// Writes a file.
pub(crate) fn write(path: &Path, text: &str) -> crate::Result<()> {
    make_folders_of([path])?;
    let written = std::fs::write(path, text);
    written.map_err(|error| format!("{} cannot be written: {error}", path.display()).into())
}

/// Writes a file that the caller asked for, and says so.
pub(crate) fn write_asked_for(path: &Path, text: &str) -> crate::Result<()> {
    write(path, text)?;
    eprintln!("{}: written", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use attention_conformance::report::CaseResult;
    use attention_core::{DType, Pass};

    use super::*;

    #[test]
    fn folders_are_made_before_the_work_or_refused() {
        let root = std::env::temp_dir().join(format!("attention-xtask-folders-{}", std::process::id()));
        let file = root.join("a/b/report.html");
        make_folders_of([&*file]).unwrap();
        assert!(file.parent().unwrap().is_dir() && !file.exists());
        write_asked_for(&file, "text").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "text");
        // A file where a folder would have to be, and the other way round.
        let below = make_folders_of([&*file.join("deeper/report.html")]).unwrap_err().to_string();
        assert!(below.contains("report.html cannot be written: "), "{below}");
        let folder = make_folders_of([&*root.join("a")]).unwrap_err().to_string();
        assert!(folder.ends_with("cannot be written: it is a folder"), "{folder}");
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn reasons_are_grouped() {
        let skipped = |reason: &str| CaseResult {
            case: "case".to_owned(),
            dtype: DType::F32,
            pass: Pass::Forward,
            features: vec![],
            outcome: Outcome::Skipped { reason: reason.to_owned() },
            ms: 0.0,
        };
        let report = Report {
            backend: "toy".to_owned(),
            version: "1".to_owned(),
            about: Default::default(),
            variants: None,
            results: vec![skipped("no sinks"), skipped("no bias"), skipped("no sinks")],
        };
        assert_eq!(skips(&report), BTreeMap::from([("no bias", 1), ("no sinks", 2)]));
        assert!(close(&[report]));
    }
}
