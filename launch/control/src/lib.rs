//! How the processes of an RL job find and call each other: one driver, an agent per node, ranks below it.
//!
//! ```text
//!                    driver  (torch-free; Driver -> Cluster -> WorkerGroup per role)
//!          registry |   | work lane, admin lane        batches it put or fetches
//!          (meet)   |   |                                        |
//!              node agents  (Agent; one per node, torch-free)    | Arrow Flight
//!                       | work lane, admin lane                  |
//!                     ranks  (Rank; one per device)  <-----------+----> ranks
//!                       | inbox: one call at a time
//!                 device thread  (Worker)
//! ```
//!
//! Invariants: the driver moves metadata; columns move worker to worker. Calls of a pool reach its ranks in one order.
//! Every call has a deadline and a trace id, every queue a bound, every connection the job's secret. The first failure
//! wins and names rank, role, verb and step. Deliberately absent: retries and rejoining (a job that loses a process
//! ends and restarts from its checkpoint), TLS, and any knowledge of models or algorithms. `docs/control.md` has the
//! tables.

mod agent;
pub mod dispatch;
mod driver;
pub mod error;
mod flight;
mod group;
mod host;
mod link;
mod meeting;
pub mod placement;
mod rank;
mod registry;
mod remote;
mod secret;
mod store;
mod tasks;
mod traffic;
mod tree;
pub mod verbs;
mod wire;
mod worker;

pub use agent::Agent;
pub use dispatch::{Args, MeshMap, Seat, Split};
pub use driver::{Cluster, Deadlines, Driver, DriverOptions};
pub use error::{CallFailure, Cause, ControlError, RankFailure};
pub use group::{Scored, WorkerGroup};
pub use meeting::Meeting;
pub use placement::{Placement, RolePlace};
pub use rank::{Rank, RankOptions};
pub use registry::{Membership, Seats};
pub use remote::{RemoteBatch, Row, Shard, ShardId};
pub use secret::Secret;
pub use traffic::TrafficReport;
pub use verbs::{Answer, Metrics, Published, Reading, Request, Sampling, Statistics};
pub use worker::{Context, Control, Job, NewColumns, Output, Worker, WorkerError};
