//! The report of `tangelo check` on `rlhf` jobs, and the sizes behind it.

use crate::{Tokenizer, machine};
use expect_test::{Expect, expect};
use tangelo_configs::resolve::load_str;
use tangelo_configs::{JobPlan, Role};
use tangelo_planner::memory;
use tangelo_planner::rlhf::{Batches, PoolMemory, pools, render, update_plan};

/// 1.8 M parameters; rows of 64 + 16 - 1 tokens.
const JOB: &str = r#"
[job]
type = "rlhf"
[model]
flavor = "debugmodel"
[data]
tokenizer = "t.json"
[training]
seq_len = 96
steps = 50
device = "cpu"
mixed_precision_param = "float32"
[rlhf]
train_batch_size = 8
ppo_mini_batch_size = 4
ppo_max_token_len_per_rank = 512
[rollout.sampling]
n = 4
max_tokens = 16
[prompts]
generator = { type = "arithmetic" }
max_prompt_length = 64
validation_size = 16
[[reward.parts]]
type = "numeric"
"#;

fn job(ranks: usize, sets: &[&str]) -> JobPlan {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    JobPlan::resolve(load_str(JOB, "job.toml", &sets).unwrap(), &machine(ranks, ranks, false), &Tokenizer(1000))
        .unwrap()
}

fn check(ranks: usize, sets: &[&str], expected: Expect) {
    let report = render(&job(ranks, sets));
    let (_, tables) = report.split_once("# ---- roles").unwrap();
    expected.assert_eq(tables.trim_start_matches(['-', ' ', '\n']));
}

