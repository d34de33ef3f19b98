//! The driver's process: it waits for everybody, connects down the tree, and hands out worker groups.

use crate::dispatch::{Args, MeshMap};
use crate::error::{Cause, ControlError, RankFailure};
use crate::flight::{Puller, Shelf};
use crate::group::WorkerGroup;
use crate::host::{Host, Port, Services, serve};
use crate::link::{Event, Frames, Link, Node, UpSender};
use crate::placement::Placement;
use crate::registry::{Expected, Membership, Registrar, Roll};
use crate::remote::{DRIVER, RemoteBatch, Row, Shard, ShardId};
use crate::secret::{Bearer, Guard, Secret};
use crate::store::Store;
use crate::tasks::Tasks;
use crate::traffic::{Traffic, TrafficReport};
use crate::tree::{Outgoing, Tree};
use crate::verbs::{Admin, Metrics, Reading, Statistics};
use crate::wire::{Down, Kind, Lane};
use arrow::array::RecordBatch;
use bytes::Bytes;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tangelo_core::{Batch, Column, env};
use tokio::sync::{mpsc, watch};

/// Events of agents that wait to be delivered.
const EVENTS: usize = 1024;

/// How long calls may take.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// Verbs; [`WorkerGroup::within`](crate::WorkerGroup::within) sets another for one group's calls.
    pub verb: Duration,
    /// Admin calls.
    pub admin: Duration,
}

impl Default for Deadlines {
    /// Half an hour for a verb, ten seconds for an admin call.
    fn default() -> Deadlines {
        Deadlines { verb: Duration::from_secs(1800), admin: Duration::from_secs(10) }
    }
}

/// What a driver needs to know before anybody comes.
#[derive(Clone, Debug)]
pub struct DriverOptions {
    /// Name of the job's run.
    pub job: String,
    /// The job's secret.
    pub secret: Secret,
    /// Name or address by which nodes reach the driver.
    pub host: String,
    /// Number of nodes, one agent each.
    pub num_nodes: usize,
    /// Number of ranks over all nodes.
    pub world_size: usize,
    /// The most that the driver's own batches (prompts) may take, bytes.
    pub store_limit_bytes: usize,
    /// How long calls may take.
    pub deadlines: Deadlines,
}

/// A driver that others can register with.
pub struct Driver {
    options: DriverOptions,
    address: String,
    registrar: Registrar,
    store: Arc<Store>,
    traffic: Arc<Traffic>,
    guard: Guard,
    tasks: Arc<Tasks>,
    failure: watch::Receiver<Option<String>>,
    _host: Host,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Tasks hold what holds them. With the links the whole tree ends.
        self.tasks.abort();
    }
}

/// The driver takes no calls.
struct NoNode;

impl Node for NoNode {
    fn serve(self: Arc<Self>, _: Lane, _: Frames, _: UpSender) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

impl Driver {
    /// Binds a free port and listens for registrations.
    ///
    /// # Errors
    /// The host cannot be bound.
    pub async fn listen(options: DriverOptions) -> Result<Driver, ControlError> {
        let port = Port::bind(&options.host).await?;
        let address = port.address.clone();
        let (job, num_nodes, world_size) = (options.job.clone(), options.num_nodes, options.world_size);
        let registrar = Registrar::new(Expected { job, num_nodes, world_size });
        let (store, traffic) = (Arc::new(Store::new(DRIVER, options.store_limit_bytes)), Arc::new(Traffic::default()));
        let guard = Guard::new(options.secret.clone(), "the driver");
        let (failed, failure) = watch::channel(None);
        let tasks = Arc::new(Tasks::new(move |what| {
            failed.send_replace(Some(what));
        }));
        let shelf = Shelf { store: store.clone(), traffic: traffic.clone() };
        let services = Services::<NoNode> { node: None, shelf: Some(shelf), registrar: Some(registrar.clone()) };
        let host = serve(port, services, guard.clone(), &tasks);
        Ok(Driver { options, address, registrar, store, traffic, guard, tasks, failure, _host: host })
    }

