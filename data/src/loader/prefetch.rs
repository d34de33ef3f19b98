//! The next batches, made ready by a thread while the current one is trained on.
//!
//! | thread | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|---|
//! | prefetch | the loader | room for a batch | the consumer's `next_batch`, or its drop | `depth` batches |
//! | consumer | batches in order | the next batch | the prefetch thread | - |

use super::Loader;
use crate::error::{DataError, Result};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use tangelo_core::Batch;

/// Yields consecutive global batches from a sample on. Dropping it ends and joins its thread.
#[derive(Debug)]
pub struct Prefetcher {
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
    next_sample: u64,
    global_batch_size: u64,
}

impl Prefetcher {
    /// Starts reading at `first_sample`, at most `depth` batches ahead (at least one).
    pub fn new(loader: Arc<Loader>, first_sample: u64, depth: usize) -> Result<Prefetcher> {
        let (sender, batches) = sync_channel(depth.max(1));
        let global_batch_size = loader.options().global_batch_size as u64;
        let read = move || {
            let mut sample = first_sample;
            loop {
                let batch = loader.batch_at(sample);
                let failed = batch.is_err();
                if sender.send(batch).is_err() || failed {
                    return;
                }
                sample += global_batch_size;
            }
        };
        let thread = thread::Builder::new().name("prefetch".into()).spawn(read);
        let thread = thread.map_err(|e| DataError::Internal(format!("cannot start the prefetch thread: {e}")))?;
        Ok(Prefetcher { batches: Some(batches), thread: Some(thread), next_sample: first_sample, global_batch_size })
    }

    /// The next batch.
    ///
    /// # Errors
    /// The loader's, once; after an error there are no more batches.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let ended = || DataError::Internal("the prefetch thread has ended after an error".into());
        let batch = self.batches.as_ref().ok_or_else(ended)?.recv().map_err(|_| ended())??;
        self.next_sample += self.global_batch_size;
        Ok(batch)
    }

    /// The first sample of the batch that [`next_batch`](Prefetcher::next_batch) gives next: what a checkpoint keeps.
    pub fn next_sample(&self) -> u64 {
        self.next_sample
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // First the channel, so that a thread that waits for room wakes up.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it was already seen as the end of the channel.
            let _ = thread.join();
        }
    }
}
