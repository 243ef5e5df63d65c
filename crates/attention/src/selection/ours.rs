//! The implementations of this library, in this build or not.

use crate::{Refusal, Registry};

/// One implementation of this library.
struct Ours {
    name: &'static str,
    /// The feature of this crate that adds it.
    feature: &'static str,
    /// Whether this build has it.
    built: bool,
}

const OURS: [Ours; 4] = [
    Ours { name: "chunked", feature: "chunked", built: cfg!(feature = "chunked") },
    Ours { name: "cpu", feature: "cpu", built: cfg!(feature = "cpu") },
    Ours { name: "cudnn", feature: "cuda", built: cfg!(feature = "cuda") },
    Ours { name: "chunked-cuda", feature: "cuda", built: cfg!(feature = "cuda") },
];

fn ours(name: &str) -> Option<&'static Ours> {
    OURS.iter().find(|ours| ours.name == name)
}

/// Why a name that a registry does not have cannot be used.
pub(crate) fn missing(name: &str, registry: &Registry) -> Refusal {
    let (owned, known) = (name.to_owned(), registry.names());
    match ours(name) {
        Some(Ours { feature, built: false, .. }) => Refusal::NotBuilt { name: owned, feature, known },
        _ => Refusal::NotRegistered { name: owned, known },
    }
}

/// Whether a refusal is that of a name which nothing has, here or in another build: a slip of the pen.
pub(crate) fn is_unknown(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::NotRegistered { name, .. } if ours(name).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_implementation_of_a_full_build_is_known() {
        for name in Registry::default().names() {
            assert!(ours(&name).is_some_and(|ours| ours.built), "{name}");
        }
        let built = OURS.iter().filter(|ours| ours.built).count();
        assert_eq!(Registry::default().names().len(), built);
    }
}
