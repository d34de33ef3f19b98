//! A small job on made-up text, run with the real binaries, and what it leaves behind.

use crate::support::root;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tangelo_core::env;
use tangelo_observe::{Metric, MetricRecord};
use tangelo_trainer::checkpoint::find_usable;

/// The folder of `tangelo` and `tangelo-worker`, built where `cargo xtask test` has not said where they are.
fn binaries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os(env::TEST_BINARIES) {
            return folder.into();
        }
        // The same selection as the tests' own build: another one would resolve features anew and build all twice.
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--workspace", "--bins", "--tests"])
            .current_dir(root())
            .status()
            .expect("cargo starts");
        assert!(status.success(), "the binaries do not build");
        let executable = std::env::current_exe().expect("a process knows its executable");
        executable.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").to_owned()
    })
}

/// `tangelo` with `arguments`, not yet started.
pub fn tangelo(arguments: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("tangelo"));
    command.args(arguments).env_remove(env::FAULT).env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Runs to the end; the output as text.
pub fn finish(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().expect("tangelo starts");
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    (status.code(), text)
}

/// Arguments for degrees by the last word of their key, `head` for `context_parallel_head_degree`.
pub fn layout(words: &str) -> Vec<String> {
    let key = |name: &str| match name {
        "dp" => "data_parallel_shard_degree",
        "tp" => "tensor_parallel_degree",
        "pp" => "pipeline_parallel_degree",
        "cp" => "context_parallel_degree",
        "head" => "context_parallel_head_degree",
        "weights" => "zero_parameter_degree",
        "rotate" => "context_parallel_rotate_method",
        other => panic!("no key for {other}"),
    };
    let set = |word: &str| {
        let (name, value) = word.split_once('=').expect("name=value");
        ["--set".to_owned(), format!("parallelism.{}={value}", key(name))]
    };
    words.split(' ').flat_map(set).collect()
}

/// A folder with text, a tokenizer and a job file.
pub struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    /// A job for a model of some 50 thousand parameters and 20 steps; `seed` decides text and initial weights.
    pub fn new(seed: u64) -> Job {
        let job = Job { folder: tempfile::tempdir().expect("a temporary folder") };
        std::fs::create_dir(job.path("text")).expect("a fresh folder");
        for document in 0..40 {
            std::fs::write(job.path(&format!("text/{document}.txt")), prose(seed + document))
                .expect("space on the disk");
        }
        std::fs::write(job.path("tokenizer.json"), byte_tokenizer().to_string()).expect("space on the disk");
        std::fs::write(job.path("job.toml"), JOB.replace("FOLDER", &job.path("").display().to_string()))
            .expect("space on the disk");
        job
    }

    /// A path inside the job's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `tangelo run` into the folder `run` with `ranks` processes and further arguments.
    pub fn command(&self, run: &str, ranks: usize, arguments: &[&str]) -> Command {
        let job = self.path("job.toml");
        let ranks = ranks.to_string();
        let mut command = tangelo(&["run"]);
        command.arg(job).args(["--nproc-per-node", &ranks]);
        command.args(["--set", &format!("job.dump_folder={:?}", self.path(run).display().to_string())]);
        command.args(arguments);
        command
    }

    /// `tangelo run` into the folder `run` as the only rank of another launcher's job.
    pub fn lone_rank(&self, run: &str, arguments: &[&str]) -> Command {
        let mut command = tangelo(&["run"]);
        command.arg(self.path("job.toml")).envs([(env::RANK, "0"), (env::WORLD_SIZE, "1")]);
        command.args(["--set", &format!("job.dump_folder={:?}", self.path(run).display().to_string())]);
        command.args(arguments);
        command
    }

    /// Runs to the end, which must be a good one.
    pub fn run(&self, run: &str, ranks: usize, arguments: &[&str]) -> Run {
        let (code, text) = finish(&mut self.command(run, ranks, arguments));
        assert_eq!(code, Some(0), "{run} with {ranks} ranks, {arguments:?}:\n{text}");
        self.finished(run)
    }

    /// What a run left.
    pub fn finished(&self, run: &str) -> Run {
        Run { folder: self.path(run) }
    }

    /// Starts without waiting.
    pub fn spawn(&self, run: &str, ranks: usize, arguments: &[&str]) -> Child {
        spawn_logged(&mut self.command(run, ranks, arguments), &self.path(&format!("{run}.log")))
    }
}

fn spawn_logged(command: &mut Command, log: &Path) -> Child {
    let file = std::fs::File::create(log).expect("space on the disk");
    let other = file.try_clone().expect("a file can be shared");
    command.stdout(file).stderr(other).spawn().expect("tangelo starts")
}

/// Which ends every run, whatever happens: far more than the deadline of a collective, for the machine may be busy.
const LIMIT: Duration = Duration::from_secs(150);

