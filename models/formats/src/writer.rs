//! Writes a model as a Hugging Face folder, tensor by tensor, without ever holding it.
//!
//! Shapes are known from the [`ModelSpec`], so the headers of all shards are written first and values then go to their
//! place in the file, in any order, a chunk of rows at a time. Memory: one chunk of f32 and of encoded values.
//!
//! Invariants: everything is written into a hidden folder beside the target, synced, and renamed into place by
//! [`HfWriter::finish`], so a folder under the target's name is complete; a folder that is there and not empty is never
//! touched; one writer at a time works on a target, from its first file until the folder has its name, and the next
//! clears away what one that was killed left behind.
//! A tied head is not written, as transformers does not. Absent: other formats, and quantisation.

use crate::error::{BoxError, FormatError, Result};
use crate::safetensors;
use crate::tokenizer::TokenizerAssets;
use crate::weights::{CONFIG, INDEX, SINGLE, Weights};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use tangelo_configs::{ModelSpec, hf_config};
use tangelo_core::{DType, ParamMeta};

/// The size of shards that Hugging Face's tools make, bytes.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Values held at a time: 4 MiB of f32.
const CHUNK_VALUES: usize = 1 << 20;

/// What supplies the values of a parameter: called with a range of rows and where to put their values.
pub type Rows<'a> = dyn FnMut(Range<usize>, &mut [f32]) -> std::result::Result<(), BoxError> + 'a;

/// A model being written.
#[derive(Debug)]
pub struct HfWriter {
    target: PathBuf,
    partial: PathBuf,
    /// Held until this is dropped.
    _lock: TargetLock,
    dtype: DType,
    shards: Vec<(PathBuf, File)>,
    slots: HashMap<String, Slot>,
    finished: bool,
}

/// The place of a tensor.
#[derive(Debug)]
struct Slot {
    shard: usize,
    start: u64,
    shape: Vec<usize>,
    written: bool,
}

impl HfWriter {
    /// Starts to write `spec` with values of type `dtype` to the folder `target`, which must not exist or be empty.
    /// Shards hold at most `max_shard_bytes` ([`MAX_SHARD_BYTES`]) of values each, or one larger tensor. Configuration
    /// and tokenizer files are written at once; where `spec` names no start or end of documents the tokenizer's are taken.
    ///
    /// # Errors
    /// A target that is in use, a `dtype` that is no float, or what the system refuses.
    pub fn create(
        target: &Path,
        spec: &ModelSpec,
        dtype: DType,
        max_shard_bytes: u64,
        tokenizer: Option<&TokenizerAssets>,
    ) -> Result<HfWriter> {
        if !dtype.is_float() {
            return Err(FormatError::unsupported(target, format!("weights of type {dtype}; expected a float type")));
        }
        refuse_occupied(target)?;
        let lock = TargetLock::acquire(target)?;
        // Whoever had the lock before may just have finished.
        refuse_occupied(target)?;
        let partial = make_partial(target)?;
        let mut writer = HfWriter {
            target: target.to_owned(),
            partial,
            _lock: lock,
            dtype,
            shards: Vec::new(),
            slots: HashMap::new(),
            finished: false,
        };
        writer.write_shard_headers(&spec.parameters(dtype), max_shard_bytes)?;
        writer.write_descriptions(spec, tokenizer)?;
        Ok(writer)
    }

    /// Writes the parameter `name`. `rows(range, out)` is called for consecutive ranges of rows (indices of dim 0) and
    /// fills `out` with their values, row-major; it is rounded to the writer's type, to nearest, ties to even.
    ///
    /// # Errors
    /// What `rows` returned, a name that the model lacks or that was written before, a finite value that a F16 cannot
    /// hold, or what the system refuses.
    pub fn write_f32(&mut self, name: &str, rows: &mut Rows<'_>) -> Result<()> {
        let slot = self.slots.get_mut(name).ok_or_else(|| {
            FormatError::request(
                name,
                format!("the model being written to {} has no such parameter", self.target.display()),
            )
        })?;
        if slot.written {
            return Err(FormatError::request(name, "was written before"));
        }
        let width: usize = slot.shape[1..].iter().product();
        let (num_rows, step) = (slot.shape[0], (CHUNK_VALUES / width.max(1)).max(1));
        let (path, file) = &self.shards[slot.shard];
        let mut values = vec![0.0; step.min(num_rows) * width];
        let mut bytes = Vec::new();
        let mut at = slot.start;
        for first in (0..num_rows).step_by(step) {
            let range = first..(first + step).min(num_rows);
            let values = &mut values[..range.len() * width];
            rows(range, values).map_err(|source| FormatError::Supplier { name: name.to_owned(), source })?;
            encode(self.dtype, values, &mut bytes).map_err(|detail| FormatError::request(name, detail))?;
            file.write_all_at(&bytes, at).map_err(FormatError::io("write", path))?;
            at += bytes.len() as u64;
        }
        slot.written = true;
        Ok(())
    }

