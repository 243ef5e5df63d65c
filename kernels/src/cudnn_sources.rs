//! Kernels around the calls of cuDNN.

use crate::DTypeCode::{Bf16, F16};
use crate::Layout::{Packed, Paged};
use crate::fused::fused;
use crate::{Features, Fused, Helper, Source, Variant};

pub(crate) const ROWS: Source = Source {
    name: "attention_rows.cu",
    text: concat!(
        include_str!("cuda/cudnn/strides.cuh"),
        include_str!("cuda/cudnn/intervals.cuh"),
        include_str!("cuda/cudnn/rows.cu")
    ),
    entry_points: &[
        "attention_finish_forward",
        "attention_prepare_backward",
        "attention_clean_rows",
        "attention_clear_gradients",
        "attention_clear_packed",
    ],
    variants: &[Variant::Helper(Helper::LAUNCHED)],
};

pub(crate) const TERMS: Source = Source {
    name: "attention_terms.cu",
    text: concat!(
        include_str!("cuda/common/dtypes.cuh"),
        include_str!("cuda/common/float8.cuh"),
        include_str!("cuda/common/integers.cuh"),
        include_str!("cuda/common/philox.cuh"),
        include_str!("cuda/cudnn/strides.cuh"),
        include_str!("cuda/cudnn/intervals.cuh"),
        include_str!("cuda/cudnn/bias.cu")
    ),
    entry_points: &[
        "attention_make_bias",
        "attention_to_floats",
        "attention_keep_mask",
        "attention_sink_gradient",
    ],
    variants: &[Variant::Helper(Helper::LAUNCHED)],
};

pub(crate) const BACKWARD_SUMS: Source = Source {
    name: "attention_backward_sums.cu",
    text: fused!(
        "cuda/fused/online_softmax.cuh",
        "cuda/fused/backward/gradients.cuh",
        "cuda/fused/backward/far_rows.cuh",
        "cuda/cudnn/sum_rows.cu"
    ),
    entry_points: &["attention_sum_rows"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).features(Features::ALL).tile(32, 32).warps(2).stages(1),
        Fused::new(F16, 256).features(Features::BIAS.with(Features::LOGITS)).tile(32, 32).warps(2).stages(1),
    ]),
};

pub(crate) const SEQUENCES: Source = Source {
    name: "attention_sequences.cu",
    text: fused!("cuda/cudnn/sequences.cu"),
    entry_points: &["attention_sequences", "attention_block_table"],
    variants: &Variant::fused([
        Fused::new(F16, 32).warps(4),
        Fused::new(F16, 32).warps(4).layout(Packed),
        Fused::new(F16, 32).warps(4).layout(Paged),
    ]),
};

pub(crate) const CONTAIN_OUTPUTS: Source = Source {
    name: "attention_contain_outputs.cu",
    text: fused!("cuda/cudnn/contain.cuh", "cuda/cudnn/contain_outputs.cu"),
    entry_points: &["attention_contain_outputs"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).features(Features::ALL).tile(64, 32).warps(8).stages(1).group(16),
        Fused::new(F16, 64).value(96).features(Features::ALL).tile(64, 32).warps(8).stages(1),
        Fused::new(Bf16, 128)
            .features(Features::ALL)
            .tile(64, 32)
            .warps(8)
            .stages(1)
            .group(16)
            .layout(Packed),
        Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(8).stages(1).layout(Paged),
    ]),
};

pub(crate) const CONTAIN_GRADIENTS: Source = Source {
    name: "attention_contain_gradients.cu",
    text: fused!(
        "cuda/fused/backward/gradients.cuh",
        "cuda/cudnn/contain.cuh",
        "cuda/cudnn/contain_gradients.cu"
    ),
    entry_points: &["attention_contain_gradients"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).features(Features::ALL).tile(64, 32).warps(8).stages(1).group(16),
        Fused::new(F16, 64).value(96).features(Features::ALL).tile(64, 32).warps(8).stages(1),
        Fused::new(Bf16, 128)
            .features(Features::ALL)
            .tile(64, 32)
            .warps(8)
            .stages(1)
            .group(16)
            .layout(Packed),
    ]),
};
