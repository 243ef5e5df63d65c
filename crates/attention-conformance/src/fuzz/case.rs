//! Draws the case of a seed, and makes it simpler.

use std::fmt;

use attention_core::{DType, Dimensions, Dropout, Gradients, QueryOffset, Role, Window};

use super::magnitudes::Magnitudes;
use crate::cases::{
    AlibiShape, BiasContent, Broadcast, Case, CaseData, EightBit, Layout, Layouts, MaskContent, Saved,
    ScaleShape, Wanted, dims, numbers_in_tensors, random_sequences,
};
use crate::rng::Rng;

/// The most multiplications of a case, `B N T S (H + Hv)`: above it the oracle, in plain f64, takes longer
/// than all calls of the backends together.
const MULTIPLICATIONS: usize = 1_500_000;

/// One case of the fuzzer: a function of its seed, and of what was taken away from it since.
#[derive(Clone, Debug)]
pub struct FuzzCase {
    seed: u64,
    pub(super) dtype: DType,
    pub(super) case: Case,
    pub(super) magnitudes: Magnitudes,
    simplifications: Vec<Simplification>,
}

/// What a failing case is tried without. Names are as in Rust code, so that a report can be pasted into a
/// test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Simplification {
    AsBatchRows,
    WithoutEightBit,
    RowsInOrder,
    ContiguousLayouts,
    OrdinaryMagnitudes,
    NumbersAsValues,
    WithoutDropout,
    WithoutSoftcap,
    WithoutAlibi,
    WithoutSinks,
    WithoutMask,
    WithoutBias,
    WithoutLengths,
    WithoutWindow,
    WithoutCausal,
    WithoutOffset,
    WithoutDLse,
    DefaultScale,
    OneBatchRow,
    OneKeyHead,
    OneGroup,
    HalfTheQueries,
    HalfTheKeys,
    HalfTheHeadDim,
    HalfTheValueHeadDim,
}

impl Simplification {
    /// Every one, in the order in which they are tried.
    pub const ALL: [Self; 25] = [
        Self::AsBatchRows,
        Self::WithoutEightBit,
        Self::RowsInOrder,
        Self::ContiguousLayouts,
        Self::OrdinaryMagnitudes,
        Self::NumbersAsValues,
        Self::WithoutDropout,
        Self::WithoutSoftcap,
        Self::WithoutAlibi,
        Self::WithoutSinks,
        Self::WithoutMask,
        Self::WithoutBias,
        Self::WithoutLengths,
        Self::WithoutWindow,
        Self::WithoutCausal,
        Self::WithoutOffset,
        Self::WithoutDLse,
        Self::DefaultScale,
        Self::OneBatchRow,
        Self::OneKeyHead,
        Self::OneGroup,
        Self::HalfTheQueries,
        Self::HalfTheKeys,
        Self::HalfTheHeadDim,
        Self::HalfTheValueHeadDim,
    ];
}

/// Whether the sequences of a seed's case are packed or in pages: a fifth are.
pub(super) fn is_of_sequences(seed: u64) -> bool {
    matches!(seed % 10, 4 | 5)
}

/// Whether the keys and values of a seed's case have 8 bits: an eleventh do, of whatever else seeds choose.
pub(super) fn is_of_eight_bits(seed: u64) -> bool {
    seed % 11 == 3
}

