//! The proof as `tangelo check` prints it.

use super::Proof;
use crate::table::{Align, Table, bytes, count};
use crate::traffic::{Traffic, minimum};
use std::time::Duration;
use tangelo_configs::Plan;

/// Groups, traffic, and what was shown.
pub fn render(plan: &Plan, proof: &Proof, took: Duration) -> String {
    if proof.groups.is_empty() {
        return "one rank: nothing is communicated\n".into();
    }
    let shown = format!(
        "{} ranks, {} calls: every group agrees, every send is received, nothing waits for ever (shown in {:.1} s)\n",
        proof.num_ranks,
        count(proof.num_calls as f64),
        took.as_secs_f64()
    );
    format!("{}\n{}\n{shown}", groups(proof), traffic(plan, proof))
}

fn groups(proof: &Proof) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("group", Left),
        ("ranks", Right),
        ("groups", Right),
        ("calls per step and rank", Right),
        ("bytes sent per step and rank", Right),
    ]);
    for one in &proof.groups {
        let numbers = [one.size.to_string(), one.num_groups.to_string(), one.calls.to_string(), bytes(one.bytes)];
        let [size, number, calls, sent] = numbers;
        table.row([one.group.name().into(), size, number, calls, sent]);
    }
    table.render()
}

/// By rank on average: the least is known for all of them together.
fn traffic(plan: &Plan, proof: &Proof) -> String {
    use Align::{Left, Right};
    let mut table =
        Table::new(&[("sent per step and rank, on average", Left), ("bytes", Right), ("least", Right), ("", Right)]);
    for (kind, (&sent, least)) in Traffic::ALL.into_iter().zip(proof.traffic.iter().zip(minimum(plan))) {
        if sent == 0 {
            continue;
        }
        let ranks = proof.num_ranks as f64;
        let (least, more) = match kind {
            Traffic::Coordination => (String::new(), String::new()),
            _ => (bytes((least / ranks) as u64), format!("{:+.1} %", 100.0 * (sent as f64 / least - 1.0))),
        };
        table.row([kind.name().into(), bytes((sent as f64 / ranks) as u64), least, more]);
    }
    table.render()
}
