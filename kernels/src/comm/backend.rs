//! What a back end must do, and the header that travels with every message.

use super::error::{CommErrorKind, Operation};
use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// Why a back end failed, before the communicator adds who, what and where.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub kind: CommErrorKind,
    pub hint: Option<String>,
}

impl Failure {
    pub fn backend(detail: impl Into<String>) -> Failure {
        CommErrorKind::Backend(detail.into()).into()
    }

    pub fn invalid(detail: impl Into<String>) -> Failure {
        CommErrorKind::Invalid(detail.into()).into()
    }
}

impl From<CommErrorKind> for Failure {
    fn from(kind: CommErrorKind) -> Failure {
        Failure { kind, hint: None }
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Failure {
        Failure::backend(error.to_string())
    }
}

/// Messages of the two lanes never meet, so a rank may be inside a point-to-point call while others are ahead or
/// behind in collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Lane {
    Collective = 0,
    PointToPoint = 1,
}

/// One call, as the back end sees it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub operation: Operation,
    pub lane: Lane,
    /// Number of the call in its lane: of the group for collectives, of the pair for point-to-point.
    pub sequence: u64,
    /// The number of what is received, where that is counted apart.
    pub receive_sequence: u64,
    pub kind: Kind,
    /// Must be equal on all ranks: made from counts, roots and shapes. 0 where ranks may differ.
    pub signature: u64,
    pub site: &'static Location<'static>,
    pub started: Instant,
    pub timeout: Duration,
    /// This rank within the group, and the group's size.
    pub rank: usize,
    pub size: usize,
}

impl Call {
    pub fn deadline(&self) -> Instant {
        self.started + self.timeout
    }

    pub fn timed_out(&self, rank: Option<usize>) -> Failure {
        CommErrorKind::Timeout { waited: self.started.elapsed(), rank }.into()
    }

    /// What a message of this size says that is received in this call.
    pub fn expected(&self, num_bytes: usize) -> Header {
        Header { sequence: self.receive_sequence, ..self.header(num_bytes) }
    }

    /// What a message of this size says that is sent in this call.
    pub fn header(&self, num_bytes: usize) -> Header {
        // A send on one side is a receive on the other.
        let operation = if self.operation == Operation::Receive { Operation::Send } else { self.operation };
        Header {
            operation,
            kind: kind_code(self.kind),
            sequence: self.sequence,
            num_bytes: num_bytes as u64,
            signature: self.signature,
            site: format!("{}:{}", self.site.file(), self.site.line()),
        }
    }
}

/// A tensor on its way to or from a peer (a rank within the group). Contiguous.
pub(crate) struct Transfer {
    pub peer: usize,
    pub data: Tensor,
}

impl Transfer {
    pub fn num_bytes(&self) -> usize {
        self.data.numel() * self.data.kind().elt_size_in_bytes()
    }
}

/// The members of a new group and what tells its messages apart.
pub(crate) struct SubGroup {
    /// Different from that of every other group that shares a member with this one.
    pub id: u32,
    pub name: String,
    /// Ranks within the parent, in the order of the new group.
    pub members: Vec<usize>,
}

/// Moves tensors between the ranks of one group.
///
/// Implementations return only when every tensor of the call was received and every sent one may be reused.
pub(crate) trait Backend: Send {
    /// Sends and receives at the same time. Empty tensors are not passed. At most one message per peer and direction.
    fn exchange(&mut self, call: &Call, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failure>;

    /// Writes all ranks' inputs, of `counts` elements each, one after the other into the flat `output`.
    /// This rank's own part is already there.
    fn all_gather(&mut self, call: &Call, output: &Tensor, input: &Tensor, counts: &[usize]) -> Result<(), Failure> {
        let offsets = offsets(counts);
        let sends: Vec<Transfer> = peers(call)
            .filter(|_| input.numel() > 0)
            .map(|peer| Transfer { peer, data: input.shallow_clone() })
            .collect();
        let receives: Vec<Transfer> = peers(call)
            .filter(|&peer| counts[peer] > 0)
            .map(|peer| Transfer { peer, data: output.narrow(0, offsets[peer] as i64, counts[peer] as i64) })
            .collect();
        self.exchange(call, &sends, &receives)
    }

    /// Copies `root`'s data into everybody's.
    fn broadcast(&mut self, call: &Call, data: &Tensor, root: usize) -> Result<(), Failure> {
        let message = |peer| Transfer { peer, data: data.shallow_clone() };
        if call.rank == root {
            let sends: Vec<Transfer> = peers(call).map(message).collect();
            self.exchange(call, &sends, &[])
        } else {
            self.exchange(call, &[], &[message(root)])
        }
    }

    /// A back end for some of the ranks; called by exactly these.
    fn split(&mut self, call: &Call, group: &SubGroup) -> Result<Box<dyn Backend>, Failure>;

    /// Told once when a call failed: no further call follows.
    fn failed(&mut self, _kind: &CommErrorKind) {}

    /// What another thread may use to end a call of this rank.
    fn abort_handle(&self) -> AbortHandle;
}

/// The other ranks, beginning after this one, so that not all ranks talk to rank 0 first.
pub(crate) fn peers(call: &Call) -> impl Iterator<Item = usize> + use<> {
    let (rank, size) = (call.rank, call.size);
    (1..size).map(move |step| (rank + step) % size)
}

/// Where each part begins.
pub(crate) fn offsets(counts: &[usize]) -> Vec<usize> {
    counts
        .iter()
        .scan(0, |at, count| {
            let offset = *at;
            *at += count;
            Some(offset)
        })
        .collect()
}

/// Ends the running and all later calls of one rank's communicator from any thread.
///
/// Peers notice as they notice a death: at once where the back end sees it, else at their deadline.
#[derive(Clone)]
pub struct AbortHandle {
    abort: Arc<dyn Fn(&str) + Send + Sync>,
}

impl AbortHandle {
    pub(crate) fn new(abort: impl Fn(&str) + Send + Sync + 'static) -> AbortHandle {
        AbortHandle { abort: Arc::new(abort) }
    }

