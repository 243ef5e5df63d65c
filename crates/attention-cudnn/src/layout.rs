//! The layout of a call's scratch: where each slot begins, and how many bytes all of them take.

use attention_core::{DType, Pass, Problem, Role, TensorDesc};
use attention_cuda::StoredNumbers;

use crate::CudnnConfig;
use crate::far;
use crate::graph::Type;
use crate::key::{CLEANED, Key, Stats};
use crate::large;
use crate::places;
use crate::slot::{Side, Slot};

/// The slots in the scratch. Each begins at a multiple of 256 bytes, as allocations of the driver do.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    places: Vec<(Slot, usize)>,
    pub(crate) bytes: usize,
}

/// Whether cuDNN and the kernels can read a vector of numbers without a copy: f32 without gaps.
pub(crate) fn is_plain(desc: &TensorDesc) -> bool {
    desc.dtype() == DType::F32 && desc.is_contiguous()
}

impl Layout {
    /// The layout of a problem's scratch; `None` if its size overflows.
    pub(crate) fn of(problem: &Problem, key: &Key, config: &CudnnConfig) -> Option<Self> {
        let dims = problem.dims();
        let mut layout = Self::default();
        let size = problem.dtype().size();
        let rows = [places::query_rows(problem)?, dims.query_heads];
        let row_count = rows[0].checked_mul(rows[1])?;
        if key.stats == Stats::Packed {
            layout.take(Slot::Stats, &rows, 4)?;
        }
        if key.pass == Pass::Backward {
            layout.take(Slot::Delta, &rows, 4)?;
            layout.take(Slot::DQuerySum, &[row_count, dims.head_dim], 4)?;
            // The graph writes all three gradients, so those that the call does not ask for go to scratch.
            let keys = places::key_rows(problem)?.checked_mul(dims.key_heads)?;
            for (slot, role, shape) in [
                (Slot::DQuery, Role::DQuery, [row_count, dims.head_dim]),
                (Slot::DKey, Role::DKey, [keys, dims.head_dim]),
                (Slot::DValue, Role::DValue, [keys, dims.value_head_dim]),
            ] {
                if !problem.has(role) {
                    layout.take(slot, &shape, size)?;
                }
            }
        }
        for role in CLEANED {
            if let (Some(desc), Some(slot)) = (problem.tensor(role), Slot::of(role))
                && key.cleans(role)
            {
                layout.take(slot, &desc.shape(), size)?;
            }
        }
        if let Some(bias) = key.bias.filter(|bias| bias.made) {
            let width = if bias.element == Type::Float { 4 } else { size };
            let [batch, _, positions, _] = bias.shape.map(|axis| axis as usize);
            let heads = bias.shape[1] as usize;
            layout.take(Slot::Bias, &[batch, heads, positions, bias.strides[2] as usize], width)?;
            layout.take(Slot::SeenRows, &bias.seen_rows(dims), 1)?;
            layout.take(Slot::SeenKeys, &bias.seen_keys(dims), 1)?;
        }
        for (slot, role) in [(Slot::Slopes, Role::AlibiSlopes), (Slot::Sinks, Role::Sinks)] {
            if let Some(desc) = problem.tensor(role).filter(|desc| !is_plain(desc)) {
                layout.take(slot, &desc.shape(), 4)?;
            }
        }
        if far::is_needed(problem, key, config) {
            layout.take(Slot::States, &[large::numbers(problem)?], 4)?;
        }
        let stored = StoredNumbers::of(problem).bytes()?;
        if stored > 0 {
            layout.take(Slot::StoredNumbers, &[stored], 1)?;
        }
        let pages = key.places.pages.map_or(0, |pages| pages.most as usize);
        // A kernel writes zeros to the gradients of packed keys that no row sees.
        let clears_keys = key.places.packed_keys && key.pass == Pass::Backward;
        for (slot, numbers, wanted) in [
            (Slot::QueryLengths, 1, key.lengths),
            (Slot::KeyLengths, 1, key.lengths),
            (Slot::RowIntervals, 2, key.lengths && key.stats == Stats::Packed),
            (Slot::KeyIntervals, 2, key.lengths && (key.clean_keys || clears_keys)),
            (Slot::QueryOffsets, 1, key.lengths && key.makes_bias()),
            (Slot::BlockTable, pages, pages > 0),
        ] {
            if wanted {
                layout.take(slot, &[dims.batch, numbers], 4)?;
            }
        }
        let starts = dims.batch.checked_add(1)?;
        for (side, slot) in [(Side::Queries, Slot::QueryStarts), (Side::Keys, Slot::KeyStarts)] {
            if key.places.packs(side) {
                layout.take(slot, &[starts], 4)?;
            }
            for row in key.ragged_rows(side) {
                layout.take(Slot::RaggedOffsets { side, row }, &[starts], 8)?;
            }
        }
        if key.writes_kept() {
            layout.take(Slot::Kept, &[row_count, dims.key_length.checked_next_multiple_of(8)?], size)?;
        }
        Some(layout)
    }

    /// Appends a slot of this shape whose elements have `size` bytes.
    fn take(&mut self, slot: Slot, shape: &[usize], size: usize) -> Option<()> {
        let bytes = shape.iter().try_fold(size, |bytes, &axis| bytes.checked_mul(axis))?;
        let start = self.bytes.checked_next_multiple_of(256)?;
        self.bytes = start.checked_add(bytes)?;
        self.places.push((slot, start));
        Some(())
    }

    /// The offset of a slot in bytes, if it is in the scratch.
    pub(crate) fn at(&self, slot: Slot) -> Option<u64> {
        self.places.iter().find(|(place, _)| *place == slot).map(|&(_, start)| start as u64)
    }
}
