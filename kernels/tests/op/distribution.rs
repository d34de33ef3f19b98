//! Log-probabilities, entropies and their gradients against log-softmax in float64 through autograd, with the head whole
//! and cut.

use crate::common::*;
use tangelo_kernels::op::distribution::{Chunk, HeadRows, TokenStats, chunk, gradients, merge};
use tangelo_kernels::{autograd, op};
use tch::{Device, Kind, Tensor};

struct Inputs {
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: f64,
    /// By log-probability and entropy; both 0 for every third token.
    slopes: Vec<[f64; 2]>,
}

fn inputs(tokens: i64, width: i64, vocabulary: i64, kind: Kind) -> Inputs {
    let draw =
        || Vec::<f64>::try_from(Tensor::randn([tokens], (Kind::Double, Device::Cpu))).expect("a flat f64 tensor");
    let slope = |(i, (a, b)): (usize, (f64, f64))| if i % 3 == 0 { [0.0, 0.0] } else { [a, b] };
    Inputs {
        hidden: random(&[tokens, width], kind),
        head: random(&[vocabulary, width], kind) * 0.3,
        targets: Tensor::randint(vocabulary, [tokens], (Kind::Int64, Device::Cpu)),
        temperature: 0.5 + below(100) as f64 / 80.0,
        slopes: draw().into_iter().zip(draw()).enumerate().map(slope).collect(),
    }
}

struct Found {
    stats: Vec<TokenStats>,
    dhidden: Tensor,
    dhead: Tensor,
}

/// With the head's rows dealt to ranks as `cuts` says.
fn run(i: &Inputs, cuts: &[i64]) -> Found {
    let kind = if i.hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let dhead = Tensor::zeros(i.head.size(), (kind, Device::Cpu));
    let mut start = 0;
    let part = |&n: &i64| {
        let own = (start, i.head.narrow(0, start, n), dhead.narrow(0, start, n));
        start += n;
        own
    };
    let parts: Vec<(i64, Tensor, Tensor)> = cuts.iter().map(part).collect();
    assert_eq!(start, i.head.size()[0], "the cuts cover the head");
    let rows: Vec<HeadRows> =
        parts.iter().map(|(start, weight, grad)| HeadRows { weight, start: *start, main_grad: Some(grad) }).collect();
    let chunks: Vec<Chunk> = rows.iter().map(|rows| chunk(&i.hidden, *rows, &i.targets, i.temperature)).collect();
    let stats = merge(&Tensor::stack(&chunks.iter().map(|c| &c.stats).collect::<Vec<_>>(), 0));
    let mut dhidden = i.hidden.zeros_like().to_kind(kind);
    for (chunk, rows) in chunks.into_iter().zip(rows) {
        dhidden += gradients(chunk, &i.hidden, rows, &i.targets, i.temperature, &stats, &i.slopes).to_kind(kind);
    }
    Found { stats, dhidden, dhead }
}

fn column(stats: &[TokenStats], of: impl Fn(&TokenStats) -> f64) -> Tensor {
    Tensor::from_slice(&stats.iter().map(of).collect::<Vec<f64>>())
}

