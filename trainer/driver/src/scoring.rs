//! From rewards and log-probabilities to advantages: statistics where the data is, merged here, applied where it is.

use crate::error::{DriverError, Result};
use crate::team::Team;
use std::collections::BTreeMap;
use tangelo_algo::{Algorithm, Call, Merged, State, Statistics};
use tangelo_control::{RemoteBatch, Scored};
use tangelo_core::Column;

/// The batch with the algorithm's columns, named values of it, and the algorithm's next state.
///
/// # Errors
/// Whatever a rank reports: a reward that is no number, with its sample.
pub async fn score(
    team: &Team,
    algorithm: &dyn Algorithm,
    batch: &RemoteBatch,
    state: &State,
) -> Result<(RemoteBatch, BTreeMap<String, f64>, State)> {
    let mut merged = Merged::default();
    for _ in 0..algorithm.rounds() {
        let scored = call(team, algorithm, batch, Call::Statistics { state: state.clone(), merged: merged.clone() });
        let round = merge(&scored.await?)?;
        merged.push([&round]);
    }
    let applied = call(team, algorithm, batch, Call::Apply { state: state.clone(), merged: merged.clone() }).await?;
    let report = merge(&applied)?;
    let batch = applied.batch.ok_or_else(|| DriverError::Internal("scoring made no columns".into()))?;
    let metrics = algorithm.metrics(state, &merged, &report)?;
    Ok((batch, metrics, algorithm.next_state(state, &merged)?))
}

async fn call(team: &Team, algorithm: &dyn Algorithm, batch: &RemoteBatch, call: Call) -> Result<Scored> {
    let spec = serde_json::to_value(&call).map_err(|e| DriverError::Internal(e.to_string()))?;
    // Where both are there, the engine is compared with the trainer; where the engine is trusted both are the engine's.
    let both = [Column::OldLogprob, Column::RolloutLogprob];
    let compared = both.into_iter().filter(|&column| batch.has(column) && !team.trusts_engine);
    let mut columns: Vec<Column> = algorithm.reads().into_iter().chain(compared).collect();
    columns.sort();
    columns.dedup();
    Ok(team.policy.score(batch, &columns, &spec).await?)
}

/// What all shards said, in any order.
fn merge(scored: &Scored) -> Result<Statistics> {
    let mut all = Statistics::default();
    for part in &scored.details {
        let part: Statistics = serde_json::from_value(part.clone())
            .map_err(|e| DriverError::Internal(format!("a rank's statistics are not understood: {e}")))?;
        all.merge(&part);
    }
    Ok(all)
}
