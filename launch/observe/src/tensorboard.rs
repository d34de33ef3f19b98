//! TensorBoard event files, written by hand: three small protobuf messages in TFRecord framing.
//!
//! Formats: `tensorflow/core/util/event.proto` and `summary.proto` (public), and the record format described in
//! `tensorflow/core/lib/io/record_writer.h`: length (u64 LE), masked CRC-32C of it, data, masked CRC-32C of the data.
//! Only scalars are written. Where a run goes on or begins anew, the file opens with a session-start event, which makes
//! TensorBoard drop the points of earlier files at or after that step.

use crate::unix_seconds;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates a new event file in `folder` for points after `resume_step`.
    pub fn create(folder: &Path, resume_step: u64) -> io::Result<EventFile> {
        fs::create_dir_all(folder)?;
        let goes_on = resume_step > 0 || holds_event_files(folder)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "localhost".into());
        let (now, pid) = (unix_seconds(), std::process::id());
        let create = |index: usize| {
            let path = folder.join(format!("{PREFIX}{:010}.{}.{pid}.{index}", now as u64, host.trim()));
            File::create_new(path).map(|file| EventFile { file })
        };
        // One process may open several within a second.
        let taken = |e: &io::Error| e.kind() == io::ErrorKind::AlreadyExists;
        let result = (0..1000).map(create).find(|result| !result.as_ref().is_err_and(taken));
        let mut events = result.unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()))?;
        events.append(&event(now, None, 3, b"brain.Event:2"))?;
        if goes_on {
            const SESSION_START: [u8; 2] = [0x08, 0x01];
            events.append(&event(now, Some(resume_step + 1), 7, &SESSION_START))?;
        }
        Ok(events)
    }

    /// Appends one event with a scalar for each tag.
    pub fn scalars<'a>(
        &mut self,
        time: f64,
        step: u64,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            put_key(&mut entry, 2, FIXED32);
            entry.extend_from_slice(&(value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry);
        }
        self.append(&event(time, Some(step), 5, &summary))
    }

    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc(data).to_le_bytes());
        self.file.write_all(&record)
    }
}

/// Whether an earlier run, or an earlier attempt of this one, left points there.
fn holds_event_files(folder: &Path) -> io::Result<bool> {
    let mut entries = fs::read_dir(folder)?.flatten();
    Ok(entries.any(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)))
}

/// How the names of event files begin.
const PREFIX: &str = "events.out.tfevents.";

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

/// An `Event` with one member of its `what` in `field`.
fn event(time: f64, step: Option<u64>, field: u8, what: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(what.len() + 32);
    put_key(&mut out, 1, FIXED64);
    out.extend_from_slice(&time.to_le_bytes());
    if let Some(step) = step {
        put_key(&mut out, 2, VARINT);
        put_varint(&mut out, step);
    }
    put_bytes(&mut out, field, what);
    out
}

fn put_key(out: &mut Vec<u8>, field: u8, wire_type: u8) {
    out.push(field << 3 | wire_type);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    put_key(out, field, BYTES);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_is_the_published_one() {
        // crc32c("123456789") = 0xe3069283 is the check value of the Castagnoli polynomial (RFC 3720 family).
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        // record_writer.h: rotated right by 15 bits, plus 0xa282ead8.
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5u32);
    }

    #[test]
    fn a_file_beside_another_opens_with_a_session_start() {
        let folder = tempfile::tempdir().unwrap();
        let length = || {
            let events = EventFile::create(folder.path(), 0).unwrap();
            events.file.metadata().unwrap().len()
        };
        let (first, second) = (length(), length());
        // Framing of 16 bytes, the time of 9, step 1 in 2, and a message of 2 behind a key and a length.
        assert_eq!(second - first, 16 + 9 + 2 + 4);
    }

    #[test]
    fn varints_are_base_128_low_first() {
        let mut out = Vec::new();
        put_varint(&mut out, 300);
        assert_eq!(out, [0xac, 0x02]);
    }
}
