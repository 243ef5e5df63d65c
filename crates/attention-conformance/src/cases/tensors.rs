//! The tensors of a case.

use attention_core::{Inputs, Role};

use super::Numbers;
use crate::tensor::HostTensor;

/// The tensors that a call of a case reads, but for what its forward pass left.
#[derive(Clone, Debug)]
pub struct CaseData {
    /// `[B, T, N, H]`.
    pub query: HostTensor,
    /// `[B, S, K, H]`.
    pub key: HostTensor,
    /// `[B, S, K, Hv]`.
    pub value: HostTensor,
    /// The mask, if there is one.
    pub mask: Option<HostTensor>,
    /// The bias, if there is one.
    pub bias: Option<HostTensor>,
    /// The slopes, if there are any.
    pub alibi_slopes: Option<HostTensor>,
    /// The sinks, if there are any.
    pub sinks: Option<HostTensor>,
    /// Lengths, offsets, scale, softcap and dropout.
    pub numbers: Numbers,
    /// The incoming gradient of the output.
    pub d_out: HostTensor,
    /// The incoming gradient of the logsumexp, if there is one.
    pub d_lse: Option<HostTensor>,
    /// Whether garbage lies where it must not matter.
    pub garbage: bool,
}

impl CaseData {
    /// The inputs that forward and backward share.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_ref().map(HostTensor::view),
            bias: self.bias.as_ref().map(HostTensor::view),
            alibi_slopes: self.alibi_slopes.as_ref().map(HostTensor::view),
            sinks: self.sinks.as_ref().map(HostTensor::view),
            data: self.numbers.data(),
            ..Inputs::new(self.query.view(), self.key.view(), self.value.view())
        }
    }

    /// Query, key, value or the incoming gradient of the output.
    pub(crate) fn operand_mut(&mut self, role: Role) -> &mut HostTensor {
        match role {
            Role::Query => &mut self.query,
            Role::Key => &mut self.key,
            Role::Value => &mut self.value,
            Role::DOut => &mut self.d_out,
            _ => unreachable!("{role} is no operand"),
        }
    }
}
