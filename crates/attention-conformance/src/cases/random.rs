//! Random cases: any combination of everything.

use attention_core::{DType, Dimensions, Dropout, Gradients, QueryOffset, Role, Window};

use super::{
    AlibiShape, BiasContent, Broadcast, Case, KeyRows, Layout, Layouts, MaskContent, Saved, Sequences,
    Values, Wanted, dims,
};
use crate::rng::Rng;

/// The random case of a seed: sizes, options, layouts and contents all drawn, always a valid call.
pub fn case_from_seed(seed: u64) -> Case {
    let mut rng = Rng::new(seed);
    let mut case = Case::new(format!("random/{seed}"), sizes(&mut rng));
    case.content.seed = rng.next();
    let density = rng.pick(&[0.15, 0.35, 0.6]);
    options(&mut case, &mut rng, density);
    contents(&mut case, &mut rng);
    case.layouts = layouts(&case.dims, &mut rng);
    if rng.chance(0.15) {
        case.saved = Saved::Backend;
    }
    if seed >= FIRST_WITH_TENSORS {
        numbers_in_tensors(&mut case, &mut Rng::named(seed, "numbers in tensors"));
    }
    case
}

/// The first seed whose case may have offsets, and a dropout's seed and offset, as tensors.
const FIRST_WITH_TENSORS: u64 = 240;

/// Makes tensors of what a call may give as one.
pub(crate) fn numbers_in_tensors(case: &mut Case, rng: &mut Rng) {
    let d = case.dims;
    if rng.chance(0.7) {
        let offset = |rng: &mut Rng| match rng.below(8) {
            0 => rng.pick(&[1 << 22, -(1 << 22), 1 << 40, i64::MAX, i64::MIN]),
            1..=3 => -(rng.below(d.query_length + 2) as i64),
            _ => rng.below(d.key_length + 2) as i64,
        };
        let mut offsets: Vec<i64> = (0..d.batch).map(|_| offset(rng)).collect();
        if case.options.alibi.is_some() {
            // Where a distance is far above the others, logits have no digits left to compare.
            offsets.iter_mut().for_each(|offset| *offset = (*offset).clamp(-1000, 1000));
        }
        case.options.query_offsets = Some(offsets);
        case.options.causal |= case.options.window.is_unbounded() && rng.chance(0.5);
    }
    let dropout = case.options.dropout;
    if dropout.is_some() || rng.chance(0.4) {
        // Seeds that narrower integers have too.
        let seeds = [rng.next(), 7, rng.next() >> 33, (rng.next() >> 33).wrapping_neg()];
        let drawn = Dropout::new(rng.pick(&[0.1, 0.5]), rng.pick(&seeds)).with_offset(rng.next() as u32);
        case.options.dropout =
            Some(Dropout { rate: dropout.map_or(drawn.rate, |given| given.rate), ..drawn });
        case.options.dropout_tensors = true;
    }
    const LAYOUTS: [Layout; 4] =
        [Layout::Contiguous, Layout::Contiguous, Layout::InnerStride, Layout::Reversed { axis: 0 }];
    for role in Role::DATA {
        case.layouts = case.layouts.clone().with(role, rng.pick(&LAYOUTS));
    }
}

/// Packs the batch rows of a case, or puts their keys into pages.
pub(crate) fn sequences(case: &mut Case, rng: &mut Rng) {
    let d = case.dims;
    let lengths = |given: &mut Option<Vec<usize>>, full: usize, rng: &mut Rng| {
        let length = |rng: &mut Rng| match rng.below(6) {
            0 => 0,
            1 => full,
            _ => rng.below(full + 1),
        };
        if given.is_none() || rng.chance(0.5) {
            *given = Some((0..d.batch).map(|_| length(rng)).collect());
        }
    };
    let tail = |rng: &mut Rng| rng.pick(&[0, 0, 1, 5, 40]);
    let kind = rng.below(8);
    let query_tail = (kind < 6).then(|| tail(rng));
    if query_tail.is_some() || rng.chance(0.5) {
        lengths(&mut case.options.query_lengths, d.query_length, rng);
    }
    lengths(&mut case.options.key_value_lengths, d.key_length, rng);
    let keys = match kind {
        0..=3 => {
            let unused = rng.chance(0.4).then(|| {
                let used = case.options.key_value_lengths.iter().flatten();
                used.map(|&used| rng.below(d.key_length - used + 1)).collect()
            });
            KeyRows::Packed { tail: tail(rng), unused }
        }
        4 => KeyRows::Dense,
        _ => KeyRows::Paged {
            page_size: rng.pick(&[1, 2, 3, 8, 13, 16, 64]),
            spare: rng.below(4),
            shared: if rng.chance(0.3) { 1 + rng.below(3) } else { 0 },
            in_order: rng.chance(0.3),
        },
    };
    case.sequences = Some(Sequences { query_tail, keys });
    const LAYOUTS: [Layout; 4] =
        [Layout::Contiguous, Layout::Contiguous, Layout::InnerStride, Layout::Reversed { axis: 0 }];
    for role in Role::SEQUENCES {
        case.layouts = case.layouts.clone().with(role, rng.pick(&LAYOUTS));
    }
    // Of the part of a row's keys that a call has.
    if case.saved == Saved::MoreKeys {
        case.saved = Saved::Oracle;
    }
}

