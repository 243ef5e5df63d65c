//! Kernels for numbers and rows that either backend launches before or after its own.

use crate::DTypeCode::F16;
use crate::Layout::Packed;
use crate::fused::fused;
use crate::{Fused, Helper, Source, Variant};

pub(crate) const NUMBERS: Source = Source {
    name: "attention_numbers.cu",
    text: concat!(include_str!("cuda/common/store_numbers.cu")),
    entry_points: &["attention_store_numbers"],
    variants: &[Variant::Helper(Helper::LAUNCHED)],
};

pub(crate) const COPY_ROWS: Source = Source {
    name: "attention_copy_rows.cu",
    text: concat!(include_str!("cuda/common/copy_rows.cu")),
    entry_points: &["attention_copy_rows"],
    variants: &[Variant::Helper(Helper::LAUNCHED)],
};

pub(crate) const WRITE_NUMBERS: Source = Source {
    name: "attention_write_numbers.cu",
    text: concat!(include_str!("cuda/common/write_numbers.cu")),
    entry_points: &["attention_write_numbers"],
    variants: &[Variant::Helper(Helper::LAUNCHED)],
};

pub(crate) const SCHEDULE: Source = Source {
    name: "attention_schedule.cu",
    text: fused!("cuda/fused/schedule.cu"),
    entry_points: &["attention_schedule_query_tiles", "attention_schedule_key_tiles"],
    variants: &Variant::fused([
        Fused::new(F16, 32).tile(128, 0).warps(8).layout(Packed),
        Fused::new(F16, 32).tile(16, 0).warps(8).layout(Packed),
    ]),
};
