//! The GGUF container, versions 2 and 3, little-endian.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. A file is a list of typed keys and values, a
//! list of tensors with their offsets, and their bytes. Long lists (a vocabulary) are left where they are and decoded
//! when asked for. Nothing is trusted: every length and offset is checked against the file before it is used.
//!
//! Absent: version 1, big-endian files, models split over several files, writing.

pub(crate) mod model;
pub(crate) mod value;

use crate::encoding::Encoding;
use crate::error::{FormatError, Result};
use crate::mmap::Map;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use value::{Cursor, Value};

/// The first bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";
/// The tensor data is aligned to this many bytes where the file does not say.
const DEFAULT_ALIGNMENT: usize = 32;
/// ggml's tensors have at most this many dims.
const MAX_DIMS: u32 = 4;

/// An open file: its keys, and where its tensors are.
pub(crate) struct Gguf {
    map: Map,
    values: HashMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

/// A tensor as the file lists it.
pub(crate) struct Tensor {
    pub name: String,
    /// Dims, outermost first (the file lists them innermost first).
    pub shape: Vec<usize>,
    /// `None` for types that cannot be read.
    pub encoding: Option<Encoding>,
    pub type_name: String,
    /// Where in the file. For a type that cannot be read it only has a start.
    pub bytes: Range<usize>,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Gguf> {
        let map = Map::open(path)?;
        let (values, tensors) = read(&map).map_err(|e| match e {
            Problem::Damaged(detail) => FormatError::damaged(path, detail),
            Problem::Unsupported(detail) => FormatError::unsupported(path, detail),
        })?;
        Ok(Gguf { map, values, tensors })
    }

    pub fn path(&self) -> &Path {
        self.map.path()
    }

    pub fn into_map(self) -> Map {
        self.map
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> &Map {
        &self.map
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A key of any integer type that is not negative.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", Value::integer)
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::float)
    }

    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::boolean)
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "text", Value::string)
    }

    /// A list of texts.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, "a list of texts", |v| v.strings(&self.map))
    }

    /// A list of numbers; integers are converted.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |v| v.floats(&self.map))
    }

    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let found = read(value).ok_or_else(|| {
            FormatError::damaged(self.path(), format!("key {key} is {}, expected {expected}", value.kind()))
        })?;
        Ok(Some(found))
    }

    /// A key that must be there.
    pub fn needed<T>(&self, key: &str, found: Result<Option<T>>) -> Result<T> {
        found?.ok_or_else(|| FormatError::damaged(self.path(), format!("key {key} is missing")))
    }
}

/// What can be wrong inside a file.
pub(crate) enum Problem {
    Damaged(String),
    Unsupported(String),
}

type Read<T> = std::result::Result<T, Problem>;

fn read(bytes: &[u8]) -> Read<(HashMap<String, Value>, Vec<Tensor>)> {
    let mut cursor = Cursor::new(bytes);
    let (num_tensors, num_values) = preamble(&mut cursor)?;
    let mut values = HashMap::new();
    for _ in 0..num_values {
        let key = cursor.string("a key")?;
        let value = Value::read(&mut cursor, &key)?;
        values.insert(key, value);
    }
    refuse_split(&values)?;
    let mut listed = Vec::new();
    for _ in 0..num_tensors {
        listed.push(Listed::read(&mut cursor)?);
    }
    let alignment = alignment(&values)?;
    let data_start = cursor.position().next_multiple_of(alignment);
    let tensors = listed.into_iter().map(|l| l.place(bytes.len(), data_start, alignment)).collect::<Read<_>>()?;
    Ok((values, tensors))
}

/// Checks magic and version; returns how many tensors and values there are.
fn preamble(cursor: &mut Cursor<'_>) -> Read<(u64, u64)> {
    let magic = cursor.take(4, "the magic")?;
    if magic != MAGIC {
        let found = magic.escape_ascii();
        return Err(Problem::Damaged(format!("it starts with \"{found}\", a GGUF file starts with \"GGUF\"")));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        _ if version.swap_bytes() <= 3 => {
            return Err(Problem::Unsupported("is a big-endian GGUF file; convert it to little-endian".into()));
        }
        _ => return Err(Problem::Unsupported(format!("is GGUF version {version}; versions 2 and 3 are supported"))),
    }
    Ok((cursor.u64("the number of tensors")?, cursor.u64("the number of keys")?))
}

