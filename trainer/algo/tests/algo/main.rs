//! Algorithms on whole batches: against verl's numbers, against plain formulas, under every sharding, at the edges.
#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod edges;
mod exactness;
mod formulas;
mod make;
mod verl;
