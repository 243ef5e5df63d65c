//! Scratch memory against the length of a sequence.

use super::draw::{self, Drawn, Line, NEITHER, OURS};
use super::record::{CpuRow, Record};

/// The rows that are drawn: full calls of this many heads of this dimension, in this dtype.
const HEADS: usize = 8;
const HEAD_DIM: usize = 64;
const DTYPE: &str = "f32";

/// Lengths and sizes that the axes show.
const LENGTHS: (f64, f64) = (512.0, 8192.0);
const MEBIBYTES: (f64, f64) = (0.5, 4096.0);

/// Scratch of the backends for host memory, next to the size of the logits, which they do not materialise.
pub(super) fn scratch(records: &[Record]) -> Drawn<String> {
    let mut rows = Vec::new();
    for record in records {
        rows.extend(record.rows::<CpuRow>()?);
    }
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let of = |backend: &str, pass: &str| {
        let mut points: Vec<(f64, f64)> = (rows.iter())
            .filter(|row| row.backend == backend && row.pass == pass && row.dtype == DTYPE)
            .filter(|row| row.t == row.s && !row.causal && row.mask == "none")
            .filter(|row| (row.b, row.n, row.k, row.h) == (1, HEADS, HEADS, HEAD_DIM))
            .filter_map(|row| Some((row.t as f64, mib(row.scratch_bytes? as f64))))
            .collect();
        points.sort_by(|a, b| a.partial_cmp(b).expect("lengths and sizes are numbers"));
        points.dedup();
        points
    };
    let logits = |length: f64| (length, mib(HEADS as f64 * length * length * 4.0));
    let logits: Vec<(f64, f64)> = [512.0, 1024.0, 2048.0, 4096.0, 8192.0].into_iter().map(logits).collect();
    let series =
        [("chunked", OURS[0]), ("cpu", OURS[1]), ("logits of all heads (computed, dashed)", NEITHER)];
    let sources: Vec<String> = records.iter().map(Record::source).collect();
    let title = "scratch by length, f32, 8 heads of 64, 2 threads; logarithmic axes; lower is better";
    draw::figure((1160, 460), title, &series, &sources, |area| {
        let areas = area.split_evenly((1, 2));
        let panels = [("forward", "forward"), ("both", "forward and backward together")];
        for (area, (pass, title)) in areas.iter().zip(panels) {
            let line = |points: Vec<(f64, f64)>, color, measured| {
                let last = points.last().map_or(LENGTHS.1, |&(length, _)| length);
                let end = (last < LENGTHS.1).then(|| "longer calls were not measured".to_owned());
                Line { points, color, measured, end }
            };
            let drawn = [
                line(logits.clone(), NEITHER, false),
                line(of("cpu", pass), OURS[1], true),
                line(of("chunked", pass), OURS[0], true),
            ];
            draw::lines(area, title, ("T = S, tokens", "MiB"), (LENGTHS, MEBIBYTES), &drawn)?;
        }
        Ok(())
    })
}
