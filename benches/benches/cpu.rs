//! The CPU backends on the quick part of the shared list of shapes, in f32 and bf16.

use std::hint::black_box;
use std::time::Duration;

use attention_benches::{Mask, SHAPES, Work, Workload};
use attention_chunked::ChunkedBackend;
use attention_core::{AttentionBackend, ScratchBuffer};
use attention_cpu::CpuBackend;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn plain(criterion: &mut Criterion) {
    measure(criterion, &CpuBackend::new());
}

fn chunked(criterion: &mut Criterion) {
    measure(criterion, &ChunkedBackend::new());
}

fn measure(criterion: &mut Criterion, backend: &dyn AttentionBackend) {
    for work in [Work::Forward, Work::Both] {
        let mut group = criterion.benchmark_group(format!("{}/{work}", backend.name()));
        // Ten samples of calls that take up to a second: two minutes for all of them.
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(3));
        for shape in SHAPES.iter().filter(|shape| shape.quick && !(shape.is_decode() && work == Work::Both)) {
            for &dtype in shape.dtypes {
                let mut workload = Workload::new(shape.dims, dtype, work, false, Mask::None)
                    .expect("the shapes of the list are valid");
                let plans = workload.plan(backend).expect("both serve every call");
                let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
                // Criterion prints elements a second; here they are floating-point operations.
                group.throughput(Throughput::Elements(workload.flops() as u64));
                group.bench_function(BenchmarkId::new(dtype.name(), shape.dims), |bencher| {
                    bencher.iter(|| black_box(workload.run(&plans, &mut scratch)).expect("a served call"));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, plain, chunked);
criterion_main!(benches);
