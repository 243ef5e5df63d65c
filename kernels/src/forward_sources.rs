//! The fused kernels of the forward pass.

use crate::DTypeCode::{Bf16, F8E4M3, F8E5M2, F16, F32, F64};
use crate::Layout::{Packed, Paged};
use crate::fused::fused;
use crate::{Features, Fused, Source, Variant};

pub(crate) const FORWARD: Source = Source {
    name: "attention_forward.cu",
    text: concat!(
        "#define FORWARD\n",
        fused!(
            "cuda/fused/online_softmax.cuh",
            "cuda/fused/forward/scheduler.cuh",
            "cuda/fused/forward/pages.cuh",
            "cuda/fused/forward/widen.cuh",
            "cuda/fused/forward/byte_fragments.cuh",
            "cuda/fused/forward/producer.cuh",
            "cuda/fused/forward/consumer.cuh",
            "cuda/fused/forward/epilogue.cuh",
            "cuda/fused/forward/splits.cuh",
            "cuda/fused/forward/forward.cu"
        )
    ),
    entry_points: &["attention_forward"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1),
        Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1),
        Fused::new(F16, 256).features(Features::ALL).tile(128, 64).warps(8).warpgroups(true).stages(1),
        Fused::new(Bf16, 128).tile(128, 64).warps(4).stages(1),
        Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(1),
        Fused::new(F32, 64).tile(64, 64).warps(4).stages(1),
        Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true),
        Fused::new(F32, 128).features(Features::ALL).tile(64, 32).warps(4).stages(1).tf32_split(true),
        Fused::new(Bf16, 576).value(256).slices(2).tile(64, 32).warps(4).stages(1),
        Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).layout(Packed),
        Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).layout(Packed),
        Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(1).layout(Packed),
        Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).layout(Packed),
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).layout(Paged),
        Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).layout(Paged),
        Fused::new(F16, 256)
            .features(Features::ALL)
            .tile(128, 64)
            .warps(8)
            .warpgroups(true)
            .stages(1)
            .layout(Paged),
        Fused::new(Bf16, 128).tile(16, 32).warps(1).stages(1).layout(Paged),
        Fused::new(F32, 128).features(Features::ALL).tile(64, 32).warps(4).stages(1).layout(Paged),
        Fused::new(Bf16, 576).value(256).slices(2).tile(64, 32).warps(4).stages(1).layout(Paged),
        Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1).layout(Paged),
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).batch_invariant(true),
        Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).batch_invariant(true),
        Fused::new(F16, 256)
            .features(Features::ALL)
            .tile(128, 64)
            .warps(8)
            .warpgroups(true)
            .stages(1)
            .layout(Paged)
            .batch_invariant(true),
        Fused::new(F16, 64)
            .features(Features::ALL)
            .tile(64, 32)
            .warps(4)
            .stages(1)
            .layout(Packed)
            .batch_invariant(true),
        Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).batch_invariant(true),
        Fused::new(F32, 128).tile(128, 64).warps(8).stages(1).layout(Packed).batch_invariant(true),
        Fused::new(Bf16, 576)
            .value(256)
            .slices(2)
            .tile(64, 32)
            .warps(4)
            .stages(1)
            .layout(Paged)
            .batch_invariant(true),
        Fused::new(F64, 64)
            .features(Features::ALL)
            .tile(32, 32)
            .warps(4)
            .stages(1)
            .layout(Paged)
            .batch_invariant(true),
        Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).eight_bit(Some(F8E4M3)),
        Fused::new(F16, 64)
            .tile(192, 128)
            .warps(12)
            .warpgroups(true)
            .stages(1)
            .layout(Packed)
            .eight_bit(Some(F8E5M2)),
        Fused::new(F16, 256)
            .features(Features::ALL)
            .tile(128, 64)
            .warps(8)
            .warpgroups(true)
            .stages(1)
            .layout(Paged)
            .eight_bit(Some(F8E4M3)),
        Fused::new(Bf16, 128)
            .features(Features::LOGITS)
            .tile(16, 32)
            .warps(1)
            .stages(1)
            .layout(Paged)
            .eight_bit(Some(F8E4M3)),
        Fused::new(Bf16, 128)
            .features(Features::LOGITS)
            .tile(8, 32)
            .warps(1)
            .stages(1)
            .layout(Paged)
            .eight_bit(Some(F8E4M3)),
        Fused::new(F16, 64)
            .value(192)
            .features(Features::ALL)
            .tile(8, 32)
            .warps(1)
            .stages(1)
            .layout(Packed)
            .eight_bit(Some(F8E5M2)),
        Fused::new(F16, 96).tile(16, 32).warps(1).stages(1).eight_bit(Some(F8E4M3)),
        Fused::new(F16, 96)
            .features(Features::ALL)
            .tile(64, 32)
            .warps(4)
            .stages(1)
            .layout(Paged)
            .eight_bit(Some(F8E5M2)),
        Fused::new(Bf16, 576)
            .value(256)
            .slices(2)
            .features(Features::LOGITS)
            .tile(64, 32)
            .warps(4)
            .stages(1)
            .layout(Paged)
            .eight_bit(Some(F8E4M3)),
        Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).eight_bit(Some(F8E4M3)),
        Fused::new(F32, 128)
            .features(Features::LOGITS)
            .tile(128, 64)
            .warps(8)
            .stages(1)
            .layout(Packed)
            .eight_bit(Some(F8E5M2)),
        Fused::new(F64, 32).features(Features::ALL).tile(32, 32).warps(4).stages(1).eight_bit(Some(F8E4M3)),
    ]),
};

pub(crate) const MERGE: Source = Source {
    name: "attention_merge.cu",
    text: fused!("cuda/fused/forward/combine.cu"),
    entry_points: &["attention_merge"],
    variants: &Variant::fused([
        Fused::new(Bf16, 128).warps(4),
        Fused::new(F16, 64).warps(1),
        Fused::new(F32, 64).warps(4),
        Fused::new(F64, 576).value(256).slices(2).warps(4),
        Fused::new(Bf16, 128).warps(1).layout(Packed),
        Fused::new(Bf16, 128).warps(1).layout(Paged),
        Fused::new(Bf16, 128).warps(4).batch_invariant(true),
        Fused::new(F32, 64).warps(4).tf32_split(true).batch_invariant(true),
        Fused::new(F64, 576).value(256).slices(2).warps(4).layout(Paged).batch_invariant(true),
        Fused::new(F16, 64).features(Features::LOGITS).warps(4).eight_bit(Some(F8E5M2)),
        Fused::new(Bf16, 128).features(Features::LOGITS).warps(1).layout(Paged).eight_bit(Some(F8E4M3)),
    ]),
};
