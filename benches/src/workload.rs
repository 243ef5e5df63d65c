//! A call with its data, ready to be run again and again.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dimensions, Error,
    ForwardCall, ForwardOutputs, Gradients, Inputs, InvalidCall, Plan, Problem, ProblemBuilder, Role,
    ScratchBuffer, TensorDesc,
};

use crate::buffer::Buffer;
use crate::sequences::{Layout, Places, Sequences};

/// What one measurement runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The forward pass.
    Forward,
    /// The forward pass with its logsumexp, then the backward pass for query, key and value.
    Both,
}

/// What masks the logits besides causality.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mask {
    /// Nothing.
    #[default]
    None,
    /// A boolean mask `[B, 1, T, S]`, nine tenths true.
    Bool,
    /// A bias `[1, N, T, S]` of the query's dtype.
    Bias,
}

macro_rules! named {
    ($type:ty, $what:literal, $($variant:path => $name:literal),*) => {
        impl $type {
            /// The name on command lines and in records.
            pub const fn name(self) -> &'static str {
                match self { $($variant => $name,)* }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok($variant),)*
                    _ => Err(format!(concat!("unknown ", $what, " '{}'; known are {}"), text, [$($name),*].join(", "))),
                }
            }
        }
    };
}
named!(Work, "pass", Work::Forward => "forward", Work::Both => "both");
named!(Mask, "mask", Mask::None => "none", Mask::Bool => "bool", Mask::Bias => "bias");

/// One call with inputs and outputs of its own.
///
/// # Examples
/// ```
/// use attention_benches::{Mask, Work, Workload, parse_shape};
/// use attention_core::{DType, ScratchBuffer};
/// use attention_cpu::CpuBackend;
///
/// let dims = parse_shape("1,16,16,2,2,8")?;
/// let mut workload = Workload::new(dims, DType::F32, Work::Both, true, Mask::None)?;
/// let plans = workload.plan(&CpuBackend::new())?;
/// let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
/// workload.run(&plans, &mut scratch)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Workload {
    forward: Problem,
    backward: Option<Problem>,
    query: Buffer,
    key: Buffer,
    value: Buffer,
    mask: Option<Buffer>,
    bias: Option<Buffer>,
    out: Buffer,
    lse: Option<Buffer>,
    saved: Option<Saved>,
    /// Where sequences are, where rows are not those of a rectangle.
    places: Places,
    /// Operations of a forward pass.
    forward_flops: f64,
}

/// The passes of a workload, planned by a backend.
#[derive(Clone, Debug)]
pub struct Plans {
    forward: Arc<dyn Plan>,
    backward: Option<Arc<dyn Plan>>,
}

impl Plans {
    /// Bytes of scratch that [`Workload::run`] needs: passes run one after the other and share them.
    pub fn scratch_bytes(&self) -> usize {
        self.forward.scratch_bytes().max(self.backward.as_ref().map_or(0, |plan| plan.scratch_bytes()))
    }
}

/// What only a workload with a backward pass has.
#[derive(Clone, Debug)]
struct Saved {
    d_out: Buffer,
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
}

impl Workload {
    /// Makes the problem and its data, and touches all of its memory.
    ///
    /// # Errors
    /// [`InvalidCall`] where the sizes make no problem.
    pub fn new(
        dims: Dimensions,
        dtype: DType,
        work: Work,
        causal: bool,
        mask: Mask,
    ) -> Result<Self, InvalidCall> {
        let [b, n, t, s] = dims.logits();
        let mut builder = dims.problem(dtype).causal(causal).lse(work == Work::Both);
        match mask {
            Mask::None => {}
            Mask::Bool => builder = builder.mask(TensorDesc::contiguous(DType::Bool, [b, 1, t, s])),
            Mask::Bias => builder = builder.bias(TensorDesc::contiguous(dtype, [1, n, t, s])),
        }
        let [b, n, t, s] = [b, n, t, s].map(|size| size as f64);
        let flops = 2.0 * b * n * t * s * (dims.head_dim + dims.value_head_dim) as f64;
        Self::of(builder, work, Places::default(), if causal { 0.5 * flops } else { flops })
    }

