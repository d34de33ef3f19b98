//! Safetensors, GGUF and Hugging Face folders, read and written.
//!
//! [`Weights`] opens a model and decodes the rows asked for, [`HfWriter`] writes one without ever holding it,
//! [`tokenizer`] finds and loads the tokenizer that belongs to it, [`chat`] renders conversations with its template,
//! [`Assets`] answers the questions that resolving a configuration has. Names, shapes and row order are Hugging Face's
//! everywhere; a GGUF file is translated on the way in.
//!
//! Files are not trusted: whatever their bytes, opening and reading them ends in a value or a [`FormatError`]. Absent:
//! tensors, devices and libtorch; formats that run code when opened (pickle).

pub mod assets;
pub mod chat;
pub mod encoding;
mod error;
mod gguf;
pub mod mmap;
mod safetensors;
pub mod tokenizer;
pub mod weights;
pub mod writer;

pub use assets::Assets;
pub use chat::ChatTemplate;
pub use encoding::Encoding;
pub use error::{BoxError, FormatError};
pub use mmap::Map;
pub use tokenizer::TokenizerAssets;
pub use weights::Weights;
pub use writer::HfWriter;
