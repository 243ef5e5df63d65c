//! What a suite runs on.

use attention_core::{AttentionBackend, DeviceKind};

/// A backend under test, and further values of it whose results must be bitwise the same.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub(crate) backend: &'a dyn AttentionBackend,
    pub(crate) same: Vec<(String, &'a dyn AttentionBackend)>,
    pub(crate) reproducible: bool,
    pub(crate) device: Option<String>,
}

impl<'a> Subject<'a> {
    /// One backend.
    pub fn new(backend: &'a dyn AttentionBackend) -> Self {
        let reproducible = backend.capabilities().device == DeviceKind::Cpu;
        Self { backend, same: Vec::new(), reproducible, device: None }
    }

    /// A backend that computes on a device, on copies of host memory. Backends for host memory must give the
    /// same bits whenever they are called and whatever else is in the batch; of this one that is asked only
    /// where the problem is to be deterministic, as of any backend for device memory.
    #[must_use]
    pub fn computes_on_a_device(self) -> Self {
        Self { reproducible: false, ..self }
    }

    /// The name of the device that it computes on, for reports.
    #[must_use]
    pub fn device(self, name: impl Into<String>) -> Self {
        Self { device: Some(name.into()), ..self }
    }

    /// The backend, and then those that must give the same bits.
    pub(crate) fn backends(&self) -> impl Iterator<Item = &'a dyn AttentionBackend> + use<'a, '_> {
        std::iter::once(self.backend).chain(self.same.iter().map(|&(_, backend)| backend))
    }

    /// The same backend in a configuration that must not change a bit, such as another number of threads.
    #[must_use]
    pub fn same_as(mut self, label: impl Into<String>, backend: &'a dyn AttentionBackend) -> Self {
        self.same.push((label.into(), backend));
        self
    }
}

impl<'a> From<&'a dyn AttentionBackend> for Subject<'a> {
    fn from(backend: &'a dyn AttentionBackend) -> Self {
        Self::new(backend)
    }
}

impl<'a, B: AttentionBackend> From<&'a B> for Subject<'a> {
    fn from(backend: &'a B) -> Self {
        Self::new(backend)
    }
}
