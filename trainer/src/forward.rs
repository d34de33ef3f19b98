//! The verb `forward`: what a model says of given tokens, as columns of the batch, without gradients.
//!
//! Micro-batches are cut as for training and go through the same operators, so that a loss that reads these columns before
//! the weights change finds the very same log-probabilities: ratios of exactly 1.
//!
//! ```text
//!   rank's rows -> micro-batches -> Program::evaluate each -> numbers of this rank's tokens (last stage only)
//!     -> all-gather over heads ranks, over the ring -> whole rows, on every rank of the last stage
//!     -> tokens that were computed once for several rows, in each of these
//! ```

use crate::error::{Result, TrainError};
use crate::executor::Executor;
use crate::micro_batch::{FILLER, Rows, Work};
use crate::worker::TrainWorker;
use tangelo_configs::model::HeadSpec;
use tangelo_core::loss::objective::Prediction;
use tangelo_core::{Batch, Column, Group, Phase};
use tch::{Device, Kind, Tensor};

/// Numbers that travel with each token: log-probability and entropy, or the value and nothing.
const WIDTH: usize = 2;

impl TrainWorker {
    /// Adds columns to this rank's rows: of [`Column::OldLogprob`], [`Column::RefLogprob`] and [`Column::Entropy`] (of
    /// logits / `temperature`) from a policy, [`Column::Value`] from a critic or a reward model. Every rank must call it;
    /// those that share rows with the same rows.
    ///
    /// Whole rows come back on every rank of the last pipeline stage, `None` elsewhere. Where the batch has a `loss_mask`,
    /// log-probabilities and entropies of unmarked tokens are not computed and 0; values are of all tokens.
    ///
    /// # Errors
    /// A column that this model cannot give; no `targets` for log-probabilities.
    pub fn forward(&self, batch: &Batch, what: &[Column], temperature: f64) -> Result<Option<Batch>> {
        self.check_asked(batch, what, temperature)?;
        let rows = self.rows(batch, Work::predict(batch, temperature)?)?;
        let mut own = Vec::new();
        for index in 0..rows.len() {
            let one = rows.only(index);
            own.extend(Executor::new(self.parts(), &one, false).run(&self.program().evaluate)?.predictions);
        }
        let topology = self.sharding().topology();
        if !self.sharding().is_last(topology.stage(self.rank())) {
            return Ok(None);
        }
        let all = self.gather(&rows, own, batch.num_tokens())?;
        let mut batch = batch.clone();
        for &column in what {
            let number = |p: &Prediction| match column {
                Column::Entropy => p.entropy as f32,
                Column::Value => p.value as f32,
                _ => p.logprob as f32,
            };
            batch = batch.with_f32(column, all.iter().map(number).collect())?;
        }
        Ok(Some(batch))
    }

    fn check_asked(&self, batch: &Batch, what: &[Column], temperature: f64) -> Result<()> {
        let (gives, of): (&[Column], _) = match self.model().spec().head {
            HeadSpec::Vocabulary => (&[Column::OldLogprob, Column::RefLogprob, Column::Entropy], "policy"),
            HeadSpec::Scalar { .. } => (&[Column::Value], "critic"),
        };
        if let Some(column) = what.iter().find(|column| !gives.contains(column)) {
            let gives: Vec<&str> = gives.iter().map(|c| c.name()).collect();
            return Err(TrainError::Config(format!("a {of} gives {}, not `{column}`", gives.join(", "))));
        }
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(TrainError::Config(format!("forward at temperature {temperature}; it must be above 0")));
        }
        let needed: &[Column] = if gives.contains(&Column::Value) { &[] } else { &[Column::Targets] };
        Ok(batch.require(needed)?)
    }

    /// The numbers of all tokens of a batch from those of the ranks that share its rows.
    fn gather(&self, rows: &Rows<'_>, own: Vec<Prediction>, num_tokens: usize) -> Result<Vec<Prediction>> {
        self.groups().enter(Phase::Loss)?;
        let own: Vec<f32> = own.iter().flat_map(|p| [first_number(p), p.entropy as f32]).collect();
        let layouts: Vec<_> = (0..rows.len()).map(|m| rows.layout(rows.places(m).len())).collect();
        let (ring, heads) =
            (self.sharding().topology().size(Group::Ring), self.sharding().topology().size(Group::Heads));
        let of_heads = |r: usize, h: usize| layouts.iter().map(|l| l.head_counts(r)[h] * WIDTH).sum::<usize>();
        let mut values = Tensor::from_slice(&own).to_device(self.model().device());
        if let Some(comm) = self.groups().get(Group::Heads) {
            let counts: Vec<usize> = (0..heads).map(|h| of_heads(rows.place.ring, h)).collect();
            let all = empty(counts.iter().sum(), &values);
            comm.all_gather_into(&all, &values, &counts)?;
            values = all;
        }
        if let Some(comm) = self.groups().beside(Group::Ring) {
            let counts: Vec<usize> = (0..ring).map(|r| (0..heads).map(|h| of_heads(r, h)).sum()).collect();
            let all = empty(counts.iter().sum(), &values);
            comm.start_all_gather_into(all.shallow_clone(), values, counts).wait()?;
            values = all;
        }
        let values = Vec::<f32>::try_from(values.to_device(Device::Cpu)).expect("a flat f32 tensor");
        let mut found = vec![Prediction::default(); num_tokens];
        let places = places_by_rank(rows, ring, heads);
        for (place, numbers) in places.into_iter().zip(values.chunks_exact(WIDTH)).filter(|(at, _)| *at != FILLER) {
            let (first, entropy) = (f64::from(numbers[0]), f64::from(numbers[1]));
            found[place] = Prediction { logprob: first, value: first, entropy };
        }
        for (twins, first) in rows.twins() {
            let (at, length) = (twins.start, twins.len());
            found.copy_within(first..first + length, at);
        }
        Ok(found)
    }
}

/// A prediction has a log-probability or a value, and the other is 0.
fn first_number(p: &Prediction) -> f32 {
    (p.logprob + p.value) as f32
}

fn empty(len: usize, like: &Tensor) -> Tensor {
    Tensor::empty([len as i64], (Kind::Float, like.device()))
}

/// Where in the batch tokens lie, in the order in which ranks gather them: by ring rank, heads rank, micro-batch.
fn places_by_rank(rows: &Rows<'_>, ring: usize, heads: usize) -> Vec<usize> {
    let packs: Vec<Vec<usize>> = (0..rows.len()).map(|m| rows.places(m)).collect();
    let of = |r: usize, h: usize| {
        packs.iter().flat_map(move |pack| {
            let ranges = rows.layout(pack.len()).context_ranges(r, h);
            ranges.into_iter().flatten().map(move |at| pack[at])
        })
    };
    (0..ring).flat_map(|r| (0..heads).flat_map(move |h| of(r, h))).collect()
}
