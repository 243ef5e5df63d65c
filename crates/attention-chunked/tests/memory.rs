//! What a call allocates besides the scratch that it is given, counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use attention_chunked::{ChunkedBackend, ChunkedConfig};
use attention_core::{
    AttentionBackend, ForwardCall, ForwardOutputs, Inputs, ScratchBuffer, View, ViewMut, Window,
};

/// The system's allocator, with the bytes in use and the most there ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: both methods pass their arguments to the system allocator, which keeps the contract, and return
// what it returns; in addition they only count bytes.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller guarantees a layout whose size is not 0.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller guarantees a pointer that `alloc` returned for this layout, which the system
        // allocator gave.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that a forward call has in use beyond inputs and outputs: its scratch, and what it allocates itself.
fn in_use(queries: usize, keys: usize, window: usize) -> (usize, usize) {
    let backend = ChunkedBackend::with_config(ChunkedConfig::default().threads(1));
    let (q, k) = (vec![0.5f32; queries * 64], vec![0.25f32; keys * 64]);
    let mut out = vec![0f32; queries * 64];
    let query = View::from_slice(&q, [1, queries, 1, 64]).unwrap();
    let key = View::from_slice(&k, [1, keys, 1, 64]).unwrap();
    let inputs = Inputs::new(query, key, key);
    let problem = inputs.problem().window(Window { left: Some(window), right: None }).build().unwrap();
    let plan = backend.plan(&problem).unwrap();
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    let outputs =
        ForwardOutputs { out: ViewMut::from_slice(&mut out, [1, queries, 1, 64]).unwrap(), lse: None };
    let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    plan.forward(call, scratch.scratch()).unwrap();
    assert!(out.iter().all(|&x| (x - 0.25).abs() < 1e-6));
    (scratch.len(), PEAK.load(Ordering::Relaxed) - before)
}

/// Bytes that a call of one thread allocates itself, of `batch` batch rows of which every second is decoded.
fn allocated_with_lengths(batch: usize) -> usize {
    let backend = ChunkedBackend::with_config(ChunkedConfig::default().threads(1));
    let (q, k) = (vec![0.5f32; batch * 20 * 8], vec![0.25f32; batch * 30 * 8]);
    let mut out = vec![0f32; batch * 20 * 8];
    let key = View::from_slice(&k, [batch, 30, 1, 8]).unwrap();
    let mut inputs = Inputs::new(View::from_slice(&q, [batch, 20, 1, 8]).unwrap(), key, key);
    let lengths: Vec<i64> = (0..batch).map(|row| if row % 2 == 0 { 1 } else { 20 }).collect();
    inputs.data.query_lengths = Some(View::from_slice(&lengths, [batch]).unwrap());
    let plan = backend.plan(&inputs.problem().build().unwrap()).unwrap();
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    let out = ViewMut::from_slice(&mut out, [batch, 20, 1, 8]).unwrap();
    let call = ForwardCall::new(plan.problem(), inputs, ForwardOutputs { out, lse: None }).unwrap();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    plan.forward(call, scratch.scratch()).unwrap();
    PEAK.load(Ordering::Relaxed) - before
}

/// One test: the counters are the process's.
#[test]
fn a_call_uses_constant_memory() {
    let (scratch, _) = in_use(1024, 1024, 1024);
    assert!(scratch <= 1 << 20, "{scratch} bytes of scratch");
    for (queries, keys) in [(4096, 4096), (64, 1 << 18), (1 << 17, 64)] {
        let (long_scratch, allocated) = in_use(queries, keys, usize::MAX);
        assert!(long_scratch <= 1 << 20, "T {queries}, S {keys}: {long_scratch} bytes of scratch");
        // The list of tasks: about a hundred bytes for each chunk of rows.
        let tasks = queries / 192 + 1;
        assert!(allocated <= 1024 + 256 * tasks, "T {queries}, S {keys}: {allocated} bytes allocated");
    } // A call cuts its own tasks where it has lengths, and makes no list of them.
    assert_eq!(allocated_with_lengths(1000), allocated_with_lengths(10));
}
