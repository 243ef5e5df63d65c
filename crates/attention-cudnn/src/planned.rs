//! What the calls of a planned problem share.

use std::sync::Arc;

use attention_core::{DType, Error, Pass, Problem, Role, Unsupported, VariantCounter, Variants};
use attention_cuda::{NumberStore, failure};

use crate::contain::Containment;
use crate::execution_plan::ExecutionPlan;
use crate::failure::Failure;
use crate::far::FarRows;
use crate::key::{CLEANED, Key};
use crate::layout::Layout;
use crate::lists::Lists;
use crate::runtime::Runtime;
use crate::sequences::SequenceKernel;
use crate::{CudnnConfig, NAME};

/// A problem with everything that its calls share: a call does no more than fill in addresses and numbers.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) problem: Problem,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) key: Key,
    /// The operands that are copied first.
    pub(crate) cleaned: Vec<Role>,
    /// Those of them whose copy is left out where a call's structure excludes no row and no key.
    pub(crate) skippable: Vec<Role>,
    pub(crate) layout: Layout,
    pub(crate) execution: Arc<ExecutionPlan>,
    pub(crate) lists: Lists,
    pub(crate) numbers: NumberStore,
    /// Where the plan takes lengths.
    pub(crate) sequences: Option<SequenceKernel>,
    pub(crate) containment: Option<Containment>,
    pub(crate) far: Option<FarRows>,
    pub(crate) runs: VariantCounter,
}

impl Planned {
    /// Of a problem with this layout of its scratch.
    pub(crate) fn new(
        problem: &Problem,
        layout: Layout,
        runtime: &Arc<Runtime>,
        config: &CudnnConfig,
        variants: &Variants,
    ) -> Result<Self, Error> {
        let key = Key::of(problem, runtime.target, config);
        let execution = execution_plan(runtime, &key)?;
        let cleaned: Vec<Role> =
            CLEANED.into_iter().filter(|&role| key.cleans(role) && problem.has(role)).collect();
        let may_skip = |role: &Role| problem.tensor(*role).is_some_and(|desc| key.may_skip_copy(*role, desc));
        Ok(Self {
            problem: problem.clone(),
            runtime: runtime.clone(),
            skippable: cleaned.iter().copied().filter(may_skip).collect(),
            cleaned,
            layout,
            execution,
            numbers: NumberStore::new(problem, &runtime.device, &runtime.kernels)
                .map_err(|error| failure(NAME, "compiling a kernel", error))?,
            sequences: key.lengths.then(|| SequenceKernel::of(runtime, problem)).transpose()?,
            containment: Containment::of(runtime, problem, &key, config)?,
            far: FarRows::of(runtime, problem, &key, config)?,
            runs: variants.counter(&variant(&key, problem)),
            key,
            lists: Lists::default(),
        })
    }
}

fn execution_plan(runtime: &Runtime, key: &Key) -> Result<Arc<ExecutionPlan>, Error> {
    let plan = runtime.with_handle(|handle| runtime.execution_plan(key, handle).map_err(Failure::from));
    let plan = plan.map_err(|error| error.during("building a plan"))?;
    let plan = plan.ok_or_else(|| {
        failure(NAME, "building a plan", format!("{} has no engine for {key:?}", runtime.target))
    })?;
    let limit = runtime.workspaces.limit();
    if plan.workspace > limit {
        let (backend, needed) = (NAME.to_owned(), plan.workspace);
        return Err(Unsupported::ScratchLimit { backend, needed, limit }.into());
    }
    Ok(plan)
}

/// What a plan is called among the variants: by the pass, what is added to logits and by whom, and how keys
/// are masked, which are what cuDNN has other kernels for, and this backend other kernels beside them.
fn variant(key: &Key, problem: &Problem) -> String {
    let added = match key.bias {
        None if key.slopes => ADDED[3],
        None => ADDED[0],
        Some(bias) if bias.made => ADDED[2],
        Some(_) => ADDED[1],
    };
    let seen = match (key.lengths, key.right.is_some() || key.left) {
        (false, false) => SEEN[0],
        (true, false) => SEEN[1],
        (false, true) => SEEN[2],
        (true, true) => SEEN[3],
    };
    format!("{} {}, {added}, {seen}", problem.pass(), problem.dtype())
}

/// What may be added to logits. A bias is used as it lies only where it is promised to be finite, which is
/// off by default.
const ADDED: [&str; 4] = ["nothing added", "a bias as it lies", "a bias that is made", "ALiBi"];

/// Which keys rows may see.
const SEEN: [&str; 4] = ["all keys", "lengths", "a diagonal", "lengths and a diagonal"];

/// Every variant but those of a bias as it lies.
pub(crate) fn variants() -> impl Iterator<Item = String> {
    let passes = [Pass::Forward, Pass::Backward].into_iter();
    passes.flat_map(|pass| {
        [DType::F16, DType::Bf16].into_iter().flat_map(move |dtype| {
            [ADDED[0], ADDED[2], ADDED[3]].into_iter().flat_map(move |added| {
                let seen = SEEN.into_iter();
                // ALiBi is in the graph only where every key is behind its row.
                let served =
                    seen.filter(move |&seen| added != ADDED[3] || seen == SEEN[2] || seen == SEEN[3]);
                served.map(move |seen| format!("{pass} {dtype}, {added}, {seen}"))
            })
        })
    })
}
