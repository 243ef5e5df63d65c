//! Caches in memory of a GPU hold, token for token, what caches in host memory hold. Run with `--ignored`.

use std::sync::Arc;

use attention::chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention::cuda::{CudaDevice, DeviceTensor};
use attention::kv_cache::{CacheError, CudaMemory, CudaTables, KvCache, PagedKvCache, PoolShape, TokenShape};
use attention::{
    Attention, DType, Dims, Element, F8E4M3, QueryOffset, Registry, Tensor, TensorDesc, View, ViewMut, bf16,
};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The first device, with a stream that can be captured: the default one cannot.
fn device() -> Result<CudaDevice> {
    let device = CudaDevice::new("the test", 0)?;
    Ok(device.with_stream(device.context().new_stream()?))
}

/// Numbers without an order, from 0 on.
struct Random(u64);

impl Random {
    fn below(&mut self, count: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % count
    }
}

/// Elements of these axes, none of which is 0.
fn tokens<T: Element>(random: &mut Random, shape: impl Into<Dims>, of: impl Fn(usize) -> T) -> Tensor {
    let shape = shape.into();
    let data = (0..shape.iter().product()).map(|_| of(1 + random.below(200))).collect();
    Tensor::from_vec(data, shape).expect("as many elements as the shape says")
}

fn bytes(device: &CudaDevice, view: View<'_>) -> Result<Vec<u8>> {
    let mut copy = DeviceTensor::filled(device, view.desc(), 0)?;
    let target = copy.view_mut()?.as_mut_ptr() as u64;
    let count = view.desc().element_count().expect("a cache's tensor") * view.desc().dtype().size();
    // SAFETY: both tensors have as many bytes without gaps, are on the device, and stay until the copy is
    // done, for which `bytes` waits.
    unsafe {
        attention::cuda::cudarc::driver::result::memcpy_dtod_async(
            target,
            view.as_ptr() as u64,
            count,
            device.stream().cu_stream(),
        )?;
    }
    Ok(copy.bytes()?)
}

/// The bytes of the same tensor in host memory.
fn host_bytes<T: Element + bytemuck::Pod>(view: View<'_>) -> Vec<u8> {
    let view = view.host::<T>().expect("a cache of this dtype");
    let (elements, ..) = view.matrix(&[0; 4], 0, 1).expect("a cache has no gaps");
    bytemuck::cast_slice(elements).to_vec()
}

/// The same appends, forks and truncations of both caches, checked after each.
fn paged_caches_agree<T: Element + bytemuck::Pod>(
    token: TokenShape,
    page_size: usize,
    of: impl Fn(usize) -> T + Copy,
) -> Result {
    let device = device()?;
    let shape = PoolShape { pages: 40, page_size, longest: 300 };
    let mut host = PagedKvCache::new(token, shape)?;
    let mut cuda = PagedKvCache::on_cuda(token, shape, &device)?;
    let mut random = Random(7);
    let mut sequences = vec![(host.add(), cuda.add())];
    let TokenShape { key_heads, head_dim, value_head_dim, .. } = token;
    for step in 0..60 {
        let (on_host, on_device) = sequences[random.below(sequences.len())];
        match random.below(4) {
            0 => {
                let kept = random.below(host.len(on_host)? + 1);
                sequences.push((host.fork_prefix(on_host, kept)?, cuda.fork_prefix(on_device, kept)?));
            }
            1 => {
                let kept = host.len(on_host)? * 3 / 4;
                host.truncate(on_host, kept)?;
                cuda.truncate(on_device, kept)?;
            }
            2 => {
                // One token of each sequence; heads before tokens in memory, so not in one piece.
                let n = sequences.len();
                let keys = tokens(&mut random, [n, key_heads, 1, head_dim], of);
                let values = tokens(&mut random, [n, key_heads, 1, value_head_dim], of);
                let (hosts, cudas): (Vec<_>, Vec<_>) = sequences.iter().copied().unzip();
                let [of_keys, of_values] =
                    [&keys, &values].map(|tensor| DeviceTensor::from_host(&device, tensor.view()));
                let (of_keys, of_values) = (of_keys?, of_values?);
                let order = [0, 2, 1, 3];
                let wanted =
                    host.append_each(&hosts, keys.view().permute(order)?, values.view().permute(order)?);
                let got = cuda.append_each(
                    &cudas,
                    of_keys.view()?.permute(order)?,
                    of_values.view()?.permute(order)?,
                );
                same_outcome(wanted, got);
            }
            _ => {
                let n = random.below(3 * page_size + 2);
                let keys = tokens(&mut random, [n, key_heads, head_dim], of);
                let values = tokens(&mut random, [n, key_heads, value_head_dim], of);
                let [of_keys, of_values] =
                    [&keys, &values].map(|tensor| DeviceTensor::from_host(&device, tensor.view()));
                let (of_keys, of_values) = (of_keys?, of_values?);
                let wanted = host.append(on_host, &keys, &values);
                let got = cuda.append(on_device, of_keys.view()?, of_values.view()?);
                same_outcome(wanted, got);
            }
        }
        assert_eq!(host.used_pages(), cuda.used_pages());
        for (wanted, got) in [(host.keys(), cuda.keys()), (host.values(), cuda.values())] {
            assert!(
                host_bytes::<T>(wanted) == bytes(&device, got)?,
                "{token:?}, page {page_size}, step {step}"
            );
        }
    }
    assert!(sequences.len() > 5 && host.used_pages() > 5, "steps that do little");
    Ok(())
}

