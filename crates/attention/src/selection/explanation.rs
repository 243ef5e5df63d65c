//! Every implementation with its verdict, as data.

use std::sync::Arc;

use attention_core::{AttentionBackend, DeviceKind, NumericsClass, Problem, Unsupported};

use super::select::{Asked, Policy, Served, unknown_name};
use super::{Choice, Reason, table};
use crate::Refusal;
use crate::hidden_keys::always_hidden_keys;

/// What would run a problem, and why nothing else would: every implementation with its verdict.
///
/// Printed, it is a table; with feature `serde` it can be stored.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Explanation {
    /// The problem.
    pub problem: Problem,
    /// What was asked for, in words: `auto`, a name, a list.
    pub asked_for: String,
    /// The limit on scratch bytes.
    pub scratch_limit: Option<usize>,
    /// The numerics class asked for.
    pub numerics: Option<NumericsClass>,
    /// What a caller may not mean, in words: keys that a causal call hides from every query row (where that
    /// depends on lengths, only the explanation of a call has it, and not that of a problem), and sums too
    /// long for the class of an implementation that was asked for by name.
    #[cfg_attr(feature = "serde", serde(default))]
    pub notes: Vec<String>,
    /// What would run, in a form to store; `None` where nothing serves the problem.
    pub choice: Option<Choice>,
    /// Every implementation: those that were asked, in order, then the others of the registry.
    pub candidates: Vec<Candidate>,
}

/// One implementation and what became of it.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its version; `None` for a name that is not registered.
    pub version: Option<String>,
    /// The memory it works on; `None` for a name that is not registered.
    pub device: Option<DeviceKind>,
    /// The class that it computes the problem's dtype in, if it takes that dtype.
    pub numerics: Option<NumericsClass>,
    /// Bytes of scratch memory that a call would take, where it serves the problem.
    pub scratch_bytes: Option<usize>,
    /// What became of it.
    pub verdict: Verdict,
    /// Why, in words.
    pub reason: String,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Verdict {
    /// It runs the problem.
    Chosen(Reason),
    /// It would serve the problem; another one comes first, or it was not asked for.
    Eligible,
    /// It does not serve the problem, or not within the caller's limits.
    Refused(Cause),
}

/// The kind of a refusal; the candidate's reason has the details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Cause {
    /// The memory is on another kind of device.
    Device,
    /// Its library or device is not there.
    Unavailable,
    /// It computes in another numerics class, or its class does not hold for sums as long as the call's.
    Numerics,
    /// It needs more scratch memory than the limit.
    ScratchLimit,
    /// It does not support the problem.
    Unsupported,
    /// It failed to plan the problem.
    Planning,
    /// No registered implementation has this name.
    NotRegistered,
    /// It is one of this library's, and the feature that adds it is off.
    NotBuilt,
}

impl From<&Refusal> for Cause {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::NotRegistered { .. } => Self::NotRegistered,
            Refusal::NotBuilt { .. } => Self::NotBuilt,
            Refusal::Unavailable(_) => Self::Unavailable,
            Refusal::Planning { .. } => Self::Planning,
            Refusal::Unsupported(Unsupported::Device { .. }) => Self::Device,
            Refusal::Unsupported(Unsupported::Numerics { .. } | Unsupported::LongSums { .. }) => {
                Self::Numerics
            }
            Refusal::Unsupported(Unsupported::ScratchLimit { .. }) => Self::ScratchLimit,
            Refusal::Unsupported(_) => Self::Unsupported,
        }
    }
}

/// What an automatic choice from the default registry would run a problem on. Needs no data and no device,
/// and plans nothing.
///
/// # Examples
/// ```
/// use attention::{DType, Dimensions, explain};
///
/// let dims = Dimensions {
///     batch: 1, query_length: 128, key_length: 128, query_heads: 8, key_heads: 2, head_dim: 64, value_head_dim: 64,
/// };
/// let explanation = explain(&dims.problem(DType::Bf16).causal(true).build()?);
/// println!("{explanation}");
/// # Ok::<(), attention::InvalidCall>(())
/// ```
pub fn explain(problem: &Problem) -> Explanation {
    Policy::default().explain(problem, false)
}

impl Explanation {
    /// The candidate that would run, if any serves the problem.
    pub fn chosen(&self) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| matches!(candidate.verdict, Verdict::Chosen(_)))
    }

    /// The first candidate of this name.
    pub fn candidate(&self, name: &str) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.name == name)
    }
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\nasked for: {}", self.problem, self.asked_for)?;
        if let Some(class) = self.numerics {
            write!(f, ", in class {class}")?;
        }
        if let Some(limit) = self.scratch_limit {
            write!(f, ", with at most {} of scratch", table::bytes(limit))?;
        }
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        if self.candidates.is_empty() {
            return write!(f, "\nno implementation is registered");
        }
        let header = ["implementation", "version", "device", "verdict", "class", "scratch", "reason"];
        let dash = || "-".to_owned();
        let rows = self.candidates.iter().map(|candidate| {
            let verdict = match candidate.verdict {
                Verdict::Chosen(_) => "chosen",
                Verdict::Eligible => "eligible",
                Verdict::Refused(_) => "refused",
            };
            [
                candidate.name.clone(),
                candidate.version.clone().unwrap_or_else(dash),
                candidate.device.map_or_else(dash, |device| device.to_string()),
                verdict.to_owned(),
                candidate.numerics.map_or_else(dash, |class| class.to_string()),
                candidate.scratch_bytes.map_or_else(dash, table::bytes),
                candidate.reason.clone(),
            ]
        });
        write!(f, "\n{}", table::render(header, rows))
    }
}

