//! The weights of a model on disk, whatever they are stored as.
//!
//! Opening reads headers only and checks them against the model's configuration; values are decoded when asked for,
//! row range by row range, from memory-mapped files. So reading a model needs memory for what is asked for at a time.
//!
//! Invariants: every tensor that [`ModelSpec::parameters`] lists is there in its full shape, lies inside its file and
//! has an encoding that can be read. Names and row order are Hugging Face's, also for GGUF files. Absent: writing
//! (see [`crate::writer`]), and quantised compute.

use crate::encoding::Encoding;
use crate::error::{FormatError, Result};
use crate::gguf::{self, Gguf};
use crate::mmap::Map;
use crate::safetensors;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tangelo_configs::model::{EMBEDDING, LM_HEAD};
use tangelo_configs::{ModelSpec, hf_config};
use tangelo_core::{DType, ParamMeta};

/// The file names of a Hugging Face folder.
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";

/// Reads of more bytes than this give their pages back to the system.
const RELEASE_BYTES: usize = 256 << 10;

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Which file of the model.
    pub file: usize,
    /// Where in the file.
    pub bytes: Range<usize>,
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// How values are coded; `None` for types that cannot be read.
    pub encoding: Option<Encoding>,
    /// The file's own name of the type.
    pub type_name: String,
    /// The width of a head whose two rotary halves are stored row by row in turn, as llama.cpp does for its `llama`
    /// architecture: stored row 2i + j of a head is row i + j (width / 2) of Hugging Face's.
    pub interleaved: Option<usize>,
}

/// A model's weights, open for reading.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    spec: ModelSpec,
    files: Vec<Map>,
    metas: Vec<ParamMeta>,
    stored: Vec<(Encoding, Stored)>,
    by_name: HashMap<String, usize>,
}

