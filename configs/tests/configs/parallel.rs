//! Degrees, scopes and stages: what is filled in, and what does not divide.

use crate::resolve::{fails, plan};
use expect_test::{Expect, expect};

#[test]
fn degrees_multiply_to_the_world_size() {
    fails(
        &["parallelism.data_parallel_shard_degree=3"],
        4,
        expect![
            "--set parallelism.data_parallel_shard_degree=3: `parallelism.data_parallel_shard_degree` = 3 ranks, but the job has 4; change a degree (data_parallel_shard_degree = -1 takes what the others leave), or start 3 ranks"
        ],
    );
    fails(
        &["parallelism.data_parallel_replicate_degree=2"],
        5,
        expect![
            "--set parallelism.data_parallel_replicate_degree=2: `parallelism.data_parallel_replicate_degree` = 2 ranks do not divide the job's 5: 5 / 2 leaves 1; change a degree, or start a multiple of 2 ranks"
        ],
    );
    fails(
        &["parallelism.tensor_parallel_degree=2", "parallelism.context_parallel_degree=2"],
        6,
        expect![
            "--set parallelism.context_parallel_degree=2: `parallelism.context_parallel_degree` 2 x `parallelism.tensor_parallel_degree` 2 = 4 ranks do not divide the job's 6: 6 / 4 leaves 2; change a degree, or start a multiple of 4 ranks"
        ],
    );
    fails(
        &["parallelism.context_parallel_degree=2", "parallelism.zero_parameter_degree=3"],
        6,
        expect![
            "--set parallelism.zero_parameter_degree=3: `parallelism.zero_parameter_degree` = 3 and `parallelism.context_parallel_degree` = 2: one must be a multiple of the other, because a scope fills neighbouring ranks and context parallel ones are the nearest"
        ],
    );
    fails(
        &["parallelism.zero_parameter_degree=4", "parallelism.zero_optimizer_degree=2"],
        4,
        expect![
            "--set parallelism.zero_parameter_degree=4: `parallelism.zero_parameter_degree` = 4 must divide `parallelism.zero_optimizer_degree` = 2, but 4 > 2; scopes nest: data_parallel_shard x context_parallel >= zero_optimizer >= zero_gradient >= zero_parameter"
        ],
    );
    fails(
        &["activation_checkpoint.layers=[{first=2,last=4,recompute='full'}]"],
        1,
        expect![
            "--set activation_checkpoint.layers=[{first=2,last=4,recompute='full'}]: `activation_checkpoint.layers.0`: `last` = 4, but the model's 4 layers are 0 to 3"
        ],
    );
    fails(
        &["parallelism.tensor_parallel_degree=2", "parallelism.zero_parameter_degree=4"],
        4,
        expect![
            "--set parallelism.zero_parameter_degree=4: `parallelism.zero_parameter_degree` = 4 must divide `parallelism.data_parallel_shard_degree` 2 x `parallelism.context_parallel_degree` 1 = 2, but 4 > 2; scopes nest: data_parallel_shard x context_parallel >= zero_optimizer >= zero_gradient >= zero_parameter"
        ],
    );
    let hybrid = plan(&["parallelism.data_parallel_replicate_degree=2"], 6);
    assert_eq!((hybrid.data_parallel_size, hybrid.topology.scopes.states), (6, 3));
}

#[test]
fn zero_scopes_nest() {
    assert_eq!(plan(&["parallelism.zero_optimizer_degree=2"], 4).topology.scopes.states, 2);
    assert_eq!(plan(&["parallelism.zero_optimizer_degree=1"], 4).topology.scopes.states, 1);
    fails(
        &["parallelism.zero_optimizer_degree=4"],
        6,
        expect![
            "--set parallelism.zero_optimizer_degree=4: `parallelism.zero_optimizer_degree` = 4 must divide `parallelism.data_parallel_shard_degree` 6 x `parallelism.context_parallel_degree` 1 = 6, but 6 / 4 leaves 2; scopes nest: data_parallel_shard x context_parallel >= zero_optimizer >= zero_gradient >= zero_parameter"
        ],
    );
    fails(
        &["parallelism.zero_optimizer_degree=8"],
        4,
        expect![
            "--set parallelism.zero_optimizer_degree=8: `parallelism.zero_optimizer_degree` = 8 must divide `parallelism.data_parallel_shard_degree` 4 x `parallelism.context_parallel_degree` 1 = 4, but 8 > 4; scopes nest: data_parallel_shard x context_parallel >= zero_optimizer >= zero_gradient >= zero_parameter"
        ],
    );
}

