//! Cross-entropy with the vocabulary cut among virtual ranks, against the whole one in float64.

use tangelo_kernels::op::cross_entropy::{cross_entropy_chunked, vocab_parallel as parallel};
use tangelo_kernels::{autograd, op};
use tch::{Device, IndexOp, Kind, Tensor};

use crate::common::*;

struct Inputs {
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
}

const SCALE: f64 = 1.0 / 37.0;

/// Every third token has weight 0 and a target that must not be read.
fn inputs(tokens: i64, width: i64, vocabulary: i64, kind: Kind) -> Inputs {
    let ignored = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).remainder(3).eq(0);
    let garbage = Tensor::from_slice(&[-100, vocabulary, i64::MAX, i64::MIN, 0]);
    let garbage = garbage.index_select(0, &Tensor::randint(5, [tokens], (Kind::Int64, Device::Cpu)));
    Inputs {
        hidden: random(&[tokens, width], kind),
        head: random(&[vocabulary, width], kind) * 0.3,
        targets: Tensor::randint(vocabulary, [tokens], (Kind::Int64, Device::Cpu))
            .where_self(&ignored.logical_not(), &garbage),
        weights: Tensor::rand([tokens], (Kind::Float, Device::Cpu)).masked_fill(&ignored, 0.0),
    }
}

/// What all ranks together find.
struct Found {
    loss_sum: Tensor,
    dhidden: Tensor,
    dhead: Tensor,
}

/// Rows of the head for each rank: uneven, often none.
fn random_cuts(vocabulary: i64, ranks: usize) -> Vec<i64> {
    let mut cuts: Vec<i64> = (1..ranks).map(|_| below(vocabulary + 1)).collect();
    if ranks > 3 {
        cuts[1] = cuts[0];
    }
    cuts.extend([0, vocabulary]);
    cuts.sort_unstable();
    cuts
}

struct Ops {
    local_logits: fn(&Tensor, &Tensor, &Tensor, i64) -> parallel::LocalChunk,
    #[rustfmt::skip]
    #[allow(clippy::type_complexity)]
    gradients: fn(
        parallel::LocalChunk, &Tensor, &Tensor, &Tensor, i64, &Tensor, &Tensor, Option<&Tensor>,
    ) -> Tensor,
}

const KERNELS: Ops = Ops { local_logits: parallel::local_logits, gradients: parallel::chunk_gradients };
const REFERENCE: Ops =
    Ops { local_logits: parallel::reference::local_logits, gradients: parallel::reference::chunk_gradients };

fn on_ranks(i: &Inputs, cuts: &[i64], chunk: i64, ops: &Ops) -> Found {
    let sums = if i.hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let dhead = Tensor::zeros(i.head.size(), (sums, Device::Cpu));
    let dhidden = i.hidden.zeros_like().to_kind(sums);
    let mut loss_sum = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for first in (0..i.hidden.size()[0]).step_by(chunk as usize) {
        let rows = first..(first + chunk).min(i.hidden.size()[0]);
        let part = |x: &Tensor| x.i(rows.clone());
        let (hidden, targets, weights) = (part(&i.hidden), part(&i.targets), part(&i.weights).to_kind(sums));
        let head = |rank: usize| i.head.i(cuts[rank]..cuts[rank + 1]);
        let chunks: Vec<_> =
            (0..cuts.len() - 1).map(|r| (ops.local_logits)(&hidden, &head(r), &targets, cuts[r])).collect();
        let (lse, target_logit) = parallel::merge_stats(&Tensor::stack(
            &chunks.iter().map(|chunk| chunk.stats.shallow_clone()).collect::<Vec<_>>(),
            0,
        ));
        let losses = (&lse - target_logit).masked_fill(&weights.eq(0.0), 0.0);
        loss_sum += (losses * &weights).sum(Kind::Double);
        for (rank, chunk) in chunks.into_iter().enumerate() {
            let main = dhead.i(cuts[rank]..cuts[rank + 1]);
            let scales = &weights * SCALE;
            let part = (ops.gradients)(chunk, &hidden, &head(rank), &targets, cuts[rank], &lse, &scales, Some(&main));
            assert_eq!(part.kind(), hidden.kind());
            let _ = dhidden.i(rows.clone()).g_add_(&part.to_kind(sums));
        }
    }
    Found { loss_sum, dhidden, dhead }
}

/// The whole head in float64 through autograd, of the tokens that count.
fn expected(i: &Inputs) -> Found {
    let counted = i.weights.nonzero().squeeze_dim(1);
    let (hidden, head) = (double_leaf(&i.hidden), double_leaf(&i.head));
    let logprobs = hidden.index_select(0, &counted).matmul(&head.tr()).log_softmax(-1, Kind::Double);
    let targets = i.targets.index_select(0, &counted).unsqueeze(1);
    let losses = -logprobs.gather(1, &targets, false).squeeze_dim(1);
    let loss_sum = (losses * i.weights.index_select(0, &counted).to_kind(Kind::Double)).sum(Kind::Double);
    autograd::backward(&[&loss_sum], &[&Tensor::from(SCALE)]);
    Found { loss_sum: loss_sum.detach(), dhidden: hidden.grad(), dhead: head.grad() }
}

