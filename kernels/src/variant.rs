//! What a source is compiled with: the macros that host and kernels agree on, and the numbers in them.

/// A dtype as the kernels number it, `DTYPE_*` in `common/dtypes.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DTypeCode {
    /// IEEE double precision.
    F64 = 0,
    /// IEEE single precision.
    F32 = 1,
    /// IEEE half precision.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// Decided at run time.
    Any = 4,
    /// Signed integers of 32 bits, as the two that follow of the numbers of a call alone.
    I32 = 5,
    /// Unsigned integers of 32 bits.
    U32 = 6,
    /// Signed integers of 64 bits.
    I64 = 7,
    /// e4m3fn, as the one that follows of keys and values alone.
    F8E4M3 = 8,
    /// e5m2.
    F8E5M2 = 9,
}

impl DTypeCode {
    /// The number.
    pub const fn code(self) -> i32 {
        self as i32
    }
}

/// The options that a fused kernel is compiled for, `FEATURE_*` in `fused/parameters.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u32);

impl Features {
    /// No option.
    pub const NONE: Self = Self(0);
    /// A mask.
    pub const MASK: Self = Self(1);
    /// A bias.
    pub const BIAS: Self = Self(2);
    /// ALiBi slopes.
    pub const ALIBI: Self = Self(4);
    /// A soft cap.
    pub const SOFTCAP: Self = Self(8);
    /// Dropout.
    pub const DROPOUT: Self = Self(16);
    /// Logits must be complete before the row max, because more than a positive scale and a mask is applied
    /// to products.
    pub const LOGITS: Self = Self(32);
    /// All of them, which the kernel tests at run time.
    pub const ALL: Self = Self(63);

    /// The value of the macro `FEATURES`.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The options of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether there is none.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether there are all.
    pub const fn is_all(self) -> bool {
        self.0 == Self::ALL.0
    }
}

/// How the rows of sequences lie in the tensors of a fused kernel, `LAYOUT_*` in `fused/numbers.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Layout {
    /// Queries, keys and values are dense.
    #[default]
    Dense = 0,
    /// Queries are packed, keys and values packed or dense.
    Packed = 1,
    /// Keys and values are in pages, queries dense or packed. Of the forward pass.
    Paged = 2,
}

impl Layout {
    /// The value of the macro `LAYOUT`.
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// Which gradients the kernel for those of keys and values computes, `WANTED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum KeyGradients {
    /// Neither, of other kernels.
    None = 0,
    /// That of keys.
    Key = 1,
    /// That of values.
    Value = 2,
    /// Both.
    KeyAndValue = 3,
}

/// The keys of a split of a batch-invariant call, `KEYS_PER_SPLIT` in `fused/numbers.cuh`.
pub const KEYS_PER_SPLIT: usize = 2048;

/// Producer threads of a block whose products run on warpgroups, `PRODUCER_THREADS` in `fused/numbers.cuh`.
const PRODUCER_THREADS: usize = 128;

/// Threads of a block of a fused kernel: consumer warps and, beside warpgroups, the producer threads.
pub const fn block_threads(warps: usize, warpgroups: bool) -> usize {
    32 * warps + if warpgroups { PRODUCER_THREADS } else { 0 }
}

/// What a fused kernel is compiled with.
///
/// ```
/// use attention_kernels::{DTypeCode, Features, Fused, Variant};
///
/// let fused = Fused::new(DTypeCode::Bf16, 128).features(Features::MASK).tile(128, 64).warps(8).warpgroups(true);
/// assert_eq!(fused.threads(), 384);
/// assert!(Variant::Fused(fused).defines().contains(&"FEATURES=1".to_owned()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fused {
    dtype: DTypeCode,
    head: usize,
    value: usize,
    features: Features,
    bias_dtype: DTypeCode,
    term_stride: Option<usize>,
    rows: usize,
    keys: usize,
    warps: usize,
    warpgroups: bool,
    stages: usize,
    gradients: KeyGradients,
    slices: usize,
    tf32_split: bool,
    group: usize,
    layout: Layout,
    batch_invariant: bool,
    eight_bit: Option<DTypeCode>,
}

