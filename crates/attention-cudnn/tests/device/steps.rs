//! Causal passes over tensors on the device.

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, ForwardCall, ForwardOutputs,
    Gradients, Inputs, TensorDesc, View, ViewMut,
};
use attention_cuda::{CudaDevice, DeviceScratch, DeviceTensor};

use crate::Result;

/// Query, key and value, then d_out, then mask and bias if the views have them.
pub(crate) fn inputs_of<'a>(views: &[View<'a>]) -> Inputs<'a> {
    let mut inputs = Inputs::new(views[0], views[1], views[2]);
    (inputs.mask, inputs.bias) = (views.get(4).copied(), views.get(5).copied());
    inputs
}

/// A causal forward pass.
pub(crate) fn step(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    out: ViewMut<'_>,
    lse: Option<ViewMut<'_>>,
) -> Result {
    let inputs = inputs_of(views);
    let builder = inputs.problem().causal(true).lse(lse.is_some());
    let problem = builder.layout(attention_core::Role::Out, out.desc()).build()?;
    let plan = backend.plan(&problem)?;
    let bytes = plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let call = ForwardCall::new(plan.problem(), inputs, ForwardOutputs { out, lse })?;
    Ok(plan.forward(call, scratch.scratch(bytes))?)
}

/// Its logsumexp.
pub(crate) fn lse_of(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    [b, t, n, h]: [usize; 4],
) -> Result<DeviceTensor> {
    let mut lse = DeviceTensor::filled(device, TensorDesc::contiguous(DType::F32, [b, t, n]), 0)?;
    let mut out = DeviceTensor::filled(device, TensorDesc::contiguous(DType::Bf16, [b, t, n, h]), 0)?;
    step(device, backend, views, out.view_mut()?, Some(lse.view_mut()?))?;
    Ok(lse)
}

/// The backward pass: gradients of query, key and value, and of the bias where there is a fourth.
pub(crate) fn back(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    (out, lse): (View<'_>, &DeviceTensor),
    gradients: Vec<ViewMut<'_>>,
) -> Result {
    use attention_core::Role;
    let inputs = inputs_of(views);
    let wants = if gradients.len() > 3 { Gradients::QKV | Gradients::BIAS } else { Gradients::QKV };
    let mut builder = inputs.problem().causal(true).gradients(wants);
    for (role, desc) in [(Role::Out, out.desc()), (Role::DOut, views[3].desc())] {
        builder = builder.layout(role, desc);
    }
    for (role, view) in [Role::DQuery, Role::DKey, Role::DValue, Role::DBias].into_iter().zip(&gradients) {
        builder = builder.layout(role, view.desc());
    }
    let mut gradients = gradients.into_iter();
    let mut next = || gradients.next();
    let (dq, dk, dv, dbias) = (next(), next(), next(), next());
    let outputs = BackwardOutputs { dq, dk, dv, dbias, ..BackwardOutputs::default() };
    let plan = backend.plan(&builder.build()?)?;
    let bytes = plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let saved = BackwardInputs { out, lse: lse.view()?, d_out: views[3], d_lse: None };
    let call = BackwardCall::new(plan.problem(), inputs, saved, outputs)?;
    Ok(plan.backward(call, scratch.scratch(bytes))?)
}
