//! What needs several crates or processes: the rules of the house, parity with transformers, whole runs.

mod support;
mod tidy;
