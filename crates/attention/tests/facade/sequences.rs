//! Packed and paged calls: what they give, what is wrong with them, and how often they are planned.

use attention::core::{ForwardOutputs, Inputs};
use attention::{
    Attention, AttentionBackend, BackwardInputs, BackwardOutputs, DType, DeviceKind, Dropout, Error, Forward,
    InvalidCall, QueryOffset, Registry, Role, Tensor, View, ViewMut, Window,
};

use crate::support::{Toy, numbers, registry};

/// N 4, K 2, H 8, Hv 6.
const N: usize = 4;
const K: usize = 2;
const H: usize = 8;
const HV: usize = 6;

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let dims = attention::Dims::from_slice(shape).unwrap();
    Tensor::from_vec(numbers(shape.iter().product(), seed), dims).unwrap()
}

/// The implementations of host memory that serve packed and paged calls: the naive one, and those of this
/// build that do.
fn implementations(pass: attention::Pass) -> Vec<Registry> {
    let serves = |backend: &dyn AttentionBackend| {
        let (queries, keys) = ([3, 1, 8], [3, 1, 8]);
        let desc = |shape| attention::TensorDesc::contiguous(DType::F32, shape);
        let builder = attention::Problem::builder(desc(queries), desc(keys), desc(keys))
            .packed_queries(1, DType::I64)
            .packed_keys(1, DType::I64);
        let builder = match pass {
            attention::Pass::Forward => builder,
            attention::Pass::Backward => builder.gradients(attention::Gradients::QKV),
        };
        backend.capabilities().device == DeviceKind::Cpu
            && backend.supports(&builder.build().unwrap()).is_ok()
    };
    let of_this_build = Registry::default();
    let of_this_build = of_this_build.backends().iter().filter(|backend| serves(&***backend));
    let naive = registry([Toy::new("toy").arc()]);
    std::iter::once(naive)
        .chain(of_this_build.map(|backend| Registry::empty().with(backend.clone())))
        .collect()
}

/// The elements of rows `rows` of a tensor's first axis, with a batch axis of one in front.
fn rows(tensor: &Tensor, rows: std::ops::Range<usize>) -> Tensor {
    let shape = tensor.shape();
    let width: usize = shape[1..].iter().product();
    let data = tensor.as_slice::<f32>().unwrap()[rows.start * width..rows.end * width].to_vec();
    let shape = [&[1, rows.len()], &shape[1..]].concat();
    Tensor::from_vec(data, attention::Dims::from_slice(&shape).unwrap()).unwrap()
}

fn floats(tensor: &Tensor) -> &[f32] {
    tensor.as_slice().unwrap()
}

/// The options of this file's calls: they count from the start of each sequence.
fn options<'a>(registry: &Registry) -> Attention<'a> {
    Attention::new()
        .registry(registry)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .window(Window { left: Some(3), right: None })
        .softcap(5.0)
}

/// Offsets of queries and of keys: an empty sequence, one without queries, one without keys, and rows of no
/// sequence.
const QUERIES: [usize; 6] = [0, 3, 3, 3, 5, 9];
const KEYS: [usize; 6] = [0, 4, 4, 6, 6, 13];
const TOTALS: [usize; 2] = [11, 14];

struct Packed {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
}

fn packed() -> Packed {
    let [queries, keys] = TOTALS;
    Packed {
        q: tensor(&[queries, N, H], 1),
        k: tensor(&[keys, K, H], 2),
        v: tensor(&[keys, K, HV], 3),
        d_out: tensor(&[queries, N, HV], 4),
    }
}

