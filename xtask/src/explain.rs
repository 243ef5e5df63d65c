//! `cargo xtask explain`: which implementation would run a call, and why no other, on this machine or on a described device.

use std::str::FromStr;
use std::sync::Arc;

use attention::{Attention, Implementation, Registry};
use attention_benches::parse_shape;
use attention_chunked::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, Device, Dimensions, Dims, Dropout, Error,
    ForwardCall, Gradients, Pass, Problem, QueryOffset, Role, Scratch, TensorDesc, Unavailable, Unsupported,
    Window,
};
use attention_cudnn::{CudnnBackend, CudnnConfig, Target};

use crate::backends::{parse_dtype, parse_pass};

/// Prints every implementation with its verdict on a call: chosen, eligible, or refused and why. Needs neither data nor device
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The sizes of the call
    #[arg(long, value_parser = parse_shape, value_name = "B,T,S,N,K,H[,Hv]")]
    shape: Dimensions,
    /// The operands' dtype: f64, f32, f16 or bf16
    #[arg(long, default_value = "f32", value_parser = parse_dtype, value_name = "D")]
    dtype: DType,
    /// forward or backward
    #[arg(long, default_value = "forward", value_parser = parse_pass, value_name = "PASS")]
    pass: Pass,
    /// Where the tensors are: cpu, cuda:0 and the like, or a GPU that need not be here with its cuDNN: h200@9.19, h100@9.12.1,
    /// a100@9.19, sm_100@9.19
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Place,
    /// What is asked for: auto, or the name of an implementation, or several in order of preference
    #[arg(long, default_value = "auto", value_delimiter = ',', value_name = "NAME,..")]
    implementation: Vec<String>,
    /// The most scratch memory
    #[arg(long, value_name = "BYTES")]
    scratch_limit: Option<usize>,
    /// Tensors that lie as [B, N, T, H] instead of [B, T, N, H]
    #[arg(long)]
    heads_first: bool,
    #[arg(long)]
    causal: bool,
    /// Where row 0 stands among the keys: a number, or bottom-right
    #[arg(long, default_value = "0", value_parser = parse_offset, allow_hyphen_values = true, value_name = "OFFSET")]
    query_offset: QueryOffset,
    /// Keys that are seen behind a row's position and beyond it; - for all
    #[arg(long, value_parser = parse_window, allow_hyphen_values = true, value_name = "LEFT,RIGHT")]
    window: Option<Window>,
    /// What logits are multiplied by
    #[arg(long, allow_hyphen_values = true, value_name = "X")]
    scale: Option<f64>,
    #[arg(long, value_name = "C")]
    softcap: Option<f64>,
    /// A boolean mask of this shape, which broadcasts to B,N,T,S
    #[arg(long, value_name = "SHAPE")]
    mask: Option<Sizes>,
    /// A bias of this shape, which broadcasts to B,N,T,S, in the operands' dtype or another: 1,16,512,512:f32
    #[arg(long, value_name = "SHAPE[:D]")]
    bias: Option<Sizes>,
    /// Slopes of ALiBi, one a head
    #[arg(long)]
    alibi: bool,
    /// Attention sinks, one a head
    #[arg(long)]
    sinks: bool,
    /// Lengths of the queries, one for each batch row
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    query_lengths: Option<Vec<usize>>,
    /// Lengths of keys and values, one for each batch row
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    key_value_lengths: Option<Vec<usize>>,
    /// Dropout at this rate
    #[arg(long, value_name = "RATE")]
    dropout: Option<f64>,
    /// The logsumexp as well, in forward
    #[arg(long)]
    lse: bool,
    /// The gradient of the bias as well, in backward
    #[arg(long)]
    dbias: bool,
    /// The gradient of the sinks as well, in backward
    #[arg(long)]
    dsinks: bool,
    /// An incoming gradient of the logsumexp, in backward
    #[arg(long)]
    d_lse: bool,
    /// Bitwise reproducible results
    #[arg(long)]
    deterministic: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// A shape, and the dtype behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sizes {
    shape: Dims,
    dtype: Option<DType>,
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (shape, dtype) = match text.split_once(':') {
            Some((shape, dtype)) => (shape, Some(dtype.parse()?)),
            None => (text, None),
        };
        let sizes: Option<Vec<usize>> = shape.split(',').map(|size| size.parse().ok()).collect();
        let shape_of = |sizes: Vec<usize>| Dims::from_slice(&sizes);
        match sizes.and_then(shape_of) {
            Some(shape) => Ok(Self { shape, dtype }),
            None => Err(format!("'{shape}' is no shape of 1 to 4 sizes such as 1,16,512,512")),
        }
    }
}

