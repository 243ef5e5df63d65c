use std::mem::offset_of;

use attention_core::{CallData, Device, QueryOffset, View, Window};

use super::*;
use crate::layout::{assert_laid_out, laid_out};
use crate::sequences::FAR;

/// The text that every fused kernel begins with.
fn text() -> &'static str {
    attention_kernels::source("attention_forward.cu").expect("it is in the package").text
}

/// The field of a number in the kernels.
fn field_of_number(role: Role) -> String {
    role.name().replace([' ', '/'], "_")
}

/// The field of a role's tensor in the kernels, without underscores.
fn field(role: Role) -> String {
    match role {
        Role::AlibiSlopes => "slopes".to_owned(),
        role => format!("{role:?}").to_lowercase(),
    }
}

#[test]
fn structs_are_laid_out_as_in_the_kernels() {
    let text = text();
    assert_laid_out!(text, Integers: data, stride, dtype, padding);
    assert_laid_out!(text, SequenceRows: offset, low, high, queries, keys);
    assert_laid_out!(text, RowLengths: queries, keys);
    assert_laid_out!(text, Scales: data, batch_stride, head_stride);
    let (tensor, size, _) = laid_out(text, "Tensor");
    assert_eq!((tensor[1].1, size), (offset_of!(Tensor, stride), size_of::<Tensor>()));
    assert!(text.contains(&format!("static_assert(sizeof(ScheduledTile) == {SCHEDULED_TILE},")));
    // The host has the tensors as an array.
    let (fields, size, _) = laid_out(text, "Parameters");
    let names: Vec<String> = fields[..ROLES].iter().map(|(name, _)| name.replace('_', "")).collect();
    assert_eq!(names, tensor_roles().map(field).collect::<Vec<_>>());
    assert!((0..ROLES).all(|index| fields[index].1 == index * size_of::<Tensor>()));
    assert_eq!(size, size_of::<Parameters>());
    macro_rules! offsets {
        ($($field:ident),*) => {{
            // Every field is in the list.
            let _ = |Parameters { tensors: _, $($field: _),* }: Parameters| ();
            vec![$((stringify!($field).to_owned(), offset_of!(Parameters, $field))),*]
        }};
    }
    let expected = offsets!(
        query_lengths,
        key_value_lengths,
        query_offsets,
        dropout_seed,
        dropout_offset,
        uniform_sequence,
        query_offset,
        least_offset,
        most_offset,
        keys_before,
        keys_after,
        partial_out_or_row_offsets,
        partial_state_or_row_deltas,
        query_sums,
        query_turns,
        query_tiles,
        batch,
        query_length,
        key_length,
        query_heads,
        key_heads,
        bias_size,
        scale,
        softcap,
        keep_scale,
        balance,
        unbalance,
        head_dim,
        value_head_dim,
        group,
        pack_gqa,
        splits,
        aligned,
        bias_dtype,
        slopes_dtype,
        sinks_dtype,
        hides_keys,
        drop_threshold,
        drop_key,
        drop_offset,
        swizzle,
        swizzles_batch,
        rows_vary,
        has_lengths,
        is_bottom_right,
        forward_tiles,
        lengths,
        query_starts,
        key_value_starts,
        block_table,
        block_table_row,
        query_rows,
        key_rows,
        pages,
        page_size,
        most_keys,
        schedule,
        key_scales,
        value_scales,
        key_scale,
        value_scale
    );
    assert_eq!(fields[ROLES..], expected);
    assert!(text.contains(&format!("RowLengths lengths[{INLINE_ROWS}];")));
}

#[test]
fn numbers_are_integers_of_their_roles() {
    let text = text();
    for role in Role::DATA.into_iter().chain(Role::SEQUENCES) {
        assert!(text.contains(&field_of_number(role)), "{role}");
    }
    // The roles with tensors come first, in the order of the array.
    assert!(tensor_roles().enumerate().all(|(index, role)| role as usize == index));
}

#[test]
fn the_bits_of_aligned_tensors_are_those_of_the_kernels() {
    let defines = text().lines().filter_map(|line| line.strip_prefix("#define ALIGNED_"));
    let mut count = 0;
    for (name, bit) in defines.map(|define| define.split_once(' ').unwrap()) {
        let name = name.replace('_', "").to_lowercase();
        let role = Role::ALL.into_iter().find(|&role| field(role) == name).unwrap();
        assert_eq!(bit, format!("(1 << {})", role as usize), "{name}");
        count += 1;
    }
    assert_eq!(count, 10);
}

