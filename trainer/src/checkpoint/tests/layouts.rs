//! What was saved comes back, at any layout.

use super::*;
use proptest::prelude::*;

fn any_layout() -> impl Strategy<Value = Layout> {
    (1usize..3, 1usize..4, 1usize..3, 1usize..6).prop_map(|(replicas, rows, columns, block)| Layout {
        replicas,
        rows,
        columns,
        block,
    })
}

#[test]
fn a_round_trip_keeps_every_bit_and_what_the_manifest_says() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[7], Layout::rows(2), |_| {});
    assert_eq!(names(folder.path()), ["step-00000007"]);
    let inside =
        ["manifest.json", "rank-00000.json", "rank-00000.safetensors", "rank-00001.json", "rank-00001.safetensors"];
    assert_eq!(names(&folder.path().join("step-00000007")), inside);
    let found = check_newest(folder.path(), seed, 7, 0);
    let checkpoint = found.checkpoint.unwrap();
    checkpoint.check_model(&model()).unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!((manifest.world_size, manifest.attempt.as_str()), (2, "attempt-1"));
    assert_eq!(manifest.model, model());
    assert_eq!(manifest.config_toml, options(folder.path(), 0, 2).config_toml);
}

#[test]
fn one_rank_then_three_then_two_is_bit_identical() {
    let (root, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let truth = Truth::new(seed, 5);
    let mut from = root.path().join("0");
    save(&from, seed, &[5], Layout::rows(1), |_| {});
    for (hop, ranks) in [3, 2].into_iter().enumerate() {
        let (layout, to) = (Layout { block: 4, ..Layout::rows(ranks) }, root.path().join((hop + 1).to_string()));
        let checkpoint = find_usable(&from, Some(5)).unwrap().checkpoint.unwrap();
        truth.check(&checkpoint, &layout, &StateKind::ALL);
        // What each rank read goes into the next checkpoint, as in a run resumed at another world size.
        std::thread::scope(|scope| {
            for rank in 0..ranks {
                let (truth, to, checkpoint) = (&truth, &to, &checkpoint);
                scope.spawn(move || {
                    let mut saver = Saver::start(options(to, rank, ranks)).unwrap();
                    let mut snapshot = saver.begin(checkpoint.state().clone());
                    for kind in StateKind::ALL {
                        for meta in &truth.metas {
                            let indices = &layout.boxes(meta)[rank];
                            let read = |out: &mut [f32]| checkpoint.read(kind, &meta.name, indices, out);
                            snapshot.push(kind, meta, indices, read).unwrap();
                        }
                    }
                    saver.save(snapshot).unwrap();
                    saver.finish().unwrap();
                });
            }
        });
        from = to;
    }
    check_newest(&from, seed, 5, 0);
}

proptest! {
    // A case writes and fsyncs up to a dozen files.
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_layout_reads_any_other(from in any_layout(), to in any_layout(), seed: u64) {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), seed, &[3], from, |_| {});
        let checkpoint = Checkpoint::open(&folder.path().join("step-00000003"), Verify::Sizes).unwrap();
        Truth::new(seed, 3).check(&checkpoint, &to, &StateKind::ALL);
    }
}

proptest! {
    #[test]
    fn each_distinct_box_is_written_once_by_a_holder_and_bytes_balance(layout in any_layout(), twice: bool) {
        let metas = model().parameters(DType::F32);
        let mut held: Vec<Vec<IndexBox>> = metas.iter().map(|meta| layout.boxes(meta)).collect();
        if twice {
            let whole = Layout { replicas: layout.ranks(), rows: 1, columns: 1, block: 1 };
            held.extend(metas.iter().map(|meta| whole.boxes(meta)));
        }
        let writes = plan_writes(layout.ranks(), &held);
        let mut load = vec![0; layout.ranks()];
        for (tensor, boxes) in held.iter().enumerate() {
            let mut written: Vec<&IndexBox> = Vec::new();
            for (rank, tensors) in writes.iter().enumerate().filter(|(_, tensors)| tensors.contains(&tensor)) {
                prop_assert_eq!(tensors.iter().filter(|&&t| t == tensor).count(), 1);
                load[rank] += boxes[rank].volume();
                written.push(&boxes[rank]);
            }
            let mut distinct: Vec<&IndexBox> = boxes.iter().filter(|b| !b.is_empty()).collect();
            for list in [&mut written, &mut distinct] {
                list.sort();
            }
            distinct.dedup();
            prop_assert_eq!(written, distinct);
        }
        if layout.rows * layout.columns == 1 {
            // Every rank may write every tensor: greedy by size leaves a gap of at most the largest one.
            let largest = metas.iter().map(ParamMeta::num_elements).max().unwrap();
            prop_assert!(load.iter().max().unwrap() - load.iter().min().unwrap() <= largest, "{:?}", load);
        }
    }
}

