//! `cargo xtask gpu-bundle`: what a machine with a GPU and torch 2.11 in its Python, but no Rust, needs to check us.
//!
//! The binaries are stripped and compressed; libtorch is that machine's own. Its folder is found by its Python, so the
//! start script needs nothing but `python3`.

use crate::shell::{Repo, run};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What a bundle may weigh.
const MAX_BYTES: u64 = 64 << 20;

const START: &str = r#"#!/bin/sh
# Runs every check that needs a GPU. Needs torch 2.11.0 in python3; no Rust.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
torch=$("$python" -c 'import torch, os; print(torch.__version__.split("+")[0], os.path.dirname(torch.__file__))') || {
    echo "error: $python has no torch; install torch==2.11.0 or set PYTHON" >&2; exit 4; }
case $torch in 2.11.0\ *) ;; *) echo "error: found torch ${torch%% *}, these binaries need 2.11.0" >&2; exit 4 ;; esac
folder=${torch#* }
libraries=$folder/lib
for extra in "$folder"/../nvidia/*/lib; do [ -d "$extra" ] && libraries=$libraries:$extra; done
LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$here/tangelo-worker" gpu-check
"#;

/// Builds release, strips, packs; prints where the archive lies and how large it is.
pub fn bundle(repo: &Repo) -> Result<()> {
    run(&mut repo.cargo(&["build", "--release", "-p", "tangelo", "-p", "tangelo-trainer"]))?;
    let release = repo.target().join("release");
    let folder = repo.target().join("gpu-bundle");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for name in ["tangelo", "tangelo-worker"] {
        let (from, to) = (release.join(name), folder.join(name));
        run(repo.command("strip").arg("-o").arg(&to).arg(&from))?;
    }
    write_script(&folder.join("gpu-check.sh"))?;
    let archive = folder.with_extension("tar.gz");
    run(repo.command("tar").arg("-czf").arg(&archive).arg("-C").arg(repo.target()).arg("gpu-bundle"))?;
    report(&folder, &archive)
}

fn write_script(path: &Path) -> Result<()> {
    fs::write(path, START).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn report(folder: &Path, archive: &PathBuf) -> Result<()> {
    let unpacked: u64 = fs::read_dir(folder)?.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum();
    let packed = fs::metadata(archive)?.len();
    println!("{}: {:.1} MiB, unpacked {:.1} MiB", archive.display(), mib(packed), mib(unpacked));
    println!("there: tar -xzf gpu-bundle.tar.gz && gpu-bundle/gpu-check.sh");
    if unpacked > MAX_BYTES {
        bail!("the bundle unpacks to {:.1} MiB, more than the {:.0} MiB it may weigh", mib(unpacked), mib(MAX_BYTES));
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 20) as f64
}