impl Fused {
    /// For operands of this dtype and head dimensions up to `head`: without options, tiles and stages, and
    /// with one warp, unless the other methods set them.
    pub const fn new(dtype: DTypeCode, head: usize) -> Self {
        Self {
            dtype,
            head,
            value: head,
            features: Features::NONE,
            bias_dtype: DTypeCode::Any,
            term_stride: None,
            rows: 0,
            keys: 0,
            warps: 1,
            warpgroups: false,
            stages: 0,
            gradients: KeyGradients::None,
            slices: 1,
            tf32_split: false,
            group: 1,
            layout: Layout::Dense,
            batch_invariant: false,
            eight_bit: None,
        }
    }

    /// The columns of values that a block computes, `VALUE`; as many as queries have by default.
    #[must_use]
    pub const fn value(self, value: usize) -> Self {
        Self { value, ..self }
    }

    /// The blocks that share the columns of values, `SLICES`.
    #[must_use]
    pub const fn slices(self, slices: usize) -> Self {
        Self { slices, ..self }
    }

    /// The options, `FEATURES`.
    #[must_use]
    pub const fn features(self, features: Features) -> Self {
        Self { features, ..self }
    }

    /// The dtype of the bias, `BIAS_DTYPE`; [`DTypeCode::Any`] by default.
    #[must_use]
    pub const fn bias_dtype(self, bias_dtype: DTypeCode) -> Self {
        Self { bias_dtype, ..self }
    }

    /// The stride of the mask or bias from key to key, `TERM_STRIDE`; `None`, the default, reads it at run
    /// time.
    #[must_use]
    pub const fn term_stride(self, term_stride: Option<usize>) -> Self {
        Self { term_stride, ..self }
    }

    /// The tile of query rows and keys, `ROWS` and `KEYS`.
    #[must_use]
    pub const fn tile(self, rows: usize, keys: usize) -> Self {
        Self { rows, keys, ..self }
    }

    /// The consumer warps, `WARPS`.
    #[must_use]
    pub const fn warps(self, warps: usize) -> Self {
        Self { warps, ..self }
    }

    /// Whether tiles and threads are made for products on warpgroups, `WARPGROUPS`.
    #[must_use]
    pub const fn warpgroups(self, warpgroups: bool) -> Self {
        Self { warpgroups, ..self }
    }

    /// The streamed tiles that shared memory has room for, `STAGES`.
    #[must_use]
    pub const fn stages(self, stages: usize) -> Self {
        Self { stages, ..self }
    }

    /// The gradients of keys and values that are computed, `WANTED`.
    #[must_use]
    pub const fn gradients(self, gradients: KeyGradients) -> Self {
        Self { gradients, ..self }
    }

    /// Whether f32 operands are split into two tf32 parts, `SPLIT`.
    #[must_use]
    pub const fn tf32_split(self, tf32_split: bool) -> Self {
        Self { tf32_split, ..self }
    }

    /// Rows of one of cuDNN's tiles, of which the first and the last alone are looked at for NaN, `GROUP`.
    #[must_use]
    pub const fn group(self, group: usize) -> Self {
        Self { group, ..self }
    }

