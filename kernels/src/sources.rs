//! The table of sources, and the files that all fused kernels share.

use crate::Source;
use crate::{backward_sources, common_sources, cudnn_sources, forward_sources};

/// The text of a fused kernel: what all of them share, then its own files, in an order in which each file
/// follows those that it needs.
macro_rules! fused {
    ($($part:literal),*) => {
        concat!(
            include_str!("cuda/common/dtypes.cuh"),
            include_str!("cuda/common/float8.cuh"),
            include_str!("cuda/common/integers.cuh"),
            include_str!("cuda/common/philox.cuh"),
            include_str!("cuda/fused/numbers.cuh"),
            include_str!("cuda/fused/parameters.cuh"),
            include_str!("cuda/fused/sequence.cuh"),
            include_str!("cuda/fused/schedule.cuh"),
            include_str!("cuda/fused/row.cuh"),
            include_str!("cuda/fused/logits.cuh"),
            include_str!("cuda/fused/dropout.cuh"),
            include_str!("cuda/fused/shared_tiles.cuh"),
            include_str!("cuda/fused/fragments.cuh"),
            include_str!("cuda/fused/mma/sm80.cuh"),
            include_str!("cuda/fused/mma/tf32_split.cuh"),
            include_str!("cuda/fused/mma/fma.cuh"),
            include_str!("cuda/fused/mma/sm90.cuh"),
            include_str!("cuda/fused/pipeline.cuh"),
            include_str!("cuda/fused/softmax.cuh"),
            include_str!("cuda/fused/exact.cuh"),
            $(include_str!($part)),*
        )
    };
}

pub(crate) use fused;

/// Every source of this package, by name.
pub const SOURCES: &[Source] = &[
    common_sources::NUMBERS,
    common_sources::COPY_ROWS,
    common_sources::WRITE_NUMBERS,
    cudnn_sources::ROWS,
    cudnn_sources::TERMS,
    forward_sources::FORWARD,
    forward_sources::MERGE,
    backward_sources::BACKWARD_ROWS,
    cudnn_sources::BACKWARD_SUMS,
    backward_sources::BACKWARD_KEYS,
    backward_sources::BACKWARD_ONE_PASS,
    backward_sources::BACKWARD_FINISH,
    backward_sources::BACKWARD_QUERIES,
    backward_sources::BACKWARD_BIAS,
    common_sources::SCHEDULE,
    cudnn_sources::SEQUENCES,
    cudnn_sources::CONTAIN_OUTPUTS,
    cudnn_sources::CONTAIN_GRADIENTS,
];
