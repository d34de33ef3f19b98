//! Invariant 4: whatever byte of whatever file changes, the file is named and the checkpoint before is used.

use super::*;
use std::fs;
use std::path::PathBuf;

/// Steps 10 and 20 by two ranks; the folder and the files of step 20.
fn two_checkpoints(seed: u64) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), seed, &[10, 20], Layout::rows(2), |_| {});
    let newest = folder.path().join("step-00000020");
    let files = names(&newest).iter().map(|name| newest.join(name)).collect();
    (folder, files)
}

/// The file must be named, and step 10 be used.
fn check_noticed(folder: &Path, file: &Path, what: &str) {
    let found = find_usable(folder, None).unwrap();
    assert_eq!(found.checkpoint.map(|checkpoint| checkpoint.step()), Some(10), "{what} of {}", file.display());
    let [warning] = &found.warnings[..] else { panic!("{} warnings", found.warnings.len()) };
    let CheckpointError::Damaged { file: named, expected, found } = &warning.problem else {
        panic!("{what}: {}", warning.problem);
    };
    assert_eq!(named, file, "{what}");
    assert_ne!(expected, found);
    assert!(warning.to_string().contains("step 20 is passed over"), "{warning}");
}

#[test]
fn every_class_of_truncation_is_noticed() {
    let seed = fresh_seed();
    let (folder, files) = two_checkpoints(seed);
    for file in &files {
        let whole = fs::read(file).unwrap();
        let header = match file.extension().unwrap().to_str().unwrap() {
            "safetensors" => 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize,
            _ => whole.len() / 2,
        };
        let within = header + 1 + (mix64(seed) as usize) % (whole.len() - header - 1);
        for length in [0, 1, 7, 8, 9, header - 1, header, header + 1, within, whole.len() - 4, whole.len() - 1] {
            fs::write(file, &whole[..length]).unwrap();
            check_noticed(folder.path(), file, &format!("the first {length} of {} bytes", whole.len()));
        }
        fs::write(file, [&whole[..], b"\n"].concat()).unwrap();
        check_noticed(folder.path(), file, "one byte more");
        fs::write(file, vec![0; whole.len()]).unwrap();
        check_noticed(folder.path(), file, "zeros");
        fs::remove_file(file).unwrap();
        check_noticed(folder.path(), file, "absence");
        fs::write(file, &whole).unwrap();
    }
    check_newest(folder.path(), seed, 20, 0);
}

#[test]
fn flipped_bits_are_noticed_anywhere() {
    let seed = fresh_seed();
    let (folder, files) = two_checkpoints(seed);
    for (number, file) in files.iter().enumerate() {
        let whole = fs::read(file).unwrap();
        for trial in 0..60 {
            let random = mix64(seed ^ (number * 1000 + trial) as u64);
            // The last trials walk through the end, where a manifest keeps its checksum.
            let at = if trial < 15 { whole.len() - 1 - 4 * trial } else { random as usize % whole.len() };
            let mut torn = whole.clone();
            torn[at] ^= 1 << (random >> 61);
            fs::write(file, &torn).unwrap();
            check_noticed(folder.path(), file, &format!("a flipped bit of byte {at}"));
        }
        fs::write(file, &whole).unwrap();
    }
    check_newest(folder.path(), seed, 20, 0);
}

#[test]
fn files_of_two_checkpoints_do_not_mix() {
    let seed = fresh_seed();
    let (folder, files) = two_checkpoints(seed);
    for file in files.iter().filter(|file| !file.ends_with("manifest.json")) {
        let whole = fs::read(file).unwrap();
        fs::copy(folder.path().join("step-00000010").join(file.file_name().unwrap()), file).unwrap();
        check_noticed(folder.path(), file, "step 10's file in step 20");
        fs::write(file, &whole).unwrap();
    }
}

#[test]
fn asked_for_steps_and_folders_without_a_usable_one_are_errors() {
    let seed = fresh_seed();
    let (folder, files) = two_checkpoints(seed);
    assert_eq!(find_usable(folder.path(), Some(10)).unwrap().checkpoint.unwrap().step(), 10);
    let absent = find_usable(folder.path(), Some(15)).unwrap_err().to_string();
    assert!(absent.contains("no checkpoint of step 15") && absent.contains("[10, 20]"), "{absent}");
    fs::write(&files[0], b"{}").unwrap();
    assert!(matches!(find_usable(folder.path(), Some(20)), Err(CheckpointError::Damaged { .. })));
    fs::remove_file(folder.path().join("step-00000010/rank-00001.safetensors")).unwrap();
    let none = find_usable(folder.path(), None).unwrap_err().to_string();
    assert!(none.contains("step-00000020/manifest.json") && none.contains("step-00000010/rank-00001"), "{none}");
    let empty = tempfile::tempdir().unwrap();
    assert!(find_usable(empty.path(), None).unwrap().checkpoint.is_none());
    assert!(find_usable(&empty.path().join("absent"), None).unwrap().checkpoint.is_none());
}

#[test]
fn a_newer_format_is_not_passed_over_in_silence() {
    let seed = fresh_seed();
    let (folder, files) = two_checkpoints(seed);
    let manifest = files.iter().find(|file| file.ends_with("manifest.json")).unwrap();
    let mut about = Checkpoint::open(manifest.parent().unwrap(), Verify::Full).unwrap().manifest().clone();
    about.version += 1;
    fs::write(manifest, about.to_bytes().unwrap()).unwrap();
    let message = find_usable(folder.path(), None).unwrap_err().to_string();
    assert!(message.contains("format version 2") && message.contains("newer tangelo"), "{message}");
}
