//! A backend that is right, and the same with one flaw: what the suite is tested with.

mod arithmetic;
mod backward;
mod flaws;
mod forward;
mod logits;

pub(crate) use flaws::Flaw;

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, DeviceKind, Error, FeatureSet, ForwardCall,
    NumericsClass, PassCapabilities, Problem, Scratch, ScratchGrowth, Unavailable, Unsupported, Variants,
};
use half::{bf16, f16};

/// Every option, every dtype, one row at a time.
#[derive(Debug)]
pub(crate) struct Naive {
    pub(crate) capabilities: Capabilities,
    pub(crate) flaw: Flaw,
    /// Whether f32 operands are accumulated in f64.
    pub(crate) wide: bool,
    /// Counts calls, for flaws that depend on it.
    pub(crate) calls: std::sync::atomic::AtomicUsize,
    /// Where it lists the passes as its variants.
    pub(crate) variants: Option<Variants>,
}

impl Naive {
    pub(crate) fn new(flaw: Flaw) -> Self {
        let pass = PassCapabilities::new(flaw.declared(FeatureSet::all()));
        let capabilities = Capabilities::new(
            DeviceKind::Cpu,
            NumericsClass::STANDARD,
            pass.clone(),
            ScratchGrowth::RowBlock,
        )
        .with_backward(pass);
        Self { capabilities, flaw, wide: false, calls: Default::default(), variants: None }
    }

    fn needed(&self, problem: &Problem) -> usize {
        // A row of logits in f64, whatever the accumulator.
        problem.dims().key_length * 8
    }

    fn check(&self, problem: &Problem, scratch: Scratch<'_>) -> Result<(), Error> {
        self.supports_unless_flawed(problem)?;
        if let Some(variants) = &self.variants {
            variants.counter(&problem.pass().to_string()).count();
        }
        if self.flaw == Flaw::Panic {
            panic!("on purpose");
        }
        let needed = self.needed(problem);
        if self.flaw != Flaw::ScratchUnchecked {
            scratch.check(problem.device(), needed)?;
        }
        if let Some(bytes) = scratch.into_host() {
            // Used, so that the suite's poison and guards have something to catch.
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        }
        Ok(())
    }

    fn supports_unless_flawed(&self, problem: &Problem) -> Result<(), Unsupported> {
        if self.flaw == Flaw::RunsWhatItRefuses { Ok(()) } else { self.supports(problem) }
    }
}

impl AttentionBackend for Naive {
    fn name(&self) -> &str {
        "naive"
    }

    fn version(&self) -> &str {
        "0"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn variants(&self) -> Option<&Variants> {
        self.variants.as_ref()
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
            return Err(Unsupported::Feature { backend: "naive".into(), feature, pass });
        }
        self.capabilities.check("naive", problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.supports(problem)?;
        Ok(self.needed(problem))
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.check(call.problem(), scratch)?;
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
        self.check(call.problem(), scratch)?;
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
