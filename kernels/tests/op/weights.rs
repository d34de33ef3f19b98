//! Linear, embedding and RMSNorm: the operators with main gradients.

use tangelo_kernels::autograd;
use tangelo_kernels::op::{self, embedding, linear, rms_norm};
use tch::{Device, Kind, Tensor};

use crate::common::*;

fn main_grad(like: &Tensor) -> Tensor {
    let kind = if like.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    Tensor::zeros(like.size(), (kind, Device::Cpu))
}

fn check_linear(kind: Kind, tolerance: f64, tokens: i64, inputs: i64, outputs: i64, with_bias: bool) {
    let (x, w, dy) =
        (random(&[tokens, inputs], kind), random(&[outputs, inputs], kind), random(&[tokens, outputs], kind));
    let bias = with_bias.then(|| random(&[outputs], kind));
    let (wide_x, wide_w) = (double_leaf(&x), double_leaf(&w));
    let wide_bias = bias.as_ref().map(double_leaf);
    let expected = linear::reference::linear(&wide_x, &wide_w, wide_bias.as_ref());
    autograd::backward(&[&expected], &[&dy.to_kind(Kind::Double)]);

    let x = leaf(&x);
    let (w_grad, bias_grad) = (main_grad(&w), bias.as_ref().map(main_grad));
    let got = op::linear(&x, &w, bias.as_ref(), Some(&w_grad), bias_grad.as_ref());
    assert_close("y", &got, &expected, tolerance);
    autograd::backward(&[&got], &[&dy]);
    assert_close("dx", &x.grad(), &wide_x.grad(), tolerance);
    assert_close("dw", &w_grad, &wide_w.grad(), tolerance);
    if let (Some(got), Some(expected)) = (bias_grad, wide_bias) {
        assert_close("dbias", &got, &expected.grad(), tolerance);
    }
}

#[test]
fn linear_matches_float64() {
    for (kind, tolerance) in KINDS.into_iter().chain([(Kind::Double, 1e-12)]) {
        check_linear(kind, tolerance, 33, 48, 80, false);
        check_linear(kind, tolerance, 7, 13, 5, true);
        check_linear(kind, tolerance, 1, 64, 32, true);
    }
}

#[test]
fn linear_is_as_exact_as_a_plain_product() {
    let (x, w) = (random(&[64, 576], Kind::Float), random(&[192, 576], Kind::Float));
    let exact = x.to_kind(Kind::Double).linear(&w.to_kind(Kind::Double), None::<&Tensor>);
    let (ours, plain) =
        (error(&op::linear(&x, &w, None, None, None), &exact), error(&x.linear(&w, None::<&Tensor>), &exact));
    assert!(ours <= 2.0 * plain, "relative error {ours:.2e}, plain matmul {plain:.2e}");
}

/// In one piece and in pieces, with a graph and without, with other threads: a row's bits are the same.
fn check_rows(kind: Kind, tolerance: f64, inputs: i64, outputs: i64) {
    let (x, w, bias) = (random(&[600, inputs], kind), random(&[outputs, inputs], kind), random(&[outputs], kind));
    let all = op::linear(&x, &w, Some(&bias), None, None);
    let wide = [&x, &w, &bias].map(|t| t.to_kind(Kind::Double));
    assert_close("all rows", &all, &(wide[0].matmul(&wide[1].tr()) + &wide[2]), tolerance);
    let trained = op::linear(&x, &w, Some(&bias), Some(&main_grad(&w)), Some(&main_grad(&bias)));
    assert_same_bits("with a graph", &trained.detach(), &all);
    let (one, two) = with_one_and_two_threads(|| op::linear(&x, &w, Some(&bias), None, None));
    assert_same_bits("one thread", &one, &all);
    assert_same_bits("two threads", &two, &all);
    // Kernels choose their way by the number of rows.
    let few = (1..=18).map(|rows| (7 * rows, rows));
    for (start, rows) in few.chain([(300, 64), (5, 257)]) {
        let some = op::linear(&x.narrow(0, start, rows), &w, Some(&bias), None, None);
        assert_same_bits("some rows", &some, &all.narrow(0, start, rows));
    }
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    for (kind, tolerance) in KINDS {
        for (inputs, outputs) in [(576, 100), (1536, 64), (13, 7), (1, 1), (512, 16), (515, 200), (64, 1000)] {
            check_rows(kind, tolerance, inputs, outputs);
        }
    }
}

