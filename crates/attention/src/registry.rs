//! The implementations that a call can choose from.

use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};

use attention_core::AttentionBackend;

use crate::plans::{PLANS_KEPT, Plans};

/// An ordered list of implementations. The default one holds those of this build; others join by value.
///
/// The order is the order of preference of [`Implementation::Auto`](crate::Implementation::Auto), except
/// where a measured crossover between two implementations of ours says otherwise. A name stands for one
/// implementation: adding another of the same name puts it in the place of the first, which is how a
/// configured one replaces a default one.
///
/// A registry keeps the plans of the calls that it served, so that the next call of a problem finds its plan:
/// clones share them, and a registry that another implementation joins begins anew. Of more than
/// [`plans_kept`](Self::plans_kept), the one that was not used for longest leaves; whoever holds a
/// [plan](crate::AttentionPlan) keeps it whatever happens here.
///
/// # Examples
/// ```
/// use attention::Registry;
///
/// let registry = Registry::default();
/// println!("this build has {:?}", registry.names());
/// assert!(Registry::empty().names().is_empty());
/// ```
#[derive(Clone, Debug)]
pub struct Registry {
    backends: Vec<Arc<dyn AttentionBackend>>,
    plans: Arc<Plans>,
}

impl Registry {
    /// A registry without implementations.
    pub fn empty() -> Self {
        Self { backends: Vec::new(), plans: Arc::new(Plans::new(PLANS_KEPT)) }
    }

    /// The default registry, made once: what a call without a registry of its own uses.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Registry> = LazyLock::new(Registry::default);
        &SHARED
    }

    /// Adds an implementation at the end, or in the place of the one that has its name.
    #[must_use]
    pub fn with(mut self, backend: Arc<dyn AttentionBackend>) -> Self {
        self.register(backend);
        self
    }

    /// Adds an implementation before all others, and takes out the one that has its name.
    #[must_use]
    pub fn with_preferred(mut self, backend: Arc<dyn AttentionBackend>) -> Self {
        self.backends.retain(|other| other.name() != backend.name());
        self.backends.insert(0, backend);
        self.begin_anew();
        self
    }

    /// Keeps up to this many plans, 512 by default. Those that are kept already are left to the registry's
    /// clones.
    ///
    /// A plan of the CPU implementations is some kilobytes; one on a GPU holds what its kernels need there.
    #[must_use]
    pub fn with_plans_kept(mut self, most: NonZeroUsize) -> Self {
        self.plans = Arc::new(Plans::new(most));
        self
    }

    /// Adds an implementation at the end, or in the place of the one that has its name, which is returned.
    pub fn register(&mut self, backend: Arc<dyn AttentionBackend>) -> Option<Arc<dyn AttentionBackend>> {
        self.begin_anew();
        match self.backends.iter_mut().find(|other| other.name() == backend.name()) {
            Some(place) => Some(std::mem::replace(place, backend)),
            None => {
                self.backends.push(backend);
                None
            }
        }
    }

    /// How many plans are kept at most.
    pub fn plans_kept(&self) -> NonZeroUsize {
        self.plans.most()
    }

    /// Forgets the plans that are kept, here and in clones, with what they hold of devices; those that
    /// callers hold live on.
    pub fn forget_plans(&self) {
        self.plans.clear();
    }

    pub(crate) fn plans(&self) -> &Plans {
        &self.plans
    }

    /// The plans so far were chosen among other implementations.
    fn begin_anew(&mut self) {
        self.plans = Arc::new(Plans::new(self.plans.most()));
    }

    /// The implementation of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn AttentionBackend>> {
        self.backends.iter().find(|backend| backend.name() == name)
    }

    /// The implementations, in order of preference.
    pub fn backends(&self) -> &[Arc<dyn AttentionBackend>] {
        &self.backends
    }

    /// The names of the implementations, in order of preference.
    pub fn names(&self) -> Vec<String> {
        self.backends.iter().map(|backend| backend.name().to_owned()).collect()
    }
}

impl Default for Registry {
    /// The implementations of this build, by feature.
    fn default() -> Self {
        #[allow(unused_mut, reason = "without any implementation there is nothing to add")]
        let mut registry = Self::empty();
        #[cfg(feature = "chunked")]
        registry.register(Arc::new(attention_chunked::ChunkedBackend::default()));
        #[cfg(feature = "cpu")]
        registry.register(Arc::new(attention_cpu::CpuBackend::default()));
        #[cfg(feature = "cuda")]
        registry.register(Arc::new(attention_cudnn::CudnnBackend::default()));
        #[cfg(feature = "cuda")]
        registry.register(Arc::new(attention_chunked_cuda::ChunkedCudaBackend::default()));
        registry
    }
}