    /// Completes the model: syncs everything to disk and moves it to its place.
    ///
    /// # Errors
    /// A parameter that was not written, or what the system refuses.
    pub fn finish(mut self) -> Result<()> {
        if let Some(name) = self.slots.iter().filter(|(_, slot)| !slot.written).map(|(name, _)| name).min() {
            return Err(FormatError::request(name, format!("was never written to {}", self.target.display())));
        }
        for entry in fs::read_dir(&self.partial).map_err(FormatError::io("list", &self.partial))? {
            sync(&entry.map_err(FormatError::io("list", &self.partial))?.path())?;
        }
        sync(&self.partial)?;
        refuse_occupied(&self.target)?;
        fs::rename(&self.partial, &self.target).map_err(FormatError::io("move a finished model to", &self.target))?;
        self.finished = true;
        sync(parent(&self.target))
    }

    fn write_shard_headers(&mut self, parameters: &[ParamMeta], max_shard_bytes: u64) -> Result<()> {
        let shards = cut(parameters, self.dtype, max_shard_bytes);
        let names = shard_names(shards.len());
        let mut weight_map = Map::new();
        for (number, (range, name)) in shards.into_iter().zip(&names).enumerate() {
            let held = &parameters[range];
            let (header, starts, length) = safetensors::layout(held, self.dtype);
            let path = self.partial.join(name);
            let file = File::create_new(&path).map_err(FormatError::io("create", &path))?;
            file.set_len(length).map_err(FormatError::io("make room for", &path))?;
            file.write_all_at(&header, 0).map_err(FormatError::io("write", &path))?;
            self.shards.push((path, file));
            for (meta, start) in held.iter().zip(starts) {
                weight_map.insert(meta.name.clone(), json!(name));
                let slot = Slot { shard: number, start, shape: meta.shape.clone(), written: false };
                self.slots.insert(meta.name.clone(), slot);
            }
        }
        if names.len() > 1 {
            let total: usize = parameters.iter().map(|p| p.num_elements() * self.dtype.size_bytes()).sum();
            self.write_json(INDEX, &json!({"metadata": {"total_size": total}, "weight_map": weight_map}))?;
        }
        Ok(())
    }

    fn write_descriptions(&self, spec: &ModelSpec, tokenizer: Option<&TokenizerAssets>) -> Result<()> {
        let mut spec = spec.clone();
        if let Some(tokenizer) = tokenizer {
            tokenizer.save(&self.partial)?;
            spec.bos_token_id = spec.bos_token_id.or(tokenizer.bos_token_id);
            if spec.eos_token_ids.is_empty() {
                spec.eos_token_ids.clone_from(&tokenizer.eos_token_ids);
            }
        }
        self.write_json(CONFIG, &hf_config::to_json(&spec, self.dtype))?;
        self.write_json("generation_config.json", &hf_config::generation_config(&spec))
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        let path = self.partial.join(name);
        fs::write(&path, format!("{value:#}\n")).map_err(FormatError::io("write", &path))
    }
}

impl Drop for HfWriter {
    /// Clears away an unfinished model. What cannot be removed is left for the next writer to the same target.
    fn drop(&mut self) {
        if !self.finished {
            drop(fs::remove_dir_all(&self.partial));
        }
    }
}

/// The right to write to a target: a locked file beside it, which ends with the process that holds it.
#[derive(Debug)]
struct TargetLock {
    path: PathBuf,
    _file: File,
}

impl TargetLock {
    fn acquire(target: &Path) -> Result<TargetLock> {
        let path = hidden_beside(target, "lock")?;
        let folder = parent(target);
        fs::create_dir_all(folder).map_err(FormatError::io("make the folder", folder))?;
        let file = File::create(&path).map_err(FormatError::io("create", &path))?;
        let inode = |m: std::io::Result<fs::Metadata>| m.map(|m| (m.dev(), m.ino())).ok();
        // A lock on a file that its last owner has removed meanwhile excludes nobody.
        if file.try_lock().is_err() || inode(file.metadata()) != inode(fs::metadata(&path)) {
            let detail = "belongs to a running export to the same folder".into();
            return Err(FormatError::Occupied { path, detail });
        }
        Ok(TargetLock { path, _file: file })
    }
}

