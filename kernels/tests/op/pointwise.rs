//! Rotary embedding and SwiGLU.

use tangelo_kernels::autograd;
use tangelo_kernels::op::{self, rope, swiglu};
use tch::{Device, Kind, Tensor};

use crate::common::*;

fn tables(tokens: i64, half: i64) -> (Tensor, Tensor) {
    let angles = Tensor::rand([tokens, half], (Kind::Float, Device::Cpu)) * 6.0;
    (angles.cos(), angles.sin())
}

fn check_qkv_rope(kind: Kind, tolerance: f64, tokens: i64, heads: i64, kv_heads: i64, dim: i64) {
    let qkv = random(&[tokens, (heads + 2 * kv_heads) * dim], kind);
    let (cos, sin) = tables(tokens, dim / 2);
    let wide = double_leaf(&qkv);
    let (wide_cos, wide_sin) = (cos.to_kind(Kind::Double), sin.to_kind(Kind::Double));
    let expected = rope::reference::qkv_rope(&wide, &wide_cos, &wide_sin, heads, kv_heads, dim);
    let x = leaf(&qkv);
    let got = op::qkv_rope(&x, &cos, &sin, heads, kv_heads, dim);
    let grads = [&got.0, &got.1, &got.2].map(|part| random(&part.size(), kind));
    let wide_grads = grads.each_ref().map(|grad| grad.to_kind(Kind::Double));
    autograd::backward(&[&expected.0, &expected.1, &expected.2], &wide_grads.each_ref());
    autograd::backward(&[&got.0, &got.1, &got.2], &grads.each_ref());
    assert_close("q", &got.0, &expected.0, tolerance);
    assert_close("k", &got.1, &expected.1, tolerance);
    assert_close("v", &got.2, &expected.2, 0.0);
    assert_close("dqkv", &x.grad(), &wide.grad(), tolerance);
    assert!([&got.0, &got.1, &got.2].iter().all(|part| part.is_contiguous()));

    let (q, k) = (random(&[tokens, heads, dim], kind), random(&[tokens, kv_heads, dim], kind));
    let turned = op::rope(&q, &k, &cos, &sin);
    assert_close(
        "rope q",
        &turned.0,
        &rope::reference::rope(&q.to_kind(Kind::Double), &wide_cos, &wide_sin),
        tolerance,
    );
    assert_close(
        "rope k",
        &turned.1,
        &rope::reference::rope(&k.to_kind(Kind::Double), &wide_cos, &wide_sin),
        tolerance,
    );
}

#[test]
fn rope_matches_float64() {
    for (kind, tolerance) in KINDS {
        check_qkv_rope(kind, tolerance, 17, 9, 3, 64);
        check_qkv_rope(kind, tolerance, 5, 2, 2, 18);
        check_qkv_rope(kind, tolerance, 1, 4, 1, 2);
    }
}

fn check_swiglu(kind: Kind, tolerance: f64, shape: &[i64]) {
    let x = random(shape, kind) * 4.0;
    let mut out_shape = shape.to_vec();
    *out_shape.last_mut().expect("a shape") /= 2;
    let dy = random(&out_shape, kind);
    let wide = double_leaf(&x);
    let expected = swiglu::reference::swiglu(&wide);
    autograd::backward(&[&expected], &[&dy.to_kind(Kind::Double)]);
    let x = leaf(&x);
    let got = op::swiglu(&x);
    autograd::backward(&[&got], &[&dy]);
    assert_close("y", &got, &expected, tolerance);
    assert_close("dx", &x.grad(), &wide.grad(), tolerance);
}

#[test]
fn swiglu_matches_float64() {
    for (kind, tolerance) in KINDS.into_iter().chain([(Kind::Double, 1e-12)]) {
        check_swiglu(kind, tolerance, &[40, 96]);
        check_swiglu(kind, tolerance, &[3, 2, 34]);
        check_swiglu(kind, tolerance, &[1, 2]);
    }
}

#[test]
fn swiglu_survives_extremes() {
    let gate_up = Tensor::from_slice(&[-200.0f32, 200.0, -1e30, 1e30, 1.0, 1.0, 1.0, 1.0]).view([1, 8]);
    let got = Vec::<f32>::try_from(op::swiglu(&gate_up).view(-1)).expect("four floats");
    assert_eq!(got, [0.0, 200.0, 0.0, 1e30], "silu tends to 0 and to x");
    let with_nan = Tensor::from_slice(&[f32::NAN, 1.0]).view([1, 2]);
    assert!(op::swiglu(&with_nan).double_value(&[0, 0]).is_nan(), "a NaN must not vanish");
}
