//! Chunked cross-entropy against log-softmax in float64 through autograd.

use tangelo_kernels::autograd;
use tangelo_kernels::op;
use tch::{Device, Kind, Tensor};

use crate::common::*;

struct Inputs {
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
}

fn inputs(tokens: i64, width: i64, vocabulary: i64, kind: Kind) -> Inputs {
    let weights = Tensor::rand([tokens], (Kind::Float, Device::Cpu));
    // Every third token is not trained on.
    let position = Tensor::arange(tokens, (Kind::Int64, Device::Cpu));
    let weights = weights * position.remainder(3).not_equal(0).to_kind(Kind::Float);
    Inputs {
        hidden: random(&[tokens, width], kind),
        head: random(&[vocabulary, width], kind) * 0.3,
        targets: Tensor::randint(vocabulary, [tokens], (Kind::Int64, Device::Cpu)),
        weights,
    }
}

fn negative_log_likelihoods(hidden: &Tensor, head: &Tensor, targets: &Tensor) -> Tensor {
    let logprobs = hidden.matmul(&head.tr()).log_softmax(-1, Kind::Double);
    -logprobs.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1)
}

fn check(tokens: i64, width: i64, vocabulary: i64, chunk: i64, kind: Kind, tolerance: f64) {
    let i = inputs(tokens, width, vocabulary, kind);
    let scale = 1.0 / 37.0;
    let (hidden, head) = (double_leaf(&i.hidden), double_leaf(&i.head));
    let expected =
        (negative_log_likelihoods(&hidden, &head, &i.targets) * i.weights.to_kind(Kind::Double)).sum(Kind::Double);
    autograd::backward(&[&expected], &[&Tensor::from(scale)]);

    let grad_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let main_grad = Tensor::zeros([vocabulary, width], (grad_kind, Device::Cpu));
    let got = op::cross_entropy_chunked(&i.hidden, &i.head, &i.targets, &i.weights, scale, Some(&main_grad), chunk);
    assert_eq!(got.loss_sum.kind(), Kind::Double);
    assert_close("loss", &got.loss_sum, &expected, tolerance);
    assert_close("dhidden", &got.dhidden, &hidden.grad(), 2.0 * tolerance);
    assert_close("dhead", &main_grad, &head.grad(), 2.0 * tolerance);
    let skipped = got.dhidden.index_select(0, &i.weights.eq(0.0).nonzero().squeeze_dim(1));
    assert_eq!(skipped.abs().sum(Kind::Double).double_value(&[]), 0.0, "weight 0 must give exactly nothing");

    let loss = op::cross_entropy_loss(&i.hidden, &i.head, &i.targets, &i.weights, chunk);
    assert_close("loss alone", &loss, &expected, tolerance);
    let logprobs = op::token_logprobs(&i.hidden, &i.head, &i.targets, 1.0, chunk);
    assert_close("logprobs", &logprobs, &-negative_log_likelihoods(&hidden, &head, &i.targets), tolerance);
}

#[test]
fn cross_entropy_matches_float64() {
    // bf16: logits of size about 4 are rounded to 2^-9 of themselves before the softmax, and so are their gradients.
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2), (Kind::Double, 1e-9)] {
        check(50, 32, 300, 16, kind, tolerance);
        check(7, 9, 37, 100, kind, tolerance);
        check(3, 16, 2, 1, kind, tolerance);
    }
}

#[test]
fn chunks_change_no_loss() {
    let i = inputs(40, 24, 100, Kind::Float);
    let loss = |chunk| op::cross_entropy_loss(&i.hidden, &i.head, &i.targets, &i.weights, chunk).double_value(&[]);
    assert!((loss(40) - loss(7)).abs() <= 1e-6 * loss(40), "{} and {}", loss(40), loss(7));
}

#[test]
fn nothing_to_train_on_is_zero() {
    let i = inputs(8, 16, 20, Kind::Float);
    let none = i.weights.zeros_like();
    let main_grad = Tensor::zeros([20, 16], (Kind::Float, Device::Cpu));
    let impossible = i.targets.full_like(-100);
    let got = op::cross_entropy_chunked(&i.hidden, &i.head, &impossible, &none, 1.0, Some(&main_grad), 4);
    assert_eq!(got.loss_sum.double_value(&[]), 0.0);
    assert_eq!(main_grad.abs().sum(Kind::Float).double_value(&[]), 0.0);
    assert_eq!(got.dhidden.size(), [8, 16]);
}

#[test]
fn a_nan_reaches_the_loss() {
    let i = inputs(8, 16, 20, Kind::Float);
    let hidden = i.hidden.copy();
    let _ = hidden.get(1).fill_(f64::NAN);
    assert!(op::cross_entropy_loss(&hidden, &i.head, &i.targets, &i.weights, 4).double_value(&[]).is_nan());
}

#[test]
#[should_panic(expected = "outside the vocabulary")]
fn a_target_outside_the_vocabulary_is_refused() {
    let i = inputs(8, 16, 20, Kind::Float);
    let _ = op::token_logprobs(&i.hidden, &i.head, &i.targets.full_like(20), 1.0, 4);
}