fn same_outcome(wanted: std::result::Result<(), CacheError>, got: std::result::Result<(), CacheError>) {
    assert_eq!(wanted.map_err(|error| error.to_string()), got.map_err(|error| error.to_string()));
}

#[test]
#[ignore = "needs a GPU"]
fn pages_on_a_gpu_hold_what_those_of_the_host_hold() -> Result {
    for page_size in [1, 5, 16] {
        // Rows of whole chunks of 16 bytes, and rows of single elements.
        let wide = TokenShape { value_head_dim: 64, ..TokenShape::new(DType::Bf16, 2, 128) };
        paged_caches_agree(wide, page_size, |number| bf16::from_f32(number as f32))?;
        let narrow = TokenShape { value_head_dim: 3, ..TokenShape::new(DType::F32, 3, 5) };
        paged_caches_agree(narrow, page_size, |number| number as f32)?;
        let double = TokenShape::new(DType::F64, 1, 1);
        paged_caches_agree(double, page_size, |number| number as f64)?;
        let eight = TokenShape { value_head_dim: 7, ..TokenShape::new(DType::F8E4M3, 2, 16) };
        paged_caches_agree(eight, page_size, |number| bytemuck::cast::<u8, F8E4M3>(number.min(120) as u8))?;
    }
    Ok(())
}

