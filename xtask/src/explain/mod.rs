//! `cargo xtask explain`: what a call would run on, and why nothing else would; without data, and for devices
//! that need not be there.

mod layout;
mod target;

use std::sync::Arc;

use attention::{Attention, Explanation, Registry};
use attention_benches::parse_shape;
use attention_core::{
    AttentionBackend, CallData, CallProblem, DType, Dimensions, Dropout, Element, Gradients, InvalidCall,
    NumericsClass, Pass, Problem, ProblemBuilder, QueryOffset, Role, TensorDesc, View, Window,
};
use clap::Parser;

use crate::backends::{parse_bytes, parse_dtype, parse_pass};
use layout::{Packed, Rows};
use target::Where;

/// Prints what a call would run on and why: every backend, chosen or refused; for devices that need not be
/// there
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The sizes of the call
    #[arg(long, value_parser = parse_shape, value_name = "B,T,S,N,K,H[,Hv]")]
    shape: Dimensions,
    /// The dtype of query, key and value: f64, f32, f16 or bf16
    #[arg(long, value_parser = parse_dtype, default_value = "f32", value_name = "D")]
    dtype: DType,
    /// Where the tensors are: cpu, cuda:0 of this machine, or a GPU that is assumed, with a version of cuDNN:
    /// h200@9.19, sm_90@9.19.0
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: Where,
    /// forward or backward
    #[arg(long, value_parser = parse_pass, default_value = "forward")]
    pass: Pass,
    /// How query, key, value and output lie in memory: btnh or bnth
    #[arg(long, default_value = "btnh", value_parser = ["btnh", "bnth"])]
    layout: String,
    /// Sequences are packed, B of up to T query rows and S keys: queries and keys, or queries alone
    /// (--packed=queries, and beside --page-size)
    #[arg(
        long,
        value_parser = parse_packed,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        value_name = "all|queries"
    )]
    packed: Option<Packed>,
    /// Keys and values are in pages of this many tokens, with a table of as many as S takes
    #[arg(long, value_parser = parse_page_size, value_name = "TOKENS")]
    page_size: Option<usize>,
    /// Masks keys after the position of the row
    #[arg(long)]
    causal: bool,
    /// Where query row 0 stands among the keys: a number, top-left or bottom-right
    #[arg(long, default_value = "top-left", value_parser = parse_offset, allow_hyphen_values = true, value_name = "O")]
    offset: QueryOffset,
    /// Where query row 0 of each batch row stands, one number a batch row
    #[arg(
        long,
        value_delimiter = ',',
        allow_hyphen_values = true,
        conflicts_with = "offset",
        value_name = "N,.."
    )]
    offsets: Vec<i64>,
    /// A window of keys before and after the position, such as 128,0; - for no bound
    #[arg(long, value_parser = parse_window, allow_hyphen_values = true, value_name = "LEFT,RIGHT")]
    window: Option<Window>,
    /// A boolean mask with these axes, such as B11S: a letter for a full axis, 1 for a broadcast one
    #[arg(long, value_parser = parse_axes, value_name = "AXES")]
    mask: Option<Axes>,
    /// A bias with these axes, such as 1NTS
    #[arg(long, value_parser = parse_axes, value_name = "AXES")]
    bias: Option<Axes>,
    /// The dtype of the bias; the query's by default
    #[arg(long, value_parser = parse_dtype, requires = "bias", value_name = "D")]
    bias_dtype: Option<DType>,
    /// Query lengths, one a batch row
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    query_lengths: Vec<usize>,
    /// Key and value lengths, one a batch row
    #[arg(long, value_delimiter = ',', value_name = "N,..")]
    key_lengths: Vec<usize>,
    /// What logits are multiplied by; 1 / sqrt(H) by default
    #[arg(long, allow_hyphen_values = true, value_name = "X")]
    scale: Option<f64>,
    /// What logits are capped at
    #[arg(long, value_name = "C")]
    softcap: Option<f64>,
    /// ALiBi slopes of each head
    #[arg(long)]
    alibi: bool,
    /// Attention sinks
    #[arg(long)]
    sinks: bool,
    /// The rate of dropout
    #[arg(long, value_name = "RATE")]
    dropout: Option<f64>,
    /// Also computes the logsumexp, in a forward call
    #[arg(long)]
    lse: bool,
    /// The logsumexp has a gradient, in a backward call
    #[arg(long)]
    d_lse: bool,
    /// The gradients of a backward call; those of query, key and value by default
    #[arg(long, value_delimiter = ',', value_parser = parse_gradient, value_name = "dq,dk,dv,dbias,dsinks")]
    gradients: Vec<Gradients>,
    /// Lengths, offsets by batch row, and where sequences are, are in the memory of the device, which does
    /// not tell the host
    #[arg(long)]
    numbers_on_device: bool,
    /// Asks for bitwise reproducible results
    #[arg(long)]
    deterministic: bool,
    /// Asks for results of each sequence whose bits do not depend on what else is in the call
    #[arg(long)]
    batch_invariant: bool,
    /// The implementation asked for, or several in order of preference; any by default
    #[arg(long, value_delimiter = ',', value_name = "NAME,..")]
    implementation: Vec<String>,
    /// The numerics class asked for: F64, F32, HalfF32, HalfRounded or Tf32
    #[arg(long, value_parser = parse_class, value_name = "CLASS")]
    numerics: Option<NumericsClass>,
    /// The most bytes of scratch memory, such as 4096, 512K or 64MiB
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    scratch_limit: Option<usize>,
    /// Prints the explanation as JSON
    #[arg(long)]
    json: bool,
}

