//! What GPUs do: TFLOP/s by shape and by option, and decoding.

use super::draw::{self, Bars, Drawn, OURS, Series, THEIRS};
use super::record::Record;
use crate::bench::gpu::case::CallOption;
use crate::bench::gpu::record::GpuRow;
use crate::bench::measure::median;

const SERIES: [(&str, Series<'static>); 5] = [
    ("cudnn", ("cudnn", OURS[0])),
    ("chunked-cuda", ("chunked-cuda", OURS[1])),
    ("torch-cudnn", ("torch, cuDNN", THEIRS[0])),
    ("torch-flash", ("torch, FlashAttention 2", THEIRS[1])),
    ("torch-efficient", ("torch, memory-efficient", THEIRS[2])),
];

/// What is written below figures with bars.
const REFUSED: &str = "a missing bar is a call that the implementation refuses";

/// Shorter sequences measure the host.
const SHORTEST: usize = 512;

fn series() -> Vec<Series<'static>> {
    SERIES.iter().map(|&(_, series)| series).collect()
}

/// The bars of the rows of a group, by implementation.
fn values<'a>(rows: impl Iterator<Item = &'a GpuRow> + Clone, value: fn(&GpuRow) -> f64) -> Vec<Option<f64>> {
    let of = |name: &str| rows.clone().find(|row| row.implementation == name).map(value);
    SERIES.iter().map(|&(name, _)| of(name)).collect()
}

/// A multiple of this that no bar reaches.
fn above(values: &[Vec<Option<f64>>], step: f64) -> f64 {
    let most = values.iter().flatten().flatten().copied().fold(0.0, f64::max);
    ((most / step).floor() + 1.0) * step
}

fn heads(row: &GpuRow) -> String {
    if row.n == row.k { format!("{} x {}", row.n, row.h) } else { format!("{}/{} x {}", row.n, row.k, row.h) }
}

/// Plain calls by shape, forward and backward, full and causal.
pub(super) fn shapes(records: &[Record]) -> Drawn<String> {
    let [record] = records else { return Err("drawn from one record".into()) };
    let rows: Vec<GpuRow> = record.rows()?;
    let plain: Vec<&GpuRow> = (rows.iter())
        .filter(|row| row.terms == CallOption::Plain && row.dtype == "bf16" && row.t >= SHORTEST)
        .collect();
    let shape = |row: &GpuRow| [row.b, row.t, row.n, row.k, row.h];
    let mut shapes: Vec<&GpuRow> = Vec::new();
    for &row in &plain {
        if shapes.iter().all(|other| shape(other) != shape(row)) {
            shapes.push(row);
        }
    }
    let panel = |pass: &str, causal: bool| {
        let values = shapes.iter().map(|like| {
            let same = |row: &&GpuRow| shape(row) == shape(like) && row.pass == pass && row.causal == causal;
            values(plain.iter().copied().filter(same), |row| row.tflops)
        });
        values.collect::<Vec<_>>()
    };
    let panels = [
        ("forward", panel("forward", false)),
        ("forward, causal", panel("forward", true)),
        ("backward", panel("backward", false)),
        ("backward, causal", panel("backward", true)),
    ];
    let most = panels.iter().map(|(_, values)| above(values, 100.0)).fold(0.0, f64::max);
    let title =
        "bf16 by shape: batch x tokens above, heads (query/key) x head dimension below; higher is better";
    let notes = [REFUSED.to_owned(), record.source()];
    draw::figure((1160, 778), title, &series(), &notes, |area| {
        for (area, (title, values)) in area.split_evenly((2, 2)).iter().zip(panels) {
            let groups = shapes.iter().map(|row| [format!("{} x {}", row.b, row.t), heads(row)]).collect();
            draw::bars(area, &series(), &Bars { title, unit: "TFLOP/s", groups, values, most })?;
        }
        Ok(())
    })
}

/// Medians over plain calls of microseconds on the host, by implementation.
fn on_the_host(rows: &[GpuRow], pass: &str) -> Vec<Option<f64>> {
    let of = |name: &str| {
        let mut times: Vec<f64> = (rows.iter())
            .filter(|row| row.implementation == name && row.pass == pass)
            .filter(|row| row.terms == CallOption::Plain && row.dtype == "bf16" && row.t > 1)
            .map(|row| row.host_us)
            .collect();
        (!times.is_empty()).then(|| median(&mut times))
    };
    SERIES.iter().map(|&(name, _)| of(name)).collect()
}

