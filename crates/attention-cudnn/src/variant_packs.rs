//! A cache of variant packs, cuDNN's lists of a call's memory. Calls in a loop mostly use the memory of
//! earlier calls, and making a pack takes a good part of a call's time on the host.

use std::sync::{Arc, Mutex, PoisonError};

use crate::descriptor::Descriptor;
use crate::numbers::Numbers;

/// How many packs a plan keeps: enough for a loop that alternates between several sets of tensors.
const KEPT: usize = 8;

/// The packs of one plan that no call is using.
#[derive(Debug, Default)]
pub(crate) struct VariantPacks(Mutex<Vec<VariantPack>>);

/// A variant pack, with the numbers in host memory that it points to.
#[derive(Debug)]
pub(crate) struct VariantPack {
    /// The addresses of device memory, by slot, that the pack was made of. They are compared only.
    pub(crate) addresses: Vec<u64>,
    /// The address of the workspace, likewise.
    pub(crate) workspace: u64,
    /// The pack itself. Fields drop in this order, so it is gone before the numbers that it points to.
    pub(crate) descriptor: Descriptor,
    pub(crate) numbers: Arc<Numbers>,
}

impl VariantPacks {
    /// Takes the pack of this memory out of the cache, if it is there.
    pub(crate) fn take(
        &self,
        addresses: impl Iterator<Item = u64> + Clone,
        workspace: u64,
    ) -> Option<VariantPack> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_this = |entry: &VariantPack| {
            entry.workspace == workspace && entry.addresses.iter().copied().eq(addresses.clone())
        };
        let index = kept.iter().position(is_this)?;
        Some(kept.remove(index))
    }

    /// Puts a pack into the cache. If the cache is full, the least recently used one is dropped.
    pub(crate) fn put(&self, pack: VariantPack) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(pack);
    }
}
