//! From logits to a token: greedy, or temperature, top-k, top-p and a counter-based random number.
//!
//! Token `i` is a pure function of (seed, i, logits): it depends on no batch, rank or order.

use tangelo_core::hash::uniform;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// 0: the likeliest token.
    pub temperature: f64,
    /// Keep the k likeliest; 0: all.
    pub top_k: usize,
    /// Keep the likeliest whose probabilities add up to this; 1: all.
    pub top_p: f64,
    /// Seeds the random numbers.
    pub seed: u64,
}

impl Sampler {
    /// The likeliest token; the lowest id among equals.
    pub fn greedy() -> Sampler {
        Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }

    /// The id of token number `position` of a sequence, from its logits `[V]`.
    pub fn choose(&self, logits: &[f32], position: u64) -> u32 {
        if self.temperature <= 0.0 {
            return argmax(logits);
        }
        let mut kept: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &x)| (id as u32, f64::from(x) / self.temperature)).collect();
        // Likeliest first; equals by id, so that the order is total.
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            kept.truncate(self.top_k);
        }
        let largest = kept[0].1;
        let mut total = 0.0;
        for (_, x) in &mut kept {
            *x = (*x - largest).exp();
            total += *x;
        }
        let kept = nucleus(&kept, total * self.top_p);
        let total: f64 = kept.iter().map(|(_, p)| p).sum();
        let mut left = uniform(self.seed, position) * total;
        for &(id, p) in kept {
            left -= p;
            if left < 0.0 {
                return id;
            }
        }
        kept[kept.len() - 1].0
    }
}

/// The shortest run of the likeliest tokens whose mass reaches `mass`; at least one.
fn nucleus(sorted: &[(u32, f64)], mass: f64) -> &[(u32, f64)] {
    let mut sum = 0.0;
    for (i, (_, p)) in sorted.iter().enumerate() {
        sum += p;
        if sum >= mass {
            return &sorted[..=i];
        }
    }
    sorted
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// log p(id) under the softmax of `logits`, in f64.
pub fn logprob(logits: &[f32], id: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    f64::from(logits[id as usize] - largest) - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        assert_eq!(Sampler::greedy().choose(&LOGITS, 0), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampler = Sampler { temperature: 0.7, top_k: 0, top_p: 1.0, seed: 3 };
        let n = 40_000;
        let mut counts = [0f64; 5];
        for position in 0..n {
            counts[sampler.choose(&LOGITS, position) as usize] += 1.0;
        }
        let scaled: Vec<f64> = LOGITS.iter().map(|&x| (f64::from(x) / 0.7).exp()).collect();
        let total: f64 = scaled.iter().sum();
        for (count, p) in counts.iter().zip(scaled.iter().map(|x| x / total)) {
            // Five standard errors of a frequency.
            let bound = 5.0 * (p * (1.0 - p) / n as f64).sqrt();
            assert!((count / n as f64 - p).abs() < bound, "{} against {p}", count / n as f64);
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_rest_out() {
        let seen = |sampler: Sampler| {
            let mut ids: Vec<u32> = (0..2000).map(|i| sampler.choose(&LOGITS, i)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(seen(Sampler { temperature: 1.0, top_k: 3, top_p: 1.0, seed: 1 }), [1, 2, 3]);
        // The two likeliest have probability 0.39 each.
        assert_eq!(seen(Sampler { temperature: 1.0, top_k: 0, top_p: 0.5, seed: 1 }), [1, 3]);
    }

    #[test]
    fn logprobs_add_up_to_one() {
        let sum: f64 = (0..5).map(|id| logprob(&LOGITS, id).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
}
