//! The numbers of a call against its problem.

use super::CallProblem;
use crate::{
    Alignment, CallData, DType, Device, Dimensions, Dropout, Inputs, InvalidCall, OffsetRange, Problem,
    ProblemBuilder, QueryOffset, Role, TensorDesc, View,
};

/// B = 2, T = 3, S = 5.
const DIMS: Dimensions = Dimensions {
    batch: 2,
    query_length: 3,
    key_length: 5,
    query_heads: 4,
    key_heads: 4,
    head_dim: 8,
    value_head_dim: 8,
};

mod sequences;

const PLAIN: CallData<'static> = CallData {
    scale: None,
    softcap: None,
    query_offset: QueryOffset::TOP_LEFT,
    query_offsets: None,
    query_lengths: None,
    key_value_lengths: None,
    dropout: None,
    dropout_seed: None,
    dropout_offset: None,
    query_starts: None,
    key_value_starts: None,
    block_table: None,
    key_scales: None,
    value_scales: None,
};

fn builder() -> ProblemBuilder {
    DIMS.problem(DType::F32)
}

fn built(builder: ProblemBuilder) -> Problem {
    builder.build().unwrap()
}

/// What a call with these numbers is refused for, of a problem that was built from them.
fn refused(data: CallData<'_>) -> InvalidCall {
    refused_by(builder().data(&data), data)
}

fn refused_by(builder: ProblemBuilder, data: CallData<'_>) -> InvalidCall {
    CallProblem::new(&built(builder), &data).unwrap_err()
}

fn accepts(builder: ProblemBuilder, data: CallData<'_>) -> bool {
    CallProblem::new(&built(builder), &data).is_ok()
}

/// The data with one tensor in the place of another.
fn with<'a>(data: CallData<'a>, role: Role, view: Option<View<'a>>) -> CallData<'a> {
    match role {
        Role::QueryLengths => CallData { query_lengths: view, ..data },
        Role::KeyValueLengths => CallData { key_value_lengths: view, ..data },
        Role::QueryOffsets => CallData { query_offsets: view, ..data },
        Role::DropoutSeed => CallData { dropout_seed: view, ..data },
        Role::DropoutOffset => CallData { dropout_offset: view, ..data },
        other => panic!("{other} is no number"),
    }
}

/// How many numbers a tensor of a role has.
fn count(role: Role) -> usize {
    if matches!(role, Role::DropoutSeed | Role::DropoutOffset) { 1 } else { DIMS.batch }
}

/// A call with a tensor of each role, of the dtype of the memory, whose numbers are all small.
fn all<T: crate::Element>(memory: &[T]) -> CallData<'_> {
    let dropout = Some(Dropout::new(0.5, 1));
    Role::DATA.into_iter().fold(CallData { dropout, ..PLAIN }, |data, role| {
        with(data, role, Some(View::from_slice(&memory[..count(role)], [count(role)]).unwrap()))
    })
}

#[test]
fn the_roles_of_numbers_are_the_last() {
    let numbers: Vec<_> = Role::DATA.into_iter().chain(Role::SEQUENCES).collect();
    let data: Vec<_> = Role::ALL.into_iter().filter(|role| role.is_data()).collect();
    assert_eq!(data, numbers);
    assert_eq!(Role::ALL[Role::ALL.len() - numbers.len()..], numbers);
    let with_scales: Vec<_> = numbers.into_iter().chain(Role::SCALES).collect();
    assert_eq!(PLAIN.views().map(|(role, _)| role).to_vec(), with_scales);
    assert!(with_scales.into_iter().all(Role::is_data));
    assert!(Role::every().enumerate().all(|(index, role)| role as usize == index));
    assert_eq!(Role::every().count(), Role::COUNT);
}

