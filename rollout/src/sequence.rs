//! One sample under way: its tokens, and when it is over.

use crate::stop::{StopText, TextSource};
use crate::{Completion, FinishReason, Request, RolloutError};
use std::sync::Arc;
use tangelo_kernels::op::Drawn;

/// What all samples of a request share.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) request: Request,
    /// Tokens that end a sample.
    pub(crate) stop_ids: Vec<i64>,
    /// Tokens, the prompt included, that a sample has at most.
    pub(crate) max_len: usize,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) asked: Arc<Asked>,
    /// Which sample it is, and, until the first token is drawn, of how many.
    pub(crate) sample: usize,
    pub(crate) forks: usize,
    /// The prompt, then what was drawn.
    pub(crate) tokens: Vec<u32>,
    logprobs: Vec<f32>,
    sampling_logprobs: Vec<f32>,
    versions: Vec<u64>,
    stop: Option<StopText>,
}

impl Sequence {
    /// Sample `sample` and the `forks` after it.
    pub(crate) fn new(asked: Arc<Asked>, sample: usize, forks: usize, text: Option<&TextSource>) -> Sequence {
        let tokens = asked.request.prompt.clone();
        let stops = &asked.request.sampling.stop;
        let stop = text.filter(|_| !stops.is_empty()).map(|text| StopText::new(text(), stops));
        let (logprobs, sampling_logprobs, versions) = (Vec::new(), Vec::new(), Vec::new());
        Sequence { asked, sample, forks, tokens, logprobs, sampling_logprobs, versions, stop }
    }

    pub(crate) fn num_drawn(&self) -> usize {
        self.versions.len()
    }

    /// Tokens that may not be drawn next.
    pub(crate) fn banned(&self) -> &[i64] {
        if self.num_drawn() < self.asked.request.sampling.min_tokens { &self.asked.stop_ids } else { &[] }
    }

    /// Takes a token; the reason where it ends the sample.
    pub(crate) fn push(&mut self, drawn: Drawn, version: u64) -> Result<Option<FinishReason>, RolloutError> {
        if !drawn.logprob.is_finite() {
            let (request, sample, position) = (self.asked.request.id, self.sample, self.tokens.len());
            return Err(RolloutError::NotFinite { request, sample, position, version });
        }
        self.tokens.push(drawn.token);
        self.logprobs.push(drawn.logprob);
        self.sampling_logprobs.push(drawn.sampling_logprob);
        self.versions.push(version);
        let in_text = self.stop.as_mut().map_or(Ok(false), |stop| stop.push(drawn.token))?;
        let may_stop = self.num_drawn() >= self.asked.request.sampling.min_tokens;
        if may_stop && (in_text || self.asked.stop_ids.contains(&i64::from(drawn.token))) {
            return Ok(Some(FinishReason::Stop));
        }
        Ok((self.tokens.len() >= self.asked.max_len).then_some(FinishReason::Length))
    }

    pub(crate) fn finish(mut self, finish_reason: FinishReason) -> Completion {
        Completion {
            request: self.asked.request.id,
            index: self.sample,
            ids: self.tokens.split_off(self.asked.request.prompt.len()),
            logprobs: self.logprobs,
            sampling_logprobs: self.sampling_logprobs,
            versions: self.versions,
            finish_reason,
        }
    }
}
