//! What CPUs do: the time of other libraries over ours, by shape.

use super::draw::{self, Drawn, Ratios, Series, THEIRS};
use super::record::{CpuRow, Record};

/// `chunked` against torch's fused kernel.
pub(super) fn chunked(records: &[Record]) -> Drawn<String> {
    let title = "chunked, f32, f16 and bf16: torch's time over ours, on a logarithmic axis; right of the line, ours is faster";
    by_case(records, title, &[("torch, fused kernel", THEIRS[1])], &["torch"], (0.75, 4.0), 640)
}

/// `cpu` against the implementations of torch and JAX that materialise the logits.
pub(super) fn plain(records: &[Record]) -> Drawn<String> {
    let title = "cpu, f32 and bf16: another library's time over ours, on a logarithmic axis; right of the line, ours is faster";
    let series = [("torch, math", THEIRS[1]), ("JAX, xla", THEIRS[0])];
    by_case(records, title, &series, &["torch", "jax"], (0.9, 32.0), 500)
}

fn by_case(
    records: &[Record],
    title: &str,
    series: &[Series<'_>],
    peers: &[&str],
    range: (f64, f64),
    height: u32,
) -> Drawn<String> {
    let [record] = records else { return Err("drawn from one record".into()) };
    let rows: Vec<CpuRow> = record.rows()?;
    let panel = |pass: &str| {
        let rows: Vec<&CpuRow> = rows.iter().filter(|row| row.pass == pass).collect();
        let mut cases: Vec<&CpuRow> = Vec::new();
        for &row in &rows {
            // A case may have been measured twice against the same peer: alone, and again with the options.
            if cases.iter().all(|other| case(other) != case(row)) {
                cases.push(row);
            }
        }
        let ratios = cases.iter().map(|&first| {
            let of = |peer: &&str| {
                rows.iter().find(|row| case(row) == case(first) && row.peer == **peer).map(|row| row.ratio)
            };
            (label(first), peers.iter().map(of).collect::<Vec<_>>())
        });
        ratios.collect::<Vec<_>>()
    };
    draw::figure((1160, height), title, series, &[record.source()], |area| {
        let areas = area.split_evenly((1, 2));
        let panels = [("forward", "forward"), ("both", "forward and backward together")];
        for (area, (pass, title)) in areas.iter().zip(panels) {
            let unit = "time of the other over ours; in brackets, ours";
            draw::ratios(area, series, &Ratios { title, unit, rows: panel(pass), range, labels: 285 })?;
        }
        Ok(())
    })
}

/// What tells cases apart.
fn case(row: &CpuRow) -> (&str, &str, [usize; 6], bool, &str) {
    let CpuRow { b, t, s, n, k, h, .. } = *row;
    (&row.backend, &row.dtype, [b, t, s, n, k, h], row.causal, &row.mask)
}

/// `1,2048,2048,8,8,64 bf16 causal (12.1 ms)`.
fn label(row: &CpuRow) -> String {
    let CpuRow { b, t, s, n, k, h, dtype, median_ms, .. } = row;
    let mut label = format!("{b},{t},{s},{n},{k},{h} {dtype}");
    for (applies, name) in [
        (row.causal, "causal"),
        (row.mask != "none", row.mask.as_str()),
        (row.backend == "chunked-split-f32", "split"),
    ] {
        if applies {
            label += &format!(" {name}");
        }
    }
    let digits = if *median_ms < 100.0 { 1 } else { 0 };
    format!("{label} ({median_ms:.digits$} ms)")
}
