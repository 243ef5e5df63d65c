//! A backend that is right, and the same with one flaw: what the suite is tested with.

mod arithmetic;
mod backward;
mod flaws;
mod forward;
mod logits;
mod sequences;

pub(crate) use flaws::Flaw;
use logits::First;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use attention_core::{
    AttentionBackend, BackendFailure, BackwardCall, Capabilities, DType, DeviceKind, Error, Feature,
    FeatureSet, ForwardCall, NumericsClass, PassCapabilities, Plan, Problem, Scratch, ScratchGrowth,
    Unavailable, Unsupported, Variants,
};
use half::{bf16, f16};

const NAME: &str = "naive";

/// Every option, every dtype, one row at a time.
#[derive(Debug)]
pub(crate) struct Naive {
    pub(crate) capabilities: Capabilities,
    pub(crate) flaw: Flaw,
    /// Whether f32 operands are accumulated in f64.
    pub(crate) wide: bool,
    /// Counts plans, for flaws that depend on it.
    pub(crate) plans: AtomicUsize,
    /// Where it lists the passes as its variants.
    pub(crate) variants: Option<Arc<Variants>>,
}

impl Naive {
    pub(crate) fn new(flaw: Flaw) -> Self {
        let all = FeatureSet::all().with(Feature::EightBitKeys).with(Feature::BatchInvariant);
        let pass = PassCapabilities::new(flaw.declared(all));
        let capabilities = Capabilities::new(
            DeviceKind::Cpu,
            NumericsClass::STANDARD,
            pass.clone(),
            ScratchGrowth::RowBlock,
        )
        .with_backward(pass);
        Self { capabilities, flaw, wide: false, plans: AtomicUsize::new(0), variants: None }
    }
}

impl AttentionBackend for Naive {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        "0"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn variants(&self) -> Option<&Variants> {
        self.variants.as_deref()
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        if self.flaw == Flaw::AcceptsEverything {
            return Ok(());
        }
        if self.flaw == Flaw::RefusesWhatItDeclares && problem.causal() {
            let (feature, pass) = (attention_core::Feature::Causal, problem.pass());
            return Err(Unsupported::Feature { backend: NAME.into(), feature, pass });
        }
        self.capabilities.check(NAME, problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.supports(problem)?;
        Ok(needed(problem))
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        if self.flaw != Flaw::PlansWhatItRefuses {
            self.supports(problem)?;
        }
        let mut problem = problem.clone();
        match self.flaw {
            Flaw::PlanPanics => panic!("on purpose"),
            Flaw::PlanFails => {
                let (backend, operation) = (NAME.to_owned(), "plan".to_owned());
                return Err(BackendFailure { backend, operation, source: "on purpose".into() }.into());
            }
            Flaw::PlanIsOfAnotherProblem => {
                let other = problem.to_builder().deterministic(!problem.deterministic());
                problem = other.build().expect("valid either way");
            }
            _ => {}
        }
        Ok(Arc::new(NaivePlan {
            problem,
            flaw: self.flaw,
            wide: self.wide,
            earlier_plans: self.plans.fetch_add(1, Ordering::Relaxed),
            calls: AtomicUsize::new(0),
            first: OnceLock::new(),
            variants: self.variants.clone(),
        }))
    }
}

/// A row of logits in f64, whatever the accumulator.
fn needed(problem: &Problem) -> usize {
    problem.dims().key_length * 8
}

#[derive(Debug)]
pub(crate) struct NaivePlan {
    problem: Problem,
    flaw: Flaw,
    wide: bool,
    /// How many plans the backend had made before.
    earlier_plans: usize,
    /// Counts calls, for flaws that depend on it.
    calls: AtomicUsize,
    /// For flaws that do not forget it.
    first: OnceLock<First>,
    variants: Option<Arc<Variants>>,
}

impl NaivePlan {
    /// What both passes begin with.
    fn begin(&self, problem: &Problem, scratch: Scratch<'_>) -> Result<(), Error> {
        match self.flaw {
            Flaw::Panic => panic!("on purpose"),
            Flaw::ScratchUnchecked => {}
            Flaw::RunsCallsOfOtherProblems => scratch.check(problem.device(), self.scratch_bytes())?,
            _ => self.admit(problem, &scratch)?,
        }
        if let Some(variants) = &self.variants {
            variants.counter(&problem.pass().to_string()).count();
        }
        if let Some(bytes) = scratch.into_host() {
            // Used, so that the suite's poison and guards have something to catch.
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        }
        Ok(())
    }
}

impl Plan for NaivePlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        needed(&self.problem) + if self.flaw == Flaw::PlanAsksForMoreScratch { 8 } else { 0 }
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.begin(call.problem(), scratch)?;
        match call.problem().dtype() {
            DType::F64 => self.run_forward::<f64, f64>(call),
            DType::F32 if self.wide => self.run_forward::<f32, f64>(call),
            DType::F32 => self.run_forward::<f32, f32>(call),
            DType::F16 => self.run_forward::<f16, f32>(call),
            _ => self.run_forward::<bf16, f32>(call),
        }
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.begin(call.problem(), scratch)?;
        match call.problem().dtype() {
            DType::F64 => self.run_backward::<f64, f64>(call),
            DType::F32 if self.wide => self.run_backward::<f32, f64>(call),
            DType::F32 => self.run_backward::<f32, f32>(call),
            DType::F16 => self.run_backward::<f16, f32>(call),
            _ => self.run_backward::<bf16, f32>(call),
        }
        Ok(())
    }
}
