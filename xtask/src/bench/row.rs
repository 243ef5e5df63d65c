//! A line of a benchmark, as JSON, as CSV and in a table.

use std::collections::BTreeSet;
use std::fmt::Write;

use attention_core::Dimensions;
use serde::Serialize;

use super::case::Case;
use crate::machine;

/// One measurement. The names are those of the JSON objects and the CSV columns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) backend: String,
    pub(crate) dtype: String,
    pub(crate) pass: String,
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) s: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) h: usize,
    pub(crate) hv: usize,
    pub(crate) causal: bool,
    pub(crate) mask: String,
    pub(crate) median_ms: f64,
    pub(crate) gflops: f64,
    pub(crate) scratch_bytes: usize,
    pub(crate) peer: Option<String>,
    pub(crate) peer_median_ms: Option<f64>,
    pub(crate) ratio: Option<f64>,
    pub(crate) level: String,
    pub(crate) threads: usize,
    pub(crate) machine: String,
    /// For the table alone: what the peer ran.
    #[serde(skip)]
    pub(crate) peer_path: String,
    /// For the table alone: memory in use during a call, beyond inputs and outputs, where that can be seen.
    #[serde(skip)]
    pub(crate) peak_bytes: Option<u64>,
}

impl Row {
    /// The row as cells of the table.
    pub(crate) fn cells(&self) -> Vec<String> {
        let Self { b, t, s, n, k, h, hv, .. } = *self;
        let dims = Dimensions {
            batch: b,
            query_length: t,
            key_length: s,
            query_heads: n,
            key_heads: k,
            head_dim: h,
            value_head_dim: hv,
        };
        let optional = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            self.backend.clone(),
            self.dtype.clone(),
            self.pass.clone(),
            shape(dims),
            options(self.causal, &self.mask),
            format!("{:.3}", self.median_ms),
            format!("{:.1}", self.gflops),
            megabytes(self.scratch_bytes as u64),
            optional(self.peak_bytes.map(megabytes)),
            optional(self.peer.as_ref().map(|peer| format!("{peer} {}", self.peer_path))),
            optional(self.peer_median_ms.map(|ms| format!("{ms:.3}"))),
            optional(self.ratio.map(|ratio| format!("{ratio:.2}"))),
        ]
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 20))
}

/// The widths of a table whose rows are printed as they are measured.
pub(crate) struct Columns(Vec<usize>);

const HEADER: [&str; 12] = [
    "backend",
    "dtype",
    "pass",
    "B,T,S,N,K,H",
    "options",
    "median ms",
    "GFLOP/s",
    "scratch MiB",
    "peak MiB",
    "peer",
    "peer ms",
    "ratio",
];
/// How many columns, from the first, are words; the others are numbers but for the peer.
const WORDS: usize = 5;
const PEER: usize = 9;

impl Columns {
    /// Wide enough for what these backends are measured on.
    pub(crate) fn new(backends: &[&str], cases: &[Case]) -> Self {
        let mut widths = HEADER.map(str::len).to_vec();
        let mut fit = |column: usize, text: &str| widths[column] = widths[column].max(text.len());
        backends.iter().for_each(|name| fit(0, name));
        for case in cases {
            fit(1, case.dtype.name());
            fit(2, &case.work.to_string());
            fit(3, &shape(case.dims));
            fit(4, &options(case.causal, &case.mask.to_string()));
        }
        // A peer and its path, such as `torch FLASH_ATTENTION`.
        fit(PEER, "torch FLASH_ATTENTION");
        Self(widths)
    }

    /// The names of the columns, and a line below them.
    pub(crate) fn header(&self) -> String {
        let rule: Vec<String> = self.0.iter().map(|&width| "-".repeat(width)).collect();
        format!("{}\n{}", self.aligned(&HEADER.map(str::to_owned)), rule.join("  "))
    }

    /// A row.
    pub(crate) fn line(&self, row: &Row) -> String {
        self.aligned(&row.cells())
    }

