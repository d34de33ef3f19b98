//! Every operator, forward and backward, against its float64 reference; main gradients, documents, windows, odd shapes,
//! and the promise that bits do not depend on threads.
//!
//! Tolerances are norm-relative. fp32: 1e-5 holds rounding errors of sums of up to some thousand terms (2^-24 times the
//! square root of their number, with a margin of a few). bf16: inputs are exact, the result is rounded once (2^-9), and
//! tensors that pass through several bf16 roundings get as many times that.

mod attention;
mod common;
mod cut_draws;
mod distribution;
mod logprob;
mod loss;
mod muon;
mod paged;
mod pointwise;
mod spans;
mod update;
mod vocab_parallel;
mod weights;