#[test]
fn main_gradients_accumulate_over_backwards() {
    for (kind, tolerance) in KINDS {
        let w = random(&[24, 16], kind);
        let total = main_grad(&w);
        let mut sum = Tensor::zeros(w.size(), (Kind::Double, Device::Cpu));
        for _ in 0..2 {
            let (x, dy) = (random(&[40, 16], kind), random(&[40, 24], kind));
            let y = op::linear(&x, &w, None, Some(&total), None);
            assert!(y.requires_grad(), "a weight gradient needs a node even where x has none");
            autograd::backward(&[&y], &[&dy]);
            sum += dy.to_kind(Kind::Double).tr().matmul(&x.to_kind(Kind::Double));
        }
        assert_close("two backwards", &total, &sum, tolerance);
    }
}

#[test]
fn a_weight_may_be_rows_of_a_larger_buffer() {
    for (kind, tolerance) in KINDS {
        let (flat, x) = (random(&[1000], kind), random(&[10, 16], kind));
        let w = flat.narrow(0, 37, 24 * 16).view([24, 16]);
        let grads = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        let w_grad = grads.narrow(0, 37, 24 * 16).view([24, 16]);
        let y = op::linear(&x, &w, None, Some(&w_grad), None);
        autograd::backward(&[&y], &[&y.ones_like()]);
        assert_close("y", &y, &x.to_kind(Kind::Double).matmul(&w.to_kind(Kind::Double).tr()), tolerance);
        let outside =
            grads.narrow(0, 0, 37).abs().sum(Kind::Float) + grads.narrow(0, 37 + 24 * 16, 579).abs().sum(Kind::Float);
        assert_eq!(outside.double_value(&[]), 0.0, "the gradient must stay inside its view");
        assert!(w_grad.abs().sum(Kind::Float).double_value(&[]) > 0.0);
    }
}

#[test]
fn frozen_weights_pass_gradients_through() {
    let (x, w) = (leaf(&random(&[6, 8], Kind::Float)), random(&[4, 8], Kind::Float));
    let y = op::linear(&x, &w, None, None, None);
    autograd::backward(&[&y], &[&y.ones_like()]);
    assert_close("dx", &x.grad(), &Tensor::ones([6, 4], (Kind::Float, Device::Cpu)).matmul(&w), 1e-5);
    let quiet = tch::no_grad(|| op::linear(&x, &w, None, Some(&main_grad(&w)), None));
    assert!(!quiet.requires_grad(), "no node without grad mode");
}

#[test]
fn inputs_may_be_strided_and_weights_may_not() {
    let (x, w) = (random(&[16, 6], Kind::Float).tr(), random(&[4, 16], Kind::Float));
    assert_close("strided x", &op::linear(&x, &w, None, None, None), &x.contiguous().matmul(&w.tr()), 1e-5);
    let strided = random(&[16, 4], Kind::Float).tr();
    let message = refusal(|| op::linear(&x.contiguous(), &strided, None, None, None));
    assert!(message.contains("the weight must be contiguous"), "{message}");
}

#[test]
fn wrong_arguments_are_named() {
    let (x, w) = (random(&[3, 8], Kind::Float), random(&[4, 8], Kind::Float));
    let message = refusal(|| op::linear(&x, &w, None, Some(&random(&[4, 8], Kind::BFloat16)), None));
    assert!(message.contains("linear: main gradient of type BFloat16"), "{message}");
    let message = refusal(|| op::linear(&x, &leaf(&w), None, None, None));
    assert!(message.contains("the weight requires a gradient"), "{message}");
    let message = refusal(|| op::rms_norm(&x, &random(&[7], Kind::Float), 1e-5, None));
    assert!(message.contains("rms_norm: input of shape [3, 8]"), "{message}");
}

#[test]
fn embedding_matches_float64() {
    for (kind, _) in KINDS {
        let (table, dy) = (random(&[11, 20], kind), random(&[30, 20], kind));
        let ids = Tensor::randint(11, [30], (Kind::Int64, Device::Cpu));
        let wide = double_leaf(&table);
        let expected = embedding::reference::embedding(&ids, &wide);
        autograd::backward(&[&expected], &[&dy.to_kind(Kind::Double)]);
        let grad = main_grad(&table);
        let got = op::embedding(&ids, &table);
        op::embedding_backward(&ids, &dy, &grad);
        // Rows are copied, and summed in fp32 from exact inputs in both types.
        assert_close("rows", &got, &expected, 0.0);
        assert_close("dtable", &grad, &wide.grad(), 1e-6);
    }
}

fn check_rms_norm(kind: Kind, tolerance: f64, shape: &[i64]) {
    let width = *shape.last().expect("a shape");
    let (x, w, dy) = (random(shape, kind), random(&[width], kind), random(shape, kind));
    let (wide_x, wide_w) = (double_leaf(&x), double_leaf(&w));
    let expected = rms_norm::reference::rms_norm(&wide_x, &wide_w, 1e-5);
    autograd::backward(&[&expected], &[&dy.to_kind(Kind::Double)]);
    let (x, grad) = (leaf(&x), main_grad(&w));
    let got = op::rms_norm(&x, &w, 1e-5, Some(&grad));
    autograd::backward(&[&got], &[&dy]);
    assert_close("y", &got, &expected, tolerance);
    assert_close("dx", &x.grad(), &wide_x.grad(), tolerance);
    assert_close("dw", &grad, &wide_w.grad(), tolerance);
}

