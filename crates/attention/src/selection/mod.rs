//! Which implementation runs a call, and why.

mod choice;
mod chosen;
mod crossovers;
mod devices;
mod explanation;
mod implementation;
mod ours;
mod preference;
mod select;
mod table;

pub use choice::Choice;
pub use chosen::Reason;
pub(crate) use chosen::{Chosen, Wanted};
pub use explanation::{Candidate, Cause, Explanation, Verdict, explain};
pub use implementation::Implementation;
pub(crate) use select::Policy;

#[cfg(test)]
mod tests;