    /// A call of sequences whose rows lie in this way.
    ///
    /// # Errors
    /// [`InvalidCall`] where the sizes make no problem, such as pages in a backward pass.
    pub fn of_sequences(
        sequences: &Sequences,
        layout: Layout,
        dtype: DType,
        work: Work,
        causal: bool,
    ) -> Result<Self, InvalidCall> {
        let (builder, places) = sequences.problem(layout, dtype, dtype)?;
        let flops = sequences.forward_flops();
        let builder = builder.causal(causal).lse(work == Work::Both);
        Self::of(builder, work, places, if causal { 0.5 * flops } else { flops })
    }

    fn of(
        builder: ProblemBuilder,
        work: Work,
        places: Places,
        forward_flops: f64,
    ) -> Result<Self, InvalidCall> {
        let forward = builder.clone().build()?;
        let backward = match work {
            Work::Forward => None,
            Work::Both => Some(builder.lse(false).gradients(Gradients::QKV).build()?),
        };

        let normal = |role: Role| Buffer::normal(&desc(&forward, role), role as u64);
        let saved = backward.as_ref().map(|backward| Saved {
            d_out: Buffer::normal(&desc(backward, Role::DOut), Role::DOut as u64),
            dq: Buffer::poisoned(&desc(backward, Role::DQuery)),
            dk: Buffer::poisoned(&desc(backward, Role::DKey)),
            dv: Buffer::poisoned(&desc(backward, Role::DValue)),
        });
        Ok(Self {
            query: normal(Role::Query),
            key: normal(Role::Key),
            value: normal(Role::Value),
            mask: forward.tensor(Role::Mask).map(|desc| Buffer::mask(desc, Role::Mask as u64)),
            bias: forward.has(Role::Bias).then(|| normal(Role::Bias)),
            out: Buffer::poisoned(&desc(&forward, Role::Out)),
            lse: forward.tensor(Role::Lse).map(Buffer::poisoned),
            saved,
            places,
            forward_flops,
            forward,
            backward,
        })
    }

    /// Has a backend plan the passes.
    ///
    /// # Errors
    /// As the backend says, where it refuses a pass.
    pub fn plan(&self, backend: &dyn AttentionBackend) -> Result<Plans, Error> {
        let backward = self.backward.as_ref().map(|problem| backend.plan(problem)).transpose()?;
        Ok(Plans { forward: backend.plan(&self.forward)?, backward })
    }

    /// Makes the call once, with the plans of this workload.
    ///
    /// # Errors
    /// As the backend's passes.
    pub fn run(&mut self, plans: &Plans, scratch: &mut ScratchBuffer) -> Result<(), Error> {
        let mut inputs = Inputs::new(self.query.view()?, self.key.view()?, self.value.view()?);
        inputs.mask = self.mask.as_ref().map(Buffer::view).transpose()?;
        inputs.bias = self.bias.as_ref().map(Buffer::view).transpose()?;
        inputs.data = CallData {
            query_lengths: self.places.view(Role::QueryLengths)?,
            key_value_lengths: self.places.view(Role::KeyValueLengths)?,
            query_starts: self.places.view(Role::QueryStarts)?,
            key_value_starts: self.places.view(Role::KeyValueStarts)?,
            block_table: self.places.view(Role::BlockTable)?,
            ..CallData::default()
        };
        let outputs = ForwardOutputs {
            out: self.out.view_mut()?,
            lse: self.lse.as_mut().map(Buffer::view_mut).transpose()?,
        };
        let call = ForwardCall::new(plans.forward.problem(), inputs, outputs)?;
        plans.forward.forward(call, scratch.scratch())?;

        let (Some(plan), Some(saved), Some(lse)) = (&plans.backward, &mut self.saved, &self.lse) else {
            return Ok(());
        };
        let given = BackwardInputs {
            out: self.out.view()?,
            lse: lse.view()?,
            d_out: saved.d_out.view()?,
            d_lse: None,
        };
        let gradients = BackwardOutputs {
            dq: Some(saved.dq.view_mut()?),
            dk: Some(saved.dk.view_mut()?),
            dv: Some(saved.dv.view_mut()?),
            ..BackwardOutputs::default()
        };
        plan.backward(BackwardCall::new(plan.problem(), inputs, given, gradients)?, scratch.scratch())
    }

