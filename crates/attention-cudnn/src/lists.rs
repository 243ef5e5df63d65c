//! Lists of a call's memory, kept: calls in a loop mostly come with the memory of earlier ones, and making a list is a good
//! part of what a call costs on the host.

use std::sync::{Arc, Mutex, PoisonError};

use crate::descriptor::Descriptor;
use crate::numbers::Numbers;

/// How many lists a problem keeps.
const KEPT: usize = 8;

/// The lists of one plan that no call is using.
#[derive(Debug, Default)]
pub(crate) struct Lists(Mutex<Vec<List>>);

/// A list with what it points to in host memory.
#[derive(Debug)]
pub(crate) struct List {
    /// Of device memory, by slot, and the workspace's: nothing is read through them here.
    pub(crate) addresses: Vec<u64>,
    pub(crate) workspace: u64,
    /// Dropped before the numbers that it points to.
    pub(crate) list: Descriptor,
    pub(crate) numbers: Arc<Numbers>,
}

impl Lists {
    /// The list of this memory, if it is kept.
    pub(crate) fn take(&self, addresses: &[u64], workspace: u64) -> Option<List> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index =
            kept.iter().position(|entry| entry.workspace == workspace && entry.addresses == addresses)?;
        Some(kept.remove(index))
    }

    /// Keeps a list, and drops the one that was used longest ago where there are too many.
    pub(crate) fn put(&self, list: List) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(list);
    }
}
