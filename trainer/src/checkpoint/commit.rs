//! One save, seen from one rank's saver thread: write, record; on rank 0 also gather, check, name.

use super::manifest::{FORMAT, MANIFEST, Manifest, RankRecord, TensorRecord, VERSION, collect_tensors, to_box};
use super::saver::SaverOptions;
use super::{CheckpointError, Snapshot, folder, shard};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tangelo_core::reshard::Ranks;
use tangelo_core::{IndexBox, ReshardPlan};

/// How far a save has come. Tests stop the process at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveStage {
    /// This rank's file has its header and no data yet.
    ShardStarted,
    /// This rank's file is on disk.
    ShardWritten,
    /// This rank's record is on disk: its part is done.
    RecordWritten,
    /// Rank 0: every rank's part is there and checked.
    BeforeManifest,
    /// Rank 0: everything is on disk under the unfinished name.
    BeforeRename,
    /// Rank 0: the checkpoint is complete; older ones have not been pruned.
    Renamed,
    /// Rank 0: a pruned checkpoint has lost its name, not yet its files.
    BeforeDelete,
}

impl SaveStage {
    /// Every stage, in order.
    pub const ALL: [SaveStage; 7] = [
        SaveStage::ShardStarted,
        SaveStage::ShardWritten,
        SaveStage::RecordWritten,
        SaveStage::BeforeManifest,
        SaveStage::BeforeRename,
        SaveStage::Renamed,
        SaveStage::BeforeDelete,
    ];
}

/// A stage of a save that was just reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveEvent {
    /// The stage.
    pub stage: SaveStage,
    /// The step being saved.
    pub step: u64,
    /// The rank whose saver thread calls.
    pub rank: usize,
}

/// Called on the saver thread at each stage, for planted faults.
pub type SaveObserver = Arc<dyn Fn(SaveEvent) + Send + Sync>;

/// How long rank 0 sleeps between looks for the other ranks' records.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// One save of one rank.
pub(super) struct Commit<'a> {
    pub options: &'a SaverOptions,
    pub snapshot: &'a Snapshot,
    pub abandon: &'a AtomicBool,
}