    /// How rows lie in tensors, `LAYOUT`; [`Layout::Dense`] by default.
    #[must_use]
    pub const fn layout(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    /// Whether the bits of a sequence must not depend on the rest of the call, `BATCH_INVARIANT`. Of the
    /// forward pass and of the first kernel of the backward pass: the others do not differ.
    #[must_use]
    pub const fn batch_invariant(self, batch_invariant: bool) -> Self {
        Self { batch_invariant, ..self }
    }

    /// The dtype of keys and values of 8 bits, `EIGHT_BIT`; `None`, the default, for that of operands.
    #[must_use]
    pub const fn eight_bit(self, eight_bit: Option<DTypeCode>) -> Self {
        Self { eight_bit, ..self }
    }

    /// Threads of a block, `BLOCK`: the bound that the kernel is compiled with, so what it must be launched
    /// with.
    pub const fn threads(&self) -> usize {
        block_threads(self.warps, self.warpgroups)
    }

    fn defines(&self) -> Vec<String> {
        let mut defines = vec![
            format!("DTYPE={}", self.dtype.code()),
            format!("HEAD={}", self.head),
            format!("VALUE={}", self.value),
            format!("FEATURES={}", self.features.bits()),
            format!("BIAS_DTYPE={}", self.bias_dtype.code()),
            self.term_stride.map_or("TERM_STRIDE=-1".to_owned(), |stride| format!("TERM_STRIDE={stride}")),
            format!("ROWS={}", self.rows),
            format!("KEYS={}", self.keys),
            format!("WARPS={}", self.warps),
            format!("STAGES={}", self.stages),
            format!("WANTED={}", self.gradients as u32),
            format!("WARPGROUPS={}", u32::from(self.warpgroups)),
            format!("BLOCK={}", self.threads()),
        ];
        // The kernels have 1 for numbers, and else 0, where these are not defined.
        if self.slices > 1 {
            defines.push(format!("SLICES={}", self.slices));
        }
        if self.tf32_split {
            defines.push("SPLIT=1".to_owned());
        }
        if self.group > 1 {
            defines.push(format!("GROUP={}", self.group));
        }
        if self.layout != Layout::Dense {
            defines.push(format!("LAYOUT={}", self.layout.code()));
        }
        if self.batch_invariant {
            defines.push("BATCH_INVARIANT=1".to_owned());
        }
        if let Some(dtype) = self.eight_bit {
            defines.push(format!("EIGHT_BIT={}", dtype.code()));
        }
        defines
    }
}

/// What the sources of cuDNN's helper kernels (`attention_rows.cu`, `attention_terms.cu`) and of
/// `attention_numbers.cu` are compiled with: bounds on the threads of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Helper {
    /// `BLOCK`.
    pub threads: u32,
    /// Of the kernel that adds up the gradient of a sink, `SUMMING_BLOCK`.
    pub summing_threads: u32,
}

impl Helper {
    /// What the kernels are launched with.
    pub const LAUNCHED: Self = Self { threads: 128, summing_threads: 256 };

    fn defines(self) -> Vec<String> {
        vec![format!("BLOCK={}", self.threads), format!("SUMMING_BLOCK={}", self.summing_threads)]
    }
}

/// What a source is compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// A fused kernel.
    Fused(Fused),
    /// The helper kernels of cuDNN, and the one that stores numbers.
    Helper(Helper),
}

impl Variant {
    /// Variants of fused kernels.
    pub(crate) const fn fused<const N: usize>(fused: [Fused; N]) -> [Self; N] {
        let mut variants = [Self::Helper(Helper::LAUNCHED); N];
        let mut index = 0;
        while index < N {
            variants[index] = Self::Fused(fused[index]);
            index += 1;
        }
        variants
    }

