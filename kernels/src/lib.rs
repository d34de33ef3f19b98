//! Communicators, the device thread, fused operators and the C++ shim.

pub mod autograd;
pub mod comm;
pub mod device;
pub mod op;

mod ffi;
