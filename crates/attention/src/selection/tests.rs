//! The order of an automatic choice.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, Capabilities, DType, Device, DeviceKind, Dimensions, Error, FeatureSet, Gradients,
    NumericsClass, PassCapabilities, Plan, Problem, ProblemBuilder, ScratchGrowth, TensorDesc, Unavailable,
    Unsupported, Window,
};

use super::Implementation;
use super::chosen::Wanted;
use super::crossovers::{CROSSOVERS, Crossover};
use super::devices::DeviceClass;
use super::preference::{device_class, order};
use super::select::Policy;
use crate::{Explanation, Registry};

/// A name without an implementation.
#[derive(Debug)]
struct Named(&'static str, Capabilities, Option<(u32, u32)>);

impl AttentionBackend for Named {
    fn name(&self) -> &str {
        self.0
    }
    fn version(&self) -> &str {
        "0"
    }
    fn capabilities(&self) -> &Capabilities {
        &self.1
    }
    fn compute_capability(&self) -> Option<(u32, u32)> {
        self.2
    }
    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }
    fn supports(&self, _: &Problem) -> Result<(), Unsupported> {
        Ok(())
    }
    fn scratch_bytes(&self, _: &Problem) -> Result<usize, Unsupported> {
        Ok(0)
    }
    fn plan(&self, _: &Problem) -> Result<Arc<dyn Plan>, Error> {
        unreachable!("an order is of names")
    }
}

const TABLE: &[Crossover] =
    &[rule("tiled", "plain", |_| true), rule("plain", "tiled", |problem| problem.dims().query_length < 64)];

const fn rule(faster: &'static str, slower: &'static str, applies: fn(&Problem) -> bool) -> Crossover {
    let devices = &[DeviceClass::Hopper, DeviceClass::Blackwell, DeviceClass::Other];
    let (calls, figures) = ("calls", "1 us beside 2");
    Crossover { faster, slower, devices, applies, calls, figures, record: None }
}

/// In host memory, or on a device of this compute capability.
fn backend(name: &'static str, device: DeviceKind, compute_capability: Option<(u32, u32)>) -> Named {
    let features = PassCapabilities::new(FeatureSet::all());
    let numerics = [(DType::Bf16, NumericsClass::HalfF32), (DType::F32, NumericsClass::F32)];
    let capabilities = Capabilities::new(device, numerics, features.clone(), ScratchGrowth::Constant)
        .with_backward(features);
    Named(name, capabilities, compute_capability)
}

