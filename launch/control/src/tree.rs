//! The driver's side of calls: sends each down the tree, collects what comes up, keeps its deadline.
//!
//! | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | a call | its pool's turn to send, room in the agents' queues | calls before it being sent; ranks taking calls | `LINK_QUEUE` frames per agent and lane |
//! | events of agents | nothing (a call's own channel has room for all it can get) | - | agents + ranks events per call |
//! | answers of a call | every agent's word | the first failure, or the deadline | the call's deadline |
//!
//! Invariants: calls of one pool reach all of its ranks in one order, or collectives would meet the wrong partner. The
//! first failure wins and the call is cancelled everywhere; a failure that blames a peer waits a moment for the peer's
//! own. A call that nobody waits for (a dropped future) is cancelled too.

use crate::dispatch::{Args, MeshMap};
use crate::error::{CallFailure, Cause, ControlError, RankFailure};
use crate::link::{Event, Link};
use crate::traffic::Traffic;
use crate::wire::{Down, Kind, Lane, Target, Up};
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tangelo_core::FailureKind;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

/// How long a failure that blames a peer waits for the peer's own.
const CAUSE_WITHIN: Duration = Duration::from_millis(300);
/// How long agents have to say who is missing.
const MISSING_WITHIN: Duration = Duration::from_secs(1);

/// A call before it is sent.
pub(crate) struct Outgoing<'a> {
    pub lane: Lane,
    pub role: &'a str,
    pub verb: &'static str,
    pub step: u64,
    pub map: &'a MeshMap,
    pub payloads: Args<Bytes>,
    pub timeout: Duration,
    /// Held while a verb is sent; admin calls have no order.
    pub order: Option<&'a tokio::sync::Mutex<()>>,
}

type Incoming = mpsc::Sender<(usize, Event)>;

struct Pending {
    /// Nodes that have not said their last word.
    nodes: Vec<usize>,
    sender: Incoming,
}

struct State {
    /// By node; empty once the job is over.
    links: Vec<Link>,
    pending: HashMap<u64, Pending>,
    /// Nodes whose connection is gone, and how.
    lost: HashMap<usize, String>,
}

/// The agents, and the calls under way.
pub(crate) struct Tree {
    node_of: Vec<usize>,
    state: Mutex<State>,
    next_call: AtomicU64,
    trace_seed: u64,
    traffic: Arc<Traffic>,
}

impl Tree {
    pub fn new(links: Vec<Link>, node_of: Vec<usize>, trace_seed: u64, traffic: Arc<Traffic>) -> Tree {
        let state = Mutex::new(State { links, pending: HashMap::new(), lost: HashMap::new() });
        Tree { node_of, state, next_call: AtomicU64::new(1), trace_seed, traffic }
    }

    /// Closes the connections: agents end, and ranks with them.
    pub fn close(&self) {
        self.lock().links.clear();
    }

