//! Which tokens are held out for validation.
//!
//! A document is held out when the hash of its number falls below the fraction: no rank, world size or seed has a say,
//! so that what was held out stays held out. Where no document falls below (a corpus of few documents), the one with
//! the smallest hash gives its tail. Invariant: every token of the corpus lies in exactly one split, and neither is
//! empty where 0 < fraction < 1 and there are four tokens or more.

use crate::store::TokenStore;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tangelo_core::hash::mix64;

/// A part of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Trained on.
    Train,
    /// Held out.
    Validation,
}

/// Where the border between the splits runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeldOut {
    /// Documents with a hash below this are held out; above `u64::MAX` means all.
    threshold: u128,
    /// One document that is cut: tokens from the second number on are held out.
    cut: Option<(u64, u64)>,
}

/// Fixed, so that validation data do not depend on the job's seed.
const SALT: u64 = 0x7A11_DA7E;

fn hash(document: u64) -> u64 {
    mix64(mix64(SALT) ^ document)
}

impl HeldOut {
    /// Holds out `fraction` of the documents of `store`. Of a few conversations one is held out whole: the tail of one
    /// would be an answer to nothing.
    pub(crate) fn new(store: &TokenStore, fraction: f64) -> HeldOut {
        let lengths = (0..store.num_documents()).map(|d| store.document_len(d));
        let held = HeldOut::from_lengths(lengths, fraction);
        match held.cut {
            Some((document, start)) if store.is_masked() => {
                let length = store.document_len(document);
                let is_cut = start < length && store.num_documents() > 1;
                HeldOut { cut: Some((document, if is_cut { 0 } else { length })), ..held }
            }
            _ => held,
        }
    }

    fn from_lengths(lengths: impl Iterator<Item = u64>, fraction: f64) -> HeldOut {
        let fraction = fraction.clamp(0.0, 1.0);
        let held = HeldOut { threshold: (fraction * (u64::MAX as f64)) as u128, cut: None };
        if fraction <= 0.0 || fraction >= 1.0 {
            return HeldOut { threshold: if fraction > 0.0 { 1 << 64 } else { 0 }, cut: None };
        }
        let (mut total, mut inside, mut outside) = (0, 0u64, 0u64);
        // The documents nearest to the border on either side: (hash, document, tokens).
        let (mut smallest, mut largest) = (None::<(u64, u64, u64)>, None::<(u64, u64, u64)>);
        for (document, length) in lengths.enumerate() {
            let entry = (hash(document as u64), document as u64, length);
            total += length;
            if (entry.0 as u128) < held.threshold {
                inside += 1
            } else {
                outside += 1
            }
            smallest = Some(smallest.map_or(entry, |s| s.min(entry)));
            largest = Some(largest.map_or(entry, |l| l.max(entry)));
        }
        let wanted = ((total as f64 * fraction).ceil() as u64).max(2);
        match (inside, outside, smallest, largest) {
            // Nothing held out: the tail of the document with the smallest hash is.
            (0, _, Some((_, document, length)), _) => {
                let start = length - wanted.min(if outside == 1 { length.saturating_sub(2) } else { length });
                HeldOut { threshold: 0, cut: Some((document, start)) }
            }
            // Everything held out: the document with the largest hash keeps its head for training.
            (_, 0, _, Some((hash, document, length))) => {
                let start = if inside == 1 { length - wanted.min(length.saturating_sub(2)) } else { length };
                HeldOut { threshold: hash as u128, cut: Some((document, start)) }
            }
            _ => held,
        }
    }

    /// The tokens of a document of `length` tokens that belong to `split`; maybe none.
    pub(crate) fn range(&self, document: u64, length: u64, split: Split) -> Range<u64> {
        let border = match self.cut {
            Some((cut, start)) if cut == document => start,
            _ if (hash(document) as u128) < self.threshold => 0,
            _ => length,
        };
        if split == Split::Train { 0..border } else { border..length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(held: &HeldOut, lengths: &[u64], split: Split) -> u64 {
        lengths.iter().enumerate().map(|(d, &n)| held.range(d as u64, n, split)).map(|r| r.end - r.start).sum()
    }

    proptest! {
        #[test]
        fn both_splits_have_tokens_and_none_is_lost(
            lengths in proptest::collection::vec(4u64..500, 1..40), fraction in 0.001f64..0.999,
        ) {
            let held = HeldOut::from_lengths(lengths.iter().copied(), fraction);
            let (train, validation) = (tokens(&held, &lengths, Split::Train), tokens(&held, &lengths, Split::Validation));
            prop_assert_eq!(train + validation, lengths.iter().sum::<u64>());
            prop_assert!(train >= 2 && validation >= 2, "{} {}", train, validation);
        }
    }

    #[test]
    fn the_fraction_is_kept_in_the_large() {
        let lengths = vec![10u64; 100_000];
        let held = HeldOut::from_lengths(lengths.iter().copied(), 0.05);
        let share = tokens(&held, &lengths, Split::Validation) as f64 / 1e6;
        // The standard deviation is sqrt(0.05 * 0.95 / 1e5) = 0.0007; five of them.
        assert!((share - 0.05).abs() < 0.0035, "{share}");
    }

    #[test]
    fn a_single_document_gives_its_tail() {
        let held = HeldOut::from_lengths([1000].into_iter(), 0.01);
        assert_eq!((held.range(0, 1000, Split::Train), held.range(0, 1000, Split::Validation)), (0..990, 990..1000));
        let none = HeldOut::from_lengths([1000].into_iter(), 0.0);
        assert_eq!(none.range(0, 1000, Split::Train), 0..1000);
    }
}
