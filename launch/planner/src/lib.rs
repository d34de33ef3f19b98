//! What a plan costs: memory, FLOPs, the walk of a batch.