/// `sequence_of_numbers` of the kernels, with the numbers that a call has in device memory.
fn sequence_of(p: &Parameters, batch: usize, on_device: impl Fn(Role) -> i64) -> SequenceRows {
    let far = |position: i128| position.clamp(-FAR, FAR) as i64;
    let mut lengths = RowLengths { queries: p.query_length as i32, keys: p.key_length as i32 };
    if p.has_lengths != 0 {
        lengths = p.lengths.0[batch];
    }
    if p.query_lengths.data != 0 {
        lengths.queries = on_device(Role::QueryLengths).clamp(0, p.query_length) as i32;
    }
    if p.key_value_lengths.data != 0 {
        lengths.keys = on_device(Role::KeyValueLengths).clamp(0, p.key_length) as i32;
    }
    let mut offset = p.query_offset;
    if p.query_offsets.data != 0 {
        offset = on_device(Role::QueryOffsets).clamp(p.least_offset, p.most_offset);
    }
    if p.is_bottom_right != 0 {
        offset = i64::from(lengths.keys - lengths.queries);
    }
    SequenceRows {
        offset: offset.clamp(-(1 << 60), 1 << 60),
        low: far(i128::from(offset) - i128::from(p.keys_before)),
        high: far(i128::from(offset) + i128::from(p.keys_after)),
        queries: lengths.queries,
        keys: lengths.keys,
    }
}

const BATCH: usize = 3;

fn problem(data: &CallData<'_>, causal: bool, window: Window) -> Problem {
    let tokens = |length| TensorDesc::contiguous(DType::F32, [BATCH, length, 2, 8]);
    let builder = Problem::builder(tokens(7), tokens(9), tokens(9)).device(Device::Cuda(0)).data(data);
    builder.causal(causal).window(window).build().unwrap()
}

/// Every combination of lengths and offsets in host memory, with every structure: the parameters say what the
/// call says.
#[test]
fn rows_are_those_of_the_call_wherever_its_numbers_are() {
    const EXTREMES: [i64; BATCH] = [i64::MIN, 1 << 62, i64::MAX];
    let windows = [0, 2, 1 << 50, usize::MAX - 1, usize::MAX]
        .into_iter()
        .flat_map(|size| {
            [
                Window::new(size, size),
                Window { left: Some(size), right: None },
                Window { left: None, right: Some(size) },
            ]
        })
        .chain([Window::UNBOUNDED]);
    let (query, key) = ([7i64, 0, 4], [2i64, 9, 0]);
    let (near, far) = ([3i64, -2, 0], EXTREMES);
    let by_row = |numbers| Some(View::from_slice(numbers, [BATCH]).unwrap());
    let alignments = [QueryOffset::TOP_LEFT, QueryOffset::BottomRight, QueryOffset::Fixed(-3)]
        .into_iter()
        .chain(EXTREMES.map(QueryOffset::Fixed))
        .map(|offset| (offset, None))
        .chain([(QueryOffset::TOP_LEFT, Some(&near)), (QueryOffset::TOP_LEFT, Some(&far))]);
    let lengths = [(false, false), (true, false), (false, true), (true, true)];
    let (mut uniform, mut varying) = (0, 0);
    for window in windows {
        for (query_offset, offsets) in alignments.clone() {
            for ((has_query, has_key), causal) in
                lengths.into_iter().flat_map(|lengths| [(lengths, false), (lengths, true)])
            {
                let data = CallData {
                    query_offset,
                    query_offsets: offsets.and_then(|offsets| by_row(&offsets[..])),
                    query_lengths: has_query.then(|| by_row(&query[..])).flatten(),
                    key_value_lengths: has_key.then(|| by_row(&key[..])).flatten(),
                    ..CallData::default()
                };
                let problem = problem(&data, causal, window);
                let call = CallProblem::new(&problem, &data).unwrap();
                let mut parameters = ProblemParameters::new(&problem).of_call(&call, 4096);
                let want = |batch: usize| SequenceRows::of(&call.sequence(batch));
                let what = format!("{problem}: {data:?}");
                if parameters.rows_vary == 0 {
                    uniform += 1;
                    assert!((0..BATCH).all(|batch| parameters.uniform_sequence == want(batch)), "{what}");
                    continue;
                }
                varying += 1;
                for batch in 0..BATCH {
                    let stored = |role| match role {
                        Role::QueryOffsets => offsets.unwrap()[batch],
                        _ => unreachable!("{role} is a part of the parameters"),
                    };
                    assert_eq!(sequence_of(&parameters, batch, stored), want(batch), "{what}");
                }
                // The same in device memory, but for lengths out of their bounds.
                parameters.has_lengths = 0;
                parameters.query_lengths.data = 64 * u64::from(has_query);
                parameters.key_value_lengths.data = 64 * u64::from(has_key);
                for batch in 0..BATCH {
                    let beyond = |length: i64, most: i64| match length {
                        0 => -5,
                        length if length == most => i64::MAX,
                        length => length,
                    };
                    let device = |role| match role {
                        Role::QueryLengths => beyond(query[batch], 7),
                        Role::KeyValueLengths => beyond(key[batch], 9),
                        _ => offsets.unwrap()[batch],
                    };
                    assert_eq!(sequence_of(&parameters, batch, device), want(batch), "{what}");
                }
            }
        }
    }
    assert!(uniform > 100 && varying > 100, "{uniform} and {varying}");
}

