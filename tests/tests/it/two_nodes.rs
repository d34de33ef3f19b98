//! Two launchers on two nodes, which are two network namespaces with one link between them: they meet, train, lose the
//! link, say so, and go on from what they saved.

use crate::job::{Job, Running, layout, newest_checkpoint, processes_of};
use crate::{rlhf, support};
use std::process::Command;
use std::time::{Duration, Instant};

/// Tensor parallel within a node; a ring, or with `TANGELO_TEST_FAULTS=all` a pipeline too, across.
const LAYOUTS: [&str; 2] = ["tp=2 cp=2 rotate='ring'", "tp=2 pp=2"];
/// Enough steps that the link is cut before the last, and short ones.
const SETS: [&str; 8] = [
    "--set",
    "training.steps=40",
    "--set",
    "lr_scheduler.total_steps=40",
    "--set",
    "training.global_batch_size=4",
    "--set",
    "comm.train_timeout_seconds=8",
];

/// Two network namespaces joined by a veth pair; gone when dropped.
struct Nodes {
    names: [String; 2],
}

impl Nodes {
    /// `None`, with the reason printed, where namespaces cannot be made.
    fn new() -> Option<Nodes> {
        let id = std::process::id();
        let nodes = Nodes { names: ["a", "b"].map(|end| format!("tangelo-{id}-{end}")) };
        match nodes.connect() {
            Ok(()) => Some(nodes),
            Err(reason) => {
                println!("skipped: no network namespaces: {reason}");
                None
            }
        }
    }

    fn connect(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        // Of a process of the same number that was killed; mostly there are none.
        self.names.iter().for_each(|name| _ = ip(&["netns", "delete", name]));
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["-n", a, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", b])?;
        for (name, address) in self.names.iter().zip(["10.111.0.1/24", "10.111.0.2/24"]) {
            ip(&["-n", name, "address", "add", address, "dev", "link0"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["-n", name, "link", "set", "link0", "up"])?;
        }
        Ok(())
    }

    /// Takes the link down or up again. Nobody is told: connections stay open and silent.
    fn set_link(&self, state: &str) {
        ip(&["-n", &self.names[1], "link", "set", "link0", state]).unwrap();
    }

    /// Starts two ranks on each node.
    fn start(&self, job: &Job, run: &str, words: &str) -> [Running; 2] {
        [0, 1].map(|node| {
            let mut command = job.command(run, 2, &["--grace-seconds", "2"]);
            command.args(layout(words)).args(SETS);
            Running::start(self.inside(node, &command), job.path(&format!("{run}-{node}.log")))
        })
    }

    /// `tangelo run` as one of the two nodes.
    fn inside(&self, node: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[node]]).arg(command.get_program()).args(command.get_args());
        inside.args(["--nnodes", "2", "--node-rank", &node.to_string(), "--rdzv-endpoint", "10.111.0.1:29500"]);
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(key, value),
                None => inside.env_remove(key),
            };
        }
        inside
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for name in &self.names {
            _ = ip(&["netns", "del", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|e| format!("ip: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {}: {said}", arguments.join(" "))) }
}

#[test]
fn two_nodes_meet_train_lose_their_link_and_go_on() {
    let Some(nodes) = Nodes::new() else { return };
    let job = Job::new(support::fresh_seed());
    for words in LAYOUTS.into_iter().take(if support::all_faults() { 2 } else { 1 }) {
        let name = words.replace([' ', '\'', '='], "-");
        let sets = layout(words);
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(SETS).collect();
        let one_node = job.run(&format!("one-{name}"), 4, &sets).losses();
        let cut = format!("cut-{name}");
        cut_the_link(&nodes, &job, &cut, words);
        for (node, (code, said)) in nodes.start(&job, &cut, words).map(Running::finish).into_iter().enumerate() {
            assert_eq!(code, Some(0), "node {node} of {words}:\n{said}");
        }
        assert_eq!(job.finished(&cut).losses(), one_node, "{words}: two nodes and one");
    }
}