/// Which of the axes B, N, T and S, from the last, are full.
#[derive(Clone, Debug, PartialEq)]
struct Axes(Vec<bool>);

impl Axes {
    /// The shape for these sizes.
    fn shape(&self, dims: &Dimensions) -> attention_core::Dims {
        let sizes = dims.logits();
        let sizes = &sizes[sizes.len() - self.0.len()..];
        let shape: Vec<usize> =
            self.0.iter().zip(sizes).map(|(&full, &size)| if full { size } else { 1 }).collect();
        attention_core::Dims::from_slice(&shape).expect("at most four axes were read")
    }
}

fn parse_axes(text: &str) -> Result<Axes, String> {
    const NAMES: [char; 4] = ['B', 'N', 'T', 'S'];
    let wrong = || {
        format!(
            "'{text}' names no axes; expected 1 to 4 of BNTS from the last, with 1 for a broadcast one: B11S, NTS"
        )
    };
    let letters: Vec<char> = text.chars().collect();
    let names = NAMES.get(NAMES.len().wrapping_sub(letters.len())..).ok_or_else(wrong)?;
    let full = letters.iter().zip(names).map(|(letter, name)| match letter {
        '1' => Ok(false),
        letter if letter.eq_ignore_ascii_case(name) => Ok(true),
        _ => Err(wrong()),
    });
    let full = full.collect::<Result<Vec<bool>, String>>()?;
    if full.is_empty() { Err(wrong()) } else { Ok(Axes(full)) }
}

fn parse_packed(text: &str) -> Result<Packed, String> {
    match text {
        "all" => Ok(Packed::All),
        "queries" => Ok(Packed::Queries),
        _ => Err(format!("'{text}' cannot be packed; expected all or queries")),
    }
}

fn parse_page_size(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|&size| size > 0);
    size.ok_or_else(|| format!("'{text}' is no page size; expected a number of tokens from 1"))
}

fn parse_offset(text: &str) -> Result<QueryOffset, String> {
    match text {
        "top-left" => Ok(QueryOffset::TOP_LEFT),
        "bottom-right" => Ok(QueryOffset::BottomRight),
        number => number
            .parse()
            .map(QueryOffset::Fixed)
            .map_err(|_| format!("'{text}' is no offset; expected a number, top-left or bottom-right")),
    }
}

