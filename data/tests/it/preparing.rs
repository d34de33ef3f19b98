//! Preparation: whatever the threads and interruptions, the same shards; whatever changed, an error that says so.

use crate::support::{Folder, real_text, sentence, shards};
use arrow::array::{ArrayRef, RecordBatch, StringArray};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tangelo_configs::JobConfig;
use tangelo_configs::job::{DataSource, Packing};
use tangelo_data::tokenizer::{TrainOptions, train};
use tangelo_data::{
    DataError, Manifest, PrepareProgress, Progress, TextTokenizer, inspect, prepare, prepare_job, wait_for_job,
};

#[test]
fn output_does_not_depend_on_threads() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 6000);
    let prepared = |threads: usize| {
        let mut options = folder.options("a.jsonl", &format!("p{threads}"));
        (options.num_threads, options.shard_tokens) = (threads, 20_000);
        let manifest = prepare(&options, &()).unwrap();
        assert_eq!(manifest.documents, 6000);
        shards(&options.folder)
    };
    let one = prepared(1);
    assert!(one.len() > 3);
    assert_eq!(prepared(2), one);
    assert_eq!(prepared(7), one);
}

/// Stops after some updates, and remembers what was said.
#[derive(Default)]
struct Watcher {
    stop_after: usize,
    updates: AtomicUsize,
    last: Mutex<PrepareProgress>,
    warnings: Mutex<Vec<String>>,
}

impl Progress for Watcher {
    fn update(&self, progress: &PrepareProgress) {
        self.updates.fetch_add(1, Ordering::Relaxed);
        *self.last.lock().unwrap() = *progress;
    }
    fn warn(&self, message: &str) {
        self.warnings.lock().unwrap().push(message.into());
    }
    fn cancelled(&self) -> bool {
        self.stop_after > 0 && self.updates.load(Ordering::Relaxed) >= self.stop_after
    }
}

#[test]
fn interrupted_work_goes_on_behind_the_finished_shards() {
    let folder = Folder::new();
    for file in 0..3 {
        folder.write_documents(&format!("c/{file}.jsonl"), 5000);
    }
    let mut whole = folder.options("c", "whole");
    whole.shard_tokens = 30_000;
    let expected = prepare(&whole, &()).unwrap();
    let mut options = folder.options("c", "torn");
    options.shard_tokens = 30_000;
    let mut stops = 0;
    for stop_after in [1, 2, 2, 3] {
        let watcher = Watcher { stop_after, ..Watcher::default() };
        match prepare(&options, &watcher) {
            Err(error) => assert!(error.to_string().contains("interrupted"), "{error}"),
            Ok(_) => break,
        }
        stops += 1;
        // As if it had been killed while writing.
        folder.write("torn/shard-00099.arrow.partial", "half");
    }
    assert!(stops >= 2, "it was interrupted {stops} times");
    let kept = shards(&options.folder);
    assert!(!kept.is_empty());
    // A finished shard that was damaged before the folder was finished is made again.
    let _ = fs::remove_file(options.folder.join("manifest.json"));
    let last = options.folder.join(&kept[kept.len() - 1].0);
    let mut bytes = fs::read(&last).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&last, bytes).unwrap();
    let watcher = Watcher::default();
    assert_eq!(prepare(&options, &watcher).unwrap(), expected);
    assert_eq!(shards(&options.folder), shards(&whole.folder));
    let last = *watcher.last.lock().unwrap();
    assert_eq!((last.bytes_done, last.documents, last.tokens), (last.bytes_total, 15_000, expected.tokens));
    // Once more: found done, nothing tokenised.
    let watcher = Watcher::default();
    assert_eq!(prepare(&options, &watcher).unwrap(), expected);
    assert_eq!(watcher.updates.load(Ordering::Relaxed), 0);
}

/// Asks to stop when a phase has begun.
struct StopIn(&'static str, AtomicBool);

impl Progress for StopIn {
    fn phase(&self, name: &str) {
        self.1.fetch_or(name == self.0, Ordering::Relaxed);
    }
    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }
}