    /// The macros, each `NAME=VALUE`. They are different for different variants.
    pub fn defines(&self) -> Vec<String> {
        match self {
            Self::Fused(fused) => fused.defines(),
            Self::Helper(helper) => helper.defines(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// The macros of a text whose names begin like this, with the numbers that they stand for.
    fn macros<'a>(text: &'a str, prefix: &str) -> BTreeMap<&'a str, i64> {
        let defines = text.lines().filter_map(|line| line.strip_prefix("#define "));
        let named = defines.filter_map(|define| define.strip_prefix(prefix)?.split_once(' '));
        named.map(|(name, number)| (name, number.trim().parse().unwrap())).collect()
    }

    #[test]
    fn dtypes_have_the_numbers_of_the_kernels() {
        let codes = [
            ("F64", DTypeCode::F64),
            ("F32", DTypeCode::F32),
            ("F16", DTypeCode::F16),
            ("BF16", DTypeCode::Bf16),
            ("ANY", DTypeCode::Any),
            ("I32", DTypeCode::I32),
            ("U32", DTypeCode::U32),
            ("I64", DTypeCode::I64),
            ("F8E4M3", DTypeCode::F8E4M3),
            ("F8E5M2", DTypeCode::F8E5M2),
        ];
        let codes: BTreeMap<_, _> = codes.map(|(name, dtype)| (name, i64::from(dtype.code()))).into();
        assert_eq!(macros(include_str!("cuda/common/dtypes.cuh"), "DTYPE_"), codes);
    }

    #[test]
    fn features_have_the_bits_of_the_kernels() {
        let bits = [
            ("MASK", Features::MASK),
            ("BIAS", Features::BIAS),
            ("ALIBI", Features::ALIBI),
            ("SOFTCAP", Features::SOFTCAP),
            ("DROPOUT", Features::DROPOUT),
            ("LOGITS", Features::LOGITS),
        ];
        let all = bits.iter().fold(Features::NONE, |all, &(_, feature)| all.with(feature));
        assert!(all.is_all());
        let bits: BTreeMap<_, _> = bits.map(|(name, feature)| (name, i64::from(feature.bits()))).into();
        assert_eq!(macros(include_str!("cuda/fused/parameters.cuh"), "FEATURE_"), bits);
    }

    #[test]
    fn layouts_have_the_numbers_of_the_kernels() {
        let layouts = [("DENSE", Layout::Dense), ("PACKED", Layout::Packed), ("PAGED", Layout::Paged)];
        let layouts: BTreeMap<_, _> = layouts.map(|(name, layout)| (name, i64::from(layout.code()))).into();
        assert_eq!(macros(include_str!("cuda/fused/numbers.cuh"), "LAYOUT_"), layouts);
    }

    #[test]
    fn gradients_have_the_bits_of_the_kernel() {
        let text = include_str!("cuda/fused/backward/keys/logit_gradients.cuh");
        for (name, gradients) in [("WANTS_KEYS", KeyGradients::Key), ("WANTS_VALUES", KeyGradients::Value)] {
            let test = format!("{name} = (WANTED & {}) != 0", gradients as u32);
            assert!(text.contains(&test), "{test}");
        }
        let both = KeyGradients::Key as u32 | KeyGradients::Value as u32;
        assert_eq!(KeyGradients::KeyAndValue as u32, both);
    }

    #[test]
    fn producer_threads_are_those_of_the_kernels() {
        let text = include_str!("cuda/fused/numbers.cuh");
        let threads = format!("constexpr int PRODUCER_THREADS = ON_WARPGROUPS ? {PRODUCER_THREADS} : 0;");
        assert!(text.contains(&threads), "{threads}");
    }

    #[test]
    fn keys_of_a_split_are_those_of_the_kernels() {
        let text = include_str!("cuda/fused/numbers.cuh");
        let keys = format!("constexpr int KEYS_PER_SPLIT = {KEYS_PER_SPLIT};");
        assert!(text.contains(&keys), "{keys}");
    }

    #[test]
    fn defaults_are_those_of_the_kernels() {
        let (numbers, contain) =
            (include_str!("cuda/fused/numbers.cuh"), include_str!("cuda/cudnn/contain.cuh"));
        for (text, name, default) in [
            (numbers, "SLICES", 1),
            (numbers, "SPLIT", 0),
            (contain, "GROUP", 1),
            (numbers, "LAYOUT", 0),
            (numbers, "BATCH_INVARIANT", 0),
            (numbers, "EIGHT_BIT", 0),
        ] {
            assert!(text.contains(&format!("#ifndef {name}\n#define {name} {default}\n#endif")), "{name}");
        }
    }

    /// Equal macros of variants that differ would be compiled twice, or worse, listed and not compiled.
    #[test]
    fn each_setting_changes_the_macros() {
        let base = Fused::new(DTypeCode::F32, 64);
        let variants = [
            base,
            Fused::new(DTypeCode::F64, 64),
            Fused::new(DTypeCode::F32, 128),
            base.value(32),
            base.slices(2),
            base.features(Features::MASK),
            base.bias_dtype(DTypeCode::F32),
            base.term_stride(Some(0)),
            base.term_stride(Some(1)),
            base.tile(64, 0),
            base.tile(0, 64),
            base.warps(4),
            base.warps(4).warpgroups(true),
            base.stages(2),
            base.gradients(KeyGradients::Key),
            base.tf32_split(true),
            base.group(16),
            base.layout(Layout::Packed),
            base.layout(Layout::Paged),
            base.batch_invariant(true),
            base.eight_bit(Some(DTypeCode::F8E4M3)),
            base.eight_bit(Some(DTypeCode::F8E5M2)),
        ];
        let defines: BTreeSet<_> =
            variants.iter().map(|&fused| Variant::Fused(fused).defines().join(" ")).collect();
        assert_eq!(defines.len(), variants.len(), "{defines:#?}");
        assert_eq!(
            Variant::Fused(base.tile(64, 32).stages(1)).defines().join(" "),
            "DTYPE=1 HEAD=64 VALUE=64 FEATURES=0 BIAS_DTYPE=4 TERM_STRIDE=-1 ROWS=64 KEYS=32 WARPS=1 STAGES=1 WANTED=0 \
             WARPGROUPS=0 BLOCK=32"
        );
    }
}
