//! The `[parallelism]` section as a [`Topology`] and the layers of each stage.

use crate::check::Found;
use crate::job::{JobConfig, Parallelism, ReshardAfterForward};
use crate::{AttentionSpec, ConfigError, MixerSpec, ModelSpec};
use std::ops::Range;
use tangelo_core::layout::part_range;
use tangelo_core::{Axis, DeviceMesh, MeshError, Topology, ZeroScopes};

/// Turns -1 degrees into numbers and builds the mesh.
pub(crate) fn resolve_mesh(config: &mut JobConfig, world_size: usize) -> Result<DeviceMesh, ConfigError> {
    let p = &mut config.parallelism;
    check_world_size(p, world_size)?;
    if p.data_parallel_shard_degree == -1 {
        p.data_parallel_shard_degree = (world_size / product(&other_degrees(p))) as i64;
    }
    let weights = p.data_parallel_shard_degree * p.context_parallel_degree as i64;
    for degree in [&mut p.zero_parameter_degree, &mut p.zero_gradient_degree, &mut p.zero_optimizer_degree] {
        if *degree == -1 {
            *degree = weights;
        }
    }
    // Gradients are cut at least as far as the weights they belong to, unless told otherwise.
    let raised = p.zero_gradient_degree == 1 && p.zero_parameter_degree > 1;
    if raised {
        p.zero_gradient_degree = p.zero_parameter_degree;
    }
    let mesh = DeviceMesh::new(&[
        (Axis::Pp, p.pipeline_parallel_degree),
        (Axis::DpReplicate, p.data_parallel_replicate_degree),
        (Axis::DpShard, p.data_parallel_shard_degree as usize),
        (Axis::Cp, p.context_parallel_degree),
        (Axis::Tp, p.tensor_parallel_degree),
    ])
    .map_err(mesh_error)?;
    check_zero_scopes(p, weights as usize, raised)?;
    Ok(mesh)
}

