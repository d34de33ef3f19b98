//! Times every operator, forward and backward, against plain libtorch operations as transformers' eager model calls
//! them, at SmolLM2-135M's shapes: 1024 tokens in two documents.
//!
//! `cargo run --release -p tangelo-kernels --example bench_ops [-- THREADS]`. Prints the fastest of several runs in
//! milliseconds, and the ratio. With one thread it is processor time, which a busy machine disturbs less.

use std::hint::black_box;
use std::time::{Duration, Instant};

use tangelo_kernels::op::attention::spans::{self, Running, Span};
use tangelo_kernels::op::cross_entropy::vocab_parallel;
use tangelo_kernels::op::{self, AdamW, AdamWState, DecaySegment, muon};
use tangelo_kernels::{autograd, op::cpu_kernels_name};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 1024;
const HIDDEN: i64 = 576;
const HEADS: i64 = 9;
const KV_HEADS: i64 = 3;
const HEAD_DIM: i64 = 64;
const FEED_FORWARD: i64 = 1536;
const VOCABULARY: i64 = 49152;
const BOUNDS: [i64; 3] = [0, 512, 1024];

fn main() {
    let threads = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    tch::set_num_threads(threads);
    println!("{threads} threads, kernels for {}; forward and backward, milliseconds", cpu_kernels_name());
    for kind in [Kind::Float, Kind::BFloat16] {
        println!("{kind:?}: {:>32} {:>10} {:>10} {:>7}", "operator", "ours", "libtorch", "ratio");
        for (name, shape) in [
            ("qkv", [HIDDEN, 960]),
            ("o", [HIDDEN, HIDDEN]),
            ("gate_up", [HIDDEN, 3072]),
            ("down", [FEED_FORWARD, HIDDEN]),
        ] {
            bench_linear(name, kind, shape);
        }
        bench_norms(kind);
        bench_rope(kind);
        bench_swiglu(kind);
        bench_attention(kind);
        bench_spans(kind);
        bench_loss(kind);
        bench_vocab_parallel(kind);
    }
    bench_update();
    bench_newton_schulz();
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    random(shape, kind).set_requires_grad(true)
}

/// Nanoseconds the main thread has run, or the wall clock's where Linux's own count is missing or threads are several.
fn now(origin: Instant) -> Duration {
    let wall = origin.elapsed();
    if tch::get_num_threads() > 1 {
        return wall;
    }
    let counted = std::fs::read_to_string("/proc/self/schedstat").ok();
    let nanoseconds = counted.and_then(|text| text.split(' ').next()?.parse().ok());
    nanoseconds.map_or(wall, Duration::from_nanos)
}

fn fastest(mut work: impl FnMut()) -> f64 {
    work();
    let begin = Instant::now();
    work();
    // The processor time is counted in steps of some milliseconds: each sample repeats the work for 40 or more.
    let repeats = (40e-3 / begin.elapsed().as_secs_f64()).clamp(1.0, 1e4).ceil() as u32;
    let sample = |work: &mut dyn FnMut()| {
        let start = now(begin);
        (0..repeats).for_each(|_| work());
        (now(begin) - start) / repeats
    };
    let best = (0..7).map(|_| sample(&mut work)).min().unwrap_or_default();
    best.as_secs_f64() * 1e3
}

fn report(name: &str, ours: f64, theirs: f64) {
    println!("{name:>40} {ours:>10.2} {theirs:>10.2} {:>7.2}", theirs / ours);
}

/// Times `ours` and `theirs`, each a forward pass to be followed by a backward one with `grad`.
fn compare(name: &str, grad: &Tensor, ours: impl Fn() -> Tensor, theirs: impl Fn() -> Tensor) {
    let run = |forward: &dyn Fn() -> Tensor| fastest(|| autograd::backward(&[&forward()], &[grad]));
    report(name, run(&ours), run(&theirs));
}

fn bench_linear(name: &str, kind: Kind, [inputs, outputs]: [i64; 2]) {
    let (x, w, dy) =
        (leaf(&[TOKENS, inputs], kind), random(&[outputs, inputs], kind), random(&[TOKENS, outputs], kind));
    let main_grad = Tensor::zeros([outputs, inputs], (Kind::Float, Device::Cpu));
    let trained = w.copy().set_requires_grad(true);
    compare(
        &format!("linear {name}"),
        &dy,
        || op::linear(&x, &w, None, Some(&main_grad), None),
        || x.linear(&trained, None::<&Tensor>),
    );
}

