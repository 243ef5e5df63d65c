//! What the facade chooses by itself on a device, as a backend: so that the suite can be run on the choice,
//! with and without the libraries that it chooses among.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use attention::{Attention, AttentionPlan, Implementation, Registry};
use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DelegatePlan, Error, ForwardCall, Plan, Problem, Scratch,
    Unavailable, Unsupported,
};

/// Its name.
pub(crate) const NAME: &str = "auto-cuda";

/// Calls whatever `Auto` selects for each problem. Prints at last who ran how many calls.
#[derive(Debug)]
pub(crate) struct Auto {
    registry: Registry,
    /// Of a backend that serves whatever any of them serves.
    capabilities: Capabilities,
    calls: Arc<Calls>,
}

/// How many calls, by the name of who ran them and the pass.
type Calls = Mutex<BTreeMap<(String, String), usize>>;

impl Auto {
    /// Among these, of which `widest` serves whatever any of them serves.
    pub(crate) fn new(registry: Registry, widest: &dyn AttentionBackend) -> Self {
        Self { registry, capabilities: widest.capabilities().clone(), calls: Arc::default() }
    }

    fn select(&self, problem: &Problem) -> Result<AttentionPlan, Unsupported> {
        let attention = Attention::new().registry(&self.registry).implementation(Implementation::Auto);
        attention.plan(problem).map_err(|error| Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "the call".to_owned(),
            value: problem.to_string(),
            why: error.to_string(),
        })
    }
}

impl Drop for Auto {
    fn drop(&mut self) {
        for ((name, pass), count) in &*self.calls.lock().unwrap_or_else(PoisonError::into_inner) {
            println!("{NAME}: {name} ran {count} {pass} calls");
        }
    }
}

impl AttentionBackend for Auto {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Where any of them is.
    fn available(&self) -> Result<(), Unavailable> {
        let mut answers = self.registry.backends().iter().map(|backend| backend.available());
        let first = answers.next().unwrap_or(Ok(()));
        if first.is_err() && answers.any(|answer| answer.is_ok()) { Ok(()) } else { first }
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.select(problem).map(|_| ())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.select(problem).map(|plan| plan.scratch_bytes())
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let plan = self.select(problem)?.backend_plan().clone();
        Ok(Arc::new(CountedPlan { plan, calls: self.calls.clone() }))
    }
}

/// The plan of who was chosen.
#[derive(Debug)]
struct CountedPlan {
    plan: Arc<dyn Plan>,
    calls: Arc<Calls>,
}

impl CountedPlan {
    fn count(&self) {
        let who = (self.plan.backend().to_owned(), self.plan.problem().pass().to_string());
        *self.calls.lock().unwrap_or_else(PoisonError::into_inner).entry(who).or_default() += 1;
    }
}

impl DelegatePlan for CountedPlan {
    fn inner(&self) -> &dyn Plan {
        &*self.plan
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.count();
        self.plan.forward(call, scratch)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.count();
        self.plan.backward(call, scratch)
    }
}
