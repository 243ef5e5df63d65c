//! Calls of a builder.

use candle_core::{Result, Tensor};

use crate::call::{Forward, Operands};
use crate::{Attention, Explanation, graph};

impl Attention {
    /// Computes the output, a contiguous tensor in the order of axes of the call.
    ///
    /// # Errors
    /// [`candle_core::Error::WrappedContext`] with an [`Error`](crate::Error), which [`cause`](crate::cause)
    /// takes out: where the call is wrong, no implementation serves it, or one fails.
    pub fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let operands = Operands { query, key, value };
        let tracked = self.tracked(operands);
        let Forward { out, lse } = self.compute(operands, tracked && !self.recompute)?;
        if !tracked {
            return Ok(out.0.into_tensor(out.1));
        }
        let (out, remembered) = graph::out_node(self, operands, out)?;
        if let Some((lse, shape)) = lse {
            // Set for the first time.
            let _ = remembered.set(lse.into_tensor(shape));
        }
        Ok(out)
    }

    /// As [`forward`](Self::forward), with the logsumexp of each row's logits, natural logarithm, -inf for a
    /// row with nothing to attend to. It has gradients too, which cost a backward call of their own, and are
    /// rounded to the dtype of what they belong to before candle adds them to those of the output.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// # Examples
    /// ```
    /// use attention_candle::Attention;
    /// use candle_core::{DType, Device, Tensor};
    ///
    /// let query = Tensor::zeros((1, 5, 2, 8), DType::F32, &Device::Cpu)?;
    /// let (out, lse) = Attention::btnh().forward_with_lse(&query, &query, &query)?;
    /// assert_eq!((out.dims(), lse.dims()), (&[1, 5, 2, 8][..], &[1, 5, 2][..]));
    /// // Five equal logits of 0.
    /// assert!((lse.max_all()?.to_scalar::<f32>()? - 5f32.ln()).abs() < 1e-6);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_with_lse(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let operands = Operands { query, key, value };
        let Forward { out, lse } = self.compute(operands, true)?;
        let Some((lse, shape)) = lse else { unreachable!("it was asked for") };
        if !self.tracked(operands) {
            return Ok((out.0.into_tensor(out.1), lse.into_tensor(shape)));
        }
        let (out, remembered) = graph::out_node(self, operands, out)?;
        let lse = graph::lse_node(self, operands, (lse, shape), out.detach())?;
        if !self.recompute {
            let _ = remembered.set(lse.detach());
        }
        Ok((out, lse))
    }

    /// What would run forward on these tensors, and why: every implementation with its verdict, as data and
    /// as a table.
    ///
    /// # Errors
    /// As [`forward`](Self::forward) where the call is wrong. A call that nothing serves is no error here.
    pub fn explain(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Explanation> {
        let operands = Operands { query, key, value };
        self.run_explain(operands).map_err(|error| error.in_call("explain"))
    }

    fn compute(&self, operands: Operands<'_>, with_lse: bool) -> Result<Forward> {
        self.run_forward(operands, with_lse).map_err(|error| error.in_call("forward"))
    }

    /// Whether anything that gets gradients asks for them.
    fn tracked(&self, operands: Operands<'_>) -> bool {
        let Operands { query, key, value } = operands;
        [Some(query), Some(key), Some(value), self.bias.as_ref(), self.sinks.as_ref()]
            .into_iter()
            .flatten()
            .any(Tensor::track_op)
    }
}