    /// host:port to register with.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What a process of this node needs in its environment beside the secret's file.
    pub fn environment(&self, node: usize) -> Vec<(&'static str, String)> {
        vec![
            (env::RUN_ID, self.options.job.clone()),
            (env::GROUP_RANK, node.to_string()),
            (env::DRIVER_ADDRESS, self.address.clone()),
        ]
    }

    /// The membership of a process on this node that the driver's process starts within itself.
    pub fn member(&self, node: usize) -> Membership {
        let DriverOptions { job, secret, host, .. } = &self.options;
        Membership { job: job.clone(), node, driver: self.address.clone(), host: host.clone(), secret: secret.clone() }
    }

    /// Waits for every rank and agent, connects, checks that roles fit.
    ///
    /// # Errors
    /// A placement that does not fit, somebody who does not come, an agent or rank that cannot be reached.
    pub async fn assemble(self, placement: Placement, within: Duration) -> Result<Cluster, ControlError> {
        placement.check(self.options.world_size)?;
        let roll = self.registrar.everybody(within).await?;
        let meshes = roll.meshes(&placement)?;
        let bearer = Bearer::new(&self.options.secret)?;
        let (events, mut received) = mpsc::channel(EVENTS);
        let mut links = Vec::new();
        for (&node, address) in &roll.agents {
            let link = Link::connect(address, bearer.clone(), node as u32, &events, &self.tasks).await;
            links.push(link.map_err(|failure| ControlError::Peer {
                action: format!("connecting to the agent of node {node}"),
                failure,
            })?);
        }
        introduce(&links, &roll, &mut received, within).await?;
        let seed = trace_seed(&self.options.job);
        let node_of = roll.ranks.values().map(|(node, _)| *node).collect();
        let tree = Arc::new(Tree::new(links, node_of, seed, self.traffic.clone()));
        self.tasks.spawn("collector", tree.clone().collect(received));
        let puller = Puller::new(self.store.clone(), self.address.clone(), self.traffic.clone(), &self.options.secret)?;
        let order = placement.pools.keys().map(|pool| (pool.clone(), tokio::sync::Mutex::new(()))).collect();
        let shared = Shared {
            everyone: MeshMap::everyone(&(0..self.options.world_size).collect::<Vec<_>>())?,
            driver: self,
            placement,
            meshes,
            tree,
            order,
            puller,
            step: AtomicU64::new(0),
            reported: Mutex::default(),
        };
        Ok(Cluster(Arc::new(shared)))
    }
}

/// Different in every run of every job.
fn trace_seed(job: &str) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    tangelo_core::hash::hash_bytes(now, job.as_bytes())
}

/// Tells every agent its ranks, and waits until it has connected to them.
async fn introduce(
    links: &[Link],
    roll: &Roll,
    events: &mut mpsc::Receiver<(u32, Event)>,
    within: Duration,
) -> Result<(), ControlError> {
    let failed = |what: String, failure| ControlError::Peer { action: what, failure };
    for (node, link) in links.iter().enumerate() {
        let of_node = roll.ranks.iter().filter(|(_, (home, _))| *home == node);
        let roster: BTreeMap<usize, &str> = of_node.map(|(&rank, (_, entry))| (rank, &*entry.address)).collect();
        let body = serde_json::to_vec(&roster).unwrap_or_default().into();
        let frame = Down { kind: Kind::Roster.into(), payloads: vec![body], ..Down::default() };
        if link.lane(Lane::Admin).send(frame).await.is_err() {
            return Err(failed(format!("the agent of node {node}"), RankFailure::new(Cause::Lost, "it is gone")));
        }
    }
    let answers = async {
        for _ in links {
            match events.recv().await {
                Some((node, Event::Up(up))) => {
                    if let Some(first) = up.failures.first() {
                        let failure = serde_json::from_slice(&first.payload)
                            .unwrap_or_else(|e| RankFailure::new(Cause::Protocol, e.to_string()));
                        let action = format!("connecting the agent of node {node} to rank {}", first.rank);
                        return Err(failed(action, failure));
                    }
                }
                Some((node, Event::Lost(how))) => {
                    return Err(failed(format!("the agent of node {node}"), RankFailure::new(Cause::Lost, how)));
                }
                None => break,
            }
        }
        Ok(())
    };
    let late = || failed("connecting agents to ranks".into(), RankFailure::new(Cause::Deadline, "too slow"));
    tokio::time::timeout(within, answers).await.map_err(|_| late())?
}

