//! The ranks of one role, and the verbs they are asked.
//!
//! A verb with a batch splits it over the role's mesh, runs on every rank, and puts what comes back in the batch's
//! order. Every verb is a future: verbs of different pools overlap (`try_join!`), verbs of one pool run in the order in
//! which they were first polled.

use crate::dispatch::{Args, MeshMap, Split};
use crate::driver::{Cluster, body, parse};
use crate::error::ControlError;
use crate::remote::{RemoteBatch, Shard};
use crate::verbs::{Admin, Answer, Health, Made, Metrics, Published, Request, Sampling, mesh};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tangelo_core::{Column, LossSpec};

/// A handle to the ranks of a role. Cheap to clone.
#[derive(Clone)]
pub struct WorkerGroup {
    cluster: Cluster,
    role: Arc<str>,
    everyone: Arc<MeshMap>,
    timeout: Option<Duration>,
}

/// What a verb with a batch gave back.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The batch with the columns that were made, where any were.
    pub batch: Option<RemoteBatch>,
    /// Numbers of the whole.
    pub metrics: Metrics,
    /// What each part said beside, in order of index.
    pub details: Vec<Value>,
}

/// Columns that travel with every batch where it has them: they say where a token is.
const STRUCTURE: [Column; 5] =
    [Column::Positions, Column::SeqId, Column::GroupId, Column::SampleIndex, Column::PolicyVersion];

impl WorkerGroup {
    pub(crate) fn new(cluster: Cluster, role: &str) -> Result<WorkerGroup, ControlError> {
        let (_, ranks) = cluster.0.placement.ranks_of(role)?;
        let everyone = Arc::new(MeshMap::everyone(ranks)?);
        Ok(WorkerGroup { cluster, role: role.into(), everyone, timeout: None })
    }

    /// The role.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// The same ranks with this deadline for every verb.
    pub fn within(&self, timeout: Duration) -> WorkerGroup {
        WorkerGroup { timeout: Some(timeout), ..self.clone() }
    }

    /// A mesh that the role's ranks registered.
    ///
    /// # Errors
    /// They registered no mesh of this name.
    pub fn mesh(&self, name: &str) -> Result<Arc<MeshMap>, ControlError> {
        let meshes = &self.cluster.0.meshes;
        meshes.get(&(self.role.to_string(), name.to_owned())).cloned().ok_or_else(|| {
            let of_role = meshes.keys().filter(|(role, _)| **role == *self.role);
            let known: Vec<&str> = of_role.map(|(_, mesh)| mesh.as_str()).collect();
            let (role, known) = (&self.role, known.join(", "));
            ControlError::Placement(format!("the ranks of role `{role}` registered no mesh `{name}`, only {known}"))
        })
    }

    /// Loss and gradients of a mini-batch; its columns are those that the loss reads.
    ///
    /// # Errors
    /// A column that is missing, and whatever a rank reports.
    pub async fn forward_backward(&self, batch: &RemoteBatch, loss: &LossSpec) -> Result<Metrics, ControlError> {
        let mut needed = loss.columns();
        needed.push(Column::Tokens);
        let batch = batch.narrow(&needed, &STRUCTURE)?;
        let request = |batch: RemoteBatch| Request::ForwardBackward { batch, loss: loss.clone() };
        Ok(self.over_batch(mesh::TRAIN, &batch, request).await?.metrics)
    }

