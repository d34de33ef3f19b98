//! `cargo xtask bench parallel`: what several ranks cost, in three tables.
//!
//! Bytes: what a step really sends, read from the loopback interface, beside what the program says and the least there
//! is. Exposed: the share of a step in which a rank waits for others. Speed: tokens/s beside PyTorch's DDP and FSDP2 over
//! Gloo, whose side is in tests/python/bench_parallel.py. Nothing is asserted: a number is not right or wrong.

mod layouts;
mod loopback;
mod ranks;
mod speed;

use super::inputs::Inputs;
use super::table::{WARM_UP_STEPS, table};
use super::{Turns, build};
use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// Measure these only.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    #[command(flatten)]
    turns: Turns,
    /// The model's shape; the layouts' tables give it 8 heads and 4 key heads, so that every layout divides them.
    #[arg(long, default_value = "tiny-10m")]
    flavor: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Bytes sent per step, against the least that each mode needs.
    Bytes,
    /// Share of a step spent waiting for other ranks.
    Exposed,
    /// Tokens/s of 1, 2 and 4 ranks on two cores, against PyTorch DDP and FSDP2.
    Speed,
}

impl Part {
    const ALL: [Part; 3] = [Part::Bytes, Part::Exposed, Part::Speed];
}

/// Sets up, builds, measures, prints.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    if options.turns.steps <= WARM_UP_STEPS {
        bail!("--steps {}: the first {WARM_UP_STEPS} are not counted; ask for more", options.turns.steps);
    }
    let parts = if options.only.is_empty() { Part::ALL.to_vec() } else { options.only.clone() };
    setup::libtorch(repo)?;
    if parts.contains(&Part::Speed) {
        setup::peers(repo)?;
    }
    build(repo)?;
    let inputs = Inputs::new(repo)?;
    for part in parts {
        let text = shell::step(&format!("{part:?}"), || match part {
            Part::Bytes => layouts::bytes(&inputs, options),
            Part::Exposed => layouts::exposed(&inputs, options).map(|rows| table(&rows)),
            Part::Speed => speed::measure(&inputs, options).map(|rows| table(&rows)),
        })?;
        println!("\n{text}");
    }
    Ok(())
}
