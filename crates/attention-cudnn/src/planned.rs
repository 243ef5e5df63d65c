//! A planned problem: everything that its calls share.

use std::sync::Arc;

use attention_core::{DType, Error, Pass, Problem, Role, Unsupported, VariantCounter, Variants};
use attention_cuda::{NumberStore, failure};

use crate::execution_plan::ExecutionPlan;
use crate::failure::Failure;
use crate::far::FarRows;
use crate::key::{CLEANED, Key};
use crate::layout::Layout;
use crate::nan_isolation::NanIsolation;
use crate::places::Places;
use crate::runtime::Runtime;
use crate::sequences::SequenceKernel;
use crate::variant_packs::VariantPacks;
use crate::{CudnnConfig, NAME};

/// A problem with everything that its calls share. A call only fills in addresses and numbers.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) problem: Problem,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) key: Key,
    /// The operands that are copied, with zeros in masked rows, before the plan runs.
    pub(crate) cleaned: Vec<Role>,
    /// Those of them that a call does not copy if its structure excludes no row and no key.
    pub(crate) skippable: Vec<Role>,
    pub(crate) layout: Layout,
    pub(crate) execution: Arc<ExecutionPlan>,
    pub(crate) variant_packs: VariantPacks,
    pub(crate) numbers: NumberStore,
    /// The kernel that writes lengths, if the plan takes them.
    pub(crate) sequences: Option<SequenceKernel>,
    pub(crate) isolation: Option<NanIsolation>,
    pub(crate) far: Option<FarRows>,
    pub(crate) runs: VariantCounter,
}

impl Planned {
    /// Plans a problem whose scratch has this layout.
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
            sequences: key.lengths.then(|| SequenceKernel::of(runtime, problem, &key)).transpose()?,
            isolation: NanIsolation::of(runtime, problem, &key, config)?,
            far: FarRows::of(runtime, problem, &key, config)?,
            runs: variants.counter(&variant(&key, problem)),
            key,
            variant_packs: VariantPacks::default(),
        })
    }
}

/// The execution plan of a problem; an error if cuDNN has none, or if its workspace is above the limit.
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

/// The name of a plan's variant: the pass, the dtype, what is added to the logits, and how keys are masked.
/// cuDNN has different kernels for these, and this backend runs different helper kernels with them.
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
    let rows = match key.places {
        places if places.is_dense() => "",
        Places { pages: Some(_), .. } => ROWS[1],
        _ => ROWS[0],
    };
    format!("{} {}, {added}, {seen}{rows}", problem.pass(), problem.dtype())
}

/// What may be added to logits. A bias is read without a copy ("as it lies") only if the caller promises that
/// it is finite, which is off by default.
const ADDED: [&str; 4] = ["nothing added", "a bias as it lies", "a bias that is made", "ALiBi"];

/// Which keys rows may see.
const SEEN: [&str; 4] = ["all keys", "lengths", "a diagonal", "lengths and a diagonal"];

/// How sequences lie that are not dense rows.
const ROWS: [&str; 2] = [", packed", ", keys in pages"];

/// Every variant, without those of a bias that is read without a copy.
pub(crate) fn variants() -> impl Iterator<Item = String> {
    let passes = [Pass::Forward, Pass::Backward].into_iter();
    passes.flat_map(|pass| {
        [DType::F16, DType::Bf16].into_iter().flat_map(move |dtype| {
            let dense = [ADDED[0], ADDED[2], ADDED[3]].into_iter().flat_map(move |added| {
                let seen = SEEN.into_iter();
                // The graph computes ALiBi only if every key is at or before its row.
                let served =
                    seen.filter(move |&seen| added != ADDED[3] || seen == SEEN[2] || seen == SEEN[3]);
                served.map(move |seen| format!("{pass} {dtype}, {added}, {seen}"))
            });
            let others = ROWS.into_iter().flat_map(move |rows| {
                let is_served = pass == Pass::Forward || rows == ROWS[0];
                let seen = [SEEN[1], SEEN[3]].into_iter().filter(move |_| is_served);
                seen.map(move |seen| format!("{pass} {dtype}, {}, {seen}{rows}", ADDED[0]))
            });
            dense.chain(others)
        })
    })
}