/// Where a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here(Device),
    /// On the first GPU of a machine that has this.
    Assumed(Target),
}

/// GPUs by name, and their compute capabilities.
const GPUS: [(&str, (u32, u32)); 10] = [
    ("a100", (8, 0)),
    ("a10", (8, 6)),
    ("rtx3090", (8, 6)),
    ("l4", (8, 9)),
    ("l40s", (8, 9)),
    ("rtx4090", (8, 9)),
    ("h100", (9, 0)),
    ("h200", (9, 0)),
    ("b200", (10, 0)),
    ("rtx5090", (12, 0)),
];

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || {
            let gpus: Vec<&str> = GPUS.iter().map(|(name, _)| *name).collect();
            format!(
                "'{text}' is neither cpu, nor cuda:N, nor GPU@VERSION with one of {} or sm_NN",
                gpus.join(", ")
            )
        };
        if text == "cpu" {
            return Ok(Self::Here(Device::Cpu));
        }
        if let Some(ordinal) = text.strip_prefix("cuda:") {
            return ordinal.parse().map(|ordinal| Self::Here(Device::Cuda(ordinal))).map_err(|_| known());
        }
        let (gpu, version) = text.split_once('@').ok_or_else(known)?;
        let numbered = || {
            let digits: u32 = gpu.strip_prefix("sm_")?.trim_end_matches('a').parse().ok()?;
            Some((digits / 10, digits % 10))
        };
        let named = GPUS.iter().find(|(name, _)| *name == gpu).map(|&(_, capability)| capability);
        let capability = named.or_else(numbered).ok_or_else(known)?;
        let parts: Option<Vec<u32>> = version.split('.').map(|part| part.parse().ok()).collect();
        let version = match parts.as_deref() {
            Some(&[major, minor]) => [major, minor, 0],
            Some(&[major, minor, patch]) => [major, minor, patch],
            _ => return Err(format!("'{version}' is no version of cuDNN such as 9.19 or 9.19.0")),
        };
        Ok(Self::Assumed(Target { version, capability }))
    }
}

fn parse_offset(text: &str) -> Result<QueryOffset, String> {
    match text {
        "bottom-right" => Ok(QueryOffset::BottomRight),
        number => (number.parse().map(QueryOffset::Fixed))
            .map_err(|_| format!("'{text}' is neither a number nor bottom-right")),
    }
}

fn parse_window(text: &str) -> Result<Window, String> {
    let bound = |text: &str| match text {
        "-" => Ok(None),
        number => {
            number.parse().map(Some).map_err(|_| format!("'{number}' is neither a number of keys nor -"))
        }
    };
    let (left, right) = text.split_once(',').ok_or_else(|| format!("'{text}' is not LEFT,RIGHT"))?;
    Ok(Window { left: bound(left)?, right: bound(right)? })
}

