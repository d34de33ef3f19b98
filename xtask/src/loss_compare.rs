//! `cargo xtask loss-compare A B`: the same short run twice, by two commits or with two sets of options, step by step.
//!
//! A side is `[COMMIT][:key=value[,key=value...]]`: a commit that git knows (the working tree where absent) and settings
//! for `tangelo run --set`. A refactor must show `every step has the same bits`. A commit is built in a work tree of its
//! own under the target folder, which stays for the next comparison; libtorch is the one already set up.

use crate::shell::{self, Repo};
use crate::{corpus, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// What to compare.
#[derive(Args)]
pub struct Options {
    /// One side: `[COMMIT][:key=value,...]`; `.` or nothing before the colon is the working tree.
    a: String,
    /// The other.
    b: String,
    /// The job that both run.
    #[arg(long, default_value = "configs/presets/debugmodel.toml")]
    job: PathBuf,
    /// Worker processes.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Fail where any step differs in any bit.
    #[arg(long)]
    exact: bool,
}

/// One side, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Side {
    commit: Option<String>,
    settings: Vec<String>,
}

impl Side {
    fn parse(text: &str) -> Result<Side> {
        let (commit, settings) = text.split_once(':').unwrap_or((text, ""));
        let commit = Some(commit).filter(|c| !c.is_empty() && *c != ".").map(str::to_owned);
        let settings: Vec<String> = settings.split(',').filter(|s| !s.is_empty()).map(str::to_owned).collect();
        if let Some(wrong) = settings.iter().find(|s| !s.contains('=')) {
            bail!("`{wrong}` in `{text}` is not key=value");
        }
        Ok(Side { commit, settings })
    }
}

/// Builds both, runs both, prints the table.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    let folder = repo.target().join("loss-compare");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let corpus = folder.join("corpus.jsonl");
    if !corpus.exists() {
        corpus::write(None, &corpus, 1 << 20)?;
    }
    let mut sides = Vec::new();
    for (name, text) in [("a", &options.a), ("b", &options.b)] {
        let side = Side::parse(text)?;
        let program = shell::step(&format!("building {name}: {text}"), || build(repo, &folder, &side))?;
        let run = folder.join(name);
        if run.exists() {
            fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
        }
        shell::step(&format!("running {name}"), || train(repo, options, &program, &side, &run, &corpus))?;
        sides.push(losses(&run)?);
    }
    let (text, equal) = table(&sides[0], &sides[1]);
    println!("\n{text}");
    if options.exact && !equal {
        bail!("the two runs differ");
    }
    Ok(())
}

/// `tangelo` of this side.
fn build(repo: &Repo, folder: &Path, side: &Side) -> Result<PathBuf> {
    let Some(commit) = &side.commit else {
        shell::run(&mut repo.cargo(&["build", "--release"]))?;
        return Ok(repo.target().join("release/tangelo"));
    };
    let spec = format!("{commit}^{{commit}}");
    let id = shell::output(repo.command("git").args(["rev-parse", "--verify", "--quiet", &spec]))
        .with_context(|| format!("git knows no commit `{commit}`"))?;
    let tree = folder.join(format!("tree-{}", &id[..12]));
    if !tree.exists() {
        let words = ["worktree", "add", "--detach", "--force"];
        shell::run(repo.command("git").args(words).arg(&tree).arg(&id))?;
        let libtorch = fs::canonicalize(repo.root.join(".libtorch")).context(".libtorch leads nowhere")?;
        std::os::unix::fs::symlink(libtorch, tree.join(".libtorch")).context("cannot link libtorch")?;
    }
    let target = folder.join(format!("target-{}", &id[..12]));
    shell::run(repo.cargo(&["build", "--release"]).current_dir(&tree).env("CARGO_TARGET_DIR", &target))?;
    Ok(target.join("release/tangelo"))
}

fn train(repo: &Repo, options: &Options, program: &Path, side: &Side, run: &Path, corpus: &Path) -> Result<()> {
    let mut command = repo.command(program);
    command.args(["run", "--quiet"]).arg(&options.job).args(["--nproc-per-node", &options.workers.to_string()]);
    let fixed = [
        format!("job.dump_folder={:?}", run.display().to_string()),
        format!("data.sources.0.paths=[{:?}]", corpus.display().to_string()),
        "metrics.log_freq=1".to_owned(),
        "checkpoint.enable=false".to_owned(),
    ];
    for setting in fixed.iter().chain(&side.settings) {
        command.args(["--set", setting]);
    }
    shell::run(&mut command)
}

/// A step and its loss and gradient norm, as written: text compares bit for bit, since numbers round-trip.
type Step = (u64, f64, f64);

fn losses(run: &Path) -> Result<Vec<Step>> {
    let path = run.join("metrics.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let step = |r: Value| Some((r["step"].as_u64()?, r["loss"].as_f64()?, r["grad_norm"].as_f64()?));
    Ok(records.filter_map(step).collect())
}

/// The steps side by side, and whether they are equal to the bit.
fn table(a: &[Step], b: &[Step]) -> (String, bool) {
    let mut text =
        format!("{:>6} {:>14} {:>14} {:>10} {:>14} {:>14}\n", "step", "loss A", "loss B", "B - A", "norm A", "norm B");
    let mut first = None;
    for (x, y) in a.iter().zip(b) {
        let same = x.0 == y.0 && x.1.to_bits() == y.1.to_bits() && x.2.to_bits() == y.2.to_bits();
        first = first.or((!same).then_some(x.0));
        text += &format!("{:>6} {:>14.8} {:>14.8} {:>10.1e} {:>14.8} {:>14.8}\n", x.0, x.1, y.1, y.1 - x.1, x.2, y.2);
    }
    let equal = first.is_none() && a.len() == b.len() && !a.is_empty();
    let largest = a.iter().zip(b).map(|(x, y)| (x.1 - y.1).abs()).fold(0.0, f64::max);
    text += &match first {
        _ if equal => format!("{} steps: every step has the same bits", a.len()),
        Some(step) => format!("differ from step {step} on; largest difference of a loss {largest:.3e}"),
        None => format!("{} steps against {}", a.len(), b.len()),
    };
    (text, equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_parse() {
        let side = |commit: Option<&str>, settings: &[&str]| Side {
            commit: commit.map(Into::into),
            settings: settings.iter().map(|s| (*s).into()).collect(),
        };
        assert_eq!(Side::parse(".").unwrap(), side(None, &[]));
        assert_eq!(Side::parse("HEAD~1").unwrap(), side(Some("HEAD~1"), &[]));
        assert_eq!(Side::parse(":a.b=1,c.d=x").unwrap(), side(None, &["a.b=1", "c.d=x"]));
        assert!(Side::parse("main:nonsense").is_err());
    }

    #[test]
    fn one_bit_is_a_difference() {
        let a = [(1, 5.0, 1.0), (2, 4.0, 1.0)];
        let b = [(1, 5.0, 1.0), (2, 4.0f64.next_up(), 1.0)];
        assert!(table(&a, &a).1);
        let (text, equal) = table(&a, &b);
        assert!(!equal && text.contains("differ from step 2 on"), "{text}");
        assert!(!table(&a, &a[..1]).1 && !table(&[], &[]).1);
    }
}
