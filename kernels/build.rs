//! Compiles the C++ shim (`src/shim/*.cc`) against libtorch's headers and lets tests find libtorch.
//!
//! The CPU kernels (`src/shim/cpu/`) are compiled once for each instruction set and chosen at run time, so the machine
//! that builds need not be the one that runs.

use std::path::{Path, PathBuf};

/// What the ISA-specific files need on x86-64; elsewhere only `isa_generic.cc` is compiled.
const ISA_FLAGS: [(&str, &[&str]); 3] = [
    ("src/shim/cpu/isa_avx2.cc", &["-mavx2", "-mfma"]),
    ("src/shim/cpu/isa_avx512.cc", &["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]),
    (
        "src/shim/cpu/isa_avx512_bf16.cc",
        &["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"],
    ),
];

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
    // libtorch's own OpenMP: the same soname, found by the rpath.
    println!("cargo::rustc-link-lib=dylib=gomp");

    let mut shim = compiler();
    shim.include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .include("src/shim/include")
        .files(sources("src/shim"))
        .files(["src/shim/cpu/dispatch.cc", "src/shim/cpu/isa_generic.cc"]);
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        for (file, flags) in ISA_FLAGS {
            let mut variant = compiler();
            for flag in flags {
                variant.flag(flag);
            }
            shim.objects(variant.file(file).compile_intermediates());
        }
    }
    shim.compile("tangelo_shim");
}

fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .debug(false)
        .flag("-fopenmp")
        .flag_if_supported("-fno-math-errno")
        .flag_if_supported("-fno-trapping-math")
        .flag_if_supported("-ffp-contract=fast")
        .warnings(false)
        .flag_if_supported("-Wno-psabi");
    build
}

/// The C++ files directly in `folder`, in a stable order.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("src/shim is part of this crate")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cc"))
        .collect();
    sources.sort();
    sources
}
