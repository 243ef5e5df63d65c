//! `cargo xtask backends`: the tables of docs/backends.md, from what the backends answer.

use std::sync::Arc;

use attention_core::{AttentionBackend, DType, DeviceKind, Feature, LongSums, Pass, PassCapabilities};

use crate::{explain, generated};

/// Writes the tables of docs/backends.md from what the backends answer
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Compare with the page instead, and fail where it differs
    #[arg(long)]
    pub(crate) check: bool,
}

const COMMAND: &str = "backends";
const PAGE: &str = "docs/backends.md";
/// What the backends for GPUs answer for, where nothing else is said: what they were tried on.
const DEVICE: &str = "h200@9.19";

/// A GPU of each compute capability with limits of its own.
const DEVICES: &[(&str, &str)] =
    &[("8.0, 8.6, 8.9", "sm_80"), ("9.0", "sm_90"), ("10.0, 10.3", "sm_100"), ("12.0", "sm_120")];

/// Calls of which an automatic choice takes different backends, in words and as options of
/// `cargo xtask explain`.
const CHOSEN: &[(&str, &str)] = &[
    ("4 sequences of 4096 tokens, bf16", "--shape 4,4096,4096,16,16,128 --dtype bf16"),
    ("32 sequences of 512 tokens", "--shape 32,512,512,16,16,128 --dtype bf16"),
    ("causal, heads of 64", "--shape 4,4096,4096,32,32,64 --dtype bf16 --causal"),
    ("plain, on an A100", "--shape 32,512,512,16,16,128 --dtype bf16 --device a100@9.19"),
    ("plain, on an RTX 4090", "--shape 32,512,512,16,16,128 --dtype bf16 --device rtx4090@9.19"),
    ("plain, on a B200", "--shape 32,512,512,16,16,128 --dtype bf16 --device b200@9.19"),
    ("4 sequences of 4096, causal", "--shape 4,4096,4096,16,16,128 --dtype bf16 --causal"),
    ("the same, causal, backward", "--shape 4,4096,4096,16,16,128 --dtype bf16 --causal --pass backward"),
    ("backward of 256 x 256 logits a head", "--shape 4,256,256,16,16,128 --dtype bf16 --pass backward"),
    ("grouped heads, backward", "--shape 4,4096,4096,32,8,128 --dtype bf16 --pass backward"),
    ("decoding", "--shape 32,1,8192,32,8,128 --dtype bf16"),
    ("boolean mask", "--shape 4,4096,4096,16,16,128 --dtype bf16 --mask B1TS"),
    ("bias", "--shape 4,4096,4096,16,16,128 --dtype bf16 --bias 1NTS"),
    ("dropout", "--shape 4,4096,4096,16,16,128 --dtype bf16 --dropout 0.1"),
    ("softcap", "--shape 4,4096,4096,16,16,128 --dtype bf16 --softcap 30"),
    ("sinks", "--shape 4,4096,4096,16,16,128 --dtype bf16 --sinks"),
    ("rows of 262144 keys", "--shape 1,256,262144,16,16,128 --dtype bf16"),
    ("plain, f32", "--shape 4,4096,4096,16,16,128 --dtype f32"),
];

/// Calls that a backend for GPUs refuses, as options of `cargo xtask explain`.
const REFUSED: &[&str] = &[
    "--shape 2,256,256,16,16,64 --dtype f32",
    "--shape 2,256,256,16,16,512 --dtype bf16",
    "--shape 2,256,256,16,16,60 --dtype bf16",
    "--shape 2,256,256,16,16,64 --dtype bf16 --scale -1",
    "--shape 2,256,256,16,16,64 --dtype bf16 --softcap 30",
    "--shape 2,256,256,16,16,64 --dtype bf16 --sinks --device h100@9.12",
    "--shape 2,1,256,16,16,64 --dtype bf16 --sinks",
    "--shape 2,2048,2048,16,16,64 --dtype bf16 --window 128,128 --device h100@9.14.0",
    "--shape 2,1,1,16,16,64 --dtype bf16 --mask BNTS",
    "--shape 2,256,256,16,4,64 --dtype bf16 --pass backward",
    "--shape 2,256,256,16,16,256 --dtype bf16 --pass backward --device a100@9.19",
    "--shape 2,1,256,16,16,64 --dtype bf16 --pass backward",
    "--shape 2,256,256,16,16,64 --dtype bf16 --pass backward --d-lse",
    "--shape 2,256,256,16,16,64 --dtype bf16 --pass backward --bias 1NTS --gradients dbias",
    "--shape 2,256,256,16,16,64 --dtype bf16 --causal --offsets 1,2",
    "--shape 2,256,256,16,16,64 --dtype bf16 --pass backward --deterministic",
    "--shape 2,256,256,16,16,64 --dtype bf16 --batch-invariant",
];

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let backends = backends(DEVICE)?;
    let parts = [
        ("capabilities", capabilities(&backends)),
        ("features", features(&backends)),
        ("choices", choices()?),
        ("head dimensions of cudnn", head_dims()?),
        ("refusals", refusals()?),
    ];
    let page = (parts.iter()).try_fold(generated::read(PAGE)?, |page, (part, text)| {
        generated::with_part(&page, COMMAND, part, text)
    })?;
    generated::settle(&[(PAGE.to_owned(), page)], COMMAND, arguments.check)
}

