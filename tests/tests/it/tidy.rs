//! The rules of the house that a program can check: who imports whom, where libtorch and `unsafe` may be, what must
//! not be in a file. Each check collects every violation before it fails.

use crate::support::root;
use cargo_metadata::{Metadata, MetadataCommand, PackageId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A room: its folder, its package, the packages of this workspace it may import, whether it may link libtorch.
type Room = (&'static str, &'static str, &'static [&'static str], bool);

const CORE: &str = "tangelo-core";
const CONFIGS: &str = "tangelo-configs";
const DATA: &str = "tangelo-data";
const FORMATS: &str = "tangelo-formats";
const OBSERVE: &str = "tangelo-observe";
const PLANNER: &str = "tangelo-planner";
const KERNELS: &str = "tangelo-kernels";
const MODELS: &str = "tangelo-models";
const TRAINER: &str = "tangelo-trainer";
const ALGO: &str = "tangelo-algo";
const CONTROL: &str = "tangelo-control";
const DRIVER: &str = "tangelo-driver";
const ROLLOUT: &str = "tangelo-rollout";

/// The table of rooms in ARCHITECTURE.md.
const ROOMS: &[Room] = &[
    ("core", CORE, &[], false),
    ("configs", CONFIGS, &[CORE], false),
    ("models/formats", FORMATS, &[CORE, CONFIGS], false),
    ("data", DATA, &[CORE, CONFIGS, FORMATS], false),
    ("launch/observe", OBSERVE, &[CORE, CONFIGS], false),
    ("launch/planner", PLANNER, &[CORE, CONFIGS], false),
    ("launch/control", CONTROL, &[CORE, CONFIGS], false),
    ("trainer/algo", ALGO, &[CORE, CONFIGS], false),
    ("trainer/driver", DRIVER, &[CORE, CONFIGS, DATA, FORMATS, CONTROL, ALGO, OBSERVE], false),
    ("launch", "tangelo", &[CORE, CONFIGS, DATA, FORMATS, OBSERVE, PLANNER, CONTROL, DRIVER], false),
    ("kernels", KERNELS, &[CORE], true),
    ("models", MODELS, &[CORE, CONFIGS, KERNELS], true),
    ("rollout", ROLLOUT, &[CORE, CONFIGS, KERNELS, MODELS], true),
    ("trainer", TRAINER, WORKER_IMPORTS, true),
    ("tests", "tangelo-tests", TESTS_IMPORT, true),
    ("xtask", "xtask", &[], false),
];

const WORKER_IMPORTS: &[&str] =
    &[CORE, CONFIGS, DATA, FORMATS, OBSERVE, PLANNER, KERNELS, MODELS, ROLLOUT, CONTROL, ALGO];
const TESTS_IMPORT: &[&str] =
    &[CORE, CONFIGS, DATA, FORMATS, OBSERVE, PLANNER, KERNELS, MODELS, TRAINER, ROLLOUT, CONTROL, ALGO, DRIVER];

/// What links libtorch.
const LIBTORCH_CRATES: [&str; 2] = ["tch", "torch-sys"];
/// Outside `kernels`, `unsafe` may be in this one file, which maps files into memory.
const MEMORY_MAP_FILE: &str = "models/formats/src/mmap.rs";
/// Longer files are to be split.
const MAX_LINES: usize = 700;

fn metadata() -> Metadata {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .other_options(["--locked".into(), "--offline".into(), "--filter-platform".into(), platform])
        .exec()
        .expect("cargo metadata runs in this workspace")
}

/// Fails with every line of `violations`.
fn expect_none(rule: &str, violations: Vec<String>) {
    assert!(violations.is_empty(), "{rule}:\n  {}", violations.join("\n  "));
}

#[test]
fn every_room_is_in_the_table() {
    let metadata = metadata();
    let found: BTreeSet<(String, String)> = metadata
        .workspace_packages()
        .iter()
        .map(|p| {
            let folder = p.manifest_path.parent().expect("a manifest lies in a folder");
            let folder = folder.strip_prefix(&metadata.workspace_root).expect("members lie in the workspace");
            (folder.to_string(), p.name.to_string())
        })
        .collect();
    let expected = ROOMS.iter().map(|(folder, name, ..)| ((*folder).to_owned(), (*name).to_owned())).collect();
    assert_eq!(found, expected, "found (left) and the table of rooms (right) differ");
}

#[test]
fn rooms_import_only_what_the_table_allows() {
    let metadata = metadata();
    let names: BTreeSet<String> = metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    let mut violations = Vec::new();
    for package in metadata.workspace_packages() {
        let allowed = ROOMS.iter().find(|r| r.1 == package.name.as_str()).map_or(&[][..], |r| r.2);
        let edges = package.dependencies.iter().filter(|d| names.contains(&d.name));
        let wrong = edges.filter(|d| !allowed.contains(&d.name.as_str()));
        violations.extend(wrong.map(|d| format!("{} -> {} ({:?})", package.name, d.name, d.kind)));
    }
    expect_none("edges between rooms that the table does not allow", violations);
}

