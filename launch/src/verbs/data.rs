//! `tangelo data`

use crate::cli::data::DataCommand;
use crate::error::LaunchError;

/// `tangelo data`
pub fn data(command: &DataCommand) -> Result<(), LaunchError> {
    let _ = command;
    Ok(())
}
