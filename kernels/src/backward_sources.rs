//! The fused kernels of the backward pass.

use crate::DTypeCode::{Bf16, F16, F32, F64};
use crate::KeyGradients::{Key, KeyAndValue};
use crate::Layout::Packed;
use crate::fused::fused;
use crate::{Features, Fused, Source, Variant};

pub(crate) const BACKWARD_ROWS: Source = Source {
    name: "attention_backward_rows.cu",
    text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/rows.cu"),
    entry_points: &["attention_prepare_gradients", "attention_gradient_of_sinks"],
    variants: &Variant::fused([
        Fused::new(Bf16, 64).warps(8),
        Fused::new(F64, 64).warps(8),
        Fused::new(Bf16, 64).warps(8).layout(Packed),
        Fused::new(Bf16, 64).warps(8).layout(Packed).batch_invariant(true),
    ]),
};

pub(crate) const BACKWARD_KEYS: Source = Source {
    name: "attention_backward_keys.cu",
    text: fused!(
        "cuda/fused/backward/gradients.cuh",
        "cuda/fused/backward/keys/scheduler.cuh",
        "cuda/fused/backward/keys/producer.cuh",
        "cuda/fused/backward/keys/logit_gradients.cuh",
        "cuda/fused/backward/keys/consumer.cuh",
        "cuda/fused/backward/keys/epilogue.cuh",
        "cuda/fused/backward/keys.cu"
    ),
    entry_points: &["attention_gradient_of_keys"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).tile(64, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
        Fused::new(F16, 64).tile(128, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
        Fused::new(F16, 256)
            .features(Features::ALL)
            .tile(64, 128)
            .warps(8)
            .warpgroups(true)
            .stages(1)
            .gradients(Key),
        Fused::new(Bf16, 128).tile(64, 64).warps(4).stages(2).gradients(KeyAndValue),
        Fused::new(F16, 64).features(Features::ALL).tile(32, 64).warps(4).stages(2).gradients(KeyAndValue),
        Fused::new(F32, 64).tile(64, 64).warps(4).stages(1).gradients(KeyAndValue),
        Fused::new(F32, 128).tile(32, 128).warps(8).stages(2).gradients(KeyAndValue).tf32_split(true),
        Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1).gradients(KeyAndValue),
        Fused::new(Bf16, 128)
            .tile(64, 128)
            .warps(8)
            .warpgroups(true)
            .stages(2)
            .gradients(KeyAndValue)
            .layout(Packed),
        Fused::new(F16, 64)
            .features(Features::ALL)
            .tile(32, 64)
            .warps(4)
            .stages(2)
            .gradients(KeyAndValue)
            .layout(Packed),
        Fused::new(F32, 64).tile(64, 64).warps(4).stages(1).gradients(KeyAndValue).layout(Packed),
    ]),
};

pub(crate) const BACKWARD_ONE_PASS: Source = Source {
    name: "attention_backward_one_pass.cu",
    text: concat!(
        "#define ONE_PASS\n",
        fused!(
            "cuda/fused/backward/gradients.cuh",
            "cuda/fused/backward/keys/scheduler.cuh",
            "cuda/fused/backward/keys/producer.cuh",
            "cuda/fused/backward/keys/logit_gradients.cuh",
            "cuda/fused/backward/keys/epilogue.cuh",
            "cuda/fused/backward/one_pass/turns.cuh",
            "cuda/fused/backward/one_pass/shared.cuh",
            "cuda/fused/backward/one_pass/producer.cuh",
            "cuda/fused/backward/one_pass/weights.cuh",
            "cuda/fused/backward/one_pass/consumer.cuh",
            "cuda/fused/backward/one_pass/one_pass.cu"
        )
    ),
    entry_points: &["attention_gradients"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).tile(64, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
        Fused::new(F16, 64).tile(128, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
        Fused::new(F16, 128)
            .features(Features::ALL)
            .tile(64, 128)
            .warps(8)
            .warpgroups(true)
            .stages(2)
            .gradients(KeyAndValue),
        Fused::new(Bf16, 64)
            .features(Features::ALL)
            .tile(64, 128)
            .warps(8)
            .warpgroups(true)
            .stages(2)
            .gradients(KeyAndValue)
            .layout(Packed),
        Fused::new(Bf16, 128)
            .tile(64, 128)
            .warps(8)
            .warpgroups(true)
            .stages(2)
            .gradients(KeyAndValue)
            .layout(Packed),
    ]),
};

pub(crate) const BACKWARD_FINISH: Source = Source {
    name: "attention_backward_finish.cu",
    text: fused!(
        "cuda/fused/backward/gradients.cuh",
        "cuda/fused/backward/keys/scheduler.cuh",
        "cuda/fused/backward/one_pass/turns.cuh",
        "cuda/fused/backward/one_pass/finish.cu"
    ),
    entry_points: &["attention_finish_queries"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).tile(64, 128).warps(8),
        Fused::new(F16, 64).features(Features::ALL).tile(128, 128).warps(8).layout(Packed),
    ]),
};

pub(crate) const BACKWARD_QUERIES: Source = Source {
    name: "attention_backward_queries.cu",
    text: fused!(
        "cuda/fused/online_softmax.cuh",
        "cuda/fused/backward/gradients.cuh",
        "cuda/fused/backward/far_rows.cuh",
        "cuda/fused/backward/queries/scheduler.cuh",
        "cuda/fused/backward/queries/producer.cuh",
        "cuda/fused/backward/queries/consumer.cuh",
        "cuda/fused/backward/queries/epilogue.cuh",
        "cuda/fused/backward/queries.cu"
    ),
    entry_points: &["attention_gradient_of_queries"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(2),
        Fused::new(Bf16, 128).features(Features::MASK).tile(128, 128).warps(8).warpgroups(true).stages(2),
        Fused::new(F16, 256).features(Features::ALL).tile(128, 64).warps(8).warpgroups(true).stages(1),
        Fused::new(Bf16, 128).tile(64, 64).warps(4).stages(2),
        Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(2),
        Fused::new(F32, 64).tile(64, 64).warps(4).stages(1),
        Fused::new(F32, 128).tile(128, 32).warps(8).stages(2).tf32_split(true),
        Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(2).layout(Packed),
        Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(2).layout(Packed),
        Fused::new(F32, 128).tile(128, 32).warps(8).stages(2).tf32_split(true).layout(Packed),
    ]),
};

pub(crate) const BACKWARD_BIAS: Source = Source {
    name: "attention_backward_bias.cu",
    text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/bias.cu"),
    entry_points: &["attention_gradient_of_bias"],
    variants: &Variant::fused([
        Fused::new(Bf16, 64).features(Features::BIAS.with(Features::LOGITS)).tile(64, 32).warps(4).stages(1),
        Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
        Fused::new(Bf16, 64)
            .features(Features::BIAS.with(Features::LOGITS))
            .tile(64, 32)
            .warps(4)
            .stages(1)
            .layout(Packed),
    ]),
};