#[test]
fn numbers_of_a_call_are_set_for_each_call() {
    use attention_core::Dropout;

    let lengths = [3i32, 9, 1];
    let data = |scale: f64, seed: u64| CallData {
        scale: Some(scale),
        softcap: Some(2.0 * scale),
        dropout: Some(Dropout::new(0.25, seed).with_offset(7)),
        key_value_lengths: Some(View::from_slice(&lengths, [BATCH]).unwrap()),
        ..CallData::default()
    };
    let problem = problem(&data(1.0, 0), true, Window::UNBOUNDED);
    let planned = ProblemParameters::new(&problem);
    for (scale, seed) in [(0.5, 1 << 40 | 3), (64.0, u64::MAX)] {
        let call = CallProblem::new(&problem, &data(scale, seed)).unwrap();
        let p = planned.of_call(&call, 0);
        assert_eq!((p.scale, p.softcap, p.drop_threshold, p.drop_offset), (scale, 2.0 * scale, 16384, 7));
        assert_eq!(p.drop_key, [seed as u32, (seed >> 32) as u32]);
        assert_eq!((p.balance, p.unbalance), (1.0, 1.0));
        assert_eq!(p.keep_scale, 4.0 / 3.0);
        assert_eq!(p.lengths.0.map(|lengths| lengths.keys)[..BATCH], lengths);
        assert_eq!(p.lengths.0.map(|lengths| lengths.queries)[..BATCH], [7; BATCH]);
    }
}

#[test]
fn the_balance_of_gradients_is_a_normal_number_of_f32() {
    let tokens = TensorDesc::contiguous(DType::F64, [1, 1, 1, 8]);
    let problem = Problem::builder(tokens, tokens, tokens).any_scale(true).build().unwrap();
    let planned = ProblemParameters::new(&problem);
    for (scale, exponent) in
        [(0.0, 0), (0.125, 0), (-3e6, 0), (2e38, 63), (-1e-37, -62), (1e-300, -126), (1e300, 126)]
    {
        let data = CallData { scale: Some(scale), ..CallData::default() };
        let p = planned.of_call(&CallProblem::new(&problem, &data).unwrap(), 0);
        let powers = (2f32.powi(exponent), 2f32.powi(-exponent));
        assert_eq!((p.balance, p.unbalance), powers, "{scale:e}");
    }
}

