//! What candle's tensors may be, and how they lie.

use attention::Role;
use candle_core::Layout;

/// What masks may be. No two libraries read a mask of integers alike.
const MASK: &str = "u8, 0 for masked: `mask.ne(0.)?` makes it of numbers that say which keys take part (a mask of integers is added \
                    to the logits in MLX and tinygrad, selects where it is not 0 in Keras, and is refused by torch and JAX), \
                    and floats that are added to the logits are a bias";
/// What queries, keys, values and biases may be.
const FLOATS: &str = "f64, f32, f16 or bf16";
/// What lengths, offsets and seeds may be.
const INTEGERS: &str = "u32, i32 or i64";

/// The dtypes that a tensor of this role can have, in words.
pub(crate) fn expected(role: Role) -> &'static str {
    match role {
        Role::Mask => MASK,
        role if role.is_data() => INTEGERS,
        _ => FLOATS,
    }
}

/// Whether tensors of this role are floats.
pub(crate) fn is_float(role: Role) -> bool {
    role != Role::Mask && !role.is_data()
}

/// Shape and strides of a candle tensor with at most four axes.
pub(crate) fn axes(layout: &Layout) -> (attention::Dims, attention::Strides) {
    let shape = attention::Dims::from_slice(layout.dims());
    // A stride that fits no isize belongs to no element.
    let strides: Vec<isize> =
        layout.stride().iter().map(|&stride| isize::try_from(stride).unwrap_or(isize::MAX)).collect();
    let strides = attention::Strides::from_slice(&strides);
    (shape.expect("the rank was checked"), strides.expect("the rank was checked"))
}