#[test]
fn inputs_announce_their_numbers() {
    let tokens = vec![0f32; 2 * 5 * 4 * 8];
    let query = View::from_slice(&tokens[..2 * 3 * 4 * 8], [2, 3, 4, 8]).unwrap();
    let key = View::from_slice(&tokens, [2, 5, 4, 8]).unwrap();
    let problem = |data: CallData<'_>| built(Inputs { data, ..Inputs::new(query, key, key) }.problem());
    assert_eq!(problem(PLAIN), built(builder()));
    let memory = [1i32, 2, 1, 2];
    for role in Role::DATA {
        let dropout = Some(Dropout::new(0.5, 1));
        let strided = View::strided(&memory, 0, [count(role)], [2]).unwrap();
        let data = with(CallData { dropout, ..PLAIN }, role, Some(strided));
        let announced = problem(data);
        assert_eq!(announced.tensor(role), Some(&strided.desc()), "{role}");
        assert_eq!(announced.device_of(role), Device::Cpu);
        assert_eq!(announced.rows_vary(), count(role) == 2, "{role}");
        assert!(CallProblem::new(&announced, &data).is_ok());
    }
    for dtype in DType::INTEGERS {
        let (i32s, u32s, i64s) = ([1i32, 1], [1u32, 1], [1i64, 1]);
        let data = match dtype {
            DType::I32 => all(&i32s),
            DType::U32 => all(&u32s),
            _ => all(&i64s),
        };
        let announced = problem(data);
        assert!(Role::DATA.into_iter().all(|role| announced.dtype_of(role) == Some(dtype)));
        assert_eq!(announced.alignment(), Alignment::Offsets(OffsetRange::Near));
        assert!(CallProblem::new(&announced, &data).is_ok());
    }
    let data =
        CallData { scale: Some(-1.0), softcap: Some(3.0), dropout: Some(Dropout::new(0.25, 9)), ..PLAIN };
    let announced = problem(data);
    assert!(announced.any_scale() && announced.has_softcap() && !announced.rows_vary());
    assert_eq!(announced.dropout_rate(), Some(0.25));
    assert!(CallProblem::new(&announced, &data).is_ok());
    assert_eq!(problem(CallData { scale: Some(0.5), ..PLAIN }), built(builder()));
    for (offset, alignment) in [
        (QueryOffset::TOP_LEFT, Alignment::TopLeft),
        (QueryOffset::BottomRight, Alignment::BottomRight),
        (QueryOffset::Fixed(-3), Alignment::Offset(OffsetRange::Near)),
        (QueryOffset::Fixed(1 << 22), Alignment::Offset(OffsetRange::Near)),
        (QueryOffset::Fixed(1 - (1 << 23)), Alignment::Offset(OffsetRange::Any)),
        (QueryOffset::Fixed(i64::MIN), Alignment::Offset(OffsetRange::Any)),
    ] {
        let data = CallData { query_offset: offset, ..PLAIN };
        assert_eq!(problem(data).alignment(), alignment);
        assert!(CallProblem::new(&problem(data), &data).is_ok(), "{offset}");
    }
    // A tensor of offsets goes before the one offset.
    for (offsets, range) in [
        ([-1 << 22, 0], OffsetRange::Near),
        ([0, 1 + (1 << 22)], OffsetRange::Any),
        ([i64::MIN, 0], OffsetRange::Any),
    ] {
        let query_offsets = Some(View::from_slice(&offsets, [2]).unwrap());
        let data = CallData { query_offset: QueryOffset::BottomRight, query_offsets, ..PLAIN };
        assert_eq!(problem(data).alignment(), Alignment::Offsets(range));
        assert_eq!(CallProblem::new(&problem(data), &data).unwrap().offset(0), offsets[0]);
    }
}

