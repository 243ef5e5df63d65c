//! Lengths and offsets of batch rows and of sequences as callers have them.

use std::sync::Arc;

use attention::{IntoNumbers, Lengths};
use candle_core::Tensor;

/// One number for each batch row, lengths or offsets: a list of integers (an array, a slice, a `Vec`), or a
/// tensor of u32, i32 or i64, `[B]`. Offsets of packed sequences are one more, `[B + 1]`.
///
/// A tensor is in host memory or on the device of the call, where kernels read it: no number goes to the
/// host. What it holds there is not checked: a length above the tensor's counts as that.
#[derive(Clone, Debug)]
pub struct Numbers(Kind);

#[derive(Clone, Debug)]
enum Kind {
    List(attention::Numbers<'static>),
    Tensor(Tensor),
}

impl From<&Tensor> for Numbers {
    fn from(tensor: &Tensor) -> Self {
        tensor.clone().into()
    }
}

impl From<Tensor> for Numbers {
    fn from(tensor: Tensor) -> Self {
        Self(Kind::Tensor(tensor))
    }
}

impl Numbers {
    /// What the facade takes now, and the tensor that takes its place in a call.
    pub(crate) fn apart(self) -> (attention::Numbers<'static>, Option<Tensor>) {
        match self.0 {
            Kind::List(list) => (list, None),
            Kind::Tensor(tensor) => (attention::Numbers::Lengths(Lengths::Full), Some(tensor)),
        }
    }
}

/// Lists of integers, by value and by reference.
macro_rules! lists {
    ($(($list:ty, $($const_name:ident)?),)*) => {$(
        impl<I: Copy + Default + PartialOrd + TryInto<i64>, $(const $const_name: usize)?> From<$list>
            for Numbers
        {
            fn from(list: $list) -> Self {
                owned(list)
            }
        }
    )*};
}

lists! {
    ([I; LEN], LEN),
    (&[I; LEN], LEN),
    (&[I],),
    (Vec<I>,),
    (&Vec<I>,),
    (Arc<[I]>,),
    (&Arc<[I]>,),
}

impl From<Lengths> for Numbers {
    fn from(lengths: Lengths) -> Self {
        owned(lengths)
    }
}

fn owned(list: impl IntoNumbers<'static>) -> Numbers {
    let list = list.into_numbers().unwrap_or_else(|error| unreachable!("a list is no tensor: {error}"));
    Numbers(Kind::List(list))
}