/// More pieces than one launch takes.
#[test]
#[ignore = "needs a GPU"]
fn a_long_prompt_over_many_pages_is_appended_whole() -> Result {
    let device = device()?;
    let token = TokenShape::new(DType::F32, 1, 4);
    let shape = PoolShape { pages: 1000, page_size: 2, longest: 2000 };
    let (mut host, mut cuda) =
        (PagedKvCache::new(token, shape)?, PagedKvCache::on_cuda(token, shape, &device)?);
    let (on_host, on_device) = (host.add(), cuda.add());
    let keys = tokens(&mut Random(1), [1999, 1, 4], |number| number as f32);
    let on_gpu = DeviceTensor::from_host(&device, keys.view())?;
    host.append(on_host, &keys, &keys)?;
    cuda.append(on_device, on_gpu.view()?, on_gpu.view()?)?;
    assert!(host_bytes::<f32>(host.keys()) == bytes(&device, cuda.keys())?);
    assert!(host_bytes::<f32>(host.values()) == bytes(&device, cuda.values())?);
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn tokens_elsewhere_are_refused_and_nothing_is_appended() -> Result {
    let device = device()?;
    let other = device.with_stream(device.context().new_stream()?);
    let token = TokenShape::new(DType::F32, 1, 4);
    let mut cache = KvCache::on_cuda(token, 2, 8, &device)?;
    let keys = tokens(&mut Random(1), [2, 3, 1, 4], |number| number as f32);
    let error = cache.append(keys.view(), keys.view()).expect_err("host memory").to_string();
    assert!(error.contains("cpu") && error.contains("cuda:0"), "{error}");
    let elsewhere = DeviceTensor::from_host(&other, keys.view())?;
    let error = cache.append(elsewhere.view()?, elsewhere.view()?).expect_err("another stream").to_string();
    assert!(error.contains("another stream"), "{error}");
    assert_eq!([cache.len(0)?, cache.len(1)?], [0, 0]);
    let here = DeviceTensor::from_host(&device, keys.view())?;
    cache.append(here.view()?, here.view()?)?;
    assert_eq!([cache.len(0)?, cache.len(1)?], [3, 3]);
    Ok(())
}

/// A decoder's steps over both kinds of pages give the same outputs, as far as f32 does.
#[test]
#[ignore = "needs a GPU"]
fn decoding_over_pages_on_a_gpu_is_decoding_over_pages_of_the_host() -> Result {
    let device = device()?;
    let token = TokenShape::new(DType::F32, 2, 64);
    let shape = PoolShape { pages: 60, page_size: 16, longest: 400 };
    let mut host = PagedKvCache::new(token, shape)?;
    let mut cuda: PagedKvCache<CudaMemory> = PagedKvCache::on_cuda(token, shape, &device)?;
    let mut random = Random(3);
    let of = |number: usize| (number as f32 - 100.0) / 100.0;
    let (mut hosts, mut cudas) = (Vec::new(), Vec::new());
    for length in [1, 300, 33] {
        let (keys, values) =
            (tokens(&mut random, [length, 2, 64], of), tokens(&mut random, [length, 2, 64], of));
        let [of_keys, of_values] =
            [&keys, &values].map(|tensor| DeviceTensor::from_host(&device, tensor.view()));
        let (of_keys, of_values) = (of_keys?, of_values?);
        hosts.push(host.add());
        cudas.push(cuda.add());
        host.append(hosts[hosts.len() - 1], &keys, &values)?;
        cuda.append(cudas[cudas.len() - 1], of_keys.view()?, of_values.view()?)?;
    }
    let (mut host_batch, mut cuda_batch) = (host.batch(hosts)?, cuda.batch(cudas)?);
    // One row more than there are sequences, and tables for the second half of a graph of one call.
    let mut tables = CudaTables::new(&cuda, 4)?;
    let mut graph = None;
    let mut of_all = DeviceTensor::filled(&device, TensorDesc::contiguous(DType::F32, [4, 1, 8, 64]), 0)?;
    let mut out_of_all = DeviceTensor::filled(&device, of_all.desc(), 0xff)?;
    let attention = Attention::new().causal(true).query_offset(QueryOffset::BottomRight);
    let mut on_stream = Registry::empty();
    on_stream.register(Arc::new(ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default())));
    for step_index in 0..20 {
        let (query, new) = (tokens(&mut random, [3, 1, 8, 64], of), tokens(&mut random, [3, 1, 2, 64], of));
        let (of_query, of_new) =
            (DeviceTensor::from_host(&device, query.view())?, DeviceTensor::from_host(&device, new.view())?);
        host.append_each(host_batch.sequences(), &new, &new)?;
        cuda.append_each(cuda_batch.sequences(), of_new.view()?, of_new.view()?)?;
        let step = host.inputs(&mut host_batch)?;
        let wanted =
            attention.clone().paged(step.table, step.lengths).forward(&query, step.keys, step.values)?;
        let step = cuda.inputs(&mut cuda_batch)?;
        let mut out = DeviceTensor::filled(&device, query.view().desc(), 0xff)?;
        let on_gpu = attention.clone().registry(&on_stream).paged(step.table, step.lengths);
        on_gpu.forward_into(of_query.view()?, step.keys, step.values, out.view_mut()?, None)?;
        let mut got = vec![0f32; 3 * 8 * 64];
        out.copy_to_host(&mut ViewMut::from_slice(&mut got, [3, 1, 8, 64])?)?;
        let wanted = wanted.as_slice::<f32>().expect("f32");
        for (got, wanted) in got.iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-5, "{got} and {wanted}");
        }

        // The same with tables in device memory, by one graph that is captured at the second step.
        tables.update(&cuda.inputs(&mut cuda_batch)?)?;
        let padded = Tensor::from_vec(
            query.as_slice::<f32>().expect("f32").iter().copied().chain([1.0; 512]).collect(),
            [4, 1, 8, 64],
        )?;
        of_all.replace(padded.view())?;
        let on_gpu = attention.clone().registry(&on_stream).paged(tables.table(), tables.lengths());
        let mut call = || {
            on_gpu.forward_into(of_all.view()?, cuda.keys(), cuda.values(), out_of_all.view_mut()?, None)?;
            Result::Ok(())
        };
        if step_index == 0 {
            call()?;
        } else {
            if graph.is_none() {
                let stream = device.stream();
                stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
                let called = call();
                let captured = stream
                    .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
                called?;
                graph = captured?;
            }
            graph.as_ref().ok_or("an empty graph")?.launch()?;
        }
        let mut of_graph = vec![0f32; 4 * 8 * 64];
        out_of_all.copy_to_host(&mut ViewMut::from_slice(&mut of_graph, [4, 1, 8, 64])?)?;
        assert!(of_graph[..got.len()] == got, "step {step_index}: tables in device memory");
        assert!(
            of_graph[got.len()..].iter().all(|&x| x == 0.0),
            "step {step_index}: a row without a sequence"
        );
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn tables_with_too_little_room_or_of_another_cache_are_refused() -> Result {
    let device = device()?;
    let token = TokenShape::new(DType::F32, 1, 4);
    let of = |longest| PagedKvCache::on_cuda(token, PoolShape { pages: 8, page_size: 2, longest }, &device);
    let (mut cache, mut other) = (of(8)?, of(12)?);
    let mut tables = CudaTables::new(&cache, 1)?;
    let (first, second) = (cache.add(), cache.add());
    let mut two = cache.batch([first, second])?;
    let error = tables.update(&cache.inputs(&mut two)?).expect_err("two of one").to_string();
    assert_eq!(error, "2 sequences were given, and rows of tables in device memory 1");
    let sequence = other.add();
    let mut longer = other.batch([sequence])?;
    assert!(tables.update(&other.inputs(&mut longer)?).is_err());
    // Of as many pages.
    let mut alike = of(8)?;
    let sequence = alike.add();
    let mut batch = alike.batch([sequence])?;
    let error = tables.update(&alike.inputs(&mut batch)?).expect_err("of another cache").to_string();
    assert_eq!(error, "the batch belongs to another cache");
    Ok(())
}
