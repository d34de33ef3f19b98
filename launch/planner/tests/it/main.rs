//! Plans, what they cost, and what is shown of them.

#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod check;
mod memory;
mod prove;