#[test]
fn shapes_that_do_not_divide_are_refused_with_the_arithmetic() {
    let refused = |sets: &[&str], ranks: usize, expected: Expect| fails(sets, ranks, expected);
    refused(
        &["parallelism.tensor_parallel_degree=3"],
        3,
        expect![[r#"
            --set parallelism.tensor_parallel_degree=3: `model.intermediate_size` = 512 is not a multiple of `parallelism.tensor_parallel_degree` = 3: 512 / 3 leaves 2; take a degree that divides it
            --set parallelism.tensor_parallel_degree=3: `model.num_key_value_heads` = 2 and `parallelism.tensor_parallel_degree` = 3: one must be a multiple of the other, so that each rank has whole heads or several ranks share one; 3 / 2 leaves 1"#]],
    );
    refused(
        &["parallelism.pipeline_parallel_degree=7"],
        7,
        expect![
            "--set parallelism.pipeline_parallel_degree=7: `parallelism.pipeline_parallel_degree` = 7, but the model has 4 layers: a stage needs at least one; lower it to 4 or less"
        ],
    );
    refused(
        &["parallelism.pipeline_parallel_degree=2", "parallelism.pipeline_parallel_stage_layers=[1, 1, 1]"],
        2,
        expect![
            "--set parallelism.pipeline_parallel_stage_layers=[1, 1, 1]: `parallelism.pipeline_parallel_stage_layers` = [1, 1, 1] are 3 layers in 3 stages; expected 4 layers in 2 stages (`parallelism.pipeline_parallel_degree`), at least one in each"
        ],
    );
    refused(
        &["parallelism.context_parallel_degree=4", "parallelism.context_parallel_head_degree=3"],
        4,
        expect![[r#"
            --set parallelism.context_parallel_head_degree=3: `parallelism.context_parallel_head_degree` = 3 must divide `parallelism.context_parallel_degree` = 4: 4 / 3 leaves 1
            --set parallelism.context_parallel_head_degree=3: 2 key heads per tensor rank (`model.num_key_value_heads` 2 / `parallelism.tensor_parallel_degree` 1) and `parallelism.context_parallel_head_degree` = 3: one must be a multiple of the other, but 3 / 2 leaves 1"#]],
    );
    refused(
        &["parallelism.context_parallel_degree=64", "parallelism.context_parallel_head_degree=64"],
        64,
        expect![
            "--set parallelism.context_parallel_head_degree=64: 6 query heads per tensor rank (`model.num_attention_heads` 6 / `parallelism.tensor_parallel_degree` 1) are not a multiple of `parallelism.context_parallel_head_degree` = 64: 6 / 64 leaves 6; exchange fewer heads, the rest of `parallelism.context_parallel_degree` becomes a ring"
        ],
    );
    refused(
        &[
            "parallelism.tensor_parallel_degree=2",
            "validation.enable=true",
            "validation.sample_tokens=4",
            "validation.prompts=['a']",
        ],
        2,
        expect![
            "--set validation.sample_tokens=4: `validation.sample_tokens` = 4 needs the whole model on rank 0: with tensor, pipeline or parameter sharding (`zero_parameter_degree`) set it to 0 and sample from checkpoints with `tangelo generate`"
        ],
    );
    refused(
        &["activation_checkpoint.layers=[{first=3,last=1,recompute='full'}]"],
        1,
        expect![
            "--set activation_checkpoint.layers=[{first=3,last=1,recompute='full'}]: `activation_checkpoint.layers.0`: `first` = 3 lies behind `last` = 1"
        ],
    );
}

#[test]
fn a_scope_of_weights_takes_gradients_along() {
    let plan = plan(&["parallelism.zero_parameter_degree=2"], 4);
    let scopes = plan.topology.scopes;
    assert_eq!((scopes.parameters, scopes.gradients, scopes.states), (2, 2, 4));
}

#[test]
fn stages_are_as_even_as_layers_divide() {
    let layers = plan(&["parallelism.pipeline_parallel_degree=2", "model.num_hidden_layers=5"], 2).stage_layers;
    assert_eq!(layers, [0..3, 3..5]);
}