impl Commit<'_> {
    /// Runs it; the answer is where the checkpoint lies (on ranks other than 0: where it will lie). On an error, what
    /// this rank wrote is removed, and the others are told.
    pub fn run(&self) -> Result<PathBuf, CheckpointError> {
        let partial = folder::partial(&self.options.folder, self.step(), &self.options.attempt);
        let result = match self.options.rank {
            0 => self.remove_failed().and_then(|()| self.write_part(&partial)).and_then(|()| self.complete(&partial)),
            _ => self.write_part(&partial).map(|()| self.options.folder.join(folder::step_folder_name(self.step()))),
        };
        result.inspect_err(|error| self.clean_up(&partial, error))
    }

    /// What other ranks wrote of an earlier save after rank 0 had given it up would take space from this one.
    fn remove_failed(&self) -> Result<(), CheckpointError> {
        folder::remove_failed(&self.options.folder, &self.options.attempt, self.step())
    }

    fn step(&self) -> u64 {
        self.snapshot.state.step
    }

    fn reached(&self, stage: SaveStage) {
        if let Some(observer) = &self.options.observer {
            observer(SaveEvent { stage, step: self.step(), rank: self.options.rank });
        }
    }

    fn proceed(&self) -> Result<(), CheckpointError> {
        match self.abandon.load(Ordering::Relaxed) {
            true => Err(CheckpointError::Abandoned { step: self.step() }),
            false => Ok(()),
        }
    }

    fn write_part(&self, partial: &Path) -> Result<(), CheckpointError> {
        let (step, rank) = (self.step(), self.options.rank);
        fs::create_dir_all(partial).map_err(|error| CheckpointError::write(partial, 0, 0, error))?;
        let mut started = false;
        let proceed = |written: u64| {
            if written > 0 && !started {
                started = true;
                self.reached(SaveStage::ShardStarted);
            }
            self.proceed()
        };
        let path = partial.join(shard::file_name(rank));
        let file = shard::write(&path, (step, rank), &self.snapshot.entries, self.snapshot.data(), proceed)?;
        self.reached(SaveStage::ShardWritten);
        let (attempt, world_size) = (self.options.attempt.clone(), self.options.world_size);
        let entries = self.snapshot.entries.clone();
        let record = RankRecord { attempt, step, rank, world_size, file, entries };
        let bytes = serde_json::to_vec(&record).map_err(|error| describe(partial, error))?;
        let hidden = partial.join(format!(".{}", record_name(rank)));
        write_file(&hidden, &bytes)?;
        let path = partial.join(record_name(rank));
        fs::rename(&hidden, &path).map_err(CheckpointError::io("name", &path))?;
        folder::sync(partial)?;
        self.reached(SaveStage::RecordWritten);
        Ok(())
    }

    fn complete(&self, partial: &Path) -> Result<PathBuf, CheckpointError> {
        let (options, step) = (self.options, self.step());
        let records = self.gather(partial)?;
        let tensors = collect_tensors(&records.iter().map(|(record, _)| record.clone()).collect::<Vec<_>>());
        check_cover(step, &tensors)?;
        let files = records.into_iter().flat_map(|(record, own)| [record.file, own]).collect();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            step,
            world_size: options.world_size,
            attempt: options.attempt.clone(),
            created_unix_seconds: created.as_secs(),
            train_state: self.snapshot.state.clone(),
            model: options.model.clone(),
            config_toml: options.config_toml.clone(),
            files,
            tensors,
        };
        self.reached(SaveStage::BeforeManifest);
        let path = partial.join(MANIFEST);
        let bytes = manifest.to_bytes().map_err(|error| describe(&path, error))?;
        write_file(&path, &bytes)?;
        folder::sync(partial)?;
        self.reached(SaveStage::BeforeRename);
        let path = folder::publish(&options.folder, partial, step, &options.attempt)?;
        self.reached(SaveStage::Renamed);
        Ok(path)
    }

    /// Every rank's record, and the record of the file it lies in.
    fn gather(&self, partial: &Path) -> Result<Vec<(RankRecord, super::FileRecord)>, CheckpointError> {
        let started = Instant::now();
        (0..self.options.world_size).map(|rank| self.wait_for(partial, rank, started)).collect()
    }

    fn wait_for(
        &self,
        partial: &Path,
        rank: usize,
        started: Instant,
    ) -> Result<(RankRecord, super::FileRecord), CheckpointError> {
        let (step, path) = (self.step(), partial.join(record_name(rank)));
        loop {
            if path.exists() {
                return self.read_record(&path, rank);
            }
            let failures = (0..self.options.world_size).map(|rank| (rank, partial.join(failure_name(rank))));
            if let Some((rank, failure)) = failures.into_iter().find(|(_, failure)| failure.exists()) {
                let message = fs::read_to_string(failure).unwrap_or_default();
                return Err(CheckpointError::PeerFailed { step, rank, message });
            }
            self.proceed()?;
            if started.elapsed() > self.options.rank_deadline {
                let waited_seconds = self.options.rank_deadline.as_secs();
                return Err(CheckpointError::MissingRank { step, rank, path, waited_seconds });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn read_record(&self, path: &Path, rank: usize) -> Result<(RankRecord, super::FileRecord), CheckpointError> {
        let bytes = fs::read(path).map_err(CheckpointError::io("read", path))?;
        let record: RankRecord = serde_json::from_slice(&bytes)
            .map_err(|error| CheckpointError::damaged(path, "a rank's record", error.to_string()))?;
        let found = (record.attempt.as_str(), record.step, record.rank, record.world_size);
        let expected = (self.options.attempt.as_str(), self.step(), rank, self.options.world_size);
        if found != expected {
            return Err(CheckpointError::damaged(
                path,
                format!("(attempt, step, rank, ranks) {expected:?}"),
                format!("{found:?}"),
            ));
        }
        shard::check_size(&path.with_file_name(&record.file.name), record.file.size_bytes)?;
        let name = record_name(rank);
        let own = super::FileRecord { name, size_bytes: bytes.len() as u64, xxh3_128: shard::checksum(&bytes) };
        Ok((record, own))
    }

    /// Deletes the older checkpoints that [`super::Retention`] lets go, after this one is complete.
    pub fn prune(&self) -> Result<(), CheckpointError> {
        let options = self.options;
        for step in options.retention.prunable(&folder::complete_steps(&options.folder)?) {
            let doomed = folder::set_deleting(&options.folder, step, &options.attempt)?;
            self.reached(SaveStage::BeforeDelete);
            folder::remove(&doomed)?;
        }
        Ok(())
    }

    /// Gives back the space of a failed save. Errors are dropped here: the one that led here is the one to report, and
    /// what stays behind (other ranks may still be writing) is removed by the next save or start.
    fn clean_up(&self, partial: &Path, error: &CheckpointError) {
        if self.options.rank == 0 {
            folder::remove(partial).ok();
            return;
        }
        let rank = self.options.rank;
        for name in [shard::file_name(rank), format!(".{}", record_name(rank))] {
            fs::remove_file(partial.join(name)).ok();
        }
        fs::write(partial.join(failure_name(rank)), error.to_string()).ok();
    }
}

fn record_name(rank: usize) -> String {
    format!("rank-{rank:05}.json")
}

fn failure_name(rank: usize) -> String {
    format!("rank-{rank:05}.failed")
}

fn describe(path: &Path, error: serde_json::Error) -> CheckpointError {
    CheckpointError::io("describe", path)(std::io::Error::other(error))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| CheckpointError::write(path, bytes.len() as u64, 0, error))
}

/// Invariant 5, before a checkpoint that nobody could read gets its name.
fn check_cover(step: u64, tensors: &[TensorRecord]) -> Result<(), CheckpointError> {
    for TensorRecord { kind, name, shape, boxes } in tensors {
        let cover = |reason| CheckpointError::Cover { step, kind: *kind, name: name.clone(), reason };
        let boxes: Vec<IndexBox> = boxes.iter().map(|saved| to_box(&saved.ranges)).collect();
        if let Some(other) = boxes.iter().find(|b| b.ranges.len() != shape.len()) {
            return Err(cover(format!("{other:?} is not a box of a tensor of shape {shape:?}")));
        }
        let whole = IndexBox::full(shape);
        if let Some(outside) = boxes.iter().find(|b| b.intersect(&whole).as_ref() != Some(*b)) {
            return Err(cover(format!("{outside:?} is not inside shape {shape:?}")));
        }
        ReshardPlan::plan(&boxes, &[whole], Ranks::Separate).map_err(|error| cover(error.to_string()))?;
    }
    Ok(())
}
