//! Copies of rows of tensors in device memory: what a cache of keys and values appends, by one kernel for
//! both.

use attention_core::{Device, Role, TensorDesc, Unsupported, View};
use attention_kernels::{Helper, Variant};
use cudarc::driver::{CudaFunction, DeviceRepr, DriverError, LaunchConfig};

use crate::error::KernelError;
use crate::launch::launch;
use crate::owned::check_streams;
use crate::{CudaDevice, DeviceTensor, KernelCache};

/// The kernel's source and entry point.
const SOURCE: &str = "attention_copy_rows.cu";
const ENTRY_POINT: &str = "attention_copy_rows";

/// Runs per launch, as many as the kernel's argument has room for.
const MOST_RUNS: usize = 150;

/// Bytes that a thread copies, about, before more blocks share a run; and the most blocks that do.
const BYTES_OF_THREAD: usize = 64;
const MOST_PARTS: usize = 64;

/// Neighbouring rows that are copied to neighbouring rows, counted over the first two axes of either tensor:
/// row `i` of `[outer, inner, ..]` is `[i / inner, i % inner]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRun {
    /// The first row that is copied.
    pub from: usize,
    /// The row that it is copied to.
    pub to: usize,
    /// How many rows follow each other; may be 0.
    pub count: usize,
}

/// Why rows were not copied. Nothing was, unless the driver refused a launch behind others.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowCopyError {
    /// The tensors of a pair do not go together: other than four axes, another dtype, heads or width, or a
    /// target that has gaps.
    #[error(
        "rows of {from} cannot be copied to {to}: both need four axes, one dtype, the same rows, and the target \
         no gaps"
    )]
    Tensors {
        /// What would be copied from.
        from: String,
        /// What would be copied to.
        to: String,
    },
    /// The two sources have other rows: they share dtype, heads and the second axis, and may differ in
    /// widths.
    #[error(
        "rows of {one} and of {other} cannot be copied together: they need one dtype, as many heads, and a \
         second axis alike"
    )]
    Pairs {
        /// The first source.
        one: String,
        /// The second one.
        other: String,
    },
    /// A run of rows is not inside a tensor.
    #[error("rows {first} to before {first} + {count} are not among the {rows} of the {which}")]
    Range {
        /// Which tensor: source or target.
        which: &'static str,
        /// The first row.
        first: usize,
        /// How many.
        count: usize,
        /// Those that there are.
        rows: usize,
    },
    /// A tensor is on another device.
    #[error("a tensor is on {device}, expected {expected}")]
    Device {
        /// Where it is.
        device: Device,
        /// Where the copies are made.
        expected: Device,
    },
    /// A tensor belongs to another stream.
    #[error(transparent)]
    Stream(#[from] Unsupported),
    /// The driver failed.
    #[error("copying rows: {0}")]
    Driver(#[from] DriverError),
}

/// As in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CopiedTensor {
    from: u64,
    to: u64,
    from_stride: [i64; 4],
    width: i64,
}

/// `RowRun` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Run {
    from: i64,
    to: i64,
    count: i64,
}

/// The argument of `attention_copy_rows`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CopyRows {
    tensors: [CopiedTensor; 2],
    heads: i64,
    inner: i64,
    element_size: i32,
    count: i32,
    runs: [Run; MOST_RUNS],
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernel; the
// size is asserted on both sides.
unsafe impl DeviceRepr for CopyRows {}

const _: () = assert!(size_of::<CopyRows>() == 3736);

/// Copies rows of two tensors at a time on a device and its stream.
#[derive(Clone, Debug)]
pub struct RowCopier {
    device: CudaDevice,
    function: CudaFunction,
}

/// A tensor that is copied from.
struct Source {
    address: u64,
    desc: TensorDesc,
}

