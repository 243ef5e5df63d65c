//! What kernels are compiled for.

use attention_core::{DType, Problem, Role};
use attention_cuda::parameters::dtype_code;

/// What there is to a logit beside a product and a scale above 0, and to a probability; the bits are those of `FEATURES` in
/// the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Features(u32);

impl Features {
    const MASK: u32 = 1;
    const BIAS: u32 = 2;
    const ALIBI: u32 = 4;
    const SOFTCAP: u32 = 8;
    const DROPOUT: u32 = 16;
    const NATURAL: u32 = 32;
    const ALL: u32 = 63;

    /// One for each choice that tiles depend on: nothing, one option, all of them.
    pub(crate) const KINDS: [Self; 3] = [Self(0), Self(Self::MASK), Self(Self::ALL)];

    /// What the kernels of a problem look for. Each of the options alone has kernels of its own; several together share
    /// those that look for all of them, since nobody wants to wait for the compiler for every combination.
    pub(crate) fn of(problem: &Problem) -> Self {
        let options = [
            (Self::MASK, problem.has(Role::Mask)),
            (Self::BIAS, problem.has(Role::Bias)),
            (Self::ALIBI, problem.has(Role::AlibiSlopes)),
            (Self::SOFTCAP, problem.softcap().is_some()),
            (Self::DROPOUT, problem.dropout_stream().is_some_and(|stream| stream.threshold() > 0)),
        ];
        let present = options.into_iter().filter(|&(_, present)| present).fold(0, |all, (bit, _)| all | bit);
        // A mask leaves products as they are. The maximum of products times a scale is the scale times their maximum only
        // for a scale above 0, which must be a number in base two as well.
        let natural = present & !(Self::MASK | Self::DROPOUT) != 0 || !is_factor(problem);
        match present.count_ones() {
            1 if present == Self::ALIBI && is_far(problem) => Self(Self::ALL),
            0 | 1 => Self(present | if natural { Self::NATURAL } else { 0 }),
            _ => Self(Self::ALL),
        }
    }

    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// Whether the kernels look for nothing.
    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether the kernels look for everything.
    pub(crate) fn is_all(self) -> bool {
        self.0 == Self::ALL
    }

    /// Whether the kernels may read a mask or bias for many keys at a time, `PACKS_MASK` and `PACKS_BIAS`:
    /// those read a bias of f32 key by key, which this does not look at.
    pub(crate) fn packs(self) -> bool {
        matches!(self.0 & !Self::NATURAL, Self::MASK | Self::BIAS)
    }

    /// The bias's dtype as the kernels are compiled for it.
    pub(crate) fn bias_dtype(self, problem: &Problem) -> i32 {
        match problem.tensor(Role::Bias) {
            Some(bias) if self.0 == Self::BIAS | Self::NATURAL => dtype_code(bias.dtype()),
            _ => ANY_DTYPE,
        }
    }

    /// The stride of the mask or bias from key to key, as the kernels are compiled for it.
    pub(crate) fn term_stride(self, problem: &Problem) -> i64 {
        let role = match self.0 & !Self::NATURAL {
            Self::MASK => Role::Mask,
            Self::BIAS => Role::Bias,
            _ => return ANY_STRIDE,
        };
        match problem.tensor(role).map(|desc| (desc.shape()[3], desc.strides()[3])) {
            Some((1, _) | (_, 0)) => 0,
            Some((_, 1)) => 1,
            _ => ANY_STRIDE,
        }
    }
}

/// Whether the scale is a normal number above 0 in the precision of logits, and stays one times log2(e). Infinity times no difference
/// would be NaN, and so would 0 times infinity.
fn is_factor(problem: &Problem) -> bool {
    let (least, most) = match problem.dtype() {
        DType::F64 => (1e-300, 1e308),
        _ => (1e-37, 2e38),
    };
    (least..=most).contains(&problem.scale())
}

/// Whether distances between rows and keys may not be exact in f32.
fn is_far(problem: &Problem) -> bool {
    const FAR: u64 = 1 << 23;
    let dims = problem.dims();
    let offset = (0..dims.batch).map(|batch| problem.offset(batch).unsigned_abs()).max().unwrap_or(0);
    offset.saturating_add(dims.query_length as u64) > FAR || dims.key_length as u64 > FAR
}

/// `TERM_STRIDE` of kernels that read it at run time.
const ANY_STRIDE: i64 = -1;

/// `DTYPE_ANY` of the kernels.
const ANY_DTYPE: i32 = 4;
