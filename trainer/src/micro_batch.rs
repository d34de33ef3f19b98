//! From a batch's columns to micro-batches on the device: the only host-to-device copies of a step.
//!
//! Rows of a micro-batch are laid end to end; there is no padding between them. One that would leave ranks that share its
//! sequence without a token is filled up by a document of its own that counts nothing; so are the micro-batches of a rank
//! that has fewer rows than others.

use crate::error::{Result, TrainError};
use std::ops::Range;
use std::rc::Rc;
use tangelo_configs::job::RotateMethod;
use tangelo_core::balance::{Counts, balance};
use tangelo_core::loss::Reads;
use tangelo_core::loss::objective::Objective;
use tangelo_core::{Batch, Column, Group, LossComponent, LossSpec, SequenceLayout, Topology};
use tangelo_models::PackContext;
use tch::{Device, Tensor};

/// What a pass makes of the tokens it reads.
#[derive(Debug)]
pub enum Work {
    /// Cross-entropy alone, at temperature 1: its kernels make one pass over the logits.
    CrossEntropy {
        /// Of each token of the batch.
        weights: Vec<f32>,
        /// Multiplies the loss.
        coefficient: f64,
    },
    /// A sum of components.
    Objective {
        /// What tokens cost.
        objective: Objective,
        /// What it wants of the head.
        reads: Reads,
    },
    /// What the model says of each token; no loss.
    Predict {
        /// Of the distribution.
        temperature: f64,
        /// Which tokens of the batch are asked for, where not all are.
        marked: Option<Vec<f32>>,
    },
}

impl Work {
    /// What `loss` wants of `batch`.
    ///
    /// # Errors
    /// A column is missing, or a number of the loss makes no sense.
    pub fn of(loss: &LossSpec, batch: &Batch) -> Result<Work> {
        let reads = loss.check().map_err(TrainError::Config)?;
        batch.require(&loss.columns())?;
        if let ([LossComponent::CrossEntropy { weight, coefficient }], 1.0) =
            (loss.components.as_slice(), loss.temperature)
        {
            return Ok(Work::CrossEntropy { weights: batch.f32_values(*weight)?, coefficient: *coefficient });
        }
        Ok(Work::Objective { objective: Objective::new(loss, batch)?, reads })
    }

    /// What the model says of the tokens that `loss_mask` marks; of all where there is no such column.
    pub fn predict(batch: &Batch, temperature: f64) -> Result<Work> {
        let marked = batch.has(Column::LossMask).then(|| batch.f32_values(Column::LossMask)).transpose()?;
        Ok(Work::Predict { temperature, marked })
    }

    /// Whether what the model says of a token's target is used.
    pub fn counts_token(&self, at: usize) -> bool {
        match self {
            Work::CrossEntropy { weights, .. } => weights[at] != 0.0,
            Work::Objective { objective, .. } => objective.counts_token(at),
            Work::Predict { marked, .. } => marked.as_ref().is_none_or(|marked| marked[at] != 0.0),
        }
    }
}

/// Tokens of one micro-batch that this rank computes with, and what the loss reads of them.
#[derive(Debug)]
pub struct MicroBatch {
    /// Tokens and positions of this rank, document borders of all.
    pub pack: PackContext,
    /// Ids to predict, i64.
    pub targets: Tensor,
    /// Weight of each token in a cross-entropy, f32; nothing for other work.
    pub weights: Tensor,
    /// Where each token lies in the batch, rows end to end; [`FILLER`] for one that counts nothing.
    pub own: Vec<usize>,
    /// How all tokens are cut over the ranks that share them.
    pub layout: SequenceLayout,
}

/// The place in the batch of a token that is in none.
pub const FILLER: usize = usize::MAX;

/// This rank's place among those that share a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequencePlace {
    /// In the ring.
    pub ring: usize,
    /// Among those that exchange heads.
    pub heads: usize,
    /// Among tensor ranks.
    pub tensor: usize,
}