fn parse_window(text: &str) -> Result<Window, String> {
    let side = |side: &str| match side.trim() {
        "-" => Some(None),
        number => number.parse().ok().map(Some),
    };
    let sides = text.split_once(',').and_then(|(left, right)| Some((side(left)?, side(right)?)));
    let (left, right) = sides.ok_or_else(|| {
        format!("'{text}' is no window; expected two numbers such as 128,0, - for no bound")
    })?;
    Ok(Window { left, right })
}

fn parse_gradient(text: &str) -> Result<Gradients, String> {
    let all = Gradients::QKV | Gradients::BIAS | Gradients::SINKS;
    let single = all.iter().map(|(single, _)| single).find(|single| single.to_string() == text);
    single.ok_or_else(|| {
        let known: Vec<String> = all.iter().map(|(single, _)| single.to_string()).collect();
        format!("unknown gradient '{text}'; known are {}", known.join(", "))
    })
}

fn parse_class(text: &str) -> Result<NumericsClass, String> {
    use NumericsClass::{F32, F64, HalfF32, HalfRounded, Tf32};
    let all = [F64, F32, HalfF32, HalfRounded, Tf32];
    all.into_iter().find(|class| class.to_string().eq_ignore_ascii_case(text)).ok_or_else(|| {
        format!(
            "unknown numerics class '{text}'; known are {}",
            all.map(|class| class.to_string()).join(", ")
        )
    })
}

/// What the options ask for, explained.
fn explanation(arguments: &Arguments) -> crate::Result<Explanation> {
    let problem = problem(arguments).map_err(|error| format!("invalid call: {error}"))?;
    let mut call = Attention::new()
        .registry(&arguments.device.registry(Registry::default()))
        .numerics(arguments.numerics)
        .scratch_limit(arguments.scratch_limit);
    match &arguments.implementation[..] {
        [] => {}
        [one] => call = call.implementation(one.clone()),
        several => call = call.implementation(several.to_vec()),
    }
    Ok(call.explain_problem(&problem))
}

/// Runs the command; false where nothing serves the call.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let explanation = explanation(arguments)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        if let Some(assumed) = arguments.device.assumed() {
            println!("assumed: {assumed}");
        }
        println!("{explanation}");
    }
    Ok(explanation.chosen().is_some())
}

/// Options as they are typed.
#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

fn parsed(options: &str) -> crate::Result<Arguments> {
    Ok(Line::try_parse_from(std::iter::once("explain").chain(options.split_whitespace()))?.arguments)
}

/// The explanation of options as they are typed.
pub(crate) fn explained(options: &str) -> crate::Result<Explanation> {
    explanation(&parsed(options)?)
}

/// The problem of options as they are typed, and every backend that is asked about it, in order of
/// preference.
pub(crate) fn asked(options: &str) -> crate::Result<(Problem, Vec<Arc<dyn AttentionBackend>>)> {
    let arguments = parsed(options)?;
    let registry = arguments.device.registry(Registry::default());
    Ok((problem(&arguments)?, registry.backends().to_vec()))
}