fn check(tokens: i64, width: i64, vocabulary: i64, cuts: &[i64], kind: Kind, tolerance: f64) {
    let i = inputs(tokens, width, vocabulary, kind);
    let (hidden, head) = (double_leaf(&i.hidden), double_leaf(&i.head));
    let logprobs = (hidden.matmul(&head.tr()) / i.temperature).log_softmax(-1, Kind::Double);
    let chosen = logprobs.gather(1, &i.targets.unsqueeze(1), false).squeeze_dim(1);
    let entropy = -(logprobs.exp() * &logprobs).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    let slope = |at: usize| Tensor::from_slice(&i.slopes.iter().map(|s| s[at]).collect::<Vec<f64>>());
    let loss = (&chosen * slope(0) + &entropy * slope(1)).sum(Kind::Double);
    autograd::backward(&[&loss], &[&Tensor::from(1.0f64)]);

    let found = run(&i, cuts);
    assert_close("log-probabilities", &column(&found.stats, |s| s.logprob), &chosen, tolerance);
    assert_close("entropies", &column(&found.stats, |s| s.entropy), &entropy, tolerance);
    assert_close("dhidden", &found.dhidden, &hidden.grad(), 2.0 * tolerance);
    assert_close("dhead", &found.dhead, &head.grad(), 2.0 * tolerance);
    let silent: Vec<i64> = (0..tokens).filter(|t| t % 3 == 0).collect();
    let skipped = found.dhidden.index_select(0, &Tensor::from_slice(&silent));
    assert_eq!(skipped.abs().sum(Kind::Double).double_value(&[]), 0.0, "slopes of 0 must give exactly nothing");
}

#[test]
fn distributions_match_float64() {
    seed_freshly();
    // fp32: sums of up to 300 terms, 6e-8 each. bf16: logits of size about 4 are rounded to 2^-9 of themselves before the
    // softmax, and so are their gradients; a temperature below 1 makes that twice as much.
    for (kind, tolerance) in [(Kind::Float, 3e-6), (Kind::BFloat16, 2e-2), (Kind::Double, 1e-9)] {
        check(50, 32, 300, &[300], kind, tolerance);
        check(7, 9, 37, &[37], kind, tolerance);
        check(3, 16, 2, &[2], kind, tolerance);
        check(20, 24, 100, &[40, 0, 59, 1], kind, tolerance);
        check(20, 24, 64, &[32, 32], kind, tolerance);
    }
}

#[test]
fn entropies_lie_between_none_and_that_of_equal_tokens() {
    seed_freshly();
    let i = inputs(40, 32, 200, Kind::Float);
    let whole = run(&i, &[200]);
    let certain = column(&whole.stats, |s| s.logprob);
    assert!(certain.le(0.0).all().int64_value(&[]) != 0, "log-probabilities are at most 0");
    let entropy = column(&whole.stats, |s| s.entropy);
    // The entropy of 200 equal tokens, and fp32's rounding of it.
    assert!(entropy.max().double_value(&[]) <= 200f64.ln() + 1e-5 && entropy.min().double_value(&[]) >= -1e-5);
}

/// What training reads is what generation reported, to the bit, however tokens are grouped.
#[test]
fn log_probabilities_are_those_of_generation() {
    seed_freshly();
    for kind in [Kind::Float, Kind::BFloat16] {
        let i = inputs(70, 48, 500, kind);
        let reported = op::logprob::token_logprobs(&i.hidden, &i.head, &i.targets, i.temperature, 64);
        for (start, length) in [(0, 70), (0, 1), (3, 17), (69, 1), (20, 33)] {
            let part = |t: &Tensor| t.narrow(0, start, length);
            let rows = HeadRows { weight: &i.head, start: 0, main_grad: None };
            let found = chunk(&part(&i.hidden), rows, &part(&i.targets), i.temperature);
            let found = column(&merge(&found.stats.unsqueeze(0)), |s| s.logprob).to_kind(Kind::Float);
            assert_same_bits("log-probabilities", &found, &part(&reported));
        }
    }
}

#[test]
fn nothing_gives_nothing() {
    let i = Inputs { slopes: Vec::new(), ..inputs(0, 8, 20, Kind::Float) };
    let found = run(&i, &[20]);
    assert_eq!((found.stats.len(), found.dhidden.size()), (0, vec![0, 8]));
    assert_eq!(found.dhead.abs().sum(Kind::Float).double_value(&[]), 0.0);
}

#[test]
fn a_nan_reaches_the_statistics() {
    let i = inputs(4, 8, 20, Kind::Float);
    let _ = i.hidden.get(1).fill_(f64::NAN);
    assert!(run(&i, &[20]).stats[1].logprob.is_nan());
}
