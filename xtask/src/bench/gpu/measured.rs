//! What was measured of a case.

use serde::{Deserialize, Serialize};

use super::case::Case;

/// Microseconds of a call.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Times {
    /// On the device.
    pub(super) device_us: f64,
    /// Until the call returns.
    pub(super) host_us: f64,
}

/// The times of a case.
#[derive(Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) case: Case,
    /// Operations of a call, half of them when causal.
    pub(super) flops: f64,
    /// By name, `torch-` and the path for the peer's; absent where it refuses.
    pub(super) times: Vec<(String, Times)>,
}
