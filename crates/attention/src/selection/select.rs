//! Choosing an implementation for a problem.

use std::sync::Arc;

use attention_core::{AttentionBackend, DType, NumericsClass, Problem, Unsupported};

use super::ours::{is_unknown, missing};
use super::preference::{CROSSOVERS, order};
use super::{Choice, Implementation};
use crate::{Error, Refusal, Registry};

/// What a caller asks of the choice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    pub(crate) implementation: Implementation,
    /// The default registry where there is none.
    pub(crate) registry: Option<Registry>,
    pub(crate) scratch_limit: Option<usize>,
    pub(crate) numerics: Option<NumericsClass>,
}

/// The implementation that runs a problem.
#[derive(Clone, Debug)]
pub struct Selection {
    pub(crate) backend: Arc<dyn AttentionBackend>,
    pub(crate) reason: Reason,
    pub(crate) dtype: DType,
    pub(crate) served: Served,
    pub(crate) passed_over: Vec<Refusal>,
}

/// Why an implementation was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Reason {
    /// It was asked for by name.
    Named,
    /// The caller gave its value.
    Given,
    /// The first in order of preference that serves the problem.
    FirstInOrder,
    /// The first in order of preference that serves the problem, of the numerics class that was asked for.
    FirstOfClass,
    /// The first in the caller's list that serves the problem: its place, counted from 1.
    Preferred(usize),
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named => f.write_str("asked for by name"),
            Self::Given => f.write_str("given by the caller"),
            Self::FirstInOrder => f.write_str("the first in order of preference that serves the problem"),
            Self::FirstOfClass => {
                f.write_str("the first in order of preference that serves the problem in the class asked for")
            }
            Self::Preferred(place) => {
                write!(f, "number {place} of the caller's list, the first that serves the problem")
            }
        }
    }
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
}

/// The refusal of the first name that nothing has, in this build or another, which is the error of the call.
pub(crate) fn unknown_name(asked: &[Asked]) -> Option<&Refusal> {
    asked.iter().filter_map(|asked| asked.backend.as_ref().err()).find(|refusal| is_unknown(refusal))
}

impl Selection {
    /// The implementation.
    pub fn backend(&self) -> &Arc<dyn AttentionBackend> {
        &self.backend
    }

    /// Why it was chosen.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The numerics class that it computes this problem in.
    pub fn numerics(&self) -> NumericsClass {
        self.served.numerics
    }

    /// Bytes of scratch memory that a call takes.
    pub fn scratch_bytes(&self) -> usize {
        self.served.scratch_bytes
    }

    /// Why those that were asked before it do not run the problem, in the order in which they were asked:
    /// [`Refusal::Planning`] of one that would have served the problem and failed to plan it.
    pub fn passed_over(&self) -> &[Refusal] {
        &self.passed_over
    }

    /// The choice in a form to store.
    pub fn choice(&self) -> Choice {
        Choice::Implementation {
            name: self.backend.name().to_owned(),
            version: Some(self.backend.version().to_owned()),
            dtype: self.dtype,
            numerics: self.served.numerics,
        }
    }
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
        self.ask(&self.implementation, None, problem, &mut asked);
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
            order(&mut backends, problem, CROSSOVERS);
            asked.extend(backends.into_iter().map(|backend| Asked {
                backend: Ok(backend),
                reason: reason(own),
                class: Some(class),
            }));
        };
        match implementation {
            Implementation::Auto => in_order(
                self.numerics.unwrap_or_else(|| standard_class(problem)),
                if self.numerics.is_some() { Reason::FirstOfClass } else { Reason::FirstInOrder },
            ),
            Implementation::Numerics(class) => in_order(*class, Reason::FirstOfClass),
            Implementation::Named(name) => {
                let registry = self.registry();
                let backend = registry.get(name).cloned().ok_or_else(|| missing(name, registry));
                asked.push(Asked { backend, reason: reason(Reason::Named), class: None });
            }
            Implementation::Exactly(backend) => {
                let backend = Ok(Arc::clone(backend));
                asked.push(Asked { backend, reason: reason(Reason::Given), class: None });
            }
            Implementation::Prefer(list) => {
                for (index, implementation) in list.iter().enumerate() {
                    self.ask(implementation, place.or(Some(index + 1)), problem, asked);
                }
            }
        }
    }

    /// Whether a backend serves a problem inside the caller's limits. From the cheapest and most telling reason to
    /// the most particular: device, availability, numerics class, the problem, the scratch limit. Plans nothing.
    ///
    /// `supports` is not asked apart, here and in [`plan`](Self::plan): `scratch_bytes` refuses what it refuses, and both read
    /// every length of a batch.
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
    ) -> Result<Served, Obstacle> {
        self.admit(backend, class, problem)?;
        let served = self.serve(backend, problem)?;
        let failed = |error| Obstacle::Plan { name: backend.name().to_owned(), error };
        backend.prepare(problem).map_err(failed)?;
        Ok(served)
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
        for wanted in [class, self.numerics].into_iter().flatten() {
            if let Some(class) = numerics.filter(|&numerics| numerics != wanted) {
                return Err(Unsupported::Numerics { backend: name(), dtype, class, wanted }.into());
            }
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
        if let Some(limit) = self.scratch_limit.filter(|&limit| scratch_bytes > limit) {
            return Err(Unsupported::ScratchLimit { backend: name(), needed: scratch_bytes, limit }.into());
        }
        Ok(Served { numerics, scratch_bytes })
    }

    /// The implementation that runs the problem, which has planned it.
    pub(crate) fn select(&self, problem: &Problem) -> Result<Selection, Error> {
        // One was asked for: its reason is the error.
        let alone = matches!(&self.implementation, Implementation::Named(_) | Implementation::Exactly(_));
        if self.implementation.is_empty_list() {
            return Err(Error::EmptyList { known: self.registry().names() });
        }
        let asked = self.asked(problem);
        // Before anything runs: what follows a slip of the pen in a list is not what the caller prefers.
        if let Some(refusal) = unknown_name(&asked) {
            return Err(refusal.clone().into());
        }
        let mut passed_over = Vec::new();
        for Asked { backend, reason, class } in asked {
            let planned = backend.map_err(Obstacle::from).and_then(|backend| {
                let served = self.plan(&*backend, class, problem)?;
                Ok((backend, served))
            });
            match planned {
                Ok((backend, served)) => {
                    let dtype = problem.dtype();
                    let selection = Selection { backend, reason, dtype, served, passed_over };
                    tracing::debug!(
                        target: "attention",
                        backend = selection.backend.name(),
                        version = selection.backend.version(),
                        numerics = %selection.served.numerics,
                        scratch_bytes = selection.served.scratch_bytes,
                        reason = %selection.reason,
                        "chosen"
                    );
                    return Ok(selection);
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
