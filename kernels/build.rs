//! Compiles the C++ shim (`src/shim/*.cc`) against libtorch's headers and lets tests find libtorch.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=src/shim");
    println!("cargo::rerun-if-changed=build.rs");
    let libtorch = std::env::var("LIBTORCH").unwrap_or_default();
    let Ok(libtorch) = Path::new(&libtorch).canonicalize() else {
        panic!(
            "no libtorch at LIBTORCH={libtorch:?}: run `cargo xtask setup` once, or set LIBTORCH to a libtorch 2.11.0"
        );
    };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}/lib", libtorch.display());

    let mut sources: Vec<PathBuf> = std::fs::read_dir("src/shim")
        .expect("src/shim is part of this crate")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cc"))
        .collect();
    sources.sort();
    if sources.is_empty() {
        return;
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .debug(false)
        .flag_if_supported("-fno-math-errno")
        .flag_if_supported("-fno-trapping-math")
        .warnings(false)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .include("src/shim/include")
        .files(sources)
        .compile("tangelo_shim");
}
