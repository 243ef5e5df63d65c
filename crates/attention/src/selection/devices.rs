//! Classes of GPUs, by what is known of the speed of implementations on them.

/// GPUs on which one order of preference holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceClass {
    /// Compute capability 9.0 (H100, H200, GH200), on which all records were made.
    Hopper,
    /// Data-centre parts of 10.0 and 10.3 (B200, GB200, B300). There are no records of them.
    Blackwell,
    /// All others: before 9.0 (A100, L4, RTX 4090), consumer and embedded parts of later ones (RTX 5090,
    /// Jetson). There are no records of them.
    Other,
}

impl DeviceClass {
    /// The class of a compute capability. Where no device is known, that of Hopper, for which backends answer
    /// without a device.
    pub(crate) fn of(compute_capability: Option<(u32, u32)>) -> Self {
        match compute_capability {
            None | Some((9, 0)) => Self::Hopper,
            Some((10, 0 | 3)) => Self::Blackwell,
            Some(_) => Self::Other,
        }
    }
}

impl std::fmt::Display for DeviceClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Hopper => "compute capability 9.0",
            Self::Blackwell => "compute capability 10.0 and 10.3",
            Self::Other => "compute capabilities but 9.0, 10.0 and 10.3",
        })
    }
}
