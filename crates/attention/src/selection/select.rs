//! Choosing an implementation for a problem.

use std::sync::Arc;

use attention_core::{AttentionBackend, NumericsClass, Plan, Problem, Unsupported};

use super::Implementation;
use super::chosen::{Chosen, Reason, Wanted};
use super::crossovers::{CROSSOVERS, Crossover};
use super::ours::{is_unknown, missing};
use super::preference::{device_class, order};
use crate::{Error, Refusal, Registry, hidden_keys};

/// Among what a caller has the choice made, and what he asks of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    /// The default registry where there is none.
    pub(crate) registry: Option<Registry>,
    pub(crate) wanted: Wanted,
}

/// What a backend that serves a problem says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Served {
    pub(crate) numerics: NumericsClass,
    pub(crate) scratch_bytes: usize,
}

/// An implementation to ask, or the name of one that is not there.
pub(crate) struct Asked {
    pub(crate) backend: Result<Arc<dyn AttentionBackend>, Refusal>,
    pub(crate) reason: Reason,
    /// The class that it must compute in, by the kind of choice.
    pub(crate) class: Option<NumericsClass>,
    /// What decided on its place in an automatic choice, if anything did.
    pub(crate) crossover: Option<&'static Crossover>,
}

/// The refusal of the first name that nothing has, in this build or another, which is the error of the call.
pub(crate) fn unknown_name(asked: &[Asked]) -> Option<&Refusal> {
    asked.iter().filter_map(|asked| asked.backend.as_ref().err()).find(|refusal| is_unknown(refusal))
}

/// Why a candidate does not run a problem.
pub(crate) enum Obstacle {
    Refusal(Refusal),
    /// It failed to plan, with this error.
    Plan {
        name: String,
        error: attention_core::Error,
    },
}

impl From<Refusal> for Obstacle {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl Obstacle {
    /// Whether nothing else would run the call either.
    fn is_the_callers(&self) -> bool {
        matches!(self, Self::Plan { error: attention_core::Error::InvalidCall(_), .. })
    }

    fn tell(&self) {
        match self {
            Self::Refusal(refusal) => tracing::debug!(target: "attention", reason = %refusal, "refused"),
            // Louder: it would have been chosen, and `explain` says that it is.
            Self::Plan { name, error } => {
                tracing::warn!(target: "attention", backend = name, reason = %error, "failed to plan");
            }
        }
    }
}

impl From<Obstacle> for Refusal {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Refusal(refusal) => refusal,
            Obstacle::Plan { name, error } => Self::Planning { name, reason: error.to_string() },
        }
    }
}

impl From<Obstacle> for Error {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Refusal(refusal) => refusal.into(),
            Obstacle::Plan { error, .. } => error.into(),
        }
    }
}

/// The class that an automatic choice keeps to.
fn standard_class(problem: &Problem) -> NumericsClass {
    let class = NumericsClass::standard(problem.dtype());
    class.unwrap_or_else(|| unreachable!("a checked problem has operands of a float dtype"))
}

impl Policy {
    pub(crate) fn registry(&self) -> &Registry {
        self.registry.as_ref().unwrap_or_else(|| Registry::shared())
    }

    /// Whom to ask, in order.
    pub(crate) fn asked(&self, problem: &Problem) -> Vec<Asked> {
        let mut asked = Vec::new();
        self.ask(&self.wanted.implementation, None, problem, &mut asked);
        asked
    }

    fn ask(
        &self,
        implementation: &Implementation,
        place: Option<usize>,
        problem: &Problem,
        asked: &mut Vec<Asked>,
    ) {
        let reason = |own: Reason| place.map_or(own, Reason::Preferred);
        let mut in_order = |class: NumericsClass, own: Reason| {
            let mut backends = self.registry().backends().to_vec();
            let device = device_class(&backends, problem);
            let crossovers = order(&mut backends, problem, device, CROSSOVERS);
            asked.extend(backends.into_iter().map(|backend| Asked {
                reason: reason(own),
                class: Some(class),
                crossover: crossovers.iter().find(|crossover| crossover.is_of(backend.name())).copied(),
                backend: Ok(backend),
            }));
        };
        match implementation {
            Implementation::Auto => in_order(
                self.wanted.numerics.unwrap_or_else(|| standard_class(problem)),
                if self.wanted.numerics.is_some() { Reason::FirstOfClass } else { Reason::FirstInOrder },
            ),
            Implementation::Numerics(class) => in_order(*class, Reason::FirstOfClass),
            Implementation::Named(name) => {
                let registry = self.registry();
                let backend = registry.get(name).cloned().ok_or_else(|| missing(name, registry));
                asked.push(Asked { backend, reason: reason(Reason::Named), class: None, crossover: None });
            }
            Implementation::Exactly(backend) => {
                let backend = Ok(Arc::clone(backend));
                asked.push(Asked { backend, reason: reason(Reason::Given), class: None, crossover: None });
            }
            Implementation::Prefer(list) => {
                for (index, implementation) in list.iter().enumerate() {
                    self.ask(implementation, place.or(Some(index + 1)), problem, asked);
                }
            }
        }
    }