type Backends = Vec<Arc<dyn AttentionBackend>>;

/// Every backend, those for GPUs as they answer for this device, which need not be there.
fn backends(device: &str) -> crate::Result<Backends> {
    Ok(explain::asked(&format!("--shape 1,1,1,1,1,1 --device {device}"))?.1)
}

/// A table in Markdown.
fn table<C: AsRef<str>>(header: &[C], rows: &[Vec<String>]) -> String {
    fn line<C: AsRef<str>>(cells: &[C]) -> String {
        format!("| {} |\n", cells.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" | "))
    }
    let rule = format!("{}|\n", "|---".repeat(header.len()));
    let rows: String = rows.iter().map(|cells| line(cells)).collect();
    format!("{}{rule}{rows}", line(header))
}

/// A table of backends: a column each, or several with these words after the name.
fn by_backend(backends: &Backends, columns: &[&str], rows: &[Vec<String>]) -> String {
    let names = backends.iter().flat_map(|backend| {
        columns.iter().map(|column| format!("`{}` {column}", backend.name()).trim_end().to_owned())
    });
    let header: Vec<String> = std::iter::once(String::new()).chain(names).collect();
    table(&header, rows)
}

/// What each backend says about itself, but for the features.
fn capabilities(backends: &Backends) -> String {
    let row = |what: &str, answer: &dyn Fn(&dyn AttentionBackend) -> String| {
        let answers = backends.iter().map(|backend| answer(&**backend));
        std::iter::once(what.to_owned()).chain(answers).collect::<Vec<String>>()
    };
    let mut rows = vec![row("memory it works on", &|backend| memory(backend.capabilities().device))];
    for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16] {
        rows.push(row(&format!("numerics class of {dtype}"), &|backend| {
            backend
                .capabilities()
                .numerics_of(dtype)
                .map_or_else(|| "-".to_owned(), |class| format!("`{class}`"))
        }));
    }
    for pass in [Pass::Forward, Pass::Backward] {
        rows.push(row(&format!("largest head dimension, {pass}"), &|backend| {
            backend.capabilities().pass(pass).map_or_else(|| "no such pass".to_owned(), largest)
        }));
    }
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        rows.push(row(&format!("drift of long sums, {dtype}"), &|backend| {
            drift(&backend.capabilities().long_sums, dtype)
        }));
    }
    for dtype in [DType::F16, DType::Bf16] {
        rows.push(row(&format!("longest sums of the class, {dtype}"), &|backend| {
            let limits = &backend.capabilities().sum_limits;
            let limit = limits.iter().find(|limit| limit.dtype == dtype);
            limit.map_or_else(
                || "any".to_owned(),
                |limit| format!("{} keys; backward {} query rows", limit.keys, limit.queries),
            )
        }));
    }
    rows.push(row("scratch grows as", &|backend| backend.capabilities().scratch.to_string()));
    by_backend(backends, &[""], &rows)
}

/// The mean relative errors of long sums of a dtype, with the number of keys of each.
fn drift(long_sums: &[LongSums], dtype: DType) -> String {
    let of_dtype = long_sums.iter().filter(|sums| sums.dtype == dtype);
    let figures: Vec<_> =
        of_dtype.map(|sums| format!("{:e} over {} keys", sums.mean_error, sums.keys)).collect();
    if figures.is_empty() { "-".to_owned() } else { figures.join(", ") }
}

fn memory(device: DeviceKind) -> String {
    match device {
        DeviceKind::Cpu => "host".to_owned(),
        DeviceKind::Cuda => "CUDA".to_owned(),
        other => other.to_string(),
    }
}

/// The largest head dimension of a pass, with that of values where it is another.
fn largest(pass: &PassCapabilities) -> String {
    let of = |most: Option<usize>| most.map_or_else(|| "any".to_owned(), |most| most.to_string());
    if pass.max_head_dim == pass.max_value_head_dim {
        return of(pass.max_head_dim);
    }
    format!("{}, of values {}", of(pass.max_head_dim), of(pass.max_value_head_dim))
}

/// Whether a pass has such a thing.
fn is_of(feature: Feature, pass: Pass) -> bool {
    match feature {
        Feature::Lse | Feature::PagedKeys | Feature::EightBitKeys => pass == Pass::Forward,
        Feature::DLse | Feature::DBias | Feature::DSinks => pass == Pass::Backward,
        _ => true,
    }
}

