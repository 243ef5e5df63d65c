//! Sizes and shapes at the edges of what is accepted.

use proptest::prelude::*;

use super::{DIMS, builder, built, called, dropping};
use crate::{
    Alignment, CallData, CallProblem, DType, Dimensions, Dropout, InvalidCall, Problem, QueryOffset, Role,
    TensorDesc, View, dropout_mask,
};

#[test]
fn zero_sizes_are_empty_problems() {
    let zero = [
        Dimensions { batch: 0, ..DIMS },
        Dimensions { query_length: 0, ..DIMS },
        Dimensions { key_length: 0, ..DIMS },
        Dimensions { query_heads: 0, ..DIMS },
        Dimensions { query_heads: 0, key_heads: 0, ..DIMS },
    ];
    for dims in zero {
        let data = dropping(Dropout::new(0.5, 1));
        let problem = built(dims.problem(DType::F16).lse(true).data(&data));
        assert_eq!(problem.dims(), dims);
        assert_eq!(problem.flops(), 0.0);
        assert_eq!(dropout_mask(&called(&problem, &data)), Ok(Some(vec![])));
        let out = problem.tensor(Role::Out).unwrap();
        assert_eq!(out.is_empty(), dims.key_length != 0);
    }
    let none: [i32; 0] = [];
    let data = CallData { query_lengths: Some(View::from_slice(&none, [0]).unwrap()), ..CallData::default() };
    let empty = built(Dimensions { batch: 0, ..DIMS }.problem(DType::F32).data(&data));
    assert_eq!(called(&empty, &data).dims().batch, 0);
}

#[test]
fn zero_head_dims_are_refused_whatever_else_is_zero() {
    for dims in [DIMS, Dimensions { batch: 0, ..DIMS }] {
        for (head_dim, value_head_dim, role) in [(0, 8, Role::Query), (8, 0, Role::Value)] {
            let dims = Dimensions { head_dim, value_head_dim, ..dims };
            match dims.problem(DType::F32).build() {
                Err(InvalidCall::ZeroHeadDim { role: refused, .. }) => assert_eq!(refused, role),
                other => panic!("{dims}: {other:?}"),
            }
        }
    }
}

/// Backends multiply sizes; a zero elsewhere must not let sizes through that overflow.
#[test]
fn sizes_that_overflow_are_refused_beside_a_zero_too() {
    let huge = 1 << 40;
    let overflowing = [
        Dimensions { batch: 0, query_length: huge, key_length: huge, ..DIMS },
        Dimensions { batch: huge, query_heads: 0, query_length: huge, ..DIMS },
        Dimensions { query_length: 0, batch: huge, key_length: huge, ..DIMS },
        Dimensions { query_heads: 0, query_length: 1 << 63, ..DIMS },
        Dimensions { key_length: 0, head_dim: usize::MAX, ..DIMS },
        Dimensions { key_length: 0, value_head_dim: usize::MAX, ..DIMS },
    ];
    for dims in overflowing {
        let error = dims.problem(DType::F32).alignment(Alignment::BottomRight).build().unwrap_err();
        assert!(matches!(error, InvalidCall::Overflow { .. }), "{dims}: {error}");
    }
}

#[test]
fn the_last_numbers_that_dropout_counts_are_accepted() {
    let max = u32::MAX as usize;
    let dims = Dimensions { batch: 1, query_heads: 1, key_heads: 1, head_dim: 1, value_head_dim: 1, ..DIMS };
    let data = dropping(Dropout::new(0.1, 0));
    for dims in [
        Dimensions { query_length: max, key_length: 0, ..dims },
        Dimensions { query_length: 1, key_length: max, ..dims },
        Dimensions { batch: max, query_length: 0, ..dims },
    ] {
        assert!(dims.problem(DType::F32).dropout_rate(0.1).build().is_ok(), "{dims}");
    }
    // Any number of rows without keys is a mask of nothing, at once.
    let rows = Dimensions { query_length: max, key_length: 0, batch: 1 << 20, ..dims };
    let problem = built(rows.problem(DType::F32).data(&data));
    assert_eq!(dropout_mask(&called(&problem, &data)), Ok(Some(vec![])));
}

#[test]
fn a_dropout_mask_without_memory_is_an_error() {
    // Operands of one element each, so that such a problem can be called.
    let desc = TensorDesc::strided(DType::F32, [1, 1 << 29, 1, 1], [0; 4]).unwrap();
    let data = dropping(Dropout::new(0.5, 1));
    let problem = built(Problem::builder(desc, desc, desc).data(&data));
    let error = dropout_mask(&called(&problem, &data)).unwrap_err();
    assert_eq!(error.to_string(), "no memory for a dropout mask of 288230376151711744 bytes");
}