impl FuzzCase {
    /// The case of a seed: the same on every machine and in every build.
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::named(seed, "fuzz");
        let dtype = rng.pick(&DType::FLOATS);
        let mut case = Case::new(format!("fuzz/{seed}"), sizes(&mut rng));
        case.content.seed = rng.next();
        // Garbage is put where it must not matter later, so that its effect on bits can be seen.
        case.content.garbage = false;
        let density = rng.pick(&[0.1, 0.3, 0.6]);
        options(&mut case, &mut rng, density);
        case.layouts = layouts(&case.dims, &mut rng);
        if rng.chance(0.5) {
            case.saved = Saved::Backend;
        }
        let mut magnitudes = Magnitudes::draw(&mut rng, &mut case, dtype);
        if seed % 4 == 2 {
            numbers_in_tensors(&mut case, &mut Rng::named(seed, "numbers in tensors"));
        }
        if is_of_sequences(seed) {
            random_sequences(&mut case, &mut Rng::named(seed, "sequences"));
        }
        if is_of_eight_bits(seed) {
            let mut rng = Rng::named(seed, "keys and values of 8 bits");
            let shapes = [ScaleShape::One, ScaleShape::Heads, ScaleShape::SequencesHeads].map(Some);
            let scales = |rng: &mut Rng| if rng.chance(0.25) { None } else { rng.pick(&shapes) };
            let cache = EightBit::new(rng.pick(&DType::EIGHT_BIT));
            case.options.eight_bit = Some(cache.with_scales(scales(&mut rng), scales(&mut rng)));
            // What is drawn for wider numbers is too large or too small for 8 bits.
            magnitudes = Magnitudes::ordinary();
        }
        Self { seed, dtype, case, magnitudes, simplifications: Vec::new() }
    }

    /// The case without some of what the seed drew.
    #[must_use]
    pub fn simplified(mut self, simplifications: &[Simplification]) -> Self {
        for &simplification in simplifications {
            self.simplify(simplification);
        }
        self
    }

    /// Its seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The dtype of its operands.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What was taken away from the case of the seed.
    pub fn simplifications(&self) -> &[Simplification] {
        &self.simplifications
    }

    /// The tensors that the call reads, of the padded call where sequences are packed or in pages.
    pub(super) fn data(&self) -> CaseData {
        let mut data = self.case.padded_data(self.dtype);
        self.magnitudes.apply(&self.case, &mut data);
        self.case.share(&mut data);
        data
    }

    /// Applies a simplification; whether it changed anything.
    pub(super) fn simplify(&mut self, simplification: Simplification) -> bool {
        use Simplification as S;
        let before = (self.case.clone(), self.magnitudes.clone());
        let (d, options) = (&mut self.case.dims, &mut self.case.options);
        match simplification {
            S::AsBatchRows => self.case.sequences = None,
            S::WithoutEightBit => options.eight_bit = None,
            S::RowsInOrder => {
                if let Some(sequences) = &mut self.case.sequences {
                    sequences.put_in_order();
                }
            }
            S::ContiguousLayouts => self.case.layouts = Layouts::default(),
            S::OrdinaryMagnitudes => self.magnitudes = Magnitudes::ordinary(),
            S::NumbersAsValues => {
                options.dropout_tensors = false;
                if let Some(offsets) = options.query_offsets.take() {
                    options.query_offset = QueryOffset::Fixed(offsets.first().copied().unwrap_or(0));
                }
            }
            S::WithoutDropout => (options.dropout, options.dropout_tensors) = (None, false),
            S::WithoutSoftcap => options.softcap = None,
            S::WithoutAlibi => options.alibi = None,
            S::WithoutSinks => options.sinks = false,
            S::WithoutMask => options.mask = None,
            S::WithoutBias => options.bias = None,
            S::WithoutLengths => (options.query_lengths, options.key_value_lengths) = (None, None),
            S::WithoutWindow => options.window = Window::UNBOUNDED,
            S::WithoutCausal => options.causal = false,
            S::WithoutOffset => {
                (options.query_offset, options.query_offsets) = (QueryOffset::TOP_LEFT, None);
            }
            S::WithoutDLse => options.d_lse = false,
            S::DefaultScale => options.scale = None,
            S::OneBatchRow if d.batch > 1 => d.batch = 1,
            S::OneKeyHead if d.key_heads > 1 => (d.query_heads, d.key_heads) = (d.group_size(), 1),
            S::OneGroup if d.query_heads > d.key_heads => d.query_heads = d.key_heads,
            S::HalfTheQueries if d.query_length > 1 => d.query_length /= 2,
            S::HalfTheKeys if d.key_length > 1 => d.key_length /= 2,
            S::HalfTheHeadDim if d.head_dim > 1 => d.head_dim /= 2,
            S::HalfTheValueHeadDim if d.value_head_dim > 1 => d.value_head_dim /= 2,
            _ => {}
        }
        fit(&mut self.case);
        let changed = before != (self.case.clone(), self.magnitudes.clone());
        if changed {
            self.simplifications.push(simplification);
        }
        changed
    }
}