/// Ends what it started when a test fails.
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    pub fn start(mut command: Command, log: PathBuf) -> Running {
        Running { child: spawn_logged(&mut command, &log), log }
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        assert!(Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap().success());
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Its exit code and what it said.
    pub fn finish(mut self) -> (Option<i32>, String) {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.said());
            }
            assert!(begin.elapsed() < LIMIT, "still running after {LIMIT:?}:\n{}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Command lines of the processes that work in `folder`.
pub fn processes_of(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(&folder)).collect()
}

/// The step of the newest checkpoint, every byte of which is as it was written; none is damaged.
pub fn newest_checkpoint(run: &Path) -> u64 {
    let found = find_usable(&run.join("checkpoint"), None).unwrap();
    assert!(found.warnings.is_empty(), "{:?}", found.warnings);
    found.checkpoint.expect("a step was saved").step()
}

/// A run folder.
pub struct Run {
    pub folder: PathBuf,
}

impl Run {
    /// The loss of every recorded step, in order.
    pub fn losses(&self) -> Vec<(u64, f64)> {
        let pairs = self.records().into_iter().filter_map(|r| Some((r.step, r.get(Metric::Loss)?)));
        pairs.collect()
    }

    /// metrics.jsonl.
    pub fn records(&self) -> Vec<MetricRecord> {
        let text = std::fs::read_to_string(self.folder.join("metrics.jsonl")).expect("a run records metrics");
        text.lines().filter_map(MetricRecord::from_json).collect()
    }

    /// Name and bytes of every tensor file of the checkpoint of `step`.
    pub fn checkpoint(&self, step: usize) -> Vec<(String, Vec<u8>)> {
        let folder = self.folder.join(format!("checkpoint/step-{step:08}"));
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())).flatten();
        let mut files: Vec<_> = entries
            .filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"))
            .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).expect("a readable file")))
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{} holds no tensors", folder.display());
        files
    }

    /// The weights of the exported model.
    pub fn exported(&self) -> Vec<u8> {
        std::fs::read(self.folder.join("export/model.safetensors")).expect("last_save_in_hf leaves a model")
    }
}

/// Losses of the same steps of a job in different layouts: sums in another order make them differ by some 1e-7 per step,
/// amplified by 20 updates.
pub fn assert_losses_agree(found: &[(u64, f64)], expected: &[(u64, f64)], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((step, found), (_, expected)) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-5, "{what}, step {step}: {found} against {expected}");
    }
}

/// Equal name by name and byte by byte; the message does not print the bytes.
pub fn assert_same_files(found: &[(String, Vec<u8>)], expected: &[(String, Vec<u8>)], what: &str) {
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for ((name, a), (_, b)) in found.iter().zip(expected) {
        assert!(payload(a) == payload(b), "{what}: {name} differs");
    }
}

const JOB: &str = r#"
[model]
name = "llama"
vocab_size = 320
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128
rope_theta = 10000.0
rms_norm_eps = 1e-5
tie_word_embeddings = true

[data]
sources = [{ paths = ["FOLDER/text/*.txt"] }]
tokenizer = "FOLDER/tokenizer.json"
prepared_folder = "FOLDER/prepared"
validation_fraction = 0.1

[training]
device = "cpu"
mixed_precision_param = "float32"
num_threads = 1
seq_len = 48
local_batch_size = 2
global_batch_size = 12
steps = 20

[optimizer]
lr = 1e-3

[lr_scheduler]
warmup_steps = 3
total_steps = 20

[checkpoint]
interval = 4

[metrics]
log_freq = 1
enable_tensorboard = false

[comm]
init_timeout_seconds = 60
train_timeout_seconds = 20
"#;

/// Sentences of a few words, the same for the same seed, with enough order in them to be learned.
fn prose(seed: u64) -> String {
    const WORDS: [&str; 12] =
        ["the", "tree", "falls", "on", "a", "small", "house", "and", "nobody", "hears", "it", "again"];
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut text = String::new();
    for i in 0..220 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text += WORDS[((state >> 33) as usize % 3 + i) % WORDS.len()];
        text += if i % 9 == 8 { ".\n" } else { " " };
    }
    text
}

/// A byte-level BPE tokenizer without merges: 256 bytes and an end-of-text token.
fn byte_tokenizer() -> Value {
    let printable = |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let mut others = 256u32..;
    let vocab: serde_json::Map<String, Value> = (0u32..256)
        .map(|byte| {
            let code = if printable(&byte) { byte } else { others.next().expect("an open range") };
            (char::from_u32(code).expect("below the surrogates").to_string(), byte.into())
        })
        .collect();
    let byte_level = serde_json::json!(
        { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{ "id": 256, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true }],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] },
    })
}

/// The tensors of a safetensors file: the order of the header's metadata is not fixed.
fn payload(file: &[u8]) -> &[u8] {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    &file[8 + length..]
}
