//! Keys of every job that an `rlhf` job does not read: setting one would silently change nothing.
//!
//! A resolved configuration does not tell what was set from what is a default, so a value other than the default counts as
//! set.

use super::Roles;
use crate::check::Found;
use crate::job::{JobConfig, Metrics};

pub(super) fn check(config: &JobConfig, roles: &Roles, found: &mut Found) {
    let mut unread = |set: bool, key: &str, instead: &str| {
        found.require(!set, || format!("`{key}` is not read by `rlhf` jobs: {instead}"));
    };
    unread(
        config.validation.enable,
        "validation.enable",
        "set `prompts.validation_size` or `prompts.validation_files`, and `rlhf.test_freq`",
    );
    unread(
        config.metrics.log_freq != Metrics::default().log_freq,
        "metrics.log_freq",
        "every step of theirs is recorded; remove it",
    );
    for (key, role) in [("roles.reference.lr", &roles.reference), ("roles.reward.lr", &roles.reward)] {
        unread(role.lr.is_some(), key, "this role never learns; remove it");
    }
}
