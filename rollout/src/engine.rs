//! The engine: one step at a time, plan, forward pass, draw.

use crate::blocks::blocks_for;
use crate::group::TensorGroup;
use crate::sequence::{Asked, Sequence};
use crate::{
    Completion, FinishReason, Limits, Request, RolloutError, Scheduler, SequenceId, StepPlan, StoppedBy, TextSource,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tangelo_configs::{EngineConfig, MixerSpec};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device::{available_memory, gpu_memory};
use tangelo_kernels::op::attention::paged::{BLOCK_TOKENS, LayerShape, PagedSequence};
use tangelo_kernels::op::{self, Draw, Drawn, PagedBatch, PagedKv};
use tangelo_models::{Model, PackContext, Past};
use tch::{Device, Kind, Tensor};

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Samples that are over, in the order of their sequences.
    pub completions: Vec<Completion>,
    /// Tokens computed.
    pub num_computed: usize,
    /// Tokens drawn.
    pub num_drawn: usize,
    /// Sequences whose blocks were taken away.
    pub num_preempted: usize,
    /// Why it did no more.
    pub stopped_by: StoppedBy,
    /// Sequences that run.
    pub num_running: usize,
    /// Sequences that wait.
    pub num_waiting: usize,
    /// Blocks in use.
    pub num_blocks_used: usize,
    /// Blocks in all.
    pub num_blocks: usize,
    /// How long it took.
    pub duration: Duration,
}

/// What an engine has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Steps.
    pub num_steps: u64,
    /// Tokens computed: prompts, tokens drawn before, and both again after a preemption.
    pub num_computed: u64,
    /// Tokens drawn.
    pub num_drawn: u64,
    /// Preemptions.
    pub num_preempted: u64,
    /// Blocks in use at most.
    pub peak_blocks_used: usize,
    /// Time within steps.
    pub duration: Duration,
}

impl EngineStats {
    /// Tokens drawn per second of steps.
    pub fn tokens_per_second(&self) -> f64 {
        self.num_drawn as f64 / self.duration.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// See the crate's page. An engine lives on the thread of its device.
pub struct Engine {
    group: TensorGroup,
    max_num_seqs: usize,
    layers: Vec<LayerShape>,
    kind: Kind,
    device: Device,
    vocab_size: usize,
    /// The model's longest sequence.
    max_len: usize,
    eos_token_ids: Vec<u32>,
    text: Option<TextSource>,
    kv: Option<PagedKv>,
    scheduler: Scheduler,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: SequenceId,
    version: u64,
    stats: EngineStats,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (running, waiting) = (self.scheduler.num_running(), self.scheduler.num_waiting());
        write!(f, "Engine {{ running: {running}, waiting: {waiting}, version: {} }}", self.version)
    }
}

/// Keys and values of a step's sequences.
struct PagedPast<'a> {
    kv: &'a PagedKv,
    batch: &'a PagedBatch,
}

impl Past for PagedPast<'_> {
    fn attend(&mut self, layer: usize, qkv: [&Tensor; 3], scale: f64, window: Option<i64>) -> Tensor {
        self.kv.attend(layer, qkv, self.batch, scale, window)
    }
}

impl Engine {
    /// An engine for models of this shape, with its memory. `eos_token_ids` end samples; `text` is needed by requests with
    /// stop texts alone.
    ///
    /// # Errors
    /// Options that make no sense; no memory; a model that is not whole.
    pub fn new(
        model: &Model,
        config: &EngineConfig,
        eos_token_ids: &[u32],
        text: Option<TextSource>,
    ) -> Result<Engine, RolloutError> {
        Engine::parallel(model, config, eos_token_ids, text, Communicator::single_on(model.device()))
    }

    /// One rank's engine of a model whose parts the ranks of `group` hold, in their order. Every rank of it must make the same
    /// calls with the same requests: [`Engine::parallel`], [`Engine::add`], [`Engine::step`], [`Engine::abort`] and the
    /// others. What one of them was told alone, such as to stop, goes through [`Engine::any`] first.
    ///
    /// # Errors
    /// As [`Engine::new`]; parts that do not make a model; a rank that is lost.
    pub fn parallel(
        model: &Model,
        config: &EngineConfig,
        eos_token_ids: &[u32],
        text: Option<TextSource>,
        group: Communicator,
    ) -> Result<Engine, RolloutError> {
        config.check("rollout")?;
        let group = TensorGroup::new(group, model)?;
        let layers = layer_shapes(model);
        let (kind, device, spec) = (model.kind(), model.device(), model.spec());
        let max_len = spec.max_position_embeddings;
        let num_blocks =
            agreed_blocks(&group, config, PagedKv::bytes_per_block(&layers, kind, device), max_len, device)?;
        let limits =
            Limits { max_num_seqs: config.max_num_seqs, max_num_batched_tokens: config.max_num_batched_tokens };
        let mut engine = Engine {
            group,
            max_num_seqs: config.max_num_seqs,
            layers,
            kind,
            device,
            vocab_size: spec.vocab_size,
            max_len,
            eos_token_ids: eos_token_ids.to_vec(),
            text,
            kv: None,
            scheduler: Scheduler::new(limits, num_blocks),
            sequences: HashMap::new(),
            next_id: 0,
            version: 0,
            stats: EngineStats::default(),
        };
        engine.acquire_kv();
        Ok(engine)
    }

