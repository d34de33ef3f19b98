//! TensorBoard's own reader must see what was written. Skipped, saying so, where the venv has no TensorBoard.

#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

use std::path::{Path, PathBuf};
use std::process::Command;
use tangelo_observe::{Metric, MetricsWriter};

/// Prints `tag step value` for every scalar that TensorBoard finds, NaN and infinities as Python writes them.
const READER: &str = "
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
events.Reload()
for tag in sorted(events.Tags()['scalars']):
    for e in events.Scalars(tag):
        print(tag, e.step, repr(e.value))
";

fn python() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    let has =
        |path: &Path| Command::new(path).args(["-c", "import tensorboard"]).output().is_ok_and(|o| o.status.success());
    let found = has(&path).then_some(path);
    if found.is_none() {
        println!("skipped: no TensorBoard in .venv (cargo xtask test installs it)");
    }
    found
}

fn read(python: &Path, folder: &Path) -> Vec<String> {
    let output = Command::new(python).args(["-c", READER]).arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn tensorboard_reads_every_scalar_and_forgets_what_a_resumed_run_dropped() {
    let Some(python) = python() else { return };
    let run = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::open(run.path(), Some(Path::new("tb")), 0);
    for step in 1..=5 {
        writer.record(step, &[(Metric::Loss, step as f64 * 0.5), (Metric::GradNorm, f64::NAN)]);
    }
    writer.record(300, &[(Metric::Mfu, f64::INFINITY)]);
    drop(writer);
    let expected = "speed/mfu 300 inf|train/grad_norm 1 nan|train/grad_norm 2 nan|train/grad_norm 3 nan|train/grad_norm 4 nan|\
                    train/grad_norm 5 nan|train/loss 1 0.5|train/loss 2 1.0|train/loss 3 1.5|train/loss 4 2.0|train/loss 5 2.5";
    let tb = run.path().join("tb");
    assert_eq!(read(&python, &tb).join("|"), expected);

    // The run went on from step 3 and took another course.
    let mut writer = MetricsWriter::open(run.path(), Some(Path::new("tb")), 3);
    writer.record(4, &[(Metric::Loss, 9.0)]);
    drop(writer);
    assert_eq!(std::fs::read_dir(&tb).unwrap().count(), 2, "earlier files are not touched");
    let loss: Vec<String> = read(&python, &tb).into_iter().filter(|l| l.starts_with("train/loss")).collect();
    assert_eq!(loss, ["train/loss 1 0.5", "train/loss 2 1.0", "train/loss 3 1.5", "train/loss 4 9.0"]);

    // It was killed before its first checkpoint and began anew.
    let mut writer = MetricsWriter::open(run.path(), Some(Path::new("tb")), 0);
    writer.record(1, &[(Metric::Loss, 7.0)]);
    drop(writer);
    let loss: Vec<String> = read(&python, &tb).into_iter().filter(|l| l.starts_with("train/loss")).collect();
    assert_eq!(loss, ["train/loss 1 7.0"]);
}