fn named(names: &[&'static str]) -> Vec<Arc<dyn AttentionBackend>> {
    names.iter().map(|&name| Arc::new(backend(name, DeviceKind::Cpu, None)) as _).collect()
}

fn square(length: usize) -> ProblemBuilder {
    let dims = Dimensions {
        batch: 1,
        query_length: length,
        key_length: length,
        query_heads: 1,
        key_heads: 1,
        head_dim: 8,
        value_head_dim: 8,
    };
    dims.problem(DType::F32)
}

fn ordered(names: &[&'static str], length: usize) -> Vec<String> {
    let mut backends = named(names);
    let problem = square(length).build().unwrap();
    let decided = order(&mut backends, &problem, DeviceClass::Other, TABLE);
    // The last rule that applies, where both are there.
    let both = ["plain", "tiled"].iter().all(|name| names.contains(name));
    let faster: Vec<_> = decided.iter().map(|rule| rule.faster).collect();
    let expected = if length < 64 { "plain" } else { "tiled" };
    assert_eq!(faster, if both { vec![expected] } else { Vec::new() });
    backends.iter().map(|backend| backend.name().to_owned()).collect()
}

#[test]
fn a_crossover_decides_between_its_two() {
    assert_eq!(ordered(&["tiled", "plain"], 63), ["plain", "tiled"]);
    assert_eq!(ordered(&["tiled", "plain"], 64), ["tiled", "plain"]);
    assert_eq!(ordered(&["plain", "tiled"], 63), ["plain", "tiled"]);
    assert_eq!(ordered(&["plain", "tiled"], 64), ["tiled", "plain"]);
}

/// A GPU of this compute capability, with both backends for it.
fn gpu(compute_capability: (u32, u32)) -> Registry {
    let of = |name| Arc::new(backend(name, DeviceKind::Cuda, Some(compute_capability)));
    Registry::empty().with(of("cudnn")).with(of("chunked-cuda"))
}

fn explain(registry: &Registry, builder: ProblemBuilder) -> Explanation {
    let wanted = Wanted { implementation: Implementation::Auto, ..Wanted::default() };
    let policy = Policy { registry: Some(registry.clone()), wanted };
    policy.explain(&builder.device(Device::Cuda(0)).build().unwrap(), false)
}

fn first(registry: &Registry, builder: ProblemBuilder) -> String {
    explain(registry, builder).chosen().unwrap().name.clone()
}

/// Rows and keys of each of 4 sequences, heads, and their width.
fn bf16(rows: usize, keys: usize, head_dim: usize) -> ProblemBuilder {
    let (batch, heads) = (4, 16);
    let dims = Dimensions {
        batch,
        query_length: rows,
        key_length: keys,
        query_heads: heads,
        key_heads: heads,
        head_dim,
        value_head_dim: head_dim,
    };
    dims.problem(DType::Bf16)
}

const HOPPER: (u32, u32) = (9, 0);

#[test]
fn devices_have_a_class() {
    for (compute_capability, class) in [
        ((8, 0), DeviceClass::Other),
        ((8, 6), DeviceClass::Other),
        ((8, 9), DeviceClass::Other),
        ((9, 0), DeviceClass::Hopper),
        ((10, 0), DeviceClass::Blackwell),
        ((10, 1), DeviceClass::Other),
        ((10, 3), DeviceClass::Blackwell),
        ((11, 0), DeviceClass::Other),
        ((12, 0), DeviceClass::Other),
        ((12, 1), DeviceClass::Other),
    ] {
        let backends = gpu(compute_capability).backends().to_vec();
        let problem = bf16(8, 8, 64).device(Device::Cuda(0)).build().unwrap();
        assert_eq!(device_class(&backends, &problem), class, "{compute_capability:?}");
    }
    // Backends that know no device, and a device that the call is not on.
    let problem = bf16(8, 8, 64).build().unwrap();
    assert_eq!(device_class(&named(&["cudnn"]), &problem), DeviceClass::Hopper);
    assert_eq!(device_class(gpu((8, 0)).backends(), &problem), DeviceClass::Hopper);
}

/// An A100, an RTX 4090, an RTX 5090: this library's kernels first, for every call.
#[test]
fn other_devices_take_our_kernels_until_a_record_says_otherwise() {
    for compute_capability in [(8, 0), (8, 9), (12, 0)] {
        let registry = gpu(compute_capability);
        for builder in [bf16(512, 512, 128), bf16(4096, 4096, 64).causal(true), bf16(1, 8192, 128)] {
            assert_eq!(first(&registry, builder.clone()), "chunked-cuda", "{compute_capability:?}");
            if builder.clone().build().unwrap().dims().query_length > 1 {
                assert_eq!(first(&registry, builder.gradients(Gradients::QKV)), "chunked-cuda");
            }
        }
        let explanation = explain(&registry, bf16(512, 512, 128));
        let reason = &explanation.candidate("cudnn").unwrap().reason;
        assert_eq!(
            reason,
            "chunked-cuda comes before it, all calls on compute capabilities but 9.0, 10.0 and 10.3: nothing \
             was measured, and this library's kernels come first until a record says otherwise"
        );
    }
}

/// A B200: cuDNN first, until a record says otherwise.
#[test]
fn later_data_centre_parts_take_cudnn() {
    for compute_capability in [(10, 0), (10, 3)] {
        let registry = gpu(compute_capability);
        for builder in [bf16(512, 512, 128), bf16(4096, 4096, 128), bf16(1, 8192, 128)] {
            assert_eq!(first(&registry, builder), "cudnn");
        }
        let explanation = explain(&registry, bf16(4096, 4096, 128));
        let reason = &explanation.chosen().unwrap().reason;
        assert!(reason.contains("10.0 and 10.3: nothing was measured"), "{reason}");
    }
}

/// An H100 or H200, by size, pass and head dimension; `explain` has the rule, the figures and the record.
#[test]
fn on_hopper_the_records_decide_by_size() {
    let registry = gpu(HOPPER);
    for (rows, keys, head_dim, causal, forward, backward) in [
        (256, 256, 64, false, "cudnn", "chunked-cuda"),
        (257, 256, 64, false, "cudnn", "cudnn"),
        (512, 512, 128, false, "cudnn", "cudnn"),
        (1024, 1024, 128, true, "cudnn", "cudnn"),
        (4096, 4095, 128, true, "cudnn", "cudnn"),
        (4096, 4096, 128, true, "chunked-cuda", "cudnn"),
        (4096, 4096, 256, false, "chunked-cuda", "cudnn"),
        (4096, 4096, 64, false, "chunked-cuda", "cudnn"),
        (4096, 4096, 64, true, "cudnn", "cudnn"),
        (4096, 4096, 72, true, "chunked-cuda", "cudnn"),
        // Decoding, of however many keys.
        (16, 1 << 21, 128, false, "cudnn", "cudnn"),
    ] {
        let builder = || bf16(rows, keys, head_dim).causal(causal);
        let what = format!("{rows} x {keys}, heads of {head_dim}, causal: {causal}");
        assert_eq!(first(&registry, builder()), forward, "{what}");
        assert_eq!(first(&registry, builder().gradients(Gradients::QKV)), backward, "{what}, backward");
    }
    let explanation = explain(&registry, bf16(4096, 4096, 128));
    let (chosen, other) = (explanation.chosen().unwrap(), explanation.candidate("cudnn").unwrap());
    let rule = "forward from 4096 x 4096 logits a head on compute capability 9.0: 826 us beside 831,";
    assert!(chosen.reason.contains(&format!("before cudnn, {rule}")), "{}", chosen.reason);
    assert!(other.reason.starts_with(&format!("chunked-cuda comes before it, {rule}")), "{}", other.reason);
    for reason in [&chosen.reason, &other.reason] {
        assert!(reason.ends_with("(benches/record/2026-12-01-gpu-h200-forward.csv)"), "{reason}");
    }
}

#[test]
fn on_hopper_options_that_cudnn_reads_as_tensors_are_for_our_kernels() {
    let registry = gpu(HOPPER);
    fn slopes() -> TensorDesc {
        TensorDesc::contiguous(DType::F32, [16])
    }
    let bias = TensorDesc::contiguous(DType::F32, [1, 1, 512, 512]);
    let mask = TensorDesc::contiguous(DType::Bool, [1, 1, 512, 512]);
    let plain = || bf16(512, 512, 128);
    for builder in [plain().bias(bias), plain().mask(mask), plain().dropout_rate(0.1)] {
        assert_eq!(first(&registry, builder.clone()), "chunked-cuda");
        assert_eq!(first(&registry, builder.gradients(Gradients::QKV)), "chunked-cuda");
    }
    assert_eq!(first(&registry, plain().alibi_slopes(slopes())), "chunked-cuda");
    // That is cuDNN's own.
    assert_eq!(first(&registry, plain().alibi_slopes(slopes()).causal(true)), "cudnn");
    assert_eq!(first(&registry, plain().key_value_lengths(DType::I32)), "chunked-cuda");
    let backward = plain().key_value_lengths(DType::I32).gradients(Gradients::QKV);
    assert_eq!(first(&registry, backward), "cudnn");
    // A window cuts the work down to that of a smaller call.
    assert_eq!(first(&registry, bf16(8192, 8192, 128).window(Window::new(128, 0))), "cudnn");
}

#[test]
fn on_hopper_long_packed_sequences_and_large_pages_are_for_cudnn() {
    let registry = gpu(HOPPER);
    let tokens = TensorDesc::contiguous(DType::Bf16, [16384, 16, 128]);
    let packed = |sequences, longest: Option<usize>| {
        let problem = Problem::builder(tokens, tokens, tokens);
        problem
            .packed_queries(sequences, DType::I32)
            .packed_keys(sequences, DType::I32)
            .longest(longest, longest)
    };
    for (builder, name) in [
        (packed(16, Some(1024)), "cudnn"),
        (packed(16, Some(1023)), "chunked-cuda"),
        // Each number of rows would have a plan of cuDNN's.
        (packed(16, None), "chunked-cuda"),
        (packed(1, Some(16384)), "chunked-cuda"),
    ] {
        assert_eq!(first(&registry, builder.clone()), name);
        assert_eq!(first(&registry, builder.gradients(Gradients::QKV)), name);
    }
    let paged = |sequences: usize, rows, page_size| {
        let query = TensorDesc::contiguous(DType::Bf16, [sequences, rows, 32, 128]);
        let pages = TensorDesc::contiguous(DType::Bf16, [1 << 16, page_size, 8, 128]);
        let problem = Problem::builder(query, pages, pages);
        problem.paged(sequences, 4096 / page_size, DType::I32).key_value_lengths(DType::I32)
    };
    assert_eq!(first(&registry, paged(8, 512, 16)), "cudnn");
    assert_eq!(first(&registry, paged(8, 512, 1)), "chunked-cuda");
    assert_eq!(first(&registry, paged(1, 512, 16)), "chunked-cuda");
    assert_eq!(first(&registry, paged(32, 1, 16)), "chunked-cuda");
}

/// Every rule says what decided it, with a record that is in the repository, or that there is none.
#[test]
fn every_crossover_names_its_record() {
    let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    for rule in CROSSOVERS {
        assert!(!rule.calls.is_empty() && !rule.figures.is_empty() && !rule.devices.is_empty(), "{rule:?}");
        match rule.record {
            Some(record) => {
                let path = format!("{repository}/{record}");
                let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
                assert!(text.contains("H200"), "{path}");
                // The device that records were made on.
                assert_eq!(rule.devices, [DeviceClass::Hopper], "{rule:?}");
            }
            None => assert!(rule.figures.starts_with("nothing was measured"), "{rule:?}"),
        }
    }
}

#[test]
fn others_keep_their_place() {
    assert_eq!(ordered(&["own", "tiled", "other", "plain"], 8), ["own", "plain", "tiled", "other"]);
    assert_eq!(ordered(&["own", "plain"], 100), ["own", "plain"]);
    assert_eq!(ordered(&[], 100), [""; 0]);
}
