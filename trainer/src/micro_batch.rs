//! From a batch's columns to micro-batches on the device: the only host-to-device copies of a step.
//!
//! Rows of a micro-batch are laid end to end; there is no padding between them. One that would leave ranks that share its
//! sequence without a token is filled up by a document of its own that counts nothing; so are the micro-batches of a rank
//! that has fewer rows than others.
//!
//! Rows that begin with the same tokens (answers to one prompt) may share them: in a micro-batch these stand once, and are
//! the prefix of the document of every such row ([`families`]).

pub mod cut;
pub mod families;

use crate::error::{Result, TrainError};
pub use cut::MicroBatches;
use families::Family;
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
    /// Whether rows may share what they begin with.
    pub share_prompts: bool,
}

/// A batch's columns, rows end to end.
#[derive(Debug)]
pub struct Flat {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Of the document within its row.
    seq_id: Vec<u32>,
    targets: Option<Vec<u32>>,
    /// Where each row begins; then the number of tokens.
    starts: Vec<usize>,
}

impl Flat {
    fn read(batch: &Batch) -> Result<Flat> {
        batch.require(&[Column::Positions, Column::SeqId])?;
        let mut starts = vec![0];
        starts.extend(batch.row_lengths()?.iter().scan(0, |end, &n| {
            *end += n;
            Some(*end)
        }));
        let read = |column| batch.u32_values(column);
        Ok(Flat {
            tokens: read(Column::Tokens)?,
            positions: read(Column::Positions)?,
            seq_id: read(Column::SeqId)?,
            targets: batch.has(Column::Targets).then(|| read(Column::Targets)).transpose()?,
            starts,
        })
    }

    fn num_rows(&self) -> usize {
        self.starts.len() - 1
    }

    /// Where the tokens of a row lie.
    fn row(&self, row: usize) -> Range<usize> {
        self.starts[row]..self.starts[row + 1]
    }
}

/// The tokens of a micro-batch.
#[derive(Debug, Default)]
struct Packed {
    /// Where they lie in the batch, fillers included.
    places: Vec<usize>,
    /// Where documents begin among them, and their number.
    borders: Vec<i64>,
    /// What goes before each document's own tokens.
    prefixes: Vec<Range<i64>>,
}

impl Packed {
    fn push(&mut self, places: impl Iterator<Item = usize>, prefix: Range<i64>) {
        self.borders.push(self.places.len() as i64);
        self.places.extend(places);
        self.prefixes.push(prefix);
    }
}

/// Rows that a pass reads, micro-batch by micro-batch.
#[derive(Clone)]
pub struct Rows<'a> {
    flat: Rc<Flat>,
    /// What is made of them.
    pub work: Rc<Work>,
    families: Rc<[Family]>,
    /// The rows of each micro-batch.
    cuts: Vec<Vec<usize>>,
    reader: Reader<'a>,
    /// This rank's place.
    pub place: SequencePlace,
}

impl<'a> Rows<'a> {
    /// The rows of a batch, not cut yet. Ids from `vocab_size` on are refused where they are read.
    pub fn new(batch: &Batch, work: Work, reader: Reader<'a>) -> Result<Rows<'a>> {
        let flat = Flat::read(batch)?;
        let place = SequencePlace::of(reader.topology, reader.rank);
        // A ring cuts documents where it likes; they must stand whole.
        let families = match reader.share_prompts && reader.topology.size(Group::Ring) == 1 {
            true => families::find(&flat, |at| work.counts_token(at)),
            false => families::alone(flat.num_rows()),
        };
        let (flat, work, families) = (Rc::new(flat), Rc::new(work), families.into());
        Ok(Rows { flat, work, families, cuts: Vec::new(), reader, place })
    }

    fn lengths(&self) -> Vec<usize> {
        (0..self.flat.num_rows()).map(|row| self.flat.row(row).len()).collect()
    }

    fn together(&self) -> Vec<Range<usize>> {
        self.families.iter().map(|family| family.rows.clone()).collect()
    }

    /// How many micro-batches are needed.
    pub fn needed(&self, how: MicroBatches) -> usize {
        how.needed(&self.lengths(), &self.together())
    }

    /// The same rows in `count` micro-batches, at least as many as are needed.
    pub fn cut(self, how: MicroBatches, count: usize) -> Rows<'a> {
        Rows { cuts: how.cut(&self.lengths(), &self.together(), count), ..self }
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
        let Packed { places: all, borders, prefixes } = self.packed(index);
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
            pack: PackContext::part(&tokens, &positions, borders, device).with_prefixes(prefixes),
            targets: Tensor::from_slice(&targets).to_device(device),
            weights: Tensor::from_slice(&weights).to_device(device),
            own,
            layout,
        })
    }

    /// Where the tokens of a micro-batch lie in the batch, in order, fillers included.
    pub fn places(&self, index: usize) -> Vec<usize> {
        self.packed(index).places
    }

    fn packed(&self, index: usize) -> Packed {
        let (flat, mut packed) = (&*self.flat, Packed::default());
        for (rows, shared) in self.runs(index) {
            let start = packed.places.len() as i64;
            let prefix = start..start + shared as i64;
            if shared > 0 {
                packed.push(flat.row(rows[0]).take(shared), 0..0);
            }
            for &row in rows {
                let (mut at, mut before) = (flat.row(row).start + shared, prefix.clone());
                for document in flat.seq_id[at..flat.row(row).end].chunk_by(|a, b| a == b) {
                    packed.push(at..at + document.len(), std::mem::take(&mut before));
                    at += document.len();
                }
            }
        }
        let missing = self.least_tokens().saturating_sub(packed.places.len());
        if missing > 0 {
            packed.push(std::iter::repeat_n(FILLER, missing), 0..0);
        }
        packed.borders.push(packed.places.len() as i64);
        if packed.prefixes.iter().all(Range::is_empty) {
            packed.prefixes.clear();
        }
        packed
    }

    /// The rows of a micro-batch, neighbours of one family together, and how many first tokens they share.
    fn runs(&self, index: usize) -> impl Iterator<Item = (&[usize], usize)> {
        let family = |row: usize| self.families.partition_point(|family| family.rows.end <= row);
        let runs = self.cuts[index].chunk_by(move |&a, &b| family(a) == family(b));
        runs.map(move |rows| (rows, if rows.len() > 1 { self.families[family(rows[0])].shared } else { 0 }))
    }

    /// Tokens of the batch that stand in no micro-batch because others do that are the same: where they lie, and where
    /// those begin.
    pub fn twins(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let of = |(rows, shared): (&[usize], usize)| {
            let start = |&row: &usize| self.flat.row(row).start;
            let twin = start(&rows[0]);
            rows[1..].iter().map(move |row| (start(row)..start(row) + shared, twin)).collect::<Vec<_>>()
        };
        (0..self.len()).flat_map(move |index| self.runs(index).flat_map(of))
    }

    /// What is computed: of each document, how many tokens, and how many go before them.
    pub fn computed(&self) -> Vec<(usize, usize)> {
        let of = |packed: Packed| {
            let before = |document: usize| packed.prefixes.get(document).map_or(0, |p| (p.end - p.start) as usize);
            let own = packed.borders.windows(2).map(|bounds| (bounds[1] - bounds[0]) as usize);
            own.enumerate().map(|(document, own)| (own, before(document))).collect::<Vec<_>>()
        };
        (0..self.len()).flat_map(|index| of(self.packed(index))).collect()
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
