//! `cargo xtask bench --suite sequences`: packed and paged calls on the CPU, in turn with the calls that one
//! would make without them, and with other libraries.

use std::path::Path;
use std::sync::Arc;

use attention_benches::{Layout, Mask, Plans, Sequences, Work, Workload};
use attention_core::{AttentionBackend, DType, Dimensions, ScratchBuffer};
use serde::Serialize;

use super::case::Case;
use super::measure::{median, take_turn, time_calls};
use super::peer::{self, Peer};
use super::row;
use crate::backends::{self, InPool};
use crate::{machine, reporting};

/// How many turns each side has unless a number is asked for.
const TURNS: usize = 7;

/// What is wanted of the suite.
pub(super) struct Wanted<'a> {
    pub(super) backends: &'a [String],
    /// Those of these dtypes, all where there are none.
    pub(super) dtypes: &'a [DType],
    pub(super) peers: &'a [String],
    pub(super) python: &'a Path,
    pub(super) turns: Option<usize>,
    pub(super) json: Option<&'a Path>,
    pub(super) record: Option<&'a Path>,
}

/// A call, and the one that it stands beside.
#[derive(Clone, Debug)]
struct Compared {
    name: &'static str,
    sequences: Sequences,
    dtype: DType,
    work: Work,
    causal: bool,
    layout: Layout,
    beside: Layout,
    /// Whether other libraries are asked for the same.
    peers: bool,
}

/// A line of the record.
#[derive(Clone, Debug, Serialize)]
struct Row {
    case: String,
    backend: String,
    dtype: String,
    pass: String,
    causal: bool,
    layout: String,
    median_ms: f64,
    gflops: f64,
    beside: String,
    beside_median_ms: f64,
    /// The time beside over the call's own: above 1 the call is the faster one.
    ratio: f64,
}

/// The list.
fn cases() -> Vec<Compared> {
    let mut cases = Vec::new();
    let mut add = |name, sequences: &Sequences, dtypes: &[DType], works: &[Work], layout, beside, peers| {
        for &dtype in dtypes {
            for &work in works {
                let sequences = sequences.clone();
                // The offset of a decoder's only row lets it see every key, causal or not.
                cases.push(Compared { name, sequences, dtype, work, causal: false, layout, beside, peers });
            }
        }
    };
    let both = [Work::Forward, Work::Both];
    let widths = [DType::F32, DType::Bf16];
    let decoding = Sequences::equal(8, [1, 2048], 32, 8, 128);
    for page_size in [16, 1] {
        let paged = Layout::Paged { page_size };
        add("decode", &decoding, &widths, &both[..1], paged, Layout::Rectangle, false);
    }
    let equal = Sequences::equal(8, [512, 512], 8, 8, 64);
    add("equal lengths", &equal, &widths, &both, Layout::Packed, Layout::Rectangle, false);
    let uniform = Sequences::uniform(8, 2048, 8, 8, 64);
    add("1 to 2048", &uniform, &widths, &both, Layout::Packed, Layout::Rectangle, true);
    add("1 to 2048", &uniform, &widths[..1], &both, Layout::Packed, Layout::Padded, false);
    let short = Sequences::uniform(64, 128, 12, 12, 32);
    add("1 to 128", &short, &widths[..1], &both, Layout::Packed, Layout::Rectangle, true);
    cases
}

