//! Memory of a rank of every pool, role by role.
//!
//! Roles of a pool take turns: what each keeps adds up, of what comes and goes the largest counts. With e bytes per element:
//!
//! | role | stays | comes and goes |
//! |---|---|---|
//! | policy, critic | weights, gradients, master weights, states as in pre-training ([`mod@crate::memory`]) | the update of as many tokens as are computed at once, with the head's distribution (or values) instead of cross-entropy; on a CPU the copy from which a checkpoint is written |
//! | reference, reward model | weights | scoring: one block's activations, the head |
//! | rollout | weights that it does not read where the policy trains them | a bucket of weights on their way; keys and values of the answers under way; a step of the engine |
//!
//! Keys and values stay where generation has a pool of its own. They are counted for the answers that are under way at once,
//! as long as they may be: what is reserved beyond that is touched by nobody on a CPU. The copy of a checkpoint is made when
//! nothing else goes on, yet it adds to the peak: a process keeps what it frees for the next step, and blocks of other sizes
//! do not fit into it (measured, docs/LOG.md).

use super::{Batches, update_plan};
use crate::memory::{Memory, forward_bytes, predict_update};
use crate::publish::{GenerationLayout, Publish};
use crate::table::{Align, Table, bytes};
use tangelo_configs::job::{ComputeType, DeviceChoice};
use tangelo_configs::{JobPlan, MixerSpec, ModelSpec, Plan, Role};
use tangelo_core::reshard::Ranks;
use tangelo_core::{DType, Group};

/// Tokens of a block of keys and values.
const KV_BLOCK_TOKENS: usize = 64;

/// One thing that takes memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What.
    pub name: &'static str,
    /// Bytes on the rank with the most.
    pub num_bytes: u64,
    /// The arithmetic.
    pub how: String,
    /// Whether it is there all the time.
    pub stays: bool,
}

/// What a role takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleMemory {
    /// The role.
    pub role: Role,
    /// Its items.
    pub items: Vec<Item>,
}

/// A rank of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolMemory {
    /// The pool.
    pub pool: String,
    /// The roles that live there.
    pub roles: Vec<RoleMemory>,
}

impl PoolMemory {
    fn items(&self) -> impl Iterator<Item = &Item> {
        self.roles.iter().flat_map(|role| &role.items)
    }

    /// What is there all the time.
    pub fn stays(&self) -> u64 {
        self.items().filter(|item| item.stays).map(|item| item.num_bytes).sum()
    }

    /// The largest of what comes and goes, and the largest copy beside it.
    pub fn comes_and_goes(&self) -> u64 {
        let of = |role: &RoleMemory, name: &str| {
            let going = role.items.iter().filter(|item| !item.stays && item.name == name);
            going.map(|item| item.num_bytes).sum::<u64>()
        };
        // Weights arrive before generation starts; keys, values and a step are there together.
        let at_work = |role: &RoleMemory| {
            let generation = of(role, KEYS_AND_VALUES) + of(role, ENGINE_STEP);
            of(role, UPDATE).max(of(role, SCORING)).max(of(role, ON_THEIR_WAY)).max(generation)
        };
        let most = |bytes: &dyn Fn(&RoleMemory) -> u64| self.roles.iter().map(bytes).max().unwrap_or(0);
        most(&at_work) + most(&|role| of(role, COPY))
    }

    /// The most at once.
    pub fn peak(&self) -> u64 {
        self.stays() + self.comes_and_goes()
    }
}

const ON_THEIR_WAY: &str = "weights on their way";
const KEYS_AND_VALUES: &str = "keys and values";
const ENGINE_STEP: &str = "engine step";
const UPDATE: &str = "update";
const SCORING: &str = "scoring";
const COPY: &str = "checkpoint copy";

/// Every pool that has a role, in the order of their ranks.
pub fn pools(job: &JobPlan) -> Vec<PoolMemory> {
    let mut found: Vec<PoolMemory> = Vec::new();
    let mut roles = job.roles();
    roles.sort_by_key(|&role| (job.ranks(role).start, role));
    for role in roles {
        let (pool, memory) = (job.pool(role), of_role(job, role));
        match found.iter_mut().find(|known| known.pool == pool) {
            Some(known) => known.roles.push(memory),
            None => found.push(PoolMemory { pool, roles: vec![memory] }),
        }
    }
    found
}

fn of_role(job: &JobPlan, role: Role) -> RoleMemory {
    let items = match (role, update_plan(job, role)) {
        (Role::Policy | Role::Critic, Some(plan)) => learning(&plan),
        (Role::Reference | Role::Reward, Some(plan)) => frozen(&plan),
        (_, None) | (Role::Rollout, _) => generating(job),
    };
    RoleMemory { role, items: items.into_iter().filter(|item| item.num_bytes > 0).collect() }
}

