//! Backends and plans that wrap another one.

use std::sync::Arc;

use crate::{
    AttentionBackend, BackwardCall, Capabilities, Error, ForwardCall, LentScratch, Plan, Problem, Scratch,
    Unavailable, Unsupported, Variants,
};

/// A backend that wraps another one, and writes only what differs.
///
/// Every method but [`inner`](Self::inner) is the one of [`AttentionBackend`] of its name, and asks the inner
/// backend by default. What implements this trait implements that one, also with methods that later versions
/// add to both.
///
/// # Semantics
/// The contract is that of [`AttentionBackend`], for the wrapper as a whole: methods belong together. A
/// wrapper that refuses a problem refuses it in [`supports`](Self::supports),
/// [`scratch_bytes`](Self::scratch_bytes) and [`plan`](Self::plan), and one that does something to calls
/// gives plans of its own, which implement [`DelegatePlan`]. Errors of the inner backend carry the inner
/// backend's name.
///
/// Where both traits are imported, their methods are ambiguous on the wrapper's own type: say which one is
/// meant (`Delegate::name(self)`), or import one of the two. On `dyn AttentionBackend`, which
/// [`inner`](Self::inner) gives, they need no import and are not ambiguous.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering};
///
/// use attention_core::{
///     AttentionBackend, Delegate, DelegatePlan, Error, ForwardCall, Plan, Problem, Scratch,
/// };
///
/// /// Counts the forward calls of a backend.
/// #[derive(Debug)]
/// struct Counted {
///     backend: Arc<dyn AttentionBackend>,
///     calls: Arc<AtomicUsize>,
/// }
///
/// impl Delegate for Counted {
///     fn inner(&self) -> &dyn AttentionBackend {
///         &*self.backend
///     }
///
///     fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
///         Ok(Arc::new(CountedPlan { plan: self.backend.plan(problem)?, calls: self.calls.clone() }))
///     }
/// }
///
/// #[derive(Debug)]
/// struct CountedPlan {
///     plan: Arc<dyn Plan>,
///     calls: Arc<AtomicUsize>,
/// }
///
/// impl DelegatePlan for CountedPlan {
///     fn inner(&self) -> &dyn Plan {
///         &*self.plan
///     }
///
///     fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
///         self.calls.fetch_add(1, Ordering::Relaxed);
///         self.plan.forward(call, scratch)
///     }
/// }
///
/// fn counted(backend: Arc<dyn AttentionBackend>) -> Arc<dyn AttentionBackend> {
///     Arc::new(Counted { backend, calls: Arc::default() })
/// }
/// ```
pub trait Delegate: Send + Sync + std::fmt::Debug {
    /// The backend that is wrapped.
    fn inner(&self) -> &dyn AttentionBackend;

    /// As [`AttentionBackend::name`].
    fn name(&self) -> &str {
        self.inner().name()
    }

    /// As [`AttentionBackend::version`].
    fn version(&self) -> &str {
        self.inner().version()
    }

    /// As [`AttentionBackend::capabilities`].
    fn capabilities(&self) -> &Capabilities {
        self.inner().capabilities()
    }

    /// As [`AttentionBackend::available`].
    ///
    /// # Errors
    /// As there.
    fn available(&self) -> Result<(), Unavailable> {
        self.inner().available()
    }

    /// As [`AttentionBackend::compute_capability`].
    fn compute_capability(&self) -> Option<(u32, u32)> {
        self.inner().compute_capability()
    }

    /// As [`AttentionBackend::supports`].
    ///
    /// # Errors
    /// As there.
    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.inner().supports(problem)
    }

    /// As [`AttentionBackend::variants`].
    fn variants(&self) -> Option<&Variants> {
        self.inner().variants()
    }

    /// As [`AttentionBackend::scratch_bytes`].
    ///
    /// # Errors
    /// As there.
    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.inner().scratch_bytes(problem)
    }

    /// As [`AttentionBackend::plan`].
    ///
    /// # Errors
    /// As there.
    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        self.inner().plan(problem)
    }
}

impl<D: Delegate> AttentionBackend for D {
    fn name(&self) -> &str {
        Delegate::name(self)
    }

