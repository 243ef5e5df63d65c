//! Which implementation runs a call, and why.

mod choice;
mod explanation;
mod implementation;
mod ours;
mod preference;
mod select;
mod table;

pub use choice::Choice;
pub use explanation::{Candidate, Cause, Explanation, Verdict, explain};
pub use implementation::Implementation;
pub(crate) use select::Policy;
pub use select::{Reason, Selection};

#[cfg(test)]
mod tests;