#[test]
fn numbers_in_device_memory_are_found_by_their_role() {
    let tokens = TensorDesc::contiguous(DType::F16, [BATCH, 7, 2, 8]);
    let strided = TensorDesc::strided(DType::U32, [BATCH], [-5]).unwrap();
    let problem = Problem::builder(tokens, tokens, tokens)
        .device(Device::Cuda(0))
        .layout(Role::KeyValueLengths, strided)
        .query_offsets(OffsetRange::Near, DType::I64)
        .dropout_rate(0.5)
        .layout(Role::DropoutSeed, TensorDesc::contiguous(DType::I32, [1]))
        .build()
        .unwrap();
    let data = [Role::KeyValueLengths, Role::QueryOffsets, Role::DropoutSeed];
    let mut p = ProblemParameters::new(&problem).of_call(&CallProblem::at_bounds(&problem), 0);
    for (index, role) in data.into_iter().enumerate() {
        p.set(role, 100 + index as u64);
    }
    let of = |integers: Integers| (integers.data, integers.stride, integers.dtype);
    assert_eq!(of(p.key_value_lengths), (100, -5, DTypeCode::U32.code()));
    assert_eq!(of(p.query_offsets), (101, 1, DTypeCode::I64.code()));
    assert_eq!(of(p.dropout_seed), (102, 1, DTypeCode::I32.code()));
    assert_eq!((p.query_lengths, p.dropout_offset), (Integers::default(), Integers::default()));
    assert_eq!((p.rows_vary, p.has_lengths, p.most_offset), (1, 0, OffsetRange::NEAR));
    // No tensor lost the bit that says that its rows are aligned.
    assert_eq!(p.aligned & 7, 7);
}

#[test]
fn scales_are_found_wherever_they_are() {
    let query = TensorDesc::contiguous(DType::F16, [BATCH, 1, 4, 16]);
    let key = TensorDesc::contiguous(DType::F8E5M2, [BATCH, 9, 2, 16]);
    let builder = Problem::builder(query, key, key).device(Device::Cuda(0));
    let (one, each) = ([0.25f32], [1.0f32; 2 * BATCH]);
    // In host memory: one is a part of the parameters, others are stored.
    let data = CallData {
        key_scales: Some(View::from_slice(&one, [1]).unwrap()),
        value_scales: Some(View::from_slice(&each, [BATCH, 2]).unwrap()),
        ..CallData::default()
    };
    let problem = builder.clone().data(&data).build().unwrap();
    let p = ProblemParameters::new(&problem).of_call(&CallProblem::new(&problem, &data).unwrap(), 512);
    assert_eq!((p.key_scales, p.key_scale), (Scales::default(), 0.25));
    assert_eq!(p.value_scales, Scales { data: 512, batch_stride: 4, head_stride: 2 });
    // In device memory.
    let strided = TensorDesc::strided(DType::F32, [BATCH, 2], [-7, 3]).unwrap();
    let heads = TensorDesc::strided(DType::F32, [2], [5]).unwrap();
    let problem = builder.clone().key_scales(strided).value_scales(heads).build().unwrap();
    let mut p = ProblemParameters::new(&problem).of_call(&CallProblem::at_bounds(&problem), 512);
    p.set(Role::KeyScales, 640);
    p.set(Role::ValueScales, 644);
    assert_eq!(p.key_scales, Scales { data: 640, batch_stride: -7, head_stride: 3 });
    assert_eq!(p.value_scales, Scales { data: 644, batch_stride: 0, head_stride: 5 });
    let problem = builder.key_scales(TensorDesc::contiguous(DType::F32, [1])).build().unwrap();
    let mut p = ProblemParameters::new(&problem).of_call(&CallProblem::at_bounds(&problem), 512);
    p.set(Role::KeyScales, 640);
    assert_eq!(p.key_scales, Scales { data: 640, ..Scales::default() });
    assert_eq!((p.value_scales, p.value_scale), (Scales::default(), 1.0));
    // Rows of 16 bytes are aligned.
    assert_eq!(p.aligned & 7, 7);
}

/// The first row and the number of rows of a sequence among packed rows, as `place_packed` of the kernels has
/// them.
fn placed(starts: &[i64], rows: i64, batch: usize) -> (i64, i64) {
    let start = |index: usize| starts[index].clamp(0, rows);
    (start(batch), (start(batch + 1) - start(batch)).max(0))
}