#[test]
fn packed_sequences_are_what_they_are_alone() {
    let Packed { q, k, v, d_out } = packed();
    for registry in implementations(attention::Pass::Backward) {
        let alone = options(&registry);
        let call = options(&registry).packed_queries(QUERIES).packed_keys(KEYS);
        let forward = call.forward_with_lse(&q, &k, &v).unwrap();
        assert_eq!((forward.out.shape(), forward.lse.shape()), ([11, N, HV].into(), [11, N].into()));
        assert_eq!(call.forward(&q, &k, &v).unwrap(), forward.out);
        let gradients = call.backward(&q, &k, &v, &forward, &d_out).unwrap();
        assert_eq!(call.backward_recompute(&q, &k, &v, &d_out).unwrap(), gradients);
        let (dq, dk, dv) = gradients.into_qkv().unwrap();
        assert_eq!([dq.shape(), dk.shape(), dv.shape()], [q.shape(), k.shape(), v.shape()]);
        for b in 0..5 {
            let (queries, keys) = (QUERIES[b]..QUERIES[b + 1], KEYS[b]..KEYS[b + 1]);
            let [q, d_out] = [&q, &d_out].map(|tensor| rows(tensor, queries.clone()));
            let [k, v] = [&k, &v].map(|tensor| rows(tensor, keys.clone()));
            let Forward { out, lse, .. } = &alone.forward_with_lse(&q, &k, &v).unwrap();
            assert_eq!(floats(&rows(&forward.out, queries.clone())), floats(out), "out of sequence {b}");
            assert_eq!(floats(&rows(&forward.lse, queries.clone())), floats(lse), "lse of sequence {b}");
            let want = alone.backward_recompute(&q, &k, &v, &d_out).unwrap().into_qkv().unwrap();
            assert_eq!(floats(&rows(&dq, queries)), floats(&want.0), "dq of sequence {b}");
            assert_eq!(floats(&rows(&dk, keys.clone())), floats(&want.1), "dk of sequence {b}");
            assert_eq!(floats(&rows(&dv, keys)), floats(&want.2), "dv of sequence {b}");
        }
        let zeros = |tensor: &Tensor, from: usize, total| {
            floats(&rows(tensor, from..total)).iter().all(|&x| x == 0.0)
        };
        assert!(zeros(&forward.out, 9, 11) && zeros(&dq, 9, 11) && zeros(&dk, 13, 14) && zeros(&dv, 13, 14));
        assert!(floats(&rows(&forward.lse, 9..11)).iter().all(|&lse| lse == f32::NEG_INFINITY));
    }
}

#[test]
fn heads_may_come_first_and_memory_may_be_the_callers() {
    let Packed { q, k, v, d_out } = packed();
    let heads_first = |tensor: &Tensor| {
        let [rows, heads, width] = tensor.shape()[..] else { panic!("three axes") };
        let from = floats(tensor);
        let at = |index: usize| {
            let (head, row, column) = (index / (rows * width), index / width % rows, index % width);
            from[(row * heads + head) * width + column]
        };
        Tensor::from_vec((0..from.len()).map(at).collect::<Vec<f32>>(), [heads, rows, width]).unwrap()
    };
    for registry in implementations(attention::Pass::Backward) {
        let call = options(&registry).packed_queries(QUERIES).packed_keys(KEYS);
        let want = call.forward_with_lse(&q, &k, &v).unwrap();
        let (dq, dk, dv) = call.backward(&q, &k, &v, &want, &d_out).unwrap().into_qkv().unwrap();

        let swapped = options(&registry).packed_queries(QUERIES).packed_keys(KEYS);
        let swapped = swapped.axis_order(attention::AxisOrder::Bnth);
        let [q1, k1, v1, d_out1] = [&q, &k, &v, &d_out].map(heads_first);
        let forward = swapped.forward_with_lse(&q1, &k1, &v1).unwrap();
        assert_eq!(forward.out, heads_first(&want.out));
        assert_eq!(forward.lse.shape(), [N, 11].into());
        let got = swapped.backward(&q1, &k1, &v1, &forward, &d_out1).unwrap().into_qkv().unwrap();
        assert_eq!(got, (heads_first(&dq), heads_first(&dk), heads_first(&dv)));

        let (mut out, mut lse) = (vec![f32::NAN; 11 * N * HV], vec![f32::NAN; 11 * N]);
        let lse_view = ViewMut::from_slice(&mut lse, [11, N]).unwrap();
        call.forward_into(&q, &k, &v, (&mut out, [11, N, HV]), Some(lse_view)).unwrap();
        assert_eq!((&out[..], &lse[..]), (floats(&want.out), floats(&want.lse)));
        let mut memory = vec![f32::NAN; 14 * K * HV];
        let saved =
            BackwardInputs { out: want.out.view(), lse: want.lse.view(), d_out: d_out.view(), d_lse: None };
        let outputs = BackwardOutputs {
            dv: ViewMut::from_slice(&mut memory, [14, K, HV]).ok(),
            ..BackwardOutputs::default()
        };
        call.backward_into(&q, &k, &v, saved, outputs).unwrap();
        assert_eq!(memory, floats(&dv));
    }
}