    /// Whether a backend serves a problem inside the caller's limits. From the cheapest and most telling
    /// reason to the most particular: device, availability, numerics class, the problem, the scratch limit.
    /// Plans nothing.
    ///
    /// `supports` is not asked apart, here and in [`plan`](Self::plan): `scratch_bytes` refuses what it
    /// refuses.
    pub(crate) fn judge(
        &self,
        backend: &dyn AttentionBackend,
        class: Option<NumericsClass>,
        problem: &Problem,
    ) -> Result<Served, Refusal> {
        self.admit(backend, class, problem)?;
        self.serve(backend, problem)
    }

    /// As [`judge`](Self::judge), and plans the problem where it is served.
    pub(crate) fn plan(
        &self,
        backend: &dyn AttentionBackend,
        class: Option<NumericsClass>,
        problem: &Problem,
    ) -> Result<(Served, Arc<dyn Plan>), Obstacle> {
        self.admit(backend, class, problem)?;
        let served = self.serve(backend, problem)?;
        let failed = |error| Obstacle::Plan { name: backend.name().to_owned(), error };
        let plan = backend.plan(problem).map_err(failed)?;
        Ok((served, plan))
    }

    /// What needs no look at the problem's structure: device, availability, numerics class.
    fn admit(
        &self,
        backend: &dyn AttentionBackend,
        class: Option<NumericsClass>,
        problem: &Problem,
    ) -> Result<(), Refusal> {
        let capabilities = backend.capabilities();
        let name = || backend.name().to_owned();
        if capabilities.device != problem.device().kind() {
            let (device, expected) = (problem.device(), capabilities.device);
            return Err(Unsupported::Device { backend: name(), device, expected }.into());
        }
        backend.available()?;
        let dtype = problem.dtype();
        // Without a class, the dtype is one that the backend does not take, which it says better.
        let numerics = capabilities.numerics_of(dtype);
        for wanted in [class, self.wanted.numerics].into_iter().flatten() {
            if let Some(class) = numerics.filter(|&numerics| numerics != wanted) {
                return Err(Unsupported::Numerics { backend: name(), dtype, class, wanted }.into());
            }
            capabilities.check_sums(backend.name(), problem)?;
        }
        Ok(())
    }

    /// What a call takes, if the backend serves the problem and the caller grants it.
    fn serve(&self, backend: &dyn AttentionBackend, problem: &Problem) -> Result<Served, Refusal> {
        let (capabilities, dtype) = (backend.capabilities(), problem.dtype());
        let name = || backend.name().to_owned();
        let scratch_bytes = backend.scratch_bytes(problem)?;
        let supported = || capabilities.numerics.iter().map(|&(dtype, _)| dtype).collect();
        let numerics = (capabilities.numerics_of(dtype)).ok_or_else(|| Unsupported::DType {
            backend: name(),
            dtype,
            supported: supported(),
        })?;
        if let Some(limit) = self.wanted.scratch_limit.filter(|&limit| scratch_bytes > limit) {
            return Err(Unsupported::ScratchLimit { backend: name(), needed: scratch_bytes, limit }.into());
        }
        Ok(Served { numerics, scratch_bytes })
    }

    /// The implementation that runs the problem, with a plan: one that is kept, or a new one, where `check`
    /// lets it be made.
    pub(crate) fn chosen(
        &self,
        problem: &Problem,
        check: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Arc<Chosen>, Error> {
        self.registry().plans().find(problem, &self.wanted, || {
            check()?;
            self.choose(problem)
        })
    }

    /// As [`chosen`](Self::chosen), planned anew. Never inlined: what a choice takes of the stack is not
    /// there beside a call.
    #[inline(never)]
    fn choose(&self, problem: &Problem) -> Result<Chosen, Error> {
        hidden_keys::tell_of_problem(problem);
        let implementation = &self.wanted.implementation;
        // One was asked for: its reason is the error.
        let alone = matches!(implementation, Implementation::Named(_) | Implementation::Exactly(_));
        if implementation.is_empty_list() {
            return Err(Error::EmptyList { known: self.registry().names() });
        }
        let asked = self.asked(problem);
        // Before anything runs: what follows a slip of the pen in a list is not what the caller prefers.
        if let Some(refusal) = unknown_name(&asked) {
            return Err(refusal.clone().into());
        }
        let mut passed_over = Vec::new();
        for Asked { backend, reason, class, .. } in asked {
            let planned = backend.map_err(Obstacle::from).and_then(|backend| {
                let (served, plan) = self.plan(&*backend, class, problem)?;
                Ok((backend, served, plan))
            });
            match planned {
                Ok((backend, Served { numerics, scratch_bytes }, plan)) => {
                    tracing::debug!(
                        target: "attention",
                        backend = backend.name(),
                        version = backend.version(),
                        %numerics,
                        scratch_bytes,
                        %reason,
                        "chosen"
                    );
                    return Ok(Chosen { backend, plan, reason, numerics, passed_over });
                }
                Err(obstacle) => {
                    obstacle.tell();
                    if alone || obstacle.is_the_callers() {
                        return Err(obstacle.into());
                    }
                    passed_over.push(obstacle.into());
                }
            }
        }
        Err(Error::NoImplementation { problem: problem.to_string(), refusals: passed_over })
    }
}
