//! From a batch's columns to micro-batches on the device: the only host-to-device copies of a step.
//!
//! Rows of a micro-batch are laid end to end; there is no padding between them. One that would leave ranks that share its
//! sequence without a token is filled up by a document of its own that counts nothing; so are the micro-batches of a rank
//! that has fewer rows than others.

use crate::error::{Result, TrainError};
use std::ops::Range;
use std::rc::Rc;
use tangelo_configs::job::RotateMethod;
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

/// How a rank's rows become micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatches {
    /// So many rows each; every rank has the same number of them.
    Rows(usize),
    /// Rows in order until the next would make more than so many tokens; a longer row is alone. Ranks may have different
    /// rows: all run as many micro-batches as the one that needs most.
    Tokens(usize),
}

impl MicroBatches {
    /// The rows of each micro-batch, from the tokens of each row.
    pub fn cut(self, lengths: &[usize]) -> Vec<Range<usize>> {
        match self {
            MicroBatches::Rows(rows) => {
                let starts = (0..lengths.len()).step_by(rows.max(1));
                starts.map(|start| start..(start + rows).min(lengths.len())).collect()
            }
            MicroBatches::Tokens(most) => {
                let mut cuts: Vec<Range<usize>> = Vec::new();
                let mut filled = usize::MAX;
                for (row, &length) in lengths.iter().enumerate() {
                    match cuts.last_mut().filter(|_| length <= most.saturating_sub(filled)) {
                        Some(open) => {
                            open.end = row + 1;
                            filled += length;
                        }
                        None => {
                            cuts.push(row..row + 1);
                            filled = length;
                        }
                    }
                }
                cuts
            }
        }
    }
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

/// Rows that a pass reads, micro-batch by micro-batch.
#[derive(Clone)]
pub struct Rows<'a> {
    flat: Rc<Flat>,
    /// What is made of them.
    pub work: Rc<Work>,
    /// The rows of each micro-batch.
    cuts: Vec<Range<usize>>,
    reader: Reader<'a>,
    /// This rank's place.
    pub place: SequencePlace,
}

impl<'a> Rows<'a> {
    /// The rows of a batch, cut into micro-batches. Ids from `vocab_size` on are refused where they are read.
    pub fn new(batch: &Batch, work: Work, cuts: Vec<Range<usize>>, reader: Reader<'a>) -> Result<Rows<'a>> {
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
        let rows = &self.cuts[index];
        let tokens = self.flat.starts[rows.start]..self.flat.starts[rows.end];
        let fillers = self.least_tokens().saturating_sub(tokens.len());
        tokens.chain(std::iter::repeat_n(FILLER, fillers)).collect()
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
        let (flat, rows) = (&*self.flat, self.cuts[index].clone());
        let lengths: Vec<usize> = rows.clone().map(|row| flat.starts[row + 1] - flat.starts[row]).collect();
        let seq_id = &flat.seq_id[flat.starts[rows.start]..flat.starts[rows.end]];
        let mut borders = document_borders(&lengths, seq_id);
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

/// A batch's rows lie in as many micro-batches as asked for, the last ones empty.
pub fn with_empty(mut cuts: Vec<Range<usize>>, count: usize) -> Vec<Range<usize>> {
    let end = cuts.last().map_or(0, |cut| cut.end);
    cuts.resize(count.max(cuts.len()), end..end);
    cuts
}

fn pick<T: Copy>(values: &[T], ranges: &[Range<usize>]) -> Vec<T> {
    ranges.iter().flat_map(|range| values[range.clone()].iter().copied()).collect()
}

/// Where documents begin in rows laid end to end: at each row, and where `seq_id` changes inside one.
fn document_borders(row_lengths: &[usize], seq_id: &[u32]) -> Vec<i64> {
    let mut borders = vec![0i64];
    let mut start = 0;
    for &length in row_lengths {
        let row = &seq_id[start..start + length];
        let inside = (1..length).filter(|&i| row[i] != row[i - 1]).map(|i| (start + i) as i64);
        borders.extend(inside);
        start += length;
        if length > 0 {
            borders.push(start as i64);
        }
    }
    borders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_rows_and_changes_of_document() {
        assert_eq!(document_borders(&[4, 3], &[0, 0, 1, 1, 0, 1, 2]), [0, 2, 4, 5, 6, 7]);
        assert_eq!(document_borders(&[2, 0, 2], &[0, 0, 0, 0]), [0, 2, 4]);
    }

    #[test]
    fn a_budget_of_tokens_is_filled_in_order() {
        let check = |most, lengths: &[usize], expected: &[Range<usize>]| {
            assert_eq!(MicroBatches::Tokens(most).cut(lengths), expected, "{most} {lengths:?}");
        };
        check(10, &[4, 6, 1, 9, 2], &[0..2, 2..4, 4..5]);
        check(10, &[11, 1, 30], &[0..1, 1..2, 2..3]);
        check(10, &[], &[]);
        check(0, &[1, 1], &[0..1, 1..2]);
        assert_eq!(MicroBatches::Rows(2).cut(&[1; 5]), [0..2, 2..4, 4..5]);
        assert_eq!(with_empty(vec![0..2, 2..3], 4), [0..2, 2..3, 3..3, 3..3]);
        assert_eq!(with_empty(Vec::new(), 1), std::iter::once(0..0).collect::<Vec<_>>());
    }
}
