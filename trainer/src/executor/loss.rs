//! The end of the model under cross-entropy alone: final norm, head and loss, with the head whole or its ids cut over tensor
//! ranks. What else can be made of the head's output lies in [`super::head`].
//!
//! With cut ids, hidden states are gathered over tensor ranks, each chunk's softmax is put together from three numbers per
//! token and rank (maximum, sum of exponentials, the target's logit), and the hidden states' gradients are summed back.

use super::{Executor, LOSS_CHUNK_TOKENS};
use crate::error::Result;
use crate::micro_batch::{MicroBatch, Work};
use tangelo_core::Group;
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::op::cross_entropy::vocab_parallel as cut;
use tangelo_kernels::{autograd, op};
use tch::{Kind, Tensor};

impl Executor<'_> {
    /// Adds the micro-batch's loss, and where training makes the gradients of head and norm and of the residual stream.
    pub(super) fn loss(&mut self, micro_batch: usize, train: bool) -> Result<()> {
        let mut lane = self.lanes.remove(&micro_batch).expect("a micro-batch under way");
        let input = lane.x().detach().set_requires_grad(train);
        let normed = if train {
            tch::with_grad(|| self.model.final_norm(&input))
        } else {
            tch::no_grad(|| self.model.final_norm(&input))
        };
        let gradient = match self.model.head().is_scalar() {
            true => self.scalar_head(&normed.detach(), &lane.batch, train)?,
            false => {
                let hidden = self.exchanger.gather_sequence(normed.detach(), lane.layout())?;
                let gradient = self.vocabulary_head(&hidden, &lane.batch, train)?;
                gradient.map(|g| self.exchanger.scatter_sequence(g, lane.layout())).transpose()?
            }
        };
        if let Some(gradient) = gradient {
            autograd::backward(&[&normed], &[&gradient]);
            lane.set_x_gradient(input.grad());
            self.lanes.insert(micro_batch, lane);
        }
        Ok(())
    }

    fn vocabulary_head(&mut self, hidden: &Tensor, batch: &MicroBatch, train: bool) -> Result<Option<Tensor>> {
        let Work::CrossEntropy { .. } = &*self.rows.work else {
            return self.distribution_head(hidden, batch, train);
        };
        let (loss_sum, gradient) = match self.groups.get(Group::Tensor) {
            Some(comm) => self.cut_head(comm, hidden, batch, train)?,
            None => self.whole_head(hidden, batch, train),
        };
        self.stats.loss_sum += loss_sum;
        Ok(gradient)
    }

    fn whole_head(&self, hidden: &Tensor, batch: &MicroBatch, train: bool) -> (f64, Option<Tensor>) {
        let head = &self.model.head().weight;
        let (targets, weights) = (&batch.targets, &batch.weights);
        if !train {
            let sum = op::cross_entropy_loss(hidden, &head.value, targets, weights, LOSS_CHUNK_TOKENS);
            return (sum.double_value(&[]), None);
        }
        let loss = op::cross_entropy_chunked(
            hidden,
            &head.value,
            targets,
            weights,
            self.scale,
            head.grad(),
            LOSS_CHUNK_TOKENS,
        );
        (loss.loss_sum.double_value(&[]), Some(loss.dhidden))
    }

    /// The loss counts on the first tensor rank only: all of them find the same.
    fn cut_head(
        &self,
        comm: &Communicator,
        hidden: &Tensor,
        batch: &MicroBatch,
        train: bool,
    ) -> Result<(f64, Option<Tensor>)> {
        let head = &self.model.head().weight;
        let start = self.model.ids().start;
        let tokens = hidden.size()[0];
        let gradient = train.then(|| hidden.empty_like());
        let mut loss_sum = 0.0;
        for at in (0..tokens).step_by(LOSS_CHUNK_TOKENS as usize) {
            let n = LOSS_CHUNK_TOKENS.min(tokens - at);
            let [rows, targets, weights] = [hidden, &batch.targets, &batch.weights].map(|t| t.narrow(0, at, n));
            let chunk = tch::no_grad(|| cut::local_logits(&rows, &head.value, &targets, start));
            let all = comm.all_gather(&chunk.stats)?.view([comm.size() as i64, n, 3]);
            let (lse, target_logit) = tch::no_grad(|| cut::merge_stats(&all));
            let losses = lse.to_kind(Kind::Double) - target_logit.to_kind(Kind::Double);
            // A target of weight 0 may be no id at all, and its loss infinite.
            let weighted = (losses * weights.to_kind(Kind::Double)).masked_fill(&weights.eq(0.0), 0.0);
            loss_sum += weighted.sum(Kind::Double).double_value(&[]);
            if let Some(gradient) = &gradient {
                let scales = &weights * self.scale;
                let part = tch::no_grad(|| {
                    cut::chunk_gradients(chunk, &rows, &head.value, &targets, start, &lse, &scales, head.grad())
                });
                tch::no_grad(|| gradient.narrow(0, at, n).copy_(&part));
            }
        }
        Ok((if comm.rank() == 0 { loss_sum } else { 0.0 }, gradient))
    }
}
