//! What needs several crates or processes: the rules of the house, parity with transformers and torch, whole runs.

// Tests may unwrap; clippy allows it by itself only inside test functions.
#![allow(clippy::unwrap_used)]

mod e2e;
mod failures;
mod generation;
mod job;
mod layouts;
mod muon;
mod parity;
mod rl_mistakes;
mod rlhf;
mod rlhf_faults;
mod rlhf_replay;
mod rlhf_reward_model;
mod rlhf_sampling;
mod scalar_heads;
mod sft;
mod support;
mod tidy;
mod two_nodes;
