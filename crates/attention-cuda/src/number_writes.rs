//! Numbers written to places of tensors in device memory: what a step of decoding changes in a block table
//! and in lengths, for calls and captured graphs that read them there.

use attention_core::DType;
use attention_kernels::{Helper, Variant};
use cudarc::driver::{CudaFunction, DeviceRepr, DriverError, LaunchConfig};

use crate::error::KernelError;
use crate::launch::launch;
use crate::{CudaDevice, DeviceTensor, KernelCache};

/// The kernel's source and entry point.
const SOURCE: &str = "attention_write_numbers.cu";
const ENTRY_POINT: &str = "attention_write_numbers";

/// Numbers per launch, as many as the kernel's argument has room for.
const MOST_NUMBERS: usize = 480;

/// Why numbers were not written. None was, unless the driver refused a launch behind others.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NumberWriteError {
    /// The tensor is no row-major one of i32 on the writer's device and stream.
    #[error(
        "numbers cannot be written to {tensor}: it must be i32 without gaps, made with the writer's device and \
         stream"
    )]
    Tensor {
        /// The tensor.
        tensor: String,
    },
    /// There is no such element.
    #[error("element {index} is not among the {count} of the tensor")]
    Index {
        /// Which element.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver failed.
    #[error("writing numbers: {0}")]
    Driver(#[from] DriverError),
}

/// As in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WrittenNumber {
    index: u32,
    number: i32,
}

/// The argument of `attention_write_numbers`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct WriteNumbers {
    to: [u64; 2],
    counts: [i32; 2],
    numbers: [WrittenNumber; MOST_NUMBERS],
}

// SAFETY: plain integers without padding, in the layout of the struct of the same name in the kernel; the
// size is asserted on both sides.
unsafe impl DeviceRepr for WriteNumbers {}

const _: () = assert!(size_of::<WriteNumbers>() == 3864);

/// Writes numbers to two tensors of i32 at a time on a device and its stream.
#[derive(Clone, Debug)]
pub struct NumberWriter {
    device: CudaDevice,
    function: CudaFunction,
}

impl NumberWriter {
    /// Compiles the kernel, or takes it from the cache.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(device: &CudaDevice, kernels: &KernelCache) -> Result<Self, KernelError> {
        let variant = Variant::Helper(Helper::LAUNCHED);
        let function = kernels.named(device.context(), SOURCE, variant, ENTRY_POINT)?;
        Ok(Self { device: device.clone(), function })
    }

    /// Writes each number to the element of this index, in row-major order, of the tensor that it goes with,
    /// in the order of the device's stream: 480 of them a launch. No index is given twice for one tensor, or
    /// it has one of the numbers.
    ///
    /// # Errors
    /// [`NumberWriteError`]: everything is checked before anything is written.
    pub fn write(
        &self,
        tensors: [&mut DeviceTensor; 2],
        numbers: [&[(usize, i32)]; 2],
    ) -> Result<(), NumberWriteError> {
        for (tensor, numbers) in tensors.iter().zip(numbers) {
            let desc = tensor.desc();
            let same = tensor.device().stream().cu_stream() == self.device.stream().cu_stream()
                && tensor.device().context() == self.device.context();
            if desc.dtype() != DType::I32 || !desc.is_contiguous() || !same {
                return Err(NumberWriteError::Tensor { tensor: desc.to_string() });
            }
            let count = desc.element_count().unwrap_or(0).min(u32::MAX as usize);
            if let Some(&(index, _)) = numbers.iter().find(|&&(index, _)| index >= count) {
                return Err(NumberWriteError::Index { index, count });
            }
        }
        for arguments in launches(tensors.map(|tensor| tensor.address()), numbers) {
            let block_dim = (Helper::LAUNCHED.threads, 1, 1);
            let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim, shared_mem_bytes: 0 };
            // SAFETY: the kernel takes this one struct, and writes elements of two tensors of i32 without
            // gaps, of which the loop above has seen that they have them. The tensors were borrowed mutably,
            // and their memory is written and freed on this stream alone.
            unsafe { launch(self.device.stream(), &self.function, &arguments, config) }?;
        }
        Ok(())
    }
}

/// What is launched: numbers of the first tensor, then of the second.
fn launches(to: [u64; 2], numbers: [&[(usize, i32)]; 2]) -> Vec<WriteNumbers> {
    let both = numbers
        .iter()
        .enumerate()
        .flat_map(|(which, numbers)| numbers.iter().map(move |number| (which, number)));
    let both: Vec<(usize, &(usize, i32))> = both.collect();
    let launch = |chunk: &[(usize, &(usize, i32))]| {
        let mut arguments =
            WriteNumbers { to, counts: [0; 2], numbers: [WrittenNumber::default(); MOST_NUMBERS] };
        for (place, &(which, &(index, number))) in arguments.numbers.iter_mut().zip(chunk) {
            *place = WrittenNumber { index: index as u32, number };
            arguments.counts[which] += 1;
        }
        arguments
    };
    both.chunks(MOST_NUMBERS).map(launch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::assert_laid_out;

    #[test]
    fn the_argument_is_laid_out_as_in_the_kernel() {
        let text = attention_kernels::source(SOURCE).expect("in the package").text;
        assert_laid_out!(text, WriteNumbers: to, counts, numbers);
    }

    #[test]
    fn every_number_is_in_one_launch_with_its_tensor() {
        let first: Vec<(usize, i32)> = (0..500).map(|index| (3 * index, index as i32 - 1)).collect();
        let second = [(7, -1), (9, 4)];
        let launches = launches([64, 128], [&first, &second]);
        assert_eq!(launches.iter().map(|launch| launch.counts).collect::<Vec<_>>(), [[480, 0], [20, 2]]);
        let mut seen = [Vec::new(), Vec::new()];
        for launch in &launches {
            assert_eq!(launch.to, [64, 128]);
            for (place, number) in launch.numbers.iter().enumerate() {
                let [of_first, of_second] = launch.counts.map(|count| count as usize);
                let which = usize::from(place >= of_first);
                if place < of_first + of_second {
                    seen[which].push((number.index as usize, number.number));
                }
            }
        }
        assert_eq!(seen, [first, second.to_vec()]);
        assert!(super::launches([64, 128], [&[], &[]]).is_empty());
    }
}
