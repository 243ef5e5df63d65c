//! Calls as nodes of candle's graph.
//!
//! A node of candle has at most three arguments that get gradients, and one result; a call has five (query,
//! key, value, bias, sinks) and two (output, logsumexp). So:
//!
//! - Without bias and sinks that need gradients, a call is one node over query, key and value ([`CallNode`]).
//! - With them, it is two: [`OperandsNode`] over query, key and value, whose result is one number that means
//!   nothing, and [`BiasAndSinksNode`] over it, the bias and the sinks, whose result is the call's. Going
//!   backward, candle comes to `BiasAndSinksNode` first, which computes all gradients in one call, returns
//!   its arguments' and leaves the others for `OperandsNode`, which returns them.
//! - The logsumexp is a result of nodes of its own, whose gradients are another backward call's; gradients
//!   are linear in what comes in, so the sums are exact.
//!
//! The results are computed before the nodes are made, and nodes only hand them out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;

use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor};

use crate::call::{Incoming, Operands, PerInput};
use crate::memory::Output;
use crate::{Attention, Error};

/// What a node remembers of its call.
#[derive(Debug)]
struct Saved {
    call: Attention,
    kind: Kind,
}

/// Which result of the call a node has.
#[derive(Debug)]
enum Kind {
    /// The output. The logsumexp that belongs to it is set once it is there, and never where the call
    /// recomputes it.
    Out { lse: Arc<OnceLock<Tensor>> },
    /// The logsumexp, with the output that belongs to it.
    Lse { out: Tensor },
}

impl Saved {
    /// The gradients, where `result` is the node's result and `incoming` its gradient.
    fn backward(
        &self,
        operands: Operands<'_>,
        result: &Tensor,
        incoming: &Tensor,
        wanted: &PerInput<bool>,
    ) -> candle_core::Result<PerInput<Option<Tensor>>> {
        let call = &self.call;
        let run = |out: &Tensor, lse: &Tensor, d_out: &Tensor, d_lse: Option<&Tensor>| {
            let incoming = Incoming { out, lse, d_out, d_lse };
            call.run_backward(operands, incoming, wanted).map_err(in_backward)
        };
        match &self.kind {
            Kind::Out { lse } => match lse.get() {
                Some(lse) => run(result, lse, incoming, None),
                None => {
                    let again = call.run_forward(operands, true).map_err(in_backward)?;
                    let Some((lse, shape)) = again.lse else { unreachable!("it was asked for") };
                    run(result, &lse.into_tensor(shape), incoming, None)
                }
            },
            Kind::Lse { out } => run(out, result, &out.zeros_like()?, Some(incoming)),
        }
    }
}

fn in_backward(error: Error) -> candle_core::Error {
    error.in_call("backward")
}

/// The output of a call as a tensor that knows where it comes from, and what remembers its logsumexp for
/// backward.
pub(crate) fn out_node(
    call: &Attention,
    operands: Operands<'_>,
    (out, shape): (Output, Vec<usize>),
) -> candle_core::Result<(Tensor, Arc<OnceLock<Tensor>>)> {
    let lse = Arc::new(OnceLock::new());
    let out = node(call, operands, Computed::new(out, shape), Kind::Out { lse: lse.clone() })?;
    Ok((out, lse))
}

/// The logsumexp of a call as a tensor that knows where it comes from; `out` has no history.
pub(crate) fn lse_node(
    call: &Attention,
    operands: Operands<'_>,
    (lse, shape): (Output, Vec<usize>),
    out: Tensor,
) -> candle_core::Result<Tensor> {
    node(call, operands, Computed::new(lse, shape), Kind::Lse { out })
}

fn node(
    call: &Attention,
    operands: Operands<'_>,
    result: Computed,
    kind: Kind,
) -> candle_core::Result<Tensor> {
    let tracked = |tensor: &Option<Tensor>| tensor.clone().filter(Tensor::track_op);
    let (bias, sinks) = (tracked(&call.bias), tracked(&call.sinks));
    let saved = Saved { call: call.clone(), kind };
    let Operands { query, key, value } = operands;
    if bias.is_none() && sinks.is_none() {
        return query.apply_op3(key, value, CallNode { saved, result });
    }
    let pending = PendingGradients::default();
    let token = query.apply_op3(key, value, OperandsNode { pending: pending.clone() })?;
    let operands = [query, key, value].map(Tensor::clone);
    let joined = |bias_at, sinks_at| BiasAndSinksNode { saved, operands, pending, bias_at, sinks_at, result };
    match (bias, sinks) {
        (Some(bias), Some(sinks)) => token.apply_op3(&bias, &sinks, joined(Some(0), Some(1))),
        (Some(bias), None) => token.apply_op2(&bias, joined(Some(0), None)),
        (None, Some(sinks)) => token.apply_op2(&sinks, joined(None, Some(0))),
        (None, None) => unreachable!("one of them is tracked"),
    }
}

