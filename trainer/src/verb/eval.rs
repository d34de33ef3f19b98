//! `eval`: perplexity of a model on files.
//!
//! Documents are cut into windows of `seq_len` tokens that overlap by one, so that every token but a document's first
//! is predicted exactly once; the first is predicted too where the tokenizer puts a start-of-text token before it.

use super::VerbProgress;
use super::generate::print_line;
use super::score::logprobs;
use crate::error::{Result, TrainError};
use crate::open_model;
use serde_json::json;
use tangelo_configs::job::DEFAULT_TEXT_COLUMN;
use tangelo_configs::requests::EvalRequest;
use tangelo_data::DataError;
use tangelo_data::source::{Content, MAX_DOCUMENT_BYTES, OpenFile, ScannedFile, describe_skipped, discover, scan};
use tangelo_observe::stderr_line;

/// Windows are no longer than this unless asked for: attention is quadratic in it.
const DEFAULT_SEQ_LEN: usize = 2048;

/// Sums over documents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    documents: u64,
    bytes: u64,
    tokens: u64,
    negative_logprob: f64,
}

impl Totals {
    fn loss(&self) -> f64 {
        self.negative_logprob / self.tokens as f64
    }

    fn bits_per_byte(&self) -> f64 {
        self.negative_logprob / std::f64::consts::LN_2 / self.bytes as f64
    }

    fn detail(&self) -> String {
        format!("{} tokens  loss {:.4}", self.tokens, self.loss())
    }
}

/// The verb.
pub fn run(request: &EvalRequest) -> Result<()> {
    let mut progress = VerbProgress::new("evaluating");
    progress.phase("loading the model");
    let opened = open_model::open(&request.model)?;
    let tokenizer = opened.tokenizer?;
    let longest = opened.model.spec().max_position_embeddings;
    let seq_len = if request.seq_len > 0 { request.seq_len } else { longest.min(DEFAULT_SEQ_LEN) };
    if seq_len > longest {
        return Err(TrainError::Config(format!("--seq-len {seq_len} is longer than the model's {longest} positions")));
    }
    let column = request.text_column.as_deref().unwrap_or(DEFAULT_TEXT_COLUMN);
    let failed = |e: DataError| TrainError::Data(e.to_string());
    let mut totals = Totals::default();
    let files = files_of_text(&request.paths, column).map_err(failed)?;
    let (mut before, all) = (0, files.iter().map(|file| file.size_bytes).sum());
    for file in files {
        let first_byte = totals.bytes;
        let mut documents = OpenFile::open(&file.file, Content::Column(column), MAX_DOCUMENT_BYTES).map_err(failed)?;
        while let Some(text) = documents.next_document().map_err(failed)? {
            let ids = super::encode(&tokenizer, &text)?;
            super::check_ids(&ids, opened.model.spec().vocab_size)?;
            totals.documents += 1;
            totals.bytes += text.len() as u64;
            for (number, window) in windows(&ids, seq_len).enumerate() {
                let scored = logprobs(&opened.model, window);
                totals.tokens += scored.len() as u64;
                totals.negative_logprob -= scored.iter().sum::<f64>();
                // Readers read ahead, and a whole file may be one document: text that was scored counts.
                let share = ((number + 1) * seq_len).min(ids.len()) as f64 / ids.len() as f64;
                let scored_bytes = totals.bytes - first_byte - ((1.0 - share) * text.len() as f64) as u64;
                let done = before + scored_bytes.min(documents.bytes_read());
                progress.update(done.min(u64::max(all, 1) - 1), all, || totals.detail());
            }
        }
        before += file.size_bytes;
    }
    if totals.tokens == 0 {
        return Err(TrainError::Data(format!("{:?}: no document has two tokens or more to evaluate", request.paths)));
    }
    progress.update(all, all, || totals.detail());
    report(&totals, request.json)
}

/// The files that `paths` name, without what is no text; a warning says what was left out.
fn files_of_text(paths: &[String], column: &str) -> std::result::Result<Vec<ScannedFile>, DataError> {
    let mut files = scan(discover(paths)?, Content::Column(column), &[], &())?;
    if let Some(skipped) = describe_skipped(&files) {
        stderr_line(format!("warning: {skipped}"));
    }
    files.retain(|file| file.skipped.is_none());
    Ok(files)
}

/// Windows of at most `seq_len + 1` ids: `seq_len` inputs and as many targets; neighbours share one id.
fn windows(ids: &[u32], seq_len: usize) -> impl Iterator<Item = &[u32]> {
    (0..ids.len().saturating_sub(1))
        .step_by(seq_len)
        .map(move |start| &ids[start..(start + seq_len + 1).min(ids.len())])
}

fn report(totals: &Totals, as_json: bool) -> Result<()> {
    if as_json {
        return print_line(
            &json!({
                "loss": totals.loss(), "perplexity": totals.loss().exp(), "bits_per_byte": totals.bits_per_byte(),
                "tokens": totals.tokens, "documents": totals.documents, "bytes": totals.bytes,
            })
            .to_string(),
        );
    }
    print_line(&format!("loss           {:.4} nats per token", totals.loss()))?;
    print_line(&format!("perplexity     {:.3}", totals.loss().exp()))?;
    print_line(&format!("bits per byte  {:.4}", totals.bits_per_byte()))?;
    print_line(&format!("tokens         {} in {} documents ({} bytes)", totals.tokens, totals.documents, totals.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_may_hold_more_than_text() {
        let folder = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 4] =
            [("a.txt", b"text"), ("b.bin", b"\x7f\0"), ("c.json", b"{\n}"), ("d.json", b"{\"text\": \"d\"}")];
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let found = files_of_text(&[folder.path().display().to_string()], "text").unwrap();
        let names: Vec<_> = found.iter().map(|f| f.file.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.txt", "d.json"]);
    }

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for n in 0..40u32 {
            let ids: Vec<u32> = (0..n).collect();
            let targets: Vec<u32> = windows(&ids, 7).flat_map(|w| w[1..].to_vec()).collect();
            assert_eq!(targets, (1..n).collect::<Vec<_>>());
            assert!(windows(&ids, 7).all(|w| w.len() <= 8));
        }
    }
}
