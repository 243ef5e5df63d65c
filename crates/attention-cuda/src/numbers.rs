//! Numbers of a call in host memory that kernels read from device memory: those of many batch rows, offsets
//! by batch row, starts of sequences, block tables, and scales of more than one head. A kernel stores them in
//! the call's scratch, so that a captured graph holds them and the host keeps nothing.

use std::sync::Arc;

use attention_core::{CallProblem, Problem, Role, RowLayout, RowPlaces};
use attention_kernels::{Helper, Variant};
use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig};

use crate::error::KernelError;
use crate::launch::launch;
use crate::sequences::{INLINE_ROWS, is_on_device, uniform_sequence};
use crate::{CudaDevice, KernelCache};

/// The kernel's source and entry point.
const SOURCE: &str = "attention_numbers.cu";
const ENTRY_POINT: &str = "attention_store_numbers";

/// Numbers per launch, as many as the kernel's argument has room for.
const MOST_NUMBERS: usize = 256;

/// The argument of `attention_store_numbers`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct StoreNumbers {
    to: u64,
    count: i64,
    numbers: [i64; MOST_NUMBERS],
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernel; the
// size is asserted on both sides.
unsafe impl DeviceRepr for StoreNumbers {}

const _: () = assert!(size_of::<StoreNumbers>() == 2064);

/// The roles whose numbers may be stored, in the order in which they are: scales first, which calls have
/// whatever their sequences are.
const STORED: [Role; 8] = [
    Role::KeyScales,
    Role::ValueScales,
    Role::QueryLengths,
    Role::KeyValueLengths,
    Role::QueryOffsets,
    Role::QueryStarts,
    Role::KeyValueStarts,
    Role::BlockTable,
];

/// Which numbers of a problem's calls are stored in scratch before kernels read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredNumbers {
    /// How many of each role of [`STORED`].
    counts: [usize; STORED.len()],
}

impl StoredNumbers {
    /// Lengths of more batch rows than are a part of the kernels' parameters, offsets of more than one batch
    /// row, starts, block tables and scales of heads, where they are in host memory.
    pub fn of(problem: &Problem) -> Self {
        let batch = problem.dims().batch;
        let counts = STORED.map(|role| {
            let Some(desc) = problem.tensor(role).filter(|_| !is_on_device(problem, role)) else { return 0 };
            let inline = match role {
                Role::QueryLengths | Role::KeyValueLengths => INLINE_ROWS,
                Role::QueryOffsets => 1,
                _ => 0,
            };
            let count = || desc.shape().iter().fold(1, |count: usize, &size| count.saturating_mul(size));
            let is_one = Role::SCALES.contains(&role) && desc.shape()[..] == [1];
            if !is_one && (inline == 0 || batch > inline) { count() } else { 0 }
        });
        Self { counts }
    }

    /// The roles whose numbers are stored, in order, with how many there are.
    fn roles(self) -> impl Iterator<Item = (Role, usize)> {
        STORED.into_iter().zip(self.counts).filter(|&(_, count)| count > 0)
    }

    /// Bytes of scratch for them, at an address that is a multiple of 8: eight for each number. `None` where
    /// they do not fit an address space.
    pub fn bytes(self) -> Option<usize> {
        let count = self.roles().try_fold(0usize, |sum, (_, count)| sum.checked_add(count))?;
        count.checked_mul(size_of::<i64>())
    }

    /// Where each role's numbers are in scratch that begins here.
    pub(crate) fn places(self, start: u64) -> impl Iterator<Item = (Role, u64)> {
        self.roles().scan(start, |next, (role, count)| {
            let place = *next;
            *next += (count * size_of::<i64>()) as u64;
            Some((role, place))
        })
    }

    /// Calls `visit` with the numbers of a call, role by role; with scales alone where those of the sequences
    /// are not read.
    fn for_each(self, problem: &CallProblem<'_>, of_sequences: bool, mut visit: impl FnMut(i64)) {
        let (batch, heads) = (problem.dims().batch, problem.dims().key_heads);
        for (role, count) in self.roles().filter(|(role, _)| of_sequences || Role::SCALES.contains(role)) {
            match role {
                Role::KeyScales => {
                    scales(count, heads, |batch, head| problem.key_scale(batch, head), &mut visit)
                }
                Role::ValueScales => {
                    scales(count, heads, |batch, head| problem.value_scale(batch, head), &mut visit);
                }
                // Lengths and rows are at most those of tensors, so they fit.
                Role::QueryLengths => (0..batch).for_each(|batch| visit(problem.query_len(batch) as i64)),
                Role::KeyValueLengths => {
                    (0..batch).for_each(|batch| visit(problem.key_value_len(batch) as i64));
                }
                Role::QueryStarts => starts(batch, |batch| problem.query_places(batch), &mut visit),
                Role::KeyValueStarts => starts(batch, |batch| problem.key_places(batch), &mut visit),
                Role::BlockTable => pages(problem, count, &mut visit),
                _ => (0..batch).for_each(|batch| visit(problem.offset(batch))),
            }
        }
    }

