//! Every layout against one rank in float64: losses and the gradient of every parameter, two steps each.

mod aborts;
mod calls;
mod components;
mod generating;
mod grpo;
mod harness;
mod moving;
mod muon;
mod publishing;
mod table;

use crate::support;
use harness::{Case, Found, Truth};
use std::collections::HashMap;
use std::panic::catch_unwind;
use tangelo_kernels::device;

/// Of the loss, relative: a mean of some 600 tokens' losses, each rounded to fp32 a few times (6e-8).
const MAX_LOSS_ERROR: f64 = 1e-6;
/// Of a gradient, ||g - g64|| / ||g64||: fp32 rounding (6e-8) through some hundred sums of 64 to 320 terms. It holds
/// under Muon too, which makes errors beside a gradient's smallest singular values up to 3.4445^5 = 485 times as large: an
/// error of 1e-6 is at most 485e-6 in an update of norm sqrt(64), which changes weights by a tenth, so that they are off by
/// 6e-6 before the second step.
const MAX_GRADIENT_ERROR: f64 = 1e-5;

#[test]
fn every_layout_equals_one_rank_in_float64() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let mut truths: HashMap<(&str, bool), Truth> = HashMap::new();
    let mut failures = Vec::new();
    for line in table::LAYOUTS.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let case = Case::parse(line, seed);
        let truth = truths.entry((case.model, case.muon)).or_insert_with(|| Truth::new(&case));
        // A rank that panics fails its layout, not the rest of the table.
        let found = catch_unwind(|| case.run()).map_err(|_| "a rank panicked: see above".to_owned());
        match found.and_then(|found| compare(&found, truth)) {
            Ok([loss, gradient]) => println!("{line:60} loss {loss:.1e} gradient {gradient:.1e}"),
            Err(message) => {
                println!("{line:60} {message}");
                failures.push(format!("{line}: {message}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} layouts differ:\n{}", failures.len(), failures.join("\n"));
}

/// Whether an error is small enough; not where it is not a number.
fn is_within(error: f64, most: f64) -> bool {
    error <= most
}

/// The worst errors of loss and gradients over both steps.
fn compare(found: &Found, truth: &Truth) -> Result<[f64; 2], String> {
    let mut worst = [0f64; 2];
    if let Some(loss) =
        found.held_out.iter().find(|&loss| !is_within((loss / truth.held_out - 1.0).abs(), MAX_LOSS_ERROR))
    {
        return Err(format!("evaluation: loss {loss} instead of {}", truth.held_out));
    }
    for (step, (got, want)) in found.steps.iter().zip(&truth.steps).enumerate() {
        let loss = (got.loss / want.loss - 1.0).abs();
        if !is_within(loss, MAX_LOSS_ERROR) {
            return Err(format!("step {step}: loss {} instead of {} ({loss:.1e})", got.loss, want.loss));
        }
        worst[0] = worst[0].max(loss);
        if !got.gradients.keys().eq(want.gradients.keys()) {
            let names: Vec<_> = got.gradients.keys().collect();
            return Err(format!("step {step}: gradients of {names:?}"));
        }
        let mut wrong = Vec::new();
        for (name, gradient) in &got.gradients {
            let error = harness::relative_error(gradient, &want.gradients[name]);
            if !is_within(error, MAX_GRADIENT_ERROR) {
                wrong.push(format!("{name} {error:.1e}"));
            }
            worst[1] = worst[1].max(error);
        }
        if !wrong.is_empty() {
            return Err(format!("step {step}: loss {loss:.1e}, gradients off: {}", wrong.join(", ")));
        }
        let norm = (got.norm / want.norm - 1.0).abs();
        if !is_within(norm, MAX_GRADIENT_ERROR) {
            return Err(format!("step {step}: norm {} instead of {}", got.norm, want.norm));
        }
    }
    Ok(worst)
}
