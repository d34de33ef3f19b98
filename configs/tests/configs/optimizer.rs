//! The optimizer and its learning rate.

use crate::resolve::{fails, plan};
use expect_test::expect;

#[test]
fn schedules_fit_their_length() {
    fails(
        &["training.steps=100"],
        1,
        expect![
            "--set training.steps=100: `lr_scheduler.warmup_steps` = 200 > `training.steps` = 100: the warm-up would never end; lower it to 10 or so"
        ],
    );
    fails(
        &["lr_scheduler.decay_ratio=0.9"],
        1,
        expect![
            "--set lr_scheduler.decay_ratio=0.9: `lr_scheduler.warmup_steps` 200 + decay 900 (= training.steps 1000 x `lr_scheduler.decay_ratio` 0.9) = 1100 > 1000 steps; lower one of them"
        ],
    );
    fails(
        &["lr_scheduler.total_steps=600"],
        1,
        expect![
            "--set lr_scheduler.total_steps=600: `training.steps` = 1000 > `lr_scheduler.total_steps` = 600: the last 400 steps would have a learning rate of 0; raise `lr_scheduler.total_steps` or set `lr_scheduler.min_lr_factor`"
        ],
    );
    assert_eq!(
        plan(&["lr_scheduler.total_steps=600", "lr_scheduler.min_lr_factor=0.1"], 1).schedule().total_steps,
        600
    );
    assert_eq!(plan(&["lr_scheduler.decay_ratio=0"], 1).schedule().decay_steps, 0);
    assert_eq!(plan(&["lr_scheduler.decay_ratio=0.2"], 1).schedule().decay_steps, 200);
}

#[test]
fn muons_keys_have_bounds_and_need_muon() {
    let keys = ["muon_momentum=0.9", "muon_nesterov=false", "muon_ns_steps=7", "muon_adjust_lr='original'"];
    let sets = keys.map(|key| format!("optimizer.{key}"));
    let sets: Vec<&str> = std::iter::once("optimizer.name='Muon'").chain(sets.iter().map(String::as_str)).collect();
    assert_eq!(plan(&sets, 1).config.optimizer.muon_ns_steps, 7);
    fails(
        &sets[1..],
        1,
        expect![[r#"
        --set optimizer.muon_momentum=0.9: `optimizer.muon_momentum` is set, but `optimizer.name` = "AdamW" does not read it; set `optimizer.name` = "Muon" or remove the key
        --set optimizer.muon_nesterov=false: `optimizer.muon_nesterov` is set, but `optimizer.name` = "AdamW" does not read it; set `optimizer.name` = "Muon" or remove the key
        --set optimizer.muon_ns_steps=7: `optimizer.muon_ns_steps` is set, but `optimizer.name` = "AdamW" does not read it; set `optimizer.name` = "Muon" or remove the key
        --set optimizer.muon_adjust_lr='original': `optimizer.muon_adjust_lr` is set, but `optimizer.name` = "AdamW" does not read it; set `optimizer.name` = "Muon" or remove the key"#]],
    );
    fails(
        &["optimizer.name='Muon'", "optimizer.muon_momentum=1", "optimizer.muon_ns_steps=0"],
        1,
        expect![[r#"
        --set optimizer.muon_momentum=1: `optimizer.muon_momentum` = 1; it must be in [0, 1)
        --set optimizer.muon_ns_steps=0: `optimizer.muon_ns_steps` = 0; it must be from 1 to 99"#]],
    );
}