#[test]
fn every_long_phase_can_be_stopped() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 400);
    let options = folder.options("a.jsonl", "p");
    let learn = TrainOptions::new(options.paths.clone(), 400);
    let stop_in = |phase| StopIn(phase, AtomicBool::new(false));
    for phase in ["looking at source files", "counting words", "learning merges"] {
        let stopped = train(&learn, &stop_in(phase)).map(|_| ());
        assert!(matches!(stopped, Err(DataError::Interrupted)), "{phase}: {stopped:?}");
    }
    let stopped = |phase| matches!(prepare(&options, &stop_in(phase)), Err(DataError::Interrupted));
    assert!(stopped("looking at source files") && stopped("tokenising"));
    let manifest = prepare(&options, &()).unwrap();
    // As if it had been killed before the end.
    fs::remove_file(options.folder.join("manifest.json")).unwrap();
    let kept = shards(&options.folder);
    assert!(stopped("checking token shards"));
    assert_eq!(shards(&options.folder), kept, "what was not checked is kept");
    assert_eq!(prepare(&options, &()).unwrap(), manifest);
}

#[test]
fn changed_inputs_are_refused_by_name() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 50);
    let options = folder.options("a.jsonl", "p");
    prepare(&options, &()).unwrap();
    let refused = |options: &tangelo_data::PrepareOptions, what: &str, detail: &str| {
        let error = prepare(options, &()).unwrap_err();
        let DataError::Mismatch { what: found, .. } = &error else { panic!("{error}") };
        assert_eq!(*found, what);
        assert!(error.to_string().contains(detail), "{error}");
    };
    refused(
        &tangelo_data::PrepareOptions { shard_tokens: 99, ..options.clone() },
        "set of options",
        "shard_tokens: 99",
    );
    train(&TrainOptions::new(vec![folder.text("train.txt")], 300), &()).unwrap().save(&folder.path("other")).unwrap();
    let other = tangelo_data::PrepareOptions { tokenizer: folder.path("other"), ..options.clone() };
    refused(&other, "tokenizer", "now vocabulary of 300");
    folder.write_documents("a.jsonl", 51);
    refused(&options, "set of sources", "a.jsonl changed");
    let overwrite = tangelo_data::PrepareOptions { overwrite: true, ..options.clone() };
    assert_eq!(prepare(&overwrite, &()).unwrap().documents, 51);
    // The same content at another place is the same source.
    fs::create_dir(folder.path("moved")).unwrap();
    fs::rename(folder.path("a.jsonl"), folder.path("moved/a.jsonl")).unwrap();
    let moved = tangelo_data::PrepareOptions { paths: vec![folder.text("moved/a.jsonl")], ..options };
    assert_eq!(prepare(&moved, &()).unwrap().documents, 51);
}

