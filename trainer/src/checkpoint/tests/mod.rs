//! Checkpoints under test: ranks are threads, or a child process that kills itself.

mod damage;
mod faults;
mod layouts;
mod saving;

use super::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};
use tangelo_configs::ModelSpec;
use tangelo_configs::model::{AttentionSpec, BlockSpec, Family, FeedForwardSpec, MixerSpec, RopeSpec};
use tangelo_core::hash::{mix64, uniform};
use tangelo_core::{Axis, DType, DeviceMesh, IndexBox, ParamMeta, Placement};

/// Another number each run; failures print it.
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = mix64(now.as_nanos() as u64 ^ u64::from(std::process::id()));
    println!("seed {seed}");
    seed
}

fn model() -> ModelSpec {
    let rope = RopeSpec { theta: 10_000.0, scaling: None };
    let attention = AttentionSpec {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 3,
        qkv_bias: true,
        output_bias: false,
        qk_norm: false,
        sliding_window: None,
        rope,
    };
    let feed_forward = FeedForwardSpec { intermediate_size: 19, bias: false };
    let block = BlockSpec { mixer: MixerSpec::Attention(attention), feed_forward };
    ModelSpec {
        family: Family::Qwen2,
        vocab_size: 37,
        hidden_size: 12,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        head: Default::default(),
        max_position_embeddings: 64,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: vec![0],
        blocks: vec![block; 2],
    }
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        num_updates: step - 1,
        global_sample_index: step * 8,
        tokens_seen: step * 4096,
        skipped_steps: 1,
        seed: 42,
        learning_rate: 1.0 / (3.0 + step as f64),
        loader_fingerprint: "a5".to_owned(),
    }
}

/// Every state tensor of a model, whole, at some step: what a checkpoint must give back bit for bit.
struct Truth {
    metas: Vec<ParamMeta>,
    values: BTreeMap<(StateKind, String), Vec<f32>>,
}

impl Truth {
    fn new(seed: u64, step: u64) -> Truth {
        let metas = model().parameters(DType::F32);
        let mut values = BTreeMap::new();
        let mut at = 0;
        for kind in StateKind::ALL {
            for meta in &metas {
                // Any bit pattern must survive, so most are not even numbers.
                let bits = (0..meta.num_elements()).map(|i| mix64(seed ^ mix64(step) ^ (at + i) as u64) as u32);
                values.insert((kind, meta.name.clone()), bits.map(f32::from_bits).collect());
                at += meta.num_elements();
            }
        }
        Truth { metas, values }
    }

    /// A box of a tensor, row-major, by the slowest means.
    fn cut(&self, kind: StateKind, meta: &ParamMeta, indices: &IndexBox) -> Vec<f32> {
        let (whole, shape) = (&self.values[&(kind, meta.name.clone())], indices.shape());
        (0..indices.volume())
            .map(|mut i| {
                let (mut flat, mut stride) = (0, 1);
                for dim in (0..shape.len()).rev() {
                    flat += (indices.ranges[dim].start + i % shape[dim]) * stride;
                    stride *= meta.shape[dim];
                    i /= shape[dim];
                }
                whole[flat]
            })
            .collect()
    }

    /// Puts `rank`'s part into `snapshot`.
    fn fill(&self, snapshot: &mut Snapshot, rank: usize, layout: &Layout, kinds: &[StateKind]) {
        for &kind in kinds {
            let held: Vec<Vec<IndexBox>> = self.metas.iter().map(|meta| layout.boxes(meta)).collect();
            for &tensor in &plan_writes(layout.ranks(), &held)[rank] {
                let (meta, indices) = (&self.metas[tensor], &held[tensor][rank]);
                let part = self.cut(kind, meta, indices);
                let copy = |out: &mut [f32]| {
                    out.copy_from_slice(&part);
                    Ok::<(), CheckpointError>(())
                };
                snapshot.push(kind, meta, indices, copy).unwrap();
            }
        }
    }