#[test]
fn the_report_of_a_small_job() {
    check(
        2,
        &[],
        expect![[r#"
        role     pool  ranks  layout                           parameters
        policy   all   0-1    shard 2, states over 2, float32      1.77 M  learns with lr 1e-6; starts from the seed
        rollout  all   0-1    2 x tensor parallel 1, float32       1.77 M  generates 4 answers to a prompt with the policy's weights

        # ---- batches -----------------------------------------------------------------

        of a step
        prompts              8  rlhf.train_batch_size
        answers             32  8 prompts x 4 rollout.sampling.n
        mini-batches         2  4 prompts each, 16 answers
        updates              2  mini-batches x 1 rlhf.ppo_epochs
        answers of a rank    8  of a mini-batch, whole groups over 2 data-parallel part(s) of the policy
        tokens of a row     79  at most: 64 of a prompt + 16 of an answer - 1
        tokens at once     474  at most, of 512 rlhf.ppo_max_token_len_per_rank
        micro-batches        2  of a mini-batch, where every row is that long

        50 steps: 400 prompts, 1.60 k answers, 100 updates
        log-probabilities before the update: the engine's, which are the trainer's to the bit
        KL: none
        validation: before and after, 1 answer(s) to each prompt of the set

        # ---- layers of the policy ----------------------------------------------------

        layer                parameters    weights  FLOPs/token  kept/token
        embedding               196.6 k  768.0 KiB            0         0 B
        blocks 0 to 3 (4 x)     393.6 k   1.50 MiB      816.8 k    11.0 KiB
        norm and tied head          192      768 B      393.2 k    1.50 KiB
        all                      1.77 M   6.76 MiB       3.66 M    45.6 KiB

        forward FLOPs, attention counted causally; a training step is three times that: 11.0 M per token at 79 tokens per sequence
        (with attention counted in full 11.3 M), 20.8 G per step over all ranks

        # ---- memory ------------------------------------------------------------------

        rank of pool all (2)                       stays  comes and goes
        policy                weights           6.76 MiB                  4 B each
                              gradients         6.76 MiB                  4 B each
                              optimizer states  6.76 MiB                  8 B each, over 2 ranks
                              update                            24.4 MiB  474 tokens at once: activations 20.4 MiB, head and loss 3.94 MiB, backward of a block 3.12 MiB
                              checkpoint copy                   10.1 MiB  12 B of each owned; beside the rest, for freed memory is kept
        rollout               keys and values                   4.00 MiB  16 answers at once x 80 tokens; room for 40 % of what is free then
                              engine step                       14.0 MiB  up to 1280 tokens, or 16 x 1024 logits to draw from
        peak                  54.8 MiB          20.3 MiB        34.6 MiB  roles of a pool take turns
    "#]],
    );
}

#[test]
fn the_report_of_ppo_on_pools_of_its_own() {
    check(
        3,
        &[
            "algorithm.type=ppo",
            "algorithm.reward.use_kl_in_reward=true",
            "placement.pools=[{ name = \"train\", ranks = 2 }, { name = \"generate\", ranks = 1 }]",
            "placement.roles={ rollout = \"generate\" }",
            "parallelism.tensor_parallel_degree=2",
            "rollout.engine.kv_memory_mib=2",
        ],
        expect![[r#"
            role       pool      ranks  layout                          parameters
            policy     train     0-1    tensor 2, float32                   1.77 M  learns with lr 1e-6; starts from the seed
            rollout    generate  2      1 x tensor parallel 1, float32      1.77 M  generates 4 answers to a prompt with the policy's weights
            reference  train     0-1    tensor 2, float32                   1.77 M  scores; stays what it is; starts from the seed
            critic     train     0-1    tensor 2, float32                   1.77 M  learns with lr 1e-5; starts from the seed

            # ---- batches -----------------------------------------------------------------

            of a step
            prompts              8  rlhf.train_batch_size
            answers             32  8 prompts x 4 rollout.sampling.n
            mini-batches         2  4 prompts each, 16 answers
            updates              2  mini-batches x 1 rlhf.ppo_epochs
            answers of a rank   16  of a mini-batch, whole groups over 1 data-parallel part(s) of the policy
            tokens of a row     79  at most: 64 of a prompt + 16 of an answer - 1
            tokens at once     474  at most, of 512 rlhf.ppo_max_token_len_per_rank
            micro-batches        3  of a mini-batch, where every row is that long

            50 steps: 400 prompts, 1.60 k answers, 100 updates
            log-probabilities before the update: from a pass of their own: training has 2 tensor ranks, generation 1
            KL: against the reference
            validation: before and after, 1 answer(s) to each prompt of the set

            # ---- layers of the policy ----------------------------------------------------

            layer                parameters    weights  FLOPs/token  kept/token
            embedding               196.6 k  768.0 KiB            0         0 B
            blocks 0 to 3 (4 x)     393.6 k   1.50 MiB      816.8 k    7.02 KiB
            norm and tied head          192      768 B      393.2 k       770 B
            all                      1.77 M   6.76 MiB       3.66 M    28.8 KiB

            forward FLOPs, attention counted causally; a training step is three times that: 11.0 M per token at 79 tokens per sequence
            (with attention counted in full 11.3 M), 15.6 G per step over all ranks

            # ---- memory ------------------------------------------------------------------

            rank of pool train (2)                       stays  comes and goes
            policy                  weights           3.38 MiB                  4 B each
                                    gradients         3.38 MiB                  4 B each
                                    optimizer states  6.76 MiB                  8 B each
                                    update                            16.1 MiB  474 tokens at once: activations 13.0 MiB, head and loss 3.01 MiB, backward of a block 1.91 MiB
                                    checkpoint copy                   10.1 MiB  12 B of each owned; beside the rest, for freed memory is kept
            reference               weights           3.38 MiB                  4 B each, never learns
                                    scoring                           3.32 MiB  474 tokens at once, nothing kept
            critic                  weights           3.38 MiB                  4 B each
                                    gradients         3.38 MiB                  4 B each
                                    optimizer states  6.76 MiB                  8 B each
                                    update                            15.0 MiB  474 tokens at once: activations 13.0 MiB, head and loss 1.40 MiB, backward of a block 1.91 MiB
                                    checkpoint copy                   10.1 MiB  12 B of each owned; beside the rest, for freed memory is kept
            peak                    56.7 MiB          30.4 MiB        26.2 MiB  roles of a pool take turns

            rank of pool generate (1)                           stays  comes and goes
            rollout                    weights               6.76 MiB                  a copy; 0 B are read where the policy trains them
                                       weights on their way                  6.76 MiB  a bucket of rollout.update_weights_bucket_mb
                                       keys and values       2.00 MiB                  32 answers at once x 80 tokens; room for 2 MiB
                                       engine step                           17.9 MiB  up to 2560 tokens, or 32 x 1024 logits to draw from
            peak                       26.7 MiB              8.76 MiB        17.9 MiB  roles of a pool take turns
        "#]],
    );
}

#[test]
fn batches_are_counted_in_whole_groups() {
    let batches = Batches::of(&job(1, &["rlhf.ppo_epochs=3"]));
    assert_eq!((batches.answers(), batches.mini_batches(), batches.updates()), (32, 2, 6));
    // 4 prompts over 3 parts: 2 on one of them, 4 answers each.
    assert_eq!(batches.answers_of_rank(3), 8);
    // 512 / 79 = 6 rows at once; with 4 answers no more than those.
    assert_eq!((batches.tokens_at_once(1), batches.tokens_at_once(4)), (6 * 79, 4 * 79));
    assert_eq!(batches.micro_batches(1), 3);
    // A row longer than the budget is alone.
    let short = Batches { budget: 10, ..batches };
    assert_eq!((short.tokens_at_once(1), short.micro_batches(1)), (79, 16));
}

fn item(pool: &PoolMemory, role: Role, name: &str) -> u64 {
    let of_role = pool.roles.iter().find(|memory| memory.role == role).unwrap();
    of_role.items.iter().find(|item| item.name == name).map_or(0, |item| item.num_bytes)
}

#[test]
fn what_is_trained_where_it_generates_is_held_once() {
    let parameters = job(1, &[]).policy.model.num_parameters() as u64;
    let copied = |ranks, sets: &[&str]| {
        let pools = pools(&job(ranks, sets));
        item(
            pools.iter().find(|pool| pool.roles.iter().any(|m| m.role == Role::Rollout)).unwrap(),
            Role::Rollout,
            "weights",
        )
    };
    assert_eq!(copied(2, &[]), 0);
    // Another type, cut weights, a part of the width, ranks of their own.
    assert_eq!(copied(2, &["rollout.dtype=bfloat16"]), 2 * parameters);
    assert_eq!(copied(2, &["parallelism.zero_parameter_degree=2"]), 4 * parameters);
    assert!(copied(2, &["parallelism.tensor_parallel_degree=2"]) > 3 * parameters);
    let apart = [
        "placement.pools=[{ name = \"a\", ranks = 1 }, { name = \"b\", ranks = 1 }]",
        "placement.roles={ rollout = \"b\" }",
    ];
    assert_eq!(copied(2, &apart), 4 * parameters);
}

#[test]
fn an_update_takes_what_its_own_tokens_and_head_take() {
    let job = job(1, &["algorithm.type=ppo", "rollout.engine.max_num_seqs=2"]);
    let plan = update_plan(&job, Role::Policy).unwrap();
    assert_eq!((plan.config.training.local_batch_size, plan.config.training.seq_len), (6, 79));
    assert_eq!(plan.gradient_accumulation_steps, 3);
    let pools = pools(&job);
    let update = memory::predict_update(&plan);
    assert_eq!(item(&pools[0], Role::Policy, "update"), update.transient());
    // Rows of the chunk and their gradient beside cross-entropy's logits: 2 e C D.
    let d = plan.model.hidden_size as u64;
    assert_eq!(update.loss - memory::predict(&plan).loss, 2 * 4 * 474 * d);
    // A critic has no logits.
    let critic = memory::predict_update(&update_plan(&job, Role::Critic).unwrap());
    assert!(critic.loss < update.loss / 2, "{} {}", critic.loss, update.loss);
    // Roles take turns: the larger update counts, not both.
    let larger = |name| item(&pools[0], Role::Policy, name).max(item(&pools[0], Role::Critic, name));
    assert_eq!(pools[0].comes_and_goes(), larger("update") + larger("checkpoint copy"));
}
