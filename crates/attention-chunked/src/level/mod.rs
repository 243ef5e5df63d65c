//! Instruction sets that the kernels are written for, and which of them this machine has.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;
use std::str::FromStr;

/// An instruction set that the kernels have a version for.
///
/// Results of one level are bitwise reproducible; those of two levels agree within the error bounds of the
/// numerics class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// Plain Rust, compiled for whatever the target has by default: SSE2 on x86-64, NEON on 64-bit Arm. Runs
    /// everywhere.
    Scalar,
    /// 256-bit AVX2 with FMA and F16C.
    Avx2,
    /// 512-bit AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX-512 with BF16, and the AMX matrix unit for halves; other dtypes as [`Avx512`](Self::Avx512).
    Amx,
}

impl Level {
    /// Every level, slowest first.
    pub const ALL: [Level; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx];

    /// The environment variable that forces a level, for tests.
    pub const VARIABLE: &'static str = "ATTENTION_CPU_LEVEL";

    /// The name, as in [`VARIABLE`](Self::VARIABLE).
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// What is missing for this level here, or `Ok`. For AMX this asks the operating system for permission to
    /// use tiles, once per process.
    ///
    /// # Errors
    /// A sentence that names what the machine lacks.
    pub fn check(self) -> Result<(), String> {
        match self {
            Self::Scalar => Ok(()),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::avx2_lacks().map_or(Ok(()), Err),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => x86::avx512_lacks().map_or(Ok(()), Err),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => x86::amx_lacks().map_or(Ok(()), Err),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Amx => Err(format!("{self} exists on x86-64 alone")),
        }
    }

    /// Whether this machine has the level.
    pub fn is_available(self) -> bool {
        self.check().is_ok()
    }

    /// The levels of this machine, slowest first.
    pub fn available() -> impl Iterator<Item = Level> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The fastest level of this machine.
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self::Scalar)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|level| level.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("unknown level '{text}'; known are {known}")
        })
    }
}
