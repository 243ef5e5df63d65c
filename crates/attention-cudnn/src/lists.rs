//! Lists of a call's memory, kept: calls in a loop mostly come with the memory of earlier ones, and making a list is a good
//! part of what a call costs on the host.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use crate::descriptor::Descriptor;

/// How many lists a problem keeps.
const KEPT: usize = 8;

/// The lists of one plan that no call is using.
#[derive(Debug, Default)]
pub(crate) struct Lists(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    /// As numbers: nothing is read through them here.
    addresses: Vec<usize>,
    workspace: u64,
    list: Descriptor,
}

impl Lists {
    /// The list of this memory, if it is kept.
    pub(crate) fn take(&self, addresses: &[*mut c_void], workspace: u64) -> Option<Descriptor> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |entry: &Entry| {
            entry.workspace == workspace
                && entry.addresses.iter().zip(addresses).all(|(&kept, address)| kept == address.addr())
        };
        let index = kept.iter().position(same)?;
        Some(kept.remove(index).list)
    }

    /// Keeps a list, and drops the one that was used longest ago where there are too many.
    pub(crate) fn put(&self, addresses: &[*mut c_void], workspace: u64, list: Descriptor) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        let addresses = addresses.iter().map(|address| address.addr()).collect();
        kept.push(Entry { addresses, workspace, list });
    }
}
