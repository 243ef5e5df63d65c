//! Operation graphs of cuDNN: tensors, and the operations between them.
//!
//! The numbers of descriptor types, attributes and enumerations are those of cuDNN's header
//! (`cudnnBackendDescriptorType_t`, `cudnnBackendAttributeName_t`, `cudnnDataType_t` and so on).

use crate::descriptor::{Descriptor, kind};
use crate::library::{Cudnn, CudnnError};
use crate::slot::Slot;

/// Element types (`cudnnDataType_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub(crate) enum Type {
    Float = 0,
    Half = 2,
    Int32 = 4,
    Bf16 = 9,
    Int64 = 10,
    Boolean = 11,
}

/// Pointwise operations (`cudnnPointwiseMode_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Op {
    Add = 0,
    Mul = 1,
    Max = 3,
    Div = 6,
    Sub = 9,
    Exp = 13,
    Log = 15,
    Identity = 21,
    Greater = 302,
    GreaterEqual = 303,
    Less = 304,
    And = 400,
    Index = 501,
    Select = 601,
}

/// Reductions (`cudnnReduceTensorOp_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Reduction {
    Add = 0,
    Max = 3,
}

/// The attribute of a pointwise operation for its second operand.
const B: i32 = 752;
/// The attribute of a pointwise operation for its result.
const Y: i32 = 753;
/// The attribute of a pointwise operation for its mask.
const MASK: i32 = 758;

/// The sizes or the strides of four axes: batch, head, row and column.
pub(crate) type Shape = [i64; 4];

/// Strides of a tensor without gaps.
pub(crate) fn packed(shape: Shape) -> Shape {
    [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1]
}

/// A tensor of a graph.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    index: usize,
    pub(crate) shape: Shape,
}

/// A graph that is being built.
#[derive(Debug)]
pub(crate) struct Graph {
    cudnn: Cudnn,
    tensors: Vec<Descriptor>,
    operations: Vec<Descriptor>,
    /// The descriptors that operations refer to, kept alive for as long as the graph.
    referenced: Vec<Descriptor>,
    /// The unique identifier and the meaning of each tensor that is not virtual.
    slots: Vec<(i64, Slot)>,
}

/// The tensors of lengths, per axis, beyond which a matrix product does not compute.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Overrides {
    pub(crate) m: Option<Tensor>,
    pub(crate) n: Option<Tensor>,
    pub(crate) k: Option<Tensor>,
}

