//! What needs files: weights, writers and tokenizers, against Python's own readers where there is a venv.
#![allow(clippy::unwrap_used)]

mod common;
mod convert;
mod damage;
mod gguf;
mod peer;
mod templates;
mod tokenizers;
mod weights;
