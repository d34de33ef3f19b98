//! One micro-batch under way: its values, their gradients, and the graphs that lead from the one to the other.

use super::ring::RingRecord;
use crate::micro_batch::MicroBatch;
use tangelo_core::{Parts, Pass, SequenceLayout};
use tangelo_kernels::autograd;
use tangelo_models::model::BlockAngles;
use tangelo_models::{Flow, Model};
use tch::Tensor;

/// Inputs and outputs of a local graph.
struct Segment {
    x_in: Tensor,
    work_in: Vec<Tensor>,
    /// `None` where the residual stream passed untouched.
    x_out: Option<Tensor>,
    work_out: Vec<Tensor>,
}

/// What is kept for backward.
enum Kept {
    Segment(Segment),
    Ring(RingRecord),
}

/// A micro-batch between its first instruction and its last.
pub struct Lane {
    /// Its rows.
    pub batch: MicroBatch,
    angles: BlockAngles,
    x: Tensor,
    work: Vec<Tensor>,
    x_gradient: Option<Tensor>,
    work_gradients: Vec<Tensor>,
    tape: Vec<Kept>,
    stash: Vec<Tensor>,
}

impl Lane {
    /// A micro-batch whose residual stream begins as `x`.
    pub fn new(model: &Model, batch: MicroBatch, x: Tensor) -> Lane {
        Lane {
            angles: model.angles(&batch.pack.positions),
            batch,
            x,
            work: Vec::new(),
            x_gradient: None,
            work_gradients: Vec::new(),
            tape: Vec::new(),
            stash: Vec::new(),
        }
    }

    /// How its tokens are cut.
    pub fn layout(&self) -> SequenceLayout {
        self.batch.layout
    }

    /// The residual stream.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// Its gradient.
    pub fn x_gradient(&self) -> Tensor {
        self.x_gradient.as_ref().expect("the gradient comes from the loss or the next stage").shallow_clone()
    }

    /// Begins the way back.
    pub fn set_x_gradient(&mut self, gradient: Tensor) {
        self.x_gradient = Some(gradient);
    }

    /// What is being worked on, or its gradients.
    pub fn side(&mut self, pass: Pass) -> &mut Vec<Tensor> {
        match pass {
            Pass::Forward => &mut self.work,
            Pass::Backward => &mut self.work_gradients,
        }
    }

    /// Keeps the residual stream to begin again from.
    pub fn stash(&mut self) {
        self.stash.push(self.x.shallow_clone());
    }

    /// Begins again from what was kept last.
    pub fn restore(&mut self) {
        self.x = self.stash.pop().expect("what is restored was stashed");
        self.work.clear();
    }

    /// Runs parts of a block on the current values.
    pub fn run(&mut self, model: &Model, layer: usize, parts: Parts, keep: bool) {
        let work = std::mem::take(&mut self.work);
        if !keep {
            let flow = Flow { x: self.x.shallow_clone(), work };
            let flow = tch::no_grad(|| model.block_parts(layer, parts, flow, &self.batch.pack, &self.angles));
            (self.x, self.work) = (flow.x, flow.work);
            return;
        }
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
        let (x_in, work_in) = (leaf(&self.x), work.iter().map(leaf).collect::<Vec<_>>());
        let flow = Flow { x: x_in.shallow_clone(), work: work_in.iter().map(Tensor::shallow_clone).collect() };
        let flow = tch::with_grad(|| model.block_parts(layer, parts, flow, &self.batch.pack, &self.angles));
        self.x = flow.x.detach();
        self.work = flow.work.iter().map(Tensor::detach).collect();
        // The graph goes back from these; their values leave with the exchange that follows.
        let work_out: Vec<Tensor> = flow.work.into_iter().map(without_values).collect();
        let passed = flow.x.is_leaf();
        let x_out = (!passed).then_some(flow.x);
        self.tape.push(Kept::Segment(Segment { x_in, work_in, x_out, work_out }));
    }

    /// Goes back through the graph kept last.
    pub fn back(&mut self) {
        let Some(Kept::Segment(segment)) = self.tape.pop() else { unreachable!("a graph was kept here") };
        let passing = self.x_gradient();
        let work_gradients = std::mem::take(&mut self.work_gradients);
        let mut outputs: Vec<&Tensor> = segment.work_out.iter().collect();
        let mut gradients: Vec<&Tensor> = work_gradients.iter().collect();
        if let Some(x) = &segment.x_out {
            outputs.push(x);
            gradients.push(&passing);
        }
        autograd::backward(&outputs, &gradients);
        let own = segment.x_in.grad();
        self.x_gradient = Some(match (&segment.x_out, own.defined()) {
            (Some(_), true) => own,
            (Some(_), false) => unreachable!("the residual stream reads its own input"),
            (None, true) => passing + own,
            (None, false) => passing,
        });
        self.work_gradients = segment.work_in.iter().map(Tensor::grad).collect();
    }

    /// Goes back through `x + w`.
    pub fn back_residual(&mut self) {
        // What would have been summed and added is read by nobody.
        self.work.clear();
        self.work_gradients = vec![self.x_gradient()];
    }

    /// Keeps what ring attention needs to go back.
    pub fn keep_ring(&mut self, record: RingRecord) {
        self.tape.push(Kept::Ring(record));
    }

    /// What ring attention kept last.
    pub fn take_ring(&mut self) -> RingRecord {
        match self.tape.pop() {
            Some(Kept::Ring(record)) => record,
            _ => unreachable!("ring attention was kept here"),
        }
    }
}

/// The output of a graph, as a place to go back from, without the memory of its values.
fn without_values(mut output: Tensor) -> Tensor {
    let empty = Tensor::empty([0], (output.kind(), output.device()));
    output.set_data(&empty);
    output
}
