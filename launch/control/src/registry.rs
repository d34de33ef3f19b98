//! How processes meet: everybody binds a free port and tells the driver, whose address the environment gives.
//!
//! The driver waits until every rank and the agent of every node came, then connects down the tree. Deliberately
//! absent: leaving and coming back. A job whose process is gone ends, and is restarted as a whole.

use crate::dispatch::{MeshMap, Seat};
use crate::error::{Cause, ControlError, RankFailure};
use crate::flight::endpoint;
use crate::link::sources;
use crate::placement::Placement;
use crate::secret::{Bearer, Secret};
use crate::wire::Json;
use crate::wire::generated::registry::{registry_client::RegistryClient, registry_server};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tangelo_core::env;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

/// A rank's seats: role -> mesh -> seat.
pub type Seats = BTreeMap<String, BTreeMap<String, Seat>>;

/// How long a process tries to reach the driver, which is there before it.
const REGISTER_WITHIN: Duration = Duration::from_secs(30);
/// The address of ranks that live in their agent's process.
pub(crate) const LOCAL: &str = "local";

/// What every process of a job knows from its environment.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Name of the job's run.
    pub job: String,
    /// Index of the node.
    pub node: usize,
    /// host:port of the driver.
    pub driver: String,
    /// Name or address by which others reach this node.
    pub host: String,
    /// The job's secret.
    pub secret: Secret,
}

impl Membership {
    /// From `TORCHELASTIC_RUN_ID`, `GROUP_RANK`, `TANGELO_DRIVER_ADDRESS`, `TANGELO_HOST` and the secret's variables.
    ///
    /// # Errors
    /// The variable that is not set or makes no sense.
    pub fn from_env() -> Result<Membership, ControlError> {
        Ok(Membership {
            job: variable(env::RUN_ID)?,
            node: number(env::GROUP_RANK)?,
            driver: variable(env::DRIVER_ADDRESS)?,
            host: std::env::var(env::HOST).unwrap_or_else(|_| "127.0.0.1".into()),
            secret: Secret::from_env()?,
        })
    }
}

fn variable(name: &str) -> Result<String, ControlError> {
    std::env::var(name).map_err(|_| {
        ControlError::Environment(format!("{name} is not set; processes of an RL job are started by `tangelo run`"))
    })
}

/// A number from the environment.
pub(crate) fn number(name: &str) -> Result<usize, ControlError> {
    let text = variable(name)?;
    text.parse().map_err(|_| ControlError::Environment(format!("{name} is `{text}`, expected a number from 0")))
}

/// A rank, as it announces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RankEntry {
    pub rank: usize,
    /// host:port for calls and batches.
    pub address: String,
    pub seats: Seats,
}

/// A process, as it announces itself: an agent, a rank, or an agent with the ranks in its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub job: String,
    pub node: usize,
    pub agent: Option<String>,
    pub ranks: Vec<RankEntry>,
}

/// Who is expected.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub job: String,
    pub num_nodes: usize,
    pub world_size: usize,
}

/// Who came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Roll {
    pub agents: BTreeMap<usize, String>,
    /// rank -> (node, entry)
    pub ranks: BTreeMap<usize, (usize, RankEntry)>,
}

impl Roll {
    /// Takes a process in, or says why not.
    fn admit(&mut self, expected: &Expected, new: &Registration) -> Result<(), String> {
        if new.job != expected.job {
            return Err(format!("this is the driver of job `{}`, not of `{}`", expected.job, new.job));
        }
        if new.node >= expected.num_nodes {
            return Err(format!("node {} does not exist: the job has {} nodes", new.node, expected.num_nodes));
        }
        if let (Some(_), Some(known)) = (&new.agent, self.agents.get(&new.node)) {
            return Err(format!("node {} has an agent already, at {known}", new.node));
        }
        for entry in &new.ranks {
            if entry.rank >= expected.world_size {
                return Err(format!("rank {} does not exist: the job has {} ranks", entry.rank, expected.world_size));
            }
            if let Some((node, known)) = self.ranks.get(&entry.rank) {
                return Err(format!("rank {} is there already: node {node}, {}", entry.rank, known.address));
            }
        }
        self.agents.extend(new.agent.iter().map(|address| (new.node, address.clone())));
        self.ranks.extend(new.ranks.iter().map(|entry| (entry.rank, (new.node, entry.clone()))));
        Ok(())
    }

