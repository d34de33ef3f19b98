//! Batches: the same whoever asks, and every token trained once.

use crate::support::Folder;
use std::collections::BTreeMap;
use std::sync::Arc;
use tangelo_configs::job::Packing;
use tangelo_core::{Batch, Column};
use tangelo_data::{Loader, LoaderOptions, Manifest, Prefetcher, Split};

/// Every column of a batch, rows concatenated.
fn columns(batch: &Batch) -> (Vec<Vec<u32>>, Vec<f32>, Vec<i64>) {
    let u32s = [Column::Tokens, Column::Targets, Column::Positions, Column::SeqId];
    (
        u32s.iter().map(|c| batch.u32_values(*c).unwrap()).collect(),
        batch.f32_values(Column::CeWeight).unwrap(),
        batch.i64_values(Column::SampleIndex).unwrap(),
    )
}

type Columns = (Vec<Vec<u32>>, Vec<f32>, Vec<i64>);

fn append(whole: &mut Columns, part: Columns) {
    whole.0.resize(4, Vec::new());
    whole.0.iter_mut().zip(part.0).for_each(|(all, new)| all.extend(new));
    whole.1.extend(part.1);
    whole.2.extend(part.2);
}

fn two_sources() -> Folder {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 120);
    folder.write_documents("b.jsonl", 45);
    folder.prepare("a.jsonl", "a");
    folder.prepare("b.jsonl", "b");
    folder
}

#[test]
fn any_number_of_ranks_and_any_restart_read_the_same_batches() {
    let folder = two_sources();
    for weights in [[None, None], [Some(0.7), Some(0.3)]] {
        for packing in [Packing::Concat, Packing::BestFit] {
            let options = folder.loader_options(&[("a", weights[0]), ("b", weights[1])]);
            let options = LoaderOptions { packing, global_batch_size: 7, ..options };
            let one = Loader::open(options.clone()).unwrap();
            // More than two epochs, so that repetition is covered.
            let steps = 2 * one.num_samples() / 7 + 3;
            for data_size in [2, 3, 4] {
                let ranks: Vec<Loader> = (0..data_size)
                    .map(|data_rank| Loader::open(LoaderOptions { data_rank, data_size, ..options.clone() }).unwrap())
                    .collect();
                assert!(ranks.iter().all(|rank| rank.fingerprint() == one.fingerprint()));
                for step in (0..steps).rev() {
                    let mut joined = Columns::default();
                    for rank in &ranks {
                        append(&mut joined, columns(&rank.batch_at(step * 7).unwrap()));
                    }
                    assert_eq!(joined, columns(&one.batch_at(step * 7).unwrap()), "step {step} of {data_size} ranks");
                }
            }
        }
    }
}

#[test]
fn every_token_is_a_target_once_per_epoch() {
    let folder = two_sources();
    for packing in [Packing::Concat, Packing::BestFit] {
        for (seq_len, split) in [(16, Split::Train), (33, Split::Train), (500, Split::Train), (16, Split::Validation)] {
            let options = folder.loader_options(&[("a", None), ("b", None)]);
            let options = LoaderOptions { packing, seq_len, split, global_batch_size: 1, ..options };
            let loader = Loader::open(options).unwrap();
            let mut trained: BTreeMap<(String, u64, u64), (u32, u32)> = BTreeMap::new();
            let mut inputs: BTreeMap<(String, u64, u64), u32> = BTreeMap::new();
            for sample in 0..loader.num_samples() {
                let batch = loader.batch_at(sample).unwrap();
                let ((ids, weights, _), mut at) = (columns(&batch), 0);
                for (number, piece) in loader.describe(sample).into_iter().enumerate() {
                    for (offset, token) in piece.tokens.clone().enumerate() {
                        let key = |token| (piece.source.clone(), piece.document, token);
                        inputs.insert(key(token), ids[0][at]);
                        assert_eq!((ids[2][at], ids[3][at]), (offset as u32, number as u32));
                        if weights[at] == 1.0 {
                            let entry = trained.entry(key(token + 1)).or_insert((0, ids[1][at]));
                            entry.0 += 1;
                            assert_eq!(entry.1, ids[1][at]);
                        }
                        at += 1;
                    }
                }
                assert_eq!(ids[0].len(), seq_len);
                assert!(weights[at..].iter().all(|w| *w == 0.0) && ids[1][at..].iter().all(|t| *t == 0));
                let last = loader.describe(sample).len() as u32;
                assert!(ids[3][at..].iter().all(|id| *id == last), "padding is a sequence of its own");
            }
            // Every token but the first of a document is a target once; what is an input is the very token.
            assert!(trained.values().all(|(count, _)| *count == 1));
            for (key, (_, token)) in &trained {
                if let Some(input) = inputs.get(key) {
                    assert_eq!(input, token, "{key:?}");
                }
            }
            let documents: std::collections::BTreeSet<_> = inputs.keys().map(|k| (k.0.clone(), k.1)).collect();
            let tokens: u64 = if split == Split::Train {
                let held: u64 = held_out_tokens(&loader);
                num_tokens(&loader) - held
            } else {
                held_out_tokens_of(&loader)
            };
            assert_eq!(trained.len() as u64, tokens - documents.len() as u64, "{packing:?} {seq_len}");
        }
    }
}

