//! The options of a case, as data that needs no tensors.

use attention_core::{
    BackwardInputs, DType, Dimensions, Dropout, Feature, FeatureSet, Gradients, Inputs, InvalidCall, Pass,
    Problem, ProblemBuilder, QueryOffset, Role, Window,
};
use serde::{Deserialize, Serialize};

use super::{Case, CaseData};

/// Which axes of `[B, N, T, S]` a mask or bias has in full; the others have size 1. Axes before the last `rank`
/// are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broadcast {
    /// 1 to 4.
    pub rank: usize,
    /// For B, N, T and S.
    pub full: [bool; 4],
}

impl Broadcast {
    /// `[B, N, T, S]`.
    pub const FULL: Self = Self { rank: 4, full: [true; 4] };

    /// Every pattern of every rank.
    pub fn all() -> Vec<Self> {
        let mut patterns = Vec::new();
        for rank in 1..=4 {
            for bits in 0..1usize << rank {
                let mut full = [false; 4];
                for axis in 0..rank {
                    full[4 - rank + axis] = bits >> (rank - 1 - axis) & 1 == 1;
                }
                patterns.push(Self { rank, full });
            }
        }
        patterns
    }

    /// The shape for these sizes.
    pub fn shape(&self, dims: &Dimensions) -> Vec<usize> {
        let sizes = dims.logits();
        (4 - self.rank..4).map(|axis| if self.full[axis] { sizes[axis] } else { 1 }).collect()
    }

    /// The row-major index, in a tensor of this shape, of the element that a position `[b, n, t, s]` reads.
    pub(crate) fn index(&self, shape: &[usize], position: [usize; 4]) -> usize {
        (4 - self.rank..4)
            .zip(shape)
            .fold(0, |flat, (axis, &size)| flat * size + if self.full[axis] { position[axis] } else { 0 })
    }

    /// The pattern as in `B11S`: a letter for a full axis, 1 for a broadcast one.
    pub fn name(&self) -> String {
        (4 - self.rank..4).map(|axis| if self.full[axis] { b"BNTS"[axis] as char } else { '1' }).collect()
    }
}

/// The shape of ALiBi slopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlibiShape {
    /// `[N]`.
    Heads,
    /// `[B, N]`.
    BatchHeads,
}

/// Whether a case asks for an output that backends may lack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Never.
    Never,
    /// Where the backend declares that it has it, so that a backend without it runs the rest of the case.
    #[default]
    IfDeclared,
    /// Always: a backend without it is skipped.
    Always,
}

impl Wanted {
    fn holds(self, declared: FeatureSet, feature: Feature) -> bool {
        match self {
            Wanted::Never => false,
            Wanted::IfDeclared => declared.contains(feature),
            Wanted::Always => true,
        }
    }
}

/// The options of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// As in a problem.
    pub scale: Option<f64>,
    /// As in a problem.
    pub causal: bool,
    /// As in a problem.
    pub query_offset: QueryOffset,
    /// As in a problem.
    pub window: Window,
    /// As in a problem.
    pub softcap: Option<f64>,
    /// Query lengths, one a batch row.
    pub query_lengths: Option<Vec<usize>>,
    /// Key/value lengths, one a batch row.
    pub key_value_lengths: Option<Vec<usize>>,
    /// A boolean mask.
    pub mask: Option<Broadcast>,
    /// An additive bias.
    pub bias: Option<Broadcast>,
    /// The dtype of bias, slopes and sinks; the query's where `None`.
    pub bias_dtype: Option<DType>,
    /// ALiBi slopes.
    pub alibi: Option<AlibiShape>,
    /// Attention sinks.
    pub sinks: bool,
    /// As in a problem.
    pub dropout: Option<Dropout>,
    /// Whether forward writes the logsumexp.
    pub lse: Wanted,
    /// Whether backward has an incoming gradient of the logsumexp.
    pub d_lse: bool,
    /// Which of dq, dk and dv backward writes.
    pub gradients: Gradients,
    /// Whether backward writes dbias, if there is a bias.
    pub dbias: Wanted,
    /// Whether backward writes dsinks, if there are sinks.
    pub dsinks: Wanted,
    /// As in a problem.
    pub deterministic: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: None,
            causal: false,
            query_offset: QueryOffset::TOP_LEFT,
            window: Window::UNBOUNDED,
            softcap: None,
            query_lengths: None,
            key_value_lengths: None,
            mask: None,
            bias: None,
            bias_dtype: None,
            alibi: None,
            sinks: false,
            dropout: None,
            lse: Wanted::default(),
            d_lse: false,
            gradients: Gradients::QKV,
            dbias: Wanted::default(),
            dsinks: Wanted::default(),
            deterministic: false,
        }
    }
}

