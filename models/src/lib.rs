//! Model, block and mixer over packed tokens.
