//! Finding a checkpoint that can be used, and reading any box of any tensor out of it.

use super::manifest::{MANIFEST, Manifest, TensorRecord, to_box};
use super::{CheckpointError, StateKind, TrainState, complete_steps, shard, step_folder_name};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tangelo_configs::ModelSpec;
use tangelo_configs::job::OptimizerName;
use tangelo_core::reshard::Ranks;
use tangelo_core::{DType, IndexBox, ReshardPlan};

/// How much of a checkpoint is looked at when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// The manifest's checksum, every file's size and checksum: every byte is read once.
    Full,
    /// The manifest's checksum and every file's size: for ranks that were told by a rank that looked at all.
    Sizes,
}

/// A checkpoint that was passed over.
#[derive(Debug)]
pub struct Warning {
    /// Its step.
    pub step: u64,
    /// What is wrong with it: the file, what was expected, what was found.
    pub problem: CheckpointError,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the checkpoint of step {} is passed over: {}", self.step, self.problem)
    }
}

/// What [`find_usable`] found.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint, `None` where the folder holds none at all.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are damaged.
    pub warnings: Vec<Warning>,
}

/// The newest usable checkpoint in `folder`, or the one of `load_step`, with every byte verified.
///
/// Errors: `load_step` is absent or damaged; there are checkpoints and all are damaged (starting anew in silence
/// would throw a run away); a newer format; a folder that cannot be read.
pub fn find_usable(folder: &Path, load_step: Option<u64>) -> Result<Found, CheckpointError> {
    let present = complete_steps(folder)?;
    if let Some(step) = load_step {
        if !present.contains(&step) {
            return Err(CheckpointError::NoSuchStep { folder: folder.to_path_buf(), step, present });
        }
        let checkpoint = Checkpoint::open(&folder.join(step_folder_name(step)), Verify::Full)?;
        return Ok(Found { checkpoint: Some(checkpoint), warnings: Vec::new() });
    }
    let mut warnings = Vec::new();
    for &step in present.iter().rev() {
        match Checkpoint::open(&folder.join(step_folder_name(step)), Verify::Full) {
            Ok(checkpoint) => return Ok(Found { checkpoint: Some(checkpoint), warnings }),
            Err(problem @ CheckpointError::Version { .. }) => return Err(problem),
            Err(problem) => warnings.push(Warning { step, problem }),
        }
    }
    if warnings.is_empty() {
        return Ok(Found { checkpoint: None, warnings });
    }
    let problems = warnings.iter().map(|warning| warning.problem.to_string()).collect::<Vec<_>>().join("; ");
    Err(CheckpointError::NoneUsable { folder: folder.to_path_buf(), problems })
}

/// A complete checkpoint, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<(StateKind, String), Tensor>,
}