fn write_parquet(path: &Path, batch: &RecordBatch) {
    let file = File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

fn texts(batch_rows: std::ops::Range<u64>) -> RecordBatch {
    let ids: ArrayRef = Arc::new(StringArray::from_iter_values(batch_rows.clone().map(|i| i.to_string())));
    let body: ArrayRef =
        Arc::new(StringArray::from_iter(batch_rows.map(|i| if i % 10 == 3 { None } else { Some(sentence(i)) })));
    RecordBatch::try_from_iter_with_nullable([("id", ids, false), ("body", body, true)]).unwrap()
}

#[test]
fn all_formats_give_the_same_tokens() {
    let folder = Folder::new();
    let kept: Vec<u64> = (0..200).filter(|i| i % 10 != 3).collect();
    let line = |i: &u64| serde_json::json!({ "id": i, "body": sentence(*i) }).to_string() + "\n";
    let lines: String = kept.iter().map(line).collect();
    folder.write("l.jsonl", &lines);
    let mut gzip = flate2::write::GzEncoder::new(File::create(folder.path("g.jsonl.gz")).unwrap(), Default::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    gzip.finish().unwrap();
    folder.write("z.jsonl.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap());
    let batch = texts(0..200);
    write_parquet(&folder.path("p.parquet"), &batch);
    let mut file =
        arrow::ipc::writer::FileWriter::try_new(File::create(folder.path("f.arrow")).unwrap(), &batch.schema())
            .unwrap();
    let mut stream =
        arrow::ipc::writer::StreamWriter::try_new(File::create(folder.path("s.arrow")).unwrap(), &batch.schema())
            .unwrap();
    for part in [batch.slice(0, 150), batch.slice(150, 50)] {
        file.write(&part).unwrap();
        stream.write(&part).unwrap();
    }
    file.finish().unwrap();
    stream.finish().unwrap();
    for (number, i) in kept.iter().enumerate() {
        folder.write(&format!("t/{number:04}.txt"), sentence(*i));
    }
    let tokens = |source: &str| {
        let mut options = folder.options(source, &format!("out-{source}"));
        options.text_column = "body".into();
        let manifest = prepare(&options, &()).unwrap();
        assert_eq!(manifest.documents, 180, "{source}");
        let loader = folder.loader_options(&[(&format!("out-{source}"), None)]);
        let loader = tangelo_data::Loader::open(loader).unwrap();
        (0..loader.num_samples()).map(|i| loader.batch_at(i).unwrap()).collect::<Vec<_>>()
    };
    let expected = tokens("t");
    for source in ["l.jsonl", "g.jsonl.gz", "z.jsonl.zst", "p.parquet", "f.arrow", "s.arrow"] {
        assert_eq!(tokens(source), expected, "{source}");
    }
    for source in ["p.parquet", "f.arrow", "s.arrow", "l.jsonl"] {
        let error = prepare(&folder.options(source, &format!("bad-{source}")), &()).unwrap_err().to_string();
        assert!(error.contains("no text column `text`; columns there are: id, body"), "{error}");
    }
}

#[test]
fn files_that_are_no_text_are_left_out_unless_named() {
    let folder = Folder::new();
    folder.write("c/a.txt", "some text");
    folder.write("c/b.bin", b"\x7fELF\0\0");
    folder.write("c/empty.txt", "");
    folder.write("c/latin1.txt", b"caf\xe9");
    let watcher = Watcher::default();
    let manifest = prepare(&folder.options("c", "p"), &watcher).unwrap();
    assert_eq!((manifest.documents, manifest.skipped_files, manifest.origin.files.len()), (1, 2, 4));
    let warnings = watcher.warnings.lock().unwrap().clone();
    assert!(warnings.len() == 1 && warnings[0].contains("left out 2 of 4") && warnings[0].contains("b.bin"));
    let error = prepare(&folder.options("c/latin1.txt", "q"), &()).unwrap_err().to_string();
    assert!(error.contains("latin1.txt") && error.contains("not UTF-8 at byte 3"), "{error}");
    let error = prepare(&folder.options("c/empty.txt", "r"), &()).unwrap_err().to_string();
    assert!(error.contains("hold no text at all"), "{error}");
}

#[test]
fn json_that_holds_no_documents_is_left_out_unless_named() {
    let folder = Folder::new();
    folder.write("c/code.rs", "fn main() {}");
    folder.write("c/package.json", "{\n  \"name\": \"c\"\n}\n");
    folder.write("c/settings.json", "{\"tabs\": 4}");
    folder.write("c/array.json", "[{\"text\": \"a\"}]");
    folder.write_documents("c/lines.json", 3);
    let watcher = Watcher::default();
    let manifest = prepare(&folder.options("c", "p"), &watcher).unwrap();
    assert_eq!((manifest.documents, manifest.skipped_files), (4, 3));
    let warnings = watcher.warnings.lock().unwrap().clone();
    assert!(warnings[0].contains("array.json (no JSON lines: line 1: "), "{warnings:?}");
    let error = prepare(&folder.options("c/package.json", "q"), &()).unwrap_err().to_string();
    assert!(error.contains("package.json: line 1: "), "{error}");
}

#[test]
fn a_corpus_may_have_a_manifest_of_its_own() {
    let folder = Folder::new();
    folder.write("c/manifest.json", "{\"files\": 1}");
    folder.write("c/a.txt", "some text");
    let mut config = JobConfig::default();
    config.data.sources = vec![DataSource {
        name: Some("c".into()),
        paths: vec![folder.text("c")],
        text_column: Some("text".into()),
        ..DataSource::default()
    }];
    config.data.tokenizer = Some(folder.path("tokenizer"));
    config.data.prepared_folder = Some(folder.path("prepared"));
    assert_eq!(prepare_job(&config, &()).unwrap().sources[0].manifest.documents, 1);
    let error = inspect(&folder.path("c"), 0).unwrap_err().to_string();
    assert!(error.contains("not what tangelo writes") && !error.contains("delete"), "{error}");
}

#[test]
fn a_finished_folder_is_known_by_its_sizes() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 50);
    let (options, manifest) = (folder.options("a.jsonl", "p"), folder.prepare("a.jsonl", "p"));
    let shard = options.folder.join(&shards(&options.folder)[0].0);
    let whole = fs::read(&shard).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    fs::write(&shard, damaged).unwrap();
    assert_eq!(prepare(&options, &()).unwrap(), manifest, "not read");
    let error = inspect(&options.folder, 0).unwrap_err().to_string();
    assert!(error.contains("remove it and run the command that made the folder"), "{error}");
    fs::remove_file(&shard).unwrap();
    assert_eq!(prepare(&options, &()).unwrap(), manifest);
    assert_eq!(fs::read(&shard).unwrap(), whole);
}

#[test]
fn long_documents_are_cut_at_lines_and_keep_every_token() {
    let folder = Folder::new();
    let text: String = (0..2000).map(|i| sentence(i) + "\n").collect();
    folder.write("long.txt", &text);
    let mut options = folder.options("long.txt", "p");
    (options.max_document_bytes, options.buffer_bytes) = (10_000, 20_000);
    let manifest = prepare(&options, &()).unwrap();
    assert!(manifest.documents > 5);
    assert_eq!(manifest.text_bytes, text.len() as u64);
}

#[test]
fn a_job_is_prepared_once_by_whoever_comes_first() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 500);
    folder.write("notes/one.md", "one note");
    let source = |path: &str, name: &str| DataSource {
        paths: vec![folder.text(path)],
        name: Some(name.into()),
        text_column: Some("text".into()),
        ..DataSource::default()
    };
    let mut config = JobConfig::default();
    config.data.packing = Some(Packing::Concat);
    config.data.sources = vec![source("a.jsonl", "stories"), source("notes", "notes")];
    config.data.train_tokenizer_vocab = 320;
    config.data.prepared_folder = Some(folder.path("prepared"));
    config.training.seq_len = 64;
    let error = wait_for_job(&config, Duration::ZERO, &()).unwrap_err().to_string();
    assert!(error.contains("no process is at work on it"), "{error}");
    // Two launchers at once, and one process that only waits for them.
    let jobs: Vec<_> = std::thread::scope(|scope| {
        let waits = scope.spawn(|| wait_for_job(&config, Duration::from_secs(600), &()));
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| prepare_job(&config, &()).unwrap())).collect();
        waits.join().unwrap().unwrap();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(folder.path("prepared/tokenizer.json").is_file());
    let manifests =
        |job: &tangelo_data::PreparedJob| -> Vec<Manifest> { job.sources.iter().map(|s| s.manifest.clone()).collect() };
    assert_eq!(manifests(&jobs[0]), manifests(&jobs[1]));
    let options = tangelo_data::loader_options(&config, tangelo_data::Split::Train, 4, 0, 1).unwrap();
    assert_eq!(options.sources[1].folder, folder.path("prepared/notes"));
    let loader = tangelo_data::Loader::open(options).unwrap();
    assert_eq!(loader.batch_at(0).unwrap().num_tokens(), 4 * 64);
    // A prepared folder is used as it is.
    let mut again = config.clone();
    again.data.sources = vec![source("prepared/stories", "stories")];
    (again.data.train_tokenizer_vocab, again.data.tokenizer) = (0, Some(folder.path("prepared/tokenizer.json")));
    again.data.prepared_folder = Some(folder.path("elsewhere"));
    assert_eq!(prepare_job(&again, &()).unwrap().sources[0].manifest, jobs[0].sources[0].manifest);
    // Another vocabulary is refused.
    config.data.train_tokenizer_vocab = 330;
    let error = prepare_job(&config, &()).unwrap_err().to_string();
    assert!(error.contains("trained for 320 tokens, now 330"), "{error}");
}