fn check(vocabulary: i64, ranks: usize, kind: Kind, tolerance: f64, ops: &Ops) {
    let i = inputs(50, 33, vocabulary, kind);
    let cuts = random_cuts(vocabulary, ranks);
    println!("vocabulary {vocabulary} cut at {cuts:?}, {kind:?}");
    let (found, expected) = (on_ranks(&i, &cuts, 16, ops), expected(&i));
    assert_close("loss", &found.loss_sum, &expected.loss_sum, tolerance);
    assert_close("dhidden", &found.dhidden, &expected.dhidden, 2.0 * tolerance);
    assert_close("dhead", &found.dhead, &expected.dhead, 2.0 * tolerance);
    let ignored = found.dhidden.index_select(0, &i.weights.eq(0.0).nonzero().squeeze_dim(1));
    assert_eq!(ignored.abs().sum(Kind::Double).double_value(&[]), 0.0, "weight 0 must give exactly nothing");
}

/// As in `cross_entropy_matches_float64`; parts of a rounded sum are each rounded to bf16, which is no more than that.
const TOLERANCES: [(Kind, f64); 3] = [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2), (Kind::Double, 1e-9)];

#[test]
fn any_cut_of_the_vocabulary_matches_float64() {
    seed_freshly();
    for (kind, tolerance) in TOLERANCES {
        for vocabulary in [7, 331, 1000] {
            for ranks in 1..=5 {
                check(vocabulary, ranks, kind, tolerance, &KERNELS);
                check(vocabulary, ranks, kind, tolerance, &REFERENCE);
            }
        }
    }
}

#[test]
fn one_rank_agrees_with_the_whole_operator() {
    seed_freshly();
    // The same roundings of logits to bf16; then gradients may fall on either side of one more rounding, 2^-9. All
    // tokens are one chunk, because a chunk's gradient of the head is rounded to bf16 too.
    for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-3)] {
        let i = inputs(40, 24, 331, kind);
        let dhead = Tensor::zeros(i.head.size(), (Kind::Float, Device::Cpu));
        let whole = cross_entropy_chunked(&i.hidden, &i.head, &i.targets, &i.weights, SCALE, Some(&dhead), 64);
        let found = on_ranks(&i, &[0, 331], 64, &KERNELS);
        assert_close("loss", &found.loss_sum, &whole.loss_sum, 1e-6);
        assert_close("dhidden", &found.dhidden, &whole.dhidden, tolerance);
        assert_close("dhead", &found.dhead, &dhead, tolerance);
    }
}

#[test]
fn threads_change_no_bit() {
    seed_freshly();
    // Wide enough rows that several threads take part.
    let i = inputs(50, 16, 3000, Kind::BFloat16);
    let (one, two) = with_one_and_two_threads(|| {
        let chunk = parallel::local_logits(&i.hidden, &i.head.i(1..2900), &i.targets, 1);
        let (lse, _) = parallel::merge_stats(&chunk.stats.unsqueeze(0));
        let (stats, logits) = (chunk.stats.copy(), chunk.logits.shallow_clone());
        let _ = parallel::chunk_gradients(chunk, &i.hidden, &i.head.i(1..2900), &i.targets, 1, &lse, &i.weights, None);
        [stats, logits]
    });
    for (a, b) in one.iter().zip(&two) {
        assert_same_bits("statistics and gradients", a, b);
    }
}

#[test]
fn a_scale_of_zero_silences_even_a_nan() {
    for ops in [KERNELS, REFERENCE] {
        let i = inputs(6, 8, 20, Kind::Float);
        let _ = i.hidden.get(0).fill_(f64::NAN);
        let chunk = (ops.local_logits)(&i.hidden, &i.head, &i.targets, 0);
        let (lse, _) = parallel::merge_stats(&chunk.stats.unsqueeze(0));
        assert!(lse.double_value(&[0]).is_nan(), "a NaN must reach the loss");
        let logits = chunk.logits.shallow_clone();
        let _ = (ops.gradients)(chunk, &i.hidden, &i.head, &i.targets, 0, &lse, &i.weights, None);
        assert_eq!(logits.get(0).abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
}

#[test]
#[should_panic(expected = "expected Int64 [6]")]
fn targets_must_be_ids() {
    let i = inputs(6, 8, 20, Kind::Float);
    let _ = op::cross_entropy::vocab_parallel::local_logits(&i.hidden, &i.head, &i.weights, 0);
}
