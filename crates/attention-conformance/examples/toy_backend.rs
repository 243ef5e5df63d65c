//! A whole backend in one file: forward in f32, causal masking and key/value lengths, nothing else.
//! `docs/adding-a-backend.md` walks through it, and the conformance suite runs on it:
//! `cargo run -p attention-conformance --example toy_backend`.

// ANCHOR: type
use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, DeviceKind, Error, Feature, FeatureSet, ForwardCall,
    NumericsClass, PassCapabilities, Plan, Problem, Scratch, ScratchGrowth, Unavailable, Unsupported,
};

const NAME: &str = "toy";

/// Computes one row after the other, in f32.
#[derive(Debug)]
pub struct Toy {
    capabilities: Capabilities,
}
// ANCHOR_END: type

// ANCHOR: capabilities
impl Default for Toy {
    fn default() -> Self {
        let features = FeatureSet::EMPTY
            .with(Feature::GroupedHeads)
            .with(Feature::ValueHeadDim)
            .with(Feature::Causal)
            .with(Feature::KeyValueLengths)
            .with(Feature::Lse)
            .with(Feature::InnerStride)
            .with(Feature::NegativeStrides)
            .with(Feature::Deterministic)
            .with(Feature::BatchInvariant);
        let forward = PassCapabilities::new(features).with_max_head_dims(256, 256);
        let numerics = [(DType::F32, NumericsClass::F32)];
        Self { capabilities: Capabilities::new(DeviceKind::Cpu, numerics, forward, ScratchGrowth::RowBlock) }
    }
}
// ANCHOR_END: capabilities

// ANCHOR: trait
impl AttentionBackend for Toy {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.capabilities.check(NAME, problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.supports(problem)?;
        // One row of logits.
        Ok(problem.dims().key_length * size_of::<f32>())
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let scratch_bytes = self.scratch_bytes(problem)?;
        Ok(Arc::new(ToyPlan { problem: problem.clone(), scratch_bytes }))
    }
}
// ANCHOR_END: trait

// ANCHOR: plan
/// A problem that the toy serves, and what its calls take.
#[derive(Debug)]
struct ToyPlan {
    problem: Problem,
    scratch_bytes: usize,
}

impl Plan for ToyPlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        run(call, scratch);
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        // Every plan is of a forward problem, so this refuses every backward call.
        self.admit(call.problem(), &scratch)?;
        unreachable!("there is no plan of a backward problem")
    }
}
// ANCHOR_END: plan

// ANCHOR: run
/// The forward pass of a problem that was checked.
fn run(call: ForwardCall<'_>, scratch: Scratch<'_>) {
    let (problem, inputs, outputs) = call.into_parts();
    let d = problem.dims();
    let scale = problem.scale() as f32;
    let (Some(query), Some(key), Some(value), Some(mut out)) = (
        inputs.query.host::<f32>(),
        inputs.key.host::<f32>(),
        inputs.value.host::<f32>(),
        outputs.out.host_mut::<f32>(),
    ) else {
        unreachable!("supports accepts f32 in host memory only");
    };
    let mut lse = outputs.lse.and_then(|lse| lse.host_mut::<f32>());
    let mut logits = Logits::new(scratch, d.key_length);

    for b in 0..d.batch {
        for t in 0..d.query_length {
            // Causal masking and lengths, in one range. Keys outside it are never read.
            let keys = problem.key_range(b, t);
            for n in 0..d.query_heads {
                let group = n / d.group_size();
                let mut max = f32::NEG_INFINITY;
                for j in keys.clone() {
                    let products = query.row(&[b, t, n]).iter().zip(key.row(&[b, j, group]).iter());
                    let logit = scale * products.map(|(q, k)| q * k).sum::<f32>();
                    // Not `f32::max`, which would lose a NaN.
                    max = if logit > max || logit.is_nan() { logit } else { max };
                    logits.set(j, logit);
                }
                let sum: f32 = keys.clone().map(|j| (logits.get(j) - max).exp()).sum();
                out.row_mut(&[b, t, n]).fill_with(|dim| {
                    let terms = (keys.clone())
                        .map(|j| (logits.get(j) - max).exp() * value.row(&[b, j, group]).at(dim));
                    // A row without keys is 0, and not 0 / 0.
                    if keys.is_empty() { 0.0 } else { terms.sum::<f32>() / sum }
                });
                if let Some(lse) = &mut lse {
                    let row_lse = if keys.is_empty() { f32::NEG_INFINITY } else { max + sum.ln() };
                    lse.set(&[b, t, n], row_lse);
                }
            }
        }
    }
}

/// A row of logits in scratch memory, without unsafe code: floats as bytes.
struct Logits<'a>(&'a mut [u8]);

impl<'a> Logits<'a> {
    fn new(scratch: Scratch<'a>, len: usize) -> Self {
        let bytes = scratch.into_host().expect("the scratch was checked to be host memory");
        // A caller may give more than is needed.
        Self(&mut bytes[..len * size_of::<f32>()])
    }

    fn get(&self, index: usize) -> f32 {
        let bytes = &self.0[4 * index..4 * index + 4];
        f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    fn set(&mut self, index: usize, value: f32) {
        self.0[4 * index..4 * index + 4].copy_from_slice(&value.to_ne_bytes());
    }
}
// ANCHOR_END: run

// ANCHOR: main
fn main() {
    let reports = attention_conformance::assert_conforms(&Toy::default());
    println!("{}", attention_conformance::report::table(&reports[..1]));
    for report in &reports {
        println!("{}", report.totals());
    }
}
// ANCHOR_END: main