/// Each tensor of numbers: missing, unexpected, and of another dtype, layout, count or place than announced.
#[test]
fn tensors_of_numbers_must_be_as_announced() {
    let (i32s, i64s) = ([1i32; 8], [1i64; 8]);
    let given = all(&i32s);
    let problem = built(builder().data(&given));
    assert!(CallProblem::new(&problem, &given).is_ok());
    for role in Role::DATA {
        let by = |view| CallProblem::new(&problem, &with(given, role, view)).unwrap_err();
        assert_eq!(by(None), InvalidCall::Missing { role });

        let lacking = built(builder().data(&with(given, role, None)));
        assert_eq!(CallProblem::new(&lacking, &given).unwrap_err(), InvalidCall::Unexpected { role });

        let count = count(role);
        let of_i32 = |shape: &[usize], strides: &[isize]| {
            let (shape, strides) = (crate::Dims::from_slice(shape), crate::Strides::from_slice(strides));
            View::strided(&i32s, 0, shape.unwrap(), strides.unwrap()).unwrap()
        };
        let others = [
            View::from_slice(&i64s[..count], [count]).unwrap(),
            of_i32(&[], &[]),
            of_i32(&[count, 1], &[1, 1]),
            of_i32(&[1, count], &[count as isize, 1]),
            of_i32(&[count + 1], &[1]),
            of_i32(&[0], &[1]),
        ];
        // The stride of a single number says nothing.
        let strides = if count == 1 { vec![] } else { vec![of_i32(&[count], &[2]), of_i32(&[count], &[0])] };
        for other in others.into_iter().chain(strides) {
            match by(Some(other)) {
                InvalidCall::NotAsInProblem { role: named, given, expected } => {
                    assert_eq!((named, given), (role, other.desc()));
                    assert_eq!(Some(&expected), problem.tensor(role));
                }
                error => panic!("{role}: {error}"),
            }
        }
        let device = Device::Cuda(1);
        let elsewhere = InvalidCall::Device { role, device, expected: Device::Cpu };
        assert_eq!(by(Some(on_device(device, TensorDesc::contiguous(DType::I32, [count])))), elsewhere);
    }
}

/// A view that nothing reads.
#[allow(unsafe_code)]
fn on_device(device: Device, desc: TensorDesc) -> View<'static> {
    // SAFETY: nothing reads memory of a device that the tests do not have.
    unsafe { View::from_raw_parts(std::ptr::without_provenance(4096), device, desc) }.unwrap()
}

#[test]
fn numbers_of_a_problem_on_a_device_are_where_it_says() {
    let device = Device::Cuda(1);
    let ones = [1i32; 2];
    let host = all(&ones);
    let of_device = |role: Role| on_device(device, TensorDesc::contiguous(DType::I32, [count(role)]));
    for role in Role::DATA {
        // All in host memory but one.
        let data = with(host, role, Some(of_device(role)));
        let problem = built(builder().device(device).data(&data));
        assert!(CallProblem::new(&problem, &data).is_ok(), "{role}");
        assert_eq!(
            CallProblem::new(&problem, &host).unwrap_err(),
            InvalidCall::Device { role, device: Device::Cpu, expected: device }
        );
        let other = on_device(Device::Cuda(0), TensorDesc::contiguous(DType::I32, [count(role)]));
        assert_eq!(
            CallProblem::new(&problem, &with(host, role, Some(other))).unwrap_err(),
            InvalidCall::Device { role, device: Device::Cuda(0), expected: device }
        );
        let problem = built(builder().device(device).data(&host));
        assert_eq!(
            CallProblem::new(&problem, &data).unwrap_err(),
            InvalidCall::Device { role, device, expected: Device::Cpu }
        );
    }
}

/// What is in device memory is not known here: bounds stand in its place.
#[test]
fn numbers_in_device_memory_are_bounds_on_the_host() {
    let device = Device::Cuda(0);
    let data = Role::DATA.into_iter().fold(
        CallData { dropout: Some(Dropout::new(0.5, 1)), ..PLAIN },
        |data, role| {
            with(data, role, Some(on_device(device, TensorDesc::contiguous(DType::I64, [count(role)]))))
        },
    );
    let problem = built(builder().device(device).data(&data));
    // A range that a caller does not know is the usual one.
    assert_eq!(problem.alignment(), Alignment::Offsets(OffsetRange::Near));
    let call = CallProblem::new(&problem, &data).unwrap();
    assert_eq!((call.query_len(1), call.key_value_len(1)), (3, 5));
    assert_eq!(call.dropout_stream().map(|stream| stream.threshold()), problem.drop_threshold());
    assert!(!call.has_lengths());
}

