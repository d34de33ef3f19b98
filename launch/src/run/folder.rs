//! The run folder: who may use it, and whether what it holds goes on with this configuration.

use crate::error::LaunchError;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use tangelo_configs::Plan;
use tangelo_observe::files;

/// Keys that a run may not change once it has a checkpoint: they decide what the weights are and which sample comes
/// next. A name that ends in a dot is a whole section.
const FIXED: [&str; 6] = ["job.type", "model.", "data.", "training.seq_len", "optimizer.name", "debug.seed"];

/// Keys of those sections that may change all the same: they say where something is, not what. Fingerprints in the
/// prepared folders and in checkpoints tell whether what lies there is the same.
const FREE: [&str; 6] = [
    "model.flavor",
    "model.hf_assets_path",
    "data.prepared_folder",
    "data.tokenizer",
    "data.sources.name",
    "data.sources.paths",
];

/// A lock on a run folder, held for as long as this lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Makes this process the only launcher of `node_rank` in the folder.
pub fn lock(run_folder: &Path, node_rank: usize) -> Result<Lock, LaunchError> {
    fs::create_dir_all(run_folder).map_err(LaunchError::io("create the run folder", run_folder))?;
    let path = run_folder.join(format!(".lock-node-{node_rank}"));
    let file = File::create(&path).map_err(LaunchError::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(LaunchError::Usage(format!(
            "{} is in use by another tangelo run; wait for it, or choose another folder with --set job.dump_folder=...",
            run_folder.display()
        ))),
        // Some network file systems know no locks: then the user has to take care.
        Err(TryLockError::Error(_)) => Ok(Lock { _file: file }),
    }
}

/// Writes the resolved configuration, whole or not at all, and returns where.
pub fn write_config(plan: &Plan) -> Result<PathBuf, LaunchError> {
    let folder = &plan.config.job.dump_folder;
    // A rank of another launcher holds no lock here, so nobody made the folder for it.
    fs::create_dir_all(folder).map_err(LaunchError::io("create the run folder", folder))?;
    let path = folder.join(files::CONFIG);
    // Several ranks may do this at once, each with its own partial file.
    let partial = path.with_extension(format!("toml.partial-{}", std::process::id()));
    let text = plan.to_toml()?;
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, &path)
    };
    write().map_err(LaunchError::io("write", &path))?;
    Ok(path)
}

/// Refuses a configuration that cannot go on from the checkpoints in its run folder.
pub fn check_same_run(plan: &Plan) -> Result<(), LaunchError> {
    let folder = &plan.config.job.dump_folder;
    let path = folder.join(files::CONFIG);
    let Ok(before) = fs::read_to_string(&path) else { return Ok(()) };
    if !has_checkpoint(&folder.join(&plan.config.checkpoint.folder)) {
        return Ok(());
    }
    let Ok(before) = before.parse::<toml::Table>() else { return Ok(()) };
    let now = plan.to_toml()?.parse::<toml::Table>().map_err(|e| LaunchError::Internal(e.to_string()))?;
    let changes = fixed_changes(&before, &now);
    if changes.is_empty() {
        return Ok(());
    }
    Err(LaunchError::Usage(format!(
        "{} holds checkpoints of a run with other settings:\n  {}\nTo go on with that run, use its settings (tangelo run \
         {}); to start another one, give it its own folder (--set job.dump_folder=...)",
        folder.display(),
        changes.join("\n  "),
        path.display()
    )))
}

fn has_checkpoint(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_one = |name: &str| name.starts_with("step-") || name.starts_with("driver-");
    entries.into_iter().any(|entry| is_one(&entry.file_name().to_string_lossy()))
}

/// Lines `key: before -> now` of what may not change.
fn fixed_changes(before: &toml::Table, now: &toml::Table) -> Vec<String> {
    let (before, now) = (flat(before), flat(now));
    let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    let value = |map: &BTreeMap<String, String>, key: &str| map.get(key).cloned().unwrap_or_else(|| "(not set)".into());
    let changed = keys.into_iter().filter(|key| is_fixed(key) && before.get(*key) != now.get(*key));
    changed.map(|key| format!("{key}: {} -> {}", value(&before, key), value(&now, key))).collect()
}

fn is_fixed(key: &str) -> bool {
    let matches = |pattern: &str| key == pattern || (pattern.ends_with('.') && key.starts_with(pattern));
    FIXED.into_iter().any(matches) && !FREE.contains(&key)
}

/// `section.key` to the value as TOML; of `data.sources`, each key to the list of its values, and their number.
fn flat(table: &toml::Table) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (section, value) in table {
        match value {
            toml::Value::Table(keys) => {
                all.extend(keys.iter().map(|(key, value)| (format!("{section}.{key}"), value.to_string())));
            }
            value => drop(all.insert(section.clone(), value.to_string())),
        }
    }
    let sources = table.get("data").and_then(|data| data.get("sources")).and_then(toml::Value::as_array);
    if let Some(sources) = sources {
        all.insert("data.sources".into(), format!("{} source(s)", sources.len()));
        let keys: BTreeSet<&String> = sources.iter().filter_map(toml::Value::as_table).flat_map(|s| s.keys()).collect();
        let value = |source: &toml::Value, key: &str| source.get(key).map_or("(not set)".into(), ToString::to_string);
        for key in keys {
            let values: Vec<String> = sources.iter().map(|source| value(source, key)).collect();
            all.insert(format!("data.sources.{key}"), values.join(", "));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(before: &str, now: &str, expected: Expect) {
        expected.assert_eq(&fixed_changes(&before.parse().unwrap(), &now.parse().unwrap()).join("\n"));
    }

    #[test]
    fn only_what_the_weights_and_the_order_depend_on_is_fixed() {
        check(
            "[model]\nhidden_size = 64\nflavor = 'a'\n[training]\nsteps = 5\nseq_len = 8\n[debug]\nseed = 1\n[data]\nprepared_folder = 'x'",
            "[model]\nhidden_size = 96\nsliding_window = 4\n[training]\nsteps = 9\nseq_len = 16\n[debug]\nseed = 2\n[optimizer]\nlr = 1.0\n[data]\nsources = [{ paths = ['b'] }]",
            expect![[r#"
                data.sources: (not set) -> 1 source(s)
                debug.seed: 1 -> 2
                model.hidden_size: 64 -> 96
                model.sliding_window: (not set) -> 4
                training.seq_len: 8 -> 16"#]],
        );
        check("[training]\nsteps = 5", "[training]\nsteps = 7\n[metrics]\nlog_freq = 3", expect![[""]]);
        // A corpus and a tokenizer may move; what is taken from them may not change.
        check(
            "[data]\ntokenizer = 'x'\nshard_tokens = 5\nsources = [{ name = 'a', paths = ['a'], text_column = 't' }]",
            "[data]\nshard_tokens = 6\nsources = [{ name = 'b', paths = ['/b'], text_column = 't', weight = 1.5 }]",
            expect![[r#"
                data.shard_tokens: 5 -> 6
                data.sources.weight: (not set) -> 1.5"#]],
        );
    }

    #[test]
    fn a_second_launcher_is_refused_until_the_first_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path(), 0).unwrap();
        assert!(lock(folder.path(), 0).unwrap_err().to_string().contains("in use"));
        assert!(lock(folder.path(), 1).is_ok(), "another node of the same job");
        drop(held);
        assert!(lock(folder.path(), 0).is_ok());
    }
}
