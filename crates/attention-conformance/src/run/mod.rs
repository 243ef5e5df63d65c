//! Runs one case on one backend.

mod alone;
mod base;
mod batch_invariant;
mod call;
mod capability;
mod compare;
pub(crate) mod invariance;
mod laid;
pub(crate) mod other_numbers;
mod refusals;
mod results;
mod saved;
mod stop;
mod timed;
mod variations;

use attention_core::{
    AttentionBackend, CallProblem, DType, DeviceKind, FeatureSet, NumericsClass, Pass, Problem, dropout_mask,
};

use crate::cases::{Case, CaseData, Saved, Values, Wanted};
use crate::oracle::Oracle;
use crate::report::{CaseResult, Outcome};
use crate::rng::Rng;
use crate::suite::Subject;
use crate::tolerance::{ForwardBounds, Precision};
pub(crate) use base::Base;
pub(crate) use call::Invocation;
pub(crate) use compare::{Judge, fraction_of_bound};
pub(crate) use laid::Laid;
pub(crate) use results::Results;
pub(crate) use saved::SavedTensors;
pub(crate) use stop::Stop;
pub(crate) use timed::timed;

/// Runs one case with all its checks.
pub(crate) fn run_case(subject: &Subject<'_>, case: &Case, dtype: DType, pass: Pass) -> CaseResult {
    timed(&case.name, dtype, pass, |features| judge_case(subject, case, dtype, pass, features))
}

/// Whether a backend refuses a case, without running it.
#[cfg(feature = "libtest")]
pub(crate) fn is_refused(backend: &dyn AttentionBackend, case: &Case, dtype: DType, pass: Pass) -> bool {
    let data = case.data(dtype);
    let declared = backend.capabilities().pass(pass).map_or(FeatureSet::EMPTY, |pass| pass.features);
    let refused = |problem: Problem| backend.supports(&problem).is_err();
    usable(backend).is_err() || case.problem(&data, pass, declared).is_ok_and(refused)
}

fn judge_case(
    subject: &Subject<'_>,
    case: &Case,
    dtype: DType,
    pass: Pass,
    features: &mut FeatureSet,
) -> Result<Judge, Stop> {
    let backend = subject.backend;
    // Where sequences are packed or in pages, all but what backends are given is of the padded call.
    let mut data = case.padded_data(dtype);
    // The rows of which the call has a part: sinks have no values, so other keys of any value have the same
    // gradients.
    let whole = (case.saved == Saved::MoreKeys && pass == Pass::Backward).then(|| {
        let whole = data.clone();
        data.sinks = None;
        whole
    });
    let declared = backend.capabilities().pass(pass).map_or(FeatureSet::EMPTY, |pass| pass.features);
    let problem_of = |data: &CaseData| {
        case.problem(data, pass, declared)
            .map_err(|error| Stop::failed(format!("the case is no valid call: {error}")))
    };
    let problem = problem_of(&case.laid_out(&data))?;
    *features = problem.features();
    usable(backend)?;
    capability::agrees(backend, &problem)?;
    let class = backend.capabilities().numerics_of(dtype).unwrap_or(NumericsClass::F32);
    let precision = Precision::new(dtype, class);
    let oracle = match &whole {
        None => Oracle::new(&problem, &case.laid_out(&data).inputs()),
        Some(whole) => Oracle::new(&problem_of(whole)?, &whole.inputs()),
    };
    match pass {
        Pass::Forward => forward(subject, case, &data, &problem, &oracle, precision),
        Pass::Backward => backward(subject, case, &data, &problem, &oracle, precision),
    }
}

/// Whether the backend can run here at all.
pub(crate) fn usable(backend: &dyn AttentionBackend) -> Result<(), Stop> {
    backend.available().map_err(|unavailable| Stop::Skipped(unavailable.to_string()))?;
    if backend.capabilities().device != DeviceKind::Cpu {
        let device = backend.capabilities().device;
        return Err(Stop::Skipped(format!("works on {device} memory, this suite has host memory")));
    }
    Ok(())
}

fn forward(
    subject: &Subject<'_>,
    case: &Case,
    data: &CaseData,
    problem: &Problem,
    oracle: &Oracle,
    precision: Precision,
) -> Result<Judge, Stop> {
    let laid = Laid::new(case, data, None);
    let invocation = laid.invocation(problem, &case.layouts);
    let plan = &*invocation.plan(subject.backend)?;
    let results = invocation.run_on(plan)?;
    let bounds = precision.forward(oracle);
    let mut judge = Judge::new(problem.dtype());
    compare_forward(&mut judge, &results, oracle, &bounds);
    if case.content.values == Values::Identity {
        let numbers = CallProblem::new(problem, &invocation.inputs.data);
        let numbers = numbers.map_err(|error| Stop::failed(format!("the case is no valid call: {error}")))?;
        dropout_bits(&results, &numbers)?;
    }
    let judged = |results: &Results| {
        let mut judge = Judge::new(problem.dtype());
        compare_forward(&mut judge, results, oracle, &bounds);
        judge
    };
    let base = Base { subject, case, data, problem, plan, saved: None, oracle, results: &results };
    after_the_first_call(&base, &laid, &judged)?;
    Ok(judge)
}

fn compare_forward(judge: &mut Judge, results: &Results, oracle: &Oracle, bounds: &ForwardBounds) {
    judge.compare(results, attention_core::Role::Out, &oracle.out(), &bounds.out);
    judge.compare(results, attention_core::Role::Lse, &oracle.lse(), &bounds.lse);
}