fn item(name: &'static str, num_bytes: u64, how: String, stays: bool) -> Item {
    Item { name, num_bytes, how, stays }
}

/// Tokens of a micro-batch.
fn tokens_of(plan: &Plan) -> usize {
    plan.config.training.local_batch_size * plan.config.training.seq_len
}

fn learning(plan: &Plan) -> Vec<Item> {
    let m: Memory = predict_update(plan);
    let (tokens, e) = (tokens_of(plan), plan.compute_dtype().size_bytes());
    let scopes = plan.topology.scopes;
    let over = |ranks: usize| if ranks == 1 { String::new() } else { format!(", over {ranks} ranks") };
    let copy = if m.on_host { m.checkpoint_copy } else { 0 };
    let update = format!(
        "{tokens} tokens at once: activations {}, head and loss {}, backward of a block {}",
        bytes(m.activations),
        bytes(m.loss),
        bytes(m.backward)
    );
    vec![
        item("weights", m.parameters, format!("{e} B each{}", over(scopes.parameters)), true),
        item("gradients", m.gradients, format!("4 B each{}", over(scopes.gradients)), true),
        item("master weights", m.master_weights, format!("4 B each{}", over(scopes.states)), true),
        item("optimizer states", m.optimizer_states, format!("8 B each{}", over(scopes.states)), true),
        item(UPDATE, m.transient(), update, false),
        item(COPY, copy, "12 B of each owned; beside the rest, for freed memory is kept".into(), false),
    ]
}

fn frozen(plan: &Plan) -> Vec<Item> {
    let m: Memory = predict_update(plan);
    let (tokens, e) = (tokens_of(plan), plan.compute_dtype().size_bytes());
    vec![
        item("weights", m.parameters, format!("{e} B each, never learns"), true),
        item(SCORING, forward_bytes(plan) + m.whole_blocks, format!("{tokens} tokens at once, nothing kept"), false),
    ]
}

/// How the policy's weights reach the ranks that generate.
struct Transition {
    /// Of the fullest rank.
    copied: u64,
    /// Read where the policy trains them, on that rank.
    in_place: u64,
    /// The largest that travels at once.
    bucket: u64,
}

fn generating(job: &JobPlan) -> Vec<Item> {
    let alone = Role::ALL
        .into_iter()
        .all(|role| role == Role::Rollout || !job.has(role) || !job.shares_pool(role, Role::Rollout));
    let weights = match transition(job) {
        Some(way) => vec![
            item(
                "weights",
                way.copied,
                format!("a copy; {} are read where the policy trains them", bytes(way.in_place)),
                true,
            ),
            item(ON_THEIR_WAY, way.bucket, "a bucket of rollout.update_weights_bucket_mb".into(), false),
        ],
        None => Vec::new(),
    };
    let under_way = under_way(job);
    let longest = Batches::of(job).longest_row + 1;
    let step = job.rollout().engine.max_num_batched_tokens.min(under_way * longest);
    let mut plan = job.policy.clone();
    plan.config.training.local_batch_size = 1;
    plan.config.training.seq_len = step.max(1);
    plan.config.training.mixed_precision_param = job.rollout_dtype();
    let vocabulary = job.policy.model.vocab_size;
    let (e, rows) = (element(job), under_way as u64);
    let drawing = rows * vocabulary as u64 * (e + 4);
    let mut items = weights;
    items.push(item(KEYS_AND_VALUES, keys_and_values(job, under_way), kv_note(job, under_way, longest), alone));
    items.push(item(
        ENGINE_STEP,
        forward_bytes(&plan).max(drawing),
        format!("up to {step} tokens, or {under_way} x {vocabulary} logits to draw from"),
        false,
    ));
    items
}

fn element(job: &JobPlan) -> u64 {
    if job.rollout_dtype() == ComputeType::Bfloat16 { 2 } else { 4 }
}

/// Answers that a rank generates at once.
fn under_way(job: &JobPlan) -> usize {
    let replicas = job.generation_replicas();
    let (batches, validation) = (Batches::of(job), job.rlhf().validation.n * job.prompts().validation_size);
    let most = (batches.prompts.div_ceil(replicas) * batches.samples).max(validation.div_ceil(replicas));
    most.min(job.rollout().engine.max_num_seqs)
}

