//! The rows of the sequences of a call, in the layout that kernels have them in.

use attention_core::{CallProblem, Device, Problem, Role};
use cudarc::driver::DeviceRepr;

/// Positions are this far from anything at most: with the lengths added, no sum overflows.
pub(crate) const FAR: i128 = 1 << 40;

/// The most batch rows whose lengths are a part of the parameters: 512 bytes of the 4 KB that the arguments
/// of a kernel may have.
pub(crate) const INLINE_ROWS: usize = 64;

/// Whether calls of the problem have the numbers of this role in device memory.
pub(crate) fn is_on_device(problem: &Problem, role: Role) -> bool {
    problem.has(role) && problem.device_of(role) != Device::Cpu
}

/// Where the rows of one sequence are, and which keys a row sees.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceRows {
    /// Query row `t` stands at `t + offset`.
    pub(crate) offset: i64,
    /// Row `t` sees the keys from `t + low` to before `t + high` that exist.
    pub(crate) low: i64,
    pub(crate) high: i64,
    /// The numbers of query rows and of keys that exist.
    pub(crate) queries: i32,
    pub(crate) keys: i32,
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernels; the
// size is asserted on both sides.
unsafe impl DeviceRepr for SequenceRows {}

const _: () = assert!(size_of::<SequenceRows>() == 32);

impl SequenceRows {
    pub(crate) fn of(rows: &attention_core::SequenceRows) -> Self {
        let far = |position: i128| position.clamp(-FAR, FAR) as i64;
        let (low, high) = rows.reach();
        Self {
            offset: rows.offset().clamp(-(1 << 60), 1 << 60),
            low: far(low.unwrap_or(-FAR)),
            high: far(high.unwrap_or(FAR)),
            // Kernels are launched for lengths of 31 bits alone.
            queries: rows.queries() as i32,
            keys: rows.keys() as i32,
        }
    }

    /// The keys that row `t` sees, as kernels compute them.
    pub fn keys_of(&self, t: usize) -> std::ops::Range<usize> {
        if t as i64 >= i64::from(self.queries) {
            return 0..0;
        }
        let clamped = |shift: i64| (t as i64 + shift).clamp(0, i64::from(self.keys)) as usize;
        clamped(self.low)..clamped(self.high)
    }
}

/// The rows of each batch row's sequence, or one element where all sequences are alike. Lengths and offsets
/// in device memory are not known here: sequences are full, and offsets 0.
pub fn sequences(problem: &CallProblem<'_>) -> Vec<SequenceRows> {
    let mut rows: Vec<SequenceRows> =
        (0..problem.dims().batch).map(|batch| SequenceRows::of(&problem.sequence(batch))).collect();
    if rows.windows(2).all(|two| two[0] == two[1]) {
        rows.truncate(1);
    }
    rows
}

/// The rows of every batch row's sequence, where the host knows that all are alike, and rows are dense.
pub(crate) fn uniform_sequence(problem: &CallProblem<'_>) -> Option<SequenceRows> {
    if Role::SEQUENCES.into_iter().any(|role| problem.has(role)) {
        return None;
    }
    let by_row = [Role::QueryLengths, Role::KeyValueLengths, Role::QueryOffsets];
    let batch = problem.dims().batch;
    if batch == 0 {
        return Some(SequenceRows::default());
    }
    if by_row.into_iter().any(|role| is_on_device(problem, role)) {
        return None;
    }
    let first = problem.sequence(0);
    let alike = by_row.into_iter().all(|role| !problem.has(role))
        || (1..batch).all(|batch| problem.sequence(batch) == first);
    alike.then(|| SequenceRows::of(&first))
}
