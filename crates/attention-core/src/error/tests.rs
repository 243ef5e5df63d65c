//! Every variant of every error: provoked through the public API where this crate makes it, and its whole
//! message.

mod invalid_call;
mod others;

/// The names of an error's variants, and which one a value is. The match has no wildcard: a new variant does
/// not compile until it is listed, and once listed the tests fail until its message is tested.
macro_rules! variants {
    ($error:ident, $names:ident, $name_of:ident: $($variant:ident),* $(,)?) => {
        const $names: &[&str] = &[$(stringify!($variant)),*];

        fn $name_of(error: &$error) -> &'static str {
            match error {
                $($error::$variant { .. } => stringify!($variant)),*
            }
        }
    };
}
use variants;

/// Checks that every one of `names` is in `seen`.
fn assert_all_seen(names: &[&str], seen: &std::collections::HashSet<&str>) {
    let missing: Vec<_> = names.iter().filter(|name| !seen.contains(*name)).collect();
    assert!(missing.is_empty(), "no test of the messages of {missing:?}");
}