#[test]
fn tokenizers_are_learnt_the_same_twice_and_give_text_back() {
    let folder = Folder::new();
    let mut paths = vec![folder.text("train.txt")];
    paths.push(real_text("docs").display().to_string());
    let mut options = TrainOptions::new(paths, 1000);
    options.special_tokens.push("<|pad|>".into());
    let (first, second) = (train(&options, &()).unwrap(), train(&options, &()).unwrap());
    assert_eq!(first.assets.to_json(), second.assets.to_json());
    first.save(&folder.path("new")).unwrap();
    let tokenizer = TextTokenizer::open(&folder.path("new")).unwrap();
    assert_eq!((tokenizer.eos(), tokenizer.bos(), tokenizer.is_fast()), (0, None, true));
    assert!(tokenizer.vocab_size() > 300 && tokenizer.vocab_size() <= 1000);
    let text = "To be, or not to be: that's 1234567 <|pad|>\n\tna\u{ef}ve \u{1F600} \u{6f22}\r\n  x";
    let mut tokens = Vec::new();
    tokenizer.encode(text, &mut Default::default(), &mut tokens).unwrap();
    assert_eq!(tokenizer.decode(&tokens).unwrap(), format!("{text}<|endoftext|>"));
    let error = train(&TrainOptions::new(options.paths, 100), &()).unwrap_err().to_string();
    assert!(error.contains("at least 257"), "{error}");
}

