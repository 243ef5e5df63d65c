//! The order of an automatic choice.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, Capabilities, DType, DeviceKind, Dimensions, Error, Feature, FeatureSet, Gradients,
    Pass, PassCapabilities, Plan, Problem, ProblemBuilder, ScratchGrowth, TensorDesc, Unavailable,
    Unsupported,
};

use crate::selection::preference::{CROSSOVERS, Crossover, order};

/// A name without an implementation.
#[derive(Debug)]
struct Named(&'static str, Capabilities);

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

const TABLE: &[Crossover] = &[Crossover {
    small: "plain",
    large: "tiled",
    pass: Pass::Forward,
    with: None,
    without: None,
    logits_per_head: 64 * 64,
}];

fn named(names: &[&'static str]) -> Vec<Arc<dyn AttentionBackend>> {
    let nothing = PassCapabilities::new(FeatureSet::EMPTY);
    let capabilities = Capabilities::new(DeviceKind::Cpu, [], nothing, ScratchGrowth::Constant);
    names.iter().map(|name| Arc::new(Named(name, capabilities.clone())) as _).collect()
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
    order(&mut backends, &square(length).build().unwrap(), TABLE);
    backends.iter().map(|backend| backend.name().to_owned()).collect()
}

#[test]
fn a_crossover_decides_between_its_two() {
    assert_eq!(ordered(&["tiled", "plain"], 63), ["plain", "tiled"]);
    assert_eq!(ordered(&["tiled", "plain"], 64), ["tiled", "plain"]);
    assert_eq!(ordered(&["plain", "tiled"], 63), ["plain", "tiled"]);
    assert_eq!(ordered(&["plain", "tiled"], 64), ["tiled", "plain"]);
}

#[test]
fn a_crossover_may_need_a_feature_or_its_absence_and_a_later_one_decides() {
    let rule = |with, without, logits_per_head| Crossover {
        small: "plain",
        large: "tiled",
        pass: Pass::Forward,
        with,
        without,
        logits_per_head,
    };
    let names = |causal, table: &[Crossover]| {
        let mut backends = named(&["plain", "tiled"]);
        order(&mut backends, &square(8).causal(causal).build().unwrap(), table);
        backends.iter().map(|backend| backend.name().to_owned()).collect::<Vec<_>>()
    };
    let with = [rule(None, None, 1), rule(Some(Feature::Causal), None, usize::MAX)];
    assert_eq!(names(false, &with), ["tiled", "plain"]);
    assert_eq!(names(true, &with), ["plain", "tiled"]);
    let without = [rule(None, None, 1), rule(None, Some(Feature::Causal), usize::MAX)];
    assert_eq!(names(false, &without), ["plain", "tiled"]);
    assert_eq!(names(true, &without), ["tiled", "plain"]);
}

#[test]
fn on_gpus_what_cudnn_reads_as_a_bias_is_for_our_kernels() {
    let first = |build: fn(ProblemBuilder) -> ProblemBuilder| {
        let mut backends = named(&["cudnn", "chunked-cuda"]);
        order(&mut backends, &build(square(512)).build().unwrap(), CROSSOVERS);
        backends[0].name().to_owned()
    };
    fn slopes() -> TensorDesc {
        TensorDesc::contiguous(DType::F32, [1])
    }
    assert_eq!(first(|problem| problem), "cudnn");
    assert_eq!(
        first(|problem| problem.bias(TensorDesc::contiguous(DType::F32, [1, 1, 512, 512]))),
        "chunked-cuda"
    );
    assert_eq!(first(|problem| problem.alibi_slopes(slopes())), "chunked-cuda");
    // That is cuDNN's own.
    assert_eq!(first(|problem| problem.alibi_slopes(slopes()).causal(true)), "cudnn");
}

/// Until it is measured, however long sequences are, in both passes.
#[test]
fn on_gpus_packed_and_paged_sequences_are_for_our_kernels() {
    let first = |problem: ProblemBuilder| {
        let mut backends = named(&["cudnn", "chunked-cuda"]);
        order(&mut backends, &problem.build().unwrap(), CROSSOVERS);
        backends[0].name().to_owned()
    };
    let rows = TensorDesc::contiguous(DType::F32, [4096, 1, 8]);
    let packed =
        || Problem::builder(rows, rows, rows).packed_queries(2, DType::I32).packed_keys(2, DType::I32);
    assert_eq!(first(packed()), "chunked-cuda");
    assert_eq!(first(packed().gradients(Gradients::QKV)), "chunked-cuda");
    let pages = TensorDesc::contiguous(DType::F32, [64, 16, 1, 8]);
    let query = TensorDesc::contiguous(DType::F32, [2, 1, 1, 8]);
    let paged = Problem::builder(query, pages, pages).paged(2, 64, DType::I32).key_value_lengths(DType::I32);
    assert_eq!(first(paged), "chunked-cuda");
}

#[test]
fn others_keep_their_place() {
    assert_eq!(ordered(&["own", "tiled", "other", "plain"], 8), ["own", "plain", "tiled", "other"]);
    assert_eq!(ordered(&["own", "plain"], 100), ["own", "plain"]);
    assert_eq!(ordered(&[], 100), [""; 0]);
}
