//! Isolation of NaN: rows of results that are not finite are recomputed from visible keys alone. cuDNN
//! multiplies values at masked positions by zero, and zero times NaN is NaN.

use attention_core::{CallProblem, Error, Gradients, Pass, Problem, Role};
use attention_cuda::cudarc::driver::{CudaFunction, LaunchConfig};
use attention_cuda::parameters::{ProblemParameters, ScratchAddresses, dtype_code};
use attention_cuda::{Addresses, failure, launch};
use attention_kernels::{Features, Fused, Variant};

use crate::key::{Drops, Key, sees_all_or_nothing};
use crate::large;
use crate::places::Places;
use crate::runtime::Runtime;
use crate::{CudnnConfig, NAME};

/// Groups of rows per block, and warps per block: 8 groups per warp, so that every thread has something to
/// read and the loads of all groups are in flight at once.
const GROUPS: usize = 64;
const WARPS: usize = 8;

/// Rows that share a tile in every kernel of cuDNN, since all tiles begin at multiples of it: 16, the rows of
/// a tensor core's matrix instruction (m16n8k16).
const TILE_ROWS: usize = 16;

/// The kernel that is launched after the execution plan of a problem.
#[derive(Debug)]
pub(crate) struct NanIsolation {
    parameters: ProblemParameters,
    function: CudaFunction,
    config: LaunchConfig,
}

/// Whether NaN or infinities from masked positions may reach a result, so that its rows must be checked.
///
/// This needs rows of one tile that see different keys: keys that no row of a batch row sees are replaced by
/// zeros before ([`Key::cleans`]). Keys and rows of packed sequences and of pages are not replaced, and those
/// behind a sequence share tiles with its own, so such calls are always checked. Two more causes remain if
/// all operands are finite: [large logits](large::may_be_large) and, in forward, sinks. A sink above 2.3e38
/// is infinite in base two, so cuDNN computes NaN for its head.
///
/// Rows of a call with cuDNN's own dropout cannot be recomputed, because cuDNN does not tell which
/// probabilities it kept.
pub(crate) fn is_needed(problem: &Problem, key: &Key, config: &CudnnConfig) -> bool {
    let structured = problem.causal() || !problem.window().is_unbounded();
    let rows_differ = structured && problem.dims().query_length > 1;
    let own = matches!(key.dropout, Some(Drops::Own { .. }));
    let of_operands = (rows_differ || problem.has(Role::Mask)) && !config.finite_operands;
    let of_sinks = problem.has(Role::Sinks) && problem.pass() == Pass::Forward;
    (of_operands || large::may_be_large(problem) || of_sinks || !key.places.is_dense()) && !own
}

/// The source and the entry point of a problem's kernel.
fn kernel(pass: Pass) -> (&'static str, &'static str) {
    match pass {
        Pass::Forward => ("attention_contain_outputs.cu", "attention_contain_outputs"),
        Pass::Backward => ("attention_contain_gradients.cu", "attention_contain_gradients"),
    }
}

/// The number of blocks of a problem's kernel. If it exceeds the limit of a grid, the driver reports an
/// error.
fn blocks(problem: &Problem, places: Places, rows_of_group: usize) -> u32 {
    let dims = problem.dims();
    let height = GROUPS * rows_of_group;
    let dense =
        |rows: usize, heads: usize| rows.div_ceil(height).saturating_mul(heads).saturating_mul(dims.batch);
    // As `count_of_slots` of sequence.cuh has it.
    let packed = |role: Role, heads: usize| {
        let rows = problem.tensor(role).map_or(0, |desc| desc.shape()[1]);
        (rows / height).saturating_add(dims.batch).saturating_add(1).saturating_mul(heads)
    };
    let wants = |gradient| problem.gradients().contains(gradient);
    let (has_rows, has_keys) = match problem.pass() {
        Pass::Forward => (true, false),
        Pass::Backward => (wants(Gradients::QUERY), wants(Gradients::KEY) || wants(Gradients::VALUE)),
    };
    let of_rows = match (has_rows, places.packed_queries) {
        (false, _) => 0,
        (true, false) => dense(dims.query_length, dims.query_heads),
        (true, true) => packed(Role::Query, dims.query_heads),
    };
    let of_keys = match (has_keys, places.packed_keys) {
        (false, _) => 0,
        (true, false) => dense(dims.key_length, dims.key_heads),
        (true, true) => packed(Role::Key, dims.key_heads),
    };
    u32::try_from(of_rows.saturating_add(of_keys)).unwrap_or(u32::MAX)
}