#[test]
fn transformers_encodes_with_a_learnt_tokenizer_as_we_do() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let code = "import sys\nfrom transformers import PreTrainedTokenizerFast as T\nt = T.from_pretrained(sys.argv[1])\n\
                print(t.eos_token_id, *t.encode(open(sys.argv[2], encoding='utf8', newline='').read()))";
    let folder = Folder::new();
    let text: String = (500..600).map(|i| sentence(i) + "\r\n  I'LL\t\u{17f}99 \u{6f22}").collect();
    folder.write("text.txt", &text);
    let arguments = ["-c", code, &folder.text("tokenizer"), &folder.text("text.txt")];
    let run = std::process::Command::new(&python).args(arguments).output();
    let Some(run) = run.ok().filter(|run| run.status.success()) else {
        return println!("skipped: {} with transformers is not there", python.display());
    };
    let printed = String::from_utf8(run.stdout).unwrap();
    let ids: Vec<u32> = printed.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let tokenizer = TextTokenizer::open(&folder.path("tokenizer")).unwrap();
    let mut tokens = vec![tokenizer.eos()];
    tokenizer.encode_text(&text, &mut Default::default(), &mut tokens).unwrap();
    assert_eq!(ids, tokens);
}

#[test]
fn inspection_tells_what_is_there() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 100);
    let manifest = folder.prepare("a.jsonl", "p");
    let found = inspect(&folder.path("p"), 2).unwrap();
    assert_eq!((found.documents, found.tokens), (100, manifest.tokens));
    assert_eq!(found.length_histogram.iter().sum::<u64>(), 100);
    assert!(found.samples[0].starts_with(&sentence(0)[..20]), "{:?}", found.samples);
    let shown = found.to_string();
    assert!(shown.contains("documents    100") && shown.contains("document 1:"), "{shown}");
}

#[test]
fn real_text_is_prepared() {
    let folder = Folder::new();
    let source = |name: &str, path: &Path, column: &str| DataSource {
        name: Some(name.into()),
        paths: vec![path.display().to_string()],
        text_column: Some(column.into()),
        ..DataSource::default()
    };
    let lines = fs::read_to_string(real_text("docs/LOG.md")).unwrap();
    let lines: Vec<String> =
        lines.lines().map(|line| serde_json::json!({ "line": line, "length": line.len() }).to_string()).collect();
    folder.write("log.jsonl", lines.join("\n"));
    let mut config = JobConfig::default();
    config.data.sources = vec![
        source("docs", &real_text("docs"), "text"),
        source("code", &real_text("data/src"), "text"),
        source("log", &folder.path("log.jsonl"), "line"),
    ];
    config.data.train_tokenizer_vocab = 2048;
    config.data.prepared_folder = Some(folder.path("prepared"));
    let job = prepare_job(&config, &()).unwrap();
    let documents: Vec<u64> = job.sources.iter().map(|s| s.manifest.documents).collect();
    let count = |folder: &str| num_files(&real_text(folder));
    let log = lines.iter().filter(|line| !line.starts_with("{\"line\":\"\"")).count() as u64;
    assert_eq!(documents, [count("docs"), count("data/src"), log]);
    let text_bytes: u64 = job.sources.iter().map(|s| s.manifest.text_bytes).sum();
    let per_token = text_bytes as f64 / job.tokens() as f64;
    assert!((2.5..5.0).contains(&per_token), "{per_token} bytes per token");
}

/// Files below a folder.
fn num_files(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { num_files(&path) } else { 1 }).sum()
}