    /// Useful floating-point operations of one [`run`](Self::run): `2 B N T S (H + Hv)` forward, 2.5 times
    /// that backward, half of it for a causal call. Those of padding do not count, whether they are made or
    /// not.
    pub fn flops(&self) -> f64 {
        if self.backward.is_some() { 3.5 * self.forward_flops } else { self.forward_flops }
    }
}

/// A tensor that every problem of the pass has.
fn desc(problem: &Problem, role: Role) -> TensorDesc {
    *problem.tensor(role).expect("every problem has its pass's operands and outputs")
}

#[cfg(test)]
mod tests {
    use attention_cpu::CpuBackend;

    use super::*;
    use crate::parse_shape;

    #[test]
    fn every_kind_of_work_writes_all_outputs() {
        let dims = parse_shape("2,9,17,4,2,8,5").unwrap();
        let backend = CpuBackend::new();
        for dtype in DType::FLOATS {
            for work in [Work::Forward, Work::Both] {
                for mask in [Mask::None, Mask::Bool, Mask::Bias] {
                    let mut workload = Workload::new(dims, dtype, work, false, mask).unwrap();
                    let plans = workload.plan(&backend).unwrap();
                    let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
                    workload.run(&plans, &mut scratch).unwrap();
                    assert!(workload.out.is_written(), "{dtype} {work} {mask}");
                    let written = |saved: &Saved| [&saved.dq, &saved.dk, &saved.dv].map(Buffer::is_written);
                    assert_eq!(
                        workload.saved.as_ref().map(written),
                        (work == Work::Both).then_some([true; 3])
                    );
                }
            }
        }
    }

    #[test]
    fn operations_are_counted_as_the_peers_count_them() {
        let dims = parse_shape("2,3,5,4,2,8").unwrap();
        let flops = |work, causal| Workload::new(dims, DType::F32, work, causal, Mask::None).unwrap().flops();
        let forward = 4.0 * (2 * 4 * 3 * 5 * 8) as f64;
        assert_eq!(flops(Work::Forward, false), forward);
        assert_eq!(flops(Work::Both, false), 3.5 * forward);
        assert_eq!(flops(Work::Forward, true), 0.5 * forward);
    }

    #[test]
    fn every_layout_of_sequences_is_served_in_its_shape() {
        let sequences = Sequences::uniform(3, 9, 4, 2, 8);
        let [rows, _] = sequences.longest();
        let backend = CpuBackend::new();
        let run = |layout, work| {
            let mut workload = Workload::of_sequences(&sequences, layout, DType::F32, work, true).unwrap();
            let plans = workload.plan(&backend).unwrap();
            let mut scratch = ScratchBuffer::new(plans.scratch_bytes());
            workload.run(&plans, &mut scratch).unwrap();
            assert!(workload.out.is_written(), "{layout}");
            workload
        };
        let packed = run(Layout::Packed, Work::Both);
        let total: usize = sequences.lengths.iter().map(|&[queries, _]| queries).sum();
        assert_eq!(packed.out.shape()[..], [1, total, 4, 8]);
        for layout in [Layout::Rectangle, Layout::Padded] {
            assert_eq!(run(layout, Work::Both).out.shape()[..], [3, rows, 4, 8]);
        }
        for page_size in [1, 4, 16] {
            let paged = run(Layout::Paged { page_size }, Work::Forward);
            assert_eq!(paged.out.shape()[..], [3, rows, 4, 8]);
            assert_eq!(paged.flops(), packed.flops() / 3.5);
        }
        assert!(
            Workload::of_sequences(&sequences, Layout::Paged { page_size: 4 }, DType::F32, Work::Both, true)
                .is_err()
        );
    }

    #[test]
    fn names_read_back() {
        assert_eq!("both".parse(), Ok(Work::Both));
        assert_eq!("bias".parse(), Ok(Mask::Bias));
        assert_eq!(
            "backward".parse::<Work>(),
            Err("unknown pass 'backward'; known are forward, both".to_owned())
        );
    }
}