/// Tokens of all documents, whatever their split.
fn num_tokens(loader: &Loader) -> u64 {
    loader.options().sources.iter().map(|s| Manifest::read(&s.folder).unwrap().tokens).sum()
}

fn held_out_tokens(loader: &Loader) -> u64 {
    held_out_tokens_of(&loader.validation().unwrap())
}

/// Tokens of the held-out documents: trained ones and the first of each document.
fn held_out_tokens_of(loader: &Loader) -> u64 {
    let (mut targets, mut documents) = (0, std::collections::BTreeSet::new());
    let batch_size = loader.options().global_batch_size as u64;
    for first in (0..loader.num_samples()).step_by(batch_size as usize) {
        targets += columns(&loader.batch_at(first).unwrap()).1.iter().filter(|w| **w == 1.0).count() as u64;
        for sample in first..first + batch_size {
            documents.extend(loader.describe(sample).into_iter().map(|p| (p.source, p.document)));
        }
    }
    targets + documents.len() as u64
}

#[test]
fn without_a_mask_the_stream_is_trained_through() {
    let folder = two_sources();
    let options = LoaderOptions { document_mask: false, global_batch_size: 1, ..folder.loader_options(&[("a", None)]) };
    let loader = Loader::open(options).unwrap();
    let mut targets = 0;
    for sample in 0..loader.num_samples() {
        let (ids, weights, _) = columns(&loader.batch_at(sample).unwrap());
        let trained = weights.iter().filter(|w| **w == 1.0).count();
        assert_eq!(ids[0][1..trained], ids[1][..trained - 1], "targets are the next inputs");
        assert_eq!(ids[2][..trained], (0..trained as u32).collect::<Vec<_>>());
        assert!(ids[3][..trained].iter().all(|id| *id == 0));
        targets += trained as u64;
    }
    let masked = Loader::open(folder.loader_options(&[("a", None)])).unwrap();
    assert_eq!(targets, num_tokens(&loader) - held_out_tokens(&masked) - 1);
}

#[test]
fn epochs_are_shuffled_anew_and_seeds_matter() {
    let folder = two_sources();
    let options = LoaderOptions { global_batch_size: 1, ..folder.loader_options(&[("a", None), ("b", None)]) };
    let loader = Loader::open(options.clone()).unwrap();
    let count = loader.num_samples();
    let order = |loader: &Loader, epoch: u64| -> Vec<Vec<u32>> {
        (0..count).map(|i| columns(&loader.batch_at(epoch * count + i).unwrap()).0.swap_remove(0)).collect()
    };
    let (first, second) = (order(&loader, 0), order(&loader, 1));
    assert_ne!(first, second);
    let sorted = |mut rows: Vec<Vec<u32>>| {
        rows.sort();
        rows
    };
    assert_eq!(sorted(first.clone()), sorted(second));
    let other = Loader::open(LoaderOptions { seed: 8, ..options }).unwrap();
    assert_ne!(order(&other, 0), first);
    assert_ne!(other.fingerprint(), loader.fingerprint());
}

