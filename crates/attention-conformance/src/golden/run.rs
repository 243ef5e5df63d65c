//! Runs a golden case.

use attention_core::{
    CallProblem, DType, Feature, FeatureSet, Gradients, NumericsClass, Pass, Role, dropout_mask,
};

use super::bounds::Bounds;
use super::file::{Stored, Tensors};
use super::problem::GoldenInputs;
use super::sequences::{is_empty_elsewhere, padded};
use super::{Entry, GoldenSet, SequenceKind};
use crate::cases::Layouts;
use crate::oracle::{Oracle, Padding};
use crate::report::{About, Counting, Report};
use crate::run::{Invocation, Judge, SavedTensors, Stop, timed, usable};
use crate::suite::{Progress, Subject};
use crate::tolerance::Precision;

impl GoldenSet {
    /// Runs the cases whose name contains `filter`, in these dtypes: forward with the logsumexp, and backward
    /// from what forward wrote. Each gives two results.
    pub fn run<'a>(
        &self,
        subject: impl Into<Subject<'a>>,
        dtypes: &[DType],
        filter: Option<&str>,
        mut progress: impl FnMut(Progress<'_>),
    ) -> Report {
        let subject = subject.into();
        let entries: Vec<&Entry> = (self.manifest().cases.iter())
            .filter(|entry| filter.is_none_or(|part| entry.id.contains(part)))
            .collect();
        let total = 2 * entries.len() * dtypes.len();
        let mut results = Vec::with_capacity(total);
        let mut filters = Vec::new();
        if let Some(part) = filter {
            let (left, all) = (entries.len(), self.len());
            filters.push(format!("{left} of {all} cases, whose names contain '{part}'"));
        }
        if DType::FLOATS.iter().any(|dtype| !dtypes.contains(dtype)) {
            filters.push(format!(
                "dtypes {}",
                dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            ));
        }
        let about = About::here(subject.device.as_deref(), filters);
        let counting = Counting::start(subject.backends());
        for &dtype in dtypes {
            for entry in &entries {
                for pass in [Pass::Forward, Pass::Backward] {
                    let result = timed(&entry.id, dtype, pass, |features| {
                        run(self, &subject, entry, dtype, pass, features)
                    });
                    progress(Progress { done: results.len() + 1, total, result: &result });
                    results.push(result);
                }
            }
        }
        let (backend, version) = (subject.backend.name().to_owned(), subject.backend.version().to_owned());
        Report { backend, version, about, variants: counting.finish(), results }
    }
}

fn run(
    set: &GoldenSet,
    subject: &Subject<'_>,
    entry: &Entry,
    dtype: DType,
    pass: Pass,
    features: &mut FeatureSet,
) -> Result<Judge, Stop> {
    let backend = subject.backend;
    usable(backend)?;
    let tensors = Tensors::read(&set.directory, entry).map_err(|error| Stop::failed(error.to_string()))?;
    if matches!(dtype, DType::F16 | DType::Bf16) && !entry.inputs_half_exact {
        return Err(Stop::Skipped("the inputs are not exact in half precision".to_owned()));
    }
    let data = GoldenInputs::new(entry, &tensors, dtype);
    let invalid = |error| Stop::failed(format!("the case is no valid call: {error}"));
    let builder = data.problem(entry).map_err(invalid)?;

    let has_lse = backend.capabilities().forward.features.contains(Feature::Lse);
    let forward = builder.clone().lse(has_lse).build().map_err(invalid)?;
    let problem = match pass {
        Pass::Forward => forward.clone(),
        Pass::Backward => {
            let gradients = gradients(&tensors);
            if gradients.is_empty() {
                let reason = match entry.params.sequences {
                    Some(SequenceKind::Paged) => "keys in pages have no backward pass",
                    _ => "the case has no expected gradients",
                };
                return Err(Stop::Skipped(reason.to_owned()));
            }
            builder.gradients(gradients).d_lse(entry.params.d_lse).build().map_err(invalid)?
        }
    };
    *features = problem.features();
    backend.supports(&problem).map_err(|refusal| Stop::Skipped(refusal.to_string()))?;

    let oracle = Oracle::new(&problem, &data.inputs());
    let padding = Padding::of(&problem, &data.inputs().data);
    let padding = padding.as_ref();
    let numbers = CallProblem::new(&problem, &data.inputs().data).map_err(invalid)?;
    check_case(&tensors, &numbers, &oracle, padding)?;
    let invocation = |problem, saved| Invocation { problem, inputs: data.inputs(), saved, layouts: None };
    let class = backend.capabilities().numerics_of(dtype).unwrap_or(NumericsClass::F32);
    let precision = Precision::new(dtype, class);
    let bounds = Bounds {
        limits: set.limits,
        entry,
        problem: &problem,
        oracle: &oracle,
        data: &data,
        padding,
        precision,
    };
    match pass {
        Pass::Forward => bounds.judge(&tensors, &invocation(&problem, None).run(backend)?, None),
        Pass::Backward => {
            let saved = if has_lse && backend.supports(&forward).is_ok() {
                SavedTensors::of_results(invocation(&forward, None).run(backend)?)
            } else {
                SavedTensors::of_oracle(&oracle, &problem, &Default::default())
            };
            let d_out = data.d_out.as_ref().expect("checked with the manifest");
            // As in the file, NaN in rows of no sequence.
            let laid = padding.map(|padding| saved.laid_out(padding, &Layouts::default(), || f64::NAN));
            let given = laid.as_ref().unwrap_or(&saved).with(d_out, data.d_lse.as_ref());
            bounds.judge(&tensors, &invocation(&problem, Some(given)).run(backend)?, Some(&saved))
        }
    }
}

/// The gradients that the file has expected values for.
fn gradients(tensors: &Tensors) -> Gradients {
    [
        ("dq", Gradients::QUERY),
        ("dk", Gradients::KEY),
        ("dv", Gradients::VALUE),
        ("dbias", Gradients::BIAS),
        ("dsink", Gradients::SINKS),
    ]
    .into_iter()
    .filter(|(name, _)| tensors.expected(name).is_some())
    .fold(Gradients::NONE, |all, (_, gradient)| all | gradient)
}

/// Whether the file agrees with the semantics where no backend is asked: which rows have keys, and the keep
/// bits.
fn check_case(
    tensors: &Tensors,
    problem: &CallProblem<'_>,
    oracle: &Oracle,
    padding: Option<&Padding>,
) -> Result<(), Stop> {
    let same =
        |stored: &[f64], ours: &[bool]| stored.iter().map(|&value| value != 0.0).eq(ours.iter().copied());
    let rows_agree = |stored: &Stored| {
        is_empty_elsewhere(stored, Role::Lse, padding, 0.0)
            && same(&padded(stored, Role::Lse, padding, 0.0), &oracle.row_has_keys())
    };
    if !tensors.get("row_has_keys").is_none_or(rows_agree) {
        return Err(Stop::failed("row_has_keys of the file disagrees with the semantics of the call"));
    }
    let Some(ours) = dropout_mask(problem).map_err(|error| Stop::failed(error.to_string()))? else {
        return Ok(());
    };
    tensors.check_keep_masks(&ours, problem.dims().logits()).map_err(Stop::failed)?;
    let Some(stored) = tensors.get("keep_mask") else { return Ok(()) };
    match stored.values.iter().zip(&ours).position(|(&stored, &ours)| (stored != 0.0) != ours) {
        None => Ok(()),
        Some(at) => {
            let at = crate::tensor::unravel(at, &stored.shape);
            Err(Stop::failed(format!("keep_mask{at:?} of the file disagrees with the dropout stream")))
        }
    }
}