/// Every feature, in both passes of every backend.
fn features(backends: &Backends) -> String {
    let row = |&feature: &Feature| {
        let answers = backends.iter().flat_map(|backend| {
            [Pass::Forward, Pass::Backward].map(|pass| match backend.capabilities().pass(pass) {
                _ if !is_of(feature, pass) => "-",
                Some(pass) if pass.features.contains(feature) => "yes",
                _ => "no",
            })
        });
        std::iter::once(feature.name()).chain(answers).map(str::to_owned).collect()
    };
    by_backend(backends, &["forward", "backward"], &Feature::ALL.iter().map(row).collect::<Vec<_>>())
}

/// What an automatic choice takes.
fn choices() -> crate::Result<String> {
    let rows = CHOSEN.iter().map(|(call, options)| {
        let device = if options.contains("--device") { "" } else { &format!(" --device {DEVICE}") };
        let explanation = explain::explained(&format!("{options}{device}"))?;
        let chosen = explanation.chosen().ok_or_else(|| format!("nothing serves {options}"))?;
        let first = explanation.candidate("cudnn").ok_or("no cudnn")?;
        let reason = match chosen.name == first.name {
            // Behind what every choice says: what decided on the order.
            true => chosen.reason.split_once("; ").map_or_else(String::new, |(_, why)| why.to_owned()),
            false => first.reason.clone(),
        };
        Ok(vec![(*call).to_owned(), format!("`{options}`"), format!("`{}`", chosen.name), reason])
    });
    let rows = rows.collect::<crate::Result<Vec<_>>>()?;
    Ok(table(&["call", "options of `cargo xtask explain`", "chosen", "why"], &rows))
}

/// The limits of cuDNN that differ between devices.
fn head_dims() -> crate::Result<String> {
    let rows = DEVICES.iter().map(|(capabilities, device)| {
        let backends = backends(&format!("{device}@9.19"))?;
        let cudnn = backends.iter().find(|backend| backend.name() == "cudnn").ok_or("no cudnn")?;
        let most = [Pass::Forward, Pass::Backward]
            .map(|pass| cudnn.capabilities().pass(pass).map_or_else(|| "-".to_owned(), largest));
        Ok(std::iter::once((*capabilities).to_owned()).chain(most).collect())
    });
    let rows = rows.collect::<crate::Result<Vec<Vec<String>>>>()?;
    Ok(table(&["compute capability", "forward", "backward"], &rows))
}

/// What the backends for GPUs say to calls of which one is refused.
fn refusals() -> crate::Result<String> {
    let mut header = vec!["options of `cargo xtask explain`".to_owned()];
    let mut rows = Vec::new();
    for options in REFUSED {
        let device = if options.contains("--device") { "" } else { &format!(" --device {DEVICE}") };
        let (problem, backends) = explain::asked(&format!("{options}{device}"))?;
        let mut row = vec![format!("`{options}{device}`")];
        header.truncate(1);
        for backend in
            backends.iter().filter(|backend| backend.capabilities().device == problem.device().kind())
        {
            header.push(format!("`{}`", backend.name()));
            row.push(backend.supports(&problem).err().map_or_else(|| "yes".to_owned(), |no| no.to_string()));
        }
        rows.push(row);
    }
    Ok(table(&header, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_and_feature_has_its_answers() {
        let backends = backends(DEVICE).unwrap();
        let features = features(&backends);
        assert_eq!(features.lines().count(), 2 + Feature::ALL.len());
        let header = "|  | `chunked` forward | `chunked` backward | `cpu` forward | `cpu` backward | `cudnn` forward | \
                      `cudnn` backward | `chunked-cuda` forward | `chunked-cuda` backward |";
        assert_eq!(features.lines().next(), Some(header));
        for row in [
            "| softcap | yes | yes | yes | yes | no | no | yes | yes |",
            "| lse output | yes | - | yes | - | yes | - | yes | - |",
            "| d_lse | - | yes | - | yes | - | no | - | yes |",
            "| deterministic | yes | yes | yes | yes | yes | no | yes | yes |",
            "| batch invariant | yes | yes | yes | yes | no | no | yes | yes |",
        ] {
            assert!(features.contains(row), "{row} is not in\n{features}");
        }
        let capabilities = capabilities(&backends);
        assert!(
            capabilities.contains("| numerics class of f32 | `F32` | `F32` | - | `F32` |"),
            "{capabilities}"
        );
    }

    #[test]
    fn the_device_counts() {
        let head_dims = head_dims().unwrap();
        assert!(head_dims.contains("| 9.0 | 256 | 256 |"), "{head_dims}");
        assert!(head_dims.contains("| 12.0 | 256 | 128 |"), "{head_dims}");
    }

    #[test]
    fn every_call_of_the_table_is_refused_by_one() {
        for row in refusals().unwrap().lines().skip(2) {
            assert!(row.contains(" needs ") || row.contains(" does not "), "{row}");
        }
    }

    #[test]
    fn the_page_is_what_the_backends_answer() {
        assert!(run(&Arguments { check: true }).unwrap());
    }
}
