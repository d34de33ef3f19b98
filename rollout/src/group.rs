//! The ranks that hold a model together and generate as one.
//!
//! ```text
//!   every rank: the same requests -> the same plan -> its part of the forward pass, summed over ranks
//!     -> logits of its tokens -> who wins each draw here -- 8 numbers a draw --> the same winner everywhere
//!                                   rows of filtered draws -- their logits ----> the same draw everywhere
//! ```
//! Nobody leads: what ranks decide is a function of what all of them know. What one rank may know alone (how much memory
//! there is, that it was told to stop) they agree on first.

use crate::RolloutError;
use std::ops::Range;
use tangelo_configs::MixerSpec;
use tangelo_kernels::comm::{Communicator, ReduceOp};
use tangelo_kernels::op::logprob::vocab_parallel as cut;
use tangelo_kernels::op::{self, Draw, Drawn};
use tangelo_models::Model;
use tch::Tensor;

/// This rank's place among the ranks that hold a model's parts.
#[derive(Debug)]
pub(crate) struct TensorGroup {
    /// `None` where this rank holds all of it.
    comm: Option<Communicator>,
    /// The ids whose rows of the head each rank holds.
    ids: Vec<Range<i64>>,
}

impl TensorGroup {
    /// The group of `comm`, whose ranks hold the parts of `model` in their order. Every rank must call it.
    ///
    /// # Errors
    /// Parts that do not make a model: then every rank fails.
    pub(crate) fn new(comm: Communicator, model: &Model) -> Result<TensorGroup, RolloutError> {
        let parts = comm.all_gather(&Tensor::from_slice(&part_of(model)).to_device(comm.device()))?;
        let parts = Vec::<i64>::try_from(parts.to_device(tch::Device::Cpu)).expect("a flat tensor of integers");
        let (parts, _) = parts.as_chunks::<5>();
        check(parts, model)?;
        let ids = parts.iter().map(|part| part[2]..part[3]).collect();
        Ok(TensorGroup { comm: Some(comm).filter(|comm| comm.size() > 1), ids })
    }

    /// The ranks, where there are several.
    pub(crate) fn comm(&self) -> Option<&Communicator> {
        self.comm.as_ref()
    }

    /// The least of what the ranks have.
    pub(crate) fn least(&self, own: usize) -> Result<usize, RolloutError> {
        self.reduce(own as i64, ReduceOp::Min).map(|least| least as usize)
    }

    /// Whether it is so on any rank.
    pub(crate) fn any(&self, own: bool) -> Result<bool, RolloutError> {
        self.reduce(i64::from(own), ReduceOp::Max).map(|most| most != 0)
    }

    fn reduce(&self, own: i64, op: ReduceOp) -> Result<i64, RolloutError> {
        let Some(comm) = &self.comm else { return Ok(own) };
        let value = Tensor::from_slice(&[own]).to_device(comm.device());
        comm.all_reduce_with(&value, op)?;
        Ok(value.int64_value(&[0]))
    }