/// All degrees but that of `data_parallel_shard_degree`, with their keys, as ranks are laid out.
fn other_degrees(p: &Parallelism) -> [(&'static str, usize); 4] {
    [
        ("pipeline_parallel_degree", p.pipeline_parallel_degree),
        ("data_parallel_replicate_degree", p.data_parallel_replicate_degree),
        ("context_parallel_degree", p.context_parallel_degree),
        ("tensor_parallel_degree", p.tensor_parallel_degree),
    ]
}

/// Absurd degrees are refused by their number, not by an overflow.
fn product(degrees: &[(&str, usize)]) -> usize {
    degrees.iter().fold(1, |product: usize, (_, degree)| product.saturating_mul(*degree))
}

fn check_world_size(p: &Parallelism, world_size: usize) -> Result<(), ConfigError> {
    let mut degrees = other_degrees(p).to_vec();
    let takes_the_rest = p.data_parallel_shard_degree == -1;
    if !takes_the_rest {
        degrees.insert(2, ("data_parallel_shard_degree", p.data_parallel_shard_degree as usize));
    }
    let ranks = product(&degrees);
    let fits = if takes_the_rest { ranks > 0 && world_size.is_multiple_of(ranks) } else { ranks == world_size };
    let mut found = Found::default();
    found.require(fits, || {
        // Degrees of 1 do not explain anything, unless all are.
        degrees.retain(|(key, degree)| *degree != 1 || ranks == 1 && *key == "data_parallel_shard_degree");
        let factors: Vec<String> = degrees.iter().map(|(key, n)| format!("`parallelism.{key}` {n}")).collect();
        let arithmetic = match factors.as_slice() {
            [_] => format!("`parallelism.{}` = {ranks}", degrees[0].0),
            _ => format!("{} = {ranks}", factors.join(" x ")),
        };
        let leaves = world_size.checked_rem(ranks).unwrap_or(world_size);
        match takes_the_rest {
            true => format!(
                "{arithmetic} ranks do not divide the job's {world_size}: {world_size} / {ranks} leaves {leaves}; \
                 change a degree, or start a multiple of {ranks} ranks"
            ),
            false => format!(
                "{arithmetic} ranks, but the job has {world_size}; change a degree (data_parallel_shard_degree = \
                 -1 takes what the others leave), or start {ranks} ranks"
            ),
        }
    });
    found.result()
}

/// Says whether gathered weights are given back between forward and backward, where that was left open.
pub(crate) fn resolve_reshard(p: &mut Parallelism) {
    if p.fsdp_reshard_after_forward == ReshardAfterForward::Default {
        let never = p.pipeline_parallel_degree > 1;
        p.fsdp_reshard_after_forward = if never { ReshardAfterForward::Never } else { ReshardAfterForward::Always };
    }
}

fn mesh_error(e: MeshError) -> ConfigError {
    ConfigError::Values(vec![e.to_string()])
}

/// The lattice of ZeRO scopes: optimizer states are spread at least as far as gradients, these as parameters, and each
/// scope divides the next (AMSP, arXiv 2311.00257). `raised`: the gradients' scope is that of parameters because nobody set
/// it.
fn check_zero_scopes(p: &Parallelism, weights: usize, raised: bool) -> Result<(), ConfigError> {
    let mut found = Found::default();
    let divides = |found: &mut Found, (inner, m): (&str, usize), (outer, n): (&str, usize)| {
        found.require(n.is_multiple_of(m), || {
            let reason = if m > n { format!("{m} > {n}") } else { format!("{n} / {m} leaves {}", n % m) };
            format!(
                "`parallelism.{inner}` = {m} must divide {outer} = {n}, but {reason}; scopes nest: data_parallel_shard x \
                 context_parallel >= zero_optimizer >= zero_gradient >= zero_parameter"
            )
        });
    };
    let [states, gradients, parameters] = [
        ("zero_optimizer_degree", p.zero_optimizer_degree as usize),
        ("zero_gradient_degree", p.zero_gradient_degree as usize),
        ("zero_parameter_degree", p.zero_parameter_degree as usize),
    ];
    let all = format!(
        "`parallelism.data_parallel_shard_degree` {} x `parallelism.context_parallel_degree` {}",
        p.data_parallel_shard_degree, p.context_parallel_degree
    );
    for scope in [parameters, states] {
        divides(&mut found, scope, (&all, weights));
    }
    if found.is_empty() {
        let inner = if raised { parameters } else { gradients };
        divides(&mut found, inner, ("`parallelism.zero_optimizer_degree`", states.1));
        divides(&mut found, parameters, ("`parallelism.zero_gradient_degree`", gradients.1));
    }
    let cp = p.context_parallel_degree;
    for (key, n) in [parameters, gradients, states] {
        found.require(!found.is_empty() || cp.is_multiple_of(n) || n.is_multiple_of(cp), || {
            format!(
                "`parallelism.{key}` = {n} and `parallelism.context_parallel_degree` = {cp}: one must be a multiple of \
                 the other, because a scope fills neighbouring ranks and context parallel ones are the nearest"
            )
        });
    }
    found.result()
}

/// The layers of each stage; writes them into the configuration.
pub(crate) fn resolve_stages(config: &mut JobConfig, spec: &ModelSpec) -> Result<Vec<Range<usize>>, ConfigError> {
    let p = &mut config.parallelism;
    let (stages, layers) = (p.pipeline_parallel_degree, spec.blocks.len());
    if p.pipeline_parallel_stage_layers.is_empty() && stages > 1 {
        p.pipeline_parallel_stage_layers = (0..stages).map(|s| part_range(layers, 1, stages, s).len()).collect();
    }
    let given = &p.pipeline_parallel_stage_layers;
    let mut found = Found::default();
    found.require(stages <= layers, || {
        format!(
            "`parallelism.pipeline_parallel_degree` = {stages}, but the model has {layers} layers: a stage needs at \
             least one; lower it to {layers} or less"
        )
    });
    let total: usize = given.iter().sum();
    let fits = given.len() == stages && total == layers && given.iter().all(|&n| n > 0);
    found.require(fits || stages == 1 && given.is_empty() || stages > layers, || {
        format!(
            "`parallelism.pipeline_parallel_stage_layers` = {given:?} are {total} layers in {} stages; expected {layers} \
             layers in {stages} stages (`parallelism.pipeline_parallel_degree`), at least one in each",
            given.len()
        )
    });
    found.result()?;
    let counts = if given.is_empty() { vec![layers] } else { given.clone() };
    let starts = counts.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n)));
    Ok(starts.zip(&counts).map(|(start, &n)| start..start + n).collect())
}