    /// Reads everything as the ranks of `layout` would, and compares bits.
    fn check(&self, checkpoint: &Checkpoint, layout: &Layout, kinds: &[StateKind]) {
        for &kind in kinds {
            for meta in &self.metas {
                for indices in layout.boxes(meta) {
                    let mut out = vec![0f32; indices.volume()];
                    checkpoint.read(kind, &meta.name, &indices, &mut out).unwrap();
                    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    let expected = self.cut(kind, meta, &indices);
                    assert_eq!(bits(&out), bits(&expected), "{kind} {} {indices:?}", meta.name);
                }
            }
        }
    }
}

/// How tensors lie over ranks: rows over `rows` ranks in blocks, columns over `columns`, the rest replicas.
#[derive(Clone, Copy, Debug)]
struct Layout {
    replicas: usize,
    rows: usize,
    columns: usize,
    block: usize,
}

impl Layout {
    fn rows(rows: usize) -> Layout {
        Layout { replicas: 1, rows, columns: 1, block: 1 }
    }

    fn ranks(&self) -> usize {
        self.replicas * self.rows * self.columns
    }

    fn boxes(&self, meta: &ParamMeta) -> Vec<IndexBox> {
        let mesh = DeviceMesh::new(&[
            (Axis::DpReplicate, self.replicas),
            (Axis::DpShard, self.rows),
            (Axis::Tp, self.columns),
        ])
        .unwrap();
        let mut placement = Placement::sharded(vec![mesh.whole(Axis::DpShard)], self.block);
        let (dim, over) = (meta.shape.len() - 1, vec![mesh.whole(Axis::Tp)]);
        placement.splits.push(tangelo_core::Split { dim, over, block: 1, first: 0 });
        placement.boxes(&meta.shape, &mesh)
    }
}

fn options(folder: &Path, rank: usize, world_size: usize) -> SaverOptions {
    SaverOptions {
        folder: folder.to_path_buf(),
        rank,
        world_size,
        attempt: "attempt-1".to_owned(),
        resumed_from: None,
        retention: Retention::default(),
        asynchronous: true,
        // Longer than a loaded machine takes for files of a few kilobytes.
        rank_deadline: Duration::from_secs(60),
        config_toml: "[job]\ntype = \"pretrain\" # \"quoted\" \u{e9}\n".to_owned(),
        model: model(),
        observer: None,
    }
}

/// Saves `steps` in turn on as many ranks as `layout` has, one thread each.
fn save_with(
    folder: &Path,
    seed: u64,
    steps: &[u64],
    layout: Layout,
    change: impl Fn(&mut SaverOptions) + Sync,
) -> Vec<Result<Vec<SaveReport>, CheckpointError>> {
    let start = |rank| {
        let mut options = options(folder, rank, layout.ranks());
        change(&mut options);
        Saver::start(options).unwrap()
    };
    // Rank 0 first: it clears the folder, as it does in a run before the others are told what to resume from.
    let savers: Vec<Saver> = (0..layout.ranks()).map(start).collect();
    let save = |rank: usize, mut saver: Saver| {
        for &step in steps {
            let mut snapshot = saver.begin(state(step));
            Truth::new(seed, step).fill(&mut snapshot, rank, &layout, &StateKind::ALL);
            saver.save(snapshot)?;
        }
        saver.finish()
    };
    std::thread::scope(|scope| {
        let save = &save;
        let threads: Vec<_> =
            savers.into_iter().enumerate().map(|(rank, saver)| scope.spawn(move || save(rank, saver))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Saves, and every rank must succeed.
fn save(folder: &Path, seed: u64, steps: &[u64], layout: Layout, change: impl Fn(&mut SaverOptions) + Sync) {
    for (rank, result) in save_with(folder, seed, steps, layout, change).into_iter().enumerate() {
        result.unwrap_or_else(|error| panic!("rank {rank}: {error}"));
    }
}

/// The newest usable checkpoint, which must be of `step`, with as many passed over as `warnings` says, and whole.
fn check_newest(folder: &Path, seed: u64, step: u64, warnings: usize) -> Found {
    let found = find_usable(folder, None).unwrap();
    let checkpoint = found.checkpoint.as_ref().expect("a checkpoint");
    assert_eq!((checkpoint.step(), found.warnings.len()), (step, warnings), "{:?}", found.warnings);
    assert_eq!(checkpoint.state(), &state(step));
    Truth::new(seed, step).check(checkpoint, &Layout::rows(1), &StateKind::ALL);
    found
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