impl SequencePlace {
    /// The place of `rank`.
    pub fn of(topology: &Topology, rank: usize) -> SequencePlace {
        let index = |group| topology.index(group, rank);
        SequencePlace { ring: index(Group::Ring), heads: index(Group::Heads), tensor: index(Group::Tensor) }
    }
}

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
    /// How many micro-batches a rank needs for rows of so many tokens.
    pub fn needed(self, lengths: &[usize]) -> usize {
        match self {
            MicroBatches::Rows(rows) => lengths.len().div_ceil(rows.max(1)),
            MicroBatches::Tokens(most) => in_order(lengths, most).len(),
            MicroBatches::Balanced(most) => {
                let fits = |count: usize| {
                    let load = |rows: &Vec<usize>| rows.iter().map(|&row| lengths[row]).sum::<usize>();
                    evenly(lengths, count).iter().all(|rows| rows.len() <= 1 || load(rows) <= most)
                };
                // No two rows of more than half fit together.
                let alone = lengths.iter().filter(|&&length| 2 * length > most).count();
                let least = lengths.iter().sum::<usize>().div_ceil(most.max(1)).max(alone).max(1);
                first_that_fits(least.min(lengths.len()), lengths.len(), fits)
            }
        }
    }

    /// The rows of each of `count` micro-batches, at least as many as are needed; the last ones may be empty.
    pub fn cut(self, lengths: &[usize], count: usize) -> Vec<Vec<usize>> {
        let mut cuts: Vec<Vec<usize>> = match self {
            MicroBatches::Rows(rows) => {
                let all: Vec<usize> = (0..lengths.len()).collect();
                all.chunks(rows.max(1)).map(<[usize]>::to_vec).collect()
            }
            MicroBatches::Tokens(most) => in_order(lengths, most),
            MicroBatches::Balanced(_) => evenly(lengths, count),
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

/// Where a rank stands, and what bounds what it reads.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// The groups of the job.
    pub topology: &'a Topology,
    /// This rank.
    pub rank: usize,
    /// How keys and values go round the ring.
    pub rotate_method: RotateMethod,
    /// Ids are below it.
    pub vocab_size: usize,
    /// Where micro-batches go.
    pub device: Device,
}

/// A batch's columns, rows end to end.
#[derive(Debug)]
struct Flat {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    seq_id: Vec<u32>,
    targets: Option<Vec<u32>>,
    /// Where each row begins; then the number of tokens.
    starts: Vec<usize>,
}

impl Flat {
    /// Where the tokens of a row lie.
    fn row(&self, row: usize) -> Range<usize> {
        self.starts[row]..self.starts[row + 1]
    }
}

/// Rows that a pass reads, micro-batch by micro-batch.
#[derive(Clone)]
pub struct Rows<'a> {
    flat: Rc<Flat>,
    /// What is made of them.
    pub work: Rc<Work>,
    /// The rows of each micro-batch.
    cuts: Vec<Vec<usize>>,
    reader: Reader<'a>,
    /// This rank's place.
    pub place: SequencePlace,
}

impl<'a> Rows<'a> {
    /// The rows of a batch, cut into micro-batches. Ids from `vocab_size` on are refused where they are read.
    pub fn new(batch: &Batch, work: Work, cuts: Vec<Vec<usize>>, reader: Reader<'a>) -> Result<Rows<'a>> {
        batch.require(&[Column::Positions, Column::SeqId])?;
        let mut starts = vec![0];
        starts.extend(batch.row_lengths()?.iter().scan(0, |end, &n| {
            *end += n;
            Some(*end)
        }));
        let read = |column| batch.u32_values(column);
        let flat = Flat {
            tokens: read(Column::Tokens)?,
            positions: read(Column::Positions)?,
            seq_id: read(Column::SeqId)?,
            targets: batch.has(Column::Targets).then(|| read(Column::Targets)).transpose()?,
            starts,
        };
        let place = SequencePlace::of(reader.topology, reader.rank);
        Ok(Rows { flat: Rc::new(flat), work: Rc::new(work), cuts, reader, place })
    }

    /// The same rows, of which only micro-batch `index` is there, as number 0.
    pub fn only(&self, index: usize) -> Rows<'a> {
        Rows { cuts: vec![self.cuts[index].clone()], ..self.clone() }
    }

    /// Number of micro-batches.
    pub fn len(&self) -> usize {
        self.cuts.len()
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.cuts.is_empty()
    }

    /// How keys and values go round the ring.
    pub fn rotate_method(&self) -> RotateMethod {
        self.reader.rotate_method
    }

    /// What all ranks that read rows must add up: a weight, the number of tokens, and what else the loss is divided by.
    pub fn counts(&self) -> Vec<f64> {
        let tokens = self.flat.tokens.len() as f64;
        match &*self.work {
            Work::CrossEntropy { weights, .. } => vec![weights.iter().map(|&w| f64::from(w)).sum(), tokens],
            Work::Objective { objective, .. } => {
                let counts = objective.counts();
                [counts[0], tokens].into_iter().chain(counts[1..].iter().copied()).collect()
            }
            Work::Predict { .. } => vec![0.0, tokens],
        }
    }

