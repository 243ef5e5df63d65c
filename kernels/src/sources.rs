//! The table of sources.

use crate::Source;
use crate::{backward_sources, common_sources, cudnn_sources, forward_sources};

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