impl Graph {
    pub(crate) fn new(cudnn: &Cudnn) -> Self {
        Self {
            cudnn: *cudnn,
            tensors: Vec::new(),
            operations: Vec::new(),
            referenced: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// Adds a tensor, after `set` has set further attributes, which may refer to tensors of the graph, and
    /// returns it with its unique identifier.
    fn add(
        &mut self,
        element: Type,
        shape: Shape,
        strides: Shape,
        set: impl FnOnce(&mut Descriptor, &[Descriptor]) -> Result<(), CudnnError>,
    ) -> Result<(Tensor, i64), CudnnError> {
        let index = self.tensors.len();
        let uid = index as i64 + 1;
        let mut tensor = Descriptor::new(&self.cudnn, 17)?;
        tensor.enumeration(901, kind::DATA_TYPE, element as i32)?;
        tensor.integers(902, &shape)?;
        tensor.integers(903, &strides)?;
        tensor.integers(906, &[uid])?;
        // The alignment in bytes: `Run::new` checks the callers' addresses for it.
        tensor.integers(900, &[16])?;
        set(&mut tensor, &self.tensors)?;
        tensor.finalize("describing a tensor")?;
        self.tensors.push(tensor);
        Ok((Tensor { index, shape }, uid))
    }

    /// Adds a tensor in memory.
    pub(crate) fn real(
        &mut self,
        slot: Slot,
        element: Type,
        shape: Shape,
        strides: Shape,
    ) -> Result<Tensor, CudnnError> {
        self.real_ragged(slot, element, shape, strides, None)
    }

    /// Adds a tensor in memory. With `offsets`, its batch rows begin at those elements, whatever the stride
    /// of its batch axis is.
    pub(crate) fn real_ragged(
        &mut self,
        slot: Slot,
        element: Type,
        shape: Shape,
        strides: Shape,
        offsets: Option<Tensor>,
    ) -> Result<Tensor, CudnnError> {
        let (tensor, uid) = self.add(element, shape, strides, |tensor, tensors| match offsets {
            Some(offsets) => tensor.descriptors(913, [&tensors[offsets.index]]),
            None => Ok(()),
        })?;
        self.slots.push((uid, slot));
        Ok(tensor)
    }

    /// Adds a number that cuDNN reads from host memory when the plan is executed.
    pub(crate) fn number(&mut self, slot: Slot, element: Type) -> Result<Tensor, CudnnError> {
        let (tensor, uid) = self.add(element, [1; 4], [1; 4], |tensor, _| tensor.boolean(908, true))?;
        self.slots.push((uid, slot));
        Ok(tensor)
    }

    /// Adds a virtual tensor, one that is never in memory, without gaps.
    pub(crate) fn virtual_(&mut self, element: Type, shape: Shape) -> Result<Tensor, CudnnError> {
        self.virtual_strided(element, shape, packed(shape))
    }

    /// Adds a virtual tensor with these strides.
    pub(crate) fn virtual_strided(
        &mut self,
        element: Type,
        shape: Shape,
        strides: Shape,
    ) -> Result<Tensor, CudnnError> {
        self.virtual_ragged(element, shape, strides, None)
    }

    /// Adds a virtual tensor with these strides, whose batch rows begin at these offsets.
    pub(crate) fn virtual_ragged(
        &mut self,
        element: Type,
        shape: Shape,
        strides: Shape,
        offsets: Option<Tensor>,
    ) -> Result<Tensor, CudnnError> {
        let (tensor, _) = self.add(element, shape, strides, |tensor, tensors| {
            tensor.boolean(907, true)?;
            match offsets {
                Some(offsets) => tensor.descriptors(913, [&tensors[offsets.index]]),
                None => Ok(()),
            }
        })?;
        Ok(tensor)
    }

    /// Adds an operation of this descriptor type, whose attributes `set` sets.
    fn operation(
        &mut self,
        kind: i32,
        set: impl FnOnce(&mut Descriptor, &[Descriptor]) -> Result<(), CudnnError>,
    ) -> Result<(), CudnnError> {
        let mut operation = Descriptor::new(&self.cudnn, kind)?;
        set(&mut operation, &self.tensors)?;
        operation.finalize("describing an operation")?;
        self.operations.push(operation);
        Ok(())
    }

    /// `c = a b`, computed in f32.
    pub(crate) fn matmul(
        &mut self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        overrides: Overrides,
    ) -> Result<(), CudnnError> {
        let mut how = Descriptor::new(&self.cudnn, 18)?;
        how.enumeration(1500, kind::DATA_TYPE, Type::Float as i32)?;
        how.finalize("describing a matrix product")?;
        self.operation(19, |operation, tensors| {
            operation.descriptors(1520, [&tensors[a.index]])?;
            operation.descriptors(1521, [&tensors[b.index]])?;
            operation.descriptors(1522, [&tensors[c.index]])?;
            operation.descriptors(1523, [&how])?;
            for (attribute, length) in [(1525, overrides.m), (1526, overrides.n), (1527, overrides.k)] {
                if let Some(length) = length {
                    operation.descriptors(attribute, [&tensors[length.index]])?;
                }
            }
            Ok(())
        })?;
        self.referenced.push(how);
        Ok(())
    }

    /// A pointwise operation on `x`, computed in `compute`. `others` gives the other tensors by attribute,
    /// the result included.
    fn pointwise(
        &mut self,
        op: Op,
        compute: Type,
        x: Tensor,
        others: &[(i32, Tensor)],
        axis: Option<i64>,
    ) -> Result<(), CudnnError> {
        let mut how = Descriptor::new(&self.cudnn, 0)?;
        how.enumeration(0, kind::POINTWISE_MODE, op as i32)?;
        how.enumeration(1, kind::DATA_TYPE, compute as i32)?;
        if let Some(axis) = axis {
            how.integers(9, &[axis])?;
        }
        how.finalize("describing a pointwise operation")?;
        self.operation(13, |operation, tensors| {
            operation.descriptors(750, [&how])?;
            operation.descriptors(751, [&tensors[x.index]])?;
            for &(attribute, tensor) in others {
                operation.descriptors(attribute, [&tensors[tensor.index]])?;
            }
            operation.float(754, 1.0)?;
            operation.float(755, 1.0)
        })?;
        self.referenced.push(how);
        Ok(())
    }

    /// `y = op(x)` in f32, into an existing tensor.
    pub(crate) fn unary_into(&mut self, op: Op, x: Tensor, y: Tensor) -> Result<(), CudnnError> {
        self.pointwise(op, Type::Float, x, &[(Y, y)], None)
    }

    /// `op(x)` in f32.
    pub(crate) fn unary(&mut self, op: Op, x: Tensor) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Float, x.shape)?;
        self.unary_into(op, x, y)?;
        Ok(y)
    }

    /// `y = op(a, b)` in f32, into an existing tensor.
    pub(crate) fn binary_into(&mut self, op: Op, a: Tensor, b: Tensor, y: Tensor) -> Result<(), CudnnError> {
        self.pointwise(op, Type::Float, a, &[(B, b), (Y, y)], None)
    }