    fn version(&self) -> &str {
        Delegate::version(self)
    }

    fn capabilities(&self) -> &Capabilities {
        Delegate::capabilities(self)
    }

    fn available(&self) -> Result<(), Unavailable> {
        Delegate::available(self)
    }

    fn compute_capability(&self) -> Option<(u32, u32)> {
        Delegate::compute_capability(self)
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        Delegate::supports(self, problem)
    }

    fn variants(&self) -> Option<&Variants> {
        Delegate::variants(self)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Delegate::scratch_bytes(self, problem)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        Delegate::plan(self, problem)
    }
}

/// A plan that wraps another one, and writes only what differs: as [`Delegate`], for [`Plan`].
///
/// # Semantics
/// A wrapper that asks for scratch of its own answers for it in [`scratch_bytes`](Self::scratch_bytes) and
/// lends it in [`lend_scratch`](Self::lend_scratch). One that plans another problem than it is asked for, on
/// a device for example, says so in [`problem`](Self::problem).
pub trait DelegatePlan: Send + Sync + std::fmt::Debug {
    /// The plan that is wrapped.
    fn inner(&self) -> &dyn Plan;

    /// As [`Plan::backend`].
    fn backend(&self) -> &str {
        self.inner().backend()
    }

    /// As [`Plan::problem`].
    fn problem(&self) -> &Problem {
        self.inner().problem()
    }

    /// As [`Plan::scratch_bytes`].
    fn scratch_bytes(&self) -> usize {
        self.inner().scratch_bytes()
    }

    /// As [`Plan::lend_scratch`].
    ///
    /// # Errors
    /// As there.
    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
        self.inner().lend_scratch()
    }

    /// As [`Plan::forward`].
    ///
    /// # Errors
    /// As there.
    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.inner().forward(call, scratch)
    }

    /// As [`Plan::backward`].
    ///
    /// # Errors
    /// As there.
    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.inner().backward(call, scratch)
    }
}

impl<D: DelegatePlan> Plan for D {
    fn backend(&self) -> &str {
        DelegatePlan::backend(self)
    }

    fn problem(&self) -> &Problem {
        DelegatePlan::problem(self)
    }

