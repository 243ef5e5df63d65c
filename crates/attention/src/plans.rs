//! The plans of the calls so far: found again by the problem and by what was asked of the choice.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use attention_core::Problem;
use lru::LruCache;

use crate::selection::{Chosen, Wanted};

/// How many plans a registry keeps by default: some layers of some models, forward and backward, for a few
/// dozen shapes.
pub(crate) const PLANS_KEPT: NonZeroUsize = NonZeroUsize::new(512).unwrap();

/// Plans, of which the one that was not used for longest leaves first.
#[derive(Debug)]
pub(crate) struct Plans {
    kept: Mutex<Kept>,
    most: NonZeroUsize,
}

#[derive(Debug)]
struct Kept {
    plans: LruCache<Key, Arc<Chosen>>,
    /// Plans that have left.
    left: u64,
}

/// What a plan is found by.
#[derive(Debug)]
struct Key {
    problem: Problem,
    wanted: Wanted,
}

/// A key, or what one would be made of: a look-up copies neither.
trait Parts {
    fn parts(&self) -> (&Problem, &Wanted);
}

impl Parts for Key {
    fn parts(&self) -> (&Problem, &Wanted) {
        (&self.problem, &self.wanted)
    }
}

impl Parts for (&Problem, &Wanted) {
    fn parts(&self) -> (&Problem, &Wanted) {
        *self
    }
}

impl PartialEq for dyn Parts + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn Parts + '_ {}

impl Hash for dyn Parts + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl<'a> Borrow<dyn Parts + 'a> for Key {
    fn borrow(&self) -> &(dyn Parts + 'a) {
        self
    }
}

impl Plans {
    pub(crate) fn new(most: NonZeroUsize) -> Self {
        // The bound is kept by `find`: a cache that has it would reserve memory for all of it at once.
        let plans = LruCache::unbounded();
        Self { kept: Mutex::new(Kept { plans, left: 0 }), most }
    }

    pub(crate) fn most(&self) -> NonZeroUsize {
        self.most
    }

    /// The plan of a problem for a caller who wants this, made by `plan` where none is kept. Not under the
    /// lock: planning may take seconds, and two threads that plan the same do no harm.
    pub(crate) fn find<E>(
        &self,
        problem: &Problem,
        wanted: &Wanted,
        plan: impl FnOnce() -> Result<Chosen, E>,
    ) -> Result<Arc<Chosen>, E> {
        let key: &dyn Parts = &(problem, wanted);
        if let Some(mut kept) = self.lock()
            && let Some(chosen) = kept.plans.get(key)
        {
            return Ok(chosen.clone());
        }
        let chosen = Arc::new(plan()?);
        let Some(mut kept) = self.lock() else { return Ok(chosen) };
        // Another thread may have been faster: then all use its plan.
        if let Some(chosen) = kept.plans.get(key) {
            return Ok(chosen.clone());
        }
        let oldest = if kept.plans.len() >= self.most.get() { kept.plans.pop_lru() } else { None };
        kept.plans.put(Key { problem: problem.clone(), wanted: wanted.clone() }, chosen.clone());
        kept.left += u64::from(oldest.is_some());
        let left = kept.left;
        drop(kept);
        if let Some((key, _)) = oldest {
            self.tell(left, &key.problem);
        }
        Ok(chosen)
    }

    pub(crate) fn clear(&self) {
        let plans = self.lock().map(|mut kept| std::mem::replace(&mut kept.plans, LruCache::unbounded()));
        // Not under the lock: a plan gives memory back to its device.
        drop(plans);
    }

    /// Says that a plan had to leave: the first time louder, since calls that are planned again and again are
    /// slow ones.
    fn tell(&self, left: u64, problem: &Problem) {
        let most = self.most;
        if left == 1 {
            tracing::warn!(
                target: "attention",
                kept = most.get(),
                %problem,
                "the plans kept are as many as may be, and the one that was not used for longest leaves \
                 (`Registry::with_plans_kept`; later ones are told of at debug level)"
            );
        } else {
            tracing::debug!(target: "attention", kept = most.get(), left, %problem, "a plan leaves");
        }
    }

    /// The plans, or `None` where another thread does not give them free: in a child of a fork, one that the
    /// child has not. Nobody holds the lock for longer than a look-up takes, so half a second is beyond
    /// doubt.
    fn lock(&self) -> Option<MutexGuard<'_, Kept>> {
        let mut waited = None;
        loop {
            match self.kept.try_lock() {
                Ok(kept) => return Some(kept),
                // What is kept is whole at any time.
                Err(TryLockError::Poisoned(kept)) => return Some(kept.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            if waited.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(500) {
                return None;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, Dimensions};

    use super::*;
    use crate::{Implementation, Registry};

    fn problem(batch: usize) -> Problem {
        let dims = Dimensions {
            batch,
            query_length: 1,
            key_length: 1,
            query_heads: 1,
            key_heads: 1,
            head_dim: 1,
            value_head_dim: 1,
        };
        dims.problem(DType::F32).build().unwrap()
    }

    fn wanted(implementation: impl Into<Implementation>) -> Wanted {
        Wanted { implementation: implementation.into(), ..Wanted::default() }
    }

    #[test]
    fn keys_and_what_they_would_be_made_of_are_found_by_one_another() {
        let hash = |of: &dyn Fn(&mut std::hash::DefaultHasher)| {
            let mut hasher = std::hash::DefaultHasher::new();
            of(&mut hasher);
            hasher.finish()
        };
        let (problem, wanted) = (problem(1), wanted(["one", "other"]));
        let key = Key { problem: problem.clone(), wanted: wanted.clone() };
        let parts: &dyn Parts = &(&problem, &wanted);
        let borrowed: &dyn Parts = key.borrow();
        assert!(parts == borrowed);
        assert_eq!(hash(&|hasher| key.hash(hasher)), hash(&|hasher| parts.hash(hasher)));
    }

    #[test]
    fn a_lock_that_is_never_given_back_delays_a_call_and_no_more() {
        let plans = Plans::new(PLANS_KEPT);
        let held = plans.kept.lock().unwrap();
        let mut asked = 0;
        let refused = plans.find(&problem(1), &wanted("nobody"), || {
            asked += 1;
            Err::<Chosen, _>("planned")
        });
        assert_eq!((refused.unwrap_err(), asked), ("planned", 1));
        drop(held);
        assert_eq!(Registry::empty().plans_kept(), PLANS_KEPT);
    }
}