    /// `op(a, b)` in f32, of `a`'s shape.
    pub(crate) fn binary(&mut self, op: Op, a: Tensor, b: Tensor) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Float, a.shape)?;
        self.binary_into(op, a, b, y)?;
        Ok(y)
    }

    /// `op(a, b)` in integers, of `a`'s shape.
    pub(crate) fn integers(&mut self, op: Op, a: Tensor, b: Tensor) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Int32, a.shape)?;
        self.pointwise(op, Type::Int32, a, &[(B, b), (Y, y)], None)?;
        Ok(y)
    }

    /// A comparison or a logical operation.
    pub(crate) fn truth(&mut self, op: Op, a: Tensor, b: Tensor) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Boolean, a.shape)?;
        self.pointwise(op, Type::Boolean, a, &[(B, b), (Y, y)], None)?;
        Ok(y)
    }

    /// The index along an axis of logits like `like`.
    pub(crate) fn index(&mut self, like: Tensor, axis: i64) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Int32, like.shape)?;
        self.pointwise(Op::Index, Type::Int32, like, &[(Y, y)], Some(axis))?;
        Ok(y)
    }

    /// `if mask then x else other`.
    pub(crate) fn select(&mut self, mask: Tensor, x: Tensor, other: Tensor) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Float, x.shape)?;
        self.pointwise(Op::Select, Type::Float, x, &[(B, other), (MASK, mask), (Y, y)], None)?;
        Ok(y)
    }

    /// A reduction into an existing tensor `y`, over the axes along which `y` has size 1.
    pub(crate) fn reduce_into(&mut self, of: Reduction, x: Tensor, y: Tensor) -> Result<(), CudnnError> {
        let mut how = Descriptor::new(&self.cudnn, 21)?;
        how.enumeration(1600, kind::REDUCTION_OPERATOR, of as i32)?;
        how.enumeration(1601, kind::DATA_TYPE, Type::Float as i32)?;
        how.finalize("describing a reduction")?;
        self.operation(22, |operation, tensors| {
            operation.descriptors(1610, [&tensors[x.index]])?;
            operation.descriptors(1611, [&tensors[y.index]])?;
            operation.descriptors(1612, [&how])
        })?;
        self.referenced.push(how);
        Ok(())
    }

    /// A reduction over the last axis.
    pub(crate) fn reduce_rows(&mut self, of: Reduction, x: Tensor) -> Result<Tensor, CudnnError> {
        let [b, n, t, _] = x.shape;
        let y = self.virtual_(Type::Float, [b, n, t, 1])?;
        self.reduce_into(of, x, y)?;
        Ok(y)
    }

    /// A tensor of ones with this probability, else zeros, by cuDNN's generator from a seed and an offset.
    pub(crate) fn bernoulli(
        &mut self,
        probability: f64,
        seed: Tensor,
        offset: Tensor,
        shape: Shape,
    ) -> Result<Tensor, CudnnError> {
        let y = self.virtual_(Type::Float, shape)?;
        let mut how = Descriptor::new(&self.cudnn, 32)?;
        how.enumeration(2300, kind::RNG_DISTRIBUTION, 0)?;
        how.double(2305, probability)?;
        how.finalize("describing a generator")?;
        self.operation(33, |operation, tensors| {
            operation.descriptors(2310, [&tensors[y.index]])?;
            operation.descriptors(2311, [&tensors[seed.index]])?;
            operation.descriptors(2313, [&tensors[offset.index]])?;
            operation.descriptors(2312, [&how])
        })?;
        self.referenced.push(how);
        Ok(y)
    }

    /// `y` is `x` with other strides or another shape.
    pub(crate) fn reshape(&mut self, x: Tensor, y: Tensor) -> Result<(), CudnnError> {
        self.operation(31, |operation, tensors| {
            operation.descriptors(2200, [&tensors[x.index]])?;
            operation.descriptors(2201, [&tensors[y.index]])
        })
    }

    /// `y` has the keys or values of each batch row, as many as `lengths` says, which `table` says the pages
    /// of.
    pub(crate) fn load_pages(
        &mut self,
        pages: Tensor,
        table: Tensor,
        lengths: Tensor,
        y: Tensor,
    ) -> Result<(), CudnnError> {
        self.operation(35, |operation, tensors| {
            operation.descriptors(1950, [&tensors[pages.index]])?;
            operation.descriptors(1951, [&tensors[y.index]])?;
            operation.descriptors(1952, [&tensors[lengths.index]])?;
            operation.descriptors(1953, [&tensors[table.index]])
        })
    }

    /// The finished graph: its operations, with everything that they refer to.
    pub(crate) fn finish(self) -> Finished {
        Finished { operations: self.operations, slots: self.slots, _kept: (self.tensors, self.referenced) }
    }
}

/// A finished graph, from which a plan can be built.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) operations: Vec<Descriptor>,
    pub(crate) slots: Vec<(i64, Slot)>,
    _kept: (Vec<Descriptor>, Vec<Descriptor>),
}