fn sizes(rng: &mut Rng) -> Dimensions {
    let length = |rng: &mut Rng| match rng.below(8) {
        0 => 1,
        1..=5 => 2 + rng.below(20),
        6 => rng.pick(&[15, 16, 17, 31, 32, 33]),
        _ => rng.pick(&[47, 63, 64, 65, 80]),
    };
    let key_heads = 1 + rng.below(3);
    let query_heads = key_heads * rng.pick(&[1, 1, 2, 3]);
    let head_dim = rng.pick(&[1, 3, 4, 8, 8, 16, 16, 17, 32, 33, 40, 64]);
    let mut sizes = dims([1 + rng.below(3), length(rng), length(rng), query_heads, key_heads, head_dim]);
    if rng.chance(0.25) {
        sizes.key_length = sizes.query_length;
    }
    if rng.chance(0.2) {
        sizes.value_head_dim = rng.pick(&[1, 5, 8, 16, 24, 65]);
    }
    sizes
}

fn options(case: &mut Case, rng: &mut Rng, density: f64) {
    let d = case.dims;
    let options = &mut case.options;
    let pattern = |rng: &mut Rng| rng.pick(&Broadcast::all());
    if rng.chance(density / 2.0) {
        options.scale = Some(rng.pick(&[0.0, 0.5, 1.0, -0.25]));
    }
    options.causal = rng.chance(density);
    if rng.chance(density) {
        options.query_offset = match rng.below(3) {
            0 => QueryOffset::BottomRight,
            1 => QueryOffset::Fixed(rng.below(d.key_length + 2) as i64),
            _ => QueryOffset::Fixed(-(rng.below(d.query_length + 2) as i64)),
        };
    }
    if rng.chance(density) {
        let side = |rng: &mut Rng| rng.chance(0.7).then(|| rng.below(d.key_length + 2));
        options.window = Window { left: side(rng), right: side(rng) };
    }
    if rng.chance(density / 2.0) {
        options.softcap = Some(rng.pick(&[0.5, 1.0, 4.0, 50.0]));
    }
    let lengths = |rng: &mut Rng, full: usize| {
        Some((0..d.batch).map(|_| if rng.chance(0.1) { 0 } else { full - rng.below(full) }).collect())
    };
    if rng.chance(density / 2.0) {
        options.query_lengths = lengths(rng, d.query_length);
    }
    if rng.chance(density / 2.0) {
        options.key_value_lengths = lengths(rng, d.key_length);
    }
    options.mask = rng.chance(density).then(|| pattern(rng));
    options.bias = rng.chance(density).then(|| pattern(rng));
    options.bias_dtype = rng.chance(0.5).then(|| rng.pick(&DType::FLOATS));
    options.alibi = rng.chance(density / 2.0).then(|| rng.pick(&[AlibiShape::Heads, AlibiShape::BatchHeads]));
    options.sinks = rng.chance(density / 2.0);
    if rng.chance(density / 2.0) {
        let rate = rng.pick(&[0.05, 0.3, 0.5, 0.8]);
        options.dropout = Some(Dropout::new(rate, rng.next()).with_offset(rng.next() as u32));
    }
    options.lse = rng.pick(&[Wanted::IfDeclared, Wanted::IfDeclared, Wanted::Never]);
    options.d_lse = rng.chance(density);
    options.gradients = [Gradients::QUERY, Gradients::KEY, Gradients::VALUE]
        .into_iter()
        .filter(|_| rng.chance(0.85))
        .fold(Gradients::NONE, |all, gradient| all | gradient);
    if options.gradients.is_empty() {
        options.gradients = Gradients::QKV;
    }
    options.deterministic = rng.chance(0.2);
}

fn contents(case: &mut Case, rng: &mut Rng) {
    case.content.values = match rng.below(8) {
        0 => Values::Amplified(rng.pick(&[3.0, 10.0])),
        1 => Values::Scaled(rng.pick(&[0.25, 4.0])),
        _ => Values::Normal,
    };
    case.content.mask =
        rng.pick(&[MaskContent::Random, MaskContent::Random, MaskContent::Sparse, MaskContent::EmptyRows]);
    case.content.bias = rng.pick(&[
        BiasContent::Normal,
        BiasContent::Normal,
        BiasContent::NegativeInfinity,
        BiasContent::NegativeInfinityRows,
        BiasContent::LargeNegative,
    ]);
    case.content.garbage = rng.chance(0.7);
}

fn layouts(d: &Dimensions, rng: &mut Rng) -> Layouts {
    const PLAIN: [Layout; 5] = [
        Layout::Contiguous,
        Layout::Transposed,
        Layout::Padded,
        Layout::InnerStride,
        Layout::Reversed { axis: 1 },
    ];
    match rng.below(5) {
        0 | 1 => Layouts::default(),
        2 => Layouts::operands(rng.pick(&PLAIN[1..3])),
        3 if d.query_length == d.key_length && d.head_dim == d.value_head_dim => {
            Layouts::fused_qkv(d.query_heads, d.key_heads)
        }
        _ => (Role::ALL.into_iter().filter(|role| !role.is_data()))
            .fold(Layouts::default(), |layouts, role| layouts.with(role, rng.pick(&PLAIN))),
    }
}