#[test]
fn rms_norm_matches_float64() {
    for (kind, tolerance) in KINDS.into_iter().chain([(Kind::Double, 1e-12)]) {
        check_rms_norm(kind, tolerance, &[130, 64]);
        check_rms_norm(kind, tolerance, &[5, 3, 37]);
        check_rms_norm(kind, tolerance, &[1, 7]);
    }
}

#[test]
fn rms_norm_rounds_as_transformers_does() {
    let (x, w) = (random(&[9, 48], Kind::BFloat16), random(&[48], Kind::BFloat16));
    let (got, expected) = (op::rms_norm(&x, &w, 1e-6, None), rms_norm::reference::rms_norm(&x, &w, 1e-6));
    // The order of the sum of squares may move a value across a rounding boundary, never by more than one.
    let differing = got.ne_tensor(&expected).sum(Kind::Int64).int64_value(&[]);
    assert!(differing <= 4, "{differing} of {} elements differ", got.numel());
}

#[test]
fn add_rms_norm_is_a_sum_and_a_norm() {
    for (kind, tolerance) in KINDS {
        let (x, residual, w) = (random(&[70, 40], kind), random(&[70, 40], kind), random(&[40], kind));
        let (dy, dsum) = (random(&[70, 40], kind), random(&[70, 40], kind));
        let (wide_x, wide_r, wide_w) = (double_leaf(&x), double_leaf(&residual), double_leaf(&w));
        let wide_sum = &wide_x + &wide_r;
        let wide_y = rms_norm::reference::rms_norm(&wide_sum, &wide_w, 1e-5);
        autograd::backward(&[&wide_y, &wide_sum], &[&dy.to_kind(Kind::Double), &dsum.to_kind(Kind::Double)]);
        let (x, residual, grad) = (leaf(&x), leaf(&residual), main_grad(&w));
        let (y, sum) = op::add_rms_norm(&x, &residual, &w, 1e-5, Some(&grad));
        autograd::backward(&[&y, &sum], &[&dy, &dsum]);
        // bf16: the sum is rounded before the norm, and the result after it.
        assert_close("sum", &sum, &wide_sum, tolerance);
        assert_close("y", &y, &wide_y, 2.0 * tolerance);
        assert_close("dx", &x.grad(), &wide_x.grad(), 2.0 * tolerance);
        assert_close("dresidual", &residual.grad(), &wide_r.grad(), 2.0 * tolerance);
        assert_close("dw", &grad, &wide_w.grad(), 2.0 * tolerance);
    }
}

#[test]
fn weight_gradients_do_not_depend_on_threads() {
    for (kind, _) in KINDS {
        let (x, w, dy) = (random(&[700, 96], kind), random(&[96], kind), random(&[700, 96], kind));
        let (one, two) = with_one_and_two_threads(|| {
            let (x, grad) = (leaf(&x), main_grad(&w));
            let y = op::rms_norm(&x, &w, 1e-5, Some(&grad));
            autograd::backward(&[&y], &[&dy]);
            (y.detach(), x.grad(), grad)
        });
        assert_same_bits("y", &one.0, &two.0);
        assert_same_bits("dx", &one.1, &two.1);
        assert_same_bits("dw", &one.2, &two.2);
    }
}

#[test]
fn grad_leaves_leaves_alone_and_storage_comes_back() {
    let x = leaf(&random(&[4, 4], Kind::Float));
    let y = &x * 3.0;
    let found = autograd::grad(&[&y], &[&x], &[&y.ones_like()]);
    assert_close("grad", &found[0], &Tensor::full([4, 4], 3.0, (Kind::Float, Device::Cpu)), 0.0);
    assert!(!x.grad().defined(), "grad must not touch .grad");

    // A weight freed while a graph holds it, and refilled with the same values.
    let (x, w) = (leaf(&random(&[5, 8], Kind::Float)), random(&[6, 8], Kind::Float));
    let kept = w.copy();
    let y = op::linear(&x, &w, None, None, None);
    autograd::storage_resize(&w, 0);
    autograd::storage_resize(&w, 6 * 8 * 4);
    autograd::preserving_version(&w, || w.shallow_clone().copy_(&kept));
    autograd::backward(&[&y], &[&y.ones_like()]);
    assert_close("dx", &x.grad(), &Tensor::ones([5, 6], (Kind::Float, Device::Cpu)).matmul(&kept), 1e-5);
}