    /// Who has not come; `None` when all are there.
    fn missing(&self, expected: &Expected) -> Option<String> {
        let absent = |n: usize, has: &dyn Fn(usize) -> bool| -> Vec<String> {
            (0..n).filter(|&i| !has(i)).map(|i| i.to_string()).collect()
        };
        let ranks = absent(expected.world_size, &|rank| self.ranks.contains_key(&rank));
        let nodes = absent(expected.num_nodes, &|node| self.agents.contains_key(&node));
        let part = |what: &str, absent: &[String], all: usize| {
            (!absent.is_empty()).then(|| format!("{} of {all} {what} missing: {}", absent.len(), absent.join(", ")))
        };
        let parts = [part("ranks", &ranks, expected.world_size), part("node agents", &nodes, expected.num_nodes)];
        let text = parts.into_iter().flatten().collect::<Vec<_>>().join("; ");
        (!text.is_empty()).then_some(text)
    }

    /// The meshes of every role, from what its ranks say of themselves.
    pub fn meshes(&self, placement: &Placement) -> Result<BTreeMap<(String, String), Arc<MeshMap>>, ControlError> {
        let mut meshes: BTreeMap<(String, String), BTreeMap<usize, Seat>> = BTreeMap::new();
        for role in placement.roles.keys() {
            let (pool, ranks) = placement.ranks_of(role)?;
            for &rank in ranks {
                let seats = self.ranks.get(&rank).and_then(|(_, entry)| entry.seats.get(role));
                let seats = seats.ok_or_else(|| {
                    ControlError::Placement(format!(
                        "role `{role}` is placed on pool `{pool}`, but rank {rank} of it did not register that role"
                    ))
                })?;
                for (mesh, &seat) in seats {
                    meshes.entry((role.clone(), mesh.clone())).or_default().insert(rank, seat);
                }
            }
        }
        meshes.into_iter().map(|(key, seats)| checked(placement, key, seats)).collect()
    }
}

type NamedMesh = ((String, String), Arc<MeshMap>);

fn checked(
    placement: &Placement,
    key: (String, String),
    seats: BTreeMap<usize, Seat>,
) -> Result<NamedMesh, ControlError> {
    let (role, mesh) = &key;
    let (pool, ranks) = placement.ranks_of(role)?;
    if seats.len() != ranks.len() {
        return Err(ControlError::Placement(format!(
            "{} of the {} ranks of pool `{pool}` registered a seat in mesh `{mesh}` of role `{role}`; all must",
            seats.len(),
            ranks.len()
        )));
    }
    let map = MeshMap::new(seats);
    let map = map.map_err(|e| ControlError::Placement(format!("mesh `{mesh}` of role `{role}`: {e}")))?;
    Ok((key, Arc::new(map)))
}

/// The driver's list of who is there.
#[derive(Clone)]
pub(crate) struct Registrar {
    expected: Arc<Expected>,
    roll: Arc<watch::Sender<Roll>>,
}

impl Registrar {
    pub fn new(expected: Expected) -> Registrar {
        Registrar { expected: Arc::new(expected), roll: Arc::new(watch::channel(Roll::default()).0) }
    }

    /// Waits until everybody came.
    pub async fn everybody(&self, within: Duration) -> Result<Roll, ControlError> {
        let mut roll = self.roll.subscribe();
        let all = roll.wait_for(|roll| roll.missing(&self.expected).is_none());
        if let Ok(Ok(roll)) = tokio::time::timeout(within, all).await {
            return Ok(roll.clone());
        }
        let missing = self.roll.borrow().missing(&self.expected).unwrap_or_default();
        let needs = "TANGELO_DRIVER_ADDRESS and TANGELO_JOB_SECRET_FILE";
        Err(ControlError::Absent { waited: within, missing, needs })
    }
}