/// Pages of 4 with what belongs to no key poisoned: NaN in slots, -1 in entries.
fn paged(k: &Tensor, v: &Tensor) -> ([Tensor; 2], Vec<i32>, Vec<usize>) {
    let lengths: Vec<usize> = (0..5).map(|b| KEYS[b + 1] - KEYS[b]).collect();
    let mut table = vec![-1i32; 5 * 2];
    let mut free = vec![5i32, 0, 3, 6, 1];
    let fill = |tensor: &Tensor, table: &[i32]| {
        let width: usize = tensor.shape()[1..].iter().product();
        let mut pages = vec![f32::NAN; 7 * 4 * width];
        for (b, &length) in lengths.iter().enumerate() {
            for j in 0..length {
                let place = table[b * 2 + j / 4] as usize * 4 + j % 4;
                pages[place * width..][..width]
                    .copy_from_slice(&floats(tensor)[(KEYS[b] + j) * width..][..width]);
            }
        }
        Tensor::from_vec(pages, [7, 4, K, width / K]).unwrap()
    };
    for (b, &length) in lengths.iter().enumerate() {
        (0..length.div_ceil(4)).for_each(|page| table[b * 2 + page] = free.pop().unwrap());
    }
    let pages = [fill(k, &table), fill(v, &table)];
    (pages, table, lengths)
}

