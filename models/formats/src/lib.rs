//! Safetensors, GGUF and Hugging Face folders, read and written.
