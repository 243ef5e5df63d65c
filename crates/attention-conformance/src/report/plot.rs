//! Plots as SVG.

use std::fmt::Write;

use attention_core::{DType, Pass};

use super::{Outcome, Report};

const WIDTH: f64 = 860.0;
const ROW: f64 = 34.0;
const LEFT: f64 = 170.0;
const TOP: f64 = 28.0;
/// The axis goes from 10^-4 of a bound to 10 times it.
const DECADES: (f64, f64) = (-4.0, 1.0);

/// One case.
struct Dot<'a> {
    /// Its error as a fraction of its bound.
    fraction: f64,
    failed: bool,
    case: &'a str,
}

/// Every case as a dot: its error as a fraction of its bound, one line a backend, dtype and pass. Errors of
/// zero lie at the left end; failures, whose error has no upper end, at the right one.
pub(super) fn errors(reports: &[Report]) -> String {
    let mut lines: Vec<(String, Vec<Dot<'_>>)> = Vec::new();
    for report in reports {
        for dtype in DType::FLOATS {
            for pass in [Pass::Forward, Pass::Backward] {
                let dots: Vec<_> = (report.results.iter())
                    .filter(|result| (result.dtype, result.pass) == (dtype, pass))
                    .filter_map(|result| match result.outcome {
                        Outcome::Passed { worst, .. } => {
                            Some(Dot { fraction: worst, failed: false, case: &result.case })
                        }
                        Outcome::Failed { .. } => {
                            Some(Dot { fraction: f64::INFINITY, failed: true, case: &result.case })
                        }
                        Outcome::Skipped { .. } => None,
                    })
                    .collect();
                if !dots.is_empty() {
                    lines.push((format!("{} {dtype} {pass}", report.backend), dots));
                }
            }
        }
    }
    let height = TOP + ROW * lines.len() as f64 + 20.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"errors over bounds\" xmlns=\"http://www.w3.org/2000/svg\">\n"
    );
    for decade in DECADES.0 as i32..=DECADES.1 as i32 {
        let x = position(10f64.powi(decade));
        let class = if decade == 0 { "bound" } else { "grid" };
        let label = if decade == 0 { "bound".to_owned() } else { format!("1e{decade}") };
        let bottom = height - 16.0;
        let _ = writeln!(
            svg,
            "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/><text x=\"{x:.1}\" y=\"18\" text-anchor=\"middle\">{label}</text>"
        );
    }
    for (index, (name, dots)) in lines.iter().enumerate() {
        let middle = TOP + ROW * (index as f64 + 0.5);
        let _ = writeln!(svg, "<text x=\"4\" y=\"{:.1}\">{}</text>", middle + 4.0, super::html::escape(name));
        for (dot, Dot { fraction, failed, case }) in dots.iter().enumerate() {
            // Spread over the line's height, so that dots of equal error stay apart.
            let y = middle + ROW * 0.7 * ((dot as f64 * 0.618_034).fract() - 0.5);
            let class = if *failed { "failed" } else { "passed" };
            let _ = writeln!(
                svg,
                "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"2\"><title>{}: {fraction:.3}</title></circle>",
                position(*fraction),
                super::html::escape(case)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// The x coordinate of a fraction, logarithmic, ends included.
fn position(fraction: f64) -> f64 {
    let decade = fraction.log10().clamp(DECADES.0, DECADES.1);
    LEFT + (WIDTH - LEFT - 20.0) * (decade - DECADES.0) / (DECADES.1 - DECADES.0)
}