/// What the case is, in one line.
impl fmt::Display for FuzzCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (d, o) = (&self.case.dims, &self.case.options);
        write!(f, "seed {}: {} {d}", self.seed, self.dtype)?;
        let mut named = |name: &str, value: Option<String>| match value {
            Some(value) => write!(f, ", {name} {value}"),
            None => Ok(()),
        };
        named("scale", o.scale.map(|scale| format!("{scale:e}")))?;
        named("causal", o.causal.then(String::new).map(|_| "true".to_owned()))?;
        let offset = o.query_offset;
        let by_row = o.query_offsets.as_ref().map(|offsets| format!("{offsets:?}"));
        let of_all = (offset != QueryOffset::TOP_LEFT).then(|| offset.to_string());
        named("offset", by_row.or(of_all))?;
        named("window", (!o.window.is_unbounded()).then(|| o.window.to_string()))?;
        named("softcap", o.softcap.map(|softcap| format!("{softcap:e}")))?;
        named("query lengths", o.query_lengths.as_ref().map(|lengths| format!("{lengths:?}")))?;
        named("key lengths", o.key_value_lengths.as_ref().map(|lengths| format!("{lengths:?}")))?;
        named("mask", o.mask.map(|mask| format!("[{}]", mask.name())))?;
        let extra = o.bias_dtype.unwrap_or(self.dtype);
        named("bias", o.bias.map(|bias| format!("[{}] {extra}", bias.name())))?;
        named("alibi", o.alibi.map(|shape| format!("{shape:?}")))?;
        named("sinks", o.sinks.then(|| extra.to_string()))?;
        let place = if o.dropout_tensors { " from tensors" } else { "" };
        named("dropout", o.dropout.map(|dropout| format!("{}{place}", dropout.rate)))?;
        named("d_lse", o.d_lse.then(|| "true".to_owned()))?;
        named("keys and values", o.eight_bit.map(|cache| format!("{cache:?}")))?;
        named("sequences", self.case.sequences.as_ref().map(|sequences| format!("{sequences:?}")))?;
        named("layouts", (self.case.layouts != Layouts::default()).then(|| "strided".to_owned()))?;
        write!(f, "{}", self.magnitudes)
    }
}

/// Brings lengths and layouts into what the sizes allow.
fn fit(case: &mut Case) {
    let d = case.dims;
    for (lengths, most) in [
        (&mut case.options.query_lengths, d.query_length),
        (&mut case.options.key_value_lengths, d.key_length),
    ] {
        if let Some(lengths) = lengths {
            lengths.truncate(d.batch);
            lengths.iter_mut().for_each(|length| *length = (*length).min(most));
        }
    }
    if let Some(offsets) = &mut case.options.query_offsets {
        offsets.truncate(d.batch);
    }
    let used = case.lengths(Role::Key);
    if let Some(sequences) = &mut case.sequences {
        sequences.fit(&used, d.key_length);
    }
    // The slices of a fused buffer are made for other numbers of heads.
    let fused = Role::ALL.iter().any(|&role| matches!(case.layouts.of(role), Layout::FusedSlice { .. }));
    if fused && case.layouts != Layouts::fused_qkv(d.query_heads, d.key_heads) {
        case.layouts = Layouts::default();
    }
}

/// Sizes that reach every path of a backend: batch rows computed in a wider type (at most 64 x 64), few query
/// rows over many keys, blocks with tails, many heads, long keys, and axes of size 0 and 1.
fn sizes(rng: &mut Rng) -> Dimensions {
    let edge = |rng: &mut Rng, edges: &[usize]| rng.pick(edges) + rng.below(3) - 1;
    let (mut heads, mut group) = (1 + rng.below(3), rng.pick(&[1, 1, 2, 3]));
    let mut batch = 1 + rng.below(3);
    let mut head_dim = match rng.below(4) {
        0 => 1 + rng.below(20),
        1 => edge(rng, &[16, 32, 64, 128]),
        2 => rng.pick(&[8, 16, 32, 64, 128]),
        _ => 1 + rng.below(100),
    };
    let (queries, keys) = match rng.below(12) {
        0 | 1 => (1 + rng.below(9), 1 + rng.below(9)),
        2 => (1 + rng.below(64), 1 + rng.below(64)),
        3 => (edge(rng, &[8, 16, 32, 63]), edge(rng, &[8, 16, 32, 63])),
        4 => (1 + rng.below(8), 65 + rng.below(700)),
        5 => (1 + rng.below(3), edge(rng, &[256, 512, 1024, 2048])),
        6 | 7 => (65 + rng.below(100), 65 + rng.below(300)),
        8 => (edge(rng, &[64, 96, 128, 192]), edge(rng, &[256, 512])),
        9 => {
            heads = 1 + rng.below(12);
            group = 1 + rng.below(8);
            (1 + rng.below(12), 1 + rng.below(120))
        }
        10 => {
            head_dim = 1 + rng.below(6);
            (1 + rng.below(4), 2000 + rng.below(5000))
        }
        _ => {
            let size = |rng: &mut Rng| rng.pick(&[0, 0, 1, 1, 2, 70]);
            batch = rng.below(3);
            (size(rng), size(rng))
        }
    };
    if rng.chance(0.03) {
        head_dim = rng.pick(&[192, 255, 256, 257, 576]);
    }
    let mut d = dims([batch, queries, keys, heads * group, heads, head_dim]);
    if rng.chance(0.2) {
        d.key_length = d.query_length;
    }
    if rng.chance(0.25) {
        d.value_head_dim = rng.pick(&[1, 3, 8, 16, 24, 33, 65]);
    }
    while work(&d) > MULTIPLICATIONS {
        if d.batch > 1 {
            d.batch -= 1;
        } else if d.query_heads > d.key_heads {
            d.query_heads -= d.key_heads;
        } else if d.key_heads > 1 {
            (d.query_heads, d.key_heads) = (d.key_heads - 1, d.key_heads - 1);
        } else if d.head_dim + d.value_head_dim > 16 {
            d.head_dim = d.head_dim.div_ceil(2);
            d.value_head_dim = d.value_head_dim.div_ceil(2);
        } else {
            d.query_length = d.query_length.div_ceil(2);
        }
    }
    d
}