    /// Makes the running call, and all later ones, fail with [`CommErrorKind::Aborted`].
    pub fn abort(&self, reason: &str) {
        (self.abort)(reason);
    }
}

/// What a message says about the call it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub operation: Operation,
    pub kind: u8,
    pub sequence: u64,
    pub num_bytes: u64,
    pub signature: u64,
    /// `file:line` of the call; not compared.
    pub site: String,
}

impl Header {
    /// Bytes of an encoded header.
    pub const SIZE: usize = 128;
    const MAGIC: u32 = 0x7a6e_6c01;
    const SITE_AT: usize = 32;

    /// Fixed-size little-endian form, as it goes over the wire. Long call sites keep their end.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let site = self.site.as_bytes();
        let site = &site[site.len().saturating_sub(Self::SIZE - Self::SITE_AT)..];
        bytes[..4].copy_from_slice(&Self::MAGIC.to_le_bytes());
        bytes[4] = self.operation as u8;
        bytes[5] = self.kind;
        bytes[6] = site.len() as u8;
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.num_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.signature.to_le_bytes());
        bytes[Self::SITE_AT..Self::SITE_AT + site.len()].copy_from_slice(site);
        bytes
    }

    /// The reverse of [`Header::encode`]; `None` for anything else.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Header> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let magic = u32::from_le_bytes(std::array::from_fn(|i| bytes[i]));
        let site = bytes.get(Self::SITE_AT..Self::SITE_AT + usize::from(bytes[6]))?;
        (magic == Self::MAGIC).then_some(())?;
        Some(Header {
            operation: *Operation::ALL.get(usize::from(bytes[4]))?,
            kind: bytes[5],
            sequence: word(8),
            num_bytes: word(16),
            signature: word(24),
            site: String::from_utf8_lossy(site).into_owned(),
        })
    }

    /// Whether two ranks are in the same call, sizes of single messages aside.
    pub fn same_call(&self, other: &Header) -> bool {
        let key = |h: &Header| (h.operation, h.kind, h.sequence, h.signature);
        key(self) == key(other)
    }

    /// An error that names both calls, unless they are the same. `mine` receives what `theirs` sends.
    pub fn check(&self, mine: usize, other: &Header, theirs: usize) -> Result<(), CommErrorKind> {
        if self.same_call(other) && self.num_bytes == other.num_bytes {
            return Ok(());
        }
        let mut text = format!("rank {mine} is in {}, rank {theirs} in {}", self.describe(), other.describe());
        if self.operation == other.operation && self.signature != other.signature {
            text += "; their counts, shapes or roots differ";
        }
        if self.num_bytes != other.num_bytes {
            text += &format!("; rank {mine} expects {} bytes, rank {theirs} sends {}", self.num_bytes, other.num_bytes);
        }
        Err(CommErrorKind::Mismatch(text))
    }

    fn describe(&self) -> String {
        format!("{} #{} of {} at {}", self.operation, self.sequence, kind_name(self.kind), self.site)
    }
}

const KINDS: [(Kind, &str); 8] = [
    (Kind::Float, "fp32"),
    (Kind::BFloat16, "bf16"),
    (Kind::Half, "fp16"),
    (Kind::Double, "fp64"),
    (Kind::Int64, "int64"),
    (Kind::Int, "int32"),
    (Kind::Uint8, "uint8"),
    (Kind::Bool, "bool"),
];

/// Whether tensors of this type can be sent.
pub(crate) fn is_supported(kind: Kind) -> bool {
    KINDS.iter().any(|(known, _)| *known == kind)
}

fn kind_code(kind: Kind) -> u8 {
    KINDS.iter().position(|(known, _)| *known == kind).map_or(u8::MAX, |code| code as u8)
}

fn kind_name(code: u8) -> &'static str {
    KINDS.get(usize::from(code)).map_or("an unknown type", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(operation: Operation, num_bytes: u64, site: &str) -> Header {
        Header { operation, kind: 1, sequence: 7, num_bytes, signature: 0xabcd, site: site.into() }
    }

    #[test]
    fn headers_survive_the_wire() {
        for operation in Operation::ALL {
            let sent = header(operation, u64::MAX - 3, "trainer/src/dp.rs:12");
            assert_eq!(Header::decode(&sent.encode()), Some(sent));
        }
        let long = header(Operation::Barrier, 0, &"x/".repeat(200));
        let read = Header::decode(&long.encode()).unwrap();
        assert!(long.site.ends_with(&read.site) && read.site.len() == 96);
        assert_eq!(Header::decode(&[0; Header::SIZE]), None);
    }

    #[test]
    fn a_mismatch_names_both_calls() {
        let mine = header(Operation::AllReduce, 8, "a.rs:1");
        assert!(mine.check(0, &header(Operation::AllReduce, 8, "elsewhere.rs:9"), 1).is_ok());
        let text = mine.check(0, &header(Operation::AllGather, 8, "b.rs:2"), 3).unwrap_err().to_string();
        for part in ["rank 0 is in all_reduce #7 of bf16", "a.rs:1", "rank 3 in all_gather #7", "b.rs:2"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(mine.check(0, &header(Operation::AllReduce, 9, "a.rs:1"), 1).is_err());
    }
}