    /// The queue to a node, unless it is gone; then how.
    fn lane(&self, node: usize, lane: Lane) -> Result<mpsc::Sender<Down>, String> {
        let state = self.lock();
        match (state.lost.get(&node), state.links.get(node)) {
            (Some(how), _) => Err(how.clone()),
            (None, Some(link)) => Ok(link.lane(lane).clone()),
            (None, None) => Err("the job is over".into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls under way.
    pub fn in_flight(&self) -> usize {
        self.lock().pending.len()
    }

    /// Takes agents' events to the calls they belong to, for as long as there are agents.
    pub async fn collect(self: Arc<Self>, mut events: mpsc::Receiver<(u32, Event)>) -> Result<(), String> {
        while let Some((node, event)) = events.recv().await {
            self.deliver(node as usize, event);
        }
        Ok(())
    }

    fn deliver(&self, node: usize, event: Event) {
        let mut state = self.lock();
        match event {
            Event::Up(up) => {
                self.traffic.control_received(up.encoded_len());
                let Some(pending) = state.pending.get_mut(&up.call) else { return };
                if up.complete {
                    pending.nodes.retain(|&waiting| waiting != node);
                }
                // Its channel has room for everything that can come: see `call`.
                let _ = pending.sender.try_send((node, Event::Up(up)));
            }
            Event::Lost(how) => {
                state.lost.entry(node).or_insert_with(|| how.clone());
                for pending in state.pending.values().filter(|pending| pending.nodes.contains(&node)) {
                    let _ = pending.sender.try_send((node, Event::Lost(how.clone())));
                }
            }
        }
    }

    /// Runs a call: answers of those who answer, in order of index, then rank.
    pub async fn call(&self, out: Outgoing<'_>) -> Result<Vec<(usize, Bytes)>, ControlError> {
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        let trace = format!("{:08x}-{call}", self.trace_seed as u32);
        let deadline = Instant::now() + out.timeout;
        let frames = self.frames(call, &trace, &out);
        // An agent speaks once for each failed rank, once when complete, once about who is missing, twice when lost.
        let (sender, incoming) = mpsc::channel(4 * frames.len() + out.map.seats().count());
        let nodes: Vec<usize> = frames.iter().map(|(node, _)| *node).collect();
        let pending = Pending { nodes: nodes.clone(), sender };
        self.lock().pending.insert(call, pending);
        let guard = CallGuard { tree: self, call, nodes };
        let mut collecting = Collecting { tree: self, out: &out, call, trace, incoming, guard };
        let sent = timeout_at(deadline, self.send(frames, &out)).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err((node, how))) => return Err(collecting.failed(node, None, RankFailure::new(Cause::Lost, how))),
            Err(_) => return Err(collecting.overdue("it could not even be sent: ranks do not take calls").await),
        }
        let mut answers = collecting.run(deadline).await?;
        out.map.sort(&mut answers);
        Ok(answers)
    }

    /// One frame per agent: its targets, and each payload once.
    fn frames(&self, call: u64, trace: &str, out: &Outgoing<'_>) -> Vec<(usize, Down)> {
        let mut frames: BTreeMap<usize, (Down, HashMap<usize, u32>)> = BTreeMap::new();
        for (rank, seat) in out.map.seats() {
            let (frame, known) = frames.entry(self.node_of[rank]).or_insert_with(|| {
                let frame = Down {
                    call,
                    kind: Kind::Run.into(),
                    trace: trace.to_owned(),
                    role: out.role.to_owned(),
                    step: out.step,
                    timeout_ms: out.timeout.as_millis() as u64,
                    ..Down::default()
                };
                (frame, HashMap::new())
            });
            let (part, body) = match &out.payloads {
                Args::Same(body) => (0, body),
                Args::PerIndex(bodies) => (seat.index, &bodies[seat.index]),
            };
            let payload = *known.entry(part).or_insert_with(|| {
                frame.payloads.push(body.clone());
                frame.payloads.len() as u32 - 1
            });
            frame.targets.push(Target { rank: rank as u32, payload, answers: seat.answers });
        }
        frames.into_iter().map(|(node, (frame, _))| (node, frame)).collect()
    }

    async fn send(&self, frames: Vec<(usize, Down)>, out: &Outgoing<'_>) -> Result<(), (usize, String)> {
        let _turn = match out.order {
            Some(order) => Some(order.lock().await),
            None => None,
        };
        for (node, frame) in frames {
            let lane = self.lane(node, out.lane).map_err(|how| (node, agent_lost(&how)))?;
            self.traffic.control_sent(frame.encoded_len());
            if lane.send(frame).await.is_err() {
                return Err((node, agent_lost("it closed the connection")));
            }
        }
        Ok(())
    }

    fn tell(&self, nodes: &[usize], call: u64, kind: Kind) {
        for &node in nodes {
            let frame = Down { call, kind: kind.into(), ..Down::default() };
            // An agent whose admin lane is full or closed is lost or stopped; it has nothing to be told.
            if let Ok(lane) = self.lane(node, Lane::Admin) {
                let _ = lane.try_send(frame);
            }
        }
    }
}

/// Ends a call when it is dropped; cancels it where it is not complete.
struct CallGuard<'a> {
    tree: &'a Tree,
    call: u64,
    nodes: Vec<usize>,
}

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        let open = self.tree.lock().pending.remove(&self.call).map_or(Vec::new(), |pending| pending.nodes);
        let nodes: Vec<usize> = self.nodes.iter().copied().filter(|node| open.contains(node)).collect();
        self.tree.tell(&nodes, self.call, Kind::Cancel);
    }
}

/// A call that was sent.
struct Collecting<'a> {
    tree: &'a Tree,
    out: &'a Outgoing<'a>,
    call: u64,
    trace: String,
    incoming: mpsc::Receiver<(usize, Event)>,
    guard: CallGuard<'a>,
}

