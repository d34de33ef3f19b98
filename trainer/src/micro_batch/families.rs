//! Rows of a batch that begin with the same tokens, as answers to one prompt do.
//!
//! What they share has one value for all of them (attention is causal), so it is computed once, and its gradient is the sum
//! of theirs. Tokens of which the loss reads anything are never shared: each has a target of its own.

use super::Flat;
use std::ops::Range;

/// Neighbouring rows that begin with the same tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// How many first tokens of theirs are the same; 0 for a row that stands alone.
    pub shared: usize,
}

/// Fewer tokens are not worth a document of their own.
const LEAST_SHARED: usize = 4;
/// Nor is it worth that rows are packed less evenly to save a smaller part of a family's tokens.
const LEAST_PART: f64 = 1.0 / 16.0;

/// Every row by itself.
pub fn alone(num_rows: usize) -> Vec<Family> {
    (0..num_rows).map(|row| Family { rows: row..row + 1, shared: 0 }).collect()
}

/// The families of a batch, in its order: those that save the most tokens.
pub fn find(flat: &Flat, counts: impl Fn(usize) -> bool) -> Vec<Family> {
    let num_rows = flat.num_rows();
    // Rows share what all neighbours among them share.
    let commons: Vec<usize> = (1..num_rows).map(|row| common(flat, row - 1, row, &counts)).collect();
    // Of so many first rows: the tokens saved at most, and their last family then.
    let mut best = vec![(0, Family { rows: 0..0, shared: 0 })];
    for end in 1..=num_rows {
        let mut found = (best[end - 1].0, Family { rows: end - 1..end, shared: 0 });
        let mut shared = usize::MAX;
        for first in (0..end - 1).rev() {
            shared = shared.min(commons[first]);
            if shared < LEAST_SHARED {
                break;
            }
            let saved = (end - first - 1) * shared;
            let is_worth_it = saved as f64 >= LEAST_PART * (flat.starts[end] - flat.starts[first]) as f64;
            if is_worth_it && best[first].0 + saved > found.0 {
                found = (best[first].0 + saved, Family { rows: first..end, shared });
            }
        }
        best.push(found);
    }
    let mut families = Vec::new();
    let mut end = num_rows;
    while end > 0 {
        let family = best[end].1.clone();
        end = family.rows.start;
        families.push(family);
    }
    families.reverse();
    families
}

/// How many first tokens of two rows are the same. Each row keeps one of its first document's.
fn common(flat: &Flat, a: usize, b: usize, counts: &impl Fn(usize) -> bool) -> usize {
    let [a, b] = [a, b].map(|row| flat.row(row));
    let first_document = |row: &Range<usize>| {
        let documents = &flat.seq_id[row.clone()];
        documents.iter().take_while(|&&document| document == documents[0]).count()
    };
    let most = first_document(&a).min(first_document(&b)).saturating_sub(1);
    let same = |&i: &usize| {
        let (a, b) = (a.start + i, b.start + i);
        let alike = flat.tokens[a] == flat.tokens[b] && flat.positions[a] == flat.positions[b];
        alike && !counts(a) && !counts(b)
    };
    (0..most).take_while(same).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of one document each: ids, of which the last `counted` are counted.
    fn flat(rows: &[(&[u32], usize)]) -> (Flat, Vec<bool>) {
        let mut starts = vec![0];
        starts.extend(rows.iter().scan(0, |end, (ids, _)| {
            *end += ids.len();
            Some(*end)
        }));
        let tokens: Vec<u32> = rows.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let positions = rows.iter().flat_map(|(ids, _)| 0..ids.len() as u32).collect();
        let counted = rows.iter().flat_map(|&(ids, n)| (0..ids.len()).map(move |i| i + n >= ids.len())).collect();
        (Flat { seq_id: vec![0; tokens.len()], tokens, positions, targets: None, starts }, counted)
    }

    fn found(rows: &[(&[u32], usize)]) -> Vec<(Range<usize>, usize)> {
        let (flat, counted) = flat(rows);
        find(&flat, |at| counted[at]).into_iter().map(|family| (family.rows, family.shared)).collect()
    }

    #[test]
    fn answers_share_their_prompt_up_to_the_first_counted_token() {
        let prompt: &[u32] = &[1, 2, 3, 4, 5, 6, 7];
        let other: &[u32] = &[1, 2, 3, 9, 9, 9, 9];
        assert_eq!(found(&[(prompt, 2), (prompt, 2), (other, 2), (other, 1)]), [(0..2, 5), (2..4, 5)]);
        assert_eq!(found(&[(prompt, 2), (other, 2)]), [(0..1, 0), (1..2, 0)], "three tokens are too few");
        assert_eq!(found(&[(prompt, 7), (prompt, 7)]), [(0..1, 0), (1..2, 0)]);
        assert_eq!(found(&[(prompt, 0), (&prompt[..6], 0), (prompt, 2)]), [(0..3, 5)], "each row keeps a token");
        assert_eq!(found(&[(prompt, 0), (prompt, 0), (prompt, 2)]), [(0..3, 5)]);
        assert_eq!(found(&[(&[], 0), (prompt, 2), (prompt, 2)]), [(0..1, 0), (1..3, 5)]);
        assert_eq!(found(&[]), []);
    }

    #[test]
    fn what_several_prompts_begin_with_is_shared_where_that_saves_more() {
        let prompts: Vec<Vec<u32>> = (0..3).map(|at| vec![1, 2, 3, 4, 5, 10 + at, 10 + at, 10 + at, 0]).collect();
        let answers = |each: usize| -> Vec<(&[u32], usize)> {
            prompts.iter().flat_map(|prompt| vec![(prompt.as_slice(), 1); each]).collect()
        };
        assert_eq!(found(&answers(1)), [(0..3, 5)]);
        assert_eq!(found(&answers(2)), [(0..6, 5)], "25 saved by all are more than 24");
        assert_eq!(found(&answers(4)), [(0..4, 8), (4..8, 8), (8..12, 8)], "55 saved by all are less than 72");
        // A prompt of which one answer is left takes nothing away from the others.
        let left: Vec<(&[u32], usize)> = answers(4).split_off(3);
        assert_eq!(found(&left), [(0..1, 0), (1..5, 8), (5..9, 8)]);
    }

    #[test]
    fn a_small_part_of_a_row_is_not_shared() {
        let row = |last: u32, length: usize| [vec![1, 2, 3, 4], vec![last; length]].concat();
        let rows = |length: usize| [row(5, length), row(6, length)];
        let [a, b] = rows(20);
        assert_eq!(found(&[(&a, 1), (&b, 1)]), [(0..2, 4)]);
        let [a, b] = rows(40);
        assert_eq!(found(&[(&a, 1), (&b, 1)]), [(0..1, 0), (1..2, 0)]);
    }

    #[test]
    fn only_the_first_document_of_a_row_is_shared() {
        let ids: &[u32] = &[1, 2, 3, 4, 5, 1, 2, 3];
        let (mut flat, counted) = flat(&[(ids, 0), (ids, 0)]);
        flat.seq_id = [0, 0, 0, 0, 0, 1, 1, 1].repeat(2);
        let families = find(&flat, |at| counted[at]);
        assert_eq!(families, [Family { rows: 0..2, shared: 4 }]);
    }
}
