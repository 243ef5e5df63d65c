//! Packed and paged sequences: each has, to the bit, what it has alone in a dense call, whatever else is in
//! the call, wherever its rows lie, on any number of threads.

mod case;
mod dense;
mod edges;
mod packed;
mod paged;
mod store;

use std::sync::Arc;

use attention_core::{Element, Scalar};
use attention_cpu::{CpuBackend, CpuConfig};
use half::{bf16, f16};

use case::{Case, Lengths, Random, lengths};
use packed::Keys;
use paged::Queries;

/// One thread, several of a pool of their own, and the default.
fn backends() -> [CpuBackend; 3] {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    [
        CpuBackend::with_config(CpuConfig::default().threads(1)),
        CpuBackend::with_config(CpuConfig::default().pool(Arc::new(pool))),
        CpuBackend::new(),
    ]
}

fn packed_cases<T: Scalar + Element, L: Scalar + Element>(count: u32) {
    let backends = backends();
    for seed in 0..count {
        let mut random = Random(seed * 7919 + 3);
        let lengths = lengths(&mut random);
        let keys = if random.once_in(4) { Keys::Dense } else { Keys::Packed };
        let tails = [random.below(3) * 2, random.below(3)];
        let what = format!("{} case {seed}, keys {keys:?}, {lengths:?}", T::DTYPE);
        let case = Case::<T, L>::new(lengths, &mut random);
        packed::check(&backends, &case, keys, tails, &what);
    }
}

#[test]
fn packed_sequences_of_f32_have_the_bits_they_have_alone() {
    packed_cases::<f32, f32>(120);
}

#[test]
fn packed_sequences_of_f64_have_the_bits_they_have_alone() {
    packed_cases::<f64, f64>(60);
}

#[test]
fn packed_sequences_of_f16_have_the_bits_they_have_alone() {
    packed_cases::<f16, f32>(40);
}

#[test]
fn packed_sequences_of_bf16_have_the_bits_they_have_alone() {
    packed_cases::<bf16, f32>(40);
}

/// The long one is begun first, wherever it is.
#[test]
fn one_long_sequence_among_many_short_ones_changes_nothing() {
    let backends = backends();
    for (seed, at) in [(1, 0), (2, 17), (3, 40)] {
        let mut random = Random(seed);
        let short = |random: &mut Random| Lengths { queries: random.below(4), keys: 3, used: 3 };
        let mut lengths: Vec<Lengths> = (0..40).map(|_| short(&mut random)).collect();
        lengths.insert(at, Lengths { queries: 600, keys: 640, used: 600 });
        let case = Case::<f32, f32>::new(lengths, &mut random);
        for keys in [Keys::Packed, Keys::Dense] {
            packed::check(&backends, &case, keys, [1, 1], &format!("long at {at}, keys {keys:?}"));
        }
    }
}

fn paged_cases<T: Scalar + Element + PartialEq, L: Scalar + Element>(count: u32) {
    let backends = backends();
    for seed in 0..count {
        let mut random = Random(seed * 104_729 + 11);
        let lengths = lengths(&mut random);
        let queries = random.one_of(&[Queries::Packed, Queries::Dense]);
        let page_size = random.one_of(&[1, 2, 13, 16, 64]);
        let what =
            format!("{} case {seed}, queries {queries:?}, pages of {page_size}, {lengths:?}", T::DTYPE);
        let mut case = Case::<T, L>::new(lengths, &mut random);
        paged::check(&backends, &mut case, queries, page_size, &mut random, &what);
    }
}

#[test]
fn paged_keys_of_f32_give_the_bits_of_gathered_ones() {
    paged_cases::<f32, f32>(120);
}

#[test]
fn paged_keys_of_f64_give_the_bits_of_gathered_ones() {
    paged_cases::<f64, f64>(60);
}

#[test]
fn paged_keys_of_f16_give_the_bits_of_gathered_ones() {
    paged_cases::<f16, f32>(60);
}

#[test]
fn paged_keys_of_bf16_give_the_bits_of_gathered_ones() {
    paged_cases::<bf16, f32>(60);
}