fn work(d: &Dimensions) -> usize {
    d.logits().iter().product::<usize>() * (d.head_dim + d.value_head_dim)
}

fn options(case: &mut Case, rng: &mut Rng, density: f64) {
    let d = case.dims;
    let options = &mut case.options;
    if rng.chance(density / 2.0) {
        options.scale = Some(rng.pick(&[0.0, 0.5, 1.0, -0.25]));
    }
    options.causal = rng.chance(density);
    if rng.chance(density) {
        options.query_offset = match rng.below(6) {
            0 | 1 => QueryOffset::BottomRight,
            2 => QueryOffset::Fixed(rng.below(d.key_length + 2) as i64),
            3 => QueryOffset::Fixed(-(rng.below(d.query_length + 2) as i64)),
            4 => QueryOffset::Fixed(rng.pick(&[-1_000_000_000, 1_000_000_000, 1 << 40])),
            _ => QueryOffset::Fixed(rng.pick(&[i64::MIN, i64::MAX])),
        };
    }
    if rng.chance(density) {
        let side = |rng: &mut Rng| match rng.below(8) {
            0 | 1 => None,
            2 => Some(usize::MAX),
            _ => Some(rng.below(d.key_length + 2)),
        };
        options.window = Window { left: side(rng), right: side(rng) };
    }
    if rng.chance(density / 2.0) {
        options.softcap = Some(rng.pick(&[0.5, 1.0, 4.0, 50.0]));
    }
    let lengths = |rng: &mut Rng, full: usize| {
        let length = |rng: &mut Rng| if rng.chance(0.1) { 0 } else { full - rng.below(full.max(1)) };
        Some((0..d.batch).map(|_| length(rng)).collect())
    };
    if rng.chance(density / 2.0) {
        options.query_lengths = lengths(rng, d.query_length);
    }
    if rng.chance(density / 2.0) {
        options.key_value_lengths = lengths(rng, d.key_length);
    }
    let pattern = |rng: &mut Rng| rng.pick(&Broadcast::all());
    options.mask = rng.chance(density).then(|| pattern(rng));
    options.bias = rng.chance(density).then(|| pattern(rng));
    options.bias_dtype = rng.chance(0.5).then(|| rng.pick(&DType::FLOATS));
    options.alibi = rng.chance(density / 2.0).then(|| rng.pick(&[AlibiShape::Heads, AlibiShape::BatchHeads]));
    options.sinks = rng.chance(density / 2.0);
    if rng.chance(density / 2.0) {
        let rate = rng.pick(&[0.0, 0.05, 0.3, 0.8, 0.999]);
        options.dropout = Some(Dropout::new(rate, rng.next()).with_offset(rng.next() as u32));
    }
    options.lse = Wanted::IfDeclared;
    options.d_lse = rng.chance(density);
    options.gradients = [Gradients::QUERY, Gradients::KEY, Gradients::VALUE]
        .into_iter()
        .filter(|_| rng.chance(0.85))
        .fold(Gradients::NONE, |all, gradient| all | gradient);
    if options.gradients.is_empty() {
        options.gradients = Gradients::QKV;
    }
    case.content.mask = rng.pick(&[
        MaskContent::Random,
        MaskContent::Sparse,
        MaskContent::EmptyRows,
        MaskContent::AllTrue,
        MaskContent::AllFalse,
    ]);
    case.content.bias = rng.pick(&[
        BiasContent::Normal,
        BiasContent::Normal,
        BiasContent::NegativeInfinity,
        BiasContent::NegativeInfinityRows,
        BiasContent::LargeNegative,
    ]);
}

/// Layouts, drawn for each tensor or for all.
pub(super) fn layouts(d: &Dimensions, rng: &mut Rng) -> Layouts {
    const PLAIN: [Layout; 7] = [
        Layout::Contiguous,
        Layout::Transposed,
        Layout::Padded,
        Layout::InnerStride,
        Layout::Reversed { axis: 1 },
        Layout::Reversed { axis: 2 },
        Layout::Reversed { axis: 3 },
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
