//! Best-fit decreasing: documents stay whole where they fit (arXiv 2404.10830).
//!
//! A document longer than a row is split into full rows and a rest; rests are placed, longest first, into the row
//! where they leave the least room. Nothing is dropped: the target of a piece's last position is the first token of
//! the following piece. A piece that would hold nothing but the last token of its document trains nothing and is left
//! out. Memory: 8 bytes per piece.

use super::{Documents, Piece};
use crate::error::{DataError, Result};

#[derive(Debug)]
pub(crate) struct BestFit {
    pub(super) documents: Documents,
    seq_len: u64,
    /// Pieces row by row: the document, and which piece of it.
    pieces: Vec<(u32, u32)>,
    /// Index of each row's first piece, and their number at the end.
    rows: Vec<u64>,
}

impl BestFit {
    pub(super) fn new(documents: Documents, seq_len: usize) -> Result<BestFit> {
        if documents.len() > u32::MAX as u64 {
            let count = documents.len();
            return Err(DataError::Options(format!(
                "best_fit packing indexes up to {} documents per source, found {count}: use packing = \"concat\", or \
                 prepare the corpus as several sources",
                u32::MAX
            )));
        }
        let (full, rests) = split(&documents, seq_len as u64);
        let lengths: Vec<u32> = rests.iter().map(|rest| rest.2).collect();
        let bins = place(&lengths, seq_len);
        let num_bins = bins.iter().map(|&bin| bin as usize + 1).max().unwrap_or(0);
        let mut rows: Vec<u64> = (0..full.len() as u64).collect();
        let mut next = vec![0u64; num_bins];
        for &bin in &bins {
            next[bin as usize] += 1;
        }
        let mut start = full.len() as u64;
        for count in &mut next {
            rows.push(start);
            start += std::mem::replace(count, start);
        }
        rows.push(start);
        let mut pieces = full;
        pieces.resize(start as usize, (0, 0));
        for (rest, &bin) in rests.iter().zip(&bins) {
            pieces[next[bin as usize] as usize] = (rest.0, rest.1);
            next[bin as usize] += 1;
        }
        Ok(BestFit { documents, seq_len: seq_len as u64, pieces, rows })
    }

    pub(super) fn num_rows(&self) -> u64 {
        self.rows.len() as u64 - 1
    }

    pub(super) fn pieces(&self, row: u64) -> Vec<Piece> {
        let (start, end) = (self.rows[row as usize] as usize, self.rows[row as usize + 1] as usize);
        let piece = |&(document, number): &(u32, u32)| {
            let tokens = self.documents.tokens_of(document as u64);
            let first = tokens.start + number as u64 * self.seq_len;
            let range = first..(first + self.seq_len).min(tokens.end);
            Piece { document: document as u64, range, document_end: tokens.end }
        };
        self.pieces[start..end].iter().map(piece).collect()
    }
}

/// Pieces that fill a row, and the rests with their lengths, longest first.
type Pieces = (Vec<(u32, u32)>, Vec<(u32, u32, u32)>);

fn split(documents: &Documents, seq_len: u64) -> Pieces {
    let (mut full, mut rests) = (Vec::new(), Vec::new());
    for place in 0..documents.len() {
        let (document, tokens) = documents.at(place);
        let length = tokens.end - tokens.start;
        let (whole, rest) = (length / seq_len, length % seq_len);
        full.extend((0..whole as u32).map(|number| (document as u32, number)));
        if rest > 1 {
            rests.push((document as u32, whole as u32, rest as u32));
        }
    }
    // Stable: rests of one length stay in the documents' order.
    rests.sort_by_key(|rest| std::cmp::Reverse(rest.2));
    (full, rests)
}

/// The bin of each length (given longest first): the one with the least room that is enough, else a new one.
pub(super) fn place(lengths: &[u32], capacity: usize) -> Vec<u32> {
    let mut with_room: Vec<Vec<u32>> = vec![Vec::new(); capacity + 1];
    let mut rooms = BitSet::new(capacity + 1);
    let mut num_bins = 0;
    let mut bins = Vec::with_capacity(lengths.len());
    for &length in lengths {
        let (bin, room) = match rooms.first_from(length as usize) {
            Some(room) => (with_room[room].pop().unwrap_or_default(), room),
            None => {
                num_bins += 1;
                (num_bins - 1, capacity)
            }
        };
        if with_room[room].is_empty() {
            rooms.remove(room);
        }
        let left = room - length as usize;
        with_room[left].push(bin);
        rooms.insert(left);
        bins.push(bin);
    }
    bins
}

/// A set of small numbers that finds the first member from a number on: two levels of 64-bit words.
struct BitSet {
    words: Vec<u64>,
    summary: Vec<u64>,
}

impl BitSet {
    fn new(len: usize) -> BitSet {
        let words = len.div_ceil(64);
        BitSet { words: vec![0; words], summary: vec![0; words.div_ceil(64)] }
    }

    fn insert(&mut self, value: usize) {
        self.words[value / 64] |= 1 << (value % 64);
        self.summary[value / 4096] |= 1 << (value / 64 % 64);
    }

    fn remove(&mut self, value: usize) {
        self.words[value / 64] &= !(1 << (value % 64));
        if self.words[value / 64] == 0 {
            self.summary[value / 4096] &= !(1 << (value / 64 % 64));
        }
    }

    fn first_from(&self, value: usize) -> Option<usize> {
        let word = value / 64;
        let here = self.words.get(word)? & (u64::MAX << (value % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let word = first_bit(&self.summary, word + 1)?;
        Some(word * 64 + self.words[word].trailing_zeros() as usize)
    }
}

fn first_bit(words: &[u64], from: usize) -> Option<usize> {
    let start = from / 64;
    let masked = words.get(start)? & (u64::MAX << (from % 64));
    let found = if masked != 0 { Some((start, masked)) } else { None };
    let (word, bits) =
        found.or_else(|| (start + 1..words.len()).map(|w| (w, words[w])).find(|(_, bits)| *bits != 0))?;
    Some(word * 64 + bits.trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Best fit by looking at every bin.
    fn place_slowly(lengths: &[u32], capacity: usize) -> usize {
        let mut rooms: Vec<usize> = Vec::new();
        for &length in lengths {
            let best = rooms.iter_mut().filter(|room| **room >= length as usize).min();
            match best {
                Some(room) => *room -= length as usize,
                None => rooms.push(capacity - length as usize),
            }
        }
        rooms.len()
    }

    proptest! {
        #[test]
        fn as_good_as_looking_at_every_bin(
            capacity in 2usize..9000, lengths in proptest::collection::vec(1u32..9000, 0..300),
        ) {
            let mut lengths: Vec<u32> = lengths.into_iter().map(|l| l % capacity as u32 + 1).collect();
            lengths.sort_unstable_by_key(|&l| std::cmp::Reverse(l));
            let bins = place(&lengths, capacity);
            let mut used = vec![0usize; bins.iter().max().map_or(0, |&b| b as usize + 1)];
            for (&bin, &length) in bins.iter().zip(&lengths) {
                used[bin as usize] += length as usize;
            }
            prop_assert!(used.iter().all(|&u| u > 0 && u <= capacity));
            prop_assert_eq!(used.len(), place_slowly(&lengths, capacity));
        }
    }
}
