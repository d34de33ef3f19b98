//! Build script of every crate that links libtorch: lets its binaries and tests find libtorch without LD_LIBRARY_PATH.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed={}", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    let libtorch = std::env::var("LIBTORCH").unwrap_or_default();
    if let Ok(folder) = Path::new(&libtorch).canonicalize() {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}/lib", folder.display());
    }
    println!("cargo::rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
}
