//! Log-probabilities whose bits do not depend on the batch, and draws from the distribution that was asked for.

use tangelo_kernels::op::logprob::reference;
use tangelo_kernels::op::{self, Draw, Drawn, draw_key};
use tch::{Device, Kind, Tensor};

use crate::common::*;

/// Logits of the size a model has: hidden states and a head.
fn model(rows: i64, width: i64, vocabulary: i64, kind: Kind) -> (Tensor, Tensor) {
    let spread = 3.0 / (width as f64).sqrt();
    (random(&[rows, width], kind), (random(&[vocabulary, width], Kind::Float) * spread).to_kind(kind))
}

fn plain(row: usize) -> Draw<'static> {
    Draw { row, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, key: draw_key(7, 0, row as u64), banned: &[] }
}

#[test]
fn logprobs_match_float64_and_do_not_depend_on_the_batch() {
    seed_freshly();
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-3), (Kind::Double, 1e-12)] {
        let (hidden, head) = model(70, 48, 1003, kind);
        let targets = Tensor::randint(1003, [70], (Kind::Int64, Device::Cpu));
        for temperature in [1.0, 0.7, 2.5] {
            let all = op::token_logprobs(&hidden, &head, &targets, temperature, 512);
            let wide = [&hidden, &head].map(|x| x.to_kind(Kind::Double));
            let expected = reference::token_logprobs(&wide[0], &wide[1], &targets, temperature, 512);
            assert_close("logprobs", &all, &expected, tolerance);
            for (start, length, chunk) in [(0, 70, 7), (0, 70, 1), (13, 1, 9), (30, 17, 4)] {
                let part = |x: &Tensor| x.narrow(0, start, length);
                let some = op::token_logprobs(&part(&hidden), &head, &part(&targets), temperature, chunk);
                if kind != Kind::Double {
                    assert_same_bits("a part", &some, &part(&all));
                }
            }
        }
    }
}

#[test]
fn the_loss_and_its_logprobs_are_the_same_numbers() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (hidden, head) = model(1, 64, 500, kind);
        for target in 0..20_i64 {
            let targets = Tensor::from_slice(&[target]);
            let one = Tensor::ones([1], (Kind::Float, Device::Cpu));
            let loss = op::cross_entropy_loss(&hidden, &head, &targets, &one, 8).double_value(&[]);
            let trained = op::cross_entropy_chunked(&hidden, &head, &targets, &one, 1.0, None, 8).loss_sum;
            let logprob = op::token_logprobs(&hidden, &head, &targets, 1.0, 8).double_value(&[0]);
            assert_eq!(-loss as f32, logprob as f32);
            assert_eq!(-trained.double_value(&[]) as f32, logprob as f32);
        }
    }
}

#[test]
fn a_drawn_token_carries_the_logprobs_that_a_given_one_has() {
    seed_freshly();
    for kind in [Kind::Float, Kind::BFloat16] {
        let (hidden, head) = model(33, 96, 2000, kind);
        for temperature in [1.0, 0.6, 1.7] {
            let draws: Vec<Draw<'_>> = (0..33).map(|row| Draw { temperature, ..plain(row) }).collect();
            let drawn = op::sample(&hidden, &head, &draws);
            let tokens: Vec<i64> = drawn.iter().map(|d| i64::from(d.token)).collect();
            let tokens = Tensor::from_slice(&tokens);
            let bits = |get: fn(&Drawn) -> f32| Tensor::from_slice(&drawn.iter().map(get).collect::<Vec<_>>());
            let given = |temperature| op::token_logprobs(&hidden, &head, &tokens, temperature, 5);
            assert_same_bits("the model's", &bits(|d| d.logprob), &given(1.0));
            assert_same_bits("the distribution's", &bits(|d| d.sampling_logprob), &given(temperature));
        }
    }
}

/// Draws do not depend on what else is drawn, nor on the threads.
#[test]
fn draws_do_not_depend_on_the_batch() {
    seed_freshly();
    for kind in [Kind::Float, Kind::BFloat16] {
        let (hidden, head) = model(40, 32, 700, kind);
        let draws: Vec<Draw<'_>> = (0..80)
            .map(|i| Draw { top_k: [0, 9][i / 40], temperature: 0.9, key: draw_key(3, 1, i as u64), ..plain(i % 40) })
            .collect();
        let (one, two) = with_one_and_two_threads(|| op::sample(&hidden, &head, &draws));
        assert_eq!(one, two);
        for i in [0, 17, 79] {
            let row = hidden.narrow(0, draws[i].row as i64, 1);
            assert_eq!(op::sample(&row, &head, &[Draw { row: 0, ..draws[i] }]), [one[i]]);
        }
    }
}