/// The groups of the job, once the model's shapes are known to divide.
pub(crate) fn topology(config: &JobConfig, spec: &ModelSpec, mesh: DeviceMesh) -> Result<Topology, ConfigError> {
    let p = &config.parallelism;
    let mut found = Found::default();
    let mut key_replicas = 1;
    for block in &spec.blocks {
        let MixerSpec::Attention(a) = &block.mixer;
        tensor_shapes(&mut found, p, a, block.feed_forward.intermediate_size);
        head_shapes(&mut found, p, a);
        key_replicas = (p.tensor_parallel_degree / a.num_kv_heads.max(1)).max(1);
        if !found.is_empty() {
            break;
        }
    }
    found.require(config.validation.sample_tokens == 0 || is_whole(p), || {
        format!(
            "`validation.sample_tokens` = {} needs the whole model on rank 0: with tensor, pipeline or parameter \
             sharding (`zero_parameter_degree`) set it to 0 and sample from checkpoints with `tangelo generate`",
            config.validation.sample_tokens
        )
    });
    found.result()?;
    let scopes = ZeroScopes {
        parameters: p.zero_parameter_degree as usize,
        gradients: p.zero_gradient_degree as usize,
        states: p.zero_optimizer_degree as usize,
    };
    Topology::new(mesh, p.context_parallel_head_degree, key_replicas, scopes).map_err(mesh_error)
}

fn is_whole(p: &Parallelism) -> bool {
    p.tensor_parallel_degree == 1 && p.pipeline_parallel_degree == 1 && p.zero_parameter_degree == 1
}

fn tensor_shapes(found: &mut Found, p: &Parallelism, a: &AttentionSpec, intermediate: usize) {
    let tp = p.tensor_parallel_degree;
    let (heads, kv) = (a.num_heads, a.num_kv_heads);
    for (key, n) in [("num_attention_heads", heads), ("intermediate_size", intermediate)] {
        found.require(n.is_multiple_of(tp), || {
            format!(
                "`model.{key}` = {n} is not a multiple of `parallelism.tensor_parallel_degree` = {tp}: {n} / {tp} leaves \
                 {}; take a degree that divides it",
                n % tp
            )
        });
    }
    found.require(kv.is_multiple_of(tp) || tp.is_multiple_of(kv), || {
        format!(
            "`model.num_key_value_heads` = {kv} and `parallelism.tensor_parallel_degree` = {tp}: one must be a multiple \
             of the other, so that each rank has whole heads or several ranks share one; {} leaves {}",
            if kv > tp { format!("{kv} / {tp}") } else { format!("{tp} / {kv}") },
            kv.max(tp) % kv.min(tp)
        )
    });
}

fn head_shapes(found: &mut Found, p: &Parallelism, a: &AttentionSpec) {
    let (tp, degree, cp) = (p.tensor_parallel_degree, p.context_parallel_head_degree, p.context_parallel_degree);
    found.require(cp.is_multiple_of(degree), || {
        format!(
            "`parallelism.context_parallel_head_degree` = {degree} must divide `parallelism.context_parallel_degree` = \
             {cp}: {cp} / {degree} leaves {}",
            cp % degree
        )
    });
    let (heads, kv) = (a.num_heads / tp, (a.num_kv_heads / tp).max(1));
    found.require(heads.is_multiple_of(degree), || {
        format!(
            "{heads} query heads per tensor rank (`model.num_attention_heads` {} / `parallelism.tensor_parallel_degree` \
             {tp}) are not a multiple of `parallelism.context_parallel_head_degree` = {degree}: {heads} / {degree} \
             leaves {}; exchange fewer heads, the rest of `parallelism.context_parallel_degree` becomes a ring",
            a.num_heads,
            heads % degree
        )
    });
    found.require(kv.is_multiple_of(degree) || degree.is_multiple_of(kv), || {
        format!(
            "{kv} key heads per tensor rank (`model.num_key_value_heads` {} / `parallelism.tensor_parallel_degree` {tp}) \
             and `parallelism.context_parallel_head_degree` = {degree}: one must be a multiple of the other, but {} / {} \
             leaves {}",
            a.num_kv_heads,
            kv.max(degree),
            kv.min(degree),
            kv.max(degree) % kv.min(degree)
        )
    });
}
