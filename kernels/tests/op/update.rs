//! AdamW and the reductions.

use tangelo_kernels::op::{self, AdamW, AdamWState, DecaySegment, adamw, reduce};
use tch::{Device, Kind, Tensor};

use crate::common::*;

const OPTIONS: AdamW = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, grad_scale: 0.7 };

struct Buffers {
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    copy: Tensor,
}

impl Buffers {
    fn random(length: i64) -> Buffers {
        let fresh = || random(&[length], Kind::Float);
        let copy = Tensor::zeros([length], (Kind::BFloat16, Device::Cpu));
        Buffers { master: fresh(), exp_avg: fresh() * 0.1, exp_avg_sq: fresh().square(), grad: fresh(), copy }
    }

    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Buffers {
        Buffers {
            master: change(&self.master),
            exp_avg: change(&self.exp_avg),
            exp_avg_sq: change(&self.exp_avg_sq),
            grad: change(&self.grad),
            copy: change(&self.copy),
        }
    }

    fn state(&self) -> AdamWState<'_> {
        AdamWState {
            master: &self.master,
            exp_avg: &self.exp_avg,
            exp_avg_sq: &self.exp_avg_sq,
            grad: &self.grad,
            model_copy: Some(&self.copy),
        }
    }
}

fn segments(length: usize, cut: usize) -> [DecaySegment; 2] {
    [DecaySegment { range: 0..cut, weight_decay: 0.1 }, DecaySegment { range: cut..length, weight_decay: 0.0 }]
}

#[test]
fn adamw_matches_float64() {
    let ours = Buffers::random(1003);
    let exact = ours.map(|x| x.to_kind(Kind::Double));
    for segment in segments(1003, 400) {
        adamw::reference::adamw_segment(exact.state(), &segment, &OPTIONS);
    }
    op::adamw_step(ours.state(), &segments(1003, 400), &OPTIONS);
    assert_close("master", &ours.master, &exact.master, 1e-6);
    assert_close("exp_avg", &ours.exp_avg, &exact.exp_avg, 1e-6);
    assert_close("exp_avg_sq", &ours.exp_avg_sq, &exact.exp_avg_sq, 1e-6);
    assert_same_bits("the model's copy", &ours.copy, &ours.master.to_kind(Kind::BFloat16));
}

#[test]
fn adamw_bits_do_not_depend_on_shards_or_threads() {
    let whole = Buffers::random(100_003);
    let parts = whole.map(Tensor::copy);
    op::adamw_step(whole.state(), &segments(100_003, 77), &OPTIONS);
    tch::set_num_threads(2);
    let mut start = 0;
    for length in [5i64, 72, 33_333, 1, 66_592] {
        let shard = parts.map(|x| x.narrow(0, start, length));
        let weight_decay = if start < 77 { 0.1 } else { 0.0 };
        op::adamw_step(shard.state(), &[DecaySegment { range: 0..length as usize, weight_decay }], &OPTIONS);
        start += length;
    }
    assert_eq!(start, 100_003);
    assert_same_bits("master", &whole.master, &parts.master);
    assert_same_bits("exp_avg", &whole.exp_avg, &parts.exp_avg);
    assert_same_bits("exp_avg_sq", &whole.exp_avg_sq, &parts.exp_avg_sq);
    assert_same_bits("copy", &whole.copy, &parts.copy);
}

#[test]
fn square_sums_are_exact_and_thread_independent() {
    let flat = random(&[10_007], Kind::Float);
    let (one, two) = with_one_and_two_threads(|| op::chunk_square_sums(&flat, 512));
    assert_eq!(one.len(), 20);
    assert_eq!(one, two, "the same bits with one thread and two");
    for (ours, exact) in one.iter().zip(reduce::reference::chunk_square_sums(&flat, 512)) {
        // Both in float64 over 512 terms.
        assert!((ours - exact).abs() <= 1e-13 * exact, "{ours} {exact}");
    }
    // A rank that holds chunks 3 to 7 finds the same values.
    let shard = op::chunk_square_sums(&flat.narrow(0, 3 * 512, 4 * 512), 512);
    assert_eq!(shard, one[3..7]);
}
