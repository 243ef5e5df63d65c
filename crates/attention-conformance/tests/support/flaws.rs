//! The ways in which a backend can be wrong.

use attention_core::{Feature, FeatureSet};

// Each test binary uses some of them.
#[allow(dead_code)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Flaw {
    None,
    // In the contract.
    PoisonLeft,
    WritesOutside,
    Panic,
    ScratchUnchecked,
    AcceptsEverything,
    RefusesWhatItDeclares,
    PlansWhatItRefuses,
    PlanFails,
    PlanPanics,
    PlanIsOfAnotherProblem,
    PlanAsksForMoreScratch,
    RunsCallsOfOtherProblems,
    ChangesFromCallToCall,
    ChangesFromPlanToPlan,
    DependsOnTheBatch,
    DependsOnPadding,
    DependsOnStrides,
    DependsOnMaskedMemory,
    DependsOnOtherRows,
    DependsOnTheLayout,
    CutsKeysByTheirBound,
    OrdersRowsByTheirBound,
    KeepsLengths,
    KeepsOffsets,
    KeepsScale,
    KeepsSoftcap,
    KeepsSeed,
    // In the numbers.
    ScaleOff(f64),
    OutputOff(f64),
    GradientOff(f64),
    LastKeyMissing,
    Ignores(Feature),
    WindowOffByOne,
    OffsetOffByOne,
    MaskInverted,
    DropoutOtherSeed,
    DropoutUnscaled,
    SoftcapAfterBias,
    GroupsInterleaved,
    EmptyRowsAreMeans,
    MaskedByMultiplication,
    LseInBaseTwo,
    BiasGradientNotSummed,
    // In sequences that are packed or in pages.
    ReadsTheNextSequence,
    IgnoresStarts,
    IgnoresTheTable,
    IgnoresUsedKeys,
    LeavesRowsOfNoSequence,
    PositionsOfTheTensor,
    DropoutOfTheTensor,
    // In 8-bit keys and values.
    IgnoresKeyScales,
    IgnoresValueScales,
    ScalesOfTheFirstHead,
    ScalesOfTheFirstSequence,
    ScalesOfTheQueryHead,
    // In large numbers.
    BaseTwoBeforeTheShift,
    FarBelowIsMasked,
    StoredLseWhateverItsDigits,
    CapSlopeMissing,
}

impl Flaw {
    /// The features that a backend with this flaw declares.
    pub(crate) fn declared(self, all: FeatureSet) -> FeatureSet {
        match self {
            Flaw::AcceptsEverything | Flaw::PlansWhatItRefuses => all.without(Feature::Causal),
            _ => all,
        }
    }

    pub(crate) fn ignores(self, feature: Feature) -> bool {
        self == Flaw::Ignores(feature)
    }
}