    fn scratch_bytes(&self) -> usize {
        DelegatePlan::scratch_bytes(self)
    }

    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
        DelegatePlan::lend_scratch(self)
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        DelegatePlan::forward(self, call, scratch)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        DelegatePlan::backward(self, call, scratch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{
        BackwardInputs, BackwardOutputs, DType, Device, DeviceKind, FeatureSet, ForwardOutputs, Gradients,
        Inputs, PassCapabilities, ScratchBuffer, ScratchGrowth, TensorDesc, View, ViewMut,
    };

    /// Remembers what it was asked, and has an answer of its own to everything.
    #[derive(Debug)]
    struct Asked {
        capabilities: Capabilities,
        variants: Variants,
        asked: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Asked {
        fn was(&self, what: &'static str) {
            self.asked.lock().unwrap().push(what);
        }
    }

    impl AttentionBackend for Asked {
        fn name(&self) -> &str {
            self.was("name");
            "asked"
        }
        fn version(&self) -> &str {
            self.was("version");
            "7"
        }
        fn capabilities(&self) -> &Capabilities {
            self.was("capabilities");
            &self.capabilities
        }
        fn available(&self) -> Result<(), Unavailable> {
            self.was("available");
            Ok(())
        }
        fn compute_capability(&self) -> Option<(u32, u32)> {
            self.was("compute_capability");
            Some((9, 0))
        }
        fn supports(&self, _: &Problem) -> Result<(), Unsupported> {
            self.was("supports");
            Ok(())
        }
        fn variants(&self) -> Option<&Variants> {
            self.was("variants");
            Some(&self.variants)
        }
        fn scratch_bytes(&self, _: &Problem) -> Result<usize, Unsupported> {
            self.was("scratch_bytes");
            Ok(9)
        }
        fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
            self.was("plan");
            Ok(Arc::new(AskedPlan { problem: problem.clone(), asked: self.asked.clone() }))
        }
    }

    #[derive(Debug)]
    struct AskedPlan {
        problem: Problem,
        asked: Arc<Mutex<Vec<&'static str>>>,
    }

    impl AskedPlan {
        fn was(&self, what: &'static str) {
            self.asked.lock().unwrap().push(what);
        }
    }

    impl Plan for AskedPlan {
        fn backend(&self) -> &str {
            self.was("backend");
            "asked"
        }
        fn problem(&self) -> &Problem {
            self.was("problem");
            &self.problem
        }
        fn scratch_bytes(&self) -> usize {
            self.was("scratch_bytes of the plan");
            9
        }
        fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
            self.was("lend_scratch");
            Ok(Box::new(ScratchBuffer::new(5)))
        }
        fn forward(&self, _: ForwardCall<'_>, _: Scratch<'_>) -> Result<(), Error> {
            self.was("forward");
            Ok(())
        }
        fn backward(&self, _: BackwardCall<'_>, _: Scratch<'_>) -> Result<(), Error> {
            self.was("backward");
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Renamed(Arc<Asked>);

    impl Delegate for Renamed {
        fn inner(&self) -> &dyn AttentionBackend {
            &*self.0
        }
        fn name(&self) -> &str {
            "renamed"
        }
        fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
            Ok(Arc::new(RenamedPlan(self.0.plan(problem)?)))
        }
    }

    #[derive(Debug)]
    struct RenamedPlan(Arc<dyn Plan>);

    impl DelegatePlan for RenamedPlan {
        fn inner(&self) -> &dyn Plan {
            &*self.0
        }
    }

    #[test]
    fn the_inner_backend_is_asked_for_all_that_a_wrapper_leaves_out() {
        let nothing = PassCapabilities::new(FeatureSet::EMPTY);
        let inner = Arc::new(Asked {
            capabilities: Capabilities::new(DeviceKind::Cpu, [], nothing, ScratchGrowth::Constant),
            variants: Variants::default(),
            asked: Arc::default(),
        });
        let wrapper: &dyn AttentionBackend = &Renamed(inner.clone());
        let data = [1.0f32];
        let (x, row) = (View::from_slice(&data, [1; 4]).unwrap(), View::from_slice(&data, [1; 3]).unwrap());
        let inputs = Inputs::new(x, x, x);
        let problem = inputs.problem().build().unwrap();
        assert_eq!(problem.tensor(crate::Role::Out), Some(&TensorDesc::contiguous(DType::F32, [1; 4])));

        assert_eq!((wrapper.name(), wrapper.version()), ("renamed", "7"));
        assert_eq!(wrapper.capabilities().numerics, []);
        assert!(wrapper.available().is_ok() && wrapper.supports(&problem).is_ok());
        assert!(wrapper.variants().is_some());
        assert_eq!(wrapper.compute_capability(), Some((9, 0)));
        assert_eq!(wrapper.scratch_bytes(&problem), Ok(9));
        let plan = wrapper.plan(&problem).unwrap();
        assert_eq!((plan.backend(), plan.problem(), plan.scratch_bytes()), ("asked", &problem, 9));
        assert_eq!(plan.lend_scratch().unwrap().scratch().len(), 5);
        let mut out = [0.0f32];
        let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, [1; 4]).unwrap(), lse: None };
        let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
        assert!(plan.forward(call, Scratch::none(Device::Cpu)).is_ok());
        let problem = inputs.problem().gradients(Gradients::QUERY).build().unwrap();
        let saved = BackwardInputs { out: x, lse: row, d_out: x, d_lse: None };
        let dq = Some(ViewMut::from_slice(&mut out, [1; 4]).unwrap());
        let outputs = BackwardOutputs { dq, ..Default::default() };
        let call = BackwardCall::new(&problem, inputs, saved, outputs).unwrap();
        assert!(plan.backward(call, Scratch::none(Device::Cpu)).is_ok());

        let asked = [
            "version",
            "capabilities",
            "available",
            "supports",
            "variants",
            "compute_capability",
            "scratch_bytes",
            "plan",
            "backend",
            "problem",
            "scratch_bytes of the plan",
            "lend_scratch",
            "forward",
            "backward",
        ];
        assert_eq!(*inner.asked.lock().unwrap(), asked);
    }
}