#[test]
fn rates_are_refused_where_they_round_to_dropping_everything() {
    let smallest_refused = 1.0 - 2f64.powi(-17);
    assert!(builder().dropout_rate(smallest_refused).build().is_err());
    assert!(builder().dropout_rate(smallest_refused.next_down()).build().is_ok());
    assert!(builder().dropout_rate(-0.0).build().is_ok());
    assert!(builder().dropout_rate(-f64::MIN_POSITIVE).build().is_err());
}

#[test]
fn the_dropout_mask_is_row_major_over_the_logits() {
    let data = dropping(Dropout::new(0.4, 0x1234_5678_9ABC_DEF0).with_offset(3));
    let problem = built(Dimensions { key_length: 21, ..DIMS }.problem(DType::F32).data(&data));
    let call = called(&problem, &data);
    let (mask, stream) = (dropout_mask(&call).unwrap().unwrap(), call.dropout_stream().unwrap());
    let [batch, heads, rows, keys] = problem.dims().logits();
    assert_eq!(mask.len(), batch * heads * rows * keys);
    for (index, keep) in mask.into_iter().enumerate() {
        let (s, t, batch_head) = (index % keys, index / keys % rows, index / keys / rows);
        assert_eq!(keep, stream.keeps(batch_head as u32, t as u32, s as u32), "at {index}");
    }
    let plain = built(builder());
    assert_eq!(dropout_mask(&called(&plain, &CallData::default())), Ok(None));
}

#[test]
fn operands_of_any_layout_are_accepted() {
    // Broadcast over the batch, reversed rows, heads apart: inputs may reach an element by several indices.
    let query = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [0, -100, 8, 0]).unwrap();
    let problem = built(builder().layout(Role::Query, query));
    assert_eq!(problem.tensor(Role::Query), Some(&query));
    // An incoming gradient of ones, expanded from one element.
    let ones = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [0; 4]).unwrap();
    let problem = built(builder().gradients(crate::Gradients::QUERY).layout(Role::DOut, ones));
    assert_eq!(problem.tensor(Role::DOut), Some(&ones));
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0usize..9, 1 => Just(1 << 31), 1 => Just(1 << 62), 1 => Just(usize::MAX)]
}

fn desc() -> impl Strategy<Value = TensorDesc> {
    let dtype = prop_oneof![8 => Just(DType::F32), 1 => Just(DType::Bool), 1 => Just(DType::F64)];
    let stride = prop_oneof![4 => -64isize..64, 1 => Just(isize::MIN), 1 => Just(isize::MAX)];
    (dtype, proptest::collection::vec((size(), stride), 0..=4), any::<bool>()).prop_map(
        |(dtype, axes, contiguous)| {
            let (shape, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
            let shape = crate::Dims::try_from(shape).unwrap();
            if contiguous {
                return TensorDesc::contiguous(dtype, shape);
            }
            TensorDesc::strided(dtype, shape, crate::Strides::try_from(strides).unwrap()).unwrap()
        },
    )
}

/// A tensor of numbers of a call: right or of another rank, count or stride.
#[derive(Clone, Debug)]
struct Numbers {
    values: Vec<i64>,
    dtype: DType,
    shape: crate::Dims,
    step: isize,
}

impl Numbers {
    fn view(&self) -> View<'_> {
        let strides = crate::Strides::try_from(vec![self.step; self.shape.rank()]).unwrap();
        // The first elements of the values' memory.
        match self.dtype {
            DType::I32 => View::strided(bytemuck::cast_slice::<_, i32>(&self.values), 0, self.shape, strides),
            DType::U32 => View::strided(bytemuck::cast_slice::<_, u32>(&self.values), 0, self.shape, strides),
            DType::F64 => View::strided(bytemuck::cast_slice::<_, f64>(&self.values), 0, self.shape, strides),
            _ => View::strided(&self.values, 0, self.shape, strides),
        }
        .unwrap()
    }
}

