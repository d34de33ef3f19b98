//! The typed values of a GGUF file, and a cursor that never reads past its end.

use super::{Problem, Read};
use crate::encoding::Encoding;
use std::ops::Range;

/// The value of a key.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Integer(i128),
    Float(f64),
    Boolean(bool),
    String(String),
    /// A list of `len` elements of one type, left in the file.
    List {
        kind: u32,
        len: usize,
        bytes: Range<usize>,
    },
}

/// Numbers of value types in files (`enum gguf_type`).
mod kinds {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const LIST: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

impl Value {
    pub fn read(cursor: &mut Cursor<'_>, key: &str) -> Read<Value> {
        let kind = cursor.u32(key)?;
        if kind == kinds::LIST {
            return Value::read_list(cursor, key);
        }
        Value::scalar(cursor, kind, key)
    }

    fn scalar(cursor: &mut Cursor<'_>, kind: u32, key: &str) -> Read<Value> {
        Ok(match kind {
            kinds::U8 => Value::Integer(cursor.array::<1>(key)?[0].into()),
            kinds::I8 => Value::Integer(i8::from_le_bytes(cursor.array(key)?).into()),
            kinds::U16 => Value::Integer(u16::from_le_bytes(cursor.array(key)?).into()),
            kinds::I16 => Value::Integer(i16::from_le_bytes(cursor.array(key)?).into()),
            kinds::U32 => Value::Integer(u32::from_le_bytes(cursor.array(key)?).into()),
            kinds::I32 => Value::Integer(i32::from_le_bytes(cursor.array(key)?).into()),
            kinds::U64 => Value::Integer(u64::from_le_bytes(cursor.array(key)?).into()),
            kinds::I64 => Value::Integer(i64::from_le_bytes(cursor.array(key)?).into()),
            kinds::F32 => Value::Float(shortest(f32::from_le_bytes(cursor.array(key)?))),
            kinds::F64 => Value::Float(f64::from_le_bytes(cursor.array(key)?)),
            kinds::BOOL => Value::Boolean(cursor.array::<1>(key)?[0] != 0),
            kinds::STRING => Value::String(cursor.string(key)?),
            _ => return Err(unknown_kind(kind, key)),
        })
    }

    fn read_list(cursor: &mut Cursor<'_>, key: &str) -> Read<Value> {
        let kind = cursor.u32(key)?;
        let len = usize::try_from(cursor.u64(key)?).unwrap_or(usize::MAX);
        let start = cursor.position();
        match width(kind) {
            Some(width) => {
                cursor.take(len.saturating_mul(width), key)?;
            }
            // Each text has at least its length in the file, so a wrong `len` soon hits the end.
            None if kind == kinds::STRING => {
                for _ in 0..len {
                    cursor.text(key)?;
                }
            }
            None => return Err(unknown_kind(kind, key)),
        }
        Ok(Value::List { kind, len, bytes: start..cursor.position() })
    }

    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Boolean(_) => "true or false",
            Value::String(_) => "text",
            Value::List { .. } => "a list",
        }
    }

    pub fn integer(&self) -> Option<u64> {
        match self {
            Value::Integer(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub fn float(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            Value::Integer(n) => Some(*n as f64),
            _ => None,
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        match self {
            Value::Boolean(b) => Some(*b),
            _ => None,
        }
    }

    pub fn string(&self) -> Option<&str> {
        match self {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A list of texts; `file` is the whole file.
    pub fn strings(&self, file: &[u8]) -> Option<Vec<String>> {
        self.list(file, |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })
    }

    /// A list of numbers; `file` is the whole file.
    pub fn floats(&self, file: &[u8]) -> Option<Vec<f64>> {
        self.list(file, |value| value.float())
    }

    fn list<T>(&self, file: &[u8], element: impl Fn(Value) -> Option<T>) -> Option<Vec<T>> {
        let Value::List { kind, len, bytes } = self else { return None };
        let mut cursor = Cursor::new(file.get(bytes.clone())?);
        (0..*len).map(|_| element(Value::scalar(&mut cursor, *kind, "").ok()?)).collect()
    }
}

/// The f64 that is written as the f32 is: 1e-5 stays 1e-5.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

fn width(kind: u32) -> Option<usize> {
    Some(match kind {
        kinds::U8 | kinds::I8 | kinds::BOOL => 1,
        kinds::U16 | kinds::I16 => 2,
        kinds::U32 | kinds::I32 | kinds::F32 => 4,
        kinds::U64 | kinds::I64 | kinds::F64 => 8,
        _ => return None,
    })
}

fn unknown_kind(kind: u32, key: &str) -> Problem {
    Problem::Damaged(format!("{key} has a value of unknown type {kind}"))
}

/// Reads a file from front to back.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, position: 0 }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    /// The next `n` bytes; `what` they are for goes into the message if they are not there.
    pub fn take(&mut self, n: usize, what: &str) -> Read<&'a [u8]> {
        let end = self.position.checked_add(n);
        let taken = end.and_then(|end| self.bytes.get(self.position..end)).ok_or_else(|| {
            let (at, all) = (self.position, self.bytes.len());
            Problem::Damaged(format!(
                "reading {what} at byte {at} needs {n} bytes, the file has {all} in all; it was probably cut short: \
                 copy or download it again"
            ))
        })?;
        self.position += n;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Read<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub fn u32(&mut self, what: &str) -> Read<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Read<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Read<&'a [u8]> {
        let length = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        self.take(length, what)
    }

    /// Text; bytes that are no UTF-8 are replaced (vocabularies of old files hold some).
    pub fn string(&mut self, what: &str) -> Read<String> {
        Ok(String::from_utf8_lossy(self.text(what)?).into_owned())
    }
}

/// The f32 values of a tensor's bytes.
pub(crate) fn tensor_values(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / encoding.block_bytes() * encoding.block_values()];
    encoding.decode(bytes, &mut values);
    values
}