    fn aligned(&self, cells: &[String]) -> String {
        let cells = cells.iter().zip(&self.0).enumerate().map(|(column, (cell, &width))| {
            if column < WORDS || column == PEER {
                format!("{cell:width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    }
}

/// `B,T,S,N,K,H`, with `Hv` where it differs.
pub(super) fn shape(dims: Dimensions) -> String {
    let Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim } =
        dims;
    let mut text = format!("{batch},{query_length},{key_length},{query_heads},{key_heads},{head_dim}");
    if value_head_dim != head_dim {
        let _ = write!(text, ",{value_head_dim}");
    }
    text
}

fn options(causal: bool, mask: &str) -> String {
    let causal = if causal { "causal " } else { "" };
    let mask = if mask == "none" { "" } else { mask };
    format!("{causal}{mask}").trim_end().to_owned()
}

/// The rows as a JSON list.
pub(crate) fn json(rows: &[Row]) -> crate::Result<String> {
    Ok(serde_json::to_string_pretty(rows)? + "\n")
}

/// The rows as CSV, below comments about the machine, the date and the versions.
///
/// `peers` holds the name of each peer with its version.
pub(crate) fn csv(rows: &[Row], peers: &[(String, String)]) -> crate::Result<String> {
    let described = |(name, version): &(String, String)| {
        let ran = rows.iter().filter(|row| row.peer.as_ref() == Some(name));
        let paths: BTreeSet<&str> = ran.map(|row| row.peer_path.as_str()).collect();
        format!("{name} {version} ({})", paths.into_iter().collect::<Vec<_>>().join(" and "))
    };
    let peers: Vec<String> = peers.iter().map(described).collect();
    let mut text = format!(
        "# machine: {}, {} instructions\n# date: {}\n# attention {}, peers: {}\n# medians of calls taken in turn \
         with the peer's; ratio is the peer's time over ours\n",
        machine::description(),
        machine::level(),
        machine::today(),
        env!("CARGO_PKG_VERSION"),
        if peers.is_empty() { "none".to_owned() } else { peers.join(", ") },
    );
    text += &table(rows)?;
    Ok(text)
}

/// A header and a line for each row. Rows are structs, and their fields the columns.
pub(super) fn table(rows: &[impl Serialize]) -> crate::Result<String> {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let serde_json::Value::Object(fields) = serde_json::to_value(row)? else {
            unreachable!("a row is a struct");
        };
        // serde_json sorts an object's keys; the order of the struct is the readable one.
        let order = columns(row)?;
        if index == 0 {
            text += &format!("{}\n", order.join(","));
        }
        let cells: Vec<String> = order.iter().map(|name| cell(&fields[name])).collect();
        text += &format!("{}\n", cells.join(","));
    }
    Ok(text)
}

/// The names of a row's fields, in order.
fn columns(row: &impl Serialize) -> crate::Result<Vec<String>> {
    let text = serde_json::to_string_pretty(row)?;
    let names = text.lines().filter_map(|line| line.trim().strip_prefix('"')?.split('"').next());
    Ok(names.map(str::to_owned).collect())
}

fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) if text.contains([',', '"']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) if number.is_f64() => {
            format!("{:.4}", number.as_f64().unwrap_or(f64::NAN))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            backend: "cpu".to_owned(),
            dtype: "f32".to_owned(),
            pass: "forward".to_owned(),
            b: 1,
            t: 2,
            s: 3,
            n: 8,
            k: 4,
            h: 5,
            hv: 6,
            causal: true,
            mask: "bias".to_owned(),
            median_ms: 1.5,
            gflops: 100.0,
            scratch_bytes: 1 << 20,
            peer: None,
            peer_median_ms: None,
            ratio: None,
            level: "avx512".to_owned(),
            threads: 2,
            machine: "A, 2 cores".to_owned(),
            peer_path: String::new(),
            peak_bytes: None,
        }
    }

    const KEYS: &str = "backend,dtype,pass,b,t,s,n,k,h,hv,causal,mask,median_ms,gflops,scratch_bytes,peer,\
        peer_median_ms,ratio,level,threads,machine";

    #[test]
    fn json_has_exactly_the_promised_keys() {
        assert_eq!(columns(&row()).unwrap().join(","), KEYS);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&json(&[row()]).unwrap()).unwrap();
        assert_eq!(rows[0].as_object().unwrap().len(), 21);
        assert_eq!(rows[0]["ratio"], serde_json::Value::Null);
        assert_eq!(rows[0]["causal"], true);
    }

    #[test]
    fn csv_quotes_what_has_commas_and_names_the_machine() {
        let beside = Row { peer: Some("torch".to_owned()), peer_path: "MATH".to_owned(), ..row() };
        let text = csv(&[row(), beside], &[("torch".to_owned(), "2.1".to_owned())]).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("# machine: ") && lines[2].ends_with("peers: torch 2.1 (MATH)"),
            "{text}"
        );
        assert_eq!(lines[4], KEYS);
        assert_eq!(
            lines[5],
            "cpu,f32,forward,1,2,3,8,4,5,6,true,bias,1.5000,100.0000,1048576,,,,avx512,2,\"A, 2 cores\""
        );
        assert_eq!(lines.len(), 7);
    }

    /// The header is there before the first row, and both have the same columns.
    #[test]
    fn lines_stand_below_the_header() {
        let dims = Dimensions {
            batch: 1,
            query_length: 20_000,
            key_length: 30_000,
            query_heads: 8,
            key_heads: 4,
            head_dim: 5,
            value_head_dim: 6,
        };
        let case = Case {
            dims,
            dtype: attention_core::DType::F32,
            work: attention_benches::Work::Forward,
            causal: true,
            mask: attention_benches::Mask::Bias,
        };
        let columns = Columns::new(&["cpu", "chunked-split-f32"], &[case]);
        let header = columns.header();
        let (names, rule) = header.split_once('\n').unwrap();
        let line = columns.line(&row());
        for (name, value) in [("dtype", "f32"), ("B,T,S", "1,2,3,8,4,5,6"), ("options", "causal bias")] {
            assert_eq!(names.find(name), line.find(value), "{line}");
        }
        let end = |text: &str, of: &str| text.find(of).map(|start| start + of.len());
        assert_eq!(end(names, "median ms"), end(&line, "1.500"));
        assert_eq!(end(names, "GFLOP/s"), end(&line, "100.0"));
        assert!(rule.chars().all(|character| character == '-' || character == ' '));
    }

    #[test]
    fn cells_show_options_and_leave_out_what_is_missing() {
        let cells = row().cells();
        assert_eq!(cells[3], "1,2,3,8,4,5,6");
        assert_eq!(cells[4], "causal bias");
        assert_eq!(cells[7], "1.00");
        assert_eq!(cells[11], "-");
    }
}
