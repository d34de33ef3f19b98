//! Attention of this rank's queries over the keys and values of all ranks of the ring.
//!
//! ```text
//!   rotate:  step i: give the keys of rank (r - i) to r + 1 and take those of r - i - 1 from r - 1, while attending to
//!            the former; backward: keys go round once more, their gradients one step behind: what arrives is added to
//!            what was computed meanwhile
//!   gather:  all keys at once; backward gathers again and reduces their gradients to their owners
//! ```
//!
//! Partial results are merged in fp32 by their log-sum-exp, gradients are added in fp32. Which keys a query sees is a
//! function of the ranges of the pack that both ranks hold, and of where documents begin.

use super::Executor;
use super::lane::Lane;
use crate::error::Result;
use crate::groups::Arriving;
use crate::store::gradient_kind;
use tangelo_configs::job::RotateMethod;
use tangelo_core::sequence::visible_keys;
use tangelo_core::{Group, SequenceLayout};
use tangelo_kernels::comm::Background;
use tangelo_kernels::op::attention::spans::{Running, Span, attend, attend_backward};
use tch::{Kind, Tensor};

/// What backward needs.
pub struct RingRecord {
    q: Tensor,
    /// `[2, tokens, K, head_dim]`: keys, then values.
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
}

/// The ring, and how attention weighs.
struct Ring<'a> {
    comm: &'a Background,
    layout: SequenceLayout,
    borders: Vec<i64>,
    scale: f64,
    window: Option<i64>,
}

impl Ring<'_> {
    fn size(&self) -> usize {
        self.comm.size()
    }

    /// The rank whose keys are here after `step` turns.
    fn source(&self, step: usize) -> usize {
        (self.comm.rank() + self.size() - step) % self.size()
    }

    /// Which of this rank's queries see which keys of `source`.
    fn spans(&self, source: usize) -> Vec<Span> {
        let (queries, keys) = (self.layout.ring_ranges(self.comm.rank()), self.layout.ring_ranges(source));
        let span = |v: tangelo_core::sequence::VisibleKeys| Span {
            queries: v.queries.start as i64..v.queries.end as i64,
            keys: v.keys.start as i64..v.keys.end as i64,
            offset: v.offset,
        };
        visible_keys(&queries, &keys, &self.borders).into_iter().map(span).collect()
    }

    /// Room for what belongs to `source`.
    fn room(&self, like: &Tensor, source: usize, kind: Kind) -> Tensor {
        let mut shape = like.size();
        shape[1] = self.layout.ring_len(source) as i64;
        Tensor::empty(shape.as_slice(), (kind, like.device()))
    }

    /// Gives `kv`, which must stay as it is, to the next rank and takes what belongs to `source` from the one before.
    fn turn(&self, kv: &Tensor, source: usize) -> Arriving {
        let tensor = self.room(kv, source, kv.kind());
        let (rank, size) = (self.comm.rank(), self.size());
        let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
        let pending = self.comm.start_shift(kv.shallow_clone(), to, tensor.shallow_clone(), from);
        Arriving { tensor, pending }
    }

    /// The turn after `step`, where there is one.
    fn next(&self, here: &Tensor, step: usize) -> Option<Arriving> {
        (step + 1 < self.size()).then(|| self.turn(here, self.source(step + 1)))
    }

    fn attend(&self, q: &Tensor, kv: &Tensor, source: usize, running: &mut Running) {
        attend(q, &kv.get(0), &kv.get(1), &self.spans(source), self.scale, self.window, running);
    }

    /// Elements that each rank keeps of keys and values.
    fn counts(&self, kv: &Tensor) -> Vec<usize> {
        let shape = kv.size();
        let per_token = (shape[0] * shape[2] * shape[3]) as usize;
        (0..self.size()).map(|rank| self.layout.ring_len(rank) * per_token).collect()
    }

    /// Every rank's keys and values, in rank order.
    fn gather(&self, kv: &Tensor) -> Result<Vec<Tensor>> {
        let counts = self.counts(kv);
        let all = Tensor::empty([counts.iter().sum::<usize>() as i64], (kv.kind(), kv.device()));
        self.comm.start_all_gather_into(all.shallow_clone(), kv.shallow_clone(), counts.clone()).wait()?;
        Ok(self.parts(&all, kv))
    }

    /// Every rank's part of what lies end to end in rank order, shaped like this rank's `kv`.
    fn parts(&self, all: &Tensor, kv: &Tensor) -> Vec<Tensor> {
        let (counts, mut at) = (self.counts(kv), 0);
        let part = |(rank, count): (usize, usize)| {
            let mut shape = kv.size();
            shape[1] = self.layout.ring_len(rank) as i64;
            let view = all.narrow(0, at, count as i64).view(shape.as_slice());
            at += count as i64;
            view
        };
        counts.into_iter().enumerate().map(part).collect()
    }

    // ---- forward ---------------------------------------------------------------------------------------------------

    fn forward(&self, method: RotateMethod, q: &Tensor, kv: &Tensor) -> Result<Running> {
        let mut running = Running::new(q);
        match method {
            RotateMethod::Allgather => {
                for (source, kv) in self.gather(kv)?.iter().enumerate() {
                    self.attend(q, kv, source, &mut running);
                }
            }
            RotateMethod::Ring => {
                let mut here = kv.shallow_clone();
                for step in 0..self.size() {
                    let next = self.next(&here, step);
                    self.attend(q, &here, self.source(step), &mut running);
                    if let Some(next) = next {
                        here = next.wait()?;
                    }
                }
            }
        }
        Ok(running)
    }

    // ---- backward --------------------------------------------------------------------------------------------------

    /// Adds the gradients of the queries and of one rank's keys and values.
    fn back(&self, r: &RingRecord, dout: &Tensor, kv: &Tensor, source: usize, dq: &Tensor, dkv: &Tensor) {
        let (k, v, dk, dv) = (kv.get(0), kv.get(1), dkv.get(0), dkv.get(1));
        let spans = self.spans(source);
        attend_backward(&r.q, &k, &v, &r.out, dout, &r.lse, &spans, self.scale, self.window, dq, &dk, &dv);
    }

    /// Gradients of this rank's queries and of its keys and values.
    fn backward(&self, method: RotateMethod, record: &RingRecord, dout: &Tensor, wide: Kind) -> Result<[Tensor; 2]> {
        let dq = Tensor::zeros(record.q.size(), (wide, record.q.device()));
        let dkv = match method {
            RotateMethod::Allgather => self.backward_gathered(record, dout, &dq, wide)?,
            RotateMethod::Ring => self.backward_rotating(record, dout, &dq, wide)?,
        };
        Ok([dq, dkv])
    }

    fn backward_gathered(&self, record: &RingRecord, dout: &Tensor, dq: &Tensor, wide: Kind) -> Result<Tensor> {
        let (kv, counts) = (self.gather(&record.kv)?, self.counts(&record.kv));
        let all = Tensor::zeros([counts.iter().sum::<usize>() as i64], (wide, dq.device()));
        for (source, (kv, dkv)) in kv.iter().zip(self.parts(&all, &record.kv)).enumerate() {
            self.back(record, dout, kv, source, dq, &dkv);
        }
        let own = Tensor::zeros(record.kv.size(), (wide, record.kv.device()));
        self.comm.start_reduce_scatter(own.shallow_clone(), all, counts).wait()?;
        Ok(own)
    }

    fn backward_rotating(&self, record: &RingRecord, dout: &Tensor, dq: &Tensor, wide: Kind) -> Result<Tensor> {
        let own = Tensor::zeros(record.kv.size(), (wide, record.kv.device()));
        let mut next = self.next(&record.kv, 0);
        self.back(record, dout, &record.kv, self.source(0), dq, &own);
        // The gradient of what is here, from the ranks that it came by.
        let mut passed: Option<Arriving> = None;
        for step in 1..self.size() {
            let here = next.take().expect("a turn for each step").wait()?;
            next = self.next(&here, step);
            let mut gradient = self.room(&here, self.source(step), wide).zero_();
            self.back(record, dout, &here, self.source(step), dq, &gradient);
            if let Some(passed) = passed.take() {
                gradient += passed.wait()?;
            }
            // It follows the keys one step behind; after the last step the next rank is its owner.
            passed = Some(self.turn(&gradient, self.source(step + 1)));
        }
        match passed {
            Some(passed) => Ok(own + passed.wait()?),
            None => Ok(own),
        }
    }
}

