//! Communicators, the device thread, fused operators and the C++ shim.
