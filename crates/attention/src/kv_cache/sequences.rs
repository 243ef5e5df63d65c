//! The sequences of a paged cache.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::CacheError;
use super::handle::Sequence;

/// What a cache knows of a sequence.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) length: usize,
    /// In order; `length` rounded up to pages.
    pub(super) pages: Vec<i32>,
    /// Changes with every change of `pages` but one that adds some at the end; no two sequences have the
    /// same.
    pub(super) stamp: u64,
}

/// The sequences of a cache.
#[derive(Debug)]
pub(super) struct Sequences {
    /// Which cache, of all in this process.
    cache: u64,
    slots: Vec<Slot>,
    /// Slots without a sequence.
    free: Vec<usize>,
    /// The last stamp given.
    stamp: u64,
}

#[derive(Debug)]
struct Slot {
    /// How many sequences the slot had before.
    generation: u64,
    state: Option<State>,
}

impl Sequences {
    pub(super) fn new() -> Self {
        static CACHES: AtomicU64 = AtomicU64::new(0);
        let cache = CACHES.fetch_add(1, Ordering::Relaxed);
        Self { cache, slots: Vec::new(), free: Vec::new(), stamp: 0 }
    }

    /// Which cache this is, of all in the process.
    pub(super) fn cache(&self) -> u64 {
        self.cache
    }

    /// A number that was not given before.
    pub(super) fn stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// How many sequences there are.
    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A sequence of these pages.
    pub(super) fn add(&mut self, length: usize, pages: Vec<i32>) -> Sequence {
        let state = Some(State { length, pages, stamp: self.stamp() });
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, state: None });
            self.slots.len() - 1
        });
        self.slots[slot].state = state;
        Sequence { cache: self.cache, slot, generation: self.slots[slot].generation }
    }

    /// Takes a sequence out; its handle is good for nothing from then on.
    pub(super) fn remove(&mut self, sequence: Sequence) -> Result<State, CacheError> {
        self.get(sequence)?;
        let slot = &mut self.slots[sequence.slot];
        let Some(state) = slot.state.take() else { unreachable!("it is there") };
        slot.generation += 1;
        self.free.push(sequence.slot);
        Ok(state)
    }

    /// The handles of all sequences.
    pub(super) fn handles(&self) -> impl Iterator<Item = Sequence> + '_ {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.state.is_some()).map(|(index, slot)| Sequence {
            cache: self.cache,
            slot: index,
            generation: slot.generation,
        })
    }

    pub(super) fn get(&self, sequence: Sequence) -> Result<&State, CacheError> {
        let slot = self.slots.get(sequence.slot).filter(|_| sequence.cache == self.cache);
        let other = || CacheError::OtherCache { what: sequence.to_string() };
        let slot = slot.ok_or_else(other)?;
        let state = slot.state.as_ref().filter(|_| slot.generation == sequence.generation);
        state.ok_or(CacheError::Freed { sequence })
    }

    pub(super) fn get_mut(&mut self, sequence: Sequence) -> Result<&mut State, CacheError> {
        self.get(sequence)?;
        let Some(state) = &mut self.slots[sequence.slot].state else { unreachable!("it is there") };
        Ok(state)
    }
}