fn numbers() -> impl Strategy<Value = Option<Numbers>> {
    let value = prop_oneof![6 => 0i64..9, 1 => any::<i64>(), 1 => Just(i64::MIN), 1 => Just(i64::MAX)];
    let dtype = prop_oneof![4 => proptest::sample::select(DType::INTEGERS.to_vec()), 1 => Just(DType::F64)];
    let shape = prop_oneof![6 => proptest::collection::vec(0usize..9, 1), 1 => proptest::collection::vec(0usize..4, 0..3)];
    let numbers = (proptest::collection::vec(value, 64), dtype, shape, 0isize..3).prop_map(
        |(values, dtype, shape, step)| Numbers {
            values,
            dtype,
            shape: crate::Dims::try_from(shape).unwrap(),
            step,
        },
    );
    proptest::option::of(numbers)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Mask and bias of any rank and any choice of broadcast axes come out with four axes.
    #[test]
    fn every_broadcast_has_four_axes(rank in 1usize..=4, ones in proptest::array::uniform4(any::<bool>())) {
        let mut full = DIMS.logits();
        for (size, one) in full.iter_mut().zip(ones) {
            if one {
                *size = 1;
            }
        }
        let shape = crate::Dims::from_slice(&full[4 - rank..]).unwrap();
        full[..4 - rank].fill(1);
        let mask = TensorDesc::contiguous(DType::Bool, shape);
        let bias = TensorDesc::contiguous(DType::Bf16, shape);
        let problem = built(builder().mask(mask).bias(bias));
        for (role, given) in [(Role::Mask, mask), (Role::Bias, bias)] {
            let desc = problem.tensor(role).unwrap();
            prop_assert_eq!(desc.dtype(), given.dtype());
            prop_assert_eq!(&desc.shape()[..], &full[..]);
            prop_assert_eq!(&desc.strides()[4 - rank..], &given.strides()[..]);
        }
    }

    /// Whatever is put together: a problem or an error, never a panic, and problems can be asked anything, as
    /// can the calls that they accept.
    #[test]
    fn nothing_makes_the_builder_panic(
        descs in proptest::collection::vec(desc(), 3),
        more in proptest::collection::vec((0usize..Role::COUNT, desc()), 0..4),
        scalars in (any::<Option<f64>>(), any::<Option<f64>>(), any::<Option<f64>>()),
        offset in prop_oneof![Just(QueryOffset::BottomRight), any::<i64>().prop_map(QueryOffset::Fixed)],
        numbers in proptest::array::uniform8(numbers()),
        longest in any::<[Option<u16>; 2]>(),
        gradients in proptest::option::of(any::<[bool; 5]>()),
        in_host_memory in proptest::collection::vec((0usize..Role::COUNT, any::<bool>()), 0..3),
        on_device in any::<bool>(),
    ) {
        let (scale, softcap, rate) = scalars;
        let of_index = |index: usize| Role::every().nth(index).unwrap();
        let views: [_; 8] = std::array::from_fn(|index| numbers[index].as_ref().map(Numbers::view));
        let [query_lengths, key_value_lengths, query_offsets, dropout_seed, dropout_offset, ..] = views;
        let [.., query_starts, key_value_starts, block_table] = views;
        let data = CallData {
            scale,
            softcap,
            query_offset: offset,
            query_offsets,
            query_lengths,
            key_value_lengths,
            dropout: rate.map(|rate| Dropout::new(rate, 1)),
            dropout_seed,
            dropout_offset,
            query_starts,
            key_value_starts,
            block_table,
            ..CallData::default()
        };
        let mut builder = Problem::builder(descs[0], descs[1], descs[2]).data(&data);
        let [queries, keys] = longest.map(|longest| longest.map(usize::from));
        builder = builder.longest(queries, keys);
        for (role, desc) in more {
            builder = builder.layout(of_index(role), desc);
        }
        if on_device {
            builder = builder.device(crate::Device::Cuda(0));
        }
        for (role, given) in in_host_memory {
            builder = builder.in_host_memory(of_index(role), given);
        }
        if let Some(wanted) = gradients {
            let all = crate::Gradients::QKV | crate::Gradients::BIAS | crate::Gradients::SINKS;
            let set = all.iter().zip(wanted).filter(|(_, wanted)| *wanted).fold(crate::Gradients::NONE, |set, ((single, _), _)| set | single);
            builder = builder.gradients(set);
        }
        match builder.build() {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(problem) => {
                let again = built(problem.to_builder());
                prop_assert_eq!(&again, &problem);
                for role in Role::every() {
                    prop_assert!(role.is_data() || problem.device_of(role) == problem.device(), "{}", role);
                }
                let call = CallProblem::new(&problem, &data);
                if let Err(error) = &call {
                    prop_assert!(!error.to_string().is_empty());
                }
                for call in [CallProblem::at_bounds(&problem)].into_iter().chain(call) {
                    for batch in 0..problem.dims().batch.min(2) {
                        let range = call.key_range_of_rows(batch, 0..problem.dims().query_length);
                        prop_assert!(range.end <= problem.dims().key_length);
                    }
                    prop_assert!(call.scale().is_finite());
                    prop_assert_eq!(call.softcap().is_some(), problem.has_softcap());
                    prop_assert_eq!(call.dropout_stream().is_some(), problem.dropout_rate().is_some());
                }
                prop_assert!(problem.flops() >= 0.0 && !problem.to_string().is_empty());
            }
        }
    }
}