/// A tensor for each of the integer dtypes, of numbers that it holds.
fn of_each_dtype(numbers: [i64; 2], mut check: impl FnMut(View<'_>)) {
    let i32s = numbers.map(i32::try_from);
    let u32s = numbers.map(u32::try_from);
    // With gaps, and backwards.
    let backwards = [numbers[1], i64::MIN, numbers[0]];
    if let [Ok(first), Ok(second)] = i32s {
        check(View::from_slice(&[first, second], [2]).unwrap());
        check(View::strided(&[second, -1, first], 2, [2], [-2]).unwrap());
    }
    if let [Ok(first), Ok(second)] = u32s {
        check(View::from_slice(&[first, second], [2]).unwrap());
        check(View::strided(&[u32::MAX, first, u32::MAX, second], 1, [2], [2]).unwrap());
    }
    check(View::from_slice(&numbers, [2]).unwrap());
    check(View::strided(&backwards, 2, [2], [-2]).unwrap());
}

#[test]
fn lengths_are_between_zero_and_the_tensors() {
    for (role, which, max) in [(Role::QueryLengths, "query", 3usize), (Role::KeyValueLengths, "key/value", 5)]
    {
        let full = max as i64;
        for numbers in [[0, full], [full, 0], [1, 2]] {
            of_each_dtype(numbers, |view| {
                let data = with(PLAIN, role, Some(view));
                let problem = built(builder().data(&data));
                let call = CallProblem::new(&problem, &data).unwrap();
                for (batch, want) in numbers.into_iter().enumerate() {
                    let got = if max == 3 { call.query_len(batch) } else { call.key_value_len(batch) };
                    assert_eq!(got as i64, want);
                }
            });
        }
        for wrong in [-1, full + 1, i32::MIN.into(), i32::MAX.into(), u32::MAX.into(), i64::MIN, i64::MAX] {
            for (numbers, batch) in [([wrong, 0], 0), ([full, wrong], 1)] {
                of_each_dtype(numbers, |view| {
                    let want = InvalidCall::LengthOutOfRange { which, batch, length: wrong, max };
                    assert_eq!(refused(with(PLAIN, role, Some(view))), want);
                });
            }
        }
    }
    // Above i64, a usize reads as a negative number.
    let huge = [usize::MAX, 0];
    let data = with(PLAIN, Role::QueryLengths, Some(View::from_slice(&huge, [2]).unwrap()));
    assert_eq!(refused(data), InvalidCall::LengthOutOfRange { which: "query", batch: 0, length: -1, max: 3 });
}

#[test]
fn offsets_are_in_the_range_that_was_planned_for() {
    let most = OffsetRange::NEAR;
    let near = || builder().alignment(Alignment::Offset(OffsetRange::Near));
    let any = || builder().alignment(Alignment::Offset(OffsetRange::Any));
    let at = |offset| CallData { query_offset: QueryOffset::Fixed(offset), ..PLAIN };
    for offset in [0, 1, -1, most, -most] {
        assert!(accepts(near(), at(offset)) && accepts(any(), at(offset)), "{offset}");
    }
    for offset in [most + 1, -most - 1, i64::MIN, i64::MIN + 1, i64::MAX] {
        assert_eq!(refused_by(near(), at(offset)), InvalidCall::OffsetOutOfRange { offset, most });
        let problem = built(any());
        let call = CallProblem::new(&problem, &at(offset)).unwrap();
        assert_eq!(call.offset(1), offset);
        assert_eq!(call.position(1, 2), offset.saturating_add(2));
        assert_eq!(call.key_range(1, 2), 0..5);
    }
    for offset in [most + 1, -most - 1, i64::MIN, i64::MIN + 1, i64::MAX, u32::MAX.into(), i32::MIN.into()] {
        for numbers in [[offset, 0], [0, offset]] {
            of_each_dtype(numbers, |view| {
                let data = with(PLAIN, Role::QueryOffsets, Some(view));
                // The range of the problem that was announced by these, and a smaller one.
                let announced = builder().data(&data);
                let problem = built(announced.clone());
                let call = CallProblem::new(&problem, &data).unwrap();
                assert_eq!([call.offset(0), call.offset(1)], numbers);
                let smaller = announced.alignment(Alignment::Offsets(OffsetRange::Near));
                assert_eq!(refused_by(smaller, data), InvalidCall::OffsetOutOfRange { offset, most });
            });
        }
    }
    // Causal rows before key 0 see nothing, and behind the last key everything.
    for (offset, want) in [(i64::MIN, 0..0), (i64::MAX, 0..5)] {
        let problem = built(any().causal(true));
        assert_eq!(CallProblem::new(&problem, &at(offset)).unwrap().key_range(0, 2), want);
    }
}

#[test]
fn calls_are_aligned_as_planned() {
    let at = |offset| CallData { query_offset: QueryOffset::Fixed(offset), ..PLAIN };
    let bottom_right = CallData { query_offset: QueryOffset::BottomRight, ..PLAIN };
    let other = |error: InvalidCall| matches!(error, InvalidCall::OtherData { what: "query offset", .. });
    let planned = |alignment| builder().alignment(alignment);
    assert!(accepts(planned(Alignment::TopLeft), at(0)));
    assert!(other(refused_by(planned(Alignment::TopLeft), at(1))));
    assert!(other(refused_by(planned(Alignment::TopLeft), bottom_right)));
    assert!(accepts(planned(Alignment::BottomRight), bottom_right));
    assert!(other(refused_by(planned(Alignment::BottomRight), at(0))));
    // T = 3 and S = 5, but 2 is given by a number.
    assert!(other(refused_by(planned(Alignment::BottomRight), at(2))));
    for range in [OffsetRange::Near, OffsetRange::Any] {
        assert!(accepts(planned(Alignment::Offset(range)), at(0)));
        assert!(other(refused_by(planned(Alignment::Offset(range)), bottom_right)));
        let offsets = builder().query_offsets(range, DType::I32);
        let role = Role::QueryOffsets;
        for data in [at(0), at(3), bottom_right] {
            assert_eq!(refused_by(offsets.clone(), data), InvalidCall::Missing { role });
        }
    }
    let numbers = [1i32, 2];
    let offsets = with(PLAIN, Role::QueryOffsets, Some(View::from_slice(&numbers, [2]).unwrap()));
    for alignment in [Alignment::TopLeft, Alignment::BottomRight, Alignment::Offset(OffsetRange::Near)] {
        let role = Role::QueryOffsets;
        assert_eq!(refused_by(planned(alignment), offsets), InvalidCall::Unexpected { role });
    }
    // The offset of the last row follows from the lengths of the call.
    let (queries, keys) = ([3i32, 1], [0i64, 4]);
    let data = CallData {
        query_lengths: Some(View::from_slice(&queries, [2]).unwrap()),
        key_value_lengths: Some(View::from_slice(&keys, [2]).unwrap()),
        ..bottom_right
    };
    let problem = built(builder().data(&data));
    let call = CallProblem::new(&problem, &data).unwrap();
    assert_eq!([call.offset(0), call.offset(1)], [-3, 3]);
}

#[test]
fn the_scale_of_gradients_is_two_factors_and_the_first_is_a_power_of_two() {
    let problem = built(DIMS.problem(DType::F64).any_scale(true));
    let factors = |scale: f64| {
        CallProblem::new(&problem, &CallData { scale: Some(scale), ..PLAIN }).unwrap().scale_of_gradients()
    };
    for exponent in -1022_i32..=1023 {
        for scale in [f64::from(exponent), f64::from(exponent) + 0.375]
            .map(f64::exp2)
            .into_iter()
            .flat_map(|s: f64| [s, -s])
        {
            let (before, after) = factors(scale);
            assert_eq!(before * after, scale, "{scale:e}");
            assert_eq!(before.to_bits() << 12, 0, "{before:e} of {scale:e} is no power of two");
            let want = if (-8.0..=24.0).contains(&scale.abs().log2()) { 0 } else { exponent.div_euclid(2) };
            assert_eq!(before.log2(), f64::from(want), "{scale:e}");
        }
    }
    for scale in [0.0, -0.0] {
        assert_eq!(factors(scale), (1.0, 0.0));
    }
    // What is 0 in f32 needs no factor there.
    let problem = built(builder().any_scale(true));
    let data = CallData { scale: Some(1e-300), ..PLAIN };
    assert_eq!(CallProblem::new(&problem, &data).unwrap().scale_of_gradients(), (1.0, 1e-300));
}

#[test]
fn scales_are_ordinary_or_the_problem_says_otherwise() {
    for dtype in DType::FLOATS {
        let problem = DIMS.problem(dtype);
        let ordinary = Problem::ordinary_scales(dtype.accumulator());
        let (least, most) = (*ordinary.start(), *ordinary.end());
        assert!(ordinary.contains(&problem.clone().build().unwrap().default_scale()));
        let scaled = |scale| CallData { scale: Some(scale), ..PLAIN };
        for scale in [least, most, 1.0, 0.5] {
            let planned = built(problem.clone());
            let call = CallProblem::new(&planned, &scaled(scale)).unwrap();
            assert_eq!(call.scale(), scale);
            assert_eq!(built(problem.clone().data(&scaled(scale))), planned);
        }
        for value in [0.0, -0.0, -1.0, least.next_down(), most.next_up()] {
            let want = InvalidCall::NotOrdinaryScale { value, least, most };
            assert_eq!(refused_by(problem.clone(), scaled(value)), want);
            let any = built(problem.clone().any_scale(true));
            assert_eq!(CallProblem::new(&any, &scaled(value)).unwrap().scale().to_bits(), value.to_bits());
            assert_eq!(built(problem.clone().data(&scaled(value))), any);
        }
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for any in [false, true] {
                let refused = refused_by(problem.clone().any_scale(any), scaled(value));
                assert!(matches!(refused, InvalidCall::NotFinite { what: "scale", .. }), "{refused}");
            }
        }
    }
}