#[test]
fn keys_in_pages_are_those_of_packed_and_dense_ones() {
    let Packed { q, k, v, .. } = packed();
    let ([key_pages, value_pages], table, lengths) = paged(&k, &v);
    for registry in implementations(attention::Pass::Forward) {
        let packed = options(&registry).packed_queries(QUERIES).packed_keys(KEYS);
        let want = packed.forward_with_lse(&q, &k, &v).unwrap();
        let call = options(&registry).packed_queries(QUERIES).paged((&table, [5, 2]), &lengths);
        let got = call.forward_with_lse(&q, &key_pages, &value_pages).unwrap();
        assert_eq!((&got.out, &got.lse), (&want.out, &want.lse));
        // Tensors of each integer dtype.
        let narrow = Tensor::from_vec(lengths.iter().map(|&length| length as u32).collect(), [5]).unwrap();
        let wide = Tensor::from_vec(table.iter().map(|&page| i64::from(page)).collect(), [5, 2]).unwrap();
        let starts = Tensor::from_vec(QUERIES.map(|start| start as i32).to_vec(), [6]).unwrap();
        let call = options(&registry).packed_queries(&starts).paged(&wide, &narrow);
        assert_eq!(call.forward(&q, &key_pages, &value_pages).unwrap(), want.out);

        // Dense queries of 2 rows, and pages in both orders of axes.
        let q = tensor(&[5, 2, N, H], 5);
        let dense = |registry: &Registry| options(registry).paged((&table, [5, 2]), &lengths);
        let got = dense(&registry).forward(&q, &key_pages, &value_pages).unwrap();
        assert_eq!(got.shape(), [5, 2, N, HV].into());
        for b in 0..5 {
            let (keys, queries) = (KEYS[b]..KEYS[b + 1], q.view().index_axis(0, b).unwrap());
            let queries = queries.unsqueeze().unwrap();
            let alone = options(&registry).forward(queries, &rows(&k, keys.clone()), &rows(&v, keys));
            let width = 2 * N * HV;
            assert_eq!(&floats(&got)[b * width..][..width], floats(&alone.unwrap()), "sequence {b}");
        }
        let swap = |tensor: &Tensor| tensor.view().permute([0, 2, 1, 3]).unwrap().desc();
        let swapped = |tensor: &'static Tensor| tensor.view().permute([0, 2, 1, 3]).unwrap();
        let [q, key_pages, value_pages]: [&'static Tensor; 3] =
            [q, key_pages.clone(), value_pages.clone()].map(|tensor| &*Box::leak(Box::new(tensor)));
        let call = dense(&registry).axis_order(attention::AxisOrder::Bnth);
        let first = call.forward(swapped(q), swapped(key_pages), swapped(value_pages)).unwrap();
        assert_eq!(first.shape(), [5, N, 2, HV].into());
        assert_eq!(swap(&first).shape(), got.shape());
        let back = first.view().permute([0, 2, 1, 3]).unwrap();
        let back = back.host::<f32>().unwrap();
        for (index, &want) in floats(&got).iter().enumerate() {
            let at = [index / (2 * N * HV), index / (N * HV) % 2, index / HV % N, index % HV];
            assert_eq!(back.at(&at), want);
        }
    }
}

#[test]
fn used_keys_shorten_sequences() {
    let Packed { q, k, v, d_out } = packed();
    let used = [2, 0, 1, 0, 7];
    for registry in implementations(attention::Pass::Backward) {
        let call = options(&registry).packed_queries(QUERIES).packed_keys(KEYS).key_value_lengths(used);
        let forward = call.forward_with_lse(&q, &k, &v).unwrap();
        let (_, dk, dv) = call.backward(&q, &k, &v, &forward, &d_out).unwrap().into_qkv().unwrap();
        for b in 0..5 {
            let queries = QUERIES[b]..QUERIES[b + 1];
            let keys = KEYS[b]..KEYS[b] + used[b];
            let [k, v] = [&k, &v].map(|tensor| rows(tensor, keys.clone()));
            let want = options(&registry).forward(&rows(&q, queries.clone()), &k, &v).unwrap();
            assert_eq!(floats(&rows(&forward.out, queries)), floats(&want), "sequence {b}");
            let left_out = KEYS[b] + used[b]..KEYS[b + 1];
            for gradient in [&dk, &dv] {
                assert!(floats(&rows(gradient, left_out.clone())).iter().all(|&x| x == 0.0));
            }
        }
    }
}

/// A cache `[B, S, K, H]` with lengths under packed queries.
#[test]
fn packed_queries_over_a_dense_cache() {
    let q = tensor(&[3, N, H], 1);
    let (k, v) = (tensor(&[2, 5, K, H], 2), tensor(&[2, 5, K, HV], 3));
    for registry in implementations(attention::Pass::Forward) {
        let call = options(&registry).packed_queries([0, 1, 3]).key_value_lengths([4, 5]);
        let out = call.forward(&q, &k, &v).unwrap();
        for (b, (queries, keys)) in [(0..1, 4), (1..3, 5)].into_iter().enumerate() {
            let part = |tensor: &Tensor| {
                let shape = tensor.shape();
                let width = shape[2] * shape[3];
                let data = floats(tensor)[b * 5 * width..][..keys * width].to_vec();
                Tensor::from_vec(data, [1, keys, shape[2], shape[3]]).unwrap()
            };
            let want = options(&registry).forward(&rows(&q, queries.clone()), &part(&k), &part(&v)).unwrap();
            assert_eq!(floats(&rows(&out, queries)), floats(&want), "sequence {b}");
        }
    }
}

/// Masks and biases have the axes of the longest sequence, which then need no other bound.
#[test]
fn masks_and_biases_are_in_positions_of_the_sequence() {
    let x = tensor(&[7, 2, 4], 1);
    let (mask, bias) = (vec![true; 3 * 4 * 4], tensor(&[1, 2, 4, 4], 2));
    let mut mask = mask;
    mask[16 + 1] = false;
    for registry in implementations(attention::Pass::Backward) {
        let call = Attention::new().registry(&registry).packed([0, 3, 7, 7]);
        let call = call.mask((&mask, [3, 1, 4, 4])).bias(&bias);
        let forward = call.forward_with_lse(&x, &x, &x).unwrap();
        assert_eq!(forward.problem().dims().query_length, 4);
        let dbias = call.backward(&x, &x, &x, &forward, &x).unwrap().dbias.unwrap();
        assert_eq!(dbias.shape(), bias.shape());
        for (b, queries) in [(0usize, 0..3usize), (1, 3..7)] {
            let length = queries.len();
            let narrow = |view: View<'static>| {
                let rows = view.narrow(2, 0..length).unwrap();
                rows.narrow(3, 0..length).unwrap()
            };
            let mask: &'static [bool] = mask[b * 16..][..16].to_vec().leak();
            let mask = narrow(View::from_slice(mask, [1, 1, 4, 4]).unwrap());
            let bias: &'static Tensor = Box::leak(Box::new(bias.clone()));
            let x = rows(&x, queries.clone());
            let alone = Attention::new().registry(&registry).mask(mask).bias(narrow(bias.view()));
            assert_eq!(floats(&rows(&forward.out, queries)), floats(&alone.forward(&x, &x, &x).unwrap()));
        }
    }
}

#[track_caller]
fn refused(call: Attention<'_>, query: &Tensor, key: &Tensor, value: &Tensor) -> String {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let call = call.registry(&registry);
    let error = call.forward_with_lse(query, key, value).unwrap_err();
    assert_eq!(call.problem(query, key, value).unwrap_err().to_string(), error.to_string());
    assert!(matches!(error, Error::Core(_) | Error::MixedRanks { .. }), "{error}");
    assert_eq!((toy.plans(), toy.runs()), (0, 0));
    error.to_string()
}