/// Measures the list, and prints a table.
pub(super) fn run(wanted: &Wanted<'_>) -> crate::Result {
    let threads = machine::cores();
    let backends = (backends::named(wanted.backends)?.into_iter())
        .filter(|backend| !backends::computes_on_a_device(backend))
        .map(|backend| Ok(Arc::new(InPool::new(backend, threads)?) as Arc<dyn AttentionBackend>))
        .collect::<crate::Result<Vec<_>>>()?;
    let mut peers = peer::start_all(wanted.peers, wanted.python, threads);
    println!("{}, {}, {threads} threads", machine::description(), machine::level());
    println!(
        "{:<14} {:<9} {:<5} {:<8} {:<10} {:>10} {:>8}  {:<34} {:>10} {:>6}",
        "sequences",
        "backend",
        "dtype",
        "pass",
        "layout",
        "median ms",
        "GFLOP/s",
        "beside",
        "median ms",
        "ratio"
    );
    let turns = wanted.turns.unwrap_or(TURNS);
    let is_wanted = |case: &Compared| wanted.dtypes.is_empty() || wanted.dtypes.contains(&case.dtype);
    let mut rows = Vec::new();
    for case in cases().into_iter().filter(is_wanted) {
        for backend in &backends {
            for row in measure(&case, &**backend, &mut peers, turns)? {
                println!("{}", line(&row));
                rows.push(row);
            }
        }
    }
    if let Some(path) = wanted.json {
        reporting::write_asked_for(path, &(serde_json::to_string_pretty(&rows)? + "\n"))?;
    }
    if let Some(path) = wanted.record {
        let versions = peers.iter().map(|peer| format!("{} {}", peer.name, peer.version)).collect::<Vec<_>>();
        reporting::write_asked_for(path, &csv(&rows, &versions, threads, turns)?)?;
    }
    Ok(true)
}

/// One side of a comparison: makes as many calls, and gives the milliseconds of each.
type Side<'a> = Box<dyn FnMut(usize) -> crate::Result<Vec<f64>> + 'a>;

/// A row for the call that a case stands beside, and one for each peer that serves it.
fn measure(
    case: &Compared,
    backend: &dyn AttentionBackend,
    peers: &mut [Peer],
    turns: usize,
) -> crate::Result<Vec<Row>> {
    let prepare = |layout| -> crate::Result<Option<(Workload, Plans)>> {
        let workload = Workload::of_sequences(&case.sequences, layout, case.dtype, case.work, case.causal)?;
        match workload.plan(backend) {
            Ok(plans) => Ok(Some((workload, plans))),
            Err(refusal) => {
                eprintln!("backend {} skipped: {refusal}", backend.name());
                Ok(None)
            }
        }
    };
    let (Some((own, own_plans)), Some((beside, beside_plans))) =
        (prepare(case.layout)?, prepare(case.beside)?)
    else {
        return Ok(Vec::new());
    };
    let flops = own.flops();
    let mut names = vec![case.beside.to_string()];
    let mut sides = vec![calls(own, own_plans), calls(beside, beside_plans)];
    let rectangle = rectangle(case);
    for peer in peers.iter_mut().filter(|_| case.peers) {
        match peer.prepare_sequences(&rectangle, &case.sequences, "default") {
            Err(reason) => eprintln!("peer {} skipped: {reason}", peer.name),
            Ok(path) => {
                names.push(format!("{} {path}", peer.name));
                sides.push(Box::new(|calls| Ok(peer.time(calls)?)));
            }
        }
    }
    let medians = in_turn(sides, turns)?;
    let (median_ms, beside) = medians.split_first().ok_or("no side was measured")?;
    let row = |(beside, &beside_median_ms): (String, &f64)| Row {
        case: case.name.to_owned(),
        backend: backend.name().to_owned(),
        dtype: case.dtype.to_string(),
        pass: case.work.to_string(),
        causal: case.causal,
        layout: case.layout.to_string(),
        median_ms: *median_ms,
        gflops: 1e-6 * flops / median_ms,
        beside,
        beside_median_ms,
        ratio: beside_median_ms / median_ms,
    };
    Ok(names.into_iter().zip(beside).map(row).collect())
}

/// The sizes of a case as a rectangle, which is all that a peer without packed tensors can be asked for.
fn rectangle(case: &Compared) -> Case {
    let Sequences { lengths, query_heads, key_heads, head_dim } = &case.sequences;
    let [query_length, key_length] = case.sequences.longest();
    let dims = Dimensions {
        batch: lengths.len(),
        query_length,
        key_length,
        query_heads: *query_heads,
        key_heads: *key_heads,
        head_dim: *head_dim,
        value_head_dim: *head_dim,
    };
    Case { dims, dtype: case.dtype, work: case.work, causal: case.causal, mask: Mask::None }
}

/// The calls of a workload.
fn calls<'a>(mut workload: Workload, plans: Plans) -> Side<'a> {
    let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
    Box::new(move |calls| time_calls(&mut workload, &plans, &mut scratch, calls))
}

