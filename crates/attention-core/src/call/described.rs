//! Whether a tensor of a call is as its problem says.

use crate::{Device, InvalidCall, Problem, Role, TensorDesc};

/// Compares a tensor of a call with the problem.
#[inline]
pub(super) fn expect_as_described(
    problem: &Problem,
    role: Role,
    given: Option<(&TensorDesc, Device)>,
) -> Result<(), InvalidCall> {
    match (given, problem.tensor(role)) {
        (None, None) => Ok(()),
        // Mostly: then the rest need not be asked.
        (Some((given, device)), Some(expected)) if given == expected && device == problem.device_of(role) => {
            Ok(())
        }
        (given, expected) => expect_alike(problem, role, given, expected),
    }
}

/// As [`expect_as_described`], where the two are not the same: they may say the same all the same.
#[cold]
fn expect_alike(
    problem: &Problem,
    role: Role,
    given: Option<(&TensorDesc, Device)>,
    expected: Option<&TensorDesc>,
) -> Result<(), InvalidCall> {
    let (given, device, expected) = match (given, expected) {
        (None, None) => return Ok(()),
        (None, Some(_)) => return Err(InvalidCall::Missing { role }),
        (Some(_), None) => return Err(InvalidCall::Unexpected { role }),
        (Some((&given, device)), Some(&expected)) => (given, device, expected),
    };
    if device != problem.device_of(role) {
        return Err(InvalidCall::Device { role, device, expected: problem.device_of(role) });
    }
    // Masks and biases have four axes in the problem, and may come with fewer, packed tensors an axis in front,
    // and may come without it, and a scale that is a scalar has one too.
    let most = match role {
        Role::Mask | Role::Bias | Role::DBias => 4,
        Role::KeyScales | Role::ValueScales => usize::from(given.rank() == 0),
        _ => usize::from(problem.packs(role)),
    };
    let padding = expected.rank().saturating_sub(given.rank()).min(most);
    let shape_fits = given.dtype() == expected.dtype()
        && given.rank() + padding == expected.rank()
        && expected.shape()[..padding].iter().all(|&size| size == 1)
        && expected.shape()[padding..] == given.shape()[..];
    // The stride of an axis with at most one element says nothing, and no stride of an empty tensor does.
    let strides_fit = || {
        given.is_empty()
            || (0..given.rank()).all(|axis| {
                given.shape()[axis] == 1 || given.strides()[axis] == expected.strides()[axis + padding]
            })
    };
    if !(shape_fits && strides_fit()) {
        return Err(InvalidCall::NotAsInProblem { role, given, expected });
    }
    Ok(())
}
