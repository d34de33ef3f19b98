//! `tangelo run` as one rank of a job that torchrun or Slurm started: what their environment says. Pure.

use crate::error::LaunchError;
use tangelo_core::env;

/// Variables for the worker that are not set yet, if another launcher started this process as one of its ranks.
///
/// torchrun sets `RANK` and `WORLD_SIZE`. `srun` sets `SLURM_PROCID`, and `SLURM_STEP_ID`, which a batch script outside
/// `srun` lacks. With `spawns` (the user gave `--nproc-per-node` or `--nnodes`) a Slurm task is a node of its own that
/// starts ranks; under torchrun that is a contradiction.
pub fn rank_environment(
    var: impl Fn(&str) -> Option<String>,
    spawns: bool,
) -> Result<Option<Vec<(&'static str, String)>>, LaunchError> {
    let var = |name: &str| var(name).filter(|value| !value.is_empty());
    if let (Some(rank), Some(world)) = (var(env::RANK), var(env::WORLD_SIZE)) {
        if spawns {
            return Err(LaunchError::Usage(format!(
                "{}={rank} and {}={world} say that a launcher started this process as one rank of a job, and \
                 --nproc-per-node or --nnodes ask it to start ranks; drop the options, or unset the variables",
                env::RANK,
                env::WORLD_SIZE
            )));
        }
        return Ok(Some(Vec::new()));
    }
    let tasks = number(&var, env::SLURM_NTASKS)?;
    if spawns || var(env::SLURM_PROCID).is_none() || var(env::SLURM_STEP_ID).is_none() || tasks.is_none_or(|n| n < 2) {
        return Ok(None);
    }
    slurm_environment(&var).map(Some)
}

