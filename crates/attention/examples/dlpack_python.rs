//! Causal attention for Python, as a shared library whose functions take and give what capsules of DLPack
//! hold. `cargo xtask exchange` calls it from PyTorch.

use attention::dlpack::{Error, Export, Import, ffi};
use attention::{Attention, Tensor};

fn run(inputs: [Result<Import, Error>; 3]) -> Result<Tensor, Box<dyn std::error::Error>> {
    let [query, key, value] = inputs;
    let (query, key, value) = (query?, key?, value?);
    Ok(Attention::new().causal(true).forward(query.view()?, key.view()?, value.view()?)?)
}

/// The result for the caller, or what went wrong on the standard error output and null.
fn answer<M>(result: Result<Tensor, Box<dyn std::error::Error>>, give: fn(Export) -> *mut M) -> *mut M {
    match result {
        Ok(out) => give(out.into()),
        Err(error) => {
            eprintln!("error: {error}");
            std::ptr::null_mut()
        }
    }
}

/// Output `[B, T, N, Hv]` of query `[B, T, N, H]`, key `[B, S, K, H]` and value `[B, S, K, Hv]`, or null.
///
/// # Safety
/// Each argument is null or points to a managed tensor that the caller hands over: nothing else calls its
/// deleter, and until this function does, its memory stays as it is and is not written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attention_versioned(
    query: *mut ffi::ManagedTensorVersioned,
    key: *mut ffi::ManagedTensorVersioned,
    value: *mut ffi::ManagedTensorVersioned,
) -> *mut ffi::ManagedTensorVersioned {
    // SAFETY: the caller promised that each is null or a managed tensor that is handed over, with memory that
    // nothing writes.
    let inputs = [query, key, value].map(|managed| unsafe { Import::from_versioned(managed) });
    answer(run(inputs), Export::into_versioned)
}

/// As [`attention_versioned`], with structs without a version.
///
/// # Safety
/// Each argument is null or points to a managed tensor that the caller hands over: nothing else calls its
/// deleter, and until this function does, its memory stays as it is and is not written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attention_unversioned(
    query: *mut ffi::ManagedTensor,
    key: *mut ffi::ManagedTensor,
    value: *mut ffi::ManagedTensor,
) -> *mut ffi::ManagedTensor {
    // SAFETY: the caller promised that each is null or a managed tensor that is handed over, with memory that
    // nothing writes.
    let inputs = [query, key, value].map(|managed| unsafe { Import::from_unversioned(managed) });
    answer(run(inputs), Export::into_unversioned)
}
