//! The node agent: the middle of the tree. It passes a call on to its ranks and their answers back as one.
//!
//! | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | frames of a lane | room in a rank's queue | the rank taking a frame, or its loss | `LINK_QUEUE` frames per rank and lane |
//! | events of its ranks | room in the lane to the driver | the driver, which always reads | `EVENTS` events |
//!
//! Failures go up at once, answers when all ranks have answered. Calls reach every rank in the order in which the
//! driver sent them. Deliberately absent: deadlines. The driver keeps them, and asks who is missing; one clock is
//! enough. The agent ends with the connection to its driver, and its ranks with the connection to it.

use crate::error::{Cause, ControlError, RankFailure, log};
use crate::host::{Host, Port, Services, serve};
use crate::link::{Early, Event, Frames, LINK_QUEUE, Link, Node, UpSender};
use crate::rank::RankNode;
use crate::registry::{LOCAL, Membership, RankEntry, Registration, Seats, register};
use crate::secret::{Bearer, Guard};
use crate::tasks::Tasks;
use crate::wire::{Down, Kind, Lane, RankAnswer, Up};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, watch};

/// Answers of ranks that wait to be collected.
const EVENTS: usize = 256;

/// A call under way below this agent.
struct Pending {
    waiting: Vec<u32>,
    answers: Vec<RankAnswer>,
    up: UpSender,
}

#[derive(Default)]
struct State {
    links: HashMap<u32, Link>,
    /// Ranks whose connection is gone, and how.
    lost: HashMap<u32, String>,
    pending: HashMap<u64, Pending>,
    cancelled: Early,
}

struct AgentNode {
    state: Mutex<State>,
    local: HashMap<u32, Arc<dyn Node>>,
    events: mpsc::Sender<(u32, Event)>,
    bearer: Bearer,
    tasks: Arc<Tasks>,
    /// Why the agent ended, once it has.
    ended: watch::Sender<Option<String>>,
}

/// The agent of a node.
pub struct Agent {
    node: Arc<AgentNode>,
    tasks: Arc<Tasks>,
    ended: watch::Receiver<Option<String>>,
    _host: Host,
}

/// Ranks that live in the agent's process.
pub(crate) type LocalRanks = Vec<(u32, Arc<RankNode>, Seats)>;

impl Agent {
    /// Binds a free port, registers with the driver, serves from then on.
    ///
    /// # Errors
    /// No port, no driver, or a driver that refuses.
    pub async fn start(member: &Membership) -> Result<Agent, ControlError> {
        Agent::with_ranks(member, Vec::new()).await
    }

    pub(crate) async fn with_ranks(member: &Membership, local: LocalRanks) -> Result<Agent, ControlError> {
        let port = Port::bind(&member.host).await?;
        let address = port.address.clone();
        let (ended_sender, ended) = watch::channel(None);
        let on_failure = ended_sender.clone();
        let tasks = Arc::new(Tasks::new(move |what| {
            on_failure.send_replace(Some(what));
        }));
        let (events, received) = mpsc::channel(EVENTS);
        let entry = |(rank, _, seats): &(u32, Arc<RankNode>, Seats)| RankEntry {
            rank: *rank as usize,
            address: LOCAL.into(),
            seats: seats.clone(),
        };
        let ranks = local.iter().map(entry).collect();
        let node = Arc::new(AgentNode {
            state: Mutex::default(),
            local: local.into_iter().map(|(rank, node, _)| (rank, node as Arc<dyn Node>)).collect(),
            events,
            bearer: Bearer::new(&member.secret)?,
            tasks: tasks.clone(),
            ended: ended_sender,
        });
        tasks.spawn("collector", collect(node.clone(), received));
        let guard = Guard::new(member.secret.clone(), &format!("the agent of node {}", member.node));
        let services = Services { node: Some(node.clone()), shelf: None, registrar: None };
        let host = serve(port, services, guard, &tasks);
        let new = Registration { job: member.job.clone(), node: member.node, agent: Some(address), ranks };
        register(member, &new).await?;
        Ok(Agent { node, tasks, ended, _host: host })
    }

    /// Until the driver is done or gone, which is the same to an agent. Its ranks are told by the ends of their lanes.
    ///
    /// # Errors
    /// A task of the agent failed.
    pub async fn run(mut self) -> Result<(), ControlError> {
        let ended = self.ended.wait_for(Option::is_some).await;
        let why = ended.map_or_else(|_| String::new(), |why| why.clone().unwrap_or_default());
        self.node.lock().links.clear();
        // Ranks read the ends of their lanes while the process still lives.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        if why.is_empty() {
            return Ok(());
        }
        Err(ControlError::Peer { action: "a node agent".into(), failure: RankFailure::new(Cause::Panic, why) })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Tasks hold what holds them.
        self.tasks.abort();
    }
}

impl Node for AgentNode {
    fn serve(self: Arc<Self>, lane: Lane, mut frames: Frames, up: UpSender) -> BoxFuture<'static, ()> {
        async move {
            while let Some(frame) = frames.next().await {
                match frame.kind() {
                    Kind::Run => self.pass_on(lane, frame, &up).await,
                    Kind::Cancel => self.cancel(&frame).await,
                    Kind::Missing => up.send(self.missing(&frame)).await,
                    Kind::Roster => up.send(self.connect(&frame).await).await,
                }
            }
            if lane == Lane::Work {
                self.lock().links.clear();
                self.ended.send_if_modified(|ended| ended.is_none() && ended.replace(String::new()).is_none());
            }
        }
        .boxed()
    }
}

