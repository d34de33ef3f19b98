//! Which tokens of a packed micro-batch a rank holds.
//!
//! T tokens are cut three times: over the ring (2R chunks, of which ring rank r takes the r-th from the front and the
//! r-th from the back: with a causal mask every rank then has the same work), what a ring rank has over the heads ranks,
//! and what these have over the tensor-parallel ranks, contiguously. Lengths need not divide.

use crate::layout::part_range;
use std::ops::Range;

/// How T tokens are cut over ring x heads x tensor ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceLayout {
    /// T.
    pub num_tokens: usize,
    /// Ranks of the ring.
    pub ring: usize,
    /// Ranks among which heads are exchanged for tokens.
    pub heads: usize,
    /// Ranks of tensor parallelism.
    pub tensor: usize,
}

impl SequenceLayout {
    /// The tokens of ring rank `r`, as ranges of the pack in ascending order; empty ones are left out.
    pub fn ring_ranges(&self, r: usize) -> Vec<Range<usize>> {
        let chunks = 2 * self.ring;
        if self.ring == 1 {
            return std::iter::once(0..self.num_tokens).collect();
        }
        let chunk = |i| part_range(self.num_tokens, 1, chunks, i);
        [chunk(r), chunk(chunks - 1 - r)].into_iter().filter(|range| !range.is_empty()).collect()
    }

    /// Number of tokens of ring rank `r`.
    pub fn ring_len(&self, r: usize) -> usize {
        self.ring_ranges(r).iter().map(Range::len).sum()
    }

    /// Number of tokens of each heads rank of ring rank `r`.
    pub fn head_counts(&self, r: usize) -> Vec<usize> {
        counts(self.ring_len(r), self.heads)
    }

    /// Number of tokens of each tensor rank of heads rank `h` of ring rank `r`.
    pub fn tensor_counts(&self, r: usize, h: usize) -> Vec<usize> {
        counts(self.head_counts(r)[h], self.tensor)
    }

    /// The tokens of heads rank `h` of ring rank `r`, as ranges of the pack.
    pub fn context_ranges(&self, r: usize, h: usize) -> Vec<Range<usize>> {
        let own = part_range(self.ring_len(r), 1, self.heads, h);
        let mut before = 0;
        let mut cut = |range: Range<usize>| {
            let (from, to) = (own.start.max(before), own.end.min(before + range.len()));
            let inside = (from < to).then(|| range.start + from - before..range.start + to - before);
            before += range.len();
            inside
        };
        self.ring_ranges(r).into_iter().filter_map(&mut cut).collect()
    }
}

fn counts(n: usize, parts: usize) -> Vec<usize> {
    (0..parts).map(|part| part_range(n, 1, parts, part).len()).collect()
}

/// Queries of a range of the pack and the keys of another range that belong to the same document, both relative to
/// where their range lies in a rank's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisibleKeys {
    /// Rows of the rank's queries.
    pub queries: Range<usize>,
    /// Rows of the keys.
    pub keys: Range<usize>,
    /// How far the first query lies behind the first key in their document, tokens.
    pub offset: i64,
}

/// What the tokens of `queries` may see among the tokens of `keys` (each the ranges of the pack that a rank holds, laid
/// end to end), document by document, with `borders` (0, ..., T) where documents begin. What lies wholly behind its
/// queries is left out.
pub fn visible_keys(queries: &[Range<usize>], keys: &[Range<usize>], borders: &[i64]) -> Vec<VisibleKeys> {
    let mut visible = Vec::new();
    let mut query_row = 0;
    for query in queries {
        let mut key_row = 0;
        for key in keys {
            for document in borders.windows(2).map(|w| w[0] as usize..w[1] as usize) {
                let (q, k) = (overlap(query, &document), overlap(key, &document));
                if !q.is_empty() && !k.is_empty() && k.start < q.end {
                    visible.push(VisibleKeys {
                        queries: query_row + q.start - query.start..query_row + q.end - query.start,
                        keys: key_row + k.start - key.start..key_row + k.end - key.start,
                        offset: q.start as i64 - k.start as i64,
                    });
                }
            }
            key_row += key.len();
        }
        query_row += query.len();
    }
    visible
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zigzag_gives_every_ring_rank_the_same_causal_work() {
        let layout = SequenceLayout { num_tokens: 32, ring: 4, heads: 1, tensor: 1 };
        let work = |r| layout.ring_ranges(r).into_iter().flatten().map(|t| t + 1).sum::<usize>();
        assert!((1..4).all(|r| work(r) == work(0)));
        assert_eq!(layout.ring_ranges(1), [4..8, 24..28]);
    }

    proptest! {
        #[test]
        fn every_token_has_one_place(n in 0usize..60, ring in 1usize..5, heads in 1usize..4, tensor in 1usize..4) {
            let layout = SequenceLayout { num_tokens: n, ring, heads, tensor };
            let mut all = Vec::new();
            for r in 0..ring {
                for h in 0..heads {
                    let own: Vec<usize> = layout.context_ranges(r, h).into_iter().flatten().collect();
                    prop_assert_eq!(own.len(), layout.head_counts(r)[h]);
                    prop_assert_eq!(own.len(), layout.tensor_counts(r, h).iter().sum::<usize>());
                    all.extend(own);
                }
            }
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn ring_parts_see_what_the_whole_sees(
            lengths in proptest::collection::vec(1usize..9, 1..8), ring in 1usize..4,
        ) {
            let borders: Vec<i64> =
                std::iter::once(0).chain(lengths.iter().scan(0, |at, &n| { *at += n as i64; Some(*at) })).collect();
            let n = *borders.last().unwrap() as usize;
            let layout = SequenceLayout { num_tokens: n, ring, heads: 1, tensor: 1 };
            let mut seen = vec![vec![false; n]; n];
            for a in 0..ring {
                for b in 0..ring {
                    let (queries, keys) = (layout.ring_ranges(a), layout.ring_ranges(b));
                    let (qs, ks): (Vec<usize>, Vec<usize>) =
                        (queries.iter().cloned().flatten().collect(), keys.iter().cloned().flatten().collect());
                    for span in visible_keys(&queries, &keys, &borders) {
                        for (i, q) in span.queries.clone().enumerate() {
                            for (j, k) in span.keys.clone().enumerate() {
                                if span.offset + i as i64 >= j as i64 {
                                    prop_assert!(!std::mem::replace(&mut seen[qs[q]][ks[k]], true), "seen twice");
                                }
                            }
                        }
                    }
                }
            }
            for (q, row) in seen.iter().enumerate() {
                let start = *borders.iter().rev().find(|&&b| b as usize <= q).unwrap() as usize;
                for (k, &found) in row.iter().enumerate() {
                    prop_assert_eq!(found, k <= q && k >= start);
                }
            }
        }
    }
}