impl Arguments {
    fn problem(&self) -> crate::Result<Problem> {
        let device = match self.device {
            Place::Here(device) => device,
            Place::Assumed(_) => Device::Cuda(0),
        };
        let dims = self.shape;
        let mut builder = dims.problem(self.dtype).device(device);
        if self.heads_first {
            for (role, length, heads, width) in [
                (Role::Query, dims.query_length, dims.query_heads, dims.head_dim),
                (Role::Key, dims.key_length, dims.key_heads, dims.head_dim),
                (Role::Value, dims.key_length, dims.key_heads, dims.value_head_dim),
                (Role::Out, dims.query_length, dims.query_heads, dims.value_head_dim),
            ] {
                let shape = [dims.batch, length, heads, width];
                let [row, head] = [width, length * width].map(|stride| stride as isize);
                let strides = [heads as isize * head, row, head, 1];
                builder = builder
                    .layout(role, TensorDesc::strided(self.dtype, shape, strides).ok_or("four axes each")?);
            }
        }
        builder = builder.causal(self.causal).query_offset(self.query_offset).scale(self.scale);
        builder = builder.softcap(self.softcap).deterministic(self.deterministic);
        if let Some(window) = self.window {
            builder = builder.window(window);
        }
        if let Some(Sizes { shape, dtype }) = &self.mask {
            builder = builder.mask(TensorDesc::contiguous(dtype.unwrap_or(DType::Bool), *shape));
        }
        if let Some(Sizes { shape, dtype }) = &self.bias {
            builder = builder.bias(TensorDesc::contiguous(dtype.unwrap_or(self.dtype), *shape));
        }
        let heads = TensorDesc::contiguous(DType::F32, [dims.query_heads]);
        if self.alibi {
            builder = builder.alibi_slopes(heads);
        }
        if self.sinks {
            builder = builder.sinks(heads);
        }
        if let Some(lengths) = &self.query_lengths {
            builder = builder.query_lengths(&lengths[..]);
        }
        if let Some(lengths) = &self.key_value_lengths {
            builder = builder.key_value_lengths(&lengths[..]);
        }
        if let Some(rate) = self.dropout {
            builder = builder.dropout(Dropout::new(rate, 0));
        }
        builder = match self.pass {
            Pass::Forward => builder.lse(self.lse),
            Pass::Backward => {
                let also = |wanted: bool, gradient| if wanted { gradient } else { Gradients::NONE };
                let more = also(self.dbias, Gradients::BIAS) | also(self.dsinks, Gradients::SINKS);
                builder.gradients(Gradients::QKV | more).d_lse(self.d_lse)
            }
        };
        Ok(builder.build()?)
    }

    fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        let (cudnn, own) = (CudnnBackend::new(CudnnConfig::default()), ChunkedCudaConfig::default());
        match self.device {
            Place::Here(Device::Cuda(ordinal)) => {
                let ordinal = ordinal as usize;
                registry.register(Arc::new(CudnnBackend::new(CudnnConfig::default().device(ordinal))));
                registry.register(Arc::new(ChunkedCudaBackend::new(own.device(ordinal))));
            }
            Place::Here(_) => {
                registry.register(Arc::new(cudnn));
                registry.register(Arc::new(ChunkedCudaBackend::new(own)));
            }
            Place::Assumed(target) => {
                registry.register(Arc::new(Assumed(cudnn.assuming(target))));
                registry.register(Arc::new(Assumed(ChunkedCudaBackend::new(own))));
            }
        }
        registry
    }

    fn implementation(&self) -> Implementation {
        let one = |name: &String| match name.as_str() {
            "auto" => Implementation::Auto,
            name => Implementation::Named(name.to_owned().into()),
        };
        match &self.implementation[..] {
            [name] => one(name),
            names => Implementation::Prefer(names.iter().map(one).collect()),
        }
    }
}

/// Runs the command; false where nothing would run the call.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let problem = arguments.problem()?;
    let registry = arguments.registry();
    let attention = Attention::new()
        .registry(&registry)
        .implementation(arguments.implementation())
        .scratch_limit(arguments.scratch_limit);
    let explanation = attention.explain_problem(&problem);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        if let Place::Assumed(target) = arguments.device {
            println!("as if there were {target}");
        }
        println!("{explanation}");
    }
    Ok(explanation.chosen().is_some())
}

/// A backend that says it is there.
#[derive(Debug)]
struct Assumed<B>(B);

impl<B: AttentionBackend> AttentionBackend for Assumed<B> {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn version(&self) -> &str {
        self.0.version()
    }