/// Trains until a checkpoint is there, then takes the link away.
fn cut_the_link(nodes: &Nodes, job: &Job, run: &str, words: &str) {
    let running = nodes.start(job, run, words);
    let begin = Instant::now();
    while !job.path(run).join("checkpoint/step-00000004/manifest.json").exists() {
        assert!(
            begin.elapsed() < Duration::from_secs(100),
            "no checkpoint:\n{}\n{}",
            running[0].said(),
            running[1].said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    nodes.set_link("down");
    for (node, (code, said)) in running.map(Running::finish).into_iter().enumerate() {
        println!("---- {words}, node {node}\n{said}");
        assert_eq!(code, Some(5), "node {node} of {words}: a peer is lost\n{said}");
        // A rank of this node, its phase, the collective, and a rank of the other node.
        let (own, others) = if node == 0 { (0..2, 2..4) } else { (2..4, 0..2) };
        let named = |line: &&str| {
            let names = |rank: usize, text: &str| line.contains(&format!("rank {rank}{text}"));
            own.clone().any(|rank| names(rank, " in phase"))
                && line.contains(" #")
                && others.clone().any(|rank| names(rank, ""))
        };
        assert!(said.lines().any(|line| named(&line)), "node {node} of {words}:\n{said}");
    }
    assert_eq!(processes_of(&job.path(run)), Vec::<String>::new(), "processes are left");
    assert!(newest_checkpoint(&job.path(run)) < 40, "the link was cut after the end");
    nodes.set_link("up");
}

#[test]
fn reinforcement_learning_on_two_nodes_is_that_on_one() {
    let Some(nodes) = Nodes::new() else { return };
    let job = rlhf::job();
    let one_node = rlhf::run(&job, "one", 2, &[]);
    let start = |name: &str, sets: &[&str]| {
        [0, 1].map(|node| {
            let command = rlhf::command(&job, name, 1, sets);
            Running::start(nodes.inside(node, &command), job.path(&format!("{name}-{node}.log")))
        })
    };
    for (node, (code, said)) in start("two", &[]).map(Running::finish).into_iter().enumerate() {
        assert_eq!(code, Some(0), "node {node}:\n{said}");
    }
    let two_nodes = rlhf::metrics(&job.path("two"));
    for step in 1..=4 {
        assert_eq!(rlhf::of_learning(&two_nodes[&step]), rlhf::of_learning(&one_node[&step]), "step {step}");
    }
    let start_and_save = |name: &str| {
        let running = start(name, &["training.steps=2000"]);
        let begin = Instant::now();
        while !job.path(name).join("checkpoint/driver-00000002.json").exists() {
            let said = running.each_ref().map(Running::said);
            assert!(begin.elapsed() < Duration::from_secs(100), "no checkpoint:\n{}\n{}", said[0], said[1]);
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    };
    // A node without the driver is asked to end: both finish the step, save, and end well.
    let stopped = start_and_save("stopped");
    stopped[1].terminate();
    // As a scheduler that signals all nodes, one after the other: the driver has heard of the first by then.
    let begin = Instant::now();
    while !job.path("stopped").join(".stop-asked").exists() && begin.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(250));
    stopped[0].terminate();
    let [(code, said), (other_code, other_said)] = stopped.map(Running::finish);
    assert_eq!((code, other_code), (Some(143), Some(143)), "node 0:\n{said}\nnode 1:\n{other_said}");
    assert!(said.contains("the run ended after step") && other_said.contains("the run ended"), "{said}\n{other_said}");
    let last = rlhf::metrics(&job.path("stopped")).into_keys().max().unwrap();
    assert!(
        job.path("stopped").join(format!("checkpoint/driver-{last:08}.json")).exists(),
        "step {last} was not saved"
    );
    assert!(!job.path("stopped").join(".stop-asked").exists());
    // The driver is killed: both nodes end, and say why.
    let killed = start_and_save("killed");
    rlhf::kill(&job.path("killed"), "driver", "GROUP_RANK=0");
    let [(code, said), (other_code, other_said)] = killed.map(Running::finish);
    assert!(code != Some(0) && said.contains("driver failed first"), "{code:?}\n{said}");
    assert!(other_code == Some(5) && other_said.contains("driver"), "{other_code:?}\n{other_said}");
    assert_eq!(processes_of(&job.path("killed")), Vec::<String>::new(), "processes are left");
}
