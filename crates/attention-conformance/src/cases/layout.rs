//! How the tensors of a case lie in memory.

use std::collections::BTreeMap;

use attention_core::{Role, Strides, TensorDesc};
use serde::{Deserialize, Serialize};

/// How one tensor lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Row-major without gaps.
    #[default]
    Contiguous,
    /// The two axes before the last swapped in memory: BNTH storage of a BTNH tensor. Tensors of rank 3 swap
    /// their last two axes; those of lower rank are contiguous.
    Transposed,
    /// Row-major with unused elements after every axis.
    Padded,
    /// Every second element of a row-major buffer: the last axis has stride 2.
    InnerStride,
    /// Row-major with this axis running backwards (a negative stride). Tensors without the axis are
    /// contiguous.
    Reversed {
        /// The axis.
        axis: usize,
    },
    /// The part from `start` of an axis 2 that has `total` entries in memory: query, key or value of a fused
    /// QKV buffer `[B, T, N + 2K, H]`. For tensors of rank 4.
    FusedSlice {
        /// The first entry of axis 2.
        start: usize,
        /// The entries of axis 2 in memory.
        total: usize,
    },
    /// One element for all indices of this axis (stride 0). For inputs only.
    Broadcast {
        /// The axis.
        axis: usize,
    },
}

/// Where the elements of a tensor lie in a buffer.
pub(crate) struct Placement {
    /// In elements.
    pub(crate) strides: Vec<isize>,
    /// Where the element at index 0 is.
    pub(crate) origin: usize,
    /// The elements of the buffer.
    pub(crate) len: usize,
}

impl Layout {
    /// Places a tensor of this shape.
    pub(crate) fn place(self, shape: &[usize]) -> Placement {
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        // How many entries each axis has in memory, and how far apart neighbours of the innermost are.
        let mut allocated = shape.to_vec();
        let mut inner_step = 1;
        match self {
            Layout::Contiguous | Layout::Reversed { .. } => {}
            Layout::Transposed if rank == 4 => order.swap(1, 2),
            Layout::Transposed if rank == 3 => order.swap(1, 2),
            Layout::Transposed => {}
            Layout::Padded => {
                for (axis, size) in allocated.iter_mut().enumerate() {
                    *size += if axis + 1 == rank { 3 } else { 1 };
                }
            }
            Layout::InnerStride => inner_step = 2,
            Layout::FusedSlice { total, .. } => allocated[2] = total,
            Layout::Broadcast { axis } => allocated[axis] = allocated[axis].min(1),
        }
        let mut strides = vec![0; rank];
        let mut step = inner_step;
        for &axis in order.iter().rev() {
            strides[axis] = step as isize;
            step *= allocated[axis];
        }
        let mut origin = 0;
        match self {
            Layout::FusedSlice { start, .. } => origin = start * strides[2] as usize,
            Layout::Broadcast { axis } => strides[axis] = 0,
            Layout::Reversed { axis } if axis < rank && shape[axis] > 0 => {
                origin = (shape[axis] - 1) * strides[axis] as usize;
                strides[axis] = -strides[axis];
            }
            _ => {}
        }
        Placement { strides, origin, len: step }
    }

    /// Whether several indices share an element.
    pub(crate) fn is_broadcast(self) -> bool {
        matches!(self, Layout::Broadcast { .. })
    }
}

/// The layouts of all tensors of a case; contiguous where nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layouts(BTreeMap<Role, Layout>);

impl Layouts {
    /// Query, key, value, output, their gradients and the incoming gradient, all in this layout.
    pub fn operands(layout: Layout) -> Self {
        [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut, Role::DQuery, Role::DKey, Role::DValue]
            .into_iter()
            .fold(Self::default(), |layouts, role| layouts.with(role, layout))
    }

    /// Every tensor of the call in this layout.
    pub fn everything(layout: Layout) -> Self {
        Role::ALL.into_iter().fold(Self::default(), |layouts, role| layouts.with(role, layout))
    }

    /// Query, key and value as slices of one fused buffer, and their gradients as slices of another.
    pub fn fused_qkv(query_heads: usize, key_heads: usize) -> Self {
        let total = query_heads + 2 * key_heads;
        let slice = |start| Layout::FusedSlice { start, total };
        Self::default()
            .with(Role::Query, slice(0))
            .with(Role::Key, slice(query_heads))
            .with(Role::Value, slice(query_heads + key_heads))
            .with(Role::DQuery, slice(0))
            .with(Role::DKey, slice(query_heads))
            .with(Role::DValue, slice(query_heads + key_heads))
    }

    /// These layouts with another one for `role`.
    #[must_use]
    pub fn with(mut self, role: Role, layout: Layout) -> Self {
        self.0.insert(role, layout);
        self
    }

    /// The layout of the tensor of this role.
    pub fn of(&self, role: Role) -> Layout {
        self.0.get(&role).copied().unwrap_or_default()
    }
}

impl Layouts {
    /// The description of the tensor of this role in its layout.
    pub(crate) fn desc(&self, role: Role, desc: &TensorDesc) -> TensorDesc {
        let placement = self.of(role).place(&desc.shape());
        let strides = Strides::from_slice(&placement.strides).expect("as many strides as axes");
        TensorDesc::strided(desc.dtype(), desc.shape(), strides).expect("as many strides as axes")
    }
}