impl Drop for TargetLock {
    /// Removes the file before the lock on it ends. One that cannot be removed is taken over by the next writer.
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// Writes an open model, whatever it is stored as, to the folder `target`; see [`HfWriter::create`].
///
/// # Errors
/// As [`HfWriter`]'s.
pub fn convert(
    weights: &Weights,
    target: &Path,
    dtype: DType,
    max_shard_bytes: u64,
    tokenizer: Option<&TokenizerAssets>,
) -> Result<()> {
    let mut writer = HfWriter::create(target, weights.spec(), dtype, max_shard_bytes, tokenizer)?;
    for meta in weights.metas() {
        writer.write_f32(&meta.name, &mut |rows, out| Ok(weights.read_f32(&meta.name, rows, out)?))?;
    }
    writer.finish()
}

fn refuse_occupied(target: &Path) -> Result<()> {
    let occupied = |detail: &str| FormatError::Occupied { path: target.to_owned(), detail: detail.to_owned() };
    match fs::read_dir(target) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(occupied("is not empty")),
            None => Ok(()),
        },
        Err(_) if target.symlink_metadata().is_ok() => Err(occupied("is not a folder that can be read")),
        Err(_) => Ok(()),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `.NAME.suffix` beside a folder called NAME.
fn hidden_beside(target: &Path, suffix: &str) -> Result<PathBuf> {
    match target.file_name() {
        Some(name) => Ok(parent(target).join(format!(".{}.{suffix}", name.to_string_lossy()))),
        None => Err(FormatError::unsupported(target, "cannot be written to: it names no folder")),
    }
}

/// Makes the hidden folder beside `target`, empty.
fn make_partial(target: &Path) -> Result<PathBuf> {
    let partial = hidden_beside(target, "partial")?;
    fs::create_dir_all(&partial).map_err(FormatError::io("make the folder", &partial))?;
    for entry in fs::read_dir(&partial).map_err(FormatError::io("list", &partial))? {
        let left = entry.map_err(FormatError::io("list", &partial))?.path();
        fs::remove_file(&left).map_err(FormatError::io("remove what a killed export left,", &left))?;
    }
    Ok(partial)
}

/// Cuts a list of parameters into runs of at most `max_bytes`, or of one larger parameter.
fn cut(parameters: &[ParamMeta], dtype: DType, max_bytes: u64) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut first, mut held) = (0, 0);
    for (i, parameter) in parameters.iter().enumerate() {
        let bytes = (parameter.num_elements() * dtype.size_bytes()) as u64;
        if i > first && held + bytes > max_bytes {
            shards.push(first..i);
            (first, held) = (i, 0);
        }
        held += bytes;
    }
    shards.push(first..parameters.len());
    shards
}

fn shard_names(count: usize) -> Vec<String> {
    match count {
        1 => vec![SINGLE.to_owned()],
        _ => (1..=count).map(|i| format!("model-{i:05}-of-{count:05}.safetensors")).collect(),
    }
}

/// Replaces the contents of `bytes` by `values` as little-endian values of type `dtype`.
fn encode(dtype: DType, values: &[f32], bytes: &mut Vec<u8>) -> std::result::Result<(), String> {
    match dtype {
        DType::F32 => put(values, bytes, |v| v.to_le_bytes()),
        DType::F64 => put(values, bytes, |v| f64::from(*v).to_le_bytes()),
        DType::BF16 => put(values, bytes, |v| bf16::from_f32(*v).to_le_bytes()),
        DType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            if let Some((v, _)) = values.iter().zip(&halves).find(|(v, h)| v.is_finite() && h.is_infinite()) {
                return Err(format!("{v} is too large for F16 (at most 65504); write BF16 or F32"));
            }
            put(&halves, bytes, |h| h.to_le_bytes());
        }
        DType::I64 | DType::I32 | DType::U8 => return Err(format!("{dtype} is no float type")),
    }
    Ok(())
}

fn put<T, const N: usize>(values: &[T], bytes: &mut Vec<u8>, encoded: impl Fn(&T) -> [u8; N]) {
    bytes.resize(values.len() * N, 0);
    for (b, v) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *b = encoded(v);
    }
}

/// Waits until a file or folder is on disk.
fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(FormatError::io("sync", path))
}