    /// The arguments of the launches that store the numbers of a call.
    fn launches(self, problem: &CallProblem<'_>, start: u64) -> Vec<StoreNumbers> {
        if self.roles().next().is_none() {
            return Vec::new();
        }
        // Kernels read those of sequences only where batch rows differ.
        let of_sequences = uniform_sequence(problem).is_none();
        let mut launches: Vec<StoreNumbers> = Vec::new();
        let mut index = 0;
        self.for_each(problem, of_sequences, |number| {
            let (launch, place) = (index / MOST_NUMBERS, index % MOST_NUMBERS);
            if place == 0 {
                let to = start + (index * size_of::<i64>()) as u64;
                launches.push(StoreNumbers { to, count: 0, numbers: [0; MOST_NUMBERS] });
            }
            launches[launch].numbers[place] = number;
            launches[launch].count += 1;
            index += 1;
        });
        launches
    }
}

/// Scales of heads, `count` in all, each as the lower four of eight bytes.
fn scales(count: usize, heads: usize, at: impl Fn(usize, usize) -> f32, visit: &mut impl FnMut(i64)) {
    for index in 0..count {
        visit(at(index / heads, index % heads).to_bits().into());
    }
}

/// Where each sequence starts, which was checked to be where the one before it ends, and where the last one
/// ends.
fn starts<'c>(batch: usize, places: impl Fn(usize) -> RowPlaces<'c>, visit: &mut impl FnMut(i64)) {
    let mut start = 0;
    for batch in 0..batch {
        visit(start);
        start += places(batch).rows() as i64;
    }
    visit(start);
}

/// The entries of a block table, `count` in all; 0 for those that no key needs.
fn pages(problem: &CallProblem<'_>, count: usize, visit: &mut impl FnMut(i64)) {
    let RowLayout::Paged { page_size } = problem.key_layout() else { return };
    let batch = problem.dims().batch;
    let most = count.checked_div(batch).unwrap_or(0);
    for batch in 0..batch {
        let places = problem.key_places(batch);
        for index in 0..most {
            let key = index * page_size;
            visit(if key < places.rows() { places.of(key)[0] as i64 } else { 0 });
        }
    }
}

/// Stores the numbers of a problem's calls in their scratch.
#[derive(Clone, Debug)]
pub struct NumberStore {
    stored: StoredNumbers,
    /// Where calls have such numbers.
    function: Option<CudaFunction>,
}

impl NumberStore {
    /// For calls of a problem. Compiles the kernel where it is needed and not compiled yet.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(problem: &Problem, device: &CudaDevice, kernels: &KernelCache) -> Result<Self, KernelError> {
        let stored = StoredNumbers::of(problem);
        let load =
            |_| kernels.named(device.context(), SOURCE, Variant::Helper(Helper::LAUNCHED), ENTRY_POINT);
        let function = stored.roles().next().map(load).transpose()?;
        Ok(Self { stored, function })
    }

    /// Puts the launches that store a call's numbers on the stream, in front of the kernels that read them.
    ///
    /// # Safety
    /// `problem` is a call of the problem that this was made for. `start` is a multiple of 8 and the address
    /// of [`StoredNumbers::bytes`] bytes on the stream's device, which are valid until the work is done and
    /// which nothing else uses, but for work on the same stream.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn store(
        &self,
        stream: &Arc<CudaStream>,
        problem: &CallProblem<'_>,
        start: u64,
    ) -> Result<(), DriverError> {
        let Some(function) = &self.function else { return Ok(()) };
        for numbers in self.stored.launches(problem, start) {
            let config = LaunchConfig {
                grid_dim: (1, 1, 1),
                block_dim: (Helper::LAUNCHED.threads, 1, 1),
                shared_mem_bytes: 0,
            };
            // SAFETY: the kernel takes this one struct, and writes `count` numbers from `to` on. All launches
            // of a call together write the numbers that `StoredNumbers::bytes` counts, from `start` on, where
            // the caller guarantees as many bytes.
            unsafe { launch(stream, function, &numbers, config) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