/// Filters that keep everything, something and one token; the reference computes the same noise in float64.
#[test]
fn draws_match_the_reference() {
    seed_freshly();
    let (hidden, head) = model(60, 64, 3000, Kind::Float);
    let banned: Vec<i64> = (0..2990).collect();
    let filters = [
        plain(0),
        Draw { temperature: 0.5, ..plain(0) },
        Draw { top_k: 1, ..plain(0) },
        Draw { top_k: 50, temperature: 2.0, ..plain(0) },
        Draw { top_p: 0.9, ..plain(0) },
        Draw { top_p: 0.999, temperature: 8.0, ..plain(0) },
        Draw { top_p: 1e-6, ..plain(0) },
        Draw { min_p: 0.05, ..plain(0) },
        Draw { min_p: 0.01, top_k: 20, top_p: 0.8, temperature: 1.3, ..plain(0) },
        Draw { top_k: 2999, top_p: 0.99, ..plain(0) },
        Draw { banned: &banned, ..plain(0) },
        Draw { banned: &banned, top_k: 200, top_p: 0.95, ..plain(0) },
        Draw { temperature: 0.0, ..plain(0) },
        Draw { temperature: 0.0, banned: &banned, ..plain(0) },
    ];
    let (mut different, mut all) = (0, 0);
    for filter in filters {
        let draws: Vec<Draw<'_>> =
            (0..60).map(|row| Draw { row, key: draw_key(11, 2, row as u64), ..filter }).collect();
        for (draw, got) in draws.iter().zip(op::sample(&hidden, &head, &draws)) {
            let logits = hidden.get(draw.row as i64).to_kind(Kind::Double).unsqueeze(0);
            let logits = logits.matmul(&head.to_kind(Kind::Double).tr()).squeeze_dim(0);
            let expected = reference::draw(&logits, draw);
            all += 1;
            if got.token != expected.token {
                different += 1;
                continue;
            }
            assert!((got.logprob - expected.logprob).abs() < 1e-4, "{draw:?}: {got:?}, expected {expected:?}");
            let error = (got.sampling_logprob - expected.sampling_logprob).abs();
            assert!(error < 1e-3, "{draw:?}: {got:?}, expected {expected:?}");
        }
    }
    // fp32 and float64 part where two tokens run nearly equally fast (some 1e-6 relative), or where a filter ends.
    assert!(different <= 2, "{different} of {all} draws differ");
}

/// A chi-squared test of the tokens' frequencies.
#[test]
fn draws_follow_the_distribution() {
    let (hidden, head) = model(1, 16, 40, Kind::Float);
    let count = 40_000;
    for (temperature, top_k) in [(1.0, 0), (0.7, 0), (1.5, 12)] {
        let draw = |i: u64| Draw { temperature, top_k, key: draw_key(99, i % 7, i), ..plain(0) };
        let draws: Vec<Draw<'_>> = (0..count).map(draw).collect();
        let mut seen = vec![0.0; 40];
        op::sample(&hidden, &head, &draws).iter().for_each(|d| seen[d.token as usize] += 1.0);
        let logits = hidden.matmul(&head.tr()).squeeze_dim(0) / temperature;
        let mut expected = Vec::<f64>::try_from(logits.to_kind(Kind::Double).softmax(-1, Kind::Double)).unwrap();
        if top_k > 0 {
            let mut sorted = expected.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            expected.iter_mut().filter(|p| **p < sorted[top_k - 1]).for_each(|p| *p = 0.0);
        }
        let total: f64 = expected.iter().sum();
        let (mut statistic, mut bins) = (0.0, 0.0);
        for (seen, p) in seen.iter().zip(&expected) {
            let mean = p / total * count as f64;
            if mean >= 5.0 {
                statistic += (seen - mean) * (seen - mean) / mean;
                bins += 1.0;
            } else if *p == 0.0 {
                assert_eq!(*seen, 0.0, "a filtered token was drawn");
            }
        }
        // Mean `bins` - 1, standard deviation sqrt(2 (bins - 1)): five of them.
        let limit = bins - 1.0 + 5.0 * (2.0_f64 * (bins - 1.0)).sqrt();
        assert!(statistic < limit, "temperature {temperature}, top_k {top_k}: {statistic:.1} above {limit:.1}");
    }
}

/// The noise has small values too: a token of probability 1e-7 is drawn about as often as it should.
#[test]
fn race_times_are_exponential() {
    let times = Tensor::cat(
        &(0..200).map(|i| reference::race_times(0..50_000, draw_key(5, 0, i), Device::Cpu)).collect::<Vec<_>>(),
        0,
    );
    let count = times.size()[0] as f64;
    for threshold in [1e-6, 1e-3, 0.1, 1.0, 5.0] {
        let below = times.lt(threshold).sum(Kind::Double).double_value(&[]);
        let expected = count * -f64::exp_m1(-threshold);
        assert!(
            (below - expected).abs() < 5.0 * expected.sqrt() + 1.0,
            "{below} below {threshold}, expected {expected}"
        );
    }
}

#[test]
fn wrong_arguments_are_named() {
    let (hidden, head) = model(2, 8, 30, Kind::Float);
    let refused = |draw: Draw<'_>| refusal(|| op::sample(&hidden, &head, &[draw]));
    assert!(refused(plain(2)).contains("hidden row 2 of 2"));
    assert!(refused(Draw { temperature: -1.0, ..plain(0) }).contains("temperature -1"));
    assert!(refused(Draw { banned: &[30], ..plain(0) }).contains("banned token 30"));
    let all: Vec<i64> = (0..30).collect();
    assert!(refused(Draw { banned: &all, ..plain(0) }).contains("every token is banned"));
    let targets = Tensor::from_slice(&[1_i64, 30]);
    let message = refusal(|| op::token_logprobs(&hidden, &head, &targets, 1.0, 4));
    assert!(message.contains("target 30 at token 1"), "{message}");
}

#[test]
fn logits_that_are_not_numbers_show_in_the_logprob() {
    let (hidden, head) = model(1, 8, 30, Kind::Float);
    let hidden = hidden * f64::NAN;
    for draw in [plain(0), Draw { top_p: 0.9, ..plain(0) }, Draw { temperature: 0.0, ..plain(0) }] {
        assert!(op::sample(&hidden, &head, &[draw])[0].logprob.is_nan());
    }
}
