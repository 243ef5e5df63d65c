//! Device memory as the conformance suite needs it.

use std::error::Error;

use attention_conformance::{DeviceMemory, TensorOnDevice};
use attention_core::{Device, InvalidCall, Scratch, TensorDesc, View, ViewMut};

use crate::{CudaDevice, DeviceTensor};

/// Memory of the device, copied and filled on its stream.
impl DeviceMemory for CudaDevice {
    type Tensor = DeviceTensor;

    fn device(&self) -> Device {
        self.device()
    }

    fn copy_of(&self, view: View<'_>) -> Result<DeviceTensor, Box<dyn Error + Send + Sync>> {
        Ok(DeviceTensor::from_host(self, view)?)
    }

    fn filled(&self, desc: TensorDesc, byte: u8) -> Result<DeviceTensor, Box<dyn Error + Send + Sync>> {
        Ok(DeviceTensor::filled(self, desc, byte)?)
    }
}

impl TensorOnDevice for DeviceTensor {
    fn desc(&self) -> TensorDesc {
        self.desc()
    }

    fn view(&self) -> Result<View<'_>, InvalidCall> {
        self.view()
    }

    fn view_mut(&mut self) -> Result<ViewMut<'_>, InvalidCall> {
        self.view_mut()
    }

    fn scratch(&mut self, bytes: usize) -> Scratch<'_> {
        self.scratch(bytes)
    }

    fn bytes(&self) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        Ok(self.bytes()?)
    }
}