impl Weights {
    /// Opens a Hugging Face folder (`config.json` with `model.safetensors` or an index and its shards), a `.gguf` file,
    /// or a folder that holds one `.gguf` file.
    ///
    /// # Errors
    /// What is missing, damaged, of an unsupported type, or not as the configuration says; see [`FormatError`].
    pub fn open(path: &Path) -> Result<Weights> {
        match find(path)? {
            Model::Gguf(file) => {
                let gguf = Gguf::open(&file)?;
                let (spec, tensors) = (gguf::model::spec(&gguf)?, gguf::model::tensors(&gguf)?);
                Weights::select(path, spec, vec![gguf.into_map()], tensors)
            }
            Model::HuggingFace { config, files } => {
                let spec = read_config(&config)?;
                let files = files.iter().map(|f| Map::open(f)).collect::<Result<Vec<_>>>()?;
                let tensors = safetensors_of(&files)?;
                Weights::select(path, spec, files, tensors)
            }
        }
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The parameters in the order of [`ModelSpec::parameters`], under Hugging Face's names, each with the type in which
    /// it is stored (F32 for quantised ones, which is what they decode to).
    pub fn metas(&self) -> &[ParamMeta] {
        &self.metas
    }

    /// How the values of a parameter are coded, `None` for a name that the model lacks.
    pub fn encoding(&self, name: &str) -> Option<Encoding> {
        self.by_name.get(name).map(|&i| self.stored[i].0)
    }

    /// Reads rows `rows` (indices of dim 0) of a parameter into `out`, row-major, converted or dequantised to f32.
    /// `out` holds `rows.len()` times the product of the other dims. Only what is asked for is read and decoded.
    ///
    /// # Errors
    /// [`FormatError::Request`] for an unknown name, rows out of range or an `out` of the wrong length.
    pub fn read_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (meta, encoding, stored) = self.tensor(name, &rows)?;
        let width: usize = meta.shape[1..].iter().product();
        if out.len() != rows.len() * width {
            let (found, expected) = (out.len(), rows.len() * width);
            return Err(FormatError::request(name, format!("rows {rows:?} are {expected} values, not {found}")));
        }
        if out.is_empty() {
            return Ok(());
        }
        match stored.interleaved {
            None => self.decode(encoding, stored, rows.start * width, out),
            Some(head) => {
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(width)) {
                    self.decode(encoding, stored, stored_row(row, head) * width, out);
                }
            }
        }
        let head = stored.interleaved.unwrap_or(1);
        let touched = rows.start / head * head * width..rows.end.next_multiple_of(head) * width;
        let bytes = bytes_of(encoding, stored, &touched);
        if bytes.len() > RELEASE_BYTES {
            self.files[stored.file].release(bytes);
        }
        Ok(())
    }

    fn tensor(&self, name: &str, rows: &Range<usize>) -> Result<(&ParamMeta, Encoding, &Stored)> {
        let &index = self.by_name.get(name).ok_or_else(|| {
            FormatError::request(name, format!("there is no such parameter in {}", self.path.display()))
        })?;
        let (meta, (encoding, stored)) = (&self.metas[index], &self.stored[index]);
        if rows.start > rows.end || rows.end > meta.shape[0] {
            return Err(FormatError::request(name, format!("rows {rows:?} asked of {}", meta.shape[0])));
        }
        Ok((meta, *encoding, stored))
    }

    /// Decodes `out.len()` values from value `first` of a tensor on, which need not start or end a block.
    fn decode(&self, encoding: Encoding, stored: &Stored, first: usize, out: &mut [f32]) {
        let bytes = bytes_of(encoding, stored, &(first..first + out.len()));
        let bytes = &self.files[stored.file][bytes];
        let block = encoding.block_values();
        let skipped = first % block;
        let held = bytes.len() / encoding.block_bytes() * block;
        if held == out.len() {
            encoding.decode(bytes, out);
        } else {
            let mut whole = vec![0.0; held];
            encoding.decode(bytes, &mut whole);
            out.copy_from_slice(&whole[skipped..skipped + out.len()]);
        }
    }

    /// Picks the model's parameters from the tensors found.
    fn select(path: &Path, spec: ModelSpec, files: Vec<Map>, mut tensors: HashMap<String, Stored>) -> Result<Weights> {
        forget_what_is_derived(&spec, &mut tensors);
        let mut problems = Vec::new();
        let (mut metas, mut stored) = (Vec::new(), Vec::new());
        for mut meta in spec.parameters(DType::F32) {
            let Some(found) = tensors.remove(&meta.name) else {
                problems.push(format!("missing: {} of shape {:?}", meta.name, meta.shape));
                continue;
            };
            if found.shape != meta.shape {
                problems.push(format!("{}: shape {:?}, expected {:?}", meta.name, found.shape, meta.shape));
                continue;
            }
            let encoding = readable(&files[found.file], &meta.name, &found)?;
            meta.dtype = encoding.dtype();
            metas.push(meta);
            stored.push((encoding, found));
        }
        let mut unexpected: Vec<_> = tensors.into_iter().collect();
        unexpected.sort_by(|a, b| a.0.cmp(&b.0));
        problems.extend(unexpected.iter().map(|(n, s)| format!("unexpected: {n} of shape {:?}", s.shape)));
        if !problems.is_empty() {
            return Err(FormatError::Mismatch { path: path.to_owned(), problems: shortened(problems) });
        }
        let by_name = metas.iter().enumerate().map(|(i, m)| (m.name.clone(), i)).collect();
        Ok(Weights { path: path.to_owned(), spec, files, metas, stored, by_name })
    }
}

/// Where in its file the blocks lie that hold the values `values` of a tensor.
fn bytes_of(encoding: Encoding, stored: &Stored, values: &Range<usize>) -> Range<usize> {
    let (block, size) = (encoding.block_values(), encoding.block_bytes());
    stored.bytes.start + values.start / block * size..stored.bytes.start + values.end.div_ceil(block) * size
}

/// The row of a tensor in the file that is row `row` of Hugging Face's, for heads of width `head`.
fn stored_row(row: usize, head: usize) -> usize {
    let (first, at) = (row / head * head, row % head);
    first + 2 * (at % (head / 2)) + at / (head / 2)
}

/// Drops tensors that other ones or the configuration give: a stored copy of a tied head, and tables of rotary
/// frequencies. Where only the head of a tied pair is stored it serves as the embedding.
fn forget_what_is_derived(spec: &ModelSpec, tensors: &mut HashMap<String, Stored>) {
    tensors.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
    if spec.tie_word_embeddings
        && let Some(head) = tensors.remove(LM_HEAD)
    {
        tensors.entry(EMBEDDING.to_owned()).or_insert(head);
    }
}