#[test]
fn wrong_offsets_are_told_with_their_numbers() {
    let x = tensor(&[7, 2, 4], 1);
    let told = |call: Attention<'_>| refused(call, &x, &x, &x);
    let rising = "starts rise from 0 to at most the rows of the tensor";
    assert_eq!(
        told(Attention::new().packed([0, 4, 3, 7])),
        format!("invalid call: query start 2 is 3, expected 4 to 7: {rising}")
    );
    assert_eq!(
        told(Attention::new().packed([1, 4, 7])),
        format!("invalid call: query start 0 is 1, expected 0 to 0: {rising}")
    );
    assert_eq!(
        told(Attention::new().packed([0, 4, 8])),
        format!("invalid call: query start 2 is 8, expected 4 to 7: {rising}")
    );
    assert_eq!(
        told(Attention::new().packed([0i64, i64::MIN, i64::MAX])),
        format!("invalid call: query start 1 is {}, expected 0 to 7: {rising}", i64::MIN)
    );
    assert_eq!(
        told(Attention::new().packed_queries([0, 4, 7]).packed_keys([0, 4, 9])),
        format!("invalid call: key/value start 2 is 9, expected 4 to 7: {rising}")
    );
    assert_eq!(
        told(Attention::new().packed_queries([0, 4, 7]).packed_keys([0, 7])),
        "invalid call: key/value starts has shape [2], expected [3] ([B + 1]; B of the query starts)"
    );
    assert_eq!(
        told(Attention::new().packed([0usize; 0])),
        "invalid call: query starts has shape [0], expected [1] ([B + 1])"
    );
    assert_eq!(
        told(Attention::new().packed([0, 4, 7]).longest(3, None)),
        "invalid call: sequence 0 has 4 query rows, and the problem was made for at most 3 (`longest`)"
    );
    assert_eq!(
        told(Attention::new().packed([0, 4, 7]).key_value_lengths([4, 4])),
        "invalid call: sequence 1 has room for 3 keys, and its key/value length is 4"
    );
    assert_eq!(
        told(Attention::new().packed([0, 4, 7]).query_lengths([4, 3])),
        "invalid call: packed queries have no query lengths, their starts say how long a sequence is"
    );
    assert_eq!(
        told(Attention::new().packed_keys([0, 4, 7])),
        "invalid call: query has rank 3 (shape [7, 2, 4]), expected rank 4 ([B, T, N, H]), or 3 ([total, N, H]) with \
         `packed_queries`"
    );
    assert_eq!(
        told(Attention::new().packed_queries([0, 4, 7])),
        "invalid call: key has rank 3 (shape [7, 2, 4]), expected rank 4 ([B, S, K, H or Hv]), or 3 ([total, K, H or Hv]) \
         with `packed`"
    );
    assert_eq!(
        told(Attention::new().longest(4, 4)),
        "invalid call: only packed queries have a longest sequence, others have their tensor's length"
    );
    let floats = [0.0f32, 7.0];
    assert_eq!(
        told(Attention::new().packed((&floats, [2]))),
        "invalid call: query starts has dtype f32, expected i32, u32 or i64"
    );
}

