//! `cargo xtask bench --memory`: memory beyond inputs and outputs, next to Tables 2 and 3 of Rabe and Staats
//! (arXiv 2112.05682): one head of dimension 64, one batch row, self-attention of `n` tokens.

use std::time::Instant;

use attention_benches::{Mask, Work, Workload};
use attention_core::{AttentionBackend, DType, Dimensions, Gradients, ScratchBuffer};

use crate::{machine, reporting};

/// Memory beyond inputs and outputs that the paper prints for a length: of standard attention, and of its own
/// algorithm, forward (Table 2) and with gradients (Table 3). `OOM` where standard attention ran out of 16
/// GB.
struct Printed {
    log_length: u32,
    forward: [&'static str; 2],
    gradients: [&'static str; 2],
}

const fn printed(log_length: u32, forward: [&'static str; 2], gradients: [&'static str; 2]) -> Printed {
    Printed { log_length, forward, gradients }
}

const PAPER: [Printed; 7] = [
    printed(8, ["270 KB", "270 KB"], ["532 KB", "532 KB"]),
    printed(10, ["4.0 MB", "4.0 MB"], ["8.0 MB", "8.0 MB"]),
    printed(12, ["64 MB", "16 MB"], ["128 MB", "41 MB"]),
    printed(14, ["1 GB", "17 MB"], ["2.0 GB", "64 MB"]),
    printed(16, ["OOM", "21 MB"], ["OOM", "257 MB"]),
    printed(18, ["OOM", "64 MB"], ["OOM", "1.0 GB"]),
    printed(20, ["OOM", "256 MB"], ["OOM", "4.0 GB"]),
];

/// Prints both tables. Backends are run up to this many tokens, and asked for their scratch, which is exact,
/// at every length.
pub(super) fn run(
    backends: &[std::sync::Arc<dyn AttentionBackend>],
    run_up_to: usize,
    dtype: DType,
) -> crate::Result {
    println!("{}, {}", machine::description(), machine::level());
    for (work, table) in [(Work::Forward, "Table 2, forward"), (Work::Both, "Table 3, with gradients")] {
        println!("\n{table}: one head, H = 64, {dtype}; memory beyond inputs and outputs, on one thread");
        let mut header: Vec<String> =
            ["n", "T x S logits", "paper, standard", "paper, chunked"].map(str::to_owned).into();
        for backend in backends {
            header.push(format!("{} scratch", backend.name()));
            header.push(format!("{} peak", backend.name()));
            header.push(format!("{} s", backend.name()));
        }
        // As they come, below their names: the table needs all of them for its widths.
        eprintln!("{}", header.join("  "));
        let mut rows = Vec::new();
        for row in &PAPER {
            let length = 1usize << row.log_length;
            let paper = if work == Work::Forward { row.forward } else { row.gradients };
            let mut cells = vec![format!("2^{}", row.log_length), size((length * length * 4) as f64)];
            cells.extend(paper.map(str::to_owned));
            for backend in backends {
                cells.extend(measure(&**backend, length, dtype, work, length <= run_up_to)?);
            }
            eprintln!("{}", cells.join("  "));
            rows.push(cells);
        }
        reporting::print_cells(&header, &rows);
    }
    println!("peak: of resident memory during the call, where it was run and the system tells; - elsewhere");
    Ok(true)
}

fn measure(
    backend: &dyn AttentionBackend,
    length: usize,
    dtype: DType,
    work: Work,
    run: bool,
) -> crate::Result<[String; 3]> {
    let dims = Dimensions {
        batch: 1,
        query_length: length,
        key_length: length,
        query_heads: 1,
        key_heads: 1,
        head_dim: 64,
        value_head_dim: 64,
    };
    let forward = backend.scratch_bytes(&dims.problem(dtype).lse(work == Work::Both).build()?)?;
    let bytes = match work {
        Work::Forward => forward,
        Work::Both => {
            let backward = dims.problem(dtype).gradients(Gradients::QKV).build()?;
            forward.max(backend.scratch_bytes(&backward)?)
        }
    };
    if !run {
        return Ok([size(bytes as f64), "-".to_owned(), "-".to_owned()]);
    }
    let mut workload = Workload::new(dims, dtype, work, false, Mask::None)?;
    let before = machine::resident();
    let resets = machine::reset_peak();
    let plans = workload.plan(backend)?;
    let mut scratch = ScratchBuffer::new(bytes);
    let start = Instant::now();
    workload.run(&plans, &mut scratch)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = (before.zip(machine::resident()))
        .map(|(before, after)| after.peak.saturating_sub(before.now))
        .filter(|_| resets);
    let peak = peak.map_or_else(|| "-".to_owned(), |bytes| size(bytes as f64));
    Ok([size(bytes as f64), peak, format!("{seconds:.3}")])
}

/// Bytes as the paper prints them.
fn size(bytes: f64) -> String {
    let units = [(1u64 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")];
    let (unit, name) = units.into_iter().find(|&(unit, _)| bytes >= unit as f64).unwrap_or((1, "B"));
    let number = bytes / unit as f64;
    if unit > 1 && number < 10.0 { format!("{number:.1} {name}") } else { format!("{number:.0} {name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let all = [0.0, 1000.0, 276_480.0, 4.0 * 1_048_576.0, 1_073_741_824.0].map(size);
        assert_eq!(all, ["0 B", "1000 B", "270 KB", "4.0 MB", "1.0 GB"]);
    }

    #[test]
    fn a_backend_is_asked_where_it_is_not_run() {
        let backend = crate::backends::named(&["chunked".to_owned()]).unwrap().remove(0);
        let asked = measure(&*backend, 256, DType::F32, Work::Both, false).unwrap();
        let run = measure(&*backend, 256, DType::F32, Work::Both, true).unwrap();
        assert_eq!(asked[0], run[0]);
        assert_eq!(asked[1..], ["-", "-"]);
        assert!(run[2].parse::<f64>().unwrap() > 0.0);
    }
}