#[tonic::async_trait]
impl registry_server::Registry for Registrar {
    async fn register(&self, request: Request<Json>) -> Result<Response<Json>, Status> {
        let new: Registration = serde_json::from_slice(&request.get_ref().body)
            .map_err(|e| RankFailure::new(Cause::Protocol, format!("not a registration: {e}")).status())?;
        let mut refused = None;
        self.roll.send_if_modified(|roll| {
            refused = roll.admit(&self.expected, &new).err();
            refused.is_none()
        });
        match refused {
            Some(why) => Err(RankFailure::new(Cause::Protocol, why).status()),
            None => Ok(Response::new(Json::default())),
        }
    }
}

/// Announces a process to the driver.
pub(crate) async fn register(member: &Membership, new: &Registration) -> Result<(), ControlError> {
    let action = || format!("registering with the driver at {}", member.driver);
    let failed = |failure| ControlError::Peer { action: action(), failure };
    let body = serde_json::to_vec(new).map_err(|e| failed(RankFailure::new(Cause::Protocol, e.to_string())))?;
    let body = Json { body: body.into() };
    let give_up = Instant::now() + REGISTER_WITHIN;
    loop {
        let outcome = async {
            let channel = endpoint(&member.driver).map_err(|f| f.status())?.connect().await;
            let channel = channel.map_err(|e| Status::unavailable(sources(&e)))?;
            let bearer = Bearer::new(&member.secret).map_err(|e| Status::invalid_argument(e.to_string()))?;
            RegistryClient::with_interceptor(channel, bearer).register(body.clone()).await
        };
        match outcome.await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::Unavailable && Instant::now() < give_up => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(status) => return Err(failed(status.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn entry(rank: usize, roles: &[&str]) -> RankEntry {
        let seat = Seat { index: 0, size: 1, answers: true };
        let meshes = BTreeMap::from([("train".to_owned(), seat)]);
        let seats = roles.iter().map(|role| ((*role).to_owned(), meshes.clone())).collect();
        RankEntry { rank, address: format!("h:{rank}"), seats }
    }

    fn registration(job: &str, node: usize, ranks: &[usize]) -> Registration {
        let ranks = ranks.iter().map(|&rank| entry(rank, &["policy"])).collect();
        Registration { job: job.into(), node, agent: Some(format!("a:{node}")), ranks }
    }

    #[test]
    fn who_does_not_belong_is_refused_and_who_is_missing_is_named() {
        let expected = Expected { job: "j".into(), num_nodes: 2, world_size: 3 };
        let mut roll = Roll::default();
        let mut check = |new: Registration, result: Expect| {
            let outcome = roll.admit(&expected, &new).err();
            let missing = roll.missing(&expected).unwrap_or_else(|| "nobody is missing".into());
            result.assert_eq(&outcome.unwrap_or(missing));
        };
        check(registration("j", 0, &[0]), expect!["2 of 3 ranks missing: 1, 2; 1 of 2 node agents missing: 1"]);
        check(registration("i", 1, &[1]), expect!["this is the driver of job `j`, not of `i`"]);
        check(registration("j", 2, &[1]), expect!["node 2 does not exist: the job has 2 nodes"]);
        check(registration("j", 0, &[1]), expect!["node 0 has an agent already, at a:0"]);
        check(registration("j", 1, &[0]), expect!["rank 0 is there already: node 0, h:0"]);
        check(registration("j", 1, &[3]), expect!["rank 3 does not exist: the job has 3 ranks"]);
        check(registration("j", 1, &[1, 2]), expect!["nobody is missing"]);
    }

    #[test]
    fn a_role_that_a_rank_of_its_pool_does_not_know_is_refused() {
        let mut roll = Roll::default();
        roll.ranks.insert(0, (0, entry(0, &["policy", "critic"])));
        roll.ranks.insert(1, (0, entry(1, &["policy"])));
        let placement = Placement::colocated(&["policy", "critic"], 2);
        expect!["role `critic` is placed on pool `policy+critic`, but rank 1 of it did not register that role"]
            .assert_eq(&roll.meshes(&placement).unwrap_err().to_string());
        assert_eq!(roll.meshes(&Placement::colocated(&["policy"], 2)).unwrap().len(), 1);
    }
}