    /// Draws tokens from `hidden [R, D]`, which all ranks have, under this rank's rows of the head: the same on all of them.
    pub(crate) fn draw(
        &self,
        hidden: &Tensor,
        head_weight: &Tensor,
        draws: &[Draw<'_>],
    ) -> Result<Vec<Drawn>, RolloutError> {
        let Some(comm) = &self.comm else { return Ok(op::sample(hidden, head_weight, draws)) };
        let logits = cut::logits(hidden, head_weight);
        let own = cut::contend(&logits, self.ids[comm.rank()].start, draws);
        let all = comm.all_gather(&own)?.view([comm.size() as i64, draws.len() as i64, cut::CONTENDER_WIDTH as i64]);
        let mut drawn = cut::elect(&all, hidden.kind(), draws);
        let vocabulary = self.ids.last().map_or(0, |ids| ids.end as usize);
        let filtered: Vec<usize> = (0..draws.len()).filter(|&i| draws[i].is_filtered(vocabulary)).collect();
        if !filtered.is_empty() {
            let from_rows = self.draw_filtered(comm, &logits, &all, draws, &filtered)?;
            filtered.into_iter().zip(from_rows).for_each(|(i, found)| drawn[i] = found);
        }
        Ok(drawn)
    }

    /// The draws `filtered`, from whole rows of logits; the contenders say what the model thinks of them.
    fn draw_filtered(
        &self,
        comm: &Communicator,
        logits: &Tensor,
        all: &Tensor,
        draws: &[Draw<'_>],
        filtered: &[usize],
    ) -> Result<Vec<Drawn>, RolloutError> {
        let mut rows: Vec<usize> = filtered.iter().map(|&i| draws[i].row).collect();
        rows.sort_unstable();
        rows.dedup();
        let whole = self.whole_rows(comm, logits, &rows)?;
        let place = |row: usize| rows.binary_search(&row).expect("the row of a draw");
        let asked: Vec<Draw<'_>> = filtered.iter().map(|&i| Draw { row: place(draws[i].row), ..draws[i] }).collect();
        let mut drawn = cut::draw(&whole, &asked);
        let logit = |(draw, drawn): (&Draw<'_>, &Drawn)| whole.double_value(&[draw.row as i64, i64::from(drawn.token)]);
        let of_tokens: Vec<f64> = asked.iter().zip(&drawn).map(logit).collect();
        let at: Vec<i64> = filtered.iter().map(|&i| i as i64).collect();
        let contenders = all.index_select(1, &Tensor::from_slice(&at).to_device(all.device()));
        let logprobs = cut::logprobs(&contenders, logits.kind(), &of_tokens);
        drawn.iter_mut().zip(logprobs).for_each(|(drawn, logprob)| drawn.logprob = logprob);
        Ok(drawn)
    }

    /// Rows `[rows, V]` of the whole logits from each rank's `[R, V_l]`.
    fn whole_rows(&self, comm: &Communicator, logits: &Tensor, rows: &[usize]) -> Result<Tensor, RolloutError> {
        let at: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let own = logits.index_select(0, &Tensor::from_slice(&at).to_device(logits.device()));
        let counts: Vec<usize> = self.ids.iter().map(|ids| rows.len() * (ids.end - ids.start) as usize).collect();
        let all = Tensor::empty([counts.iter().sum::<usize>() as i64], (logits.kind(), logits.device()));
        comm.all_gather_into(&all, &own, &counts)?;
        let sizes: Vec<i64> = counts.iter().map(|&n| n as i64).collect();
        let parts: Vec<Tensor> =
            all.split_with_sizes(sizes, 0).iter().map(|part| part.view([rows.len() as i64, -1])).collect();
        Ok(Tensor::cat(&parts, 1).contiguous())
    }
}

/// First and last layer, first and last id, attention heads.
fn part_of(model: &Model) -> [i64; 5] {
    let (layers, ids) = (model.layers(), model.ids());
    let heads = if layers.is_empty() { 0 } else { num_heads(&model.block_shape(layers.start).spec().mixer) };
    [layers.start as i64, layers.end as i64, ids.start, ids.end, heads as i64]
}

fn num_heads(mixer: &MixerSpec) -> usize {
    let MixerSpec::Attention(attention) = mixer;
    attention.num_heads
}

/// Fails where the parts are not those of the model's width, in order, each of the whole depth.
fn check(parts: &[[i64; 5]], model: &Model) -> Result<(), RolloutError> {
    let spec = model.spec();
    let (depth, vocabulary) = (spec.blocks.len() as i64, spec.vocab_size as i64);
    let deep = parts.iter().all(|part| part[..2] == [0, depth]);
    let ids_follow = parts.windows(2).all(|pair| pair[0][3] == pair[1][2])
        && parts.first().is_some_and(|part| part[2] == 0)
        && parts.last().is_some_and(|part| part[3] == vocabulary);
    let heads = spec.blocks.first().map_or(0, |block| num_heads(&block.mixer)) as i64;
    if deep && ids_follow && parts.iter().map(|part| part[4]).sum::<i64>() == heads {
        return Ok(());
    }
    let said: Vec<String> = parts
        .iter()
        .map(|[first, end, id, last, heads]| format!("layers {first}..{end}, ids {id}..{last}, {heads} heads"))
        .collect();
    Err(RolloutError::Model(format!(
        "its ranks hold [{}] of {depth} layers, {vocabulary} ids and {heads} heads; generation wants every layer on each \
         rank, and the width whole over the ranks of its group",
        said.join("; ")
    )))
}