fn keys_and_values(job: &JobPlan, under_way: usize) -> u64 {
    let tokens = (Batches::of(job).longest_row + 1).next_multiple_of(KV_BLOCK_TOKENS);
    let needed = (under_way * tokens) as u64 * bytes_per_token(&job.policy.model, element(job));
    let tensor = job.rollout().tensor_parallel_degree.max(1) as u64;
    let room = match job.rollout().engine.kv_memory_mib {
        0 => u64::MAX,
        mib => (mib as u64) << 20,
    };
    let reserved = job.policy.config.training.device == DeviceChoice::Cuda && room < u64::MAX;
    if reserved { room } else { (needed / tensor).min(room) }
}

fn bytes_per_token(model: &ModelSpec, e: u64) -> u64 {
    let of_block = |MixerSpec::Attention(a): &MixerSpec| 2 * e * (a.num_kv_heads * a.head_dim) as u64;
    model.blocks.iter().map(|block| of_block(&block.mixer)).sum()
}

fn kv_note(job: &JobPlan, under_way: usize, longest: usize) -> String {
    let limit = match job.rollout().engine.kv_memory_mib {
        0 => format!("room for {} % of what is free then", job.rollout().engine.kv_memory_fraction * 100.0),
        mib => format!("room for {mib} MiB"),
    };
    format!("{under_way} answers at once x {longest} tokens; {limit}")
}

/// `None` where the ranks cannot generate as asked, which the job is refused for elsewhere.
fn transition(job: &JobPlan) -> Option<Transition> {
    let (policy, same) = (&job.policy, job.shares_pool(Role::Policy, Role::Rollout));
    let tp = job.rollout().tensor_parallel_degree;
    let layout = match same {
        true => GenerationLayout::colocated(&policy.topology, tp),
        false => GenerationLayout::separate(job.ranks(Role::Rollout).len(), tp),
    };
    let layout = layout.ok()?;
    layout.check(&policy.model).ok()?;
    let e = element(job);
    let bucket = (job.rollout().update_weights_bucket_mb << 20) / e as usize;
    let ranks = if same { Ranks::Same } else { Ranks::Separate };
    let way = Publish::new(&policy.model, &policy.sharding(), &layout, ranks, bucket).ok()?;
    let lent = |rank: usize| if same { e * lent(job, &layout, rank) } else { 0 };
    let of_rank = |rank: usize| (e * way.needed(rank) as u64 - lent(rank), lent(rank), way.received(rank));
    let (copied, in_place, _) = (0..layout.num_ranks()).map(of_rank).max()?;
    let moved = (0..layout.num_ranks()).map(|rank| way.received(rank).max(way.sent(rank))).max()? as u64;
    Some(Transition { copied, in_place, bucket: e * moved.min(bucket as u64) })
}

/// Elements of units that a rank trains exactly as it generates with them, in the same type.
fn lent(job: &JobPlan, layout: &GenerationLayout, rank: usize) -> u64 {
    let (policy, model) = (&job.policy, &job.policy.model);
    let same_type = (element(job) == 2) == (policy.compute_dtype() == DType::BF16);
    if !same_type || policy.topology.size(Group::Parameters) > 1 {
        return 0;
    }
    let (training, generation) = (policy.sharding(), layout.sharding(model));
    let part = layout.part(rank);
    let of_unit = |unit| {
        let metas = training.parameters(model, unit, DType::F32);
        let same = metas.iter().all(|meta| training.model_box(meta, rank) == generation.model_box(meta, part));
        if same { metas.iter().map(|meta| generation.model_box(meta, part).volume() as u64).sum() } else { 0 }
    };
    training.units(policy.topology.stage(rank)).into_iter().map(of_unit).sum::<u64>()
}

/// Every pool as a table.
pub(super) fn render(job: &JobPlan) -> String {
    pools(job).iter().map(|pool| render_pool(pool, job)).collect::<Vec<_>>().join("\n")
}

fn render_pool(pool: &PoolMemory, job: &JobPlan) -> String {
    use Align::{Left, Right};
    let ranks = job.ranks(pool.roles[0].role).len();
    let heading = format!("rank of pool {} ({ranks})", pool.pool);
    let mut table =
        Table::new(&[(heading.as_str(), Left), ("", Left), ("stays", Right), ("comes and goes", Right), ("", Left)]);
    for role in &pool.roles {
        for (index, item) in role.items.iter().enumerate() {
            let name = if index == 0 { role.role.name().to_owned() } else { String::new() };
            let [stays, goes] = match item.stays {
                true => [bytes(item.num_bytes), String::new()],
                false => [String::new(), bytes(item.num_bytes)],
            };
            table.row([name, item.name.into(), stays, goes, item.how.clone()]);
        }
    }
    let (stays, goes) = (pool.stays(), pool.comes_and_goes());
    table.row(["peak".into(), bytes(stays + goes), bytes(stays), bytes(goes), "roles of a pool take turns".into()]);
    table.render()
}