/// The median of each side's calls. Sides take turns, so that all of them see the same machine.
fn in_turn(mut sides: Vec<Side<'_>>, turns: usize) -> crate::Result<Vec<f64>> {
    // The first call maps memory and starts threads; the second says how long one takes.
    let firsts =
        sides.iter_mut().map(|side| side(2).map(|times| times[1])).collect::<crate::Result<Vec<_>>>()?;
    let mut all = vec![Vec::new(); sides.len()];
    for _ in 0..turns {
        for ((side, &first), times) in sides.iter_mut().zip(&firsts).zip(&mut all) {
            times.extend(take_turn(first, side)?);
        }
    }
    Ok(all.iter_mut().map(|times| median(times)).collect())
}

fn line(row: &Row) -> String {
    let Row {
        case, backend, dtype, pass, layout, median_ms, gflops, beside, beside_median_ms, ratio, ..
    } = row;
    format!(
        "{case:<14} {backend:<9} {dtype:<5} {pass:<8} {layout:<10} {median_ms:>10.3} {gflops:>8.1}  {beside:<34} \
         {beside_median_ms:>10.3} {ratio:>6.2}"
    )
}

/// What the names of sequences in a record stand for, a comment for each.
pub(super) fn names_explained<'a>(all: impl Iterator<Item = (&'a str, &'a Sequences)>) -> String {
    let mut names = Vec::new();
    let mut text = String::new();
    for (name, Sequences { lengths, query_heads, key_heads, head_dim }) in all {
        if names.contains(&name) {
            continue;
        }
        names.push(name);
        let [rows, keys] = [0, 1].map(|side| lengths.iter().map(|of| of[side]).sum::<usize>());
        text += &format!(
            "# {name}: {} sequences of {rows} query rows and {keys} keys in all, {query_heads} heads on {key_heads} \
             of {head_dim}\n",
            lengths.len(),
        );
    }
    text
}

/// The rows as CSV, below comments about the machine, the date and the versions.
fn csv(rows: &[Row], peers: &[String], threads: usize, turns: usize) -> crate::Result<String> {
    let mut text = format!(
        "# machine: {}, {} instructions, {threads} threads\n# date: {}\n# attention {}, peers: {}\n# medians of \
         {turns} turns; ratio is the time beside over the call's own\n",
        machine::description(),
        machine::level(),
        machine::today(),
        env!("CARGO_PKG_VERSION"),
        if peers.is_empty() { "none".to_owned() } else { peers.join(", ") },
    );
    text += &names_explained(cases().iter().map(|case| (case.name, &case.sequences)));
    text += &row::table(rows)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_served_by_the_backends_of_the_host() -> crate::Result<()> {
        for name in ["cpu", "chunked"] {
            let backend = backends::named(&[name.to_owned()])?.remove(0);
            for case in cases() {
                // The same layouts of sequences that are short enough for a test.
                let sequences = Sequences {
                    lengths: case
                        .sequences
                        .lengths
                        .iter()
                        .map(|of| of.map(|length| length.div_ceil(64)))
                        .collect(),
                    ..case.sequences.clone()
                };
                let rows = measure(&Compared { sequences, ..case.clone() }, &*backend, &mut [], 1)?;
                assert_eq!(rows.len(), 1, "{case:?}");
                assert!(rows[0].median_ms > 0.0 && rows[0].ratio > 0.0, "{rows:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_record_says_what_the_names_of_its_rows_stand_for() -> crate::Result<()> {
        let backend = backends::named(&["cpu".to_owned()])?.remove(0);
        let case = Compared { sequences: Sequences::equal(2, [3, 3], 2, 2, 8), ..cases().remove(4) };
        let text = csv(&measure(&case, &*backend, &mut [], 1)?, &[], 1, 1)?;
        let lines: Vec<&str> = text.lines().collect();
        let header = lines.iter().position(|line| !line.starts_with('#')).ok_or("no header")?;
        assert!(lines[header].starts_with("case,backend,dtype,pass,"), "{text}");
        assert!(lines[header + 1].starts_with(&format!("{},cpu,f32,", case.name)), "{text}");
        assert!(lines[..header].iter().any(|line| line.starts_with(&format!("# {}: ", case.name))), "{text}");
        Ok(())
    }
}