/// Options and f32 on one shape, decoding, and time on the host.
pub(super) fn options(records: &[Record]) -> Drawn<String> {
    let [record] = records else { return Err("drawn from one record".into()) };
    let rows: Vec<GpuRow> = record.rows()?;
    let of = |pass: &'static str, dtype: &'static str, terms: CallOption, h: usize| {
        rows.iter().filter(move |row| {
            let shape = (row.b, row.t, row.n, row.k, row.h) == (4, 4096, 16, 16, h);
            shape && !row.causal && row.pass == pass && row.dtype == dtype && row.terms == terms
        })
    };
    let label = |above: &str, below: &str| [above.to_owned(), below.to_owned()];
    let groups = vec![
        label("plain", ""),
        label("bias", "1,N,T,S"),
        label("mask", "B,1,T,S"),
        label("dropout", "published"),
        label("dropout", "its own"),
        label("f32", "H = 64"),
        label("f32", "H = 128"),
    ];
    let panel = |pass: &'static str| {
        let plain = |dtype, h| values(of(pass, dtype, CallOption::Plain, h), |row| row.tflops);
        let with = |terms| values(of(pass, "bf16", terms, 128), |row| row.tflops);
        let mut published = with(CallOption::Dropout);
        // Every backend keeps the probabilities that the published stream selects, except cuDNN with its own
        // dropout.
        let own: Vec<Option<f64>> = (SERIES.iter().zip(&mut published))
            .map(|(&(name, _), value)| match name {
                "cudnn" => of(pass, "bf16", CallOption::Dropout, 128)
                    .find(|row| row.implementation == "cudnn-own-dropout")
                    .map(|row| row.tflops),
                "chunked-cuda" => None,
                _ => value.take(),
            })
            .collect();
        vec![
            plain("bf16", 128),
            with(CallOption::Bias),
            with(CallOption::Mask),
            published,
            own,
            plain("f32", 64),
            plain("f32", 128),
        ]
    };
    let decoding: Vec<&GpuRow> = rows.iter().filter(|row| row.t == 1).collect();
    let mut cases: Vec<&GpuRow> = Vec::new();
    for &row in &decoding {
        if cases.iter().all(|other| (other.b, other.s) != (row.b, row.s)) {
            cases.push(row);
        }
    }
    // Keys and values of two bytes a number, read once.
    let rate = |row: &GpuRow| (2 * row.b * row.s * row.k * row.h * 2) as f64 / row.device_us / 1e6;
    let rates = cases.iter().map(|case| {
        let same = |row: &&GpuRow| (row.b, row.s) == (case.b, case.s);
        values(decoding.iter().copied().filter(same), rate)
    });
    let rates: Vec<_> = rates.collect();
    let most = above(&panel("forward"), 100.0).max(above(&panel("backward"), 100.0));
    let title = "options in bf16, and f32: 4 x 4096 tokens, 16 heads of 128, not causal; higher is better but for time on the host";
    let notes = [format!("{REFUSED}, or a dropout that it does not have"), record.source()];
    draw::figure((1160, 778), title, &series(), &notes, |area| {
        let (calls, below) = area.split_vertically(345);
        let (left, right) = calls.split_horizontally(580);
        for (area, title) in [(left, "forward"), (right, "backward")] {
            let (groups, values) = (groups.clone(), panel(title));
            draw::bars(&area, &series(), &Bars { title, unit: "TFLOP/s", groups, values, most })?;
        }
        let (left, right) = below.split_horizontally(580);
        let case = |row: &&GpuRow| [format!("{} x {} keys", row.b, row.s), heads(row)];
        let (groups, most) = (cases.iter().map(case).collect(), above(&rates, 1.0));
        let title = "decoding, one row, bf16";
        let unit = "TB/s of keys and values";
        draw::bars(&left, &series(), &Bars { title, unit, groups, values: rates, most })?;
        let values = vec![on_the_host(&rows, "forward"), on_the_host(&rows, "backward")];
        let (groups, most) = (vec![label("forward", ""), label("backward", "")], above(&values, 20.0));
        let title = "time on the host until a call returns, median over the plain shapes; lower is better";
        draw::bars(&right, &series(), &Bars { title, unit: "microseconds", groups, values, most })
    })
}