pub(crate) struct Shared {
    driver: Driver,
    pub placement: Placement,
    pub meshes: BTreeMap<(String, String), Arc<MeshMap>>,
    tree: Arc<Tree>,
    /// Per pool: whose turn it is to send a verb.
    order: BTreeMap<String, tokio::sync::Mutex<()>>,
    everyone: MeshMap,
    puller: Puller,
    step: AtomicU64,
    reported: Mutex<TrafficReport>,
}

/// All ranks of a job, as its driver sees them. Cheap to clone.
#[derive(Clone)]
pub struct Cluster(pub(crate) Arc<Shared>);

impl Cluster {
    /// The ranks of a role.
    ///
    /// # Errors
    /// The job has no such role.
    pub fn group(&self, role: &str) -> Result<WorkerGroup, ControlError> {
        WorkerGroup::new(self.clone(), role)
    }

    /// Ranks of the job.
    pub fn world_size(&self) -> usize {
        self.0.driver.options.world_size
    }

    /// Calls from now on belong to this step.
    pub fn begin_step(&self, step: u64) {
        self.0.step.store(step, Ordering::Release);
    }

    /// The current step.
    pub fn step(&self) -> u64 {
        self.0.step.load(Ordering::Acquire)
    }

    /// Ends the current step: every batch made in it or before is dropped everywhere. Returns what went through the
    /// driver since the last call: `control/driver_bytes`, of it `control/driver_data_bytes` of batches.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn end_step(&self) -> Result<Metrics, ControlError> {
        let step = self.step();
        self.admin_all(&Admin::EndStep { step }).await?;
        self.0.driver.store.end_step(step);
        let now = self.traffic();
        let since = {
            let mut reported = self.0.reported.lock().unwrap_or_else(PoisonError::into_inner);
            let since = now.since(&reported);
            *reported = now;
            since
        };
        let mut metrics = Metrics::default();
        metrics.add("control/driver_bytes", Reading::Sum(since.total_bytes() as f64));
        let data = since.data_sent_bytes + since.data_received_bytes;
        metrics.add("control/driver_data_bytes", Reading::Sum(data as f64));
        Ok(metrics)
    }

    /// Bytes through the driver since it started.
    pub fn traffic(&self) -> TrafficReport {
        self.0.driver.traffic.report()
    }

    /// Calls that were made and have not returned.
    pub fn calls_in_flight(&self) -> usize {
        self.0.tree.in_flight()
    }

    /// Calls that the driver's own port refused.
    pub fn strangers_refused(&self) -> u64 {
        self.0.driver.guard.refused()
    }

    /// Keeps a batch in the driver until the end of the current step, for workers to pull: prompts come this way.
    ///
    /// # Errors
    /// The driver's store is full.
    pub fn put(&self, batch: &Batch) -> Result<RemoteBatch, ControlError> {
        let wrong = |e: &dyn std::fmt::Display| ControlError::Batch(e.to_string());
        let tokens = batch.row_lengths().map_err(|e| wrong(&e))?;
        let groups = match batch.has(Column::GroupId) {
            true => batch.i64_values(Column::GroupId).map_err(|e| wrong(&e))?,
            false => (0..tokens.len() as i64).collect(),
        };
        let rows = tokens.iter().zip(groups).map(|(&tokens, group)| Row { tokens: tokens as u32, group }).collect();
        let records = batch.records().clone();
        let columns = Column::ALL.into_iter().filter(|&column| batch.has(column)).collect();
        let id = self.0.driver.store.put(records, self.step(), "the driver").map_err(|f| wrong(&f.message))?;
        let shard = Shard { id, address: self.0.driver.address.clone() };
        Ok(RemoteBatch::of_shard(shard, columns, rows))
    }

    /// Brings columns of a batch to the driver, in its row order. What is fetched is what the driver decides by.
    ///
    /// # Errors
    /// A column that the batch does not have, a batch that was dropped, a holder that is gone.
    pub async fn fetch(&self, batch: &RemoteBatch, columns: &[Column]) -> Result<RecordBatch, ControlError> {
        let narrow = batch.narrow(columns, &[])?;
        let pulled = tokio::time::timeout(self.0.driver.options.deadlines.verb, self.0.puller.pull(&narrow)).await;
        let late = || RankFailure::new(Cause::Deadline, "a holder does not answer");
        let result = pulled.map_err(|_| late()).and_then(|pulled| pulled);
        result.map_err(|failure| ControlError::Peer { action: "fetching columns".into(), failure })
    }

    /// Drops a batch before its step ends. Other handles to its rows die with it.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn drop_batch(&self, batch: &RemoteBatch) -> Result<(), ControlError> {
        let shards: Vec<ShardId> = batch.shards().into_iter().map(|shard| shard.id).collect();
        self.0.driver.store.drop_shards(&shards, self.step());
        self.admin_all(&Admin::Drop { shards }).await
    }

    /// Drops what lies of `whole` and not also of `kept`, before its step ends: shards none of whose rows are kept.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn drop_unused(&self, whole: &RemoteBatch, kept: &RemoteBatch) -> Result<(), ControlError> {
        let used = kept.shards();
        let is_unused = |shard: &Shard| used.binary_search_by_key(&shard.id, |used| used.id).is_err();
        let shards: Vec<ShardId> = whole.shards().into_iter().filter(is_unused).map(|shard| shard.id).collect();
        if shards.is_empty() {
            return Ok(());
        }
        self.0.driver.store.drop_shards(&shards, self.step());
        self.admin_all(&Admin::Drop { shards }).await
    }

    /// The counters of every rank, by rank.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn statistics(&self) -> Result<Vec<Statistics>, ControlError> {
        let answers = self.admin("job", &self.0.everyone, &Admin::Statistics).await?;
        answers.iter().map(|(_, body)| parse(body)).collect()
    }

    /// Ends every rank after what runs now, then the tree.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn shutdown(self) -> Result<(), ControlError> {
        self.admin_all(&Admin::Shutdown).await?;
        self.0.tree.close();
        self.0.driver.tasks.abort();
        Ok(())
    }

    async fn admin_all(&self, admin: &Admin) -> Result<(), ControlError> {
        self.admin("job", &self.0.everyone, admin).await.map(|_| ())
    }

    pub(crate) async fn admin(
        &self,
        role: &str,
        map: &MeshMap,
        admin: &Admin,
    ) -> Result<Vec<(usize, Bytes)>, ControlError> {
        self.check_alive()?;
        let timeout = self.0.driver.options.deadlines.admin;
        let payloads = Args::Same(body(admin)?);
        let (verb, step) = (admin.name(), self.step());
        self.0.tree.call(Outgoing { lane: Lane::Admin, role, verb, step, map, payloads, timeout, order: None }).await
    }

    /// Sends a verb to the ranks of a role.
    pub(crate) async fn verb(
        &self,
        role: &str,
        verb: &'static str,
        map: &MeshMap,
        payloads: Args<Bytes>,
        timeout: Option<Duration>,
    ) -> Result<Vec<(usize, Bytes)>, ControlError> {
        self.check_alive()?;
        let deadlines = &self.0.driver.options.deadlines;
        let timeout = timeout.unwrap_or(deadlines.verb);
        let (pool, _) = self.0.placement.ranks_of(role)?;
        let (order, step) = (self.0.order.get(pool), self.step());
        self.0.tree.call(Outgoing { lane: Lane::Work, role, verb, step, map, payloads, timeout, order }).await
    }

    /// A task of the driver that failed fails every call after it.
    fn check_alive(&self) -> Result<(), ControlError> {
        match &*self.0.driver.failure.borrow() {
            None => Ok(()),
            Some(what) => Err(ControlError::Peer {
                action: "the driver".into(),
                failure: RankFailure::new(Cause::Panic, what.clone()),
            }),
        }
    }
}

/// As JSON.
pub(crate) fn body(value: &impl serde::Serialize) -> Result<Bytes, ControlError> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|e| ControlError::Batch(format!("cannot write a request: {e}")))
}

/// From JSON.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ControlError> {
    serde_json::from_slice(body).map_err(|e| ControlError::Peer {
        action: "reading an answer".into(),
        failure: RankFailure::new(Cause::Protocol, e.to_string()),
    })
}
