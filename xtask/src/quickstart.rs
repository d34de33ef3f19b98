//! Placeholder while the pieces land.
use crate::shell::Repo;
use anyhow::Result;
use clap::Args;

/// Options.
#[derive(Args)]
pub struct Options {}

pub fn run(_repo: &Repo, _options: &Options) -> Result<()> {
    Ok(())
}
