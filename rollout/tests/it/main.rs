//! The engine on small random models: the same tokens and the same bits whatever runs beside them.

// Tests may unwrap; clippy allows it by itself only inside test functions.
#![allow(clippy::unwrap_used)]

mod common;
mod engine;
mod parity;
mod scheduler;
