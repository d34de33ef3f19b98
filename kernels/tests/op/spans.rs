//! Attention a part of the keys at a time: a ring over virtual ranks, whole documents' attention in float64.

use tangelo_kernels::autograd;
use tangelo_kernels::op::attention::reference;
use tangelo_kernels::op::attention::spans::{self, Running, Span, attend, attend_backward};
use tch::{Device, IndexOp, Kind, Tensor};

use crate::common::*;

#[derive(Debug)]
struct Case {
    ranks: i64,
    /// Tokens in one of the `2 * ranks` chunks.
    chunk: i64,
    heads: i64,
    kv_heads: i64,
    dim: i64,
    window: Option<i64>,
}

impl Case {
    fn tokens(&self) -> i64 {
        2 * self.ranks * self.chunk
    }

    fn scale(&self) -> f64 {
        1.0 / (self.dim as f64).sqrt()
    }

    /// The two chunks of a rank, in zigzag order: with causal attention all ranks have the same work.
    fn chunks(&self, rank: i64) -> [i64; 2] {
        [rank, 2 * self.ranks - 1 - rank]
    }

    /// A rank's rows of a tensor of all tokens.
    fn rows(&self, rank: i64, x: &Tensor) -> Tensor {
        Tensor::cat(&self.chunks(rank).map(|chunk| x.narrow(0, chunk * self.chunk, self.chunk)), 0)
    }

    /// The tensor of all tokens from every rank's rows.
    fn whole(&self, parts: &[Tensor]) -> Tensor {
        let chunk = |i: i64| {
            let (rank, slot) = if i < self.ranks { (i, 0) } else { (2 * self.ranks - 1 - i, 1) };
            parts[rank as usize].narrow(0, slot * self.chunk, self.chunk)
        };
        Tensor::cat(&(0..2 * self.ranks).map(chunk).collect::<Vec<_>>(), 0)
    }

    /// Every document's part in each pair of a chunk of queries and one of keys, future ones too, in random order.
    fn spans(&self, bounds: &[i64], query_rank: i64, key_rank: i64) -> Vec<Span> {
        let mut spans = Vec::new();
        for (query_slot, query_chunk) in self.chunks(query_rank).into_iter().enumerate() {
            for (key_slot, key_chunk) in self.chunks(key_rank).into_iter().enumerate() {
                for document in bounds.windows(2) {
                    let part = |chunk: i64| {
                        let (start, end) = (chunk * self.chunk, (chunk + 1) * self.chunk);
                        start.max(document[0])..end.min(document[1])
                    };
                    let (queries, keys) = (part(query_chunk), part(key_chunk));
                    if queries.is_empty() || keys.is_empty() {
                        continue;
                    }
                    let offset = queries.start - keys.start;
                    let local = |range: std::ops::Range<i64>, chunk: i64, slot: usize| {
                        let shift = (slot as i64 - chunk) * self.chunk;
                        range.start + shift..range.end + shift
                    };
                    let queries = local(queries, query_chunk, query_slot);
                    spans.push(Span { queries, keys: local(keys, key_chunk, key_slot), offset });
                }
            }
        }
        for i in (1..spans.len()).rev() {
            spans.swap(i, below(i as i64 + 1) as usize);
        }
        spans
    }

    /// The spans of every rank's queries (first index) with every rank's keys (second).
    fn all_spans(&self, bounds: &[i64]) -> Vec<Vec<Vec<Span>>> {
        (0..self.ranks).map(|q| (0..self.ranks).map(|k| self.spans(bounds, q, k)).collect()).collect()
    }
}

/// Bounds of random documents: often of a single token, sometimes long.
fn random_bounds(tokens: i64) -> Vec<i64> {
    let mut bounds = vec![0];
    while *bounds.last().expect("never empty") < tokens {
        let length = 1 + [0, below(4), below(tokens / 2), below(tokens)][below(4) as usize];
        bounds.push((bounds[bounds.len() - 1] + length).min(tokens));
    }
    bounds
}

type Attend = fn(&Tensor, &Tensor, &Tensor, &[Span], f64, Option<i64>, &mut Running);
#[rustfmt::skip]
type AttendBackward = fn(
    &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &[Span], f64, Option<i64>, &Tensor, &Tensor, &Tensor,
);

