//! The numbers of a call that cuDNN reads from host memory.

use std::ffi::c_void;

use attention_core::{DropoutStream, Problem, philox4x32_10};

use crate::key::right_bound;
use crate::slot::Slot;

/// The seed of cuDNN's own generator for a place in a stream. What cuDNN makes of an offset is not documented, so streams of
/// neighbouring offsets might overlap; a seed of their own keeps them apart.
fn own_seed(stream: &DropoutStream) -> i64 {
    let (key, offset) = stream.words();
    let [low, high, ..] = philox4x32_10([offset, 0, 0, 0], key);
    (u64::from(high) << 32 | u64::from(low)).cast_signed()
}

/// The numbers of a call, where cuDNN can read them.
#[derive(Debug)]
pub(crate) struct Numbers {
    scale: f32,
    nothing: f32,
    one: f32,
    keep_scale: f32,
    keep_share: f32,
    seed: i64,
    offset: i64,
    left: f32,
    left_integer: i32,
    right: i32,
    row_shift: i32,
    query_length: i32,
    key_length: i32,
}

impl Numbers {
    pub(crate) fn of(problem: &Problem) -> Self {
        let dims = problem.dims();
        // The same for every batch row, where there are no lengths or the offset is fixed; nobody reads it elsewhere.
        let shift = if dims.batch > 0 { problem.offset(0) } else { 0 };
        let left = problem.window().left.map_or(0, |left| left as i64 + 1);
        let keep_scale = problem.dropout_stream().map_or(1.0, |stream| stream.keep_scale());
        Self {
            scale: problem.scale() as f32,
            nothing: f32::NEG_INFINITY,
            one: 1.0,
            keep_scale: keep_scale as f32,
            keep_share: (1.0 / keep_scale) as f32,
            seed: problem.dropout_stream().map_or(0, |stream| own_seed(&stream)),
            offset: 0,
            // A key that is `left` behind is still seen, and cuDNN asks for more.
            left: (left - shift) as f32,
            left_integer: left as i32,
            right: right_bound(problem).map_or(0, |right| right as i32),
            row_shift: shift as i32,
            query_length: dims.query_length as i32,
            key_length: dims.key_length as i32,
        }
    }

    pub(crate) fn address(&self, slot: Slot) -> Option<*mut c_void> {
        let float = |number: &f32| std::ptr::from_ref(number).cast_mut().cast();
        let long = |number: &i64| std::ptr::from_ref(number).cast_mut().cast();
        let integer = |number: &i32| std::ptr::from_ref(number).cast_mut().cast();
        Some(match slot {
            Slot::Scale => float(&self.scale),
            Slot::Nothing => float(&self.nothing),
            Slot::One => float(&self.one),
            Slot::KeepScale => float(&self.keep_scale),
            Slot::KeepShare => float(&self.keep_share),
            Slot::Seed => long(&self.seed),
            Slot::Offset => long(&self.offset),
            Slot::Left => float(&self.left),
            Slot::LeftInteger => integer(&self.left_integer),
            Slot::Right => integer(&self.right),
            Slot::RowShift => integer(&self.row_shift),
            Slot::QueryLength => integer(&self.query_length),
            Slot::KeyLength => integer(&self.key_length),
            _ => return None,
        })
    }
}