impl RowCopier {
    /// Compiles the kernel, or takes it from the cache.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(device: &CudaDevice, kernels: &KernelCache) -> Result<Self, KernelError> {
        let variant = Variant::Helper(Helper::LAUNCHED);
        let function = kernels.named(device.context(), SOURCE, variant, ENTRY_POINT)?;
        Ok(Self { device: device.clone(), function })
    }

    /// The device, with the stream that copies are put on.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Copies these rows of two tensors `[.., n, K, width]` of any strides, keys and values, to two others,
    /// row-major with the same last two axes, in the order of the device's stream. Where runs write a row
    /// twice, it has one of the two.
    ///
    /// # Errors
    /// [`RowCopyError`]: everything is checked before anything is copied.
    pub fn copy(
        &self,
        from: [View<'_>; 2],
        to: [&mut DeviceTensor; 2],
        runs: &[RowRun],
    ) -> Result<(), RowCopyError> {
        for view in &from {
            self.check_device(view.device())?;
        }
        let from = from.map(|view| Source { address: view.as_ptr() as u64, desc: view.desc() });
        self.put(from, to, runs)
    }

    /// Copies these rows of two tensors to other rows of the same ones. A row that one run reads and another
    /// one writes is copied as it is at some time in between.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub fn copy_within(&self, tensors: [&mut DeviceTensor; 2], runs: &[RowRun]) -> Result<(), RowCopyError> {
        let from = tensors.each_ref().map(|tensor| Source { address: tensor.address(), desc: tensor.desc() });
        self.put(from, tensors, runs)
    }

    fn check_device(&self, device: Device) -> Result<(), RowCopyError> {
        let expected = self.device.device();
        if device == expected { Ok(()) } else { Err(RowCopyError::Device { device, expected }) }
    }

    fn put(
        &self,
        from: [Source; 2],
        to: [&mut DeviceTensor; 2],
        runs: &[RowRun],
    ) -> Result<(), RowCopyError> {
        check_pairs([&from[0].desc, &from[1].desc])?;
        for (from, to) in from.iter().zip(&to) {
            check_pair(&from.desc, &to.desc())?;
            check_runs(&from.desc, &to.desc(), runs)?;
            self.check_device(to.device().device())?;
        }
        let stream = self.device.stream();
        for ((role, from), to) in [Role::Key, Role::Value].into_iter().zip(&from).zip(&to) {
            let tensors = [from.address, to.address()].into_iter().map(|address| (role, address));
            check_streams("a copy of rows", stream, to.address(), tensors)?;
        }
        let launches = launches(&from, &to.each_ref().map(|to| (to.address(), to.desc())), runs);
        for (arguments, config) in &launches {
            // SAFETY: the kernel takes this one struct. It reads and writes the rows of its runs, of which
            // `check_runs` has seen that both tensors have them. Heads, elements and the second axis of
            // sources are those of both pairs, as `check_pairs` has seen, and rows of a source are those of
            // its target, as `check_pair` has: the strides are those of the source, and the target has no
            // gaps. Targets are borrowed mutably and belong to this stream, on which their memory is written
            // and freed, as sources of this crate do, which `check_streams` has seen; who makes views of
            // other memory promises that it stays as it is until the work on it is done.
            unsafe { launch(stream, &self.function, arguments, *config) }?;
        }
        Ok(())
    }
}

/// Rows over the first two axes, saturating.
fn rows(desc: &TensorDesc) -> usize {
    desc.shape()[..2].iter().fold(1, |rows: usize, &axis| rows.saturating_mul(axis))
}

fn check_pair(from: &TensorDesc, to: &TensorDesc) -> Result<(), RowCopyError> {
    let fits = from.shape().len() == 4
        && to.shape().len() == 4
        && from.shape()[2..] == to.shape()[2..]
        && from.dtype() == to.dtype()
        && to.is_contiguous();
    if fits { Ok(()) } else { Err(RowCopyError::Tensors { from: from.to_string(), to: to.to_string() }) }
}

/// The kernel takes the second axis, heads and elements of both sources from one of them.
fn check_pairs([one, other]: [&TensorDesc; 2]) -> Result<(), RowCopyError> {
    let (of_one, of_other) = (one.shape(), other.shape());
    let alike = of_one.len() == 4
        && of_other.len() == 4
        && of_one[1..3] == of_other[1..3]
        && one.dtype() == other.dtype();
    if alike {
        return Ok(());
    }
    Err(RowCopyError::Pairs { one: one.to_string(), other: other.to_string() })
}

fn check_runs(from: &TensorDesc, to: &TensorDesc, runs: &[RowRun]) -> Result<(), RowCopyError> {
    let inside = |which, first: usize, count: usize, rows| match first.checked_add(count) {
        Some(end) if end <= rows => Ok(()),
        _ => Err(RowCopyError::Range { which, first, count, rows }),
    };
    let (of_source, of_target) = (rows(from), rows(to));
    runs.iter().try_for_each(|run| inside("source", run.from, run.count, of_source))?;
    runs.iter().try_for_each(|run| inside("target", run.to, run.count, of_target))
}

