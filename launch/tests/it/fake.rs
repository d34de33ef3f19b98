//! A job whose ranks are `worker.sh`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// `tangelo`, without the environment of whoever runs the tests.
pub fn tangelo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tangelo"));
    for name in ["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "NO_COLOR", "COLUMNS"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// A folder with text, a tokenizer, a job file and the stand-in's process ids.
pub struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    pub fn new() -> Job {
        let job = Job { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir(job.path("pids")).unwrap();
        std::fs::write(job.path("text.txt"), "the tree falls on a small house and nobody hears it\n".repeat(60))
            .unwrap();
        let said = job.finish(
            tangelo()
                .args(["data", "tokenizer", "-q", "--vocab-size", "280", "--output"])
                .args([job.path("tokenizer.json"), job.path("text.txt")]),
        );
        assert_eq!(said.code, Some(0), "{said:?}");
        std::fs::write(job.path("job.toml"), JOB.replace("FOLDER", &job.folder.path().display().to_string())).unwrap();
        job
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn run_folder(&self) -> PathBuf {
        self.path("run")
    }

    /// `tangelo run` with the stand-in.
    pub fn command(&self, ranks: usize, arguments: &[&str]) -> Command {
        let mut command = tangelo();
        command.arg("run").arg(self.path("job.toml")).args(["--nproc_per_node", &ranks.to_string()]);
        command.args(["--restart-backoff-ms", "10", "--worker-binary"]).arg(worker()).args(arguments);
        command.env("PIDS", self.path("pids")).env("HERE", self.folder.path());
        command
    }

    /// Runs with what each rank does, to the end.
    pub fn run(&self, ranks: usize, arguments: &[&str], does: &[(&str, &str)]) -> Said {
        self.finish(self.command(ranks, arguments).envs(does.iter().copied()))
    }

    pub fn finish(&self, command: &mut Command) -> Said {
        command.output().unwrap().into()
    }

    /// Starts; the outputs are pipes.
    pub fn spawn(&self, command: &mut Command) -> Child {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until ranks `0..ranks` have started.
    pub fn await_ranks(&self, ranks: usize) -> Vec<i32> {
        let pid = |rank: usize| {
            let path = self.path(&format!("pids/{rank}.0"));
            wait_until("ranks start", || std::fs::read_to_string(&path).is_ok_and(|t| t.ends_with('\n')));
            std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
        };
        (0..ranks).map(pid).collect()
    }

    /// Waits until ranks `0..ranks` linger, with their traps set.
    pub fn await_lingering(&self, ranks: usize) -> Vec<i32> {
        let ready = |rank| self.path(&format!("pids.ready.{rank}"));
        (0..ranks).for_each(|rank| wait_until("ranks linger", || ready(rank).exists()));
        self.await_ranks(ranks)
    }

    /// Ids of every process that the stand-ins noted.
    pub fn all_pids(&self) -> Vec<i32> {
        let files = std::fs::read_dir(self.path("pids")).unwrap().flatten();
        files.map(|f| std::fs::read_to_string(f.path()).unwrap().trim().parse().unwrap()).collect()
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.run_folder().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }
}

pub fn worker() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/worker.sh"))
}

/// Whether a process is there and not a zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

pub fn kill(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    // Two cores that other tests share: far longer than any of these takes.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

const JOB: &str = r#"
[job]
dump_folder = "FOLDER/run"

[model]
name = "llama"
vocab_size = 320
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128
rope_theta = 10000.0
rms_norm_eps = 1e-5
tie_word_embeddings = true

[data]
sources = [{ paths = ["FOLDER/text.txt"] }]
tokenizer = "FOLDER/tokenizer.json"
validation_fraction = 0.0

[training]
device = "cpu"
seq_len = 32
local_batch_size = 2
global_batch_size = 24
steps = 20

[lr_scheduler]
warmup_steps = 2
"#;