/// The number of rows in a group, of which the kernel checks the first and the last: NaN and infinities reach
/// all rows of a tile, so it is enough to check two of them.
///
/// The kernel checks every row (a group is one row) if a mask or a bias may make single rows NaN, or if a row
/// that sees no key may share a tile with rows that see some, since zeros were written over its result.
/// cuDNN may pack the query heads that share a key/value head into one tile, as far as they fill it evenly; a
/// tile then has fewer positions.
fn rows_of_group(problem: &Problem) -> usize {
    let dims = problem.dims();
    let heads = dims.group_size();
    if problem.has(Role::Mask)
        || large::may_be_large(problem)
        || !heads.is_power_of_two()
        || !sees_all_or_nothing(problem)
    {
        return 1;
    }
    (TILE_ROWS / heads).max(1)
}

/// The variant of a fused kernel for a problem, without its tile and warps: the generic variant, which
/// supports all options and tests for them at run time.
pub(crate) fn fused(problem: &Problem) -> Fused {
    let dims = problem.dims();
    let padded = |width: usize| width.next_multiple_of(32);
    Fused::new(dtype_code(problem.dtype()), padded(dims.head_dim))
        .value(padded(dims.value_head_dim))
        .features(Features::ALL)
        .stages(1)
}

/// Where the kernel reads which rows have large logits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LargeRows {
    /// Nowhere: no logit [can be large](large::may_be_large).
    Unknown,
    /// At this address: cuDNN's own logsumexp of a forward pass, `[B, N, T]`.
    Stats(u64),
    /// At this address: the row maxima and sums that [`FarRows`](crate::far::FarRows) wrote.
    States(u64),
}

