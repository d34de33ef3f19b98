//! Evaluation on held-out documents, and samples of what the model writes.

use super::recorder::Recorder;
use super::setup::{self, data_error};
use crate::checkpoint::TrainState;
use crate::error::Result;
use crate::process::RankInfo;
use crate::sample::Sampler;
use crate::verb::{self, generate};
use crate::worker::TrainWorker;
use std::time::{Duration, Instant};
use tangelo_configs::Plan;
use tangelo_configs::job::JobType;
use tangelo_core::LossSpec;
use tangelo_data::Loader;
use tangelo_formats::tokenizer::TokenizerAssets;

/// The held-out data and when to look at it.
pub struct Evaluation {
    freq: u64,
    last_step: u64,
    active: Option<HeldOut>,
    /// Rank 0 only, where samples are wanted.
    samples: Option<Samples>,
    /// Every rank, where samples are wanted: deadlines of a step and of waiting for the samples.
    deadlines: Option<[Duration; 2]>,
}

struct HeldOut {
    loader: Loader,
    num_batches: u64,
    global_batch_size: u64,
}

struct Samples {
    tokenizer: TokenizerAssets,
    /// Whether a prompt is the user's message, to which the model answers; else it goes on with the text.
    chat: bool,
    prompts: Vec<String>,
    num_tokens: usize,
}

impl Evaluation {
    /// Evaluates on `held_out`, where there is any.
    pub fn new(plan: &Plan, info: &RankInfo, held_out: Option<Loader>) -> Result<Evaluation> {
        let v = &plan.config.validation;
        let active = held_out.map(|loader| {
            let all = loader.num_samples().div_ceil(plan.global_batch_size as u64).max(1);
            let num_batches = u64::try_from(v.steps).map_or(all, |n| n.min(all));
            HeldOut { loader, num_batches, global_batch_size: plan.global_batch_size as u64 }
        });
        let wanted = v.enable && v.sample_tokens > 0 && !v.prompts.is_empty();
        let comm = &plan.config.comm;
        let deadlines = [comm.train_timeout_seconds, comm.init_timeout_seconds.max(3600)].map(Duration::from_secs);
        let samples = (wanted && info.rank == 0).then(|| -> Result<Samples> {
            let tokenizer = setup::job_tokenizer(plan)?;
            let chat = plan.config.job.kind == JobType::Sft && tokenizer.chat_template.is_some();
            Ok(Samples { tokenizer, chat, prompts: v.prompts.clone(), num_tokens: v.sample_tokens })
        });
        let last_step = plan.config.training.steps as u64;
        Ok(Evaluation {
            freq: v.freq.max(1) as u64,
            last_step,
            active,
            samples: samples.transpose()?,
            deadlines: wanted.then_some(deadlines),
        })
    }

    /// Whether to evaluate after `step`.
    pub fn due(&self, step: u64) -> bool {
        self.active.is_some() && (step.is_multiple_of(self.freq) || step == self.last_step)
    }

    /// Evaluates on every rank; rank 0 also samples.
    pub fn run(
        &mut self,
        worker: &TrainWorker,
        state: &TrainState,
        loss: &LossSpec,
        recorder: &mut Recorder,
    ) -> Result<()> {
        let Some(held_out) = &self.active else { return Ok(()) };
        let start = Instant::now();
        let batches = (0..held_out.num_batches)
            .map(|i| held_out.loader.batch_at(i * held_out.global_batch_size).map_err(data_error));
        let mean = worker.evaluate(batches, loss)?;
        recorder.evaluated(state.step, mean, start.elapsed());
        let Some([short, long]) = self.deadlines else { return Ok(()) };
        if let Some(samples) = &self.samples
            && let Err(e) = samples.write(worker, state.step, recorder)
        {
            recorder.warn(state.step, &format!("no samples: {e}"));
        }
        // Rank 0 may write for longer than a rank may wait in a step: the others wait for it here.
        worker.wait_for_all(long, short)
    }
}

impl Samples {
    fn write(&self, worker: &TrainWorker, step: u64, recorder: &mut Recorder) -> Result<()> {
        let model = worker.model();
        let sampler = Sampler { temperature: 0.8, top_k: 0, top_p: 0.95, seed: step };
        let stop_ids = generate::stop_ids(model, Some(&self.tokenizer));
        let options = generate::Options { sampler, max_new_tokens: self.num_tokens, stop_ids, cache: true };
        for prompt in &self.prompts {
            let ids = match self.chat {
                true => generate::chat_prompt(&self.tokenizer, prompt)?,
                false => verb::encode(&self.tokenizer, prompt)?,
            };
            let mut written = Vec::new();
            generate::generate(model, &ids, &options, |token| {
                written.push(token.id);
                Ok(())
            })?;
            let text = self.tokenizer.tokenizer.decode(&written, true).unwrap_or_default();
            recorder.sample(step, prompt, &text);
        }
        Ok(())
    }
}
