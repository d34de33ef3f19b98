//! What needs several crates or processes: the rules of the house, parity with transformers, whole runs.

mod e2e;
mod job;
mod parity;
mod support;
mod tidy;