#[test]
fn rows_longer_than_a_read_window_and_single_columns() {
    // 3 rows of 6 MB: a run of its own per row when cut by columns, and one column through windows of 4 MiB.
    let (folder, columns) = (tempfile::tempdir().unwrap(), 1_500_000);
    let meta = ParamMeta { name: "wide".to_owned(), shape: vec![3, columns], dtype: DType::F32 };
    let seed = fresh_seed();
    let value = |i: usize| uniform(seed, i as u64) as f32;
    let mut saver = Saver::start(options(folder.path(), 0, 1)).unwrap();
    let mut snapshot = saver.begin(state(1));
    let fill = |out: &mut [f32]| {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
        Ok::<(), CheckpointError>(())
    };
    snapshot.push(StateKind::Param, &meta, &IndexBox::full(&meta.shape), fill).unwrap();
    saver.save(snapshot).unwrap();
    saver.finish().unwrap();
    let checkpoint = find_usable(folder.path(), None).unwrap().checkpoint.unwrap();
    for cut in [0..columns - 1, 17..18, 700_000..1_400_000] {
        let indices = IndexBox::new([1..3, cut.clone()]);
        let mut out = vec![0f32; indices.volume()];
        checkpoint.read(StateKind::Param, "wide", &indices, &mut out).unwrap();
        for (row, values) in out.chunks(cut.len()).enumerate() {
            let first = (row + 1) * columns + cut.start;
            assert!(values.iter().enumerate().all(|(i, &x)| x == value(first + i)), "row {row} of {cut:?}");
        }
    }
}

#[test]
fn weights_alone_can_be_read_and_nothing_else() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let (truth, layout) = (Truth::new(seed, 9), Layout::rows(1));
    let mut saver = Saver::start(options(folder.path(), 0, 1)).unwrap();
    let mut snapshot = saver.begin(state(9));
    truth.fill(&mut snapshot, 0, &layout, &[StateKind::Param]);
    saver.save(snapshot).unwrap();
    saver.finish().unwrap();
    let checkpoint = find_usable(folder.path(), None).unwrap().checkpoint.unwrap();
    truth.check(&checkpoint, &layout, &[StateKind::Param]);
    assert!(checkpoint.has(StateKind::Param) && !checkpoint.has(StateKind::ExpAvg));
    let meta = &truth.metas[0];
    let mut out = vec![0f32; meta.num_elements()];
    let read = checkpoint.read(StateKind::ExpAvg, &meta.name, &IndexBox::full(&meta.shape), &mut out);
    let message = read.unwrap_err().to_string();
    assert!(message.contains("weights only") && message.contains("initial_load_model_only"), "{message}");
    let missing = checkpoint.read(StateKind::Param, "no.such", &IndexBox::full(&[0]), &mut []);
    assert!(matches!(missing, Err(CheckpointError::NoSuchTensor { .. })));
}

#[test]
fn another_model_is_named_by_its_first_difference() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    save(folder.path(), seed, &[1], Layout::rows(1), |_| {});
    let checkpoint = find_usable(folder.path(), None).unwrap().checkpoint.unwrap();
    let larger = ModelSpec { vocab_size: 38, ..model() };
    let message = checkpoint.check_model(&larger).unwrap_err().to_string();
    assert!(
        message.contains("embed_tokens") && message.contains("[37, 12]") && message.contains("[38, 12]"),
        "{message}"
    );
    let untied = ModelSpec { tie_word_embeddings: false, ..model() };
    assert!(checkpoint.check_model(&untied).unwrap_err().to_string().contains("no parameter lm_head.weight"));
    let shallow = ModelSpec { blocks: model().blocks[..1].to_vec(), ..model() };
    assert!(
        checkpoint.check_model(&shallow).unwrap_err().to_string().contains("the model has no parameter model.layers.1")
    );
}
