//! Corpora, tokenizers and loaders for tests.

use std::fs;
use std::path::{Path, PathBuf};
use tangelo_configs::job::Packing;
use tangelo_data::tokenizer::{TrainOptions, train};
use tangelo_data::{LoaderOptions, LoaderSource, Manifest, PrepareOptions, Split, prepare};

/// A folder that is removed with its contents, with a tokenizer learnt from a few sentences.
pub struct Folder {
    root: tempfile::TempDir,
}

pub fn sentence(number: u64) -> String {
    let words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "in", "Xanadu", "1234", "naïve"];
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let count = 3 + next(40);
    (0..count).map(|_| words[next(words.len())]).collect::<Vec<_>>().join(" ") + "."
}

impl Folder {
    pub fn new() -> Folder {
        let folder = Folder { root: tempfile::tempdir().unwrap() };
        folder.write("train.txt", (0..200).map(sentence).collect::<Vec<_>>().join("\n"));
        let options = TrainOptions::new(vec![folder.text("train.txt")], 400);
        train(&options, &()).unwrap().save(&folder.path("tokenizer")).unwrap();
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    /// `count` documents as JSON lines.
    pub fn write_documents(&self, name: &str, count: u64) {
        let lines = (0..count).map(|i| serde_json::json!({ "id": i, "text": sentence(i) }).to_string());
        self.write(name, lines.collect::<Vec<_>>().join("\n"));
    }

    pub fn options(&self, source: &str, folder: &str) -> PrepareOptions {
        PrepareOptions::new(vec![self.text(source)], self.path("tokenizer"), self.path(folder))
    }

    pub fn prepare(&self, source: &str, folder: &str) -> Manifest {
        prepare(&self.options(source, folder), &()).unwrap()
    }

    pub fn loader_options(&self, folders: &[(&str, Option<f64>)]) -> LoaderOptions {
        let source = |(name, weight): &(&str, Option<f64>)| LoaderSource {
            name: name.to_string(),
            folder: self.path(name),
            weight: *weight,
        };
        LoaderOptions {
            sources: folders.iter().map(source).collect(),
            split: Split::Train,
            validation_fraction: 0.1,
            seq_len: 32,
            packing: Packing::Concat,
            document_mask: true,
            seed: 7,
            global_batch_size: 6,
            data_rank: 0,
            data_size: 1,
            verify: true,
        }
    }
}

/// Names and bytes of the shards of a folder.
pub fn shards(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "arrow"))
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    found.sort();
    found
}

/// A folder of this repository: real text.
pub fn real_text(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder)
}
