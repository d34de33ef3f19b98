//! The arithmetic of a step: prompts, answers, mini-batches, updates, tokens at once.

use crate::table::{Align, Table, count};
use tangelo_configs::{JobPlan, Role};

/// Numbers of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batches {
    /// Prompts of a step.
    pub prompts: usize,
    /// Answers to each.
    pub samples: usize,
    /// Prompts of a mini-batch, from each of which one update follows.
    pub mini_batch: usize,
    /// Times that a step's answers are learnt from.
    pub epochs: usize,
    /// Tokens of the longest row: a prompt and its answer, less the last token.
    pub longest_row: usize,
    /// Tokens that a rank may compute with at once; a longer row is alone.
    pub budget: usize,
}

impl Batches {
    /// Of a job.
    pub fn of(job: &JobPlan) -> Batches {
        let (rlhf, sampling) = (job.rlhf(), &job.rollout().sampling);
        let mini_batch = match rlhf.ppo_mini_batch_size {
            0 => rlhf.train_batch_size,
            prompts => prompts,
        };
        Batches {
            prompts: rlhf.train_batch_size,
            samples: sampling.n,
            mini_batch,
            epochs: rlhf.ppo_epochs,
            longest_row: (job.prompts().max_prompt_length + sampling.max_tokens).saturating_sub(1).max(1),
            budget: rlhf.ppo_max_token_len_per_rank,
        }
    }

    /// Answers of a step.
    pub fn answers(&self) -> usize {
        self.prompts * self.samples
    }

    /// Mini-batches of an epoch.
    pub fn mini_batches(&self) -> usize {
        self.prompts.div_ceil(self.mini_batch.max(1))
    }

    /// Updates of a step.
    pub fn updates(&self) -> usize {
        self.mini_batches() * self.epochs
    }

    /// Answers of a mini-batch on the rank with the most: groups are never split.
    pub fn answers_of_rank(&self, data_parallel: usize) -> usize {
        self.mini_batch.div_ceil(data_parallel.max(1)) * self.samples
    }

    /// The most rows that a rank computes with at once, where every one is as long as it may be.
    pub fn rows_at_once(&self, data_parallel: usize) -> usize {
        (self.budget / self.longest_row).max(1).min(self.answers_of_rank(data_parallel))
    }

    /// The tokens of these.
    pub fn tokens_at_once(&self, data_parallel: usize) -> usize {
        self.rows_at_once(data_parallel) * self.longest_row
    }

    /// Micro-batches of a mini-batch then.
    pub fn micro_batches(&self, data_parallel: usize) -> usize {
        self.answers_of_rank(data_parallel).div_ceil(self.rows_at_once(data_parallel))
    }

    /// As a table.
    pub fn render(&self, job: &JobPlan) -> String {
        use Align::{Left, Right};
        let (sampling, prompts) = (&job.rollout().sampling, job.prompts());
        let data_parallel = job.policy.data_parallel_size;
        let steps = job.policy.config.training.steps;
        let mut table = Table::new(&[("of a step", Left), ("", Right), ("", Left)]);
        let mut row = |name: &str, n: usize, how: String| table.row([name.into(), n.to_string(), how]);
        row("prompts", self.prompts, "rlhf.train_batch_size".into());
        row("answers", self.answers(), format!("{} prompts x {} rollout.sampling.n", self.prompts, self.samples));
        let mini = self.mini_batch;
        row("mini-batches", self.mini_batches(), format!("{mini} prompts each, {} answers", mini * self.samples));
        row("updates", self.updates(), format!("mini-batches x {} rlhf.ppo_epochs", self.epochs));
        let share = format!("of a mini-batch, whole groups over {data_parallel} data-parallel part(s) of the policy");
        row("answers of a rank", self.answers_of_rank(data_parallel), share);
        let (prompt, answer) = (prompts.max_prompt_length, sampling.max_tokens);
        row("tokens of a row", self.longest_row, format!("at most: {prompt} of a prompt + {answer} of an answer - 1"));
        let budget = format!("at most, of {} rlhf.ppo_max_token_len_per_rank", self.budget);
        row("tokens at once", self.tokens_at_once(data_parallel), budget);
        row("micro-batches", self.micro_batches(data_parallel), "of a mini-batch, where every row is that long".into());
        format!("{}\n{}{}", table.render(), self.of_run(steps), notes(job))
    }

    fn of_run(&self, steps: usize) -> String {
        let [prompts, answers, updates] =
            [self.prompts, self.answers(), self.updates()].map(|n| count(n as f64 * steps as f64));
        format!("{steps} steps: {prompts} prompts, {answers} answers, {updates} updates\n")
    }
}

/// Where the log-probabilities before the update come from, and who validates.
fn notes(job: &JobPlan) -> String {
    let old = match (job.trusts_engine(), job.engine_is_exact()) {
        (true, Ok(())) => "the engine's, which are the trainer's to the bit".to_owned(),
        (true, Err(reason)) => format!("the engine's, as rlhf.old_logprobs says, although {reason}"),
        (false, Ok(())) => "from a pass of their own, as rlhf.old_logprobs says".to_owned(),
        (false, Err(reason)) => format!("from a pass of their own: {reason}"),
    };
    let (prompts, every) = (job.prompts(), job.rlhf().test_freq);
    let has_any = prompts.validation_size > 0 || !prompts.validation_files.is_empty();
    let often = if every == 0 { "before and after".to_owned() } else { format!("before, every {every} steps, after") };
    let validation = match has_any {
        true => format!("{often}, {} answer(s) to each prompt of the set", job.rlhf().validation.n),
        false => "none: neither prompts.validation_files nor prompts.validation_size".to_owned(),
    };
    let kl = if job.has(Role::Reference) { "against the reference" } else { "none" };
    format!("log-probabilities before the update: {old}\nKL: {kl}\nvalidation: {validation}\n")
}
