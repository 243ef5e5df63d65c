//! Scratch memory that a backend works in and the caller owns.

use std::marker::PhantomData;

use crate::{Device, InvalidCall};

/// What scratch memory must be aligned to, in bytes: a cache line, and the widest vector register.
pub const SCRATCH_ALIGNMENT: usize = 64;

/// Scratch memory for one call. Its contents before the call do not matter, and are anything after it.
#[derive(Debug)]
pub struct Scratch<'a> {
    device: Device,
    pointer: *mut u8,
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive reference to plain bytes.
unsafe impl Send for Scratch<'_> {}

impl<'a> Scratch<'a> {
    /// No memory, for a backend that needs none.
    pub const fn none(device: Device) -> Self {
        Self {
            device,
            pointer: std::ptr::without_provenance_mut(SCRATCH_ALIGNMENT),
            len: 0,
            memory: PhantomData,
        }
    }

    /// Host memory.
    pub fn host(bytes: &'a mut [u8]) -> Self {
        Self { device: Device::Cpu, pointer: bytes.as_mut_ptr(), len: bytes.len(), memory: PhantomData }
    }

    /// Memory of a device, or host memory of another library.
    ///
    /// # Safety
    /// `len` bytes at `pointer` are allocated on `device`, initialised if on the host, and reached through
    /// nothing else during `'a`; in device memory until the work of the call that was given the scratch has
    /// ended on its stream.
    pub const unsafe fn from_raw_parts(pointer: *mut u8, len: usize, device: Device) -> Self {
        Self { device, pointer, len, memory: PhantomData }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pointer to its first byte.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pointer
    }

    /// Checks what every backend checks first: device, size and alignment.
    ///
    /// # Errors
    /// [`InvalidCall::ScratchDevice`], [`InvalidCall::ScratchTooSmall`], [`InvalidCall::ScratchMisaligned`].
    pub fn check(&self, expected: Device, needed: usize) -> Result<(), InvalidCall> {
        let (device, given, address) = (self.device, self.len, self.pointer as usize);
        if needed == 0 {
            return Ok(());
        }
        if device != expected {
            return Err(InvalidCall::ScratchDevice { device, expected });
        }
        if given < needed {
            return Err(InvalidCall::ScratchTooSmall { needed, given });
        }
        if !address.is_multiple_of(SCRATCH_ALIGNMENT) {
            return Err(InvalidCall::ScratchMisaligned { address, align: SCRATCH_ALIGNMENT });
        }
        Ok(())
    }

    /// The bytes, or `None` where they are not in host memory.
    pub fn into_host(self) -> Option<&'a mut [u8]> {
        if self.device != Device::Cpu {
            return None;
        }
        // A pointer to no bytes may be null, which a slice may not be.
        if self.len == 0 {
            return Some(&mut []);
        }
        // SAFETY: the two constructors take an exclusive slice of bytes, or a pointer whose caller promised
        // that `len` initialised bytes there are reached through nothing else during 'a; `self` is consumed,
        // and the memory is the host's (checked above).
        Some(unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }
}

/// Scratch memory that its owner lends for one call, and takes back when this is dropped
/// ([`Plan::lend_scratch`](crate::Plan::lend_scratch)).
pub trait LentScratch: Send + std::fmt::Debug {
    /// The memory, for a call.
    fn scratch(&mut self) -> Scratch<'_>;
}

impl LentScratch for ScratchBuffer {
    fn scratch(&mut self) -> Scratch<'_> {
        self.scratch()
    }
}

/// One aligned unit of a [`ScratchBuffer`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; SCRATCH_ALIGNMENT]);

// SAFETY: 64 bytes without padding, for which zero is a value.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: `repr(C)` around bytes, size equal to alignment so no padding, every bit pattern is a value.
unsafe impl bytemuck::Pod for Line {}

/// Owned host scratch memory with the alignment that backends ask for.
///
/// ```
/// use attention_core::ScratchBuffer;
///
/// let mut buffer = ScratchBuffer::new(1000);
/// assert_eq!(buffer.scratch().len(), 1000);
/// ```
#[derive(Default)]
pub struct ScratchBuffer {
    lines: Vec<Line>,
    len: usize,
}

impl ScratchBuffer {
    /// A buffer of this many bytes. Memory that is never touched is never mapped by the operating system.
    ///
    /// # Panics
    /// Where the memory cannot be had.
    pub fn new(bytes: usize) -> Self {
        let mut buffer = Self::default();
        buffer.reserve(bytes);
        buffer
    }

    /// Makes the buffer at least this large, without keeping its contents.
    ///
    /// # Panics
    /// Where the memory cannot be had.
    pub fn reserve(&mut self, bytes: usize) {
        assert!(self.try_reserve(bytes), "no memory for {bytes} bytes of scratch");
    }

    /// As [`reserve`](Self::reserve); `false`, with the buffer empty, where the memory cannot be had.
    #[must_use]
    pub fn try_reserve(&mut self, bytes: usize) -> bool {
        let lines = bytes.div_ceil(SCRATCH_ALIGNMENT);
        if lines > self.lines.len() {
            // Freed first, so that the old and the new one never exist together.
            (self.lines, self.len) = (Vec::new(), 0);
            match bytemuck::try_zeroed_vec(lines) {
                Ok(zeroed) => self.lines = zeroed,
                Err(()) => return false,
            }
        }
        self.len = self.len.max(bytes);
        true
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }

    /// The scratch memory for a call.
    pub fn scratch(&mut self) -> Scratch<'_> {
        Scratch::host(self.bytes_mut())
    }
}

impl std::fmt::Debug for ScratchBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScratchBuffer").field("len", &self.len).finish()
    }
}