    /// One micro-batch, uploaded.
    pub fn micro_batch(&self, index: usize) -> Result<MicroBatch> {
        let all = self.places(index);
        let layout = self.layout(all.len());
        let own = pick(&all, &layout.context_ranges(self.place.ring, self.place.heads));
        let flat = &*self.flat;
        let read = |values: &[u32]| own.iter().map(|&at| if at == FILLER { 0 } else { values[at] }).collect::<Vec<_>>();
        let (tokens, positions) = (read(&flat.tokens), read(&flat.positions));
        let in_batch = || all.iter().copied().filter(|&at| at != FILLER);
        self.check_ids("token", in_batch().map(|at| Some(flat.tokens[at])))?;
        let mut targets = vec![0i64; own.len()];
        if let Some(ids) = &flat.targets {
            self.check_ids("target", in_batch().map(|at| self.work.counts_token(at).then_some(ids[at])))?;
            targets = read(ids).into_iter().map(i64::from).collect();
        }
        let weights: Vec<f32> = match &*self.work {
            Work::CrossEntropy { weights, .. } => {
                own.iter().map(|&at| if at == FILLER { 0.0 } else { weights[at] }).collect()
            }
            _ => Vec::new(),
        };
        let device = self.reader.device;
        Ok(MicroBatch {
            pack: PackContext::part(&tokens, &positions, self.borders(index, all.len()), device),
            targets: Tensor::from_slice(&targets).to_device(device),
            weights: Tensor::from_slice(&weights).to_device(device),
            own,
            layout,
        })
    }

    /// Where the tokens of a micro-batch lie in the batch, in order, fillers included.
    pub fn places(&self, index: usize) -> Vec<usize> {
        let mut places: Vec<usize> = self.cuts[index].iter().flat_map(|&row| self.flat.row(row)).collect();
        places.resize(places.len().max(self.least_tokens()), FILLER);
        places
    }

    /// Tokens with which every rank that shares a sequence has one.
    fn least_tokens(&self) -> usize {
        let size = |group| self.reader.topology.size(group);
        let ring = if size(Group::Ring) > 1 { 2 * size(Group::Ring) } else { 1 };
        ring * size(Group::Heads) * size(Group::Tensor)
    }

    /// How so many tokens are cut over the ranks that share a sequence.
    pub fn layout(&self, num_tokens: usize) -> SequenceLayout {
        let size = |group| self.reader.topology.size(group);
        let (ring, heads, tensor) = (size(Group::Ring), size(Group::Heads), size(Group::Tensor));
        SequenceLayout { num_tokens, ring, heads, tensor }
    }

    fn borders(&self, index: usize, num_tokens: usize) -> Vec<i64> {
        let rows = self.cuts[index].iter().map(|&row| &self.flat.seq_id[self.flat.row(row)]);
        let mut borders = document_borders(rows);
        if borders.last() != Some(&(num_tokens as i64)) {
            borders.push(num_tokens as i64);
        }
        borders
    }

    /// An id that nobody holds a row for would be a zero embedding, or a loss of infinity, under tensor parallelism.
    fn check_ids(&self, what: &str, ids: impl Iterator<Item = Option<u32>>) -> Result<()> {
        let most = self.reader.vocab_size;
        match ids.enumerate().find(|(_, id)| id.is_some_and(|id| id as usize >= most)) {
            Some((at, Some(id))) => Err(TrainError::Data(format!(
                "{what} {at} of a micro-batch is id {id}, but the model's vocabulary has {most}: the data was prepared \
                 with another tokenizer than the model's, or a shard is damaged; prepare it again",
            ))),
            _ => Ok(()),
        }
    }
}

fn pick<T: Copy>(values: &[T], ranges: &[Range<usize>]) -> Vec<T> {
    ranges.iter().flat_map(|range| values[range.clone()].iter().copied()).collect()
}

/// Where documents begin in rows laid end to end: at each row, and where `seq_id` changes inside one.
fn document_borders<'a>(rows: impl Iterator<Item = &'a [u32]>) -> Vec<i64> {
    let mut borders = vec![0i64];
    let mut end = 0;
    for row in rows {
        for document in row.chunk_by(|a, b| a == b) {
            end += document.len() as i64;
            borders.push(end);
        }
    }
    borders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_rows_and_changes_of_document() {
        let check = |rows: &[&[u32]], expected: &[i64]| assert_eq!(document_borders(rows.iter().copied()), expected);
        check(&[&[0, 0, 1, 1], &[0, 1, 2]], &[0, 2, 4, 5, 6, 7]);
        check(&[&[0, 0], &[], &[0, 0]], &[0, 2, 4]);
    }

    #[test]
    fn a_budget_of_tokens_is_filled_in_order_or_evenly() {
        let check = |how: MicroBatches, lengths: &[usize], expected: &[&[usize]]| {
            assert_eq!(how.needed(lengths), expected.len(), "{how:?} {lengths:?}");
            assert_eq!(how.cut(lengths, expected.len()), expected, "{how:?} {lengths:?}");
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
        assert_eq!(MicroBatches::Tokens(9).cut(&[5, 5], 3), [vec![0], vec![1], vec![]]);
        assert_eq!(MicroBatches::Balanced(9).cut(&[5, 5], 3), [vec![0], vec![1], vec![]]);
        assert_eq!(MicroBatches::Tokens(9).cut(&[], 1), [Vec::<usize>::new()]);
    }
}