fn bench_norms(kind: Kind) {
    let (x, residual) = (leaf(&[TOKENS, HIDDEN], kind), leaf(&[TOKENS, HIDDEN], kind));
    let (w, dy) = (random(&[HIDDEN], kind), random(&[TOKENS, HIDDEN], kind));
    let main_grad = Tensor::zeros([HIDDEN], (Kind::Float, Device::Cpu));
    let trained = w.copy().set_requires_grad(true);
    compare(
        "rms_norm",
        &dy,
        || op::rms_norm(&x, &w, 1e-5, Some(&main_grad)),
        || op::rms_norm::reference::rms_norm(&x, &trained, 1e-5),
    );
    let ours = fastest(|| {
        let (y, sum) = op::add_rms_norm(&x, &residual, &w, 1e-5, Some(&main_grad));
        autograd::backward(&[&y, &sum], &[&dy, &dy]);
    });
    let theirs = fastest(|| {
        let sum = &x + &residual;
        let y = op::rms_norm::reference::rms_norm(&sum, &trained, 1e-5);
        autograd::backward(&[&y, &sum], &[&dy, &dy]);
    });
    report("add_rms_norm", ours, theirs);
}

fn bench_rope(kind: Kind) {
    let qkv = leaf(&[TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM], kind);
    let angles = Tensor::rand([TOKENS, HEAD_DIM / 2], (Kind::Float, Device::Cpu));
    let (cos, sin) = (angles.cos(), angles.sin());
    let time = |turn: &dyn Fn() -> (Tensor, Tensor, Tensor)| {
        fastest(|| {
            let (q, k, v) = turn();
            autograd::backward(&[&q, &k, &v], &[&q, &k, &v]);
        })
    };
    report(
        "qkv_rope",
        time(&|| op::qkv_rope(&qkv, &cos, &sin, HEADS, KV_HEADS, HEAD_DIM)),
        time(&|| op::rope::reference::qkv_rope(&qkv, &cos, &sin, HEADS, KV_HEADS, HEAD_DIM)),
    );
}

fn bench_swiglu(kind: Kind) {
    let (x, dy) = (leaf(&[TOKENS, 2 * FEED_FORWARD], kind), random(&[TOKENS, FEED_FORWARD], kind));
    compare(
        "swiglu",
        &dy,
        || op::swiglu(&x),
        || {
            let halves = x.chunk(2, -1);
            halves[0].silu() * &halves[1]
        },
    );
}

fn bench_attention(kind: Kind) {
    let (q, dout) = (leaf(&[TOKENS, HEADS, HEAD_DIM], kind), random(&[TOKENS, HEADS, HEAD_DIM], kind));
    let (k, v) = (leaf(&[TOKENS, KV_HEADS, HEAD_DIM], kind), leaf(&[TOKENS, KV_HEADS, HEAD_DIM], kind));
    // Eager models give each document a row of the batch and let libtorch's fused operator do the rest.
    let batched = |x: &Tensor, heads: i64| x.view([2, TOKENS / 2, heads, HEAD_DIM]).transpose(1, 2);
    let repeated = |x: &Tensor| batched(x, KV_HEADS).repeat_interleave_self_int(HEADS / KV_HEADS, 1, None);
    let theirs = || {
        let none = None::<&Tensor>;
        Tensor::scaled_dot_product_attention(
            &batched(&q, HEADS),
            &repeated(&k),
            &repeated(&v),
            none,
            0.0,
            true,
            0.125,
            false,
        )
        .transpose(1, 2)
        .contiguous()
        .view([TOKENS, HEADS, HEAD_DIM])
    };
    compare("attention", &dout, || op::attention(&q, &k, &v, &BOUNDS, 0.125, None), theirs);
    let forward = |run: &dyn Fn() -> Tensor| {
        tch::no_grad(|| {
            fastest(|| {
                let _ = black_box(run());
            })
        })
    };
    report("attention forward alone", forward(&|| op::attention(&q, &k, &v, &BOUNDS, 0.125, None)), forward(&theirs));
}

/// All keys in one call, beside attention over whole documents.
fn bench_spans(kind: Kind) {
    let [q, dout] = [(); 2].map(|()| random(&[TOKENS, HEADS, HEAD_DIM], kind));
    let [k, v] = [(); 2].map(|()| random(&[TOKENS, KV_HEADS, HEAD_DIM], kind));
    let all: Vec<Span> = BOUNDS
        .windows(2)
        .map(|bounds| Span { queries: bounds[0]..bounds[1], keys: bounds[0]..bounds[1], offset: 0 })
        .collect();
    let sums = [&q, &k, &v].map(|x| x.zeros_like().to_kind(Kind::Float));
    let forward = || {
        let mut running = Running::new(&q);
        spans::attend(&q, &k, &v, &all, 0.125, None, &mut running);
        running
    };
    let ours = fastest(|| {
        let Running { out, lse } = forward();
        let [dq, dk, dv] = &sums;
        spans::attend_backward(&q, &k, &v, &out, &dout, &lse, &all, 0.125, None, dq, dk, dv);
    });
    let leaves = [&q, &k, &v].map(|x| x.copy().set_requires_grad(true));
    let whole = || op::attention(&leaves[0], &leaves[1], &leaves[2], &BOUNDS, 0.125, None);
    report("spans, beside our attention", ours, fastest(|| autograd::backward(&[&whole()], &[&dout])));
    let whole = tch::no_grad(|| {
        fastest(|| {
            let _ = black_box(whole());
        })
    });
    report("spans forward alone", fastest(|| drop(black_box(forward()))), whole);
}

