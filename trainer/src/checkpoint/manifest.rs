//! What a checkpoint says about itself: one record per rank, collected into the manifest.
//!
//! A manifest ends with the checksum of all its bytes before that line, so that it is as well guarded as the files
//! that it lists. It is plain JSON all the same.

use super::{CheckpointError, shard};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use tangelo_configs::ModelSpec;
use tangelo_core::IndexBox;

/// The version of the format written here, the newest that is read.
pub(super) const VERSION: u32 = 1;
/// The manifest's file name.
pub(super) const MANIFEST: &str = "manifest.json";

/// What is saved of a parameter; all of it in fp32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    /// The parameter: its fp32 master copy where it trains in bf16.
    Param,
    /// AdamW's running mean of gradients.
    ExpAvg,
    /// AdamW's running mean of squared gradients.
    ExpAvgSq,
    /// Muon's running mean of gradients.
    Momentum,
}

impl StateKind {
    /// Every kind.
    pub const ALL: [StateKind; 4] = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq, StateKind::Momentum];
    /// What AdamW has of a parameter.
    pub const ADAMW: [StateKind; 3] = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq];
    /// What Muon has of a hidden matrix.
    pub const MUON: [StateKind; 2] = [StateKind::Param, StateKind::Momentum];

    /// The name in files.
    pub const fn as_str(self) -> &'static str {
        match self {
            StateKind::Param => "param",
            StateKind::ExpAvg => "exp_avg",
            StateKind::ExpAvgSq => "exp_avg_sq",
            StateKind::Momentum => "momentum",
        }
    }
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Everything but tensors that a run needs to go on as if it had not stopped. The same on every rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done, skipped ones included: the next step is this one plus 1.
    pub step: u64,
    /// Updates done: steps less skipped ones; the exponent of AdamW's bias corrections.
    pub num_updates: u64,
    /// The loader's position: the first sample of the next global batch.
    pub global_sample_index: u64,
    /// Tokens trained on so far, over all ranks.
    pub tokens_seen: u64,
    /// Steps skipped for a non-finite loss or gradient.
    pub skipped_steps: u64,
    /// The seed: all randomness is a function of it and of an index.
    pub seed: u64,
    /// The schedule's rate at `step`: a resumed run that computes another has another schedule.
    pub learning_rate: f64,
    /// What the loader says it reads: another fingerprint means other data in the same order.
    pub loader_fingerprint: String,
}

/// A box of a tensor in a file: `[[start, end], ...]`, one pair per dim.
pub(super) type Ranges = Vec<[usize; 2]>;

pub(super) fn to_ranges(indices: &IndexBox) -> Ranges {
    indices.ranges.iter().map(|r| [r.start, r.end]).collect()
}

pub(super) fn to_box(ranges: &Ranges) -> IndexBox {
    IndexBox::new(ranges.iter().map(|&[start, end]| start..end))
}

/// A file of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name inside the checkpoint's folder.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// xxh3-128 of all its bytes, 32 hexadecimal digits.
    pub xxh3_128: String,
}

/// Where one box of a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBox {
    /// The file's name.
    pub file: String,
    /// The box, `[[start, end], ...]`, in the coordinates of the full tensor.
    #[serde(rename = "box")]
    pub ranges: Vec<[usize; 2]>,
}

/// One state of one parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Which state.
    pub kind: StateKind,
    /// The parameter, by Hugging Face's name.
    pub name: String,
    /// The full shape.
    pub shape: Vec<usize>,
    /// Disjoint boxes that cover it.
    pub boxes: Vec<SavedBox>,
}

/// One entry of a rank's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RankEntry {
    pub kind: StateKind,
    pub name: String,
    pub shape: Vec<usize>,
    #[serde(rename = "box")]
    pub ranges: Ranges,
}

/// What a rank says about its file; its appearance tells rank 0 that the file is whole and on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RankRecord {
    pub attempt: String,
    pub step: u64,
    pub rank: usize,
    pub world_size: usize,
    pub file: FileRecord,
    pub entries: Vec<RankEntry>,
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `"tangelo-checkpoint"`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// The step after which it was taken.
    pub step: u64,
    /// Ranks that wrote it.
    pub world_size: usize,
    /// The attempt that wrote it.
    pub attempt: String,
    /// When it was completed, seconds since 1970.
    pub created_unix_seconds: u64,
    /// Everything but tensors.
    pub train_state: TrainState,
    /// The architecture.
    pub model: ModelSpec,
    /// The resolved job.
    pub config_toml: String,
    /// Every other file in the folder.
    pub files: Vec<FileRecord>,
    /// Every tensor.
    pub tensors: Vec<TensorRecord>,
}

/// The name in [`Manifest::format`].
pub(super) const FORMAT: &str = "tangelo-checkpoint";
const CHECKSUM_KEY: &str = ",\n  \"checksum\": \"xxh3-128:";
const CHECKSUM_END: &str = "\"\n}\n";

/// Gathers the ranks' entries into one record per tensor, in order of first appearance.
pub(super) fn collect_tensors(records: &[RankRecord]) -> Vec<TensorRecord> {
    let mut tensors: Vec<TensorRecord> = Vec::new();
    let mut position: BTreeMap<(StateKind, &str), usize> = BTreeMap::new();
    for record in records {
        for entry in &record.entries {
            let at = *position.entry((entry.kind, &entry.name)).or_insert_with(|| {
                let (name, shape) = (entry.name.clone(), entry.shape.clone());
                tensors.push(TensorRecord { kind: entry.kind, name, shape, boxes: Vec::new() });
                tensors.len() - 1
            });
            tensors[at].boxes.push(SavedBox { file: record.file.name.clone(), ranges: entry.ranges.clone() });
        }
    }
    tensors
}

impl Manifest {
    /// The bytes of `manifest.json`.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut text = serde_json::to_string_pretty(self)?;
        let body = text.trim_end().trim_end_matches('}').trim_end().len();
        text.truncate(body);
        let checksum = shard::checksum(text.as_bytes());
        Ok(format!("{text}{CHECKSUM_KEY}{checksum}{CHECKSUM_END}").into_bytes())
    }

    /// Checks the checksum and reads the manifest at `path`, whose bytes are `bytes`.
    pub(super) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Manifest, CheckpointError> {
        let tail = CHECKSUM_KEY.len() + 32 + CHECKSUM_END.len();
        let Some(body) = bytes.len().checked_sub(tail).map(|at| &bytes[..at]) else {
            return Err(CheckpointError::damaged(
                path,
                "a manifest that ends with its checksum",
                format!("{} bytes", bytes.len()),
            ));
        };
        let expected = format!("{CHECKSUM_KEY}{}{CHECKSUM_END}", shard::checksum(body));
        if bytes[body.len()..] != *expected.as_bytes() {
            let found = String::from_utf8_lossy(&bytes[body.len()..]).into_owned();
            return Err(CheckpointError::damaged(path, format!("{expected:?} at its end"), format!("{found:?}")));
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let not_json =
            |error: serde_json::Error| CheckpointError::damaged(path, "a checkpoint manifest", error.to_string());
        let Version { version } = serde_json::from_slice(bytes).map_err(not_json)?;
        if version > VERSION {
            return Err(CheckpointError::Version { file: path.to_path_buf(), found: version, supported: VERSION });
        }
        serde_json::from_slice(bytes).map_err(not_json)
    }
}