fn refuse_split(values: &HashMap<String, Value>) -> Read<()> {
    match values.get("split.count").and_then(Value::integer) {
        Some(parts) if parts > 1 => Err(Problem::Unsupported(format!(
            "is one of {parts} parts of a model; join them with `llama-gguf-split --merge`"
        ))),
        _ => Ok(()),
    }
}

fn alignment(values: &HashMap<String, Value>) -> Read<usize> {
    let Some(value) = values.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    let bytes = value.integer().and_then(|n| usize::try_from(n).ok());
    // Far above any page size; keeps the arithmetic below from overflowing.
    let sensible = bytes.filter(|n| n.is_power_of_two() && *n <= 1 << 30);
    sensible.ok_or_else(|| Problem::Damaged("general.alignment is no power of two up to 2^30".into()))
}

/// A tensor before it is known where the data starts.
struct Listed {
    name: String,
    /// Innermost first.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Listed {
    fn read(cursor: &mut Cursor<'_>) -> Read<Listed> {
        let name = cursor.string("the name of a tensor")?;
        let num_dims = cursor.u32(&name)?;
        if num_dims > MAX_DIMS {
            return Err(Problem::Damaged(format!("tensor {name} has {num_dims} dims, at most {MAX_DIMS} are allowed")));
        }
        let dims = (0..num_dims).map(|_| cursor.u64(&name)).collect::<Read<_>>()?;
        Ok(Listed { dims, kind: cursor.u32(&name)?, offset: cursor.u64(&name)?, name })
    }

    fn place(self, file_bytes: usize, data_start: usize, alignment: usize) -> Read<Tensor> {
        let (encoding, type_name) = kind(self.kind);
        let damaged = |detail: String| Problem::Damaged(format!("tensor {}: {detail}", self.name));
        if !self.offset.is_multiple_of(alignment as u64) {
            return Err(damaged(format!("offset {} is no multiple of the alignment {alignment}", self.offset)));
        }
        let start = usize::try_from(self.offset).ok().and_then(|o| o.checked_add(data_start));
        let mut shape = Vec::new();
        for &d in self.dims.iter().rev() {
            shape.push(usize::try_from(d).map_err(|_| damaged(format!("a dim of {d}")))?);
        }
        let size = match encoding {
            None => Some(0),
            Some(e) if shape.last().is_some_and(|n| n % e.block_values() != 0) => {
                return Err(damaged(format!(
                    "rows of {:?} values of type {type_name} are no whole blocks",
                    shape.last()
                )));
            }
            Some(e) => shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| e.bytes_of(n)),
        };
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size)).filter(|&end| end <= file_bytes);
        match (start, end) {
            (Some(start), Some(end)) => Ok(Tensor { name: self.name, shape, encoding, type_name, bytes: start..end }),
            _ => Err(damaged(format!(
                "shape {shape:?} of type {type_name} at offset {} runs past the end of the file, {file_bytes} bytes; \
                 the file was probably cut short: copy or download it again",
                self.offset
            ))),
        }
    }
}

/// What ggml's numbers for types mean (`enum ggml_type`).
fn kind(number: u32) -> (Option<Encoding>, String) {
    let known = match number {
        0 => Some(Encoding::F32),
        1 => Some(Encoding::F16),
        2 => Some(Encoding::Q4_0),
        3 => Some(Encoding::Q4_1),
        8 => Some(Encoding::Q8_0),
        28 => Some(Encoding::F64),
        30 => Some(Encoding::BF16),
        _ => None,
    };
    let other = match number {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    };
    let name = known.map_or_else(|| format!("{other} (ggml type {number})"), |e| format!("{e:?}"));
    (known, name)
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gguf({}, {} tensors)", self.path().display(), self.tensors.len())
    }
}
