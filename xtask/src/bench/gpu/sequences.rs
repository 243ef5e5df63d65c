//! `cargo xtask bench --suite gpu-sequences`: packed and paged calls, and keys of 8 bits, in turn with the
//! calls that one would make without them.

use std::path::Path;
use std::sync::Arc;

use attention_benches::{Layout, Sequences};
use attention_core::{AttentionBackend, DType};
use attention_cuda::CudaDevice;
use serde::Serialize;

use super::call::{Call, Data};
use super::measured::Times;
use super::{median, on_device, record};
use crate::bench::row;
use crate::bench::sequences::names_explained;
use crate::{machine, reporting};

/// The same sequences in several ways, which are measured in turn.
#[derive(Clone, Debug)]
struct Group {
    name: &'static str,
    sequences: Sequences,
    dtype: DType,
    causal: bool,
    backward: bool,
    /// Each after those that it stands beside.
    ways: Vec<Way>,
    /// Calls that are timed together.
    calls: usize,
}

/// How rows lie in memory, and of which dtype keys and values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    layout: Layout,
    key_dtype: DType,
    /// The index of the way beside which it stands; none for the first.
    beside: Option<usize>,
}

/// A line of the record.
#[derive(Clone, Debug, Serialize)]
struct Row {
    sequences: String,
    implementation: String,
    dtype: String,
    key_dtype: String,
    pass: String,
    causal: bool,
    layout: String,
    device_us: f64,
    host_us: f64,
    /// TFLOP/s of the work without padding, half of it when causal.
    tflops: f64,
    /// TB/s of keys and values.
    terabytes: f64,
    beside: String,
    beside_us: f64,
    /// The time beside over the call's own: above 1 the call is the faster one.
    ratio: f64,
}

/// The list.
fn groups() -> Vec<Group> {
    let way = |layout, key_dtype, beside| Way { layout, key_dtype, beside };
    let paged = |page_size| Layout::Paged { page_size };
    let dtype = DType::Bf16;
    let mut groups = Vec::new();
    for (name, batch) in [("decode", 32), ("decode alone", 1)] {
        groups.push(Group {
            name,
            sequences: Sequences::equal(batch, [1, 8192], 32, 8, 128),
            dtype,
            causal: false,
            backward: false,
            ways: vec![
                way(Layout::Rectangle, dtype, None),
                way(paged(16), dtype, Some(0)),
                way(paged(1), dtype, Some(0)),
                way(paged(64), dtype, Some(0)),
                way(Layout::Rectangle, DType::F8E4M3, Some(0)),
                way(paged(16), DType::F8E4M3, Some(1)),
                way(paged(1), DType::F8E4M3, Some(2)),
                way(paged(16), DType::F8E5M2, Some(1)),
            ],
            calls: 20,
        });
    }
    let equal = Sequences::equal(16, [1024, 1024], 16, 16, 128);
    let uniform = Sequences::uniform(32, 2048, 16, 16, 128);
    for (name, sequences) in [("equal lengths", equal), ("1 to 2048", uniform)] {
        for (causal, backward) in [(false, false), (true, false), (false, true), (true, true)] {
            let packed = way(Layout::Packed, dtype, Some(0));
            let mut ways = vec![way(Layout::Rectangle, dtype, None), packed];
            if name != "equal lengths" {
                ways.push(way(Layout::Padded, dtype, Some(0)));
            }
            groups.push(Group {
                name,
                sequences: sequences.clone(),
                dtype,
                causal,
                backward,
                ways,
                calls: 10,
            });
        }
    }
    let prefill = Sequences::equal(8, [512, 4096], 32, 8, 128);
    groups.push(Group {
        name: "prefill in chunks",
        sequences: prefill,
        dtype,
        causal: false,
        backward: false,
        ways: vec![
            way(Layout::Rectangle, dtype, None),
            way(paged(16), dtype, Some(0)),
            way(paged(1), dtype, Some(0)),
            way(paged(16), DType::F8E4M3, Some(1)),
        ],
        calls: 10,
    });
    groups
}

/// What is wanted of the suite.
pub(in crate::bench) struct Wanted<'a> {
    pub(in crate::bench) backends: &'a [String],
    /// What the name of sequences has.
    pub(in crate::bench) filter: &'a str,
    pub(in crate::bench) repeats: usize,
    pub(in crate::bench) json: Option<&'a Path>,
    pub(in crate::bench) record: Option<&'a Path>,
}

