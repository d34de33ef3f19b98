//! `cargo xtask soak`: a run that is killed again and again ends with the bits of one that is left alone.
//!
//! One undisturbed run first. Then the same job, killed with SIGKILL at random moments: one worker, or the launcher (all
//! workers then end by themselves, and the same command is given again); half of the moments lie inside a save. Where a
//! run ends before the kills are used up, another one starts. Checked: every run ends well; none ever passes over a
//! damaged checkpoint or goes on from an older one than was complete when it was killed; the last checkpoint's tensor
//! files (weights, both moments) equal the undisturbed run's byte for byte.

use crate::shell::{self, Repo};
use crate::{corpus, setup};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PRESET: &str = "configs/presets/debugmodel.toml";
/// A life of the run may take this long to come to its next save, and a killed process this long to be gone.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often to kill what.
#[derive(Args)]
pub struct Options {
    /// Kills.
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Steps of the run; a checkpoint is saved after each.
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Decides victims and moments, as far as the clock lets it; another number each time where absent.
    #[arg(long)]
    seed: Option<u64>,
}

/// Builds, runs, kills, compares.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    shell::step("building tangelo and tangelo-worker (release)", || {
        shell::run(&mut repo.cargo(&["build", "--release"]))
    })?;
    let seed = options.seed.unwrap_or_else(|| now_seconds().to_bits());
    let soak = Soak { repo, options, folder: repo.target().join(format!("soak/{seed}")) };
    println!("seed {seed}, folder {}", soak.folder.display());
    fs::create_dir_all(&soak.folder).with_context(|| format!("cannot make {}", soak.folder.display()))?;
    corpus::write(None, &soak.corpus(), 1 << 20)?;
    let started = Instant::now();
    shell::step("the undisturbed run", || soak.undisturbed())?;
    let life = started.elapsed();
    let (mut random, mut kills, mut round) = (Random(seed), Vec::new(), 0);
    while kills.len() < options.kills {
        round += 1;
        let what = format!("run {round}, {} of {} kills so far", kills.len(), options.kills);
        let run = soak.folder.join(format!("killed-{round}"));
        shell::step(&what, || soak.disturbed(&run, life, &mut random, &mut kills))?;
    }
    let saving = kills.iter().filter(|kill| kill.saving).count();
    let launcher = kills.iter().filter(|kill| kill.launcher).count();
    println!("{} kills, {saving} inside a save, {launcher} of the launcher: {round} runs, all bits equal", kills.len());
    fs::remove_dir_all(&soak.folder).with_context(|| format!("cannot remove {}", soak.folder.display()))
}

/// A process killed.
struct Kill {
    time: f64,
    /// The newest complete checkpoint just before.
    newest: u64,
    saving: bool,
    launcher: bool,
}

struct Soak<'a> {
    repo: &'a Repo,
    options: &'a Options,
    folder: PathBuf,
}