/// `place_rows` of the kernels says what the call says, and starts out of their bounds stay inside the
/// tensor.
#[test]
fn rows_of_packed_sequences_are_where_the_call_has_them() {
    let (queries, keys, used) = ([0i64, 2, 2, 6], [0i64, 5, 8, 9], [2i64, 3, 0]);
    let tokens = |rows, heads| TensorDesc::contiguous(DType::F32, [rows, heads, 8]);
    let starts = |numbers: &'static [i64; 4]| Some(View::from_slice(numbers, [4]).unwrap());
    let (query_starts, key_value_starts) = (starts(&[0, 2, 2, 6]), starts(&[0, 5, 8, 9]));
    for has_lengths in [false, true] {
        let data = CallData {
            query_starts,
            key_value_starts,
            key_value_lengths: has_lengths.then(|| View::from_slice(&used, [3]).unwrap()),
            query_offset: QueryOffset::BottomRight,
            ..CallData::default()
        };
        let builder = Problem::builder(tokens(7, 4), tokens(11, 2), tokens(11, 2)).device(Device::Cuda(0));
        let problem = builder.data(&data).longest(4, 6).causal(true).build().unwrap();
        let call = CallProblem::new(&problem, &data).unwrap();
        let p = ProblemParameters::new(&problem).of_call(&call, 4096);
        assert_eq!((p.rows_vary, p.query_rows, p.key_rows, p.pages), (1, 7, 11, 0));
        // Both starts are stored, the lengths are a part of the parameters.
        assert_eq!(
            (p.query_starts, p.key_value_starts),
            (Integers::stored_at(4096), Integers::stored_at(4128))
        );
        for batch in 0..3 {
            let (first_query, query_rows) = placed(&queries, p.query_rows, batch);
            let (first_key, key_rows) = placed(&keys, p.key_rows, batch);
            let (of_queries, of_keys) = (call.query_places(batch), call.key_places(batch));
            assert_eq!((query_rows, key_rows), (of_queries.rows() as i64, of_keys.rows() as i64));
            assert!(query_rows == 0 || of_queries.of(0) == [0, first_query as usize]);
            assert!(key_rows == 0 || of_keys.of(0) == [0, first_key as usize]);
            // As `sequence_of_numbers` goes on, from lengths that the rows bound.
            let mut bounded = p;
            bounded.has_lengths = 1;
            let given = if has_lengths { p.lengths.0[batch].keys } else { p.key_length as i32 };
            bounded.lengths.0[batch] = RowLengths {
                queries: p.query_length.min(query_rows) as i32,
                keys: given.min(key_rows as i32),
            };
            let got = sequence_of(&bounded, batch, |role| unreachable!("{role} is not read"));
            assert_eq!(got, SequenceRows::of(&call.sequence(batch)));
        }
    }
    for wild in [[i64::MIN, -1, 9, i64::MAX], [7, 3, -2, 8], [i64::MAX; 4]] {
        for batch in 0..3 {
            let (first, rows) = placed(&wild, 7, batch);
            assert!(first >= 0 && first + rows <= 7, "{wild:?}");
        }
    }
}

#[test]
fn pages_are_described_wherever_their_table_is() {
    let (lengths, table) = ([5i32, 0, 8], [1i32, 3, -1, -1, -1, -1, 0, 2, -1]);
    let query = TensorDesc::contiguous(DType::F16, [3, 1, 4, 16]);
    let pages = |count| TensorDesc::contiguous(DType::F16, [count, 4, 2, 16]);
    let data = CallData {
        key_value_lengths: Some(View::from_slice(&lengths, [3]).unwrap()),
        block_table: Some(View::from_slice(&table, [3, 3]).unwrap()),
        ..CallData::default()
    };
    let builder = |count| Problem::builder(query, pages(count), pages(count)).device(Device::Cuda(0));
    let problem = builder(4).data(&data).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    let p = ProblemParameters::new(&problem).of_call(&call, 512);
    assert_eq!((p.pages, p.page_size, p.most_keys, p.key_length), (4, 4, 12, 12));
    assert_eq!((p.block_table, p.block_table_row), (Integers::stored_at(512), 3));
    assert_eq!(p.query_starts, Integers::default());
    // In device memory, with strides of its own, and no keys where there are no pages.
    let strided = TensorDesc::strided(DType::I32, [3, 3], [10, 2]).unwrap();
    let on_device =
        builder(0).key_value_lengths(DType::I32).layout(Role::BlockTable, strided).build().unwrap();
    let mut p = ProblemParameters::new(&on_device).of_call(&CallProblem::at_bounds(&on_device), 0);
    p.set(Role::BlockTable, 640);
    assert_eq!((p.pages, p.most_keys, p.block_table_row), (0, 0, 10));
    let Integers { data, stride, dtype, .. } = p.block_table;
    assert_eq!((data, stride, dtype), (640, 2, DTypeCode::I32.code()));
}
