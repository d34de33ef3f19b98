//! The generation engine: continuous batching over paged keys and values; schedule, run, sample.