#[test]
fn shapes_of_packed_tensors_are_told() {
    let x = tensor(&[7, 2, 4], 1);
    let packed = || Attention::new().packed([0, 4, 7]);
    let batched = tensor(&[2, 7, 2, 4], 1);
    assert_eq!(
        refused(packed(), &batched, &batched, &batched),
        "invalid call: query has rank 4 (shape [2, 7, 2, 4]), expected rank 3 ([total, N, H]), as queries are packed"
    );
    let flat = tensor(&[7, 8], 1);
    assert_eq!(
        refused(packed(), &flat, &x, &x),
        "invalid call: query has rank 2 (shape [7, 8]), expected rank 3 ([total, N, H]), as queries are packed"
    );
    assert_eq!(
        refused(packed().axis_order(attention::AxisOrder::Bnth), &x, &flat, &x),
        "invalid call: key has rank 2 (shape [7, 8]), expected rank 3 ([K, total, H or Hv]), as keys are packed"
    );
    // 2 heads of 7 tokens, read as 7 heads of 2.
    let heads_first = tensor(&[2, 7, 4], 1);
    let text = refused(Attention::new().packed([0, 4, 7]), &heads_first, &x, &x);
    assert!(
        text.starts_with("invalid call: 7 query heads are not a multiple of 2 key/value heads"),
        "{text}"
    );
    let registry = registry([Toy::new("toy").arc()]);
    let call = packed().registry(&registry);
    let mut out = vec![7.0f32; 56];
    let error = call.forward_into(&x, &x, &x, (&mut out, [1, 7, 2, 4]), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has rank 4 (shape [1, 7, 2, 4]), expected rank 3, as queries are packed"
    );
    let forward = call.forward_with_lse(&x, &x, &x).unwrap();
    let mut dk = Tensor::zeros::<f32>([1, 7, 2, 4]).unwrap();
    let saved =
        BackwardInputs { out: forward.out.view(), lse: forward.lse.view(), d_out: x.view(), d_lse: None };
    let outputs = BackwardOutputs { dk: Some(dk.view_mut()), ..BackwardOutputs::default() };
    let error = call.backward_into(&x, &x, &x, saved, outputs).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: dk has rank 4 (shape [1, 7, 2, 4]), expected rank 3, as keys are packed"
    );
    assert!(out.iter().all(|&x| x == 7.0));
}

#[test]
fn wrong_tables_and_lengths_are_told_with_their_numbers() {
    let (q, pages) = (tensor(&[2, 1, 2, 4], 1), tensor(&[3, 4, 2, 4], 2));
    let (table, beyond, below) = ([2i32, -1, 2, 0], [2i32, -1, 2, 3], [2i32, -1, 2, -5]);
    let told = |call: Attention<'_>| refused(call, &q, &pages, &pages);
    assert_eq!(
        told(Attention::new().paged((&table, [2, 2]), [3, 9])),
        "invalid call: sequence 1 has room for 8 keys, and its key/value length is 9"
    );
    assert_eq!(
        told(Attention::new().paged((&table, [2, 2]), [-1, 8])),
        "invalid call: sequence 0 has room for 8 keys, and its key/value length is -1"
    );
    assert_eq!(
        told(Attention::new().paged((&table, [2, 2]), [5, 8])),
        "invalid call: block table entry 1 of sequence 0 is -1, which is none of 3 pages"
    );
    assert_eq!(
        told(Attention::new().paged((&beyond, [2, 2]), [4, 5])),
        "invalid call: block table entry 1 of sequence 1 is 3, which is none of 3 pages"
    );
    assert_eq!(
        told(Attention::new().paged((&below, [2, 2]), [4, 8])),
        "invalid call: block table entry 1 of sequence 1 is -5, which is none of 3 pages"
    );
    assert_eq!(
        told(Attention::new().paged((&table, [2, 2]), [4])),
        "invalid call: key/value lengths has shape [1], expected [2] ([B])"
    );
    assert_eq!(
        told(Attention::new().paged((&table[..2], [1, 2]), [4])),
        "invalid call: query has shape [2, 1, 2, 4], expected [1, 1, 2, 4] ([B, T, N, H]; B of the block table)"
    );
    assert_eq!(
        told(Attention::new().paged((&table, [4]), [4, 8])),
        "invalid call: block table has rank 1 (shape [4]), expected rank 2 ([B, most])"
    );
    assert_eq!(
        told(Attention::new().packed_queries([0, 1]).paged((&table, [2, 2]), [4, 8])),
        "invalid call: query has rank 4 (shape [2, 1, 2, 4]), expected rank 3 ([total, N, H]), as queries are packed"
    );
    assert_eq!(
        told(Attention::new().paged((&table, [2, 2]), [3, 8]).longest(None, 7)),
        "invalid call: sequence 1 has 8 keys, and the problem was made for at most 7 (`longest`)"
    );
    let three = tensor(&[12, 2, 4], 2);
    assert_eq!(
        refused(Attention::new().paged((&table, [2, 2]), [3, 8]), &q, &three, &three),
        "invalid call: key has rank 3 (shape [12, 2, 4]), expected rank 4 ([pages, page size, K, H or Hv]), as keys are in \
         pages"
    );
    let x = tensor(&[2, 2, 4], 1);
    assert_eq!(
        refused(Attention::new().paged((&table, [2, 2]), [3, 8]), &x, &pages, &pages),
        "invalid call: query has rank 3 (shape [2, 2, 4]), expected rank 4 ([B, T, N, H]), or 3 ([total, N, H]) with \
         `packed_queries`"
    );
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry).paged((&table, [2, 2]), [3, 8]);
    assert_eq!(
        call.backward_recompute(&q, &pages, &pages, &q).unwrap_err().to_string(),
        "invalid call: keys in pages have no backward pass: sequences may share a page"
    );
    assert_eq!(
        call.clone().packed([0, 1, 2]).forward(&x, &x, &x).unwrap_err().to_string(),
        "invalid call: keys are packed (key/value starts) or in pages (block table), not both"
    );
    let error = Attention::new().paged((&table, [3, 2]), [3, 8]).forward(&q, &pages, &pages).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: block table: shape [3, 2] has 6 elements, the slice has 4");
    assert!(matches!(
        error,
        Error::Input { role: Role::BlockTable, source: InvalidCall::BufferLength { .. } }
    ));
}

