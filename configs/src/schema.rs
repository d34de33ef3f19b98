//! The JSON schema of a job's TOML file: every section and key with its meaning, type and default.

use crate::JobConfig;
use serde_json::Value;

/// The schema, for `tangelo schema`, editors, and the search for the nearest known key.
pub fn schema() -> Value {
    schemars::schema_for!(JobConfig).to_value()
}
