//! Errors of cuDNN and the driver, and their conversion to the library's error.

use attention_core::Error;
use attention_cuda::cudarc::driver::DriverError;
use attention_cuda::failure;

use crate::NAME;
use crate::library::CudnnError;

/// An error that cuDNN or the driver has reported.
pub(crate) enum Failure {
    Cudnn(CudnnError),
    Driver(DriverError),
}

impl From<CudnnError> for Failure {
    fn from(error: CudnnError) -> Self {
        Self::Cudnn(error)
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl Failure {
    /// The library's error, with the operation that failed.
    pub(crate) fn during(self, operation: &str) -> Error {
        match self {
            Self::Cudnn(error) => failure(NAME, operation, error),
            Self::Driver(error) => failure(NAME, operation, error),
        }
    }
}