    /// Reduces gradients, clips, updates with this learning rate.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn optim_step(&self, lr: f64) -> Result<Metrics, ControlError> {
        self.merged(&Request::OptimStep { lr }).await
    }

    /// The batch with columns computed without gradients, such as log-probabilities and values.
    ///
    /// # Errors
    /// Whatever a rank reports, and a rank that did not make them.
    pub async fn forward(&self, batch: &RemoteBatch, outputs: &[Column]) -> Result<RemoteBatch, ControlError> {
        let input =
            batch.narrow(&[Column::Tokens], &[&STRUCTURE[..], &[Column::Targets, Column::LossMask]].concat())?;
        let request = |batch: RemoteBatch| Request::Forward { batch, outputs: outputs.to_vec() };
        let made = self.over_batch(mesh::TRAIN, &input, request).await?.batch.unwrap_or_default();
        made.narrow(outputs, &[])?;
        batch.join(&made)
    }

    /// Runs part of an algorithm on each part of the batch; the parts of `columns` travel there. With columns made, the
    /// whole batch with them comes back.
    ///
    /// # Errors
    /// A column that is missing, and whatever a rank reports.
    pub async fn score(&self, batch: &RemoteBatch, columns: &[Column], spec: &Value) -> Result<Scored, ControlError> {
        let input = batch.narrow(columns, &[Column::Tokens, Column::GroupId])?;
        let request = |batch: RemoteBatch| Request::Score { batch, spec: spec.clone() };
        let scored = self.over_batch(mesh::TRAIN, &input, request).await?;
        let joined = scored.batch.map(|made| batch.join(&made)).transpose()?;
        Ok(Scored { batch: joined, ..scored })
    }

    /// Makes the weights available to [`WorkerGroup::pull`] as this version. Where they travel by collectives between
    /// two pools, both verbs must be under way at once: `try_join!`.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn publish(&self, version: u64) -> Result<(Published, Metrics), ControlError> {
        let answers = self.everywhere(&Request::Publish { version }).await?;
        let mut metrics = Metrics::default();
        answers.iter().for_each(|answer| metrics.merge(&answer.metrics));
        Ok((Published { version, details: answers.into_iter().map(|answer| answer.detail).collect() }, metrics))
    }

    /// Takes published weights over.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn pull(&self, published: &Published) -> Result<Metrics, ControlError> {
        self.merged(&Request::Pull { published: published.clone() }).await
    }

    /// Completes prompts: `sampling.n` rows for each, in the order of the prompts.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn generate(&self, prompts: &RemoteBatch, sampling: &Sampling) -> Result<Scored, ControlError> {
        let request = |batch: RemoteBatch| Request::Generate { batch, sampling: sampling.clone() };
        self.over_batch(mesh::GENERATE, prompts, request).await
    }

    /// Writes the role's part of a checkpoint.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn save(&self, folder: &Path) -> Result<Metrics, ControlError> {
        self.merged(&Request::Save { folder: folder.to_owned() }).await
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn restore(&self, folder: &Path) -> Result<Metrics, ControlError> {
        self.merged(&Request::Restore { folder: folder.to_owned() }).await
    }

    /// Any request over any mesh: the one mechanism below all verbs. Answers in order of index, then rank.
    ///
    /// # Errors
    /// Arguments for another number of parts, and whatever a rank reports.
    pub async fn call(&self, map: &MeshMap, args: Args<Request>) -> Result<Vec<(usize, Answer)>, ControlError> {
        let (verb, payloads) = match &args {
            Args::Same(request) => (request.name(), Args::Same(body(request)?)),
            Args::PerIndex(requests) if requests.len() == map.size() => {
                let bodies = requests.iter().map(body).collect::<Result<_, _>>()?;
                (requests.first().map_or("nothing", Request::name), Args::PerIndex(bodies))
            }
            Args::PerIndex(requests) => {
                return Err(ControlError::Batch(format!(
                    "{} requests for the {} parts of role `{}`; one for each part is needed",
                    requests.len(),
                    map.size(),
                    self.role
                )));
            }
        };
        let answers = self.cluster.verb(&self.role, verb, map, payloads, self.timeout).await?;
        let answer = |body: &[u8]| if body.is_empty() { Ok(Answer::default()) } else { parse(body) };
        answers.iter().map(|(rank, body)| Ok((*rank, answer(body)?))).collect()
    }

    /// What every rank of the role is doing, by rank.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn health(&self) -> Result<Vec<(usize, Health)>, ControlError> {
        let answers = self.cluster.admin(&self.role, &self.everyone, &Admin::Health).await?;
        answers.iter().map(|(rank, body)| Ok((*rank, parse(body)?))).collect()
    }

    /// Tells the verb that runs now to stop between two of its steps.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn abort(&self) -> Result<(), ControlError> {
        self.cluster.admin(&self.role, &self.everyone, &Admin::Abort).await.map(|_| ())
    }

    /// From now on, tokens are of this policy version.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn set_version(&self, version: u64) -> Result<(), ControlError> {
        self.cluster.admin(&self.role, &self.everyone, &Admin::SetVersion { version }).await.map(|_| ())
    }

    async fn everywhere(&self, request: &Request) -> Result<Vec<Answer>, ControlError> {
        let answers = self.call(&self.everyone, Args::Same(request.clone())).await?;
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }

    /// Numbers of a verb that every rank runs: those of the ranks that answer for training, where the role has such a
    /// mesh, so that a loss that tensor ranks share counts once.
    async fn merged(&self, request: &Request) -> Result<Metrics, ControlError> {
        let map = self.mesh(mesh::TRAIN).unwrap_or_else(|_| self.everyone.clone());
        Ok(merge(&self.call(&map, Args::Same(request.clone())).await?))
    }

    /// Splits, runs, collects in order.
    async fn over_batch(
        &self,
        mesh: &str,
        batch: &RemoteBatch,
        request: impl Fn(RemoteBatch) -> Request,
    ) -> Result<Scored, ControlError> {
        let map = self.mesh(mesh)?;
        let split = Split::new(batch, map.size(), &format!("role `{}`", self.role))?;
        let requests = split.parts().iter().cloned().map(request).collect();
        let answers = self.call(&map, Args::PerIndex(requests)).await?;
        let metrics = merge(&answers);
        let details = answers.iter().map(|(_, answer)| answer.detail.clone()).collect();
        let made: Vec<_> = answers.into_iter().filter_map(|(_, answer)| answer.made.map(handle)).collect();
        let batch = match made.len() {
            0 => None,
            all if all == map.size() => Some(split.restore(&made)?),
            some => {
                let (role, parts) = (&self.role, map.size());
                return Err(ControlError::Batch(format!(
                    "{some} answers of role `{role}` have columns, for {parts} parts; one rank of each part must make \
                     and answer them"
                )));
            }
        };
        Ok(Scored { batch, metrics, details })
    }
}

fn handle(made: Made) -> (RemoteBatch, Vec<u32>) {
    let shard = Shard { id: made.shard, address: made.address };
    (RemoteBatch::of_shard(shard, made.columns, made.rows), made.origins)
}

fn merge(answers: &[(usize, Answer)]) -> Metrics {
    let mut metrics = Metrics::default();
    answers.iter().for_each(|(_, answer)| metrics.merge(&answer.metrics));
    metrics
}
