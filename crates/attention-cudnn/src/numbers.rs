//! The numbers of a call that cuDNN reads from host memory.

use std::ffi::c_void;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, Ordering};

use attention_core::{CallProblem, DropoutStream, philox4x32_10};

use crate::key::right_bound;
use crate::slot::Slot;

/// The seed of cuDNN's own generator for a seed and an offset of the library's. cuDNN does not document what
/// its own offset does, so streams of neighbouring offsets might overlap; here each offset has its own seed.
fn own_seed(stream: &DropoutStream) -> i64 {
    let (key, offset) = stream.words();
    let [low, high, ..] = philox4x32_10([offset, 0, 0, 0], key);
    (u64::from(high) << 32 | u64::from(low)).cast_signed()
}

/// An atomic f32, stored as its bits.
#[derive(Debug, Default)]
struct Float(AtomicU32);

impl Float {
    fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// The numbers of a call, which cuDNN reads while the call is enqueued. Variant packs point here, and each
/// call that uses one sets the numbers first. They are atomic because they are written through a shared
/// reference while the pack points to them.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    scale: Float,
    minus_infinity: Float,
    one: Float,
    keep_scale: Float,
    keep_share: Float,
    seed: AtomicI64,
    offset: AtomicI64,
    left: Float,
    left_integer: AtomicI32,
    right: AtomicI32,
    row_shift: AtomicI32,
    query_length: AtomicI32,
    key_length: AtomicI32,
}

impl Numbers {
    /// Sets the numbers of a call.
    pub(crate) fn set(&self, call: &CallProblem<'_>) {
        let dims = call.dims();
        // The shift of the diagonal: the graph reads it only if there are no lengths or the offset is fixed,
        // and then it is the same for every batch row.
        let shift = if dims.batch > 0 { call.offset(0) } else { 0 };
        let left = call.window().left.map_or(0, |left| left as i64 + 1);
        let keep_scale = call.dropout_stream().map_or(1.0, |stream| stream.keep_scale());
        let integer = |to: &AtomicI32, value: i32| to.store(value, Ordering::Relaxed);
        self.scale.set(call.scale() as f32);
        self.minus_infinity.set(f32::NEG_INFINITY);
        self.one.set(1.0);
        self.keep_scale.set(keep_scale as f32);
        self.keep_share.set((1.0 / keep_scale) as f32);
        self.seed.store(call.dropout_stream().map_or(0, |stream| own_seed(&stream)), Ordering::Relaxed);
        self.offset.store(0, Ordering::Relaxed);
        // A row sees the key that is `left` positions before it. The graph compares with "greater", so `left`
        // here is one more than the window's bound.
        self.left.set((left - shift) as f32);
        integer(&self.left_integer, left as i32);
        integer(&self.right, right_bound(call).map_or(0, |right| right as i32));
        integer(&self.row_shift, shift as i32);
        integer(&self.query_length, dims.query_length as i32);
        integer(&self.key_length, dims.key_length as i32);
    }

    /// The address of a slot's number; `None` for slots of device memory.
    pub(crate) fn address(&self, slot: Slot) -> Option<*mut c_void> {
        let float = |number: &Float| number.0.as_ptr().cast();
        Some(match slot {
            Slot::Scale => float(&self.scale),
            Slot::MinusInfinity => float(&self.minus_infinity),
            Slot::One => float(&self.one),
            Slot::KeepScale => float(&self.keep_scale),
            Slot::KeepShare => float(&self.keep_share),
            Slot::Seed => self.seed.as_ptr().cast(),
            Slot::Offset => self.offset.as_ptr().cast(),
            Slot::Left => float(&self.left),
            Slot::LeftInteger => self.left_integer.as_ptr().cast(),
            Slot::Right => self.right.as_ptr().cast(),
            Slot::RowShift => self.row_shift.as_ptr().cast(),
            Slot::QueryLength => self.query_length.as_ptr().cast(),
            Slot::KeyLength => self.key_length.as_ptr().cast(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{Alignment, CallData, DType, OffsetRange, Problem, QueryOffset, TensorDesc, Window};

    use super::*;

    fn float(numbers: &Numbers, slot: Slot) -> f32 {
        let address = numbers.address(slot).expect("a number").cast::<f32>();
        // SAFETY: the address is that of a 32-bit number of `numbers`, which is borrowed here; this thread
        // alone writes it, and not during the read.
        unsafe { address.read() }
    }

    /// Two calls of one problem, whose numbers are at the same addresses.
    #[test]
    fn the_numbers_are_those_of_the_last_call_that_set_them() {
        let desc = TensorDesc::contiguous(DType::Bf16, [2, 16, 2, 8]);
        let problem = Problem::builder(desc, desc, desc)
            .causal(true)
            .window(Window { left: Some(3), right: None })
            .alignment(Alignment::Offset(OffsetRange::Near))
            .build()
            .expect("valid");
        let numbers = Numbers::default();
        let slots = [Slot::Scale, Slot::Left, Slot::RowShift];
        let before = slots.map(|slot| numbers.address(slot));
        for (scale, offset) in [(0.25, 7), (3.0, -2)] {
            let query_offset = QueryOffset::Fixed(offset);
            let data = CallData { scale: Some(scale), query_offset, ..CallData::default() };
            numbers.set(&CallProblem::new(&problem, &data).expect("valid"));
            assert_eq!(float(&numbers, Slot::Scale), scale as f32);
            assert_eq!(float(&numbers, Slot::Left), (4 - offset) as f32);
            assert_eq!(numbers.row_shift.load(Ordering::Relaxed), offset as i32);
            assert_eq!(slots.map(|slot| numbers.address(slot)), before);
        }
        assert_eq!(numbers.address(Slot::Query), None);
    }
}
