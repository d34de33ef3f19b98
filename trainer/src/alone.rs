//! A whole model on one device, without an optimizer: forward and backward through the same interpreter as in a job, for
//! checks against other implementations.

use crate::buckets::Buckets;
use crate::error::Result;
use crate::executor::{Executor, Parts};
use crate::groups::Groups;
use crate::micro_batch::{MicroBatches, Reader, Rows, Work};
use crate::store::WeightStore;
use tangelo_configs::Sharding;
use tangelo_configs::job::RotateMethod;
use tangelo_core::{Batch, LossSpec, Program, Topology};
use tangelo_kernels::comm::Communicator;
use tangelo_models::Model;
use tch::Tensor;

/// A model and what its executor needs.
pub struct Alone {
    model: Model,
    store: WeightStore,
    groups: Groups,
    topology: Topology,
}

impl Alone {
    /// Takes a whole, trained model.
    pub fn new(model: Model) -> Result<Alone> {
        let store = WeightStore::new(&model, &Sharding::single(model.spec()), 0, true);
        let topology = Topology::single();
        let groups = Groups::open(Communicator::single_on(model.device()), &topology)?;
        Ok(Alone { model, store, groups, topology })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The next-token loss of all rows of a batch, as one micro-batch; its gradients are added. `again` marks the blocks
    /// that run again in backward.
    pub fn forward_backward(&self, batch: &Batch, again: &[bool]) -> Result<f64> {
        let buckets = Buckets::default();
        let parts = Parts { model: &self.model, store: &self.store, buckets: &buckets, groups: &self.groups };
        let rows = self.rows(batch)?;
        Ok(Executor::new(parts, &rows, false).run(&Program::alone(again))?.shared[0])
    }

    /// The logits of every token, `[T, V]`.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        Ok(self.model.logits(&self.rows(batch)?.micro_batch(0)?.pack))
    }

    fn rows(&self, batch: &Batch) -> Result<Rows<'_>> {
        let reader = Reader {
            topology: &self.topology,
            rank: 0,
            rotate_method: RotateMethod::default(),
            vocab_size: self.model.spec().vocab_size,
            device: self.model.device(),
            share_prompts: false,
        };
        let rows = Rows::new(batch, Work::of(&LossSpec::next_token(), batch)?, reader)?;
        Ok(rows.cut(MicroBatches::Rows(batch.num_sequences()), 1))
    }
}
