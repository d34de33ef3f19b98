//! The end of the model where the loss is a sum of components, or where there is none: log-probabilities and entropies from
//! a head over the vocabulary, values from a scalar one.
//!
//! The head over the vocabulary works in chunks of the tokens that count: their logits, what these say (put together from
//! four numbers a token and rank where ids are cut), the loss's slopes token by token, gradients. A scalar head computes with
//! this rank's own tokens and exchanges nothing.
//!
//! Invariant: what is predicted without a loss has the same bits as what the loss of the same tokens reads.

use super::{Executor, LOSS_CHUNK_TOKENS};
use crate::error::Result;
use crate::micro_batch::{FILLER, MicroBatch, Work};
use tangelo_core::Group;
use tangelo_core::loss::Reads;
use tangelo_core::loss::objective::{Prediction, Slopes};
use tangelo_kernels::op::distribution::{self, HeadRows, TokenStats};
use tch::{Kind, Tensor};

impl Executor<'_> {
    /// Loss and gradient of `hidden [T, D]`, all tokens of this rank's tensor group; or predictions.
    pub(super) fn distribution_head(
        &mut self,
        hidden: &Tensor,
        batch: &MicroBatch,
        train: bool,
    ) -> Result<Option<Tensor>> {
        let temperature = match &*self.rows.work {
            Work::Objective { objective, reads: Reads::Distribution } => objective.temperature(),
            Work::Predict { temperature, .. } => *temperature,
            other => unreachable!("a head over the vocabulary was asked for {other:?}"),
        };
        let work = &self.rows.work;
        let counted: Vec<usize> =
            (0..batch.own.len()).filter(|&t| batch.own[t] != FILLER && work.counts_token(batch.own[t])).collect();
        let gradient = train.then(|| hidden.zeros_like());
        let mut found = vec![Prediction::default(); batch.own.len()];
        for tokens in counted.chunks(LOSS_CHUNK_TOKENS as usize) {
            let at: Vec<i64> = tokens.iter().map(|&t| t as i64).collect();
            let at = Tensor::from_slice(&at).to_device(hidden.device());
            let [rows, targets] = [hidden, &batch.targets].map(|t| t.index_select(0, &at));
            let head = self.head_rows(train);
            let chunk = distribution::chunk(&rows, head, &targets, temperature);
            let stats = self.merge_chunk(&chunk.stats)?;
            let said = |s: &TokenStats| Prediction { logprob: s.logprob, entropy: s.entropy, value: 0.0 };
            let predictions: Vec<Prediction> = stats.iter().map(said).collect();
            tokens.iter().zip(&predictions).for_each(|(&t, &prediction)| found[t] = prediction);
            let slopes = self.slopes(tokens, &predictions, batch, self.counts_loss());
            if let Some(gradient) = &gradient {
                let slopes: Vec<[f64; 2]> = slopes.iter().map(|s| [s.logprob, s.entropy]).collect();
                let head = self.head_rows(train);
                let part = distribution::gradients(chunk, &rows, head, &targets, temperature, &stats, &slopes);
                let _ = tch::no_grad(|| gradient.shallow_clone().index_copy_(0, &at, &part));
            }
        }
        self.keep(found);
        Ok(gradient)
    }

    fn head_rows(&self, train: bool) -> HeadRows<'_> {
        let weight = &self.model.head().weight;
        HeadRows { weight: &weight.value, start: self.model.ids().start, main_grad: weight.grad().filter(|_| train) }
    }

    fn merge_chunk(&self, stats: &Tensor) -> Result<Vec<TokenStats>> {
        let tokens = stats.size()[0];
        let all = match self.groups.get(Group::Tensor) {
            Some(comm) => comm.all_gather(stats)?.view([comm.size() as i64, tokens, 4]),
            None => stats.unsqueeze(0),
        };
        Ok(distribution::merge(&all))
    }

    /// Tensor ranks that see the same tokens find the same loss: the first counts it.
    fn counts_loss(&self) -> bool {
        self.groups.get(Group::Tensor).is_none_or(|comm| comm.rank() == 0)
    }

    /// Slopes of the loss at `tokens` of the micro-batch; adds their part of the loss where this rank counts it. Without a
    /// loss there are none.
    fn slopes(
        &mut self,
        tokens: &[usize],
        predictions: &[Prediction],
        batch: &MicroBatch,
        counts_loss: bool,
    ) -> Vec<Slopes> {
        let Work::Objective { objective, .. } = &*self.rows.work else { return Vec::new() };
        let mut sums = if counts_loss { std::mem::take(&mut self.sums) } else { objective.no_sums() };
        let one = |(&t, &found): (&usize, &Prediction)| objective.add(batch.own[t], found, &self.scales, &mut sums);
        let slopes = tokens.iter().zip(predictions).map(one).collect();
        if counts_loss {
            self.sums = sums;
        }
        slopes
    }

    fn keep(&mut self, found: Vec<Prediction>) {
        if matches!(*self.rows.work, Work::Predict { .. }) {
            self.stats.predictions = found;
        }
    }

    /// Loss and gradient of this rank's own normed tokens, `[t, D]`; or predictions, of all tokens of its tensor group.
    pub(super) fn scalar_head(&mut self, normed: &Tensor, batch: &MicroBatch, train: bool) -> Result<Option<Tensor>> {
        match &*self.rows.work {
            Work::Objective { reads: Reads::Value, .. } | Work::Predict { .. } => {}
            other => unreachable!("a scalar head was asked for {other:?}"),
        }
        let values = tch::no_grad(|| self.model.head().values(normed));
        if let Work::Predict { .. } = &*self.rows.work {
            let all = self.exchanger.gather_sequence(values.unsqueeze(1), batch.layout)?;
            self.keep(numbers(&all).into_iter().map(of_value).collect());
            return Ok(None);
        }
        let own = self.exchanger.own_range(batch.layout);
        let predictions: Vec<Prediction> = numbers(&values).into_iter().map(of_value).collect();
        let counts = |t: &usize| batch.own[*t] != FILLER && self.rows.work.counts_token(batch.own[*t]);
        let tokens: Vec<usize> = own.clone().filter(counts).collect();
        let said: Vec<Prediction> = tokens.iter().map(|&t| predictions[t - own.start]).collect();
        let mut slopes = vec![0.0; own.len()];
        for (&t, slope) in tokens.iter().zip(self.slopes(&tokens, &said, batch, true)) {
            slopes[t - own.start] = slope.value;
        }
        Ok(train.then(|| {
            let dvalues = Tensor::from_slice(&slopes).to_kind(values.kind()).to_device(values.device());
            tch::no_grad(|| self.model.head().scalar_backward(normed, &dvalues))
        }))
    }
}

fn of_value(value: f64) -> Prediction {
    Prediction { value, ..Prediction::default() }
}

fn numbers(values: &Tensor) -> Vec<f64> {
    let flat = values.to_device(tch::Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
    Vec::<f64>::try_from(flat).expect("a flat f64 tensor")
}
