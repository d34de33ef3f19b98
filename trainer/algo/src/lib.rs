//! Reinforcement-learning algorithms: which columns they write, from which, and the loss that reads them.
//!
//! Pure: no IO, no clock, no tensors. Workers run it where the data is, the driver merges what they found.