/// A result that has been computed, until the node takes it.
struct Computed(Mutex<Option<(Storage, Shape)>>);

impl Computed {
    fn new(memory: Output, shape: Vec<usize>) -> Self {
        Self(Mutex::new(Some((memory.into_storage(), shape.into()))))
    }

    fn take(&self) -> candle_core::Result<(Storage, Shape)> {
        let taken = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| candle_core::Error::msg("attention: a node's result is made once"))
    }

    fn host(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("attention: the result is not in host memory"),
        }
    }

    fn cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("attention: the result is not in device memory"),
        }
    }
}

/// Which of query, key and value need gradients.
fn tracked(operands: [&Tensor; 3]) -> PerInput<bool> {
    let [query, key, value] = operands.map(Tensor::track_op);
    PerInput { query, key, value, ..PerInput::default() }
}

/// A call whose gradients are those of query, key and value.
struct CallNode {
    saved: Saved,
    result: Computed,
}

impl CustomOp3 for CallNode {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.result.host()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.result.cuda()
    }

    fn bwd(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        result: &Tensor,
        incoming: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = tracked([query, key, value]);
        let gradients = self.saved.backward(Operands { query, key, value }, result, incoming, &wanted)?;
        Ok((gradients.query, gradients.key, gradients.value))
    }
}

/// The gradients of query, key and value.
type OperandGradients = [Option<Tensor>; 3];

/// The gradients that a [`BiasAndSinksNode`] stores for its [`OperandsNode`], for the thread that goes
/// backward: candle comes to one after the other, and several threads may go backward through one graph.
#[derive(Clone, Default)]
struct PendingGradients(Arc<Mutex<HashMap<ThreadId, OperandGradients>>>);

impl PendingGradients {
    fn put(&self, gradients: OperandGradients) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(std::thread::current().id(), gradients);
    }

    fn take(&self) -> Option<OperandGradients> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&std::thread::current().id())
    }
}

/// Query, key and value of a call whose gradients come from a [`BiasAndSinksNode`].
struct OperandsNode {
    pending: PendingGradients,
}

impl CustomOp3 for OperandsNode {
    fn name(&self) -> &'static str {
        "attention operands"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let device = candle_core::backend::BackendStorage::device(query);
        let number = device.alloc_zeros::<f32>(1)?;
        Ok((CudaStorage::wrap_cuda_slice(number, device.clone()), Shape::from(1)))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [query, key, value] = (self.pending.take())
            .ok_or_else(|| candle_core::Error::msg("attention: backward reached the operands alone"))?;
        Ok((query, key, value))
    }
}

/// A call with gradients of bias or sinks.
struct BiasAndSinksNode {
    saved: Saved,
    operands: [Tensor; 3],
    pending: PendingGradients,
    /// Which argument after the token they are.
    bias_at: Option<usize>,
    sinks_at: Option<usize>,
    result: Computed,
}

impl BiasAndSinksNode {
    /// The gradient of the token, which means nothing, and those of the other arguments.
    fn backward(
        &self,
        token: &Tensor,
        result: &Tensor,
        incoming: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, [Option<Tensor>; 2])> {
        let [query, key, value] = &self.operands;
        let mut wanted = tracked([query, key, value]);
        (wanted.bias, wanted.sinks) = (self.bias_at.is_some(), self.sinks_at.is_some());
        let gradients = self.saved.backward(Operands { query, key, value }, result, incoming, &wanted)?;
        let mut arguments = [None, None];
        for (at, gradient) in [(self.bias_at, gradients.bias), (self.sinks_at, gradients.sinks)] {
            if let Some(at) = at {
                arguments[at] = gradient;
            }
        }
        // Without a history the token is not among candle's nodes, and nothing would take the gradients out
        // again.
        let token = if token.track_op() {
            self.pending.put([gradients.query, gradients.key, gradients.value]);
            Some(token.zeros_like()?)
        } else {
            None
        };
        Ok((token, arguments))
    }
}

impl CustomOp2 for BiasAndSinksNode {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.result.host()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.result.cuda()
    }

    fn bwd(
        &self,
        token: &Tensor,
        _: &Tensor,
        result: &Tensor,
        incoming: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (token, [first, _]) = self.backward(token, result, incoming)?;
        Ok((token, first))
    }
}

impl CustomOp3 for BiasAndSinksNode {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.result.host()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.result.cuda()
    }

    fn bwd(
        &self,
        token: &Tensor,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        incoming: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (token, [first, second]) = self.backward(token, result, incoming)?;
        Ok((token, first, second))
    }
}