impl Soak<'_> {
    fn corpus(&self) -> PathBuf {
        self.folder.join("corpus.jsonl")
    }

    /// The same job for every run, but for its folder; text is prepared once.
    fn command(&self, run: &Path) -> Command {
        let mut command = self.repo.command(self.repo.target().join("release/tangelo"));
        command.args(["run", PRESET, "--quiet", "--max-restarts", "1000", "--restart-backoff-ms", "50"]);
        command.args(["--nproc-per-node", &self.options.workers.to_string()]);
        let mut set = |key: &str, value: String| {
            command.args(["--set", &format!("{key}={value}")]);
        };
        set("job.dump_folder", format!("{:?}", run.display().to_string()));
        set("data.sources.0.paths", format!("[{:?}]", self.corpus().display().to_string()));
        set("data.prepared_folder", format!("{:?}", self.folder.join("prepared").display().to_string()));
        set("training.steps", self.options.steps.to_string());
        set("training.num_threads", "1".into());
        set("checkpoint.interval", "1".into());
        set("checkpoint.keep_latest_k", "3".into());
        command.stdin(Stdio::null());
        command
    }

    fn undisturbed(&self) -> Result<()> {
        let run = self.folder.join("undisturbed");
        shell::run(&mut self.command(&run))?;
        tensors(&run, self.options.steps).map(|_| ())
    }

    fn spawn(&self, run: &Path) -> Result<Child> {
        let log = File::options().create(true).append(true).open(run.with_extension("log"));
        let log = log.with_context(|| format!("cannot write {}", run.with_extension("log").display()))?;
        let other = log.try_clone().context("cannot share a file")?;
        self.command(run).stdout(log).stderr(other).spawn().context("tangelo does not start")
    }

    /// One run with as many kills as it lives through, compared at its end. `life` is how long it takes untouched.
    fn disturbed(&self, run: &Path, life: Duration, random: &mut Random, kills: &mut Vec<Kill>) -> Result<()> {
        let (mut launcher, first) = (self.spawn(run)?, kills.len());
        while kills.len() < self.options.kills {
            let saving = random.below(2) == 0;
            let strike = match saving {
                true => {
                    inside_a_save(&mut launcher, run, 1 + random.below(4), Duration::from_millis(random.below(15)))?
                }
                false => later(&mut launcher, Duration::from_millis(random.below(life.as_millis() as u64 / 2)))?,
            };
            let workers = children(launcher.id());
            if !strike || workers.is_empty() {
                if launcher.try_wait()?.is_some() {
                    break;
                }
                continue;
            }
            let of_launcher = random.below(5) == 0;
            let newest = newest_step(run);
            kills.push(Kill { time: now_seconds(), newest, saving, launcher: of_launcher });
            if of_launcher {
                launcher.kill()?;
                launcher.wait()?;
                gone(&workers)?;
                launcher = self.spawn(run)?;
            } else {
                let victim = workers.iter().nth(random.below(workers.len() as u64) as usize);
                if let Some((pid, _)) = victim {
                    shell::output(Command::new("kill").args(["-9", &pid.to_string()]));
                }
                gone(&workers)?;
            }
        }
        let status = wait(&mut launcher, life * 4 + PATIENCE)?;
        ensure!(status, "{} did not end well; see {}", run.display(), run.with_extension("log").display());
        check_course(run, &kills[first..])?;
        self.compare(run)
    }

    fn compare(&self, run: &Path) -> Result<()> {
        let undisturbed = self.folder.join("undisturbed");
        let (expected, found) = (tensors(&undisturbed, self.options.steps)?, tensors(run, self.options.steps)?);
        let names =
            |files: &[PathBuf]| files.iter().filter_map(|f| f.file_name().map(ToOwned::to_owned)).collect::<Vec<_>>();
        ensure!(names(&expected) == names(&found), "{} and {} hold other files", undisturbed.display(), run.display());
        for (a, b) in expected.iter().zip(&found) {
            ensure!(fs::read(a)? == fs::read(b)?, "{} differs from {}", b.display(), a.display());
        }
        Ok(())
    }
}