#[test]
fn weights_decide_how_often_a_source_comes() {
    let folder = two_sources();
    let options = folder.loader_options(&[("a", Some(1.0)), ("b", Some(3.0))]);
    let loader = Loader::open(options).unwrap();
    let from_b = (0..1000).filter(|&i| loader.describe(i)[0].source == "b").count();
    assert!((745..=755).contains(&from_b), "{from_b} of 1000");
    let mixed = folder.loader_options(&[("a", Some(1.0)), ("b", None)]);
    let error = Loader::open(mixed).unwrap_err().to_string();
    assert_eq!(error, "1 of 2 data sources have a weight: give all of them one, or none");
}

#[test]
fn held_out_documents_are_never_trained_on_and_end_in_padding() {
    let folder = two_sources();
    let loader = Loader::open(folder.loader_options(&[("a", None), ("b", None)])).unwrap();
    let validation = loader.validation().unwrap();
    let documents = |loader: &Loader| -> std::collections::BTreeSet<(String, u64)> {
        (0..loader.num_samples()).flat_map(|i| loader.describe(i)).map(|p| (p.source, p.document)).collect()
    };
    let (train, held) = (documents(&loader), documents(&validation));
    assert!(train.is_disjoint(&held) && !held.is_empty());
    assert_eq!(train.len() + held.len(), 165);
    let behind = validation.batch_at(validation.num_samples()).unwrap();
    assert!(behind.f32_values(Column::CeWeight).unwrap().iter().all(|w| *w == 0.0));
    assert_eq!(behind.num_tokens(), 6 * 32);
    // Other seeds train in another order on the same documents.
    let other = Loader::open(LoaderOptions { seed: 99, ..loader.options().clone() }).unwrap();
    assert_eq!(documents(&other.validation().unwrap()), held);
}

#[test]
fn a_single_document_is_split_into_head_and_tail() {
    let folder = Folder::new();
    folder.prepare("train.txt", "one");
    let loader = Loader::open(folder.loader_options(&[("one", None)])).unwrap();
    let validation = loader.validation().unwrap();
    assert!(loader.num_samples() > 5 * validation.num_samples() && validation.num_samples() > 0);
    let end = (0..loader.num_samples()).flat_map(|i| loader.describe(i)).map(|p| p.tokens.end).max().unwrap();
    let start = (0..validation.num_samples()).flat_map(|i| validation.describe(i)).map(|p| p.tokens.start).min();
    assert_eq!(Some(end), start);
}

#[test]
fn prefetching_gives_the_same_batches_and_passes_errors_on() {
    let folder = two_sources();
    let loader = Arc::new(Loader::open(folder.loader_options(&[("a", None)])).unwrap());
    let mut prefetcher = Prefetcher::new(loader.clone(), 12, 2).unwrap();
    for step in 2..20 {
        assert_eq!(prefetcher.next_sample(), step * 6);
        assert_eq!(columns(&prefetcher.next_batch().unwrap()), columns(&loader.batch_at(step * 6).unwrap()));
    }
    drop(prefetcher);
    assert_eq!(Arc::strong_count(&loader), 1, "the thread has ended");
}

#[test]
fn damaged_shards_are_named() {
    let folder = two_sources();
    let shard = folder.path("a/shard-00000.arrow");
    let bytes = std::fs::read(&shard).unwrap();
    let check = |content: &[u8], verify: bool, expected: &str| {
        std::fs::write(&shard, content).unwrap();
        let options = LoaderOptions { verify, ..folder.loader_options(&[("a", None)]) };
        let error = Loader::open(options).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("shard-00000.arrow") && error.contains(expected), "{error}");
    };
    check(&bytes[..bytes.len() - 1], false, "expected");
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    check(&flipped, true, "checksum");
    std::fs::remove_file(&shard).unwrap();
    let error = Loader::open(folder.loader_options(&[("a", None)])).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("shard-00000.arrow") && error.contains("tangelo data prepare"), "{error}");
}