    /// Whether something is so on any rank of the group; every rank must ask at the same place between two steps.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn any(&self, own: bool) -> Result<bool, RolloutError> {
        self.group.any(own)
    }

    /// Takes a request; it is served from the next step on.
    ///
    /// # Errors
    /// A request that could never be served; nothing else changes.
    pub fn add(&mut self, request: Request) -> Result<(), RolloutError> {
        let samples = request.sampling.n;
        let asked = Arc::new(self.check(request)?);
        // More samples than may run at once are several groups, each of which computes the prompt.
        for first in (0..samples).step_by(self.max_num_seqs) {
            let group = (samples - first).min(self.max_num_seqs);
            let sequence = Sequence::new(asked.clone(), first, group - 1, self.text.as_ref());
            let id = self.insert(sequence);
            self.scheduler.add(id, asked.request.prompt.len(), group);
        }
        Ok(())
    }

    /// One step with the model's weights as they are now.
    ///
    /// # Errors
    /// Memory that was given back; logits that are not finite; a tokenizer that fails; a rank of the group that is lost. The
    /// engine is of no use then.
    pub fn step(&mut self, model: &Model) -> Result<StepReport, RolloutError> {
        let started = Instant::now();
        let Some(kv) = self.kv.take() else {
            return Err(RolloutError::Memory(
                "it was given back (release_kv); take it again before the next step".into(),
            ));
        };
        let plan = self.scheduler.plan();
        plan.copies.iter().for_each(|copy| kv.copy_block(copy.from as usize, copy.to as usize));
        let drawn = if plan.work.is_empty() { Ok(Vec::new()) } else { self.compute(model, &kv, &plan) };
        self.kv = Some(kv);
        let drawn = drawn?;
        let num_drawn = drawn.len();
        let blocks = self.scheduler.blocks();
        let used = blocks.num_blocks() - blocks.num_free();
        let completions = self.take_drawn(drawn)?;
        Ok(self.report(&plan, completions, num_drawn, used, started.elapsed()))
    }

    /// Steps until nothing is left to do; samples in the order they end.
    ///
    /// # Errors
    /// See [`Engine::step`].
    pub fn run(&mut self, model: &Model) -> Result<Vec<Completion>, RolloutError> {
        let mut completions = Vec::new();
        while !self.is_idle() {
            completions.extend(self.step(model)?.completions);
        }
        Ok(completions)
    }

    /// Ends a request; what its samples have so far. Nothing where it is unknown, or over.
    pub fn abort(&mut self, request: u64) -> Vec<Completion> {
        let of_request = |(&id, sequence): (&SequenceId, &Sequence)| {
            (sequence.asked.request.id == request).then_some((sequence.sample, id))
        };
        let mut ids: Vec<(usize, SequenceId)> = self.sequences.iter().filter_map(of_request).collect();
        ids.sort_unstable();
        let mut completions = Vec::new();
        for (_, id) in ids {
            self.scheduler.finish(id);
            let sequence = self.sequences.remove(&id).expect("its id was just found");
            // Samples that were not forked off yet have nothing.
            let (asked, unborn) = (sequence.asked.clone(), sequence.sample + 1..=sequence.sample + sequence.forks);
            completions.push(sequence.finish(FinishReason::Abort));
            completions.extend(unborn.map(|i| Sequence::new(asked.clone(), i, 0, None).finish(FinishReason::Abort)));
        }
        completions
    }

    /// The weights have changed: tokens drawn from now on carry `version`. Keys and values of other weights are dropped, so
    /// sequences under way are computed again.
    pub fn set_version(&mut self, version: u64) {
        if version != self.version {
            self.version = version;
            self.scheduler.preempt_all();
        }
    }

    /// Gives the memory of keys and values back to the system; sequences under way will be computed again.
    pub fn release_kv(&mut self) {
        self.scheduler.preempt_all();
        self.kv = None;
    }

    /// Takes it again, if it was given back.
    pub fn acquire_kv(&mut self) {
        if self.kv.is_none() {
            self.kv = Some(PagedKv::new(&self.layers, self.num_blocks(), self.kind, self.device));
        }
    }

    /// Bytes of keys and values that are held now.
    pub fn kv_bytes(&self) -> usize {
        let held = self.kv.as_ref().map_or(0, PagedKv::num_blocks);
        held * PagedKv::bytes_per_block(&self.layers, self.kind, self.device)
    }

    /// Blocks of 64 tokens that there is memory for.
    pub fn num_blocks(&self) -> usize {
        self.scheduler.blocks().num_blocks()
    }

    /// Those that no sequence has.
    pub fn free_blocks(&self) -> usize {
        self.scheduler.blocks().num_free()
    }

    /// Whether every request is over.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// What it has done so far.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    fn check(&self, request: Request) -> Result<Asked, RolloutError> {
        let refuse = |detail: String| Err(RolloutError::Request { request: request.id, detail });
        request.sampling.check("sampling")?;
        if self.sequences.values().any(|sequence| sequence.asked.request.id == request.id) {
            return refuse("another request under way has this id".into());
        }
        let (length, sampling) = (request.prompt.len(), &request.sampling);
        if length == 0 || length >= self.max_len {
            return refuse(format!(
                "the prompt has {length} tokens; the model takes 1 to {} with room for one more",
                self.max_len - 1
            ));
        }
        let ids = request.prompt.iter().chain(&sampling.stop_token_ids).chain(&self.eos_token_ids);
        if let Some(id) = ids.copied().find(|&id| id as usize >= self.vocab_size) {
            return refuse(format!("token {id} is outside the vocabulary of {}", self.vocab_size));
        }
        if !sampling.stop.is_empty() && self.text.is_none() {
            return refuse("stop texts need a tokenizer, and this engine has none; use `stop_token_ids`".into());
        }
        let max_len = length.saturating_add(sampling.max_tokens).min(self.max_len);
        if !self.scheduler.fits(max_len) {
            return refuse(format!(
                "{max_len} tokens need {} blocks of keys and values, there is memory for {}; raise `kv_memory_mib` or \
                 lower `max_tokens`",
                blocks_for(max_len),
                self.num_blocks()
            ));
        }
        let eos = self.eos_token_ids.iter().filter(|_| !sampling.ignore_eos);
        let mut stop_ids: Vec<i64> = eos.chain(&sampling.stop_token_ids).map(|&id| i64::from(id)).collect();
        stop_ids.sort_unstable();
        stop_ids.dedup();
        Ok(Asked { request, stop_ids, max_len })
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// The forward pass over all of the step's tokens, and the tokens drawn from it.
    fn compute(
        &mut self,
        model: &Model,
        kv: &PagedKv,
        plan: &StepPlan,
    ) -> Result<Vec<(SequenceId, Drawn)>, RolloutError> {
        let (mut tokens, mut positions, mut rows, mut up_to_date) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut batch = PagedBatch::default();
        for work in &plan.work {
            let (first_row, end) = (tokens.len(), work.start + work.num_tokens);
            let place = PagedSequence {
                first_row,
                num_rows: work.num_tokens,
                offset: work.start,
                first_block: batch.tables.len(),
            };
            batch.sequences.push(place);
            batch.tables.extend(self.scheduler.table(work.id).iter().map(|&block| block as i32));
            tokens.extend_from_slice(&self.sequences[&work.id].tokens[work.start..end]);
            positions.extend(work.start as u32..end as u32);
            if work.up_to_date {
                rows.push(tokens.len() as i64 - 1);
                up_to_date.push(work.id);
            }
        }
        let pack = PackContext::part(&tokens, &positions, Vec::new(), self.device);
        let mut past = PagedPast { kv, batch: &batch };
        let hidden = model.hidden_after(&pack, &mut past, &rows, self.group.comm())?;
        self.draw(model, &hidden, &up_to_date)
    }

    /// Draws a token for each sequence from its row of `hidden`, and for each sample that is forked off now.
    fn draw(
        &mut self,
        model: &Model,
        hidden: &Tensor,
        ids: &[SequenceId],
    ) -> Result<Vec<(SequenceId, Drawn)>, RolloutError> {
        let mut rows: Vec<(SequenceId, usize)> = Vec::new();
        for (row, &id) in ids.iter().enumerate() {
            rows.push((id, row));
            rows.extend(self.fork(id).into_iter().map(|child| (child, row)));
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let sequences = &self.sequences;
        let draws: Vec<Draw<'_>> = rows.iter().map(|&(id, row)| draw_of(&sequences[&id], row)).collect();
        let drawn = self.group.draw(hidden, &model.head().weight.value, &draws)?;
        Ok(rows.into_iter().map(|(id, _)| id).zip(drawn).collect())
    }

    /// Forks the other samples of a prompt off, now that it is computed.
    fn fork(&mut self, id: SequenceId) -> Vec<SequenceId> {
        let parent = self.sequences.get_mut(&id).expect("the scheduler knows no others");
        let samples = parent.sample + 1..parent.sample + 1 + std::mem::take(&mut parent.forks);
        let asked = parent.asked.clone();
        let child = |sample| {
            let child = self.insert(Sequence::new(asked.clone(), sample, 0, self.text.as_ref()));
            self.scheduler.fork(id, child);
            child
        };
        samples.map(child).collect()
    }

    fn take_drawn(&mut self, drawn: Vec<(SequenceId, Drawn)>) -> Result<Vec<Completion>, RolloutError> {
        let mut completions = Vec::new();
        for (id, drawn) in drawn {
            let sequence = self.sequences.get_mut(&id).expect("a token was drawn for it");
            if let Some(reason) = sequence.push(drawn, self.version)? {
                self.scheduler.finish(id);
                let sequence = self.sequences.remove(&id).expect("it was just there");
                completions.push(sequence.finish(reason));
            } else {
                self.scheduler.append(id);
            }
        }
        Ok(completions)
    }

    fn report(
        &mut self,
        plan: &StepPlan,
        completions: Vec<Completion>,
        num_drawn: usize,
        num_blocks_used: usize,
        duration: Duration,
    ) -> StepReport {
        let num_computed = plan.work.iter().map(|work| work.num_tokens).sum();
        let stats = &mut self.stats;
        stats.num_steps += 1;
        stats.num_computed += num_computed as u64;
        stats.num_drawn += num_drawn as u64;
        stats.num_preempted += plan.preempted.len() as u64;
        stats.peak_blocks_used = stats.peak_blocks_used.max(num_blocks_used);
        stats.duration += duration;
        StepReport {
            completions,
            num_computed,
            num_drawn,
            num_preempted: plan.preempted.len(),
            stopped_by: plan.stopped_by,
            num_running: self.scheduler.num_running(),
            num_waiting: self.scheduler.num_waiting(),
            num_blocks_used,
            num_blocks: self.num_blocks(),
            duration,
        }
    }
}