    fn capabilities(&self) -> &Capabilities {
        self.0.capabilities()
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.0.supports(problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.0.scratch_bytes(problem)
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.0.forward(call, scratch)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.0.backward(call, scratch)
    }
}

#[cfg(test)]
mod tests {
    use attention::{Cause, Verdict};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// What would run a call, and why each other would not.
    fn verdicts(line: &str) -> (Option<String>, Vec<(String, Verdict, String)>) {
        let words = ["explain"].into_iter().chain(line.split(' '));
        let arguments =
            Line::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}")).arguments;
        let (registry, problem) = (arguments.registry(), arguments.problem().expect("valid"));
        let attention = Attention::new().registry(&registry).implementation(arguments.implementation());
        let explanation = attention.explain_problem(&problem);
        let all = explanation.candidates.iter();
        let all = all.map(|candidate| (candidate.name.clone(), candidate.verdict, candidate.reason.clone()));
        (explanation.chosen().map(|candidate| candidate.name.clone()), all.collect())
    }

    #[test]
    fn a_described_gpu_is_asked_as_if_it_were_here() {
        let (chosen, _) = verdicts("--shape 4,4096,4096,16,16,128 --dtype bf16 --device h200@9.19 --causal");
        assert_eq!(chosen.as_deref(), Some("cudnn"));
    }

    #[test]
    fn each_kind_of_refusal_of_cudnn_is_told_and_another_chosen() {
        let shape = "--shape 2,256,256,16,16,64 --device h200@9.19";
        for (options, reason) in [
            ("--dtype f32", "cudnn does not take f32 operands, only f16, bf16"),
            ("--dtype bf16 --softcap 30", "cudnn does not support softcap in its forward pass"),
            ("--dtype bf16 --scale -1", "cudnn needs a scale above 0, the call has -1"),
            (
                "--dtype bf16 --pass backward --bias 1,16,256,256 --dbias",
                "cudnn does not support dbias in its backward",
            ),
            ("--dtype bf16 --pass backward --d-lse", "cudnn does not support d_lse in its backward pass"),
            ("--dtype bf16 --pass backward --deterministic", "cudnn does not support deterministic"),
        ] {
            let (chosen, all) = verdicts(&format!("{shape} {options}"));
            let (_, verdict, told) = all.iter().find(|(name, ..)| name == "cudnn").expect("a candidate");
            assert!(
                matches!(verdict, Verdict::Refused(Cause::Unsupported)) && told.contains(reason),
                "{options}: {told}"
            );
            assert_eq!(chosen.as_deref(), Some("chunked-cuda"), "{options}");
        }
    }

    #[test]
    fn versions_and_capabilities_count() {
        let sinks = "--shape 2,256,256,16,16,64 --dtype bf16 --sinks --device";
        let (_, all) = verdicts(&format!("{sinks} h100@9.12"));
        assert!(all.iter().any(|(_, _, told)| told.contains("sinks with cuDNN 9.13 or later")), "{all:?}");
        assert_eq!(verdicts(&format!("{sinks} h100@9.13")).0.as_deref(), Some("cudnn"));
        let (_, all) = verdicts("--shape 1,64,64,2,2,256 --dtype bf16 --pass backward --device a100@9.19");
        assert!(all.iter().any(|(name, _, told)| name == "cudnn" && told.contains("128")), "{all:?}");
    }

    #[test]
    fn host_memory_and_devices_that_are_not_there() {
        assert_eq!(verdicts("--shape 1,64,64,2,2,64").0.as_deref(), Some("chunked"));
        let (chosen, all) = verdicts("--shape 1,64,64,2,2,64 --dtype f16 --device cuda:4000");
        assert_eq!(chosen, None);
        assert!(all.iter().any(|(name, verdict, _)| {
            name == "cudnn" && matches!(verdict, Verdict::Refused(Cause::Unavailable))
        }));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (text, what) in
            [("gpu", "neither cpu"), ("h300@9.19", "neither cpu"), ("h200@nine", "no version")]
        {
            let error = Place::from_str(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
        assert_eq!(
            "sm_100a@9.21.2".parse(),
            Ok(Place::Assumed(Target { version: [9, 21, 2], capability: (10, 0) }))
        );
        assert!(Sizes::from_str("1,2,3,4,5").is_err() && Sizes::from_str("a").is_err());
        assert!(parse_window("3").is_err() && parse_offset("left").is_err());
        assert_eq!(parse_window("-,3"), Ok(Window { left: None, right: Some(3) }));
    }
}
