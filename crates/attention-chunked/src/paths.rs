//! The code paths of a call: which there are, and which of them a call took.
//!
//! Tasks mark the paths that they take in a set of bits that all tasks of the call share; once the call is
//! done, the backend counts each path of the set. So a path costs a look at a shared line of the cache, and a
//! write the first time.

use std::sync::atomic::{AtomicU64, Ordering};

use attention_core::{DType, VariantCounter, Variants};

use crate::float::Float;
use crate::logits::Terms;

macro_rules! paths {
    ($($(#[$about:meta])* $name:ident: $text:literal,)*) => {
        /// A path: what the code chooses between, for a dtype and what it is computed in.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Path {
            $($(#[$about])* $name,)*
        }

        impl Path {
            const ALL: &'static [Self] = &[$(Self::$name),*];

            /// What it is called behind the dtype.
            const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

paths! {
    Chunk: "forward, chunk of rows",
    EightBit: "forward, keys and values of 8 bits",
    /// Products as they are, all of them allowed.
    Plain: "forward, softmax of products",
    /// Products that structure masks some of, or columns behind the last key.
    Structure: "forward, softmax at an edge",
    Bias: "forward, softmax with bias",
    Mask: "forward, softmax with mask",
    BiasAndMask: "forward, softmax with bias and mask",
    /// Logits made in the tile.
    ScaleFirst: "forward, softmax after scaling",
    Softcap: "forward, softmax after softcap",
    Dropout: "forward, softmax with dropout",
    /// Weights of disallowed keys told from those that are zero, and values that are not finite added apart.
    ValuesApart: "forward, values that are not finite",
    Rescaled: "forward, sums rescaled",
    MaskedBlock: "forward, block masked whole",
    DecodeWhole: "few rows, all keys",
    DecodeSplit: "few rows, parts and merge",
    DecodePages: "few rows, keys in pages",
    DecodeEightBit: "few rows, keys and values of 8 bits",
    DecodeStrided: "few rows, strided keys or values",
    DecodeValuesApart: "few rows, values that are not finite",
    DecodeAdded: "few rows, logits changed",
    Decode1: "few rows, 1",
    Decode2: "few rows, 2",
    Decode3: "few rows, 3",
    Decode4: "few rows, 4",
    DecodeMore: "few rows, 5 to 8",
    Together: "backward, all gradients of a head together",
    Queries: "backward, dq apart",
    Keys: "backward, dk and dv apart",
    GradientPlain: "backward, probabilities of products",
    GradientStructure: "backward, probabilities at an edge",
    GradientBias: "backward, probabilities with bias",
    GradientMask: "backward, probabilities with mask",
    GradientBiasAndMask: "backward, probabilities with bias and mask",
    GradientScaleFirst: "backward, probabilities after scaling",
    GradientSoftcap: "backward, probabilities after softcap",
    GradientDropout: "backward, dropout",
    GradientLargeScale: "backward, scale in two factors",
    GradientMaskedBlock: "backward, block masked whole",
    /// Packed by the kernel that computes them, and kept nowhere else.
    PackedAlone: "backward, gradients packed alone",
    /// Packed, and kept for what is not finite.
    PackedAndKept: "backward, gradients packed and kept",
    PackedLater: "backward, gradients packed from the tile",
    RowsApart: "backward, rows that are not finite",
    KeysApart: "backward, keys that are not finite",
    OwnSums: "backward, own sums of a row",
    BiasElements: "dbias, no axis summed",
    BiasOverQueries: "dbias, summed over queries",
    BiasOverKeys: "dbias, summed over keys",
    BiasOverBoth: "dbias, summed over queries and keys",
    Sinks: "dsinks",
}

/// What is done with the logits of a block.
#[derive(Clone, Copy)]
struct Applied {
    plain: Path,
    structure: Path,
    bias: Path,
    mask: Path,
    bias_and_mask: Path,
    scale_first: Path,
    softcap: Path,
}

impl Applied {
    /// The path of a block; `apply` says whether anything is masked or added.
    fn path<F: Float>(self, terms: &Terms<'_, F>, apply: bool) -> Path {
        match (terms.adds_bias(), terms.has_mask()) {
            _ if !apply => self.plain,
            _ if terms.has_softcap() => self.softcap,
            _ if terms.needs_tile() => self.scale_first,
            (false, false) => self.structure,
            (true, false) => self.bias,
            (false, true) => self.mask,
            (true, true) => self.bias_and_mask,
        }
    }
}

impl Path {
    /// How the softmax of a block goes.
    pub(crate) fn softmax<F: Float>(terms: &Terms<'_, F>, apply: bool) -> Self {
        let applied = Applied {
            plain: Self::Plain,
            structure: Self::Structure,
            bias: Self::Bias,
            mask: Self::Mask,
            bias_and_mask: Self::BiasAndMask,
            scale_first: Self::ScaleFirst,
            softcap: Self::Softcap,
        };
        applied.path(terms, apply)
    }

    /// How the probabilities of a block are computed again.
    pub(crate) fn gradient<F: Float>(terms: &Terms<'_, F>, apply: bool) -> Self {
        let applied = Applied {
            plain: Self::GradientPlain,
            structure: Self::GradientStructure,
            bias: Self::GradientBias,
            mask: Self::GradientMask,
            bias_and_mask: Self::GradientBiasAndMask,
            scale_first: Self::GradientScaleFirst,
            softcap: Self::GradientSoftcap,
        };
        applied.path(terms, apply)
    }

    /// Decoding of this number of query rows per key/value head.
    pub(crate) fn decode(rows: usize) -> Self {
        match rows {
            0 | 1 => Self::Decode1,
            2 => Self::Decode2,
            3 => Self::Decode3,
            4 => Self::Decode4,
            _ => Self::DecodeMore,
        }
    }

    /// The gradient of a bias of this shape.
    pub(crate) fn bias_gradient(shape: [usize; 4]) -> Self {
        match (shape[2] == 1, shape[3] == 1) {
            (false, false) => Self::BiasElements,
            (true, false) => Self::BiasOverQueries,
            (false, true) => Self::BiasOverKeys,
            (true, true) => Self::BiasOverBoth,
        }
    }
}

/// The paths that a call has taken so far.
#[derive(Debug, Default)]
pub(crate) struct Taken(AtomicU64);

const _: () = assert!(Path::ALL.len() <= 64);

impl Taken {
    /// This path too.
    #[inline]
    pub(crate) fn mark(&self, path: Path) {
        let bit = 1 << path as u32;
        if self.0.load(Ordering::Relaxed) & bit == 0 {
            self.0.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

/// What the engines of a dtype can do, as far as it says which paths there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// Whether gradients are packed by the kernel that computes them.
    pub(crate) packs_gradients: bool,
    /// Whether there is another engine for small batch rows.
    pub(crate) has_small: bool,
}

/// The counters of every path of a backend: for each dtype, and for each engine of the dtype.
#[derive(Debug)]
pub(crate) struct Paths {
    variants: Variants,
    counters: Vec<VariantCounter>,
}

impl Paths {
    /// Those that a backend may take with `threads` threads; `kind` says what the engines of a dtype are.
    pub(crate) fn new(threads: usize, kind: impl Fn(DType) -> Kind) -> Self {
        let variants = Variants::default();
        let mut counters = Vec::with_capacity(DType::FLOATS.len() * 2 * Path::ALL.len());
        for dtype in DType::FLOATS {
            let kind = kind(dtype);
            for small in [false, true] {
                let engine = if small { format!("{dtype} in f64") } else { dtype.to_string() };
                for &path in Path::ALL {
                    let name = format!("{engine}: {}", path.text());
                    if (kind.has_small || !small) && is_possible(path, dtype, small, kind, threads) {
                        variants.list([name.as_str()]);
                    }
                    // A path that is not listed, and is taken all the same, is a fault of the list, and is
                    // counted as one.
                    counters.push(variants.counter(&name));
                }
            }
        }
        Self { variants, counters }
    }

    pub(crate) fn variants(&self) -> &Variants {
        &self.variants
    }

    /// Counts what a call of this dtype has taken: on its engine, and on that of small batch rows.
    pub(crate) fn count(&self, dtype: DType, taken: [Taken; 2]) {
        let dtype = DType::FLOATS.iter().position(|&float| float == dtype).unwrap_or(0);
        for (small, taken) in taken.into_iter().enumerate() {
            let mut left = taken.0.into_inner();
            while left != 0 {
                self.counters[(dtype * 2 + small) * Path::ALL.len() + left.trailing_zeros() as usize].count();
                left &= left - 1;
            }
        }
    }
}

/// Whether a call can take the path.
fn is_possible(path: Path, dtype: DType, small: bool, kind: Kind, threads: usize) -> bool {
    match path {
        Path::DecodeSplit | Path::Queries | Path::Keys => threads > 1,
        Path::PackedAlone | Path::PackedAndKept => kind.packs_gradients && !small,
        // The range of f16 leaves no room for a factor before the sums.
        Path::GradientLargeScale => dtype != DType::F16,
        // In f64, for all batch rows.
        Path::Sinks => !small,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_each_path_once() {
        let kind = |dtype| Kind { packs_gradients: false, has_small: dtype == DType::F32 };
        let paths = Paths::new(2, kind);
        let (large, small) = (Taken::default(), Taken::default());
        for path in [Path::Chunk, Path::Chunk, Path::Sinks] {
            large.mark(path);
        }
        small.mark(Path::Decode3);
        paths.count(DType::F32, [large, small]);
        let runs = paths.variants().runs();
        let run: Vec<_> =
            runs.iter().filter(|one| one.runs > 0).map(|one| (one.name.as_str(), one.runs)).collect();
        assert_eq!(
            run,
            [("f32 in f64: few rows, 3", 1), ("f32: dsinks", 1), ("f32: forward, chunk of rows", 1)]
        );
        assert!(runs.iter().all(|one| one.listed || one.runs == 0));
        assert!(!runs.iter().any(|one| one.listed && one.name.starts_with("bf16 in f64")));
    }

    #[test]
    fn what_is_taken_without_being_listed_shows() {
        let paths = Paths::new(1, |_| Kind { packs_gradients: false, has_small: false });
        let taken = Taken::default();
        taken.mark(Path::PackedAlone);
        paths.count(DType::F64, [taken, Taken::default()]);
        let unlisted: Vec<_> =
            paths.variants().runs().into_iter().filter(|one| !one.listed && one.runs > 0).collect();
        assert_eq!(unlisted.len(), 1);
        assert_eq!(unlisted[0].name, "f64: backward, gradients packed alone");
    }
}