/// Measures the list, and prints a table.
pub(in crate::bench) fn run(wanted: &Wanted<'_>) -> crate::Result<bool> {
    let device = CudaDevice::new("cudnn", 0)?;
    let name = device.context().name()?;
    println!("{name}");
    println!(
        "{:<18} {:<13} {:<8} {:<15} {:<10} {:>10} {:>8} {:>7} {:>6}  {:<16} {:>6}",
        "sequences",
        "backend",
        "keys",
        "pass",
        "layout",
        "device us",
        "host us",
        "TFLOP/s",
        "TB/s",
        "beside",
        "ratio"
    );
    let backends: Vec<_> = on_device(&device)
        .into_iter()
        .filter(|(name, backend)| {
            *name == backend.name()
                && (wanted.backends.is_empty() || wanted.backends.iter().any(|wanted| wanted == name))
        })
        .collect();
    for (_, backend) in &backends {
        backend.available()?;
    }
    let mut rows = Vec::new();
    for group in groups().into_iter().filter(|group| group.name.contains(wanted.filter)) {
        for row in measure(&group, &device, &backends, wanted.repeats)? {
            println!("{}", line(&row));
            rows.push(row);
        }
    }
    if let Some(path) = wanted.json {
        reporting::write_asked_for(path, &(serde_json::to_string_pretty(&rows)? + "\n"))?;
    }
    if let Some(path) = wanted.record {
        let driver = record::driver_version().map(|version| format!("driver {version}"));
        let source = [Some(machine::today()), Some(name), driver];
        let source = source.into_iter().flatten().collect::<Vec<_>>().join(", ");
        reporting::write_asked_for(path, &csv(&rows, &source, wanted.repeats)?)?;
    }
    Ok(true)
}

/// A row for each way that a backend serves.
fn measure(
    group: &Group,
    device: &CudaDevice,
    backends: &[(&str, Arc<dyn AttentionBackend>)],
    repeats: usize,
) -> crate::Result<Vec<Row>> {
    let data = |way: &Way| {
        let dtypes = [group.dtype, way.key_dtype];
        Data::of_sequences(device, &group.sequences, way.layout, dtypes, group.causal, group.backward)
    };
    let mut data = group.ways.iter().map(data).collect::<crate::Result<Vec<_>>>()?;
    let flops = group.sequences.forward_flops()
        * if group.backward { 2.5 } else { 1.0 }
        * if group.causal { 0.5 } else { 1.0 };
    let mut rows = Vec::new();
    for (name, backend) in backends {
        let mut times: Vec<Vec<Times>> = vec![Vec::new(); group.ways.len()];
        for _ in 0..repeats {
            for (data, times) in data.iter_mut().zip(&mut times) {
                if backend.supports(data.problem()).is_ok() {
                    times.push(Call::new(data, &**backend)?.time(group.calls)?);
                }
            }
        }
        let medians: Vec<Option<Times>> = times.iter().map(|times| median(times)).collect();
        for (way, own) in group.ways.iter().zip(&medians) {
            let Some(own) = own else { continue };
            let beside = way.beside.and_then(|index| Some((group.ways[index], medians[index]?)));
            rows.push(Row {
                sequences: group.name.to_owned(),
                implementation: (*name).to_owned(),
                dtype: group.dtype.to_string(),
                key_dtype: way.key_dtype.to_string(),
                pass: if group.backward { "backward" } else { "forward" }.to_owned(),
                causal: group.causal,
                layout: way.layout.to_string(),
                device_us: own.device_us,
                host_us: own.host_us,
                tflops: flops / own.device_us / 1e6,
                terabytes: bytes_of_keys(&group.sequences, way.key_dtype) / own.device_us / 1e6,
                beside: beside.map_or_else(|| "-".to_owned(), |(way, _)| said(&way)),
                beside_us: beside.map_or(own.device_us, |(_, times)| times.device_us),
                ratio: beside.map_or(1.0, |(_, times)| times.device_us / own.device_us),
            });
        }
    }
    Ok(rows)
}

/// Bytes of keys and values.
fn bytes_of_keys(sequences: &Sequences, dtype: DType) -> f64 {
    let keys: usize = sequences.lengths.iter().map(|&[_, keys]| keys).sum();
    (2 * keys * sequences.key_heads * sequences.head_dim * dtype.size()) as f64
}

fn said(way: &Way) -> String {
    format!("{} {}", way.layout, way.key_dtype)
}

fn line(row: &Row) -> String {
    let pass = format!("{}{}", row.pass, if row.causal { " causal" } else { "" });
    format!(
        "{:<18} {:<13} {:<8} {:<15} {:<10} {:>10.1} {:>8.1} {:>7.1} {:>6.2}  {:<16} {:>6.3}",
        row.sequences,
        row.implementation,
        row.key_dtype,
        pass,
        row.layout,
        row.device_us,
        row.host_us,
        row.tflops,
        row.terabytes,
        row.beside,
        row.ratio
    )
}

/// The rows as CSV, below comments about the device, the date and what the names stand for.
fn csv(rows: &[Row], source: &str, repeats: usize) -> crate::Result<String> {
    let mut text = format!(
        "# {source}; cargo xtask bench --suite gpu-sequences: medians of {repeats} turns.\n# ratio is the time beside \
         over the call's own. Starts, lengths and pages are in device memory; keys of 8 bits have a scale by head.\n"
    );
    text += &names_explained(groups().iter().map(|group| (group.name, &group.sequences)));
    text += &row::table(rows)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_makes_a_problem_and_stands_beside_one_before_it() -> crate::Result<()> {
        for group in groups() {
            for (index, way) in group.ways.iter().enumerate() {
                assert!(way.beside.is_none_or(|beside| beside < index), "{group:?}");
                let (builder, places) = group.sequences.problem(way.layout, group.dtype, way.key_dtype)?;
                let problem = builder.causal(group.causal).build()?;
                for (role, view) in places.views()? {
                    assert_eq!(problem.tensor(role), Some(&view.desc()), "{} {}", group.name, said(way));
                }
            }
        }
        Ok(())
    }
}
