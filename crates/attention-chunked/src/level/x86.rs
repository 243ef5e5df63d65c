//! Detection of the levels of x86-64: what a machine lacks for each, as a sentence.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// The first of some features that the processor lacks.
macro_rules! first_missing {
    ($($feature:tt),*) => {
        [$(($feature, is_x86_feature_detected!($feature))),*]
            .into_iter()
            .find(|(_, there)| !there)
            .map(|(name, _)| format!("the processor has no {name}"))
    };
}

/// What the machine lacks for AVX2.
pub(super) fn avx2_lacks() -> Option<String> {
    first_missing!("avx2", "fma", "f16c")
}

/// What the machine lacks for AVX-512.
pub(super) fn avx512_lacks() -> Option<String> {
    first_missing!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
}

/// What the machine lacks for AMX, the vectors beside its tiles included.
pub(super) fn amx_lacks() -> Option<String> {
    avx512_lacks().or_else(|| first_missing!("avx512bf16")).or_else(tiles_lack)
}

/// What the machine lacks for tiles of bf16. Found out once per process: every call asks, and under a
/// hypervisor the instruction that tells costs more than a short call.
fn tiles_lack() -> Option<String> {
    static ANSWER: OnceLock<Option<&'static str>> = OnceLock::new();
    let answer = ANSWER.get_or_init(|| {
        // Leaf 7: bit 22 of EDX is AMX-BF16, bit 24 AMX-TILE.
        let features = __cpuid_count(7, 0).edx;
        if features >> 22 & 1 == 0 || features >> 24 & 1 == 0 {
            return Some("the processor has no amx-bf16");
        }
        (!permitted()).then_some("the operating system does not permit AMX tiles")
    });
    answer.map(str::to_owned)
}

/// Whether this process may use tiles. Linux wants to be asked; the permission is the process's.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
    const SYSCALL: i64 = 158;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let mut answer = SYSCALL;
    // SAFETY: a system call that takes two integers, touches no memory of this process and clobbers what is
    // named.
    unsafe {
        asm!("syscall", inlateout("rax") answer, in("rdi") REQUEST, in("rsi") TILE_DATA,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    answer == 0
}

/// Only Linux is known to permit tiles on request; other systems have not been tried.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