/// The problem of a call without data.
fn problem(arguments: &Arguments) -> Result<Problem, InvalidCall> {
    let (dims, dtype) = (arguments.shape, arguments.dtype);
    let heads_first = arguments.layout == "bnth";
    let placed = |desc: TensorDesc| if heads_first { bnth(&desc) } else { desc };
    let operand = |[outer, inner]: [usize; 2], heads, width| {
        placed(TensorDesc::contiguous(dtype, [outer, inner, heads, width]))
    };
    let rows = Rows::new(&dims, arguments.packed, arguments.page_size, &arguments.key_lengths)?;
    let mut builder = Problem::builder(
        operand(rows.queries, dims.query_heads, dims.head_dim),
        operand(rows.keys, dims.key_heads, dims.head_dim),
        operand(rows.keys, dims.key_heads, dims.value_head_dim),
    )
    .device(arguments.device.device())
    .causal(arguments.causal)
    .window(arguments.window.unwrap_or_default())
    .deterministic(arguments.deterministic)
    .batch_invariant(arguments.batch_invariant);
    if let Some(axes) = &arguments.mask {
        builder = builder.mask(TensorDesc::contiguous(DType::Bool, axes.shape(&dims)));
    }
    if let Some(axes) = &arguments.bias {
        let dtype = arguments.bias_dtype.unwrap_or(dtype);
        builder = builder.bias(TensorDesc::contiguous(dtype, axes.shape(&dims)));
    }
    if arguments.alibi {
        builder = builder.alibi_slopes(TensorDesc::contiguous(DType::F32, [dims.query_heads]));
    }
    if arguments.sinks {
        builder = builder.sinks(TensorDesc::contiguous(DType::F32, [dims.query_heads]));
    }
    let data = rows.place(numbers(arguments)?)?;
    builder = builder.data(&data);
    let (longest_query, longest_key) = rows.longest(&dims);
    builder = builder.longest(longest_query, longest_key);
    builder = match arguments.pass {
        Pass::Forward => builder.lse(arguments.lse),
        Pass::Backward => {
            let wanted = arguments.gradients.iter().copied().reduce(|set, single| set | single);
            builder.gradients(wanted.unwrap_or(Gradients::QKV)).d_lse(arguments.d_lse)
        }
    };
    let problem = if heads_first { results_bnth(builder)? } else { builder.build()? };
    // The numbers themselves are not part of the problem.
    CallProblem::new(&problem, &data)?;
    if !arguments.numbers_on_device {
        return Ok(problem);
    }
    let on_device = |builder: ProblemBuilder, role| builder.in_host_memory(role, false);
    Role::DATA.into_iter().chain(Role::SEQUENCES).fold(problem.to_builder(), on_device).build()
}

/// The numbers of the call, in host memory.
fn numbers(arguments: &Arguments) -> Result<CallData<'_>, InvalidCall> {
    fn by_row<T: Element>(numbers: &[T]) -> Result<Option<View<'_>>, InvalidCall> {
        (!numbers.is_empty()).then(|| View::from_slice(numbers, [numbers.len()])).transpose()
    }
    Ok(CallData {
        scale: arguments.scale,
        softcap: arguments.softcap,
        query_offset: arguments.offset,
        query_offsets: by_row(&arguments.offsets)?,
        query_lengths: by_row(&arguments.query_lengths)?,
        key_value_lengths: by_row(&arguments.key_lengths)?,
        dropout: arguments.dropout.map(|rate| Dropout::new(rate, 0)),
        ..CallData::default()
    })
}

/// Outputs and what comes in for them, as the operands lie.
fn results_bnth(builder: ProblemBuilder) -> Result<Problem, InvalidCall> {
    let problem = builder.clone().build()?;
    [Role::Out, Role::DOut, Role::DQuery, Role::DKey, Role::DValue]
        .into_iter()
        .filter_map(|role| Some((role, bnth(problem.tensor(role)?))))
        .fold(builder, |builder, (role, desc)| builder.layout(role, desc))
        .build()
}

/// A BTNH tensor in BNTH storage.
fn bnth(desc: &TensorDesc) -> TensorDesc {
    let [b, t, n, h] = desc.shape()[..] else { unreachable!("operands have four axes") };
    let stored = TensorDesc::contiguous(desc.dtype(), [b, n, t, h]).strides();
    let strides = [stored[0], stored[2], stored[1], stored[3]];
    TensorDesc::strided(desc.dtype(), [b, t, n, h], strides).expect("as many strides as axes")
}

