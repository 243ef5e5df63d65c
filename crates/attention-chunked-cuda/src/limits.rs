//! What the kernels have no room for.

use attention_core::Unsupported;

use super::NAME;

/// That `what` is `value`, which the backend does not serve, and why.
pub(crate) fn limit(what: &str, value: impl ToString, why: impl Into<String>) -> Unsupported {
    let (backend, what, value) = (NAME.to_owned(), what.to_owned(), value.to_string());
    Unsupported::Limit { backend, what, value, why: why.into() }
}
