//! The engine on small random models: the same tokens and the same bits whatever runs beside them.

mod common;
mod engine;
mod parity;
mod scheduler;