#[test]
fn softcaps_are_there_exactly_where_the_problem_has_one() {
    let capped = |softcap| CallData { softcap: Some(softcap), ..PLAIN };
    let other = |error: InvalidCall| matches!(error, InvalidCall::OtherData { what: "softcap", .. });
    assert!(other(refused_by(builder(), capped(1.0))));
    assert!(other(refused_by(builder(), capped(f64::NAN))));
    assert!(other(refused_by(builder().softcap(true), PLAIN)));
    for value in [0.0, -0.0, -1.0, 1e-300] {
        assert_eq!(refused(capped(value)), InvalidCall::SoftcapNotPositive { value });
    }
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
        let refused = refused(capped(value));
        assert!(matches!(refused, InvalidCall::NotFinite { what: "softcap", .. }), "{refused}");
    }
    let problem = built(builder().softcap(true));
    for softcap in [1e-30, 1.0, 50.0, 1e30] {
        assert_eq!(CallProblem::new(&problem, &capped(softcap)).unwrap().softcap(), Some(softcap));
    }
}

#[test]
fn dropout_has_the_rate_that_was_planned() {
    let dropping = |rate| CallData { dropout: Some(Dropout::new(rate, 7)), ..PLAIN };
    let other = |error: InvalidCall| matches!(error, InvalidCall::OtherData { what: "dropout rate", .. });
    assert!(other(refused_by(builder(), dropping(0.5))));
    assert!(other(refused_by(builder(), dropping(0.0))));
    assert!(other(refused_by(builder().dropout_rate(0.5), PLAIN)));
    assert!(other(refused_by(builder().dropout_rate(0.5), dropping(0.5f64.next_up()))));
    assert!(other(refused_by(builder().dropout_rate(0.5), dropping(f64::NAN))));
    assert!(other(refused_by(builder().dropout_rate(0.0), dropping(-0.0))));
    let problem = built(builder().dropout_rate(0.5));
    for seed in [0, 1, u64::MAX] {
        for offset in [0, u32::MAX] {
            let dropout = Dropout::new(0.5, seed).with_offset(offset);
            let call = CallProblem::new(&problem, &CallData { dropout: Some(dropout), ..PLAIN }).unwrap();
            assert_eq!(call.dropout_stream(), Some(dropout.stream().unwrap()));
            assert_eq!(problem.dropout_at(seed, offset), Some(dropout));
        }
    }
}