/// One state tensor: its shape, its boxes, and where each lies: the file and the first byte.
#[derive(Debug)]
struct Tensor {
    shape: Vec<usize>,
    boxes: Vec<IndexBox>,
    places: Vec<(usize, u64)>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`, `.../step-NNNNNNNN`.
    pub fn open(path: &Path, verify: Verify) -> Result<Checkpoint, CheckpointError> {
        let manifest_path = path.join(MANIFEST);
        let bytes = match fs::read(&manifest_path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::damaged(&manifest_path, "a manifest", "no file"));
            }
            Err(error) => return Err(CheckpointError::io("read", &manifest_path)(error)),
        };
        let manifest = Manifest::from_bytes(&manifest_path, &bytes)?;
        for record in &manifest.files {
            shard::check_size(&path.join(&record.name), record.size_bytes)?;
        }
        if verify == Verify::Full {
            check_all(path, &manifest)?;
        }
        let (files, tensors) = index(path, &manifest)?;
        Ok(Checkpoint { path: path.to_path_buf(), manifest, files, tensors })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The step after which it was taken.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Everything but tensors that the run needs to go on.
    pub fn state(&self) -> &TrainState {
        &self.manifest.train_state
    }

    /// All that it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether it holds any tensor of that kind: one without optimizer states cannot be resumed from.
    pub fn has(&self, kind: StateKind) -> bool {
        self.manifest.tensors.iter().any(|tensor| tensor.kind == kind)
    }

    /// Whether its optimizer states, where it holds any, are those of `expected`.
    pub fn check_optimizer(&self, expected: OptimizerName) -> Result<(), CheckpointError> {
        let found = if self.has(StateKind::Momentum) { OptimizerName::Muon } else { OptimizerName::AdamW };
        if found == expected || !self.has(StateKind::ExpAvg) {
            return Ok(());
        }
        Err(CheckpointError::OtherOptimizer { checkpoint: self.path.clone(), found, expected })
    }

    /// Whether its parameters are those of `model`, by name and shape; the error names the first difference.
    pub fn check_model(&self, model: &ModelSpec) -> Result<(), CheckpointError> {
        let other = |difference| CheckpointError::OtherModel { checkpoint: self.path.clone(), difference };
        let expected = model.parameters(DType::F32);
        for meta in &expected {
            match self.tensors.get(&(StateKind::Param, meta.name.clone())) {
                Some(tensor) if tensor.shape == meta.shape => {}
                Some(tensor) => {
                    return Err(other(format!(
                        "{} has shape {:?} here, {:?} in the model",
                        meta.name, tensor.shape, meta.shape
                    )));
                }
                None => return Err(other(format!("it has no parameter {}", meta.name))),
            }
        }
        let known = |name: &str| expected.iter().any(|meta| meta.name == name);
        match self.manifest.tensors.iter().find(|t| t.kind == StateKind::Param && !known(&t.name)) {
            Some(extra) => Err(other(format!("the model has no parameter {}", extra.name))),
            None => Ok(()),
        }
    }

    /// Reads the box `indices` of a tensor into `out`, row-major, whatever boxes it was saved in.
    pub fn read(
        &self,
        kind: StateKind,
        name: &str,
        indices: &IndexBox,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let tensor = self.tensor(kind, name)?;
        assert_eq!(indices.volume(), out.len(), "the space for {name} is not as large as the box");
        let cover = |error: tangelo_core::ReshardError| {
            CheckpointError::damaged(&self.path.join(MANIFEST), format!("{kind} of {name} whole"), error.to_string())
        };
        let plan = ReshardPlan::plan(&tensor.boxes, std::slice::from_ref(indices), Ranks::Separate).map_err(cover)?;
        for copy in &plan.copies {
            let (file, first_byte) = tensor.places[copy.src];
            let runs = Runs::new(&copy.indices, &tensor.boxes[copy.src], indices);
            let (path, file) = &self.files[file];
            runs.read(file, first_byte, out).map_err(CheckpointError::io("read", path))?;
        }
        Ok(())
    }

    fn tensor(&self, kind: StateKind, name: &str) -> Result<&Tensor, CheckpointError> {
        let checkpoint = self.path.clone();
        match self.tensors.get(&(kind, name.to_owned())) {
            Some(tensor) => Ok(tensor),
            None if !self.has(kind) => Err(CheckpointError::ModelOnly { checkpoint, kind }),
            None => Err(CheckpointError::NoSuchTensor { checkpoint, kind, name: name.to_owned() }),
        }
    }
}

/// Compares every file's checksum, several at a time; the error is the first file's in the manifest's order.
fn check_all(path: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(manifest.files.len());
    let work = || {
        let mut failures = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(record) = manifest.files.get(at) else { return failures };
            failures.extend(shard::check_bytes(&path.join(&record.name), record).err().map(|error| (at, error)));
        }
    };
    let failures = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("hashing does not panic")).collect::<Vec<_>>()
    });
    failures.into_iter().min_by_key(|(at, _)| *at).map_or(Ok(()), |(_, error)| Err(error))
}

type Index = (Vec<(PathBuf, File)>, HashMap<(StateKind, String), Tensor>);

/// Opens the files and finds each box's bytes; manifest and headers must agree.
fn index(path: &Path, manifest: &Manifest) -> Result<Index, CheckpointError> {
    let (mut files, mut headers, mut at) = (Vec::new(), Vec::new(), HashMap::new());
    for record in manifest.files.iter().filter(|record| record.name.ends_with(".safetensors")) {
        let path = path.join(&record.name);
        let file = File::open(&path).map_err(CheckpointError::io("open", &path))?;
        headers.push(shard::read_header(&path, &file)?);
        at.insert(record.name.as_str(), files.len());
        files.push((path, file));
    }
    let place = |tensor: &TensorRecord, saved: &super::SavedBox| {
        let key = shard::key(tensor.kind, &tensor.name, &saved.ranges);
        let file = at.get(saved.file.as_str()).copied();
        let found = file.and_then(|file| headers[file].get(&key).map(|(start, shape)| (file, *start, shape)));
        match found {
            Some((file, start, shape)) if *shape == to_box(&saved.ranges).shape() => Ok((file, start)),
            _ => Err(CheckpointError::damaged(&path.join(&saved.file), format!("the tensor {key}"), "another or none")),
        }
    };
    let mut tensors = HashMap::new();
    for tensor in &manifest.tensors {
        let boxes = tensor.boxes.iter().map(|saved| to_box(&saved.ranges)).collect();
        let places = tensor.boxes.iter().map(|saved| place(tensor, saved)).collect::<Result<_, _>>()?;
        let shape = tensor.shape.clone();
        tensors.insert((tensor.kind, tensor.name.clone()), Tensor { shape, boxes, places });
    }
    Ok((files, tensors))
}

/// The contiguous runs of one box inside two others, both row-major: `count` runs of `length` elements.
struct Runs {
    length: usize,
    /// Per outer dim: how many indices, and how far each moves in the source and in the destination, elements.
    outer: Vec<(usize, usize, usize)>,
    from: usize,
    to: usize,
}

/// Runs closer together than this are read at once.
const WINDOW_BYTES: u64 = 4 << 20;

impl Runs {
    fn new(indices: &IndexBox, source: &IndexBox, target: &IndexBox) -> Runs {
        let (inside, outside) = (indices.relative_to(source), indices.relative_to(target));
        let (from_shape, to_shape, shape) = (source.shape(), target.shape(), indices.shape());
        let (mut from_stride, mut to_stride) = (1, 1);
        let (mut length, mut whole) = (1, true);
        let mut runs = Runs { length: 1, outer: Vec::new(), from: 0, to: 0 };
        for dim in (0..shape.len()).rev() {
            runs.from += inside.ranges[dim].start * from_stride;
            runs.to += outside.ranges[dim].start * to_stride;
            if whole {
                length *= shape[dim];
            } else {
                runs.outer.push((shape[dim], from_stride, to_stride));
            }
            whole &= shape[dim] == from_shape[dim] && shape[dim] == to_shape[dim];
            from_stride *= from_shape[dim];
            to_stride *= to_shape[dim];
        }
        runs.length = length;
        runs.outer.reverse();
        runs
    }

    fn count(&self) -> usize {
        self.outer.iter().map(|(count, _, _)| count).product()
    }

    /// Where run `index` starts in the source and in the destination, elements; ascending in both.
    fn start(&self, mut index: usize) -> (usize, usize) {
        let (mut from, mut to) = (self.from, self.to);
        for (count, from_stride, to_stride) in self.outer.iter().rev() {
            from += index % count * from_stride;
            to += index % count * to_stride;
            index /= count;
        }
        (from, to)
    }

    /// Copies every run from `file`, whose box starts at `first_byte`, into `out`: a lone run straight into place,
    /// near ones through one read that spans them.
    fn read(&self, file: &File, first_byte: u64, out: &mut [f32]) -> std::io::Result<()> {
        let (count, mut index, mut window) = (self.count(), 0, Vec::new());
        let byte = |element: usize| first_byte + (element * size_of::<f32>()) as u64;
        while index < count {
            let (from, to) = self.start(index);
            let mut last = index;
            while last + 1 < count && byte(self.start(last + 1).0 + self.length) - byte(from) <= WINDOW_BYTES {
                last += 1;
            }
            if last == index {
                file.read_exact_at(bytemuck::cast_slice_mut(&mut out[to..to + self.length]), byte(from))?;
            } else {
                window.resize(self.start(last).0 + self.length - from, 0f32);
                file.read_exact_at(bytemuck::cast_slice_mut(&mut window), byte(from))?;
                for run in index..=last {
                    let (run_from, run_to) = self.start(run);
                    out[run_to..run_to + self.length].copy_from_slice(&window[run_from - from..][..self.length]);
                }
            }
            index = last + 1;
        }
        Ok(())
    }
}
