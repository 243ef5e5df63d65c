//! Records, as they were written.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::generated;

/// A file of benches/record.
pub(super) struct Record {
    pub(super) name: String,
    /// The comments on top: machine, date and versions.
    pub(super) notes: Vec<String>,
    text: String,
}

impl Record {
    pub(super) fn read(name: &str) -> crate::Result<Self> {
        let text = generated::read(&format!("benches/record/{name}"))?;
        let notes = text.lines().map_while(|line| line.strip_prefix('#')).map(|note| note.trim().to_owned());
        Ok(Self { name: name.to_owned(), notes: notes.collect(), text })
    }

    /// Its rows, by the names of the columns.
    pub(super) fn rows<R: DeserializeOwned>(&self) -> crate::Result<Vec<R>> {
        let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(self.text.as_bytes());
        let rows = reader.deserialize().collect::<Result<Vec<R>, csv::Error>>();
        rows.map_err(|error| format!("{}: {error}", self.name).into())
    }

    /// The device, the date and the versions, with the file that they are from, as one line.
    pub(super) fn source(&self) -> String {
        let said = |name: &str| {
            self.notes.iter().find_map(|note| note.strip_prefix(name)).map(|rest| rest.trim().to_owned())
        };
        let what = match (said("machine:"), said("date:")) {
            (Some(machine), Some(date)) => {
                let versions = self.notes.iter().find(|note| note.starts_with("attention "));
                let versions = versions.map(|versions| format!(", {versions}")).unwrap_or_default();
                format!("{machine}, {date}{versions}")
            }
            // One sentence, with the command after it.
            _ => self.notes.first().and_then(|note| note.split(';').next()).unwrap_or("not noted").to_owned(),
        };
        format!("{what}; benches/record/{}", self.name)
    }
}

/// A row on a CPU.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct CpuRow {
    pub(super) backend: String,
    pub(super) dtype: String,
    pub(super) pass: String,
    pub(super) b: usize,
    pub(super) t: usize,
    pub(super) s: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) h: usize,
    pub(super) causal: bool,
    pub(super) mask: String,
    pub(super) median_ms: f64,
    pub(super) scratch_bytes: Option<u64>,
    pub(super) peer: String,
    pub(super) ratio: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::gpu::record::GpuRow;

    #[test]
    fn records_are_read_by_the_names_of_their_columns() {
        let gpu = Record::read("2026-11-25-gpu-h200.csv").unwrap();
        let rows: Vec<GpuRow> = gpu.rows().unwrap();
        assert_eq!((rows[0].b, rows[0].implementation.as_str(), rows[0].device_us), (1, "cudnn", 11.7));
        let source = "2026-11-25, H200, driver 580.159.04, CUDA 13.0, cuDNN 9.19.0, torch 2.11.0+cu130; \
                      benches/record/2026-11-25-gpu-h200.csv";
        assert_eq!(gpu.source(), source);
        let cpu = Record::read("2026-11-23-cpu-plain.csv").unwrap();
        let rows: Vec<CpuRow> = cpu.rows().unwrap();
        assert_eq!((rows[1].peer.as_str(), rows[1].scratch_bytes), ("jax", Some(1263616)));
        assert!(
            cpu.source()
                .starts_with("Intel(R) Xeon(R) Processor, 2 cores, avx512 instructions, 2026-11-23, ")
        );
    }

    #[test]
    fn a_row_that_is_none_is_told_with_its_record() {
        let text = "b,t\n1,x\n".to_owned();
        let record = Record { name: "a.csv".to_owned(), notes: vec![], text };
        let error = record.rows::<(usize, usize)>().unwrap_err().to_string();
        assert!(error.starts_with("a.csv: "), "{error}");
    }
}
