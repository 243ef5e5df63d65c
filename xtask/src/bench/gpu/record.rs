//! The rows of the suite as CSV: what benches/record keeps and `bench --plot` draws.

use serde::{Deserialize, Serialize};

use super::case::CallOption;
use super::measured::Row;

/// One implementation on one case. The names are those of the columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::bench) struct GpuRow {
    pub(in crate::bench) b: usize,
    pub(in crate::bench) t: usize,
    pub(in crate::bench) s: usize,
    pub(in crate::bench) n: usize,
    pub(in crate::bench) k: usize,
    pub(in crate::bench) h: usize,
    pub(in crate::bench) dtype: String,
    pub(in crate::bench) pass: String,
    pub(in crate::bench) causal: bool,
    pub(in crate::bench) terms: CallOption,
    pub(in crate::bench) implementation: String,
    pub(in crate::bench) device_us: f64,
    pub(in crate::bench) tflops: f64,
    pub(in crate::bench) host_us: f64,
}

/// What was measured on, in words: the date, the device and its driver, the versions, and the turns.
pub(super) struct Source {
    pub(super) versions: Vec<String>,
    pub(super) repeats: usize,
}

/// To one digit behind the point: more is noise.
fn rounded(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

fn lines(row: &Row) -> impl Iterator<Item = GpuRow> {
    let case = row.case;
    row.times.iter().map(move |(name, times)| GpuRow {
        b: case.b,
        t: case.t,
        s: case.s,
        n: case.n,
        k: case.k,
        h: case.h,
        dtype: case.dtype.to_string(),
        pass: if case.backward { "backward" } else { "forward" }.to_owned(),
        causal: case.causal,
        terms: case.terms,
        implementation: name.clone(),
        device_us: rounded(times.device_us),
        tflops: rounded(row.flops / times.device_us / 1e6),
        host_us: rounded(times.host_us),
    })
}

/// The rows, below comments that say where they are from.
pub(super) fn csv(rows: &[Row], source: &Source) -> crate::Result<String> {
    let notes = format!(
        "# {}; cargo xtask bench --suite gpu: medians of {} turns.\n# On the device: microseconds of a call and TFLOP/s \
         (half of the operations when causal). On the host: microseconds until a call returns.\n",
        source.versions.join(", "),
        source.repeats
    );
    let mut writer = csv::Writer::from_writer(notes.into_bytes());
    for line in rows.iter().flat_map(lines) {
        writer.serialize(line)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// The version of the driver, where the system says it.
pub(super) fn driver_version() -> Option<String> {
    version_of_driver(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

/// `580.159.04` of `NVRM version: NVIDIA UNIX ... Kernel Module  580.159.04  Release Build ...`.
fn version_of_driver(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        word.contains('.') && word.chars().all(|letter| letter.is_ascii_digit() || letter == '.')
    };
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use attention_core::DType;

    use super::super::case::Case;
    use super::super::measured::Times;
    use super::*;

    #[test]
    fn what_is_written_is_what_is_drawn() {
        let case = Case { causal: true, ..Case::plain([4, 4096, 4096, 32, 8, 128], DType::Bf16, 6) };
        let times = |device_us, host_us| Times { device_us, host_us };
        let row = |case, times| Row { case, flops: 2e9, times };
        let rows = [
            row(
                case,
                vec![("cudnn".to_owned(), times(10.04, 3.26)), ("torch-cudnn".to_owned(), times(20.0, 4.0))],
            ),
            row(
                Case { backward: true, terms: CallOption::Mask, ..case },
                vec![("cudnn".to_owned(), times(30.0, 5.0))],
            ),
        ];
        let source = Source { versions: vec!["2026-11-28".to_owned(), "H200".to_owned()], repeats: 2 };
        let text = csv(&rows, &source).unwrap();
        assert!(
            text.starts_with("# 2026-11-28, H200; cargo xtask bench --suite gpu: medians of 2 turns.\n# On"),
            "{text}"
        );
        let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(text.as_bytes());
        let read: Vec<GpuRow> = reader.deserialize().collect::<Result<_, _>>().unwrap();
        assert_eq!(read, rows.iter().flat_map(lines).collect::<Vec<_>>());
        assert!(text.contains(",backward,true,mask,cudnn,"), "{text}");
        assert_eq!((read[0].device_us, read[0].tflops, read[0].host_us), (10.0, 199.2, 3.3));
        assert_eq!(
            (read[2].pass.as_str(), read[2].terms, read[2].causal),
            ("backward", CallOption::Mask, true)
        );
    }

    #[test]
    fn the_driver_says_its_version_in_a_line() {
        let text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (builder)\nGCC version:  12.3";
        assert_eq!(version_of_driver(text).as_deref(), Some("580.159.04"));
        assert_eq!(version_of_driver("NVRM version: none"), None);
    }
}