impl AgentNode {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a call to its targets, in order.
    async fn pass_on(&self, lane: Lane, frame: Down, up: &UpSender) {
        let waiting = frame.targets.iter().map(|target| target.rank).collect();
        let pending = Pending { waiting, answers: Vec::with_capacity(frame.targets.len()), up: up.clone() };
        {
            let mut state = self.lock();
            if state.cancelled.take(frame.call) {
                return;
            }
            state.pending.insert(frame.call, pending);
        }
        for target in &frame.targets {
            let (link, lost) = {
                let state = self.lock();
                (state.links.get(&target.rank).cloned(), state.lost.get(&target.rank).cloned())
            };
            let failure = match link.filter(|_| lost.is_none()) {
                Some(link) => match link.lane(lane).send(one_rank(&frame, *target)).await {
                    Ok(()) => continue,
                    Err(_) => "it closed the connection".to_owned(),
                },
                None => lost.unwrap_or_else(|| "the agent has no connection to it".into()),
            };
            self.fail(frame.call, target.rank, &RankFailure::new(Cause::Lost, failure)).await;
        }
    }

    /// Forgets a call and tells the ranks that have not answered it.
    async fn cancel(&self, frame: &Down) {
        let links: Vec<(u32, Link)> = {
            let mut state = self.lock();
            let Some(pending) = state.pending.remove(&frame.call) else {
                state.cancelled.put(frame.call);
                return;
            };
            let links = &state.links;
            pending.waiting.iter().filter_map(|rank| Some((*rank, links.get(rank)?.clone()))).collect()
        };
        for (rank, link) in links {
            let cancel = Down { call: frame.call, kind: Kind::Cancel.into(), ..Down::default() };
            // A rank whose admin lane is full does not read it: then it does not need to know.
            if link.lane(Lane::Admin).try_send(cancel).is_err() {
                log(format!("rank {rank} could not be told that call {} is cancelled", frame.call));
            }
        }
    }

    fn missing(&self, frame: &Down) -> Up {
        let missing = self.lock().pending.get(&frame.call).map_or_else(Vec::new, |p| p.waiting.clone());
        Up { call: frame.call, missing, ..Up::default() }
    }

    /// Connects to the ranks of a roster.
    async fn connect(&self, frame: &Down) -> Up {
        let body = frame.payloads.first().map_or(&[][..], |body| body);
        let roster: BTreeMap<u32, String> = serde_json::from_slice(body).unwrap_or_default();
        let mut failures = Vec::new();
        for (rank, address) in roster {
            let link = match self.local.get(&rank).filter(|_| address == LOCAL) {
                Some(node) => Ok(Link::local(node, rank, &self.events, &self.tasks)),
                None => Link::connect(&address, self.bearer.clone(), rank, &self.events, &self.tasks).await,
            };
            match link {
                Ok(link) => {
                    self.lock().links.insert(rank, link);
                }
                Err(failure) => failures.push(RankAnswer { rank, payload: json(&failure) }),
            }
        }
        Up { call: frame.call, failures, complete: true, ..Up::default() }
    }

    /// Notes a failure and tells the driver at once.
    async fn fail(&self, call: u64, rank: u32, failure: &RankFailure) {
        let up = Up { call, failures: vec![RankAnswer { rank, payload: json(failure) }], ..Up::default() };
        self.answered(rank, up).await;
    }

    /// Takes what a rank sent: passes failures on, and the answers when it was the last.
    async fn answered(&self, rank: u32, mut up: Up) {
        let ready = {
            let mut state = self.lock();
            // A call that was cancelled is not known any more.
            let Some(pending) = state.pending.get_mut(&up.call) else { return };
            pending.waiting.retain(|&waiting| waiting != rank);
            pending.answers.append(&mut up.answers);
            up.complete = pending.waiting.is_empty();
            if up.complete {
                up.answers = std::mem::take(&mut pending.answers);
            }
            let sender = pending.up.clone();
            if up.complete {
                state.pending.remove(&up.call);
            }
            (up.complete || !up.failures.is_empty()).then_some(sender)
        };
        if let Some(sender) = ready {
            sender.send(up).await;
        }
    }

    /// Fails every call that waits for a rank whose connection is gone.
    async fn lose(&self, rank: u32, how: &str) {
        let calls: Vec<u64> = {
            let mut state = self.lock();
            state.links.remove(&rank);
            state.lost.entry(rank).or_insert_with(|| how.to_owned());
            state.pending.iter().filter(|(_, p)| p.waiting.contains(&rank)).map(|(&call, _)| call).collect()
        };
        for call in calls {
            self.fail(call, rank, &RankFailure::new(Cause::Lost, how)).await;
        }
    }
}

async fn collect(node: Arc<AgentNode>, mut events: mpsc::Receiver<(u32, Event)>) -> Result<(), String> {
    while let Some((rank, event)) = events.recv().await {
        match event {
            Event::Up(up) => node.answered(rank, up).await,
            Event::Lost(how) => node.lose(rank, &how).await,
        }
    }
    Ok(())
}

fn one_rank(frame: &Down, target: crate::wire::Target) -> Down {
    let payload = frame.payloads.get(target.payload as usize).cloned().unwrap_or_default();
    Down {
        call: frame.call,
        kind: frame.kind,
        trace: frame.trace.clone(),
        role: frame.role.clone(),
        step: frame.step,
        timeout_ms: frame.timeout_ms,
        targets: vec![crate::wire::Target { payload: 0, ..target }],
        payloads: vec![payload],
    }
}

pub(crate) fn json(failure: &RankFailure) -> bytes::Bytes {
    serde_json::to_vec(failure).unwrap_or_default().into()
}

const _: () = assert!(EVENTS >= LINK_QUEUE, "a rank's answers fit");
