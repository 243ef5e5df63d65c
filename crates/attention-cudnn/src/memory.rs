//! Where the tensors of a call are in device memory.

use attention_core::{Inputs, Role, View, ViewMut};

/// The addresses of a call's tensors; 0 for those that it has not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) query: u64,
    pub(crate) key: u64,
    pub(crate) value: u64,
    pub(crate) mask: u64,
    pub(crate) bias: u64,
    pub(crate) slopes: u64,
    pub(crate) sinks: u64,
    pub(crate) out: u64,
    pub(crate) lse: u64,
    pub(crate) d_out: u64,
    pub(crate) dq: u64,
    pub(crate) dk: u64,
    pub(crate) dv: u64,
    pub(crate) dsinks: u64,
}

pub(crate) fn read(view: Option<View<'_>>) -> u64 {
    view.map_or(0, |view| view.as_ptr().addr() as u64)
}

pub(crate) fn written(view: &mut Option<ViewMut<'_>>) -> u64 {
    view.as_mut().map_or(0, |view| view.as_mut_ptr().addr() as u64)
}

impl Memory {
    pub(crate) fn of(inputs: &Inputs<'_>) -> Self {
        Self {
            query: read(Some(inputs.query)),
            key: read(Some(inputs.key)),
            value: read(Some(inputs.value)),
            mask: read(inputs.mask),
            bias: read(inputs.bias),
            slopes: read(inputs.alibi_slopes),
            sinks: read(inputs.sinks),
            ..Self::default()
        }
    }

    pub(crate) fn at(&self, role: Role) -> u64 {
        match role {
            Role::Query => self.query,
            Role::Key => self.key,
            Role::Value => self.value,
            Role::Mask => self.mask,
            Role::Bias => self.bias,
            Role::AlibiSlopes => self.slopes,
            Role::Sinks => self.sinks,
            Role::Out => self.out,
            Role::Lse => self.lse,
            Role::DOut => self.d_out,
            Role::DQuery => self.dq,
            Role::DKey => self.dk,
            Role::DValue => self.dv,
            Role::DSinks => self.dsinks,
            _ => 0,
        }
    }
}