impl NanIsolation {
    /// The kernel for a problem, or `None` if the problem does not need it.
    pub(crate) fn of(
        runtime: &Runtime,
        problem: &Problem,
        key: &Key,
        config: &CudnnConfig,
    ) -> Result<Option<Self>, Error> {
        if !is_needed(problem, key, config) {
            return Ok(None);
        }
        let group = rows_of_group(problem);
        let layout = key.places.layout();
        let variant = fused(problem).tile(GROUPS, 32).warps(WARPS).group(group).layout(layout);
        let blocks = blocks(problem, key.places, group);
        if blocks == 0 {
            return Ok(None);
        }
        let (source, entry_point) = kernel(problem.pass());
        let function = runtime
            .function(source, Variant::Fused(variant), entry_point)
            .map_err(|error| failure(NAME, "compiling a kernel", error))?;
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (variant.threads() as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        Ok(Some(Self { parameters: ProblemParameters::new(problem), function, config }))
    }

    /// Enqueues the kernel; the work that writes the results must have been enqueued before.
    ///
    /// # Safety
    /// `call` is a call of the problem that this kernel was made for, and `memory` has a tensor of the
    /// problem's description for each of its roles. `stored` is 0 or the address of the call's stored
    /// numbers, and `large` is in the call's scratch, with the shape that [`LargeRows`] gives. All of it is
    /// valid on the device's stream until the work is done.
    pub(crate) unsafe fn run(
        &self,
        runtime: &Runtime,
        call: &CallProblem<'_>,
        memory: &Addresses,
        stored: u64,
        large: LargeRows,
    ) -> Result<(), Error> {
        let mut parameters = self.parameters.of_call(call, stored);
        parameters.set_all(memory);
        match large {
            LargeRows::Unknown => {}
            LargeRows::Stats(stats) => {
                parameters.set_scratch(ScratchAddresses::Rows { offsets: stats, deltas: 0 });
            }
            LargeRows::States(start) => large::set(&mut parameters, call, start),
        }
        let stream = runtime.device.stream();
        // SAFETY: the kernel takes this one struct. The caller promised that `memory` has the tensors that
        // the problem describes and that `stored` and `large` are valid; the kernel reads operands and writes
        // results inside the shapes that the struct gives.
        unsafe { launch(stream, &self.function, &parameters, self.config) }
            .map_err(|error| failure(NAME, "running a kernel", error))
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{Alignment, DType, Device, OffsetRange, TensorDesc};

    use super::*;
    use crate::Target;

    type Build = fn(attention_core::ProblemBuilder) -> attention_core::ProblemBuilder;

    fn needs_with(config: CudnnConfig, t: usize, build: Build) -> bool {
        let desc = |length| TensorDesc::contiguous(DType::Bf16, [2, length, 4, 64]);
        let builder = Problem::builder(desc(t), desc(32), desc(32)).device(Device::Cuda(0));
        let problem = build(builder).build().expect("valid");
        is_needed(&problem, &Key::of(&problem, Target::default(), &config), &config)
    }

    fn needs(t: usize, build: Build) -> bool {
        needs_with(CudnnConfig::default().own_dropout(true), t, build)
    }

    #[test]
    fn groups_of_rows_are_of_structure_alone_and_fill_tiles() {
        let group = |heads: usize, build: Build| {
            let desc = |heads| TensorDesc::contiguous(DType::Bf16, [2, 64, heads, 64]);
            let builder = Problem::builder(desc(heads), desc(2), desc(2)).device(Device::Cuda(0));
            rows_of_group(&build(builder).build().expect("valid"))
        };
        let shifted = |problem: attention_core::ProblemBuilder| {
            problem.causal(true).alignment(Alignment::Offset(OffsetRange::Near))
        };
        assert_eq!(group(2, shifted), 1, "the first rows may see nothing");
        assert_eq!(group(2, |problem| problem.causal(true).query_lengths(DType::I32)), 16);
        assert_eq!(group(2, |problem| problem.causal(true).key_value_lengths(DType::I32)), 16);
        let bottom: Build = |problem| problem.causal(true).alignment(Alignment::BottomRight);
        assert_eq!(group(2, bottom), 16);
        let bottom_of_queries: Build =
            |problem| problem.causal(true).alignment(Alignment::BottomRight).query_lengths(DType::I32);
        assert_eq!(group(2, bottom_of_queries), 16);
        let bottom_of_keys: Build =
            |problem| problem.causal(true).alignment(Alignment::BottomRight).key_value_lengths(DType::I32);
        assert_eq!(group(2, bottom_of_keys), 1);
        assert_eq!([2, 4, 6, 64].map(|heads| group(heads, |problem| problem.causal(true))), [16, 8, 1, 1]);
        assert_eq!(
            group(2, |problem| problem
                .causal(true)
                .mask(TensorDesc::contiguous(DType::Bool, [2, 2, 64, 64]))),
            1
        );
    }

    #[test]
    fn blocks_are_those_of_the_gradients_that_are_wanted() {
        let of = |gradients: Option<Gradients>| {
            let desc = |length, heads| TensorDesc::contiguous(DType::Bf16, [2, length, heads, 64]);
            let builder = Problem::builder(desc(1025, 4), desc(64, 2), desc(64, 2)).device(Device::Cuda(0));
            let builder = match gradients {
                Some(gradients) => builder.gradients(gradients),
                None => builder,
            };
            let problem = builder.causal(true).build().expect("valid");
            blocks(&problem, Places::default(), 16)
        };
        // 1024 rows to a block: two for each of 4 query heads and 2 batch rows, one for each of 2 key heads.
        assert_eq!([None, Some(Gradients::QUERY)].map(of), [16, 16]);
        assert_eq!([Gradients::KEY, Gradients::VALUE].map(|of_keys| of(Some(of_keys))), [4, 4]);
        assert_eq!(of(Some(Gradients::QUERY | Gradients::VALUE)), 20);
    }

    /// Rows of one sequence may share a tile with those of the next one, whatever structure says.
    #[test]
    fn packed_rows_are_always_checked_in_as_many_blocks_as_they_need() {
        let desc = |rows: usize, heads| TensorDesc::contiguous(DType::Bf16, [rows, heads, 64]);
        let builder = || {
            let problem = Problem::builder(desc(3000, 4), desc(500, 2), desc(500, 2)).device(Device::Cuda(0));
            problem.packed_queries(3, DType::I32).packed_keys(3, DType::I32).longest(1024, 256)
        };
        let config = CudnnConfig::default().finite_operands(true);
        let of = |builder: attention_core::ProblemBuilder| {
            let problem = builder.build().expect("valid");
            let key = Key::of(&problem, Target::default(), &config);
            assert!(is_needed(&problem, &key, &config), "{problem}");
            (rows_of_group(&problem), blocks(&problem, key.places, 16))
        };
        // 1024 rows to a block, a block for each sequence, and one for the rows behind them; of every head.
        assert_eq!(of(builder()), (8, (2 + 3 + 1) * 4));
        assert_eq!(of(builder().causal(true)), (8, (2 + 3 + 1) * 4));
        assert_eq!(of(builder().causal(true).alignment(Alignment::BottomRight)), (1, (2 + 3 + 1) * 4));
        let gradients = builder().gradients(Gradients::QKV);
        assert_eq!(of(gradients), (8, (2 + 3 + 1) * 4 + (3 + 1) * 2));
        assert_eq!(of(builder().gradients(Gradients::VALUE)), (8, (3 + 1) * 2));
    }

    #[test]
    fn only_rows_that_share_a_tile_with_rows_that_see_more_are_checked() {
        assert!(!needs(16, |problem| problem));
        assert!(!needs(16, |problem| problem.key_value_lengths(DType::I32)));
        assert!(!needs(1, |problem| problem.causal(true).alignment(Alignment::BottomRight)));
        assert!(needs(16, |problem| problem.causal(true)));
        assert!(needs(16, |problem| problem.window(attention_core::Window { left: Some(3), right: None })));
        assert!(needs(1, |problem| problem.mask(TensorDesc::contiguous(DType::Bool, [2, 4, 1, 32]))));
        assert!(!needs(16, |problem| problem.causal(true).dropout_rate(0.5)));
        let finite = || CudnnConfig::default().finite_operands(true);
        assert!(!needs_with(finite(), 16, |problem| problem.causal(true)));
        let of_bias: Build = |problem| problem.bias(TensorDesc::contiguous(DType::F32, [1, 1, 1, 32]));
        assert!(needs_with(finite(), 16, of_bias));
        let with_sinks: Build = |problem| problem.sinks(TensorDesc::contiguous(DType::F32, [4]));
        assert!(needs_with(finite(), 16, with_sinks));
        let of_slopes: Build = |problem| problem.alibi_slopes(TensorDesc::contiguous(DType::F32, [4]));
        assert!(!needs(16, of_slopes) && !needs(32, of_slopes) && needs_with(finite(), 33, of_slopes));
        let behind: Build = |problem| {
            let slopes = TensorDesc::contiguous(DType::F32, [4]);
            problem.alibi_slopes(slopes).alignment(Alignment::Offset(OffsetRange::Near))
        };
        assert!(needs_with(finite(), 16, behind));
    }
}