fn backward(
    subject: &Subject<'_>,
    case: &Case,
    data: &CaseData,
    problem: &Problem,
    oracle: &Oracle,
    precision: Precision,
) -> Result<Judge, Stop> {
    use crate::oracle::Dense;
    use attention_core::Role;

    let mut judge = Judge::new(problem.dtype());
    let mut saved = match case.saved {
        Saved::Oracle | Saved::MoreKeys => SavedTensors::of_oracle(oracle, problem, &case.layouts),
        Saved::Backend => {
            let mut forward = case.clone();
            forward.options.lse = Wanted::Always;
            let forward = (forward.problem(&case.laid_out(data), Pass::Forward, FeatureSet::EMPTY))
                .map_err(|error| Stop::failed(format!("no valid forward call: {error}")))?;
            // A backend without a forward pass for this, or without logsumexp, has no end to end.
            subject.backend.supports(&forward).map_err(|error| Stop::Skipped(error.to_string()))?;
            let laid = Laid::new(case, data, None);
            let results = laid.invocation(&forward, &case.layouts).run(subject.backend)?;
            compare_forward(&mut judge, &results, oracle, &precision.forward(oracle));
            SavedTensors::of_results(results)
        }
    };
    let errors = saved.errors(oracle);
    if data.garbage {
        saved.add_garbage(oracle, f64::NAN);
    }
    let d_out = Dense::read(&data.d_out.view());
    let d_lse = data.d_lse.as_ref().map(|d_lse| Dense::read(&d_lse.view()));
    let laid = Laid::new(case, data, Some(&saved));
    let invocation = laid.invocation(problem, &case.layouts);
    let plan = &*invocation.plan(subject.backend)?;
    let results = invocation.run_on(plan)?;
    let want = oracle.gradients(&d_out, d_lse.as_ref());
    let bounds = precision.backward(oracle, &d_out, d_lse.as_ref(), &errors);
    let compare = |judge: &mut Judge, results: &Results| {
        judge.compare(results, Role::DQuery, &want.dq, &bounds.dq);
        judge.compare(results, Role::DKey, &want.dk, &bounds.dk);
        judge.compare(results, Role::DValue, &want.dv, &bounds.dv);
        judge.compare(results, Role::DBias, &want.dbias, &bounds.dbias);
        judge.compare(results, Role::DSinks, &want.dsinks, &bounds.dsinks);
    };
    compare(&mut judge, &results);
    let judged = |results: &Results| {
        let mut judge = Judge::new(problem.dtype());
        compare(&mut judge, results);
        judge
    };
    let saved = Some(&saved);
    let base = Base { subject, case, data, problem, plan, saved, oracle, results: &results };
    after_the_first_call(&base, &laid, &judged)?;
    Ok(judge)
}

/// The checks that compare calls with each other rather than with the oracle, which `judged` does.
fn after_the_first_call(
    base: &Base<'_>,
    laid: &Laid<'_>,
    judged: &dyn Fn(&Results) -> Judge,
) -> Result<(), Stop> {
    let Base { subject, case, problem, plan, results, .. } = *base;
    let invocation = &laid.invocation(problem, &case.layouts);
    refusals::wrong_calls(subject.backend, plan, invocation)?;
    refusals::wrong_pages(problem, &laid.data.numbers)?;
    // Host backends are always reproducible, others where the problem asks for it.
    let reproducible = subject.reproducible;
    if reproducible || problem.deterministic() {
        invariance::repeated(subject, plan, invocation, results)?;
    }
    if reproducible {
        match case.sequences {
            Some(_) => base.sequences_alone().map(|_| ())?,
            None => invariance::batch_rows_alone(subject.backend, case, invocation, results)?,
        }
    }
    if problem.batch_invariant() {
        base.batch_invariant()?;
    }
    if other_numbers::is_chosen(case, problem.dtype(), problem.pass()) {
        let within_bounds = |results: &Results| match judged(results).outcome() {
            Outcome::Failed { reason, differences } => {
                Err(Stop::Failed(format!("called after one with other numbers: {reason}"), differences))
            }
            _ => Ok(()),
        };
        let judge: Option<other_numbers::Verdict<'_>> =
            if reproducible || problem.deterministic() { None } else { Some(&within_bounds) };
        let mut rng = Rng::named(case.content.seed, "other numbers of the case");
        other_numbers::first(subject, &laid.data.numbers, plan, invocation, results, judge, &mut rng)?;
    }
    if case.variations && reproducible { base.check_all() } else { Ok(()) }
}

/// Reads the keep bits off the output, where values are rows of the identity, and compares them with the
/// stream.
fn dropout_bits(results: &Results, problem: &CallProblem<'_>) -> Result<(), Stop> {
    let Some(out) = results.get(attention_core::Role::Out) else { return Ok(()) };
    let Some(mask) = dropout_mask(problem).map_err(|error| Stop::failed(error.to_string()))? else {
        return Ok(());
    };
    let d = problem.dims();
    let out = out.values();
    let [_, heads, queries, keys] = d.logits();
    for (position, keep) in mask.into_iter().enumerate() {
        let [b, n, t, s] = crate::tensor::unravel(position, &d.logits())[..] else { unreachable!() };
        debug_assert!(n < heads && t < queries && s < keys);
        if t >= problem.query_len(b) || s >= problem.key_value_len(b) {
            continue;
        }
        let kept = out[((b * queries + t) * heads + n) * d.value_head_dim + s] != 0.0;
        if kept != keep {
            let wanted = if keep { "kept" } else { "dropped" };
            return Err(Stop::failed(format!(
                "dropout: the stream has key {s} of batch row {b}, head {n}, query {t} {wanted}, the output shows the opposite"
            )));
        }
    }
    Ok(())
}