impl Policy {
    /// With `plan`, candidates plan the problem until one has, as in a call.
    pub(crate) fn explain(&self, problem: &Problem, plan: bool) -> Explanation {
        let mut chosen: Option<(Arc<dyn AttentionBackend>, Choice)> = None;
        let mut candidates: Vec<Candidate> = Vec::new();
        // Whom was asked, in which class, and whether it serves the problem.
        let mut judged: Vec<(Arc<dyn AttentionBackend>, Option<NumericsClass>, bool)> = Vec::new();
        let asked = self.asked(problem);
        // With a name that nothing has in the list, the call fails whatever else is in it.
        let fails = unknown_name(&asked).map(|refusal| format!("the call fails: {refusal}"));
        for Asked { backend, reason, class, crossover } in asked {
            let backend = match backend {
                Ok(backend) => backend,
                Err(refusal) => {
                    candidates.push(unregistered(&refusal));
                    continue;
                }
            };
            // A list may come to the same one twice, and asking in a class where it was asked in any is no
            // news.
            if judged.iter().any(|(other, in_class, served)| {
                Arc::ptr_eq(other, &backend) && (*served || in_class.is_none() || *in_class == class)
            }) {
                continue;
            }
            let verdict = if plan && chosen.is_none() && fails.is_none() {
                self.plan(&*backend, class, problem).map(|(served, _)| served).map_err(Refusal::from)
            } else {
                self.judge(&*backend, class, problem)
            };
            judged.push((backend.clone(), class, verdict.is_ok()));
            candidates.push(match (verdict, &chosen) {
                (Ok(served), None) if fails.is_some() => {
                    let reason = fails.clone().unwrap_or_default();
                    describe(&*backend, problem, Verdict::Eligible, reason, Some(served))
                }
                (Ok(served), None) => {
                    let choice = Choice::of(&*backend, problem.dtype(), served.numerics);
                    chosen = Some((backend.clone(), choice));
                    let before = crossover.filter(|crossover| crossover.faster == backend.name());
                    let why = match before {
                        Some(crossover) => format!("{reason}; before {}, {crossover}", crossover.slower),
                        None => reason.to_string(),
                    };
                    describe(&*backend, problem, Verdict::Chosen(reason), why, Some(served))
                }
                (Ok(served), Some((first, _))) => {
                    let after = crossover.filter(|crossover| {
                        (crossover.faster, crossover.slower) == (first.name(), backend.name())
                    });
                    let reason = match after {
                        Some(crossover) => format!("{} comes before it, {crossover}", first.name()),
                        None => format!("{} comes before it", first.name()),
                    };
                    describe(&*backend, problem, Verdict::Eligible, reason, Some(served))
                }
                (Err(refusal), _) => refused(&*backend, problem, &refusal),
            });
        }
        for backend in self.registry().backends() {
            if judged.iter().any(|(other, ..)| Arc::ptr_eq(other, backend)) {
                continue;
            }
            candidates.push(match self.judge(&**backend, None, problem) {
                Ok(served) => {
                    let reason = "not asked for".to_owned();
                    describe(&**backend, problem, Verdict::Eligible, reason, Some(served))
                }
                Err(refusal) => refused(&**backend, problem, &refusal),
            });
        }
        let mut notes: Vec<String> = always_hidden_keys(problem).into_iter().collect();
        // It was asked for by name: an automatic choice would not have taken it.
        if let Some((backend, _)) = &chosen
            && let Err(leaves_its_class) = backend.capabilities().check_sums(backend.name(), problem)
        {
            notes.push(leaves_its_class.to_string());
        }
        Explanation {
            problem: problem.clone(),
            asked_for: self.wanted.implementation.to_string(),
            scratch_limit: self.wanted.scratch_limit,
            numerics: self.wanted.numerics,
            notes,
            choice: chosen.map(|(_, choice)| choice),
            candidates,
        }
    }
}

fn describe(
    backend: &dyn AttentionBackend,
    problem: &Problem,
    verdict: Verdict,
    reason: String,
    served: Option<Served>,
) -> Candidate {
    Candidate {
        name: backend.name().to_owned(),
        version: Some(backend.version().to_owned()),
        device: Some(backend.capabilities().device),
        numerics: backend.capabilities().numerics_of(problem.dtype()),
        scratch_bytes: served.map(|served| served.scratch_bytes),
        verdict,
        reason,
    }
}

fn refused(backend: &dyn AttentionBackend, problem: &Problem, refusal: &Refusal) -> Candidate {
    describe(backend, problem, Verdict::Refused(refusal.into()), refusal.to_string(), None)
}

fn unregistered(refusal: &Refusal) -> Candidate {
    let name = match refusal {
        Refusal::NotRegistered { name, .. } | Refusal::NotBuilt { name, .. } => name.clone(),
        other => unreachable!("only a name can fail to be found: {other}"),
    };
    Candidate {
        name,
        version: None,
        device: None,
        numerics: None,
        scratch_bytes: None,
        verdict: Verdict::Refused(refusal.into()),
        reason: refusal.to_string(),
    }
}