/// A seed as a tensor drops what the same 64 bits drop; narrower integers are extended, by their sign where
/// they have one.
#[test]
fn seeds_may_be_tensors() {
    fn stream<S: crate::Element, O: crate::Element>(seed: S, offset: O) -> crate::DropoutStream {
        let (seed, offset) = ([seed], [offset]);
        let data = CallData {
            dropout: Some(Dropout::new(0.5, 99).with_offset(98)),
            dropout_seed: Some(View::from_slice(&seed, [1]).unwrap()),
            dropout_offset: Some(View::from_slice(&offset, [1]).unwrap()),
            ..PLAIN
        };
        let problem = built(builder().data(&data));
        CallProblem::new(&problem, &data).unwrap().dropout_stream().unwrap()
    }
    let want = |seed: u64, offset: u32| Dropout::new(0.5, seed).with_offset(offset).stream().unwrap();
    assert_eq!(stream(-1i32, -1i32), want(u64::MAX, u32::MAX));
    assert_eq!(stream(i32::MIN, i32::MIN), want(0xFFFF_FFFF_8000_0000, 1 << 31));
    assert_eq!(stream(7i32, 8u32), want(7, 8));
    assert_eq!(stream(u32::MAX, u32::MAX), want(0xFFFF_FFFF, u32::MAX));
    assert_eq!(stream(-1i64, -1i64), want(u64::MAX, u32::MAX));
    assert_eq!(stream(i64::MIN, i64::MIN), want(1 << 63, 0));
    assert_eq!(stream(0x1234_5678_9ABC_DEF0i64, 0x1_0000_0003i64), want(0x1234_5678_9ABC_DEF0, 3));
    assert_eq!(stream(5usize, 6usize), want(5, 6));

    // One of the two, with the other as a number.
    let nine = [9i32];
    let data = CallData {
        dropout: Some(Dropout::new(0.5, 4).with_offset(2)),
        dropout_seed: Some(View::from_slice(&nine, [1]).unwrap()),
        ..PLAIN
    };
    let problem = built(builder().data(&data));
    assert_eq!(CallProblem::new(&problem, &data).unwrap().dropout_stream(), Some(want(9, 2)));
    // Without dropout there is nothing to seed.
    let seeded = CallData { dropout: None, ..data };
    let role = Role::DropoutSeed;
    assert_eq!(builder().data(&seeded).build().unwrap_err(), InvalidCall::Unexpected { role });
}

#[test]
fn at_its_bounds_a_problem_has_full_lengths_and_defaults() {
    let ones = [1i32; 2];
    let given = CallData { scale: Some(-3.0), softcap: Some(7.0), ..all(&ones) };
    let problem = built(builder().causal(true).data(&given));
    let bounds = CallProblem::at_bounds(&problem);
    assert!(std::ptr::eq(bounds.problem(), &problem));
    assert_eq!(bounds.scale(), problem.default_scale());
    assert!(bounds.softcap().is_some());
    assert_eq!(bounds.dropout_stream().map(|stream| stream.threshold()), problem.drop_threshold());
    // No panic without tensors, of any batch row.
    for batch in [0, 1, 2, usize::MAX] {
        assert_eq!((bounds.query_len(batch), bounds.key_value_len(batch), bounds.offset(batch)), (3, 5, 0));
    }
    let problem = built(builder().causal(true).alignment(Alignment::BottomRight));
    let bounds = CallProblem::at_bounds(&problem);
    assert_eq!((bounds.offset(0), bounds.key_range(0, 0)), (2, 0..3));
}