/// World size as the environment has it, after [`rank_environment`]'s additions.
pub fn sizes(
    var: impl Fn(&str) -> Option<String>,
    added: &[(&'static str, String)],
) -> Result<(usize, usize, usize), LaunchError> {
    let get = |name: &str| added.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone()).or_else(|| var(name));
    let rank = number(&get, env::RANK)?.unwrap_or(0);
    let world = number(&get, env::WORLD_SIZE)?.unwrap_or(1).max(1);
    let local = number(&get, env::LOCAL_WORLD_SIZE)?.unwrap_or(world).clamp(1, world);
    Ok((rank, world, local))
}

/// Whether this rank is the first of its node.
pub fn is_first_of_node(
    var: impl Fn(&str) -> Option<String>,
    added: &[(&'static str, String)],
) -> Result<bool, LaunchError> {
    let get = |name: &str| added.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone()).or_else(|| var(name));
    Ok(number(&get, env::LOCAL_RANK)?.unwrap_or(0) == 0)
}

fn slurm_environment(var: &impl Fn(&str) -> Option<String>) -> Result<Vec<(&'static str, String)>, LaunchError> {
    let get = |name: &str, default: usize| number(var, name).map(|v| v.unwrap_or(default));
    let (rank, world) = (get(env::SLURM_PROCID, 0)?, get(env::SLURM_NTASKS, 1)?);
    let (node, nodes) = (get(env::SLURM_NODEID, 0)?, get(env::SLURM_NNODES, 1)?);
    let per_node = var(env::SLURM_TASKS_PER_NODE).and_then(|text| tasks_of_node(&text, node));
    let first_host = var(env::SLURM_NODELIST).and_then(|list| first_host(&list));
    // Any port that all ranks can compute: jobs that share a node have different numbers.
    let port = 20_000 + (get(env::SLURM_JOB_ID, 0)? * 31 + get(env::SLURM_STEP_ID, 0)?) % 20_000;
    let run_id = format!("slurm-{}-{}", get(env::SLURM_JOB_ID, 0)?, get(env::SLURM_STEP_ID, 0)?);
    let wanted = [
        (env::RANK, rank.to_string()),
        (env::WORLD_SIZE, world.to_string()),
        (env::LOCAL_RANK, get(env::SLURM_LOCALID, 0)?.to_string()),
        (env::LOCAL_WORLD_SIZE, per_node.unwrap_or(world / nodes.max(1)).max(1).to_string()),
        (env::GROUP_RANK, node.to_string()),
        (env::GROUP_WORLD_SIZE, nodes.to_string()),
        (env::MASTER_ADDR, first_host.unwrap_or_else(|| "127.0.0.1".into())),
        (env::MASTER_PORT, port.to_string()),
        (env::RUN_ID, run_id),
    ];
    Ok(wanted.into_iter().filter(|(name, _)| var(name).is_none()).collect())
}

fn number(var: &impl Fn(&str) -> Option<String>, name: &str) -> Result<Option<usize>, LaunchError> {
    let Some(text) = var(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let number = text.parse().map_err(|_| LaunchError::Usage(format!("{name}=\"{text}\" is not a number")))?;
    Ok(Some(number))
}

/// The first host of Slurm's compressed list: `n[01-04,07],m3` is n01.
fn first_host(list: &str) -> Option<String> {
    let Some((prefix, rest)) = list.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return list.split(',').next().map(str::to_owned).filter(|host| !host.is_empty());
    };
    let number = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    let suffix = rest.split_once(']').map_or("", |(_, after)| after).split(',').next()?;
    Some(format!("{prefix}{number}{suffix}"))
}

/// Tasks of a node in Slurm's `2(x3),1`.
fn tasks_of_node(text: &str, node: usize) -> Option<usize> {
    let mut left = node;
    for part in text.split(',') {
        let (tasks, times) = part.split_once("(x").unwrap_or((part, "1)"));
        let times: usize = times.trim_end_matches(')').parse().ok()?;
        if left < times {
            return tasks.parse().ok();
        }
        left -= times;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(vars: &[(&str, &str)], spawns: bool) -> Result<Option<Vec<(&'static str, String)>>, LaunchError> {
        rank_environment(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()), spawns)
    }

    #[test]
    fn nobody_or_torchrun() {
        assert_eq!(detect(&[], false).unwrap(), None);
        assert_eq!(detect(&[("RANK", "1")], false).unwrap(), None);
        assert_eq!(detect(&[("RANK", ""), ("WORLD_SIZE", "2")], false).unwrap(), None);
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")];
        assert_eq!(detect(&torchrun, false).unwrap(), Some(vec![]));
        let message = detect(&torchrun, true).unwrap_err().to_string();
        assert!(message.contains("RANK=1") && message.contains("--nproc-per-node"), "{message}");
    }

    const SLURM: [(&str, &str); 10] = [
        ("SLURM_PROCID", "5"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NTASKS", "7"),
        ("SLURM_STEP_ID", "3"),
        ("SLURM_JOB_ID", "1234"),
        ("SLURM_NODEID", "2"),
        ("SLURM_NNODES", "4"),
        ("SLURM_TASKS_PER_NODE", "2(x3),1"),
        ("SLURM_STEP_NODELIST", "gpu[07-09,11]"),
        ("MASTER_PORT", "29501"),
    ];

    #[test]
    fn slurm_fills_in_what_is_missing() {
        let added = detect(&SLURM, false).unwrap().unwrap();
        let get = |name| added.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
        let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"];
        assert_eq!(names.map(get), [Some("5"), Some("7"), Some("1"), Some("2"), Some("2"), Some("gpu07")]);
        assert_eq!(get("MASTER_PORT"), None, "it is set already");
        assert_eq!(sizes(|_| None, &added).unwrap(), (5, 7, 2));
        assert!(!is_first_of_node(|_| None, &added).unwrap());
        assert!(is_first_of_node(|_| None, &[]).unwrap());
        // A batch script outside srun, one task, and one launcher per node are not ranks.
        let without = |name| SLURM.into_iter().filter(|(n, _)| *n != name).collect::<Vec<_>>();
        assert_eq!(detect(&without("SLURM_STEP_ID"), false).unwrap(), None);
        assert_eq!(detect(&without("SLURM_NTASKS"), false).unwrap(), None);
        assert_eq!(detect(&SLURM, true).unwrap(), None);
    }

    #[test]
    fn slurm_lists() {
        let hosts = ["n[01-04,07],m3", "a,b", "solo", "m3,n[1-2]", "r[1-2]c0", ""].map(first_host);
        let expected = [Some("n01"), Some("a"), Some("solo"), Some("m3"), Some("r1c0"), None];
        assert_eq!(hosts, expected.map(|h| h.map(str::to_owned)));
        assert_eq!([0, 2, 3, 4].map(|node| tasks_of_node("2(x3),1", node)), [Some(2), Some(2), Some(1), None]);
        assert_eq!(tasks_of_node("8", 0), Some(8));
    }
}
