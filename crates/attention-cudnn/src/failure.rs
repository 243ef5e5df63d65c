//! What goes wrong on the machine.

use attention_core::Error;
use attention_cuda::cudarc::driver::DriverError;
use attention_cuda::failure;

use crate::NAME;
use crate::library::CudnnError;

/// What cuDNN or the driver said.
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
    pub(crate) fn during(self, operation: &str) -> Error {
        match self {
            Self::Cudnn(error) => failure(NAME, operation, error),
            Self::Driver(error) => failure(NAME, operation, error),
        }
    }
}