fn draw_of(sequence: &Sequence, row: usize) -> Draw<'_> {
    let request = &sequence.asked.request;
    let sampling = &request.sampling;
    Draw {
        row,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        key: op::draw_key(request.seed, sequence.sample as u64, sequence.tokens.len() as u64),
        banned: sequence.banned(),
    }
}

/// Keys and values of each layer, as far as this rank holds them.
fn layer_shapes(model: &Model) -> Vec<LayerShape> {
    let shape = |layer: usize| {
        let MixerSpec::Attention(a) = &model.block_shape(layer).spec().mixer;
        LayerShape { num_kv_heads: a.num_kv_heads, head_dim: a.head_dim }
    };
    model.layers().map(shape).collect()
}

/// Blocks that every rank of the group has memory for: schedules are functions of it.
fn agreed_blocks(
    group: &TensorGroup,
    config: &EngineConfig,
    block_bytes: usize,
    max_len: usize,
    device: Device,
) -> Result<usize, RolloutError> {
    let own = num_blocks(config, block_bytes, max_len, device);
    let least = group.least(*own.as_ref().unwrap_or(&0))?;
    match (own?, least) {
        (_, 0) => {
            Err(RolloutError::Memory("another rank of the group has none for keys and values; see its log".into()))
        }
        _ => Ok(least),
    }
}

fn num_blocks(
    config: &EngineConfig,
    block_bytes: usize,
    max_len: usize,
    device: Device,
) -> Result<usize, RolloutError> {
    let free = || match device {
        Device::Cpu => available_memory(),
        // What libtorch keeps for new tensors can be had too.
        gpu => gpu_memory(gpu).map(|gpu| gpu.free_bytes + gpu.reserved_bytes.saturating_sub(gpu.allocated_bytes)),
    };
    let bytes = match config.kv_memory_mib {
        0 => (free().unwrap_or(0) as f64 * config.kv_memory_fraction) as usize,
        mib => mib.saturating_mul(1 << 20),
    };
    let most = config.max_num_seqs.saturating_mul(blocks_for(max_len));
    match (bytes / block_bytes).min(most).min(i32::MAX as usize) {
        0 => Err(RolloutError::Memory(format!(
            "{bytes} bytes hold no block of {BLOCK_TOKENS} tokens, which takes {block_bytes}; raise `rollout.engine.kv_memory_mib`"
        ))),
        blocks => Ok(blocks),
    }
}
