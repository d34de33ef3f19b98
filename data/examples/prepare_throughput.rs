//! Tokenises a source and packs it, and prints MB/s, tokens/s and the peak resident memory.
//!
//! `cargo run --release -p tangelo-data --example prepare_throughput -- TOKENIZER OUT_FOLDER THREADS SEQ_LEN PATH...`
//! `data/benches/datasets_map.py` is the same work with Hugging Face `datasets`.

use std::path::PathBuf;
use std::time::Instant;
use tangelo_configs::job::Packing;
use tangelo_data::{Loader, LoaderOptions, LoaderSource, PrepareOptions, Split, prepare};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, folder, threads, seq_len, paths @ ..] = arguments.as_slice() else {
        return Err("usage: prepare_throughput TOKENIZER OUT_FOLDER THREADS SEQ_LEN PATH...".into());
    };
    let mut options = PrepareOptions::new(paths.to_vec(), tokenizer, folder);
    options.num_threads = threads.parse()?;
    let start = Instant::now();
    let manifest = prepare(&options, &())?;
    let loader = Loader::open(LoaderOptions {
        sources: vec![LoaderSource { name: "bench".into(), folder: PathBuf::from(folder), weight: None }],
        split: Split::Train,
        validation_fraction: 0.0,
        seq_len: seq_len.parse()?,
        packing: Packing::Concat,
        document_mask: true,
        seed: 0,
        global_batch_size: 8,
        data_rank: 0,
        data_size: 1,
        verify: false,
    })?;
    let prepared = start.elapsed().as_secs_f64();
    let (mb, tokens) = (manifest.text_bytes as f64 / 1e6, manifest.tokens as f64);
    println!("prepare: {mb:.1} MB, {tokens} tokens in {prepared:.2} s: {:.2} MB/s; {}", mb / prepared, peak()?);
    let start = Instant::now();
    let mut read = 0;
    for first in (0..loader.num_samples()).step_by(8) {
        read += loader.batch_at(first)?.num_tokens();
    }
    println!("load: {:.1} million tokens/s; {}", read as f64 / 1e6 / start.elapsed().as_secs_f64(), peak()?);
    Ok(())
}

/// Peak resident memory so far; it counts the pages of mapped shards that were touched.
fn peak() -> Result<String, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    Ok(status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default().replace('\t', " "))
}