/// What is launched for these runs, whose tensors and rows were checked.
fn launches(
    from: &[Source; 2],
    to: &[(u64, TensorDesc); 2],
    runs: &[RowRun],
) -> Vec<(CopyRows, LaunchConfig)> {
    let size = from[0].desc.dtype().size();
    let shape = from[0].desc.shape();
    let tensors = [0, 1].map(|index| {
        let Source { address, desc } = &from[index];
        let mut from_stride = [0; 4];
        // Strides and sizes of tensors that exist fit 64 bits.
        from_stride.iter_mut().zip(desc.strides().iter()).for_each(|(to, &stride)| *to = stride as i64);
        CopiedTensor { from: *address, to: to[index].0, from_stride, width: desc.shape()[3] as i64 }
    });
    let widest = from.iter().map(|source| source.desc.shape()[3]).max().unwrap_or(0);
    let row_bytes = shape[2].saturating_mul(widest).saturating_mul(size);
    let runs: Vec<&RowRun> = runs.iter().filter(|run| run.count > 0 && row_bytes > 0).collect();
    let threads = Helper::LAUNCHED.threads;
    let launch = |runs: &[&RowRun]| {
        let longest = runs.iter().map(|run| run.count).max().unwrap_or(0);
        let of_block = threads as usize * BYTES_OF_THREAD;
        let parts = longest.saturating_mul(row_bytes).div_ceil(of_block).clamp(1, MOST_PARTS);
        let mut arguments = CopyRows {
            tensors,
            heads: shape[2] as i64,
            inner: shape[1] as i64,
            element_size: size as i32,
            count: runs.len() as i32,
            runs: [Run { from: 0, to: 0, count: 0 }; MOST_RUNS],
        };
        for (to, run) in arguments.runs.iter_mut().zip(runs) {
            *to = Run { from: run.from as i64, to: run.to as i64, count: run.count as i64 };
        }
        let grid_dim = (runs.len() as u32, parts as u32, tensors.len() as u32);
        (arguments, LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: 0 })
    };
    runs.chunks(MOST_RUNS).map(launch).collect()
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, TensorDesc};

    use super::*;
    use crate::layout::assert_laid_out;

    #[test]
    fn the_argument_is_laid_out_as_in_the_kernel() {
        let text = attention_kernels::source(SOURCE).expect("in the package").text;
        assert_laid_out!(text, CopyRows: tensors, heads, inner, element_size, count, runs);
    }

    fn desc(shape: [usize; 4]) -> TensorDesc {
        TensorDesc::contiguous(DType::Bf16, shape)
    }

    fn run(from: usize, to: usize, count: usize) -> RowRun {
        RowRun { from, to, count }
    }

    #[test]
    fn tensors_of_other_rows_are_refused() {
        let to = desc([4, 16, 2, 8]);
        assert!(check_pair(&desc([1, 3, 2, 8]), &to).is_ok());
        for from in [
            desc([1, 3, 2, 7]),
            desc([1, 3, 1, 8]),
            TensorDesc::contiguous(DType::F16, [1, 3, 2, 8]),
            TensorDesc::contiguous(DType::Bf16, [3, 2, 8]),
        ] {
            let error = check_pair(&from, &to).expect_err("another row");
            assert!(error.to_string().contains(&from.to_string()), "{error}");
        }
        let gaps = TensorDesc::strided(DType::Bf16, [4, 16, 2, 8], [512, 32, 16, 1]).expect("a tensor");
        assert!(check_pair(&desc([1, 3, 2, 8]), &gaps).is_err());
        // A source may have any strides.
        assert!(check_pair(&gaps, &to).is_ok());
    }

    #[test]
    fn keys_and_values_of_other_heads_are_refused() {
        let keys = desc([1, 3, 8, 128]);
        assert!(check_pairs([&keys, &desc([2, 3, 8, 64])]).is_ok());
        for values in [
            desc([1, 3, 1, 128]),
            desc([1, 4, 8, 128]),
            TensorDesc::contiguous(DType::F16, [1, 3, 8, 128]),
            TensorDesc::contiguous(DType::Bf16, [3, 8, 128]),
        ] {
            assert!(check_pairs([&keys, &values]).is_err(), "{values}");
        }
    }

    #[test]
    fn rows_that_a_tensor_lacks_are_refused() {
        let (from, to) = (desc([2, 3, 2, 8]), desc([4, 16, 2, 8]));
        assert!(check_runs(&from, &to, &[run(5, 63, 1), run(6, 64, 0), run(0, 0, 6)]).is_ok());
        for (runs, message) in [
            (run(5, 0, 2), "rows 5 to before 5 + 2 are not among the 6 of the source"),
            (run(0, 63, 2), "rows 63 to before 63 + 2 are not among the 64 of the target"),
            (run(usize::MAX, 0, 2), "are not among the 6 of the source"),
        ] {
            let error = check_runs(&from, &to, &[run(0, 0, 1), runs]).expect_err("out of range").to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn every_run_is_in_one_launch() {
        let source = || Source { address: 64, desc: desc([400, 1, 2, 8]) };
        let to = [(128, desc([4, 100, 2, 8])), (256, desc([4, 100, 2, 8]))];
        let runs: Vec<RowRun> = (0..400).map(|row| run(row, 399 - row, usize::from(row != 7))).collect();
        let launches = launches(&[source(), source()], &to, &runs);
        let seen: Vec<(i64, i64, i64)> = (launches.iter())
            .flat_map(|(arguments, config)| {
                assert_eq!(config.grid_dim, (arguments.count as u32, 1, 2));
                arguments.runs[..arguments.count as usize].iter().map(|run| (run.from, run.to, run.count))
            })
            .collect();
        let wanted = (0..400).filter(|&row| row != 7).map(|row| (row, 399 - row, 1));
        assert!(seen.into_iter().eq(wanted));
        assert_eq!(launches.len(), 3);
        assert_eq!((launches[0].0.heads, launches[0].0.inner, launches[0].0.element_size), (2, 1, 2));
        // More blocks for long runs.
        let long = Source { address: 64, desc: desc([1, 1 << 20, 2, 8]) };
        let to = [(128, desc([1, 1 << 20, 2, 8])), (256, desc([1, 1 << 20, 2, 8]))];
        let launches = super::launches(&[long, source()], &to, &[run(0, 0, 1 << 20)]);
        assert_eq!(launches[0].1.grid_dim, (1, MOST_PARTS as u32, 2));
    }
}