#[cfg(test)]
mod tests {
    use attention::{Cause, Verdict};
    use attention_core::{Alignment, Device, OffsetRange};

    use super::*;

    fn parsed(line: &str) -> Arguments {
        super::parsed(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn explained(line: &str) -> Explanation {
        let arguments = parsed(line);
        let call = Attention::new().registry(&arguments.device.registry(Registry::default()));
        call.explain_problem(&problem(&arguments).unwrap())
    }

    fn chosen(line: &str) -> Option<String> {
        explained(line).chosen().map(|candidate| candidate.name.clone())
    }

    #[test]
    fn every_option_reaches_the_problem() {
        let line = "--shape 2,3,5,4,2,8,16 --dtype bf16 --pass backward --layout bnth --causal --offset -2 --window 4,- \
                    --mask B11S --bias NTS --bias-dtype f32 --query-lengths 1,3 --key-lengths 5,0 --scale -0.5 --softcap 30 \
                    --alibi --sinks --dropout 0.25 --d-lse --gradients dq,dbias --deterministic \
                    --batch-invariant";
        let problem = problem(&parsed(line)).unwrap();
        assert_eq!(
            problem.to_string(),
            "backward bf16 B2 T3 S5 N4 K2 H8 Hv16 on cpu, grouped heads, value head dim != head dim, causal, query offset, window left, \
             mask, bias, query lengths, key/value lengths, softcap, ALiBi, sinks, dropout, d_lse, dbias, deterministic, \
             batch invariant"
        );
        assert_eq!(problem.gradients(), Gradients::QUERY | Gradients::BIAS);
        assert!(problem.any_scale() && problem.has_softcap());
        assert_eq!(
            (problem.dropout_rate(), problem.alignment()),
            (Some(0.25), Alignment::Offset(OffsetRange::Near))
        );
        assert_eq!(problem.tensor(Role::Query).unwrap().strides(), [96, 8, 24, 1].into());
        assert_eq!(problem.tensor(Role::DQuery).unwrap().strides(), [96, 8, 24, 1].into());
        assert_eq!(problem.tensor(Role::Mask).unwrap().shape(), [2, 1, 1, 5].into());
        assert_eq!(problem.tensor(Role::Bias).unwrap().shape(), [1, 4, 3, 5].into());
        assert_eq!(problem.window(), Window { left: Some(4), right: None });
    }

    #[test]
    fn numbers_are_the_hosts_or_the_devices() {
        let line =
            "--shape 2,3,5,2,2,64 --dtype bf16 --causal --offsets 2,-1 --key-lengths 5,3 --device h200@9.19";
        let host = problem(&parsed(line)).unwrap();
        assert_eq!(host.alignment(), Alignment::Offsets(OffsetRange::Near));
        assert_eq!(host.device_of(Role::KeyValueLengths), Device::Cpu);
        assert!(!host.to_string().contains("device memory"), "{host}");
        let device = problem(&parsed(&format!("{line} --numbers-on-device"))).unwrap();
        assert_eq!(device.device_of(Role::QueryOffsets), device.device());
        assert!(device.to_string().contains("numbers in device memory"), "{device}");
    }

    #[test]
    fn sequences_reach_the_problem() {
        let sequences = |line: &str| {
            let problem = problem(&parsed(line)).unwrap();
            let shape = |role: Role| problem.tensor(role).map(|desc| desc.shape().to_vec());
            let of = [Role::Query, Role::Key, Role::QueryStarts, Role::BlockTable].map(shape);
            (problem.to_string(), of)
        };
        let shape = "--shape 3,5,8,4,2,16";
        let (text, [query, key, starts, table]) = sequences(&format!("{shape} --packed --causal"));
        assert_eq!(
            text,
            "forward f32 B3 T5 S8 N4 K2 H16 on cpu, grouped heads, causal, packed queries, packed keys and values"
        );
        assert_eq!((query, key), (Some(vec![1, 15, 4, 16]), Some(vec![1, 24, 2, 16])));
        assert_eq!((starts, table), (Some(vec![4]), None));
        // Three pages of 3 for 8 keys.
        let (text, [query, key, starts, table]) = sequences(&format!("{shape} --packed --page-size 3"));
        assert!(text.contains("T5 S8") && text.contains("packed queries, paged keys"), "{text}");
        assert_eq!((query, key), (Some(vec![1, 15, 4, 16]), Some(vec![9, 3, 2, 16])));
        assert_eq!((starts, table), (Some(vec![4]), Some(vec![3, 3])));
        let (text, [query, ..]) =
            sequences(&format!("{shape} --page-size 4 --key-lengths 8,0,1 --layout bnth"));
        assert!(text.contains("paged keys") && !text.contains("packed"), "{text}");
        assert_eq!(query, Some(vec![3, 5, 4, 16]));
        let (text, [_, key, ..]) = sequences(&format!("{shape} --packed=queries --key-lengths 8,0,1"));
        assert!(text.contains("packed queries") && !text.contains("packed keys"), "{text}");
        assert_eq!(key, Some(vec![3, 8, 2, 16]));
        let device =
            format!("{shape} --packed --page-size 4 --dtype bf16 --device h200@9.19 --numbers-on-device");
        let device = problem(&parsed(&device)).unwrap();
        assert_eq!(device.device_of(Role::BlockTable), device.device());
        for (line, what) in [
            ("--packed=queries", "packed queries with dense keys need key/value lengths"),
            ("--page-size 4 --pass backward", "keys in pages have no backward pass"),
            ("--page-size 4 --key-lengths 8,0,9", "sequence 2 has room for 8 keys"),
            ("--packed --query-lengths 1,1,1", "packed queries have no query lengths"),
        ] {
            let error = problem(&parsed(&format!("{shape} {line}"))).unwrap_err().to_string();
            assert!(error.contains(what), "{line}: {error}");
        }
    }

    #[test]
    fn assumed_devices_answer_as_if_they_were_there() {
        let shape = "--shape 2,1024,1024,16,16,128";
        assert_eq!(chosen(shape).as_deref(), Some("chunked"));
        assert_eq!(chosen(&format!("{shape} --dtype bf16 --device h200@9.19")).as_deref(), Some("cudnn"));
        assert_eq!(
            chosen(&format!("{shape} --dtype bf16 --softcap 30 --device sm_90@9.19.0")).as_deref(),
            Some("chunked-cuda")
        );
        assert_eq!(
            chosen(&format!("{shape} --dtype f64 --device h100@9.19")).as_deref(),
            Some("chunked-cuda")
        );
        assert_eq!(chosen("--shape 1,8,8,1,1,640 --dtype f64 --device h100@9.19"), None);
    }

    #[test]
    fn each_kind_of_refusal_of_cudnn_is_told_and_another_chosen() {
        let shape = "--shape 2,256,256,16,16,64 --device h200@9.19";
        for (options, reason) in [
            ("--dtype f32", "cudnn does not take f32 operands, only f16, bf16"),
            ("--dtype bf16 --softcap 30", "cudnn does not support softcap in its forward pass"),
            (
                "--dtype bf16 --scale -1",
                "cudnn does not support scales outside of 1e-37 to 2e38: cuDNN scales after it took the row max",
            ),
            (
                "--dtype bf16 --pass backward --bias 1NTS --gradients dbias",
                "cudnn does not support dbias in its backward",
            ),
            ("--dtype bf16 --pass backward --d-lse", "cudnn does not support d_lse in its backward pass"),
            ("--dtype bf16 --pass backward --deterministic", "cudnn does not support deterministic"),
            ("--dtype bf16 --batch-invariant", "cudnn does not support batch invariant in its forward pass"),
        ] {
            let explanation = explained(&format!("{shape} {options}"));
            let cudnn = explanation.candidate("cudnn").expect("a candidate");
            assert_eq!(cudnn.verdict, Verdict::Refused(Cause::Unsupported), "{options}");
            assert!(cudnn.reason.contains(reason), "{options}: {}", cudnn.reason);
            assert_eq!(explanation.chosen().expect("another").name, "chunked-cuda", "{options}");
        }
    }

    /// This program has them all, so none is unknown wherever the tensors are.
    #[test]
    fn backends_for_devices_refuse_host_memory_by_name() {
        let explanation =
            super::explained("--shape 1,8,8,1,1,8 --implementation cudnn --scratch-limit 1K").unwrap();
        assert_eq!(explanation.scratch_limit, Some(1024));
        for name in ["cudnn", "chunked-cuda"] {
            let candidate = explanation.candidate(name).expect("a candidate");
            assert_eq!(candidate.verdict, Verdict::Refused(Cause::Device), "{explanation}");
            assert_eq!(candidate.reason, format!("{name} works on cuda memory, the call is on cpu"));
        }
    }

    #[test]
    fn keys_that_a_causal_call_hides_are_told() {
        let text = explained("--shape 1,1,12,1,1,8 --causal").to_string();
        assert!(text.contains("hides the last 11 keys from every query row"), "{text}");
        assert!(explained("--shape 1,1,12,1,1,8 --causal --offset bottom-right").notes.is_empty());
    }

    #[test]
    fn versions_capabilities_and_devices_count() {
        let reason = |line: &str| explained(line).candidate("cudnn").expect("a candidate").reason.clone();
        let sinks = "--shape 2,256,256,16,16,64 --dtype bf16 --sinks --device";
        let old = reason(&format!("{sinks} h100@9.12"));
        assert!(old.contains("cuDNN has them from 9.13 on"), "{old}");
        assert_eq!(chosen(&format!("{sinks} h100@9.13")).as_deref(), Some("cudnn"));
        let wide = reason("--shape 1,64,64,2,2,256 --dtype bf16 --pass backward --device a100@9.19");
        assert!(wide.contains("128"), "{wide}");
        let missing = explained("--shape 1,64,64,2,2,64 --dtype f16 --device cuda:4000");
        assert_eq!(missing.chosen(), None);
        let verdict = missing.candidate("cudnn").expect("a candidate").verdict;
        assert_eq!(verdict, Verdict::Refused(Cause::Unavailable));
    }

    #[test]
    fn what_is_no_option_is_answered_with_what_is() {
        for (line, what) in [
            ("--mask BNTSX", "'BNTSX' names no axes"),
            ("--mask T", "'T' names no axes"),
            ("--mask ", "names no axes"),
            ("--offset left", "'left' is no offset"),
            ("--packed=keys", "'keys' cannot be packed; expected all or queries"),
            ("--page-size 0", "'0' is no page size; expected a number of tokens from 1"),
            ("--window 5", "'5' is no window"),
            ("--gradients dx", "unknown gradient 'dx'; known are dq, dk, dv, dbias, dsinks"),
            ("--numerics F16", "unknown numerics class 'F16'"),
            ("--device tpu", "'tpu' is no device"),
            ("--bias-dtype f32", "--bias"),
            ("--scratch-limit 1KB", "'1KB' is no number of bytes; expected one such as 4096, 512K"),
            ("--dtype f33", "unknown dtype 'f33'; possible are f64, f32, f16, bf16"),
        ] {
            let words = ["explain", "--shape", "1,2,2,1,1,8"].into_iter().chain(line.split(' '));
            let error = Line::try_parse_from(words).err().expect(line).to_string();
            assert!(error.contains(what), "{line}: {error}");
        }
        let invalid = problem(&parsed("--shape 1,2,2,1,1,8 --key-lengths 9")).unwrap_err().to_string();
        assert!(invalid.contains('9') && invalid.contains('2'), "{invalid}");
    }
}