fn bench_loss(kind: Kind) {
    let (hidden, head) = (leaf(&[TOKENS, HIDDEN], kind), random(&[VOCABULARY, HIDDEN], kind));
    let targets = Tensor::randint(VOCABULARY, [TOKENS], (Kind::Int64, Device::Cpu));
    let weights = Tensor::ones([TOKENS], (Kind::Float, Device::Cpu));
    let main_grad = Tensor::zeros([VOCABULARY, HIDDEN], (Kind::Float, Device::Cpu));
    let trained = head.copy().set_requires_grad(true);
    let ours = |chunk| {
        let (hidden, scale) = (hidden.detach(), 1.0 / TOKENS as f64);
        fastest(|| {
            black_box(op::cross_entropy_chunked(&hidden, &head, &targets, &weights, scale, Some(&main_grad), chunk));
        })
    };
    let theirs = fastest(|| {
        let logits = hidden.linear(&trained, None::<&Tensor>).to_kind(Kind::Float);
        logits.cross_entropy_for_logits(&targets).backward();
    });
    for chunk in [128, 256, 512, 1024] {
        report(&format!("head and loss, chunks of {chunk}"), ours(chunk), theirs);
    }
}

/// One rank that holds every row, beside the operator for whole heads.
fn bench_vocab_parallel(kind: Kind) {
    const CHUNK: i64 = 256;
    let (hidden, head) = (random(&[TOKENS, HIDDEN], kind), random(&[VOCABULARY, HIDDEN], kind));
    let targets = Tensor::randint(VOCABULARY, [TOKENS], (Kind::Int64, Device::Cpu));
    let weights = Tensor::ones([TOKENS], (Kind::Float, Device::Cpu));
    let main_grad = Tensor::zeros([VOCABULARY, HIDDEN], (Kind::Float, Device::Cpu));
    let ours = fastest(|| {
        for first in (0..TOKENS).step_by(CHUNK as usize) {
            let [hidden, targets, weights] = [&hidden, &targets, &weights].map(|x| x.narrow(0, first, CHUNK));
            let chunk = vocab_parallel::local_logits(&hidden, &head, &targets, 0);
            let (lse, _) = vocab_parallel::merge_stats(&chunk.stats.unsqueeze(0));
            let main = Some(&main_grad);
            let _ = vocab_parallel::chunk_gradients(chunk, &hidden, &head, &targets, 0, &lse, &weights, main);
        }
    });
    let theirs = fastest(|| {
        black_box(op::cross_entropy_chunked(&hidden, &head, &targets, &weights, 1.0, Some(&main_grad), CHUNK));
    });
    report("vocab_parallel, beside our loss", ours, theirs);
}

fn bench_update() {
    let length = 1 << 25;
    let buffers: Vec<Tensor> = (0..4).map(|_| random(&[length], Kind::Float).abs()).collect();
    let copy = random(&[length], Kind::BFloat16);
    let segments = [DecaySegment { range: 0..length as usize, weight_decay: 0.1 }];
    let options = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 5, grad_scale: 0.5 };
    let state = AdamWState {
        master: &buffers[0],
        exp_avg: &buffers[1],
        exp_avg_sq: &buffers[2],
        grad: &buffers[3],
        model_copy: Some(&copy),
    };
    println!("{length} parameters");
    report(
        "adamw_step",
        fastest(|| op::adamw_step(state, &segments, &options)),
        fastest(|| op::adamw::reference::adamw_segment(state, &segments[0], &options)),
    );
    report(
        "chunk_square_sums",
        fastest(|| {
            black_box(op::chunk_square_sums(&buffers[3], 1 << 16));
        }),
        fastest(|| {
            let _ = black_box(buffers[3].norm());
        }),
    );
}

fn bench_newton_schulz() {
    for shape in [[HIDDEN, HIDDEN], [2 * FEED_FORWARD, HIDDEN]] {
        let m = random(&shape, Kind::Float);
        report(
            &format!("newton_schulz {shape:?}"),
            fastest(|| drop(black_box(muon::newton_schulz(&m, 5, 1e-7)))),
            fastest(|| drop(black_box(muon::reference::newton_schulz(&m, 5, 1e-7)))),
        );
    }
}
