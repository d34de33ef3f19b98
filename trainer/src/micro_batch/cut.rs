//! How a rank's rows become micro-batches.

use std::ops::Range;
use tangelo_core::balance::{Counts, balance};

/// How a rank's rows become micro-batches. Under a budget of tokens ranks may have different rows: all run as many
/// micro-batches as the one that needs most, and a row longer than the budget is alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatches {
    /// So many rows each; every rank has the same number of them.
    Rows(usize),
    /// Rows in order until the next would make more than so many tokens.
    Tokens(usize),
    /// As few as hold so many tokens each, evenly filled (Karmarkar-Karp).
    Balanced(usize),
}

impl MicroBatches {
    /// How many micro-batches a rank needs for rows of so many tokens. Neighbours that are `together` stay so in balanced
    /// ones, as far as they fit.
    pub fn needed(self, lengths: &[usize], together: &[Range<usize>]) -> usize {
        match self {
            MicroBatches::Rows(rows) => lengths.len().div_ceil(rows.max(1)),
            MicroBatches::Tokens(most) => in_order(lengths, most).len(),
            MicroBatches::Balanced(most) => {
                let (_, loads) = runs(lengths, together, most);
                let fits = |count: usize| {
                    let load = |part: &Vec<usize>| part.iter().map(|&run| loads[run]).sum::<usize>();
                    evenly(&loads, count).iter().all(|part| part.len() <= 1 || load(part) <= most)
                };
                // No two runs of more than half fit together.
                let alone = loads.iter().filter(|&&load| 2 * load > most).count();
                let least = loads.iter().sum::<usize>().div_ceil(most.max(1)).max(alone).max(1);
                first_that_fits(least.min(loads.len()), loads.len(), fits)
            }
        }
    }

    /// The rows of each of `count` micro-batches, at least as many as are needed; the last ones may be empty.
    pub fn cut(self, lengths: &[usize], together: &[Range<usize>], count: usize) -> Vec<Vec<usize>> {
        let mut cuts: Vec<Vec<usize>> = match self {
            MicroBatches::Rows(rows) => {
                let all: Vec<usize> = (0..lengths.len()).collect();
                all.chunks(rows.max(1)).map(<[usize]>::to_vec).collect()
            }
            MicroBatches::Tokens(most) => in_order(lengths, most),
            MicroBatches::Balanced(most) => {
                let (runs, loads) = runs(lengths, together, most);
                let rows = |part: &Vec<usize>| part.iter().flat_map(|&run| runs[run].clone()).collect();
                evenly(&loads, count).iter().map(rows).collect()
            }
        };
        assert!(cuts.len() <= count, "{} micro-batches in {count}", cuts.len());
        cuts.resize(count, Vec::new());
        cuts
    }
}

/// The first count from `least` on that fits, where `most` does and fewer than a fitting one mostly do not: strides that
/// double, then halving between the last that did not fit and the first that did.
fn first_that_fits(least: usize, most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut too_few, mut enough, mut stride) = (least.saturating_sub(1), least, 1);
    while enough < most && !fits(enough) {
        (too_few, enough) = (enough, (enough + stride).min(most));
        stride *= 2;
    }
    while enough - too_few > 1 {
        let middle = usize::midpoint(too_few, enough);
        match fits(middle) {
            true => enough = middle,
            false => too_few = middle,
        }
    }
    enough
}

/// Rows that are together, in runs of at most so many tokens, and the tokens of each.
fn runs(lengths: &[usize], together: &[Range<usize>], most: usize) -> (Vec<Range<usize>>, Vec<usize>) {
    let of = |family: &Range<usize>| {
        let first = family.start;
        let cuts = in_order(&lengths[family.clone()], most);
        cuts.into_iter().map(move |rows| first + rows[0]..first + rows[rows.len() - 1] + 1)
    };
    let runs: Vec<Range<usize>> = together.iter().flat_map(of).collect();
    let loads = runs.iter().map(|run| lengths[run.clone()].iter().sum()).collect();
    (runs, loads)
}

fn in_order(lengths: &[usize], most: usize) -> Vec<Vec<usize>> {
    let (mut cuts, mut filled): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
    for (row, &length) in lengths.iter().enumerate() {
        match cuts.last_mut().filter(|_| filled + length <= most) {
            Some(open) => {
                open.push(row);
                filled += length;
            }
            None => {
                cuts.push(vec![row]);
                filled = length;
            }
        }
    }
    cuts
}

fn evenly(lengths: &[usize], count: usize) -> Vec<Vec<usize>> {
    let weights: Vec<u64> = lengths.iter().map(|&n| n as u64).collect();
    balance(&weights, None, count, Counts::Any).map_or_else(|_| Vec::new(), |dealt| dealt.parts().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_of_tokens_is_filled_in_order_or_evenly() {
        let check = |how: MicroBatches, lengths: &[usize], expected: &[&[usize]]| {
            let alone: Vec<_> = (0..lengths.len()).map(|row| row..row + 1).collect();
            assert_eq!(how.needed(lengths, &alone), expected.len(), "{how:?} {lengths:?}");
            assert_eq!(how.cut(lengths, &alone, expected.len()), expected, "{how:?} {lengths:?}");
        };
        check(MicroBatches::Tokens(10), &[4, 6, 1, 9, 2], &[&[0, 1], &[2, 3], &[4]]);
        check(MicroBatches::Tokens(10), &[11, 1, 30], &[&[0], &[1], &[2]]);
        check(MicroBatches::Tokens(10), &[], &[]);
        check(MicroBatches::Tokens(0), &[1, 1], &[&[0], &[1]]);
        check(MicroBatches::Rows(2), &[1; 5], &[&[0, 1], &[2, 3], &[4]]);
        check(MicroBatches::Balanced(10), &[4, 6, 1, 9, 2], &[&[0, 4], &[1, 2], &[3]]);
        check(MicroBatches::Balanced(10), &[11, 1, 30], &[&[0], &[1], &[2]]);
        check(MicroBatches::Balanced(12), &[1, 1], &[&[0, 1]]);
        check(MicroBatches::Balanced(12), &[], &[]);
        let cut = |how: MicroBatches| how.cut(&[5, 5], &[0..1, 1..2], 3);
        assert_eq!(cut(MicroBatches::Tokens(9)), [vec![0], vec![1], vec![]]);
        assert_eq!(cut(MicroBatches::Balanced(9)), [vec![0], vec![1], vec![]]);
        assert_eq!(MicroBatches::Tokens(9).cut(&[], &[], 1), [Vec::<usize>::new()]);
    }

    #[test]
    fn rows_that_are_together_stay_so_as_far_as_they_fit() {
        let check = |most: usize, lengths: &[usize], together: &[Range<usize>], expected: &[&[usize]]| {
            let how = MicroBatches::Balanced(most);
            assert_eq!(how.needed(lengths, together), expected.len(), "{most} {lengths:?}");
            assert_eq!(how.cut(lengths, together, expected.len()), expected, "{most} {lengths:?}");
        };
        check(12, &[4, 4, 4, 4, 1, 1], &[0..2, 2..4, 4..6], &[&[0, 1], &[2, 3, 4, 5]]);
        check(10, &[4, 4, 4, 2, 8], &[0..4, 4..5], &[&[0, 1], &[2, 3], &[4]]);
        check(3, &[4, 4], std::slice::from_ref(&(0..2)), &[&[0], &[1]]);
    }
}
