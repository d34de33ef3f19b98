//! Soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4).

use tangelo_configs::algorithm::{Limits, OverlongBuffer};

/// What a completion's length adds to its reward: 0 up to the buffer, then falling linearly to `-penalty_factor` at
/// the longest allowed, and on with the same slope beyond it, as in verl.
pub fn penalty(buffer: &OverlongBuffer, response_tokens: usize, limits: Limits) -> f64 {
    let start = limits.max_response_tokens.saturating_sub(buffer.len);
    if !buffer.enable || response_tokens <= start {
        return 0.0;
    }
    -((response_tokens - start) as f64 / buffer.len as f64 * buffer.penalty_factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_within_the_buffer() {
        let limits = Limits { max_response_tokens: 20, samples_per_prompt: 1 };
        let check = |enable, tokens, expected: f64| {
            let buffer = OverlongBuffer { enable, len: 5, penalty_factor: 2.0 };
            assert_eq!(penalty(&buffer, tokens, limits), expected, "{tokens} tokens");
        };
        check(true, 0, 0.0);
        check(true, 15, 0.0);
        check(true, 16, -0.4);
        check(true, 20, -2.0);
        check(false, 20, 0.0);
    }
}
