//! Scratch memory.

use crate::{Device, InvalidCall, SCRATCH_ALIGNMENT, Scratch, ScratchBuffer};

#[test]
fn buffers_are_aligned_and_as_large_as_asked_for() {
    for bytes in [0, 1, 63, 64, 65, 1000] {
        let mut buffer = ScratchBuffer::new(bytes);
        assert_eq!((buffer.len(), buffer.is_empty()), (bytes, bytes == 0));
        let mut scratch = buffer.scratch();
        assert_eq!(scratch.check(Device::Cpu, bytes), Ok(()));
        assert!(bytes == 0 || (scratch.as_mut_ptr() as usize).is_multiple_of(SCRATCH_ALIGNMENT));
        let memory = scratch.into_host().unwrap();
        assert_eq!(memory.len(), bytes);
        memory.fill(0xFF);
        assert!(buffer.bytes_mut().iter().all(|&byte| byte == 0xFF));
    }
}

#[test]
fn reserving_only_grows() {
    let mut buffer = ScratchBuffer::new(100);
    let address = buffer.bytes_mut().as_ptr();
    for (bytes, len) in [(10, 100), (120, 120), (0, 120)] {
        buffer.reserve(bytes);
        assert_eq!(buffer.len(), len);
        // 120 bytes fit into the two lines that 100 bytes took.
        assert_eq!(buffer.bytes_mut().as_ptr(), address);
    }
    buffer.reserve(1 << 16);
    assert_eq!(buffer.bytes_mut().len(), 1 << 16);
}

#[test]
fn memory_that_cannot_be_had_leaves_an_empty_buffer() {
    let mut buffer = ScratchBuffer::new(100);
    assert!(!buffer.try_reserve(usize::MAX));
    assert!(buffer.is_empty() && buffer.bytes_mut().is_empty());
    assert!(buffer.try_reserve(10));
    assert_eq!(buffer.bytes_mut().len(), 10);
}

#[test]
fn checks_look_at_device_size_and_alignment_in_turn() {
    let mut buffer = ScratchBuffer::new(256);
    let scratch = Scratch::host(&mut buffer.bytes_mut()[1..]);
    let address = |scratch: &mut Scratch<'_>| scratch.as_mut_ptr() as usize;
    let mut scratch = scratch;
    let misaligned =
        InvalidCall::ScratchMisaligned { address: address(&mut scratch), align: SCRATCH_ALIGNMENT };
    assert_eq!(scratch.check(Device::Cpu, 255), Err(misaligned));
    assert_eq!(
        scratch.check(Device::Cpu, 256),
        Err(InvalidCall::ScratchTooSmall { needed: 256, given: 255 })
    );
    let elsewhere = InvalidCall::ScratchDevice { device: Device::Cpu, expected: Device::Cuda(0) };
    assert_eq!(scratch.check(Device::Cuda(0), 256), Err(elsewhere));
    // Where nothing is needed, anything will do.
    assert_eq!(scratch.check(Device::Cuda(0), 0), Ok(()));
    assert_eq!(Scratch::none(Device::Cuda(1)).check(Device::Cpu, 0), Ok(()));
}

#[test]
fn scratch_is_host_memory_on_the_host_alone() {
    assert_eq!(Scratch::none(Device::Cpu).into_host(), Some(&mut [][..]));
    assert_eq!(Scratch::none(Device::Cuda(0)).into_host(), None);
    // SAFETY: no bytes are allocated at null.
    let nothing = unsafe { Scratch::from_raw_parts(std::ptr::null_mut(), 0, Device::Cpu) };
    assert_eq!((nothing.len(), nothing.is_empty(), nothing.device()), (0, true, Device::Cpu));
    assert_eq!(nothing.into_host(), Some(&mut [][..]));
}
