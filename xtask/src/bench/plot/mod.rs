//! `cargo xtask bench --plot`: the figures of docs/performance/results.md, from the records in
//! benches/record. Nothing is measured.

mod cpu;
mod draw;
mod gpu;
mod memory;
mod record;

use std::error::Error;

use crate::generated;
use record::Record;

const COMMAND: &str = "bench --plot";
/// Where the figures are.
const FOLDER: &str = "docs/plots";

/// What draws a figure from its records.
type Draw = fn(&[Record]) -> Result<String, Box<dyn Error + Send + Sync>>;

/// Each figure, by its file, with the records that it is drawn from. A new record of the same cases takes the
/// place of the old one.
const FIGURES: &[(&str, &[&str], Draw)] = &[
    ("gpu-h200.svg", &["2026-11-28-gpu-h200-2.csv"], gpu::shapes),
    ("gpu-h200-options.svg", &["2026-11-28-gpu-h200-2.csv"], gpu::options),
    ("chunked.svg", &["2026-11-24-chunked-amx.csv"], cpu::chunked),
    ("cpu.svg", &["2026-11-23-cpu-plain.csv"], cpu::plain),
    ("memory.svg", &["2026-11-24-chunked-amx.csv", "2026-11-23-cpu-plain.csv"], memory::scratch),
];

/// Writes the figures, or compares them with those that are there.
pub(crate) fn run(check: bool) -> crate::Result {
    let files = FIGURES.iter().map(|(file, records, draw)| {
        let records = records.iter().map(|file| Record::read(file)).collect::<crate::Result<Vec<_>>>()?;
        Ok((format!("{FOLDER}/{file}"), draw(&records)?))
    });
    generated::settle(&files.collect::<crate::Result<Vec<_>>>()?, COMMAND, check)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_what_the_records_say() {
        assert!(run(true).unwrap());
    }

    #[test]
    fn every_figure_is_shown_and_names_its_records() {
        let page = generated::read("docs/performance/results.md").unwrap();
        for (file, records, draw) in FIGURES {
            assert!(
                page.contains(&format!("](../plots/{file})")),
                "{file} is not in docs/performance/results.md"
            );
            let read: Vec<Record> = records.iter().map(|file| Record::read(file).unwrap()).collect();
            let figure = draw(&read).unwrap();
            for record in *records {
                assert!(figure.contains(record), "{file} does not name {record}");
            }
            assert_eq!(figure, draw(&read).unwrap(), "{file} differs from call to call");
        }
    }
}
