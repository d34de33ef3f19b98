//! Draws under a head whose rows are dealt to ranks: the tokens that one rank draws, and the log-probabilities that scoring
//! over the same ranks finds.

use crate::common::*;
use tangelo_kernels::op::distribution::{self, HeadRows};
use tangelo_kernels::op::logprob::vocab_parallel::{self as cut, reference};
use tangelo_kernels::op::{self, Draw, Drawn, draw_key};
use tch::{Kind, Tensor};

struct Rank {
    start: i64,
    head: Tensor,
    logits: Tensor,
}

/// Hidden states, a head, and what each rank makes of them.
fn ranks(cuts: &[i64], rows: i64, kind: Kind) -> (Tensor, Tensor, Vec<Rank>) {
    let vocabulary: i64 = cuts.iter().sum();
    let (hidden, head) = (random(&[rows, 64], kind), (random(&[vocabulary, 64], Kind::Float) * 0.4).to_kind(kind));
    let mut start = 0;
    let rank = |&n: &i64| {
        let own = head.narrow(0, start, n);
        let rank = Rank { start, logits: cut::logits(&hidden, &own), head: own };
        start += n;
        rank
    };
    let ranks = cuts.iter().map(rank).collect();
    (hidden, head, ranks)
}

fn contenders(ranks: &[Rank], draws: &[Draw<'_>]) -> Tensor {
    Tensor::stack(&ranks.iter().map(|r| cut::contend(&r.logits, r.start, draws)).collect::<Vec<_>>(), 0)
}

/// What scoring over these ranks says of tokens.
fn scored(hidden: &Tensor, ranks: &[Rank], tokens: &[i64], temperature: f64) -> Vec<f32> {
    let targets = Tensor::from_slice(tokens);
    let stats = |r: &Rank| {
        let rows = HeadRows { weight: &r.head, start: r.start, main_grad: None };
        distribution::chunk(hidden, rows, &targets, temperature).stats
    };
    let all = Tensor::stack(&ranks.iter().map(stats).collect::<Vec<_>>(), 0);
    distribution::merge(&all).iter().map(|s| s.logprob as f32).collect()
}

fn plain(row: usize) -> Draw<'static> {
    Draw { row, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, key: draw_key(7, 1, row as u64), banned: &[] }
}

fn tokens(drawn: &[Drawn]) -> Vec<i64> {
    drawn.iter().map(|d| i64::from(d.token)).collect()
}

#[test]
fn the_same_tokens_with_the_log_probabilities_of_scoring() {
    seed_freshly();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for cuts in [&[1000_i64][..], &[501, 499], &[300, 3, 0, 697]] {
            let (hidden, head, ranks) = ranks(cuts, 50, kind);
            for temperature in [1.0, 0.6, 1.7, 0.0] {
                let draws: Vec<Draw<'_>> = (0..50).map(|row| Draw { temperature, ..plain(row) }).collect();
                let drawn = cut::elect(&contenders(&ranks, &draws), kind, &draws);
                let whole = op::sample(&hidden, &head, &draws);
                // A race of two within rounding (1e-7 relative) may end otherwise.
                let others = drawn.iter().zip(&whole).filter(|(a, b)| a.token != b.token).count();
                assert!(others <= 1, "{kind:?} {cuts:?} at {temperature}: {others} of 50 tokens differ");
                let model: Vec<f32> = drawn.iter().map(|d| d.logprob).collect();
                assert_eq!(model, scored(&hidden, &ranks, &tokens(&drawn), 1.0), "{kind:?} {cuts:?}");
                let sampling: Vec<f32> = drawn.iter().map(|d| d.sampling_logprob).collect();
                let expected = if temperature == 0.0 {
                    vec![0.0; 50]
                } else {
                    scored(&hidden, &ranks, &tokens(&drawn), temperature)
                };
                assert_eq!(sampling, expected, "{kind:?} {cuts:?} at {temperature}");
            }
        }
    }
}

