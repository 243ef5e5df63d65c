//! How a command ends.

/// What went wrong, as one sentence for the person at the terminal.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// What a command returns: whether everything it looked at is as it should be.
pub(crate) type Result<T = bool> = std::result::Result<T, Error>;