fn readable(map: &Map, name: &str, stored: &Stored) -> Result<Encoding> {
    stored.encoding.ok_or_else(|| {
        let hint = "convert the weights with transformers (save_pretrained) or llama-quantize to one of these";
        let supported = Encoding::ALL.map(|e| format!("{e:?}")).join(", ");
        let detail = format!("tensor {name} is of type {}; supported are {supported}: {hint}", stored.type_name);
        FormatError::unsupported(map.path(), detail)
    })
}

fn shortened(mut problems: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 20;
    if problems.len() > SHOWN {
        let more = problems.len() - SHOWN;
        problems.truncate(SHOWN);
        problems.push(format!("... and {more} more"));
    }
    problems
}

/// Where a model's files are.
pub(crate) enum Model {
    /// A Hugging Face folder.
    HuggingFace {
        /// config.json.
        config: PathBuf,
        /// The safetensors files.
        files: Vec<PathBuf>,
    },
    /// A GGUF file.
    Gguf(PathBuf),
}

/// Finds the files of the model at `path`.
pub(crate) fn find(path: &Path) -> Result<Model> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if path.is_file() {
        return match extension {
            "gguf" => Ok(Model::Gguf(path.to_owned())),
            "safetensors" => {
                Ok(Model::HuggingFace { config: path.with_file_name(CONFIG), files: vec![path.to_owned()] })
            }
            _ => Err(FormatError::unsupported(path, format!("is no model; expected {EXPECTED}"))),
        };
    }
    if !path.is_dir() {
        return Err(FormatError::not_found(path, format!("does not exist; expected {EXPECTED}")));
    }
    let config = path.join(CONFIG);
    if path.join(SINGLE).is_file() {
        return Ok(Model::HuggingFace { config, files: vec![path.join(SINGLE)] });
    }
    if path.join(INDEX).is_file() {
        return Ok(Model::HuggingFace { config, files: shards(path)? });
    }
    if let Some(file) = only_gguf(path)? {
        return Ok(Model::Gguf(file));
    }
    let hint = if path.join("pytorch_model.bin").is_file() || path.join("pytorch_model.bin.index.json").is_file() {
        "; pytorch_model.bin is not read: save the model with transformers' save_pretrained"
    } else {
        ""
    };
    Err(FormatError::not_found(path, format!("holds no weights; expected {EXPECTED}{hint}")))
}

const EXPECTED: &str =
    "a folder with config.json and model.safetensors (or model.safetensors.index.json and its shards), or a .gguf file";

/// The one `.gguf` file of a folder, if there is any.
pub(crate) fn only_gguf(folder: &Path) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(FormatError::io("list", folder))? {
        let path = entry.map_err(FormatError::io("list", folder))?.path();
        if path.extension().is_some_and(|e| e == "gguf") && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [first, second, ..] => {
            let names = format!("{} and {}", first.display(), second.display());
            Err(FormatError::not_found(folder, format!("holds several GGUF files ({names}, ...); name one of them")))
        }
    }
}

/// The shards that an index names.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let path = folder.join(INDEX);
    let index = read_json(&path)?;
    let map = index.get("weight_map").and_then(|m| m.as_object());
    let map = map.ok_or_else(|| FormatError::damaged(&path, "it has no object `weight_map`"))?;
    let mut names = Vec::new();
    for (tensor, name) in map {
        let name = name.as_str().filter(|n| Path::new(n).file_name().is_some_and(|f| f == *n));
        names.push(name.ok_or_else(|| {
            FormatError::damaged(&path, format!("`weight_map` gives tensor {tensor} no name of a file beside it"))
        })?);
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|n| folder.join(n)).collect())
}

fn safetensors_of(files: &[Map]) -> Result<HashMap<String, Stored>> {
    let mut all = HashMap::new();
    for (number, file) in files.iter().enumerate() {
        for (name, stored) in safetensors::tensors(file, number)? {
            match all.entry(name) {
                Entry::Occupied(twice) => {
                    let detail = format!("tensor {} is in another shard too", twice.key());
                    return Err(FormatError::damaged(file.path(), detail));
                }
                Entry::Vacant(slot) => slot.insert(stored),
            };
        }
    }
    Ok(all)
}

/// The architecture that a config.json describes.
pub(crate) fn read_config(path: &Path) -> Result<ModelSpec> {
    hf_config::from_json(&read_json(path)?).map_err(|e| FormatError::unsupported(path, e))
}

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let bytes = std::fs::read(path).map_err(FormatError::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::damaged(path, format!("it is not JSON: {e}")))
}
