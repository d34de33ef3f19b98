//! Counters of what a process sends and receives.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes through a process, by what they carry and which way they go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// Requests sent.
    pub control_sent_bytes: u64,
    /// Answers received.
    pub control_received_bytes: u64,
    /// Columns of batches that others pulled from here.
    pub data_sent_bytes: u64,
    /// Columns of batches that were pulled to here.
    pub data_received_bytes: u64,
}

impl TrafficReport {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.control_sent_bytes + self.control_received_bytes + self.data_sent_bytes + self.data_received_bytes
    }

    /// What was added since `earlier`.
    pub fn since(&self, earlier: &TrafficReport) -> TrafficReport {
        TrafficReport {
            control_sent_bytes: self.control_sent_bytes - earlier.control_sent_bytes,
            control_received_bytes: self.control_received_bytes - earlier.control_received_bytes,
            data_sent_bytes: self.data_sent_bytes - earlier.data_sent_bytes,
            data_received_bytes: self.data_received_bytes - earlier.data_received_bytes,
        }
    }
}

#[derive(Default)]
pub(crate) struct Traffic {
    control_sent: AtomicU64,
    control_received: AtomicU64,
    data_sent: AtomicU64,
    data_received: AtomicU64,
}

impl Traffic {
    pub fn control_sent(&self, bytes: usize) {
        self.control_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn control_received(&self, bytes: usize) {
        self.control_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn data_sent(&self, bytes: usize) {
        self.data_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn data_received(&self, bytes: usize) {
        self.data_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn report(&self) -> TrafficReport {
        TrafficReport {
            control_sent_bytes: self.control_sent.load(Ordering::Relaxed),
            control_received_bytes: self.control_received.load(Ordering::Relaxed),
            data_sent_bytes: self.data_sent.load(Ordering::Relaxed),
            data_received_bytes: self.data_received.load(Ordering::Relaxed),
        }
    }
}
