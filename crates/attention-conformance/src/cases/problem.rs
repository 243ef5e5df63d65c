//! The problems of a case.

use attention_core::{
    BackwardInputs, Feature, FeatureSet, Gradients, Inputs, InvalidCall, Pass, Problem, ProblemBuilder, Role,
};

use super::{Case, CaseData};

impl Case {
    /// The problem of this case for a pass, on tensors made by [`Case::data`]. `declared` are the features
    /// that the backend declares for the pass, which decide about outputs that are
    /// [`Wanted::IfDeclared`](super::Wanted::IfDeclared).
    ///
    /// # Errors
    /// Where the case is no valid call. Generated cases always are.
    pub fn problem(&self, data: &CaseData, pass: Pass, declared: FeatureSet) -> Result<Problem, InvalidCall> {
        let options = &self.options;
        let mut builder = self.with_options(data.inputs().problem()).longest(
            data.numbers.query_starts.as_ref().map(|_| self.dims.query_length),
            data.numbers.places_keys().then_some(self.dims.key_length),
        );
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
    ) -> Result<Problem, InvalidCall> {
        // The range of the offsets is that of all rows.
        let builder = self.with_options(inputs.problem()).alignment(whole.alignment());
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

    /// The options that are no numbers of the call.
    fn with_options(&self, builder: ProblemBuilder) -> ProblemBuilder {
        let options = &self.options;
        let builder = builder.causal(options.causal).window(options.window);
        builder.deterministic(options.deterministic).batch_invariant(options.batch_invariant)
    }
}
