//! Which options the kernels of a problem are compiled for.

use attention_core::{Alignment, OffsetRange, Problem, Role, RowLayout};
use attention_cuda::parameters::dtype_code;
use attention_kernels::{DTypeCode, Features, Layout};

/// One for each choice that tiles depend on: no option, one option, all of them.
pub(crate) const KINDS: [Features; 3] = [Features::NONE, Features::MASK, Features::ALL];

/// The options that the kernels of a problem are compiled for. Each option alone has kernels of its own.
/// Several together share the generic kernels, which have all options, since compiling every combination
/// would take too long.
pub(crate) fn features_of(problem: &Problem) -> Features {
    let options = [
        (Features::MASK, problem.has(Role::Mask)),
        (Features::BIAS, problem.has(Role::Bias)),
        (Features::ALIBI, problem.has(Role::AlibiSlopes)),
        (Features::SOFTCAP, problem.has_softcap()),
        (Features::DROPOUT, problem.drop_threshold().is_some_and(|threshold| threshold > 0)),
    ];
    let present = options.into_iter().filter(|&(_, present)| present);
    let present = present.fold(Features::NONE, |all, (feature, _)| all.with(feature));
    // A mask leaves products as they are. The maximum of products times a scale is the scale times their
    // maximum only for a scale above 0, which must be a number in base two as well: infinity times no
    // difference would be NaN, and so would 0 times infinity. The scales of 8-bit keys are known to the
    // kernels alone.
    let has_more = !present.without(Features::MASK.with(Features::DROPOUT)).is_none();
    let any_scale = problem.any_scale() || problem.has(Role::KeyScales);
    let logits = if has_more || any_scale { Features::LOGITS } else { Features::NONE };
    match present.bits().count_ones() {
        // Batch-invariant calls have one kernel for all lengths and offsets.
        1 if present == Features::ALIBI && (problem.batch_invariant() || is_far(problem)) => Features::ALL,
        0 | 1 => present.with(logits),
        _ => Features::ALL,
    }
}

/// How the rows of a problem's sequences lie, for the kernels that it has.
pub(crate) fn layout_of(problem: &Problem) -> Layout {
    match (problem.query_layout(), problem.key_layout()) {
        (_, RowLayout::Paged { .. }) => Layout::Paged,
        (RowLayout::Dense, RowLayout::Dense) => Layout::Dense,
        _ => Layout::Packed,
    }
}

/// Whether the kernels may read a mask or bias for many keys at a time, `PACKS_MASK` and `PACKS_BIAS`: those
/// read a bias of f32 key by key, which this does not look at.
pub(crate) fn packs(features: Features) -> bool {
    matches!(features.without(Features::LOGITS), Features::MASK | Features::BIAS)
}

/// The bias's dtype as the kernels are compiled for it.
pub(crate) fn bias_dtype(features: Features, problem: &Problem) -> DTypeCode {
    match problem.tensor(Role::Bias) {
        Some(bias) if features == Features::BIAS.with(Features::LOGITS) => dtype_code(bias.dtype()),
        _ => DTypeCode::Any,
    }
}

/// The stride of the mask or bias from key to key as the kernels are compiled for it; `None` where they read
/// it at run time.
pub(crate) fn term_stride(features: Features, problem: &Problem) -> Option<usize> {
    let role = match features.without(Features::LOGITS) {
        Features::MASK => Role::Mask,
        Features::BIAS => Role::Bias,
        _ => return None,
    };
    match problem.tensor(role).map(|desc| (desc.shape()[3], desc.strides()[3])) {
        Some((1, _) | (_, 0)) => Some(0),
        Some((_, 1)) => Some(1),
        _ => None,
    }
}

/// Whether distances between rows and keys may not be exact in f32, by the bounds of the problem's calls.
/// Offsets of [`OffsetRange::Near`] bring the rows of `T` positions to at most 2^23.
fn is_far(problem: &Problem) -> bool {
    const FAR_ROWS: usize = 1 << 22;
    const FAR_KEYS: usize = 1 << 23;
    let dims = problem.dims();
    let any_offset = matches!(
        problem.alignment(),
        Alignment::Offset(OffsetRange::Any) | Alignment::Offsets(OffsetRange::Any)
    );
    any_offset || dims.query_length > FAR_ROWS || dims.key_length > FAR_KEYS
}
