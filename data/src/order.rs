//! Orders that are pure functions of an index: nothing to build, nothing to save, the same on every rank.

use tangelo_core::hash::mix64;

/// A pseudo-random permutation of `0..len`, evaluated at one index at a time.
///
/// A balanced Feistel network over the next power of four, walked until it lands inside (format-preserving encryption
/// by cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). On average less than
/// four walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    key: u64,
    half_bits: u32,
}

const ROUNDS: u64 = 6;

impl Permutation {
    /// The permutation of `0..len` that belongs to `key`.
    pub fn new(len: u64, key: u64) -> Permutation {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Permutation { len, key: mix64(key), half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// Where `index` is not below the length.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.len, "index {index} of a permutation of {}", self.len);
        let mut value = index;
        loop {
            value = self.walk(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn walk(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let mixed = mix64(self.key ^ mix64(right.wrapping_add(round << 56)));
            (left, right) = (right, (left ^ mixed) & mask);
        }
        (left << self.half_bits) | right
    }
}

/// Interleaves sources by weight: of the first `n` samples, source `s` has `weight[s] * n` give or take a few.
///
/// Sample `i` takes the point `bitreverse(i) / 2^32` (van der Corput's sequence) and goes to the source whose part of
/// the unit interval holds it. How often a source occurred before `i` is counted in closed form, bit by bit, so that
/// any sample is found in O(32) per source. The deviation from the weights is at most about log2(n) / 2 samples, and
/// none at multiples of 2^32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blend {
    /// Ends of the sources' parts, in units of 2^-32.
    ends: Vec<u64>,
}

const BLOCK_BITS: u32 = 32;

impl Blend {
    /// Weights need not sum to one; they must be finite, not negative, and not all zero.
    pub fn new(weights: &[f64]) -> Option<Blend> {
        let total: f64 = weights.iter().sum();
        if weights.iter().any(|w| !w.is_finite() || *w < 0.0) || total <= 0.0 {
            return None;
        }
        let scale = (1u64 << BLOCK_BITS) as f64;
        let mut sum = 0.0;
        let ends = weights.iter().map(|weight| {
            sum += weight;
            (sum / total * scale).round() as u64
        });
        Some(Blend { ends: ends.collect() })
    }

    /// The source of sample `index`, and how many samples before it came from there.
    pub fn at(&self, index: u64) -> (usize, u64) {
        let point = ((index as u32).reverse_bits()) as u64;
        let source = self.ends.partition_point(|&end| end <= point);
        let start = source.checked_sub(1).map_or(0, |s| self.ends[s]);
        (source, count_below(self.ends[source], index) - count_below(start, index))
    }
}

/// How many of the samples `0..n` have a point below `end`.
fn count_below(end: u64, n: u64) -> u64 {
    let (blocks, rest) = (n >> BLOCK_BITS, n & ((1 << BLOCK_BITS) - 1));
    if end >> BLOCK_BITS != 0 {
        return n;
    }
    let mut count = blocks * end;
    for bit in (0..BLOCK_BITS).filter(|bit| (end >> bit) & 1 == 1) {
        // Points that agree with `end` above this bit and have 0 here: the reversed index is fixed in its low bits.
        let fixed_bits = BLOCK_BITS - bit;
        let prefix = (end >> bit) & !1;
        let residue = ((prefix << bit) as u32).reverse_bits() as u64;
        if rest > residue {
            count += ((rest - residue - 1) >> fixed_bits) + 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn permutations_hit_every_index_once(len in 1u64..3000, key: u64) {
            let order = Permutation::new(len, key);
            let mut seen: Vec<u64> = (0..len).map(|i| order.at(i)).collect();
            prop_assert!(len < 20 || seen.iter().enumerate().any(|(i, &v)| i as u64 != v));
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn blends_count_exactly_and_keep_to_the_weights(
            weights in proptest::collection::vec(0.0f64..5.0, 1..6), skip in 0u64..1 << 40,
        ) {
            let Some(blend) = Blend::new(&weights) else { return Ok(()) };
            let mut counts: Vec<u64> = vec![0; weights.len()];
            for i in 0..2000 {
                let (source, before) = blend.at(i);
                prop_assert_eq!(before, counts[source]);
                counts[source] += 1;
            }
            let total: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(&weights) {
                // Each of the two ends deviates by less than log2(n) / 2 = 5.5 samples.
                prop_assert!((*count as f64 - 2000.0 * weight / total).abs() < 11.0, "{:?} {:?}", counts, weights);
            }
            // Random access far away agrees with its neighbours.
            let (source, before) = blend.at(skip);
            let next = (skip + 1..).map(|i| blend.at(i)).find(|(s, _)| *s == source);
            prop_assert_eq!(next, Some((source, before + 1)));
        }
    }

    #[test]
    fn neighbours_and_keys_are_unrelated() {
        // Of 1000 neighbours about 1000/1000 stay neighbours by chance; ten is far in the tail of Poisson(1).
        let order = Permutation::new(1000, 3);
        let runs = (0..999).filter(|&i| order.at(i + 1) == order.at(i) + 1).count();
        assert!(runs < 10, "{runs} neighbours stayed neighbours");
        let other = Permutation::new(1000, 4);
        assert!((0..1000).filter(|&i| order.at(i) == other.at(i)).count() < 10);
    }
}