/// Output, dq, dk, dv of all tokens by a ring over all ranks, with [`Case::all_spans`].
fn ring(
    case: &Case,
    spans: &[Vec<Vec<Span>>],
    inputs: &[Tensor; 4],
    attend: Attend,
    backward: AttendBackward,
) -> [Tensor; 4] {
    let ranks: Vec<[Tensor; 4]> =
        (0..case.ranks).map(|rank| [0, 1, 2, 3].map(|i: usize| case.rows(rank, &inputs[i]))).collect();
    let sums = if inputs[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let zeros = |i: usize| ranks.iter().map(|rank| rank[i].zeros_like().to_kind(sums)).collect::<Vec<_>>();
    let (mut outs, dq, dk, dv) = (Vec::new(), zeros(0), zeros(1), zeros(2));
    for (rank, [q, _, _, dout]) in ranks.iter().enumerate() {
        let mut running = Running::new(q);
        let order: Vec<usize> = (0..ranks.len()).map(|step| (rank + ranks.len() - step) % ranks.len()).collect();
        for &from in &order {
            let [_, k, v, _] = &ranks[from];
            attend(q, k, v, &spans[rank][from], case.scale(), case.window, &mut running);
        }
        // Training in bf16 keeps the output rounded.
        let out = running.out.to_kind(q.kind());
        for &from in &order {
            let ([_, k, v, _], lse) = (&ranks[from], &running.lse);
            let (spans, dq) = (&spans[rank][from], &dq[rank]);
            backward(q, k, v, &out, dout, lse, spans, case.scale(), case.window, dq, &dk[from], &dv[from]);
        }
        outs.push(out);
    }
    [outs, dq, dk, dv].map(|parts| case.whole(&parts))
}

fn check(case: &Case, kind: Kind, tolerance: f64, attend: Attend, backward: AttendBackward) {
    let bounds = random_bounds(case.tokens());
    let shape = |heads: i64| [case.tokens(), heads, case.dim];
    let inputs = [case.heads, case.kv_heads, case.kv_heads, case.heads].map(|heads| random(&shape(heads), kind));
    let wide = [0, 1, 2].map(|i: usize| double_leaf(&inputs[i]));
    let expected = reference::attention(&wide[0], &wide[1], &wide[2], &bounds, &[], case.scale(), case.window);
    autograd::backward(&[&expected], &[&inputs[3].to_kind(Kind::Double)]);
    let [out, dq, dk, dv] = ring(case, &case.all_spans(&bounds), &inputs, attend, backward);
    println!("{case:?} {kind:?} {bounds:?}");
    assert_close("out", &out, &expected, tolerance);
    for (name, got, wide) in [("dq", dq, &wide[0]), ("dk", dk, &wide[1]), ("dv", dv, &wide[2])] {
        // As in `attention_matches_float64`: one rounding more, and gradients that are zero as a difference.
        let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
        let expected = wide.grad();
        let found =
            norm(&(got.to_kind(Kind::Double) - &expected)) / norm(&expected).max(norm(&inputs[3]) * case.scale());
        assert!(found <= 2.0 * tolerance, "{name}: relative error {found:.2e}, allowed {:.0e}", 2.0 * tolerance);
    }
}

/// Ranks, tokens a chunk, heads, key heads, head dimension, window.
const CASES: [(i64, i64, i64, i64, i64, Option<i64>); 11] = [
    (1, 70, 4, 2, 64, None),
    (2, 64, 9, 3, 32, None),
    (3, 50, 2, 1, 24, None),
    (4, 33, 3, 3, 10, None),
    (2, 130, 2, 2, 128, None),
    (4, 7, 4, 1, 8, None),
    (2, 100, 4, 2, 16, Some(50)),
    (3, 64, 2, 2, 24, Some(64)),
    (4, 20, 2, 1, 17, Some(1)),
    (4, 90, 4, 2, 64, Some(200)),
    (2, 60, 2, 1, 40, Some(i64::MAX)),
];

fn cases() -> impl Iterator<Item = Case> {
    CASES.into_iter().map(|(ranks, chunk, heads, kv_heads, dim, window)| Case {
        ranks,
        chunk,
        heads,
        kv_heads,
        dim,
        window,
    })
}

#[test]
fn a_ring_equals_whole_attention() {
    seed_freshly();
    // A merge rounds a row once or twice in fp32, which the tolerance of sums covers.
    for (kind, tolerance) in KINDS.into_iter().chain([(Kind::Double, 1e-12)]) {
        for case in cases() {
            check(&case, kind, tolerance, attend, attend_backward);
        }
    }
}

#[test]
fn the_reference_equals_whole_attention() {
    seed_freshly();
    for (kind, tolerance) in KINDS {
        for case in cases() {
            check(&case, kind, tolerance, spans::reference::attend, spans::reference::attend_backward);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    seed_freshly();
    let case = Case { ranks: 2, chunk: 90, heads: 4, kv_heads: 2, dim: 64, window: None };
    let spans = case.all_spans(&random_bounds(case.tokens()));
    let shape = |heads: i64| [case.tokens(), heads, case.dim];
    for (kind, _) in KINDS {
        let inputs = [4, 2, 2, 4].map(|heads| random(&shape(heads), kind));
        let (one, two) = with_one_and_two_threads(|| ring(&case, &spans, &inputs, attend, attend_backward));
        for (name, (a, b)) in ["out", "dq", "dk", "dv"].into_iter().zip(one.iter().zip(&two)) {
            assert_same_bits(name, a, b);
        }
    }
}

#[test]
fn rows_that_see_nothing_stay_as_they_were() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let (q, k) = (random(&[70, 2, 24], kind), random(&[80, 1, 24], kind));
        let (v, dout) = (random(&[80, 1, 24], kind), random(&[70, 2, 24], kind));
        let mut running = Running::new(&q);
        let sums = running.out.kind();
        // Queries 0 to 9 lie before every key, and 30 to 69 behind what a window of 20 reaches; the rest is empty.
        let spans = [
            Span { queries: 0..70, keys: 0..1, offset: -10 },
            Span { queries: 0..70, keys: 5..5, offset: 3 },
            Span { queries: 8..8, keys: 5..9, offset: 3 },
            Span { queries: 0..70, keys: 5..80, offset: -80 },
            Span { queries: 0..70, keys: 5..80, offset: 1000 },
        ];
        attend(&q, &k, &v, &spans, 0.2, Some(20), &mut running);
        for idle in [0..10, 30..70] {
            assert_eq!(running.out.i(idle.clone()).abs().sum(sums).double_value(&[]), 0.0);
            assert!(bool::try_from(running.lse.i((.., idle)).eq(f64::NEG_INFINITY).all()).expect("a boolean"));
        }
        assert!(bool::try_from(running.lse.i((.., 10..30)).isfinite().all()).expect("a boolean"));
        let [dq, dk, dv] = [&q, &k, &v].map(|x| x.zeros_like().to_kind(sums));
        // Rows without any key, in a span that shows them some: probability zero, not NaN.
        let spans = [&spans[..], &[Span { queries: 0..10, keys: 0..80, offset: 100 }]].concat();
        let (out, lse) = (&running.out, &running.lse);
        attend_backward(&q, &k, &v, out, &dout, lse, &spans[..5], 0.2, Some(20), &dq, &dk, &dv);
        attend_backward(&q, &k, &v, out, &dout, lse, &spans[5..], 0.2, None, &dq, &dk, &dv);
        assert!([&dq, &dk, &dv].iter().all(|x| bool::try_from(x.isfinite().all()).expect("a boolean")));
        for idle in [0..10, 30..70] {
            assert_eq!(dq.i(idle).abs().sum(sums).double_value(&[]), 0.0);
        }
    }
}

#[test]
fn a_thousand_merges_stay_exact() {
    seed_freshly();
    let (num_queries, dim, scale) = (20, 24, 0.6);
    let (q, dout) = (random(&[num_queries, 2, dim], Kind::Float), random(&[num_queries, 2, dim], Kind::Float));
    let [k, v] = [(); 2].map(|()| random(&[3000, 1, dim], Kind::Float));
    let seen = Tensor::zeros([num_queries, 3000], (Kind::Bool, Device::Cpu));
    let mut running = Running::new(&q);
    let mut all = Vec::new();
    for first in (0..3000).step_by(3) {
        let start = below(num_queries - 3);
        let queries = start..start + 1 + below(num_queries - 3 - start);
        let keys = first..first + 1 + below(3);
        let _ = seen.i((queries.clone(), keys.clone())).fill_(1);
        let spans = [Span { queries, keys, offset: 3 + below(10) }];
        attend(&q, &k, &v, &spans, scale, None, &mut running);
        all.extend(spans);
    }
    let [q_wide, k_wide, v_wide] = [&q, &k, &v].map(double_leaf);
    let [k_both, v_both] = [&k_wide, &v_wide].map(|x| x.expand([3000, 2, dim], false).transpose(0, 1));
    let scores = q_wide.transpose(0, 1).matmul(&k_both.transpose(1, 2)) * scale;
    let scores = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
    let lse = scores.logsumexp([-1i64].as_slice(), true);
    // The last three queries are in no span.
    let any = lse.ne(f64::NEG_INFINITY);
    assert_eq!(any.sum(Kind::Int64).int64_value(&[]), 2 * (num_queries - 3));
    let weights = (&scores - lse.masked_fill(&any.logical_not(), 0.0)).exp();
    let expected = weights.matmul(&v_both).transpose(0, 1);
    autograd::backward(&[&expected], &[&dout.to_kind(Kind::Double)]);
    // Each merge rounds the log-sum-exp, of size about 10, by up to 5e-7, and the sum of 1,000 such errors is about
    // their root mean square, 3e-7, times 32.
    let tolerance = 4e-5;
    assert_close("out", &running.out, &expected, tolerance);
    assert_close(
        "lse",
        &running.lse.masked_fill(&any.squeeze_dim(-1).logical_not(), 0.0),
        &lse.masked_fill(&any.logical_not(), 0.0).squeeze_dim(-1),
        1e-5,
    );
    let [dq, dk, dv] = [&q, &k, &v].map(Tensor::zeros_like);
    let (out, lse) = (&running.out, &running.lse);
    attend_backward(&q, &k, &v, out, &dout, lse, &all, scale, None, &dq, &dk, &dv);
    for (name, got, wide) in [("dq", dq, q_wide), ("dk", dk, k_wide), ("dv", dv, v_wide)] {
        assert_close(name, &got, &wide.grad(), 2.0 * tolerance);
    }
}

#[test]
#[should_panic(expected = "lies outside 4 queries and 6 keys")]
fn spans_must_lie_inside() {
    let (q, k) = (random(&[4, 1, 8], Kind::Float), random(&[6, 1, 8], Kind::Float));
    let spans = [Span { queries: 0..4, keys: 3..7, offset: 3 }];
    attend(&q, &k, &k, &spans, 1.0, None, &mut Running::new(&q));
}