impl Executor<'_> {
    fn ring_of<'a>(&'a self, lane: &Lane, layer: usize) -> Ring<'a> {
        let (scale, window) = self.model.block_shape(layer).attention_scale();
        let comm = self.groups.beside(Group::Ring).expect("ring attention needs a ring");
        Ring { comm, layout: lane.layout(), borders: lane.batch.pack.cu_seqlens.clone(), scale, window }
    }

    /// `[q, k, v]` becomes `[o]`.
    pub(super) fn ring(&mut self, layer: usize, micro_batch: usize, keep: bool) -> Result<()> {
        let mut lane = self.lanes.remove(&micro_batch).expect("a micro-batch under way");
        let work = std::mem::take(lane.side(tangelo_core::Pass::Forward));
        let [q, k, v] = work.as_slice() else { unreachable!("attention reads queries, keys and values") };
        let kv = Tensor::stack(&[k, v], 0);
        let running = tch::no_grad(|| self.ring_of(&lane, layer).forward(self.rows.rotate_method(), q, &kv))?;
        let out = running.out.to_kind(q.kind());
        *lane.side(tangelo_core::Pass::Forward) = vec![out.shallow_clone()];
        if keep {
            lane.keep_ring(RingRecord { q: q.contiguous(), kv, out, lse: running.lse });
        }
        self.lanes.insert(micro_batch, lane);
        Ok(())
    }

    /// The gradient of `[o]` becomes those of `[q, k, v]`.
    pub(super) fn ring_backward(&mut self, layer: usize, micro_batch: usize) -> Result<()> {
        let mut lane = self.lanes.remove(&micro_batch).expect("a micro-batch under way");
        let record = lane.take_ring();
        let gradients = std::mem::take(lane.side(tangelo_core::Pass::Backward));
        let [dout] = gradients.as_slice() else { unreachable!("attention has one output") };
        let (dout, kind) = (dout.contiguous(), record.q.kind());
        let ring = self.ring_of(&lane, layer);
        let wide = gradient_kind(self.model);
        let [dq, dkv] = tch::no_grad(|| ring.backward(self.rows.rotate_method(), &record, &dout, wide))?;
        *lane.side(tangelo_core::Pass::Backward) = [dq, dkv.get(0), dkv.get(1)].map(|g| g.to_kind(kind)).into();
        self.lanes.insert(micro_batch, lane);
        Ok(())
    }
}
