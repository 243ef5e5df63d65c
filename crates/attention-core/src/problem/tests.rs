//! Problems: what is accepted, what is refused, and what they say of themselves.

mod geometry;