#[test]
fn backward_refuses_the_forward_of_other_sequences() {
    let x = tensor(&[7, 2, 4], 1);
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry).packed([0, 4, 7]);
    let forward = call.forward_with_lse(&x, &x, &x).unwrap();
    let starts = [0i32, 4, 7];
    let same = call.clone().packed((&starts, [3]));
    assert!(same.backward(&x, &x, &x, &forward, &x).is_ok());
    for (other, said) in [
        (call.clone().packed([0, 3, 7]), "query starts [0, 3, 7], its forward had [0, 4, 7]"),
        (call.clone().packed_keys([0, 3, 7]), "key/value starts [0, 3, 7], its forward had [0, 4, 7]"),
        (call.clone().packed([0, 4]), "query starts [0, 4], its forward had [0, 4, 7]"),
        (call.clone().key_value_lengths([4, 2]), "key/value lengths [4, 2], its forward had full"),
        (Attention::new().registry(&registry), "query starts none, its forward had [0, 4, 7]"),
    ] {
        let text = other.backward(&x, &x, &x, &forward, &x).unwrap_err().to_string();
        assert!(text.starts_with(&format!("invalid call: backward has {said}")), "{text}");
    }
}

/// Offsets are numbers of the call: what is planned for is how long the longest sequence may be.
#[test]
fn calls_that_differ_in_their_offsets_share_plans() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let x = tensor(&[32, 2, 4], 1);
    let run = |call: Attention<'_>| call.registry(&registry).forward(&x, &x, &x).unwrap();
    for longest in 17..=32 {
        run(Attention::new().packed([0, longest, 32]));
    }
    assert_eq!((toy.plans(), toy.last().dims().query_length), (1, 32));
    run(Attention::new().packed([0, 16, 32]));
    assert_eq!((toy.plans(), toy.last().dims().query_length), (2, 16));
    // One bound for all of them.
    for longest in [1, 16, 20, 24] {
        run(Attention::new().packed([0, longest, longest]).longest(24, 24));
    }
    assert_eq!((toy.plans(), toy.last().dims().key_length), (3, 24));
    // No sequence has a row, and the tensor has.
    run(Attention::new().packed([0, 0, 0]));
    assert_eq!(toy.last().dims().query_length, 1);

    // Held, and called with other offsets.
    let call = Attention::new().registry(&registry).packed([0, 20, 32]);
    let plan = call.plan(&call.problem(&x, &x, &x).unwrap()).unwrap();
    for starts in [[0, 0, 32], [0, 32, 32], [0, 5, 9]] {
        let other = Attention::new().packed(starts);
        let mut out = Tensor::zeros::<f32>([32, 2, 4]).unwrap();
        let inputs = Inputs { data: other.data(), ..Inputs::new(x.view(), x.view(), x.view()) };
        plan.forward_into(inputs, ForwardOutputs { out: out.view_mut(), lse: None }).unwrap();
        assert_eq!(out, run(other));
    }
}

#[test]
fn a_cache_that_grows_page_by_page_is_planned_once() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let pages = tensor(&[6, 4, 2, 4], 1);
    let q = tensor(&[2, 1, 2, 4], 2);
    let mut table = [-1i32; 6];
    for length in 0..=12usize {
        (0..length.div_ceil(4))
            .for_each(|page| (table[page], table[3 + page]) = (page as i32, 5 - page as i32));
        let call = Attention::new().registry(&registry).paged((&table, [2, 3]), [length, length / 2]);
        call.forward(&q, &pages, &pages).unwrap();
    }
    assert_eq!((toy.plans(), toy.runs(), toy.last().dims().key_length), (1, 13, 12));
}

