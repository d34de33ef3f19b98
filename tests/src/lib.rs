//! What needs several crates or processes.