#[test]
fn filters_and_bans_are_those_of_one_rank() {
    seed_freshly();
    let banned: Vec<i64> = (0..990).collect();
    let filters = [
        Draw { top_k: 5, ..plain(0) },
        Draw { top_p: 0.8, temperature: 1.4, ..plain(0) },
        Draw { min_p: 0.05, ..plain(0) },
        Draw { banned: &banned, ..plain(0) },
        Draw { banned: &banned, temperature: 0.0, ..plain(0) },
        Draw { banned: &banned, top_k: 3, ..plain(0) },
    ];
    for kind in [Kind::Float, Kind::BFloat16] {
        let (hidden, head, ranks) = ranks(&[400, 600], 30, kind);
        let logits = Tensor::cat(&ranks.iter().map(|r| &r.logits).collect::<Vec<_>>(), 1);
        for filter in filters {
            let draws: Vec<Draw<'_>> = (0..30).map(|row| Draw { row, key: plain(row).key, ..filter }).collect();
            let (before, whole) = (logits.copy(), op::sample(&hidden, &head, &draws));
            let all = contenders(&ranks, &draws);
            if filter.is_filtered(1000) {
                let drawn = cut::draw(&logits, &draws);
                assert_eq!(drawn, whole, "{filter:?}");
                let values: Vec<f64> = tokens(&drawn)
                    .iter()
                    .enumerate()
                    .map(|(row, &id)| logits.double_value(&[row as i64, id]))
                    .collect();
                assert_eq!(cut::logprobs(&all, kind, &values), scored(&hidden, &ranks, &tokens(&drawn), 1.0));
            } else {
                let drawn = cut::elect(&all, kind, &draws);
                assert!(drawn.iter().zip(&whole).filter(|(a, b)| a.token != b.token).count() <= 1, "{filter:?}");
                for (drawn, whole) in drawn.iter().zip(&whole).filter(|(a, b)| a.token == b.token) {
                    // Sums are grouped otherwise.
                    assert!((drawn.sampling_logprob - whole.sampling_logprob).abs() < 1e-5, "{drawn:?} {whole:?}");
                }
            }
            assert_same_bits("the logits afterwards", &logits, &before);
        }
    }
}

/// The kernels and plain operations name the same contenders.
#[test]
fn contenders_match_the_reference() {
    seed_freshly();
    let banned: Vec<i64> = (400..500).collect();
    let (_, _, ranks) = ranks(&[400, 37, 563], 40, Kind::Float);
    for filter in
        [plain(0), Draw { temperature: 0.5, banned: &banned, ..plain(0) }, Draw { temperature: 0.0, ..plain(0) }]
    {
        let draws: Vec<Draw<'_>> = (0..40).map(|row| Draw { row, key: plain(row).key, ..filter }).collect();
        for rank in &ranks {
            let found = cut::contend(&rank.logits, rank.start, &draws);
            let expected = reference::contend(&rank.logits, rank.start, &draws);
            let differ = found.select(1, 0).ne_tensor(&expected.select(1, 0)).sum(Kind::Int64).int64_value(&[]);
            assert!(differ <= 1, "{filter:?}: {differ} of 40 winners differ");
            if differ == 0 {
                // fp32 against fp32 with other exponentials, and float64 for the race.
                let infinite = expected.isinf();
                assert!(found.isinf().equal(&infinite));
                let finite = |x: &Tensor| x.masked_fill(&infinite, 0.0);
                assert_close("contenders", &finite(&found), &finite(&expected), 1e-5);
            }
        }
    }
}

#[test]
fn numbers_that_are_none_show() {
    let (_, _, ranks) = ranks(&[20, 30], 1, Kind::Float);
    for poisoned in 0..2 {
        let logits = |(at, r): (usize, &Rank)| if at == poisoned { &r.logits * f64::NAN } else { r.logits.copy() };
        let bad: Vec<Rank> = ranks
            .iter()
            .enumerate()
            .map(|(at, r)| Rank { start: r.start, head: r.head.copy(), logits: logits((at, r)) })
            .collect();
        for temperature in [1.0, 0.5, 0.0] {
            let draws = [Draw { temperature, ..plain(0) }];
            assert!(cut::elect(&contenders(&bad, &draws), Kind::Float, &draws)[0].logprob.is_nan());
        }
    }
    let all: Vec<i64> = (0..50).collect();
    let draws = [Draw { banned: &all, ..plain(0) }];
    let message = refusal(|| cut::elect(&contenders(&ranks, &draws), Kind::Float, &draws));
    assert!(message.contains("every token is banned"), "{message}");
}
