//! Which ranks a node starts, and the environment of each: torchrun's variables plus our own. Pure.

use crate::error::LaunchError;
use std::net::UdpSocket;
use tangelo_core::env;

/// Who takes part in a job, seen from one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Nodes in the job.
    pub num_nodes: usize,
    /// Index of this one.
    pub node_rank: usize,
    /// Ranks on every node.
    pub ranks_per_node: usize,
    /// Host where the ranks meet: where rank 0 runs.
    pub master_addr: String,
    /// Port there.
    pub master_port: u16,
}

impl Topology {
    /// So many ranks on this machine alone; the port is chosen for each attempt.
    pub fn alone(ranks: usize) -> Topology {
        let master_addr = "127.0.0.1".to_owned();
        Topology { num_nodes: 1, node_rank: 0, ranks_per_node: ranks, master_addr, master_port: 0 }
    }

    /// Ranks in the job.
    pub fn world_size(&self) -> usize {
        self.num_nodes * self.ranks_per_node
    }

    /// Global rank of a local one: nodes hold consecutive ranks.
    pub fn rank(&self, local_rank: usize) -> usize {
        self.node_rank * self.ranks_per_node + local_rank
    }

    /// What torchrun would set for a rank.
    pub fn environment(
        &self,
        local_rank: usize,
        run_id: &str,
        restarts: u32,
        max_restarts: u32,
    ) -> Vec<(&'static str, String)> {
        vec![
            (env::RANK, self.rank(local_rank).to_string()),
            (env::LOCAL_RANK, local_rank.to_string()),
            (env::WORLD_SIZE, self.world_size().to_string()),
            (env::LOCAL_WORLD_SIZE, self.ranks_per_node.to_string()),
            (env::GROUP_RANK, self.node_rank.to_string()),
            (env::GROUP_WORLD_SIZE, self.num_nodes.to_string()),
            (env::MASTER_ADDR, self.master_addr.clone()),
            (env::MASTER_PORT, self.master_port.to_string()),
            // Rank 0 serves the store itself, whatever an outer launcher said.
            (env::AGENT_STORE, "False".into()),
            (env::RESTART_COUNT, restarts.to_string()),
            (env::MAX_RESTARTS, max_restarts.to_string()),
            (env::RUN_ID, run_id.into()),
        ]
    }
}

/// `HOST:PORT`, with `[...]` around an IPv6 host.
pub fn parse_endpoint(text: &str) -> Result<(String, u16), String> {
    let expected = || format!("`{text}` is not HOST:PORT, such as 10.0.0.1:29500");
    let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
    let port: u16 = port.parse().map_err(|_| expected())?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || port == 0 {
        return Err(expected());
    }
    Ok((host.to_owned(), port))
}

/// By which name or address the other nodes of a job reach this one; `None` where there are none. The first node is
/// known by what they meet at; on another it is the address from which it would speak to that.
pub fn own_address(topology: &Topology) -> Result<Option<String>, LaunchError> {
    match topology {
        Topology { num_nodes: 1, .. } => Ok(None),
        Topology { node_rank: 0, master_addr, .. } => Ok(Some(master_addr.clone())),
        Topology { master_addr, master_port, .. } => {
            let ask = || {
                // Nothing is sent: connecting a datagram socket only chooses the way.
                let any = if master_addr.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect((master_addr.as_str(), *master_port))?;
                Ok(socket.local_addr()?.ip().to_string())
            };
            let no_way = |e: std::io::Error| {
                LaunchError::Usage(format!(
                    "--rdzv-endpoint {master_addr}:{master_port} cannot be reached from this node ({e}); or say by which \
                     address others reach this node with TANGELO_HOST"
                ))
            };
            ask().map(Some).map_err(no_way)
        }
    }
}

/// A port of 127.0.0.1 that was free a moment ago.
pub fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_node_are_consecutive() {
        let topology =
            Topology { num_nodes: 3, node_rank: 2, ranks_per_node: 4, master_addr: "h".into(), master_port: 29_500 };
        let environment = topology.environment(1, "job", 2, 3);
        let get = |name| environment.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
        let names = [env::RANK, env::LOCAL_RANK, env::WORLD_SIZE, env::LOCAL_WORLD_SIZE, env::GROUP_RANK];
        assert_eq!(names.map(get), [Some("9"), Some("1"), Some("12"), Some("4"), Some("2")]);
        let names = [env::GROUP_WORLD_SIZE, env::MASTER_ADDR, env::MASTER_PORT, env::RESTART_COUNT, env::MAX_RESTARTS];
        assert_eq!(names.map(get), [Some("3"), Some("h"), Some("29500"), Some("2"), Some("3")]);
        assert_eq!(get(env::AGENT_STORE), Some("False"));
    }

    #[test]
    fn endpoints() {
        assert_eq!(parse_endpoint("n01:29500"), Ok(("n01".into(), 29_500)));
        assert_eq!(parse_endpoint("[::1]:80"), Ok(("::1".into(), 80)));
        for wrong in ["n01", ":1", "n01:", "n01:0", "n01:70000"] {
            assert!(parse_endpoint(wrong).unwrap_err().contains("HOST:PORT"), "{wrong}");
        }
    }
}
