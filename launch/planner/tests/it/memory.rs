//! Memory of layouts, by hand.

use crate::{Tokenizer, machine};
use tangelo_configs::Plan;
use tangelo_configs::resolve::{load_str, resolve};
use tangelo_planner::memory::{predict_stage, saved_bytes};
use tangelo_planner::{Memory, predict};

/// D 64, eight heads on four of 8, F 192, 8 layers; untied.
const MODEL: &str = "vocab_size = 512\nhidden_size = 64\nintermediate_size = 192\nnum_hidden_layers = 8\n\
                     num_attention_heads = 8\nnum_key_value_heads = 4\nhead_dim = 8\nmax_position_embeddings = 1024";
const D: u64 = 64;
const T: u64 = 1024;
/// Parameters of a block: two norms, q and output, k and v, the feed-forward.
const BLOCK: u64 = 2 * D + 2 * D * D + 2 * 32 * D + 3 * 192 * D;
const ALL: u64 = 8 * BLOCK + 2 * 512 * D + D;

fn plan(world_size: usize, sets: &[&str]) -> Plan {
    let text = format!(
        "[model]\n{MODEL}\n[data]\ntokenizer = 't.json'\nsources = [{{ paths = ['corpus/*.txt'] }}]\n[training]\n\
         local_batch_size = 1\nseq_len = 1024\nmixed_precision_param = 'float32'\ndevice = 'cpu'\n\
         global_batch_size = 16\n"
    );
    let key = |set: &&str| if set.contains('.') { set.to_string() } else { format!("parallelism.{set}") };
    let sets: Vec<String> = sets.iter().map(key).collect();
    resolve(load_str(&text, "job.toml", &sets).unwrap(), &machine(world_size, world_size, false), &Tokenizer(300))
        .unwrap()
}

fn predicted(world_size: usize, sets: &[&str]) -> Memory {
    predict(&plan(world_size, sets))
}

#[test]
fn context_parallel_ranks_keep_their_part_of_the_sequence() {
    for method in ["ring", "allgather"] {
        let rotate = format!("context_parallel_rotate_method={method}");
        let at = |cp: usize, mode: &str| predicted(cp, &[&format!("context_parallel_degree={cp}"), &rotate, mode]);
        let (one, four) = (at(1, "activation_checkpoint.mode=full"), at(4, "activation_checkpoint.mode=full"));
        assert_eq!((one.activations, four.activations), (8 * T * D * 4, 8 * T / 4 * D * 4));
        let (one, four) = (at(1, "activation_checkpoint.mode=none"), at(4, "activation_checkpoint.mode=none"));
        assert_eq!(4 * four.activations, one.activations);
    }
}

#[test]
fn rings_hold_two_ranks_keys_and_gathered_ones_all() {
    let backward = |method: &str| {
        predicted(8, &["context_parallel_degree=8", &format!("context_parallel_rotate_method={method}")]).backward
    };
    let (ring, gather) = (backward("ring"), backward("allgather"));
    // Beside the rest: keys and values of 2 ranks and gradients of 3; or both of 8.
    let kv = 64 * T / 8;
    assert_eq!(gather - ring, 8 * (4 + 4) * kv - (2 * 4 + 3 * 4) * kv);
}

#[test]
fn tensor_ranks_hold_their_part_of_the_model() {
    let two = predicted(2, &["tensor_parallel_degree=2"]);
    let norms = 8 * 2 * D + D;
    assert_eq!(two.num_parameters, (ALL - norms) / 2 + norms);
    // Half the tokens: norms' inputs, scattered sums. All tokens: gathered norms, and half of q, k, v, output,
    // log-sum-exp, gate, up and their product.
    let (own, context) = (4 * (2 + 2) * D + 2 * 4, 4 * 2 * D + 4 * (64 + 64 + 64 + 3 * 192) / 2 + 4 * 8 / 2);
    assert_eq!(saved_bytes(&plan(2, &["tensor_parallel_degree=2"]), 0), T / 2 * own + T * context);
    assert!(two.loss < predicted(1, &[]).loss);
}

#[test]
fn stages_keep_what_is_in_flight() {
    let stages = |schedule: &str| {
        let plan = plan(4, &["pipeline_parallel_degree=4", &format!("pipeline_parallel_schedule={schedule}")]);
        [0, 3].map(|stage| predict_stage(&plan, stage))
    };
    let one = predicted(1, &[]).activations / 8;
    let [first, last] = stages("1F1B");
    assert_eq!((first.in_flight, last.in_flight), (4, 1));
    assert_eq!((first.activations, last.activations), (4 * 2 * one, 2 * one));
    assert_eq!((first.num_parameters, last.num_parameters), (2 * BLOCK + 512 * D, 2 * BLOCK + 512 * D + D));
    assert_eq!(first.loss, 0);
    assert_eq!(stages("GPipe").map(|stage| stage.in_flight), [16, 16]);
}

#[test]
fn matrices_that_muon_owns_whole_are_counted_where_they_lie() {
    let muon = |world: usize, sets: &[&str]| predicted(world, &[&["optimizer.name=Muon"], sets].concat());
    let matrices = 8 * (BLOCK - 2 * D);
    assert_eq!(muon(1, &[]).optimizer_states, 4 * matrices + 8 * (ALL - matrices));
    // 128 ranks, 56 matrices: the fullest rank owns one of the feed-forward's, and a chunk of the embedding.
    let many = muon(128, &["training.global_batch_size=128"]);
    assert_eq!(many.optimizer_states, 4 * 192 * D + 8 * 16_384);
    assert_eq!(muon(1, &[]).matrices, 4 * (4 * 192 * D + 2 * D * D));
    assert_eq!(predicted(1, &[]).matrices, 0);
}

#[test]
fn scopes_cut_what_is_kept_and_units_are_whole_while_used() {
    let cut = |sets: &[&str]| predicted(8, &[&["data_parallel_shard_degree=8"], sets].concat());
    let whole = cut(&["zero_parameter_degree=1"]);
    assert_eq!((whole.parameters, whole.gradients, whole.optimizer_states), (4 * ALL, 4 * ALL, ALL));
    assert_eq!((whole.whole_blocks, whole.whole_head, whole.whole_embedding), (0, 0, 0));

    let scopes = cut(&["zero_parameter_degree=2", "zero_gradient_degree=4", "zero_optimizer_degree=8"]);
    assert_eq!((scopes.parameters, scopes.gradients, scopes.optimizer_states), (2 * ALL, ALL, ALL));
    assert_eq!(scopes.whole_blocks, 4 * 2 * BLOCK + 4 * (2 * BLOCK + BLOCK / 4));
    let head = 512 * D + D;
    assert_eq!(scopes.whole_head, 4 * (head + BLOCK) + 4 * head);

    let never = cut(&["zero_parameter_degree=2", "fsdp_reshard_after_forward=never"]);
    assert_eq!(never.gathered_weights, 4 * ALL);
    assert!(never.total_bytes() > cut(&["zero_parameter_degree=2"]).total_bytes());
}
