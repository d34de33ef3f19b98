//! The report of `tangelo check`, and the sizes behind it.

use crate::{Tokenizer, machine};
use expect_test::{Expect, expect};
use tangelo_configs::Plan;
use tangelo_configs::preset::PRESETS;
use tangelo_configs::resolve::{load_str, resolve};
use tangelo_core::Program;
use tangelo_planner::{memory, predict, program, render_check};

fn plan(world_size: usize, cuda: bool, flavor: &str, sets: &[&str]) -> Plan {
    let text = format!(
        "[model]\nflavor = '{flavor}'\n[data]\ntokenizer = 't.json'\nsources = [{{ paths = ['corpus/*.txt'] }}]\n\
         [training]\nlocal_batch_size = 2\nseq_len = 256\nsteps = 1000\n"
    );
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    resolve(load_str(&text, "job.toml", &sets).unwrap(), &machine(world_size, world_size, cuda), &Tokenizer(1000))
        .unwrap()
}

fn check(plan: &Plan, expected: Expect) {
    let report = render_check(plan);
    let (_, tables) = report.split_once("# ---- layers").unwrap();
    expected.assert_eq(tables.trim_start_matches(['-', ' ', '\n']));
}

#[test]
fn the_report_of_a_small_job_on_two_ranks() {
    check(
        &plan(2, false, "debugmodel", &[]),
        expect![[r#"
            layer                parameters    weights  FLOPs/token  kept/token
            embedding               196.6 k  768.0 KiB            0         0 B
            blocks 0 to 3 (4 x)     393.6 k   1.50 MiB      884.7 k    11.0 KiB
            norm and tied head          192      768 B      393.2 k    1.50 KiB
            all                      1.77 M   6.76 MiB       3.93 M    45.6 KiB

            forward FLOPs, attention counted causally; a training step is three times that: 11.8 M per token at 256 tokens per sequence
            (with attention counted in full 13.0 M), 12.1 G per step over all ranks

            # ---- memory ------------------------------------------------------------------

            memory per rank
            parameters           6.76 MiB  1.77 M x 4 B
            gradients            6.76 MiB  1.77 M x 4 B
            optimizer states     6.76 MiB  1.77 M x 8 B / 2 ranks
            activations          22.1 MiB  512 tokens, 0 of 4 blocks recomputed
            inputs               78.0 KiB  512 tokens
            head and loss        3.50 MiB  512 tokens x 1024 logits at once
            backward of a block  3.38 MiB  not at the same time as the loss
            collectives          13.5 MiB  not at the same time as activations
            checkpoint copy      10.1 MiB  while a checkpoint is written
            peak                 56.0 MiB  20.3 MiB stay, 25.6 MiB come and go

            # ---- one step ----------------------------------------------------------------

            stage       tensor                              shape            type      bytes
            load        tokens, targets, positions, seq_id  [4, 2, 256]      u32    8.00 KiB  this rank's 2 of 4 sequences
            load        ce_weight                           [2, 256]         f32    2.00 KiB  0 where nothing is to be predicted
            load        sample_index                        [2]              i64        16 B  pure function of (data, seed, step)
            all-reduce  trained tokens                      [2]              f64        16 B  sum over 2 ranks: the loss's normaliser
            to tensors  tokens, positions, targets          [3, 512]         i64    12.0 KiB  1 x: one micro-batch of 2, end to end
            to tensors  weights                             [512]            f32    2.00 KiB  document borders beside it
            embed       x                                   [512, 192]       f32   384.0 KiB  rows of the embedding
            block       q                                   [512, 6, 32]     f32   384.0 KiB  4 x: each block
            block       k, v                                [2, 512, 2, 32]  f32   256.0 KiB
            block       attention                           [512, 6, 32]     f32   384.0 KiB  each token within its document
            block       gate, up                            [2, 512, 512]    f32    2.00 MiB
            block       x                                   [512, 192]       f32   384.0 KiB  0 blocks run again in backward
            loss        logits                              [512, 1024]      f32    2.00 MiB  1 x: chunk by chunk
            backward    gradient of x                       [512, 192]       f32   384.0 KiB  block by block, last to first
            backward    main gradients                      [1771200]        f32    6.76 MiB  added up over micro-batches
            reduce      main gradients                      [1771200]        f32    6.76 MiB  reduce-scatter over 2 ranks, 1 bucket(s)
            update      weights and states                  [3, 885600]      f32    10.1 MiB  clipped to a global norm of 1, AdamW
            all-gather  weights                             [1771200]        f32    6.76 MiB  over 2 ranks
        "#]],
    );
}

#[test]
fn the_report_of_a_large_job_on_gpus() {
    let sets = [
        "training.seq_len=8192",
        "training.local_batch_size=1",
        "training.global_batch_size=128",
        "activation_checkpoint.mode=selective",
    ];
    check(
        &plan(16, true, "llama-3.1-8b", &sets),
        expect![[r#"
            layer                     parameters     weights  FLOPs/token  kept/token
            embedding                    525.3 M  1002.0 MiB            0         0 B
            blocks 0, 2 .. 30 (16 x)     218.1 M   416.0 MiB      503.3 M   136.1 KiB
            blocks 1, 3 .. 31 (16 x)     218.1 M   416.0 MiB      503.3 M    8.00 KiB  recomputed
            norm and head                525.3 M  1002.0 MiB       1.05 G    16.0 KiB
            all                           8.03 G    15.0 GiB       17.2 G    2.27 MiB

            forward FLOPs, attention counted causally; a training step is three times that: 51.5 G per token at 8192 tokens per sequence
            (with attention counted in full 57.9 G), 54.0 P per step over all ranks

            # ---- memory ------------------------------------------------------------------

            memory per rank
            parameters           15.0 GiB  8.03 G x 2 B
            gradients            29.9 GiB  8.03 G x 4 B
            master weights       1.87 GiB  8.03 G x 4 B / 16 ranks
            optimizer states     3.74 GiB  8.03 G x 8 B / 16 ranks
            activations          18.0 GiB  8192 tokens, 16 of 32 blocks recomputed
            inputs               4.22 MiB  8192 tokens
            head and loss        1.96 GiB  512 tokens x 128256 logits at once
            backward of a block  2.00 GiB  not at the same time as the loss
            leaving buckets      2.08 GiB  with the last micro-batch's backward
            collectives          3.91 GiB  not at the same time as activations
            checkpoint copy      5.61 GiB  in host memory, not in the peak
            peak                 72.6 GiB  50.5 GiB stay, 22.1 GiB come and go

            # ---- one step ----------------------------------------------------------------

            stage           tensor                              shape              type      bytes
            load            tokens, targets, positions, seq_id  [4, 8, 8192]       u32    1.00 MiB  this rank's 8 of 128 sequences
            load            ce_weight                           [8, 8192]          f32   256.0 KiB  0 where nothing is to be predicted
            load            sample_index                        [8]                i64        64 B  pure function of (data, seed, step)
            all-reduce      trained tokens                      [2]                f64        16 B  sum over 16 ranks: the loss's normaliser
            host to device  tokens, positions, targets          [3, 8192]          i64   192.0 KiB  8 x: one micro-batch of 1, end to end
            host to device  weights                             [8192]             f32    32.0 KiB  document borders beside it
            embed           x                                   [8192, 4096]       bf16   64.0 MiB  rows of the embedding
            block           q                                   [8192, 32, 128]    bf16   64.0 MiB  32 x: each block
            block           k, v                                [2, 8192, 8, 128]  bf16   32.0 MiB
            block           attention                           [8192, 32, 128]    bf16   64.0 MiB  each token within its document
            block           gate, up                            [2, 8192, 14336]   bf16  448.0 MiB
            block           x                                   [8192, 4096]       bf16   64.0 MiB  16 blocks run again in backward
            loss            logits                              [512, 128256]      bf16  125.2 MiB  16 x: chunk by chunk
            backward        gradient of x                       [8192, 4096]       bf16   64.0 MiB  block by block, last to first
            backward        main gradients                      [8030261248]       f32    29.9 GiB  added up over micro-batches
            reduce          main gradients                      [8030261248]       f32    29.9 GiB  reduce-scatter over 16 ranks, 34 bucket(s)
            update          weights and states                  [3, 501891328]     f32    5.61 GiB  clipped to a global norm of 1, AdamW
            all-gather      weights                             [8030261248]       bf16   15.0 GiB  over 16 ranks
        "#]],
    );
}

#[test]
fn the_report_starts_with_the_resolved_job() {
    let plan = plan(1, false, "debugmodel", &[]);
    let report = render_check(&plan);
    assert!(report.starts_with("# ---- resolved job "), "{report}");
    assert!(report.contains(&plan.to_toml().unwrap()));
}

#[test]
fn zero_1_shares_states_and_recomputation_keeps_inputs() {
    let one = predict(&plan(1, false, "smollm2-135m", &[]));
    let four = predict(&plan(4, false, "smollm2-135m", &[]));
    assert_eq!(one.optimizer_states, 8 * 134_515_008);
    assert_eq!(four.optimizer_states, one.optimizer_states / 4);
    assert_eq!((four.parameters, four.gradients), (one.parameters, one.gradients));
    assert_eq!((one.master_weights, one.collectives), (0, 0));

    let bf16 = predict(&plan(4, true, "smollm2-135m", &[]));
    assert_eq!((bf16.parameters, bf16.master_weights), (2 * 134_515_008, 134_515_008));

    let full = predict(&plan(1, false, "smollm2-135m", &["activation_checkpoint.mode=full"]));
    let selective = predict(&plan(1, false, "smollm2-135m", &["activation_checkpoint.mode=selective"]));
    assert_eq!(full.activations, 512 * 30 * 4 * 576);
    assert_eq!(selective.activations * 2, full.activations + one.activations);
    assert!(full.backward > one.backward && full.total_bytes() < one.total_bytes());
}

/// The peak of a preset on GPUs, bytes per rank.
fn preset_peak(name: &str, world_size: usize) -> f64 {
    let preset = PRESETS.iter().find(|p| p.name == name).unwrap();
    let config = load_str(preset.toml, name, &[]).unwrap();
    predict(&resolve(config, &machine(world_size, world_size, true), &Tokenizer(1000)).unwrap()).total_bytes() as f64
}

#[test]
fn presets_fit_where_they_say_they_fit() {
    // Of a GPU's 80 GB a tenth is left to libtorch, the driver and fragments.
    let usable = 0.9 * 80e9;
    for name in ["smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b"] {
        assert!(preset_peak(name, 1) < usable, "{name}: {:e}", preset_peak(name, 1));
    }
    for name in ["llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"] {
        assert!(preset_peak(name, 8) < usable, "{name}: {:e}", preset_peak(name, 8));
    }
    assert!(preset_peak("llama-3.1-70b", 64) > 423e9);
}

#[test]
fn a_block_keeps_what_its_operators_save() {
    // SmolLM2: D 576, 9 and 3 heads of 64, F 1536, fp32.
    let plan = plan(1, false, "smollm2-135m", &[]);
    let elements = 4 * 576 + (9 + 3 + 3) * 64 + 9 * 64 + 3 * 1536;
    assert_eq!(memory::saved_bytes_per_token(&plan, 0), 4 * elements + 4 * (2 + 9));
}

/// Checks against other implementations run [`Program::alone`]: it must be what one rank trains with.
#[test]
fn a_model_alone_runs_the_program_of_one_rank() {
    for (mode, again) in [("none", false), ("full", true)] {
        let sets = ["training.global_batch_size=2", &format!("activation_checkpoint.mode={mode}")];
        let plan = plan(1, false, "debugmodel", &sets);
        let alone = Program::alone(&vec![again; plan.model.blocks.len()]);
        assert_eq!(program::build(&plan, 0).pass, alone, "{mode}");
    }
}

#[test]
fn buckets_hold_every_parameter_once() {
    for flavor in ["debugmodel", "smollm2-135m", "llama-3.2-1b"] {
        let plan = plan(2, false, flavor, &[]);
        let buckets = memory::buckets(&plan);
        assert_eq!(buckets.iter().sum::<usize>(), plan.model.num_parameters());
        assert!(buckets[..buckets.len() - 1].iter().all(|&n| n >= program::bucket_elements(&plan)), "{buckets:?}");
    }
}
