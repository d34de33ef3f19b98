//! One layout of each mode: bytes sent per step, and time spent waiting.
//!
//! Bytes are the difference between a run of few and one of more steps, so that what is sent at the start cancels. What
//! the program says and the least there can be are read from the table of `tangelo check`, which rounds to three digits
//! or four.

use super::super::inputs::Inputs;
use super::super::table::{Row, column, counted, records};
use super::Options;
use super::loopback::Loopback;
use crate::shell;
use anyhow::{Context, Result, bail};
use std::fmt::Write;

/// A mode by its name, its ranks, and what is set for it.
struct Layout {
    name: &'static str,
    ranks: usize,
    settings: &'static [&'static str],
}

const fn layout(name: &'static str, ranks: usize, settings: &'static [&'static str]) -> Layout {
    Layout { name, ranks, settings }
}

const LAYOUTS: [Layout; 14] = [
    layout("data parallel", 2, &["parallelism.data_parallel_replicate_degree=2"]),
    layout("data parallel", 4, &["parallelism.data_parallel_replicate_degree=4"]),
    layout("ZeRO: states", 2, &["parallelism.zero_optimizer_degree=2"]),
    layout("ZeRO: gradients, states", 2, &["parallelism.zero_gradient_degree=2"]),
    layout("ZeRO: all (FSDP)", 4, &["parallelism.zero_parameter_degree=4"]),
    layout(
        "ZeRO: all, 2 replicas (HSDP)",
        4,
        &["parallelism.data_parallel_replicate_degree=2", "parallelism.zero_parameter_degree=2"],
    ),
    layout("tensor 2", 2, &["parallelism.tensor_parallel_degree=2"]),
    layout("context: heads 2", 2, &[CP2, "parallelism.context_parallel_head_degree=2"]),
    layout("context: ring 2", 2, &[CP2, RING]),
    layout("context: gathered keys 2", 2, &[CP2]),
    layout(
        "context: heads 2 x ring 2",
        4,
        &["parallelism.context_parallel_degree=4", "parallelism.context_parallel_head_degree=2", RING],
    ),
    layout("pipeline 2", 2, &["parallelism.pipeline_parallel_degree=2", MICRO_BATCHES]),
    layout("tensor 2 x ring 2", 4, &["parallelism.tensor_parallel_degree=2", CP2, RING]),
    layout(
        "pipeline 2 x tensor 2",
        4,
        &["parallelism.pipeline_parallel_degree=2", "parallelism.tensor_parallel_degree=2", MICRO_BATCHES],
    ),
];
const CP2: &str = "parallelism.context_parallel_degree=2";
const RING: &str = "parallelism.context_parallel_rotate_method='ring'";
/// Four of them, without which a pipeline mostly waits.
const MICRO_BATCHES: &str = "training.global_batch_size=8";

/// Weights and activations in two bytes, gradients in four: a count that took one for the other would show.
const DTYPE: &str = "bfloat16";
/// A ratio further from 1 than this is pointed at.
const BOUND: f64 = 0.02;
/// Steps of the shorter run.
const FEW_STEPS: usize = 2;
const MIB: f64 = (1 << 20) as f64;

impl Layout {
    /// The arguments of `tangelo run` or `check` that give this job.
    fn job(&self, inputs: &Inputs, options: &Options, steps: usize, log_freq: usize) -> Result<Vec<String>> {
        let mut settings = vec![
            "model.num_attention_heads=8".to_owned(),
            "model.num_key_value_heads=4".to_owned(),
            "training.num_threads=1".to_owned(),
            format!("metrics.log_freq={log_freq}"),
        ];
        settings.extend(self.settings.iter().map(|&setting| setting.to_owned()));
        inputs.job(&options.flavor, DTYPE, steps, &settings)
    }

    fn run(&self, inputs: &Inputs, options: &Options, steps: usize, log_freq: usize) -> Result<Vec<String>> {
        let mut words = vec![inputs.binary().display().to_string(), "run".to_owned(), "--quiet".to_owned()];
        words.extend(["--nproc-per-node".to_owned(), self.ranks.to_string()]);
        words.extend(self.job(inputs, options, steps, log_freq)?);
        Ok(words)
    }

    /// Bytes that all ranks send in a step.
    fn measured(&self, inputs: &Inputs, options: &Options, loopback: &Loopback) -> Result<f64> {
        let more_steps = options.turns.steps.max(FEW_STEPS + 1);
        // Records of the first and the last step only, which both runs have.
        let sent = |steps| loopback.count(inputs, &self.run(inputs, options, steps, 1_000_000)?);
        let (few, more) = (sent(FEW_STEPS)?, sent(more_steps)?);
        Ok((more as f64 - few as f64) / (more_steps - FEW_STEPS) as f64)
    }

    /// The same as the program has it.
    fn expected(&self, inputs: &Inputs, options: &Options) -> Result<Traffic> {
        let ranks = self.ranks.to_string();
        let mut command = inputs.tangelo(&["check", "--world-size", &ranks, "--nproc-per-node", &ranks]);
        command.args(self.job(inputs, options, options.turns.steps, 1)?);
        let line = shell::command_line(&command);
        let text = shell::output(&mut command).with_context(|| format!("`{line}` failed; run it to see why"))?;
        let one = traffic(&text).with_context(|| format!("`{line}`"))?;
        let all = |bytes: f64| bytes * self.ranks as f64;
        Ok(Traffic { predicted: all(one.predicted), least: all(one.least), coordination: all(one.coordination) })
    }
}

/// Bytes per step: what the program sends, the least there can be, and what of the first has no least.
#[derive(Debug, Default, PartialEq)]
struct Traffic {
    predicted: f64,
    least: f64,
    coordination: f64,
}

/// The table of bytes.
pub fn bytes(inputs: &Inputs, options: &Options) -> Result<String> {
    let loopback = Loopback::probe();
    let mut text = format!(
        "MiB sent per step by all ranks, {} in bf16, {}\n{:<30} {:>5} {:>10} {:>10} {:>10} {:>13} {:>9} {:>10}\n",
        options.flavor,
        if loopback.private {
            "on a loopback interface of its own"
        } else {
            "on the loopback interface that all share"
        },
        "layout",
        "ranks",
        "measured",
        "predicted",
        "least",
        "coordination",
        "/ least",
        "/ predicted",
    );
    for layout in &LAYOUTS {
        let context = || format!("{}, {} ranks", layout.name, layout.ranks);
        let expected = layout.expected(inputs, options).with_context(context)?;
        let measured = layout.measured(inputs, options, &loopback).with_context(context)?;
        println!("    {}", context());
        text += &line(layout, measured, &expected);
    }
    Ok(text)
}

fn line(layout: &Layout, measured: f64, expected: &Traffic) -> String {
    let [measured_mib, predicted, least, coordination] =
        [measured, expected.predicted, expected.least, expected.coordination].map(|bytes| bytes / MIB);
    let (to_least, to_predicted) = (measured / expected.least, measured / expected.predicted);
    let mut text = format!(
        "{:<30} {:>5} {measured_mib:>10.2} {predicted:>10.2} {least:>10.2} {coordination:>13.2} {to_least:>9.4} \
         {to_predicted:>10.4}",
        layout.name, layout.ranks
    );
    if (to_least - 1.0).abs() > BOUND {
        let _ = write!(text, "  outside {:.0} %", 100.0 * BOUND);
    }
    text + "\n"
}

/// Shares of a step that rank 0 waits, a row a layout and a value a round. Where ranks outnumber cores, this holds
/// waiting for a core too.
pub fn exposed(inputs: &Inputs, options: &Options) -> Result<Vec<Row>> {
    let name = |layout: &Layout| format!("{}, {} ranks", layout.name, layout.ranks);
    let row = |layout| Row { name: name(layout), unit: "% of a step waiting", values: Vec::new() };
    let mut rows: Vec<Row> = LAYOUTS.iter().map(row).collect();
    for round in 0..options.turns.rounds {
        for (layout, row) in LAYOUTS.iter().zip(&mut rows) {
            let words = layout.run(inputs, options, options.turns.steps, 1)?;
            let mut command = inputs.repo.command(&words[0]);
            shell::run(command.args(&words[1..]))?;
            let records = records(&inputs.run())?;
            let sum = |key| counted(&column(&records, key)).iter().sum::<f64>();
            row.values.push(100.0 * sum("communication_seconds") / sum("step_seconds"));
        }
        println!("    round {} of {}", round + 1, options.turns.rounds);
    }
    Ok(rows)
}

/// What `tangelo check` says that a rank sends on average in a step.
fn traffic(report: &str) -> Result<Traffic> {
    let table = report.lines().skip_while(|line| !line.starts_with("sent per step and rank")).skip(1);
    let mut found = Traffic::default();
    for line in table.take_while(|line| !line.is_empty()) {
        // Columns stand two spaces or more apart.
        let cells: Vec<&str> = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        match cells[..] {
            [_, sent, least, _] => {
                found.predicted += parse_bytes(sent)?;
                found.least += parse_bytes(least)?;
            }
            [_, sent] => {
                found.predicted += parse_bytes(sent)?;
                found.coordination += parse_bytes(sent)?;
            }
            _ => bail!("unknown line {line:?} in the table of bytes"),
        }
    }
    if found.least == 0.0 { bail!("found no table of bytes") } else { Ok(found) }
}

/// `1.50 GiB`, `17 B`.
fn parse_bytes(text: &str) -> Result<f64> {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let parsed = text.split_once(' ').and_then(|(number, unit)| {
        let power = UNITS.iter().position(|&known| known == unit)?;
        Some(number.parse::<f64>().ok()? * 1024f64.powi(power.try_into().ok()?))
    });
    parsed.with_context(|| format!("{text:?} is not a number of bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
group                   ranks  groups  calls per step and rank  bytes sent per step and rank
world                       4       1                        1                          48 B

sent per step and rank, on average      bytes      least
weights                             131.5 MiB  131.0 MiB  +0.4 %
keys and values, ring                1.50 GiB   1.50 GiB  +0.0 %
coordination                         512 B

4 ranks, 1.53 k calls: every group agrees
";

    #[test]
    fn the_table_of_bytes_is_read() {
        let expected = Traffic {
            predicted: 131.5 * MIB + 1536.0 * MIB + 512.0,
            least: 131.0 * MIB + 1536.0 * MIB,
            coordination: 512.0,
        };
        assert_eq!(traffic(REPORT).unwrap(), expected);
    }

    #[test]
    fn a_report_without_it_is_refused() {
        assert!(traffic("one rank: nothing is communicated\n").is_err());
        assert!(traffic(&REPORT.replace("131.0 MiB", "many")).unwrap_err().to_string().contains("many"));
    }

    #[test]
    fn what_leaves_the_bound_is_pointed_at() {
        let expected = Traffic { predicted: 103.0 * MIB, least: 100.0 * MIB, coordination: 0.0 };
        assert!(line(&LAYOUTS[0], 103.0 * MIB, &expected).ends_with("1.0300     1.0000  outside 2 %\n"));
        assert!(!line(&LAYOUTS[0], 101.0 * MIB, &expected).contains("outside"));
    }
}
