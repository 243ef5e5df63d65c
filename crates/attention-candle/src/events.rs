//! What tells the streams of a call that its reads and writes are on them.

/// What is told when the reads of a call are on their stream; nothing in host memory.
#[derive(Default)]
pub(crate) struct Reads<'g> {
    #[cfg(feature = "cuda")]
    pub(crate) events: Vec<attention::cuda::cudarc::driver::SyncOnDrop<'g>>,
    #[cfg(not(feature = "cuda"))]
    host: std::marker::PhantomData<&'g ()>,
}

/// Whether writes to outputs are on their stream; nothing in host memory.
#[derive(Default)]
pub(crate) struct Writes<'g> {
    #[cfg(feature = "cuda")]
    pub(crate) events: Vec<attention::cuda::cudarc::driver::SyncOnDrop<'g>>,
    #[cfg(not(feature = "cuda"))]
    host: std::marker::PhantomData<&'g ()>,
}
