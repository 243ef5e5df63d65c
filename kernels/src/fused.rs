//! The files that all fused kernels share.

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