/// Waits until the `count`th next save has begun, and `after` that; `false` where the run ends before.
fn inside_a_save(launcher: &mut Child, run: &Path, count: u64, after: Duration) -> Result<bool> {
    let (started, mut seen) = (Instant::now(), BTreeSet::new());
    while (seen.len() as u64) < count {
        if launcher.try_wait()?.is_some() {
            return Ok(false);
        }
        ensure!(started.elapsed() < PATIENCE, "no save began within {}", shell::seconds(PATIENCE));
        seen.extend(names(&run.join("checkpoint")).into_iter().filter(|name| name.ends_with(".partial")));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(after);
    Ok(true)
}

/// Waits; `false` where the run ends before.
fn later(launcher: &mut Child, time: Duration) -> Result<bool> {
    let started = Instant::now();
    while started.elapsed() < time {
        if launcher.try_wait()?.is_some() {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// Whether the run ended well.
fn wait(launcher: &mut Child, limit: Duration) -> Result<bool> {
    let started = Instant::now();
    loop {
        if let Some(status) = launcher.try_wait()? {
            return Ok(status.success());
        }
        if started.elapsed() > limit {
            launcher.kill().context("cannot end a run that hangs")?;
            bail!("the run did not end within {}", shell::seconds(limit));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// No checkpoint was passed over, and each life went on from at least what was complete when the one before ended.
fn check_course(run: &Path, kills: &[Kill]) -> Result<()> {
    let path = run.join("events.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let (time, step) = (event["time"].as_f64().unwrap_or(0.0), event["step"].as_u64().unwrap_or(0));
        match event["kind"].as_str() {
            Some("warning") if event["message"].as_str().is_some_and(|said| said.contains("passed over")) => {
                bail!("{}: {}", path.display(), event["message"])
            }
            Some("resume") => {
                let complete = kills.iter().filter(|kill| kill.time < time).map(|kill| kill.newest).max().unwrap_or(0);
                ensure!(step >= complete, "a life went on from step {step}, but step {complete} was complete");
            }
            _ => {}
        }
    }
    Ok(())
}

/// A process: its id, and when it was started, since ids are used again.
type Process = (u32, String);

/// Waits until none of `workers` runs any more.
fn gone(workers: &BTreeSet<Process>) -> Result<()> {
    let started = Instant::now();
    let alive = |(pid, start): &Process| stat(*pid).is_some_and(|(state, _, other)| state != "Z" && other == *start);
    while workers.iter().any(alive) {
        ensure!(started.elapsed() < PATIENCE, "workers {workers:?} outlive a kill by {}", shell::seconds(PATIENCE));
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The living processes whose parent is `parent`.
fn children(parent: u32) -> BTreeSet<Process> {
    let pids = names(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<u32>().ok());
    let own =
        |pid| stat(pid).filter(|(state, above, _)| *above == parent && state != "Z").map(|(_, _, start)| (pid, start));
    pids.filter_map(own).collect()
}

/// State, parent and start time, as in proc(5); the name before them may hold spaces and brackets.
fn stat(pid: u32) -> Option<(String, u32, String)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let words: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    Some(((*words.first()?).to_owned(), words.get(1)?.parse().ok()?, (*words.get(19)?).to_owned()))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The step of the newest complete checkpoint, 0 where there is none.
fn newest_step(run: &Path) -> u64 {
    let steps = names(&run.join("checkpoint")).into_iter();
    steps.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
}

/// The tensor files of the checkpoint of `step`, sorted.
fn tensors(run: &Path, step: u64) -> Result<Vec<PathBuf>> {
    let folder = run.join(format!("checkpoint/step-{step:08}"));
    let mut files: Vec<String> = names(&folder).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    ensure!(!files.is_empty(), "{} holds no tensors", folder.display());
    files.sort();
    Ok(files.into_iter().map(|name| folder.join(name)).collect())
}

fn now_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    /// A number below `limit` (0 where that is 0).
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(events: &str, kills: &[(f64, u64)]) -> Result<()> {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join("events.jsonl"), events).unwrap();
        let kill = |&(time, newest)| Kill { time, newest, saving: false, launcher: false };
        check_course(run.path(), &kills.iter().map(kill).collect::<Vec<_>>())
    }

    #[test]
    fn a_step_back_and_a_damaged_checkpoint_are_noticed() {
        let resumed = "{\"time\":5.0,\"kind\":\"resume\",\"step\":7}\n{\"torn";
        check(resumed, &[(4.0, 7), (6.0, 9)]).unwrap();
        assert!(check(resumed, &[(4.0, 8)]).unwrap_err().to_string().contains("step 8 was complete"));
        let warned = "{\"time\":5.0,\"kind\":\"warning\",\"step\":7,\"message\":\"passed over\"}\n";
        assert!(check(warned, &[]).unwrap_err().to_string().contains("passed over"));
    }

    #[test]
    fn the_newest_checkpoint_is_the_newest_complete_one() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(newest_step(run.path()), 0);
        for name in ["step-00000003", "step-00000012", "step-00000013.a.partial", "step-00000099.superseded-a"] {
            fs::create_dir_all(run.path().join("checkpoint").join(name)).unwrap();
        }
        assert_eq!(newest_step(run.path()), 12);
        assert!(tensors(run.path(), 12).is_err());
    }

    #[test]
    fn a_child_is_found_and_its_end_noticed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let workers: BTreeSet<Process> =
            children(std::process::id()).into_iter().filter(|(pid, _)| *pid == child.id()).collect();
        assert_eq!(workers.len(), 1);
        child.kill().unwrap();
        gone(&workers).unwrap();
        assert!(!wait(&mut child, PATIENCE).unwrap());
    }
}