#[test]
fn libtorch_stays_in_its_rooms() {
    let metadata = metadata();
    let resolve = metadata.resolve.as_ref().expect("metadata with dependencies has a resolve graph");
    let edges: BTreeMap<&PackageId, Vec<&PackageId>> =
        resolve.nodes.iter().map(|n| (&n.id, n.deps.iter().map(|d| &d.pkg).collect())).collect();
    let name = |id: &PackageId| metadata[id].name.to_string();
    let mut violations = Vec::new();
    for (_, room, _, may_link) in ROOMS {
        let start = &metadata.workspace_packages().into_iter().find(|p| p.name.as_str() == *room).expect("listed").id;
        let reached = reachable(start, &edges);
        let linked: Vec<_> =
            reached.iter().map(|id| name(id)).filter(|n| LIBTORCH_CRATES.contains(&n.as_str())).collect();
        if linked.is_empty() == *may_link {
            violations.push(format!("{room}: reaches {linked:?}, libtorch allowed: {may_link}"));
        }
    }
    expect_none("libtorch where the table has none, or none where the table has it", violations);
}

fn reachable<'a>(start: &'a PackageId, edges: &BTreeMap<&'a PackageId, Vec<&'a PackageId>>) -> BTreeSet<&'a PackageId> {
    let (mut seen, mut open) = (BTreeSet::from([start]), vec![start]);
    while let Some(id) = open.pop() {
        open.extend(edges.get(id).into_iter().flatten().filter(|next| seen.insert(**next)));
    }
    seen
}

/// Files of the repository with one of these extensions, with their text.
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    walk(&root(), &mut found);
    found.sort();
    let relative = |path: &Path| path.strip_prefix(root()).expect("found below the root").display().to_string();
    found
        .iter()
        .filter(|path| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .map(|path| (relative(path), std::fs::read_to_string(path).expect("sources are UTF-8")))
        .collect()
}

/// Everything but hidden folders, what builds leave, and what runs write.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("folders of the repository can be read").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let skip = name.starts_with('.') || ["target", "runs", "__pycache__"].contains(&name.as_str());
        let kind = entry.file_type().expect("entries have a type");
        if kind.is_dir() && !skip {
            walk(&entry.path(), found);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
}

#[test]
fn files_say_what_they_are_for() {
    let silent = files(&["rs"]).into_iter().filter(|(_, text)| !text.starts_with("//!")).map(|(name, _)| name);
    expect_none("Rust files that do not open with `//!`", silent.collect());
}

#[test]
fn files_are_short() {
    let counted = files(&["rs", "cc", "cu", "h", "py"]).into_iter().map(|(name, text)| (name, text.lines().count()));
    let long = counted.filter(|(_, lines)| *lines > MAX_LINES).map(|(name, lines)| format!("{name}: {lines} lines"));
    expect_none(&format!("files over {MAX_LINES} lines, to be split"), long.collect());
}

#[test]
fn nothing_is_left_for_later() {
    // Spelled in halves: this file is searched too.
    let words = [
        ["to", "do!("],
        ["unimple", "mented!("],
        ["#[ig", "nore"],
        ["TO", "DO"],
        ["FIX", "ME"],
        ["dbg", "!("],
        ["/wo", "rk/"],
        ["/ro", "ot/"],
        ["index.crates", ".io"],
        ["files.python", "hosted"],
        ["hel", "per"],
        ["../sha", "red"],
    ]
    .map(|halves| halves.concat());
    let mut violations = Vec::new();
    for (name, text) in files(&["rs", "cc", "cu", "h", "py", "md", "toml", "sh"]) {
        for (number, line) in text.lines().enumerate() {
            let hits = words.iter().filter(|word| line.contains(word.as_str()));
            violations.extend(hits.map(|word| format!("{name}:{}: {word}", number + 1)));
        }
    }
    expect_none("words that must not be in the repository", violations);
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let permit = ["allow(un", "safe_code)"].concat();
    let sources = files(&["rs"]).into_iter().filter(|(_, text)| text.contains(&permit)).map(|(name, _)| name);
    let wrong = sources.filter(|name| !name.starts_with("kernels/") && name != MEMORY_MAP_FILE);
    expect_none("files outside `kernels` that permit themselves unsafe code", wrong.collect());
}

#[test]
fn crates_have_one_integration_binary() {
    let metadata = metadata();
    let is_test = |t: &&cargo_metadata::Target| t.kind.contains(&cargo_metadata::TargetKind::Test);
    let counted =
        metadata.workspace_packages().into_iter().map(|p| (&p.name, p.targets.iter().filter(is_test).count()));
    // Those of `kernels` start processes of their own executable for communicators: operators are tested apart from that.
    let allowed = |name: &str| if name == KERNELS { 2 } else { 1 };
    let many = counted.filter(|(name, count)| *count > allowed(name)).map(|(name, count)| format!("{name}: {count}"));
    expect_none("packages with several integration test binaries (each links everything again)", many.collect());
}