impl Collecting<'_> {
    async fn run(&mut self, deadline: Instant) -> Result<Vec<(usize, Bytes)>, ControlError> {
        let mut answers = Vec::new();
        let mut open = self.guard.nodes.len();
        while open > 0 {
            let event = tokio::select! {
                event = self.incoming.recv() => event,
                () = sleep_until(deadline) => return Err(self.overdue("").await),
            };
            let failures = match event {
                Some((_, Event::Up(up))) => {
                    open -= usize::from(up.complete);
                    let counted = |answer: &crate::wire::RankAnswer| self.out.map.answers(answer.rank as usize);
                    let wanted = up.answers.iter().filter(|answer| counted(answer));
                    answers.extend(wanted.map(|answer| (answer.rank as usize, answer.payload.clone())));
                    failures_of(&up)
                }
                Some((node, Event::Lost(how))) => {
                    return Err(self.failed(node, None, RankFailure::new(Cause::Lost, agent_lost(&how))));
                }
                None => return Err(self.failed(0, None, RankFailure::new(Cause::Lost, "the driver is ending"))),
            };
            if !failures.is_empty() {
                return Err(self.first_cause(failures).await);
            }
        }
        Ok(answers)
    }

    /// The first failure; one that blames a peer gives way to the peer's own where that comes soon.
    async fn first_cause(&mut self, mut failures: Vec<(usize, RankFailure)>) -> ControlError {
        let until = Instant::now() + CAUSE_WITHIN;
        while failures.iter().all(|(_, failure)| severity(failure) > 0) {
            let Ok(Some((_, event))) = timeout_at(until, self.incoming.recv()).await else { break };
            if let Event::Up(up) = event {
                failures.extend(failures_of(&up));
            }
        }
        let worst = failures.iter().map(|(_, failure)| severity(failure)).min().unwrap_or(0);
        let first = failures.into_iter().find(|(_, failure)| severity(failure) == worst);
        let (rank, failure) = first.unwrap_or((0, RankFailure::new(Cause::Protocol, "a failure without content")));
        self.failed(self.tree.node_of.get(rank).copied().unwrap_or(0), Some(rank), failure)
    }

    /// Asks the agents who is missing, and says so.
    async fn overdue(&mut self, why: &str) -> ControlError {
        let open = self.tree.lock().pending.get(&self.call).map_or(Vec::new(), |pending| pending.nodes.clone());
        self.tree.tell(&open, self.call, Kind::Missing);
        let until = Instant::now() + MISSING_WITHIN;
        let (mut silent, mut missing) = (open.clone(), Vec::new());
        while !silent.is_empty() {
            let Ok(Some((node, event))) = timeout_at(until, self.incoming.recv()).await else { break };
            silent.retain(|&waiting| waiting != node);
            if let Event::Up(up) = event {
                missing.extend(up.missing.iter().map(|&rank| rank as usize));
            }
        }
        missing.sort_unstable();
        let within = self.out.timeout;
        if let (Some(&node), true) = (silent.first(), missing.is_empty()) {
            let message = format!("its agent did not answer within {within:?}");
            return self.failed(node, None, RankFailure::new(Cause::Deadline, message));
        }
        let Some(&rank) = missing.first() else {
            let node = open.first().copied().unwrap_or(0);
            let message = format!("the answers came later than {within:?}. {why}");
            return self.failed(node, None, RankFailure::new(Cause::Deadline, message.trim_end()));
        };
        let others = match &missing[1..] {
            [] => String::new(),
            others => format!(", neither did ranks {others:?}"),
        };
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        let message = format!("it did not answer within {within:?}{others}{why}");
        self.failed(self.tree.node_of[rank], Some(rank), RankFailure::new(Cause::Deadline, message))
    }

    fn failed(&self, node: usize, rank: Option<usize>, failure: RankFailure) -> ControlError {
        ControlError::Call(Box::new(CallFailure {
            rank,
            node,
            role: self.out.role.to_owned(),
            verb: self.out.verb,
            step: self.out.step,
            trace: self.trace.clone(),
            failure,
        }))
    }
}

fn agent_lost(how: &str) -> String {
    format!("the node agent is gone: {how}")
}

/// 0: its own fault. 1: its connection broke. 2: it says that a peer is to blame.
fn severity(failure: &RankFailure) -> u8 {
    match (failure.kind, failure.cause) {
        (FailureKind::Peer, Cause::Lost) => 1,
        (FailureKind::Peer, _) => 2,
        _ => 0,
    }
}

fn failures_of(up: &Up) -> Vec<(usize, RankFailure)> {
    let parse = |payload: &Bytes| {
        serde_json::from_slice(payload)
            .unwrap_or_else(|e| RankFailure::new(Cause::Protocol, format!("a failure that cannot be read: {e}")))
    };
    up.failures.iter().map(|failure| (failure.rank as usize, parse(&failure.payload))).collect()
}
