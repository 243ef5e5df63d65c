//! Compiles a loop for the widest vectors of the machine and picks that version at run time.

/// A loop that LLVM vectorises. `run` and everything in it must be `#[inline(always)]`, so that it is
/// compiled with the instructions of the level it is called from.
pub(crate) trait Kernel {
    type Output;

    /// `FMA` tells whether the level has fused multiply-add as an instruction; elsewhere it would be a call.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// Runs a kernel at the level of this machine (baseline, AVX2 with FMA, AVX-512, NEON, ...).
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    struct AtLevel<K>(K);

    impl<K: Kernel> pulp::WithSimd for AtLevel<K> {
        type Output = K::Output;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> K::Output {
            if S::IS_SCALAR { self.0.run::<false>() } else { self.0.run::<true>() }
        }
    }

    pulp::Arch::new().dispatch(AtLevel(kernel))
}
