//! Sizes and shapes at the edges of what is accepted.

use proptest::prelude::*;

use super::{DIMS, builder, built};
use crate::{DType, Dimensions, Dropout, InvalidCall, Problem, QueryOffset, Role, TensorDesc, dropout_mask};

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
        let problem = built(dims.problem(DType::F16).lse(true).dropout(Dropout::new(0.5, 1)));
        assert_eq!(problem.dims(), dims);
        assert_eq!(problem.flops(), 0.0);
        assert_eq!(dropout_mask(&problem), Ok(Some(vec![])));
        let out = problem.tensor(Role::Out).unwrap();
        assert_eq!(out.is_empty(), dims.key_length != 0);
    }
    let empty = built(Dimensions { batch: 0, ..DIMS }.problem(DType::F32).query_lengths(vec![]));
    assert_eq!(empty.dims().batch, 0);
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
        let error = dims.problem(DType::F32).query_offset(QueryOffset::BottomRight).build().unwrap_err();
        assert!(matches!(error, InvalidCall::Overflow { .. }), "{dims}: {error}");
    }
}

#[test]
fn the_last_numbers_that_dropout_counts_are_accepted() {
    let max = u32::MAX as usize;
    let dims = Dimensions { batch: 1, query_heads: 1, key_heads: 1, head_dim: 1, value_head_dim: 1, ..DIMS };
    let dropout = Dropout::new(0.1, 0);
    for dims in [
        Dimensions { query_length: max, key_length: 0, ..dims },
        Dimensions { query_length: 1, key_length: max, ..dims },
        Dimensions { batch: max, query_length: 0, ..dims },
    ] {
        assert!(dims.problem(DType::F32).dropout(dropout).build().is_ok(), "{dims}");
    }
    // Any number of rows without keys is a mask of nothing, at once.
    let rows = Dimensions { query_length: max, key_length: 0, batch: 1 << 20, ..dims };
    assert_eq!(dropout_mask(&built(rows.problem(DType::F32).dropout(dropout))), Ok(Some(vec![])));
}

#[test]
fn a_dropout_mask_without_memory_is_an_error() {
    // Operands of one element each, so that such a problem can be called.
    let desc = TensorDesc::strided(DType::F32, [1, 1 << 29, 1, 1], [0; 4]).unwrap();
    let problem = built(Problem::builder(desc, desc, desc).dropout(Dropout::new(0.5, 1)));
    let error = dropout_mask(&problem).unwrap_err();
    assert_eq!(error.to_string(), "no memory for a dropout mask of 288230376151711744 bytes");
}

#[test]
fn rates_are_refused_where_they_round_to_dropping_everything() {
    let smallest_refused = 1.0 - 2f64.powi(-17);
    assert!(builder().dropout(Dropout::new(smallest_refused, 0)).build().is_err());
    assert!(builder().dropout(Dropout::new(smallest_refused.next_down(), 0)).build().is_ok());
    assert!(builder().dropout(Dropout::new(-0.0, 0)).build().is_ok());
    assert!(builder().dropout(Dropout::new(-f64::MIN_POSITIVE, 0)).build().is_err());
}

#[test]
fn the_dropout_mask_is_row_major_over_the_logits() {
    let problem = built(
        Dimensions { key_length: 21, ..DIMS }
            .problem(DType::F32)
            .dropout(Dropout::new(0.4, 0x1234_5678_9ABC_DEF0).with_offset(3)),
    );
    let (mask, stream) = (dropout_mask(&problem).unwrap().unwrap(), problem.dropout_stream().unwrap());
    let [batch, heads, rows, keys] = problem.dims().logits();
    assert_eq!(mask.len(), batch * heads * rows * keys);
    for (index, keep) in mask.into_iter().enumerate() {
        let (s, t, batch_head) = (index % keys, index / keys % rows, index / keys / rows);
        assert_eq!(keep, stream.keeps(batch_head as u32, t as u32, s as u32), "at {index}");
    }
    assert_eq!(dropout_mask(&built(builder())), Ok(None));
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

    /// Whatever is put together: a problem or an error, never a panic, and problems can be asked anything.
    #[test]
    fn nothing_makes_the_builder_panic(
        descs in proptest::collection::vec(desc(), 3),
        more in proptest::collection::vec((0usize..Role::COUNT, desc()), 0..4),
        (scale, softcap, rate) in (any::<Option<f64>>(), any::<Option<f64>>(), any::<Option<f64>>()),
        lengths in proptest::option::of(proptest::collection::vec(size(), 0..3)),
        gradients in proptest::option::of(any::<[bool; 5]>()),
        bottom_right in any::<bool>(),
    ) {
        let mut builder = Problem::builder(descs[0], descs[1], descs[2]).scale(scale).softcap(softcap);
        for (role, desc) in more {
            builder = builder.layout(Role::ALL[role], desc);
        }
        builder = builder.dropout(rate.map(|rate| Dropout::new(rate, 1)));
        if let Some(lengths) = lengths {
            builder = builder.query_lengths(&lengths).key_value_lengths(lengths);
        }
        if let Some(wanted) = gradients {
            let all = crate::Gradients::QKV | crate::Gradients::BIAS | crate::Gradients::SINKS;
            let set = all.iter().zip(wanted).filter(|(_, wanted)| *wanted).fold(crate::Gradients::NONE, |set, ((single, _), _)| set | single);
            builder = builder.gradients(set);
        }
        if bottom_right {
            builder = builder.query_offset(QueryOffset::BottomRight);
        }
        match builder.build() {
            Err(error) => prop_assert!(!error.to_string().is_empty()),
            Ok(problem) => {
                let again = built(problem.to_builder());
                prop_assert_eq!(&again, &problem);
                for batch in 0..problem.dims().batch.min(2) {
                    let range = problem.key_range_of_rows(batch, 0..problem.dims().query_length);
                    prop_assert!(range.end <= problem.dims().key_length);
                }
                prop_assert!(problem.flops() >= 0.0 && !problem.to_string().is_empty());
            }
        }
    }
}
