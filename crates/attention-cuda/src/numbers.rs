//! Numbers of a call in host memory that kernels read from device memory: those of many batch rows, and
//! offsets by batch row. A kernel stores them in the call's scratch, so that a captured graph holds them and
//! the host keeps nothing.

use std::sync::Arc;

use attention_core::{CallProblem, Problem, Role};
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

/// Which numbers of a problem's calls are stored in scratch before kernels read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredNumbers {
    batch: usize,
    query_lengths: bool,
    key_value_lengths: bool,
    query_offsets: bool,
}

impl StoredNumbers {
    /// Lengths of more batch rows than are a part of the kernels' parameters, and offsets of more than one
    /// batch row, where they are in host memory.
    pub fn of(problem: &Problem) -> Self {
        let batch = problem.dims().batch;
        let stored =
            |role: Role, inline: usize| batch > inline && problem.has(role) && !is_on_device(problem, role);
        Self {
            batch,
            query_lengths: stored(Role::QueryLengths, INLINE_ROWS),
            key_value_lengths: stored(Role::KeyValueLengths, INLINE_ROWS),
            query_offsets: stored(Role::QueryOffsets, 1),
        }
    }

    /// The roles whose numbers are stored, in order.
    fn roles(self) -> impl Iterator<Item = Role> {
        let roles = [
            (Role::QueryLengths, self.query_lengths),
            (Role::KeyValueLengths, self.key_value_lengths),
            (Role::QueryOffsets, self.query_offsets),
        ];
        roles.into_iter().filter_map(|(role, stored)| stored.then_some(role))
    }

    /// Bytes of scratch for them, at an address that is a multiple of 8: eight for each number. `None` where
    /// they do not fit an address space.
    pub fn bytes(self) -> Option<usize> {
        self.roles().count().checked_mul(self.batch)?.checked_mul(size_of::<i64>())
    }

    /// Where each role's numbers are in scratch that begins here.
    pub(crate) fn places(self, start: u64) -> impl Iterator<Item = (Role, u64)> {
        let bytes = (self.batch * size_of::<i64>()) as u64;
        (0..).zip(self.roles()).map(move |(index, role)| (role, start + index * bytes))
    }

    /// The numbers of a call, role by role.
    fn numbers<'c>(self, problem: &'c CallProblem<'c>) -> impl Iterator<Item = i64> + 'c {
        self.roles().flat_map(move |role| {
            (0..self.batch).map(move |batch| match role {
                // Lengths are at most those of tensors, so they fit.
                Role::QueryLengths => problem.query_len(batch) as i64,
                Role::KeyValueLengths => problem.key_value_len(batch) as i64,
                _ => problem.offset(batch),
            })
        })
    }

    /// The arguments of the launches that store the numbers of a call.
    fn launches(self, problem: &CallProblem<'_>, start: u64) -> Vec<StoreNumbers> {
        // Kernels read numbers only where batch rows differ.
        if self.roles().next().is_none() || uniform_sequence(problem).is_some() {
            return Vec::new();
        }
        let mut launches: Vec<StoreNumbers> = Vec::new();
        for (index, number) in self.numbers(problem).enumerate() {
            let (launch, place) = (index / MOST_NUMBERS, index % MOST_NUMBERS);
            if place == 0 {
                let to = start + (launch * MOST_NUMBERS * size_of::<i64>()) as u64;
                launches.push(StoreNumbers { to, count: 0, numbers: [0; MOST_NUMBERS] });
            }
            launches[launch].numbers[place] = number;
            launches[launch].count += 1;
        }
        launches
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
        let load = |_| {
            let source = attention_kernels::source(SOURCE)
                .unwrap_or_else(|| unreachable!("{SOURCE} is in the package"));
            kernels.function(device.context(), source, Variant::Helper(Helper::LAUNCHED), ENTRY_POINT)
        };
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