impl Case {
    /// The problem of this case for a pass, on tensors made by [`Case::data`]. `declared` are the features that
    /// the backend declares for the pass, which decide about outputs that are [`Wanted::IfDeclared`].
    ///
    /// # Errors
    /// Where the case is no valid call. Generated cases always are.
    pub fn problem(&self, data: &CaseData, pass: Pass, declared: FeatureSet) -> Result<Problem, InvalidCall> {
        let options = &self.options;
        let mut builder = self.with_options(data.inputs().problem());
        if let Some(lengths) = &options.query_lengths {
            builder = builder.query_lengths(lengths);
        }
        if let Some(lengths) = &options.key_value_lengths {
            builder = builder.key_value_lengths(lengths);
        }
        let roles: &[Role] = match pass {
            Pass::Forward => {
                builder = builder.lse(options.lse.holds(declared, Feature::Lse));
                &[Role::Out, Role::Lse]
            }
            Pass::Backward => {
                let mut gradients = options.gradients;
                if options.bias.is_some() && options.dbias.holds(declared, Feature::DBias) {
                    gradients = gradients | Gradients::BIAS;
                }
                if data.sinks.is_some() && options.dsinks.holds(declared, Feature::DSinks) {
                    gradients = gradients | Gradients::SINKS;
                }
                builder = builder.gradients(gradients).d_lse(options.d_lse);
                &[
                    Role::Out,
                    Role::Lse,
                    Role::DOut,
                    Role::DLse,
                    Role::DQuery,
                    Role::DKey,
                    Role::DValue,
                    Role::DBias,
                    Role::DSinks,
                ]
            }
        };
        // Built once for the shapes of its results, and again with their layouts.
        let plain = builder.clone().build()?;
        for &role in roles {
            if let Some(desc) = plain.tensor(role) {
                builder = builder.layout(role, self.layouts.desc(role, desc));
            }
        }
        builder.build()
    }

    /// The problem of one batch row of `whole`, a problem of this case, on views of that row.
    pub(crate) fn problem_of_row(
        &self,
        inputs: &Inputs<'_>,
        saved: Option<&BackwardInputs<'_>>,
        whole: &Problem,
        row: usize,
    ) -> Result<Problem, InvalidCall> {
        let mut builder = self.with_options(inputs.problem());
        if self.options.query_lengths.is_some() {
            builder = builder.query_lengths([whole.query_len(row)]);
        }
        if self.options.key_value_lengths.is_some() {
            builder = builder.key_value_lengths([whole.key_value_len(row)]);
        }
        let Some(saved) = saved else {
            return builder.lse(whole.has(Role::Lse)).build();
        };
        let builder = builder
            .gradients(whole.gradients())
            .d_lse(saved.d_lse.is_some())
            .layout(Role::Out, saved.out.desc())
            .layout(Role::Lse, saved.lse.desc())
            .layout(Role::DOut, saved.d_out.desc());
        saved.d_lse.iter().fold(builder, |builder, d_lse| builder.layout(Role::DLse, d_lse.desc())).build()
    }

    /// The options that do not depend on the batch.
    fn with_options(&self, builder: ProblemBuilder) -> ProblemBuilder {
        let options = &self.options;
        builder
            .scale(options.scale)
            .causal(options.causal)
            .query_offset(options.query_offset)
            .window(options.window)
            .softcap(options.softcap)
            .dropout(options.dropout)
            .deterministic(options.deterministic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_are_all_there_and_have_their_shapes() {
        let all = Broadcast::all();
        assert_eq!(all.len(), 2 + 4 + 8 + 16);
        let dims = super::super::dims([2, 3, 5, 4, 4, 8]);
        let padding = all.iter().find(|pattern| pattern.name() == "B11S").unwrap();
        assert_eq!(padding.shape(&dims), [2, 1, 1, 5]);
        let rows = all.iter().find(|pattern| pattern.name() == "T1").unwrap();
        assert_eq!(rows.shape(&dims), [3, 1]);
    }
}
