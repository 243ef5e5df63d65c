//! One self-contained page: totals, the table of features, plots, failures and reasons for skips.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{About, Outcome, Report, Table, Totals, coverage, plot, table, uncovered};

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --line: #8884; --good: #2b7a4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --paper: #17191c; --good: #63c08a; --bad: #ff7b6b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink); background: var(--paper); }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } .bad { color: var(--bad); } .quiet { opacity: .55; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); } summary { cursor: pointer; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--ink); }
.grid { stroke: var(--line); } .bound { stroke: var(--bad); stroke-width: 1.5; } .passed { fill: var(--good); fill-opacity: .55; } .failed { fill: var(--bad); }
";

/// The reports as a page that needs nothing but itself.
pub fn html(reports: &[Report]) -> String {
    let totals: Totals = reports.iter().map(Report::totals).sum();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n<title>Attention conformance: {totals}</title>\n<style>{STYLE}</style>\n<h1>Attention conformance</h1>\n<p>{totals}</p>\n"
    );
    backends(&mut page, reports);
    about(&mut page, reports);
    page.push_str("<h2>Error over bound</h2>\n<p>Every case is a dot: its largest error, as a fraction of the bound derived for that element. What is right of the red line has failed.</p>\n");
    page.push_str(&plot::errors(reports));
    features(&mut page, reports);
    variants(&mut page, reports);
    failures(&mut page, reports);
    skips(&mut page, reports);
    page
}

fn backends(page: &mut String, reports: &[Report]) {
    page.push_str(
        "<table><tr><th>backend<th>version<th>passed<th>failed<th>skipped<th>worst error / bound</tr>\n",
    );
    for report in reports {
        let totals = report.totals();
        let class = if totals.failed > 0 { " class=\"bad\"" } else { "" };
        let _ = writeln!(
            page,
            "<tr><td>{}<td>{}<td>{}<td{class}>{}<td>{}<td>{:.3}</tr>",
            escape(&report.backend),
            escape(&report.version),
            totals.passed,
            totals.failed,
            totals.skipped,
            report.worst()
        );
    }
    page.push_str("</table>\n");
}

/// Where, when and how: once, where it is the same for every report but for the time.
fn about(page: &mut String, reports: &[Report]) {
    let mut shown: Vec<About> = Vec::new();
    for report in reports {
        let timeless = About { started: String::new(), ..report.about.clone() };
        if shown.contains(&timeless) {
            continue;
        }
        shown.push(timeless);
        page.push_str("<table>\n");
        for (name, value) in report.about.lines() {
            let class = if name == "filters" && !report.about.is_whole() { " class=\"bad\"" } else { "" };
            let _ = writeln!(page, "<tr><th>{name}<td{class}>{}</tr>", escape(&value));
        }
        page.push_str("</table>\n");
    }
}

fn features(page: &mut String, reports: &[Report]) {
    page.push_str("<h2>Features</h2>\n<p>The worst error as a fraction of its bound, over the cases that have the feature.</p>\n");
    cells(page, &table(reports));
}

fn variants(page: &mut String, reports: &[Report]) {
    page.push_str("<h2>Variants</h2>\n<p>How often each code path was run that a backend may choose.</p>\n");
    let table = coverage(reports);
    if !table.rows.is_empty() {
        cells(page, &table);
    }
    for report in reports {
        let backend = escape(&report.backend);
        match (&report.variants, uncovered(std::slice::from_ref(report))) {
            (None, _) => drop(writeln!(page, "<p class=\"quiet\">{backend} lists no variants.</p>")),
            (_, Some(fault)) => drop(writeln!(page, "<p class=\"bad\">{backend}: {}.</p>", escape(&fault))),
            _ => {}
        }
    }
}

fn cells(page: &mut String, table: &Table) {
    page.push_str("<table>\n<tr>");
    for name in &table.header {
        let _ = write!(page, "<th>{}", escape(name));
    }
    page.push_str("</tr>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for cell in row {
            let class = match cell.as_str() {
                "skipped" | "-" => " class=\"quiet\"",
                cell if ["FAILED", "NOT RUN", "NOT LISTED"].iter().any(|word| cell.ends_with(word)) => {
                    " class=\"bad\""
                }
                _ => "",
            };
            let _ = write!(page, "<td{class}>{}", escape(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn failures(page: &mut String, reports: &[Report]) {
    let mut any = false;
    for report in reports {
        for result in report.failures() {
            if !any {
                page.push_str("<h2>Failures</h2>\n");
                any = true;
            }
            let _ = writeln!(
                page,
                "<pre class=\"bad\">{}: {}</pre>",
                escape(&report.backend),
                escape(&result.to_string())
            );
        }
    }
}

fn skips(page: &mut String, reports: &[Report]) {
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for report in reports {
        for result in &report.results {
            if let Outcome::Skipped { reason } = &result.outcome {
                let case = format!("{} {} {}", result.case, result.dtype, result.pass);
                reasons.entry(reason).or_default().push(case);
            }
        }
    }
    if reasons.is_empty() {
        return;
    }
    page.push_str("<h2>Skipped</h2>\n");
    for (reason, cases) in reasons {
        let _ = writeln!(
            page,
            "<details><summary>{} ({})</summary><pre>{}</pre></details>",
            escape(reason),
            cases.len(),
            escape(&cases.join("\n"))
        );
    }
}

/// Text as HTML text or attribute.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