#[test]
fn explanations_have_the_sequences_and_the_refusals_of_who_does_not_serve_them() {
    let mut without = Toy::new("without");
    let features = attention::core::FeatureSet::SEQUENCES;
    let other = attention::core::FeatureSet::all().difference(features);
    without.capabilities.forward = attention::core::PassCapabilities::new(other);
    let registry = registry([without.arc(), Toy::new("toy").arc()]);
    let (x, pages) = (tensor(&[7, 2, 4], 1), tensor(&[3, 4, 2, 4], 2));
    let call = Attention::new().registry(&registry).packed([0, 4, 7]).causal(true);
    let explanation = call.explain(&x, &x, &x).unwrap();
    assert_eq!(explanation.chosen().unwrap().name, "toy");
    let text = explanation.to_string();
    assert!(text.starts_with("forward f32 B2 T4 S4 N2 K2 H4 on cpu, causal, packed queries"), "{text}");
    assert!(text.contains("without does not support packed queries in its forward pass"), "{text}");
    let table = [0i32, 1, 2];
    let call = Attention::new().registry(&registry).packed_queries([0, 7]).paged((&table, [1, 3]), [9]);
    let explanation = call.clone().causal(true).explain(&x, &pages, &pages).unwrap();
    let text = explanation.to_string();
    assert!(text.contains("paged keys and values"), "{text}");
    assert!(text.contains("T = 7, S = 9 of sequence 0") && text.contains("hides the last 2 keys"), "{text}");
}

/// The same bits as the padded form, whatever the order of the sequences in memory is.
#[test]
fn dropout_counts_sequences() {
    let x = tensor(&[7, 2, 4], 1);
    for registry in implementations(attention::Pass::Forward) {
        let call = Attention::new().registry(&registry).dropout(Dropout::new(0.5, 3));
        let packed = call.clone().packed([0, 3, 7]).forward(&x, &x, &x).unwrap();
        let mut padded = vec![0.0f32; 2 * 4 * 8];
        padded[..24].copy_from_slice(&floats(&x)[..24]);
        padded[32..].copy_from_slice(&floats(&x)[24..]);
        let padded = (&padded, [2, 4, 2, 4]);
        let want =
            call.query_lengths([3, 4]).key_value_lengths([3, 4]).forward(padded, padded, padded).unwrap();
        assert_eq!(&floats(&packed)[..24], &floats(&want)[..24]);
        assert_eq!(&floats(&packed)[24..], &floats(&want)[32..]);
    }
}

/// One number for all offsets and lengths takes no memory, and neither does what a result keeps of them.
#[test]
fn any_number_of_empty_sequences_is_one_call() {
    let many = 1 << 40;
    let all = |count: usize| View::strided(&[0i32], 0, [count], [0]).unwrap();
    let x = tensor(&[3, 2, 4], 1);
    // The naive one goes through all sequences.
    for registry in implementations(attention::Pass::Forward).into_iter().skip(1) {
        let call = Attention::new().registry(&registry).packed(all(many + 1)).longest(3, 3).causal(true);
        for call in [call.clone().key_value_lengths(all(many)), call.clone().query_offsets(all(many)), call] {
            let forward = call.forward_with_lse(&x, &x, &x).unwrap();
            assert!(floats(&forward.out).iter().all(|&out| out == 0.0));
            assert!(floats(&forward.lse).iter().all(|&lse| lse == f32::NEG_INFINITY));
            assert!(call.explain(&x, &x, &x).unwrap().notes.is_empty());
            let gradients = call.backward_recompute(&x, &x, &x, &x).unwrap();
            for gradient in [gradients.dq, gradients.dk, gradients.dv].map(Option::unwrap) {
                assert!(floats(&gradient).iter().all(|&gradient| gradient == 0.0));
            }
        }
    }
}

#[cfg(feature = "serde")]
#[test]
fn offsets_and_bounds_are_stored_with_the_options() {
    use attention::Options;
    let options: Options =
        serde_json::from_str(r#"{"query_starts":[0,4,7],"key_value_starts":[0,4,7],"longest_query":4}"#)
            .unwrap();
    let again: Options = serde_json::from_str(&serde_json::to_string(&options).unwrap()).unwrap();
    assert_eq!(options, again);
    let x = tensor(&[7, 2, 4], 1);
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    let want = call.clone().packed([0, 4, 7]).forward(&x, &x, &x).unwrap();
    assert_eq!(call.options(options).forward(&x, &x, &x).unwrap(), want);
}
