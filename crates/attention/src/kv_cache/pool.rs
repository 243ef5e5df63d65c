//! Pages: which are free, and how many sequences have each of the others.

use attention_core::OutOfMemory;

use super::error::reserved;

/// The pages of a cache.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    /// How many sequences have a page.
    references: Vec<usize>,
    /// Pages that no sequence has; the next one to be taken is the last.
    free: Vec<i32>,
}

impl Pool {
    /// Of this many pages, which an i32 counts.
    pub(super) fn new(pages: usize) -> Result<Self, OutOfMemory> {
        let what = "the list of a cache's pages";
        let (mut references, mut free) = (reserved(what, pages)?, reserved(what, pages)?);
        references.resize(pages, 0);
        free.extend((0..pages as i32).rev());
        Ok(Self { references, free })
    }

    pub(super) fn pages(&self) -> usize {
        self.references.len()
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// How many sequences have a page; `None` where there is no such page.
    pub(super) fn references(&self, page: usize) -> Option<usize> {
        self.references.get(page).copied()
    }

    /// The page that is taken after `after` others. It is free.
    pub(super) fn next(&self, after: usize) -> i32 {
        self.free[self.free.len() - 1 - after]
    }

    /// Takes the next page, for one sequence. There is one.
    pub(super) fn take(&mut self) -> i32 {
        let page = self.free.pop().expect("an append checks that there are enough");
        self.references[page as usize] = 1;
        page
    }

    /// Another sequence has this page too.
    pub(super) fn share(&mut self, page: i32) {
        self.references[page as usize] += 1;
    }

    /// A sequence gives a page up.
    pub(super) fn release(&mut self, page: i32) {
        let references = &mut self.references[page as usize];
        *references -= 1;
        if *references == 0 {
            self.free.push(page);
        }
    }
}
