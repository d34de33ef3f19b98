//! Ranks as processes on CPUs: messages over libtorch's Gloo, one TCP connection per pair of ranks.
//!
//! Only Gloo's point-to-point messages are used. They take uneven sizes, can be aborted, and say which peer failed;
//! its collectives do none of this, and their sums depend on where a bucket starts.
//!
//! ```text
//!   sender, slot 2g + lane ...            receiver
//!   small:  [header | payload]     ---->  one receive of header + INLINE_BYTES
//!   large:  [header], [payload]    ---->  header, checked; only then a receive for exactly the payload
//!   huge:   [header], [payload], [byte] ->  as above; waits for the byte, which comes after the payload
//! ```
//!
//! The byte is there for the receiver's sake: Gloo tells a connection's end to the receives that have not begun, and
//! forgets the one whose message has half arrived, which then waits for its deadline.
//!
//! So a message of another call or size is never written into a tensor, nor overruns a receive (which ends the process
//! inside Gloo). When a rank fails it writes to the store whom it blames, before its connections close: those that see
//! it leave follow that to the rank that began.
//!
//! Groups share the connections and may be used by several threads, each group by one at a time: messages of different
//! groups have different slots, and within a slot they keep their order. The first failure of any group ends the
//! connections of all, and is what the calls of the others fail with.
//!
//! | thread | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | a group's thread | a message | the peer; its death (connection closed); abort; failure of another group | the call's deadline |
//! | a thread whose call fails | the one that failed first, which asks as follows | that one | `5 * BLAME_WAIT` |
//! | failing rank | a thread that asks the store for the blame of the rank it lost | the store | `BLAME_WAIT` |
#![allow(unsafe_code)]

use super::backend::{AbortHandle, Backend, Call, Failure, Header, SubGroup, Transfer};
use super::communicator::{CommOptions, Communicator};
use super::error::{CommError, CommErrorKind, Operation};
use super::store::{RawStore, Store, StoreOptions, c_string, checked, milliseconds};
use std::ffi::{c_char, c_int};
use std::net::{IpAddr, ToSocketAddrs, UdpSocket};
use std::panic::Location;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// Payloads up to this size travel with their header.
const INLINE_BYTES: usize = 4096;
/// Payloads from this size on are followed by a byte: smaller ones rarely arrive by halves, and a message more costs some
/// ten microseconds.
const FOLLOWED_BYTES: usize = 256 << 10;
/// How long a rank looks for what the rank that it lost has to say. Ranks that time out close their connections up to
/// half of this before they can say why.
const BLAME_WAIT: Duration = Duration::from_millis(2000);

/// What Gloo says on all connections after a wait of this rank ran into its deadline (pair.cc, unbound_buffer.cc).
const OWN_TIMEOUT: &str = "Application timeout caused pair closure";

/// How long the master's name may be unknown.
const NAME_WAIT: Duration = Duration::from_secs(60);

/// Opaque: lives in the shim.
#[repr(C)]
struct RawMesh {
    _private: [u8; 0],
}

/// Opaque: lives in the shim.
#[repr(C)]
struct RawWork {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn tangelo_gloo_connect(
        store: *mut RawStore,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        interface: *const c_char,
        host: *const c_char,
        timeout_ms: i64,
        out: *mut *mut RawMesh,
    ) -> *mut c_char;
    fn tangelo_gloo_hang_up(mesh: *mut RawMesh);
    fn tangelo_gloo_close(mesh: *mut RawMesh);
    fn tangelo_gloo_start(
        mesh: *mut RawMesh,
        receive: bool,
        peer: c_int,
        slot: c_int,
        data: *mut u8,
        size: usize,
        out: *mut *mut RawWork,
    ) -> *mut c_char;
    fn tangelo_gloo_wait(work: *mut RawWork, timeout_ms: i64, done: *mut bool) -> *mut c_char;
    fn tangelo_gloo_free(mesh: *mut RawMesh, work: *mut RawWork);
    fn tangelo_gloo_abort(mesh: *mut RawMesh);
}

/// How this process joins the others.
#[derive(Clone, Debug)]
pub struct GlooOptions {
    /// This process' global rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Host of the store (MASTER_ADDR).
    pub master_addr: String,
    /// Port of the store (MASTER_PORT).
    pub master_port: u16,
    /// Whether this process serves the store: rank 0, unless torchrun's agent does.
    pub host_store: bool,
    /// Tells apart attempts and jobs that share a store.
    pub prefix: String,
    /// Deadline for the ranks to meet.
    pub init_timeout: Duration,
    /// Deadline of every call.
    pub timeout: Duration,
    /// Network interface to use; `None`: the one that leads to the master.
    pub interface: Option<String>,
}

/// Meets the other ranks and connects to each of them.
#[track_caller]
pub fn connect(options: &GlooOptions) -> Result<Communicator, CommError> {
    let site = Location::caller();
    if options.size == 1 {
        return Ok(Communicator::single());
    }
    let store = open_store(options, site)?;
    connect_over(&store, options, site)
}

/// The store that the options name.
pub(super) fn open_store(options: &GlooOptions, site: &'static Location<'static>) -> Result<Store, CommError> {
    // A wrong name would be asked for again until the whole time to meet is over.
    wait_for_name(options).map_err(|detail| connect_error(options, site, detail))?;
    let store = StoreOptions {
        host: options.master_addr.clone(),
        port: options.master_port,
        serve: options.host_store,
        timeout: options.init_timeout,
    };
    Store::open(&store).map_err(|error| connect_error(options, site, error.to_string()))
}

/// As [`connect`], over a store that is open already.
#[track_caller]
pub fn connect_with(store: &Store, options: &GlooOptions) -> Result<Communicator, CommError> {
    if options.size == 1 {
        return Ok(Communicator::single());
    }
    connect_over(store, options, Location::caller())
}

fn connect_over(
    store: &Store,
    options: &GlooOptions,
    site: &'static Location<'static>,
) -> Result<Communicator, CommError> {
    let mesh = Mesh::connect(store, options).map_err(|detail| connect_error(options, site, detail))?;
    let ranks: Vec<usize> = (0..options.size).collect();
    let backend = GlooBackend { mesh: Arc::new(mesh), id: 0, members: ranks.clone() };
    let comm_options =
        CommOptions { timeout: options.timeout, init_timeout: options.init_timeout, device: Device::Cpu };
    Ok(Communicator::new(Some(Box::new(backend)), "world", options.rank, ranks, comm_options))
}

fn connect_error(options: &GlooOptions, site: &'static Location<'static>, detail: String) -> CommError {
    CommError {
        rank: options.rank,
        phase: None,
        group: "world".into(),
        operation: Operation::Connect,
        sequence: 0,
        call_site: site,
        kind: CommErrorKind::Backend(detail),
        hint: Some(format!(
            "{} ranks meet at {}:{} within {:.0} s; every one must start, with the same MASTER_ADDR, MASTER_PORT and \
             WORLD_SIZE",
            options.size,
            options.master_addr,
            options.master_port,
            options.init_timeout.as_secs_f64()
        )),
    }
}

/// Until the master's name is known: in a cluster it may appear only when its machine has started.
fn wait_for_name(options: &GlooOptions) -> Result<(), String> {
    let begin = Instant::now();
    loop {
        match own_address(&options.master_addr, options.master_port) {
            Ok(_) => return Ok(()),
            Err(detail) if begin.elapsed() >= NAME_WAIT.min(options.init_timeout) => return Err(detail),
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    }
}

/// The address of this machine that others reach it by: the one from which it reaches the master.
fn own_address(master_addr: &str, master_port: u16) -> Result<IpAddr, String> {
    let explain = |error: std::io::Error| format!("no way to the master at {master_addr}: {error}");
    let master = (master_addr, master_port).to_socket_addrs().map_err(explain)?.next();
    let master = master.ok_or_else(|| format!("{master_addr} has no address"))?;
    if master.ip().is_loopback() {
        return Ok(master.ip());
    }
    let any: IpAddr = if master.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    // Connecting a UDP socket sends nothing: it asks the routing table.
    let socket = UdpSocket::bind((any, 0)).map_err(explain)?;
    socket.connect(master).map_err(explain)?;
    socket.local_addr().map(|address| address.ip()).map_err(explain)
}

/// The connections of this process to all others, shared by all its groups.
struct Mesh {
    raw: *mut RawMesh,
    rank: usize,
    store: Store,
    prefix: String,
    aborted: Mutex<Option<String>>,
    /// The first failure of any group, once it is known with whom it began. Locked while that is asked.
    settled: Mutex<Option<CommErrorKind>>,
}

// SAFETY: the shim's mesh is tied to no thread. Works are started under one lock of the mesh, and noted, freed and
// aborted under another; a work is waited for and freed by the thread that started it. Hanging up takes both.
unsafe impl Send for Mesh {}
// SAFETY: as above.
unsafe impl Sync for Mesh {}

impl Drop for Mesh {
    fn drop(&mut self) {
        // SAFETY: works borrow the mesh and groups share it, so this is the last of all of them; closed once.
        unsafe { tangelo_gloo_close(self.raw) };
    }
}

impl Mesh {
    fn connect(store: &Store, options: &GlooOptions) -> Result<Mesh, String> {
        let as_int = |n: usize| c_int::try_from(n).map_err(|_| format!("{n} ranks are too many"));
        let prefix = c_string(&options.prefix)?;
        let interface = c_string(options.interface.as_deref().unwrap_or(""))?;
        let host = match options.interface {
            Some(_) => c_string("")?,
            None => c_string(&own_address(&options.master_addr, options.master_port)?.to_string())?,
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: all strings live for the length of the call, the store is open, `raw` is written on success.
        checked(unsafe {
            tangelo_gloo_connect(
                store.raw(),
                prefix.as_ptr(),
                as_int(options.rank)?,
                as_int(options.size)?,
                interface.as_ptr(),
                host.as_ptr(),
                milliseconds(options.init_timeout),
                &mut raw,
            )
        })?;
        Ok(Mesh {
            raw,
            rank: options.rank,
            store: store.clone(),
            prefix: options.prefix.clone(),
            aborted: Mutex::new(None),
            settled: Mutex::new(None),
        })
    }

    fn aborted(&self) -> Option<Failure> {
        let reason = self.aborted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        reason.map(|reason| CommErrorKind::Aborted(reason).into())
    }

    fn abort(&self, reason: &str) {
        self.aborted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        // SAFETY: the mesh is open; the shim allows this from any thread.
        unsafe { tangelo_gloo_abort(self.raw) };
    }

    /// Finds out with whom it began, and tells those that will see this rank leave. Later failures of this rank only
    /// follow from the first one.
    fn settle(&self, failure: Failure) -> Failure {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kind) = &*settled {
            return kind.clone().into();
        }
        let failure = match &failure.kind {
            CommErrorKind::PeerLost { rank: Some(rank), .. } => self.follow(*rank, BLAME_WAIT).unwrap_or(failure),
            CommErrorKind::Timeout { rank: Some(rank), .. } => {
                // At once: those that wait for this rank run into their deadlines now, too, and ask only for so long.
                self.blame(&failure.kind);
                self.follow(*rank, BLAME_WAIT / 2).unwrap_or(failure)
            }
            _ => failure,
        };
        self.blame(&failure.kind);
        *settled = Some(failure.kind.clone());
        failure
    }

    /// Says in the store with whom it began. Only helps others: where the store is gone they say what they saw
    /// themselves.
    fn blame(&self, kind: &CommErrorKind) {
        let culprit = match kind {
            CommErrorKind::PeerLost { rank: Some(rank), .. } | CommErrorKind::Timeout { rank: Some(rank), .. } => *rank,
            _ => self.rank,
        };
        let (store, key, text) = (self.store.clone(), blame_key(&self.prefix, self.rank), format!("{culprit}\n{kind}"));
        _ = within(BLAME_WAIT / 2, move || store.set(&key, text.as_bytes()));
    }

    /// A connection that Gloo finds closed. It closes all of them when any wait runs into its deadline: then the thread
    /// that waited is about to say so, and speaks first.
    fn lost(&self, peer: usize, detail: &str) -> Failure {
        let begin = Instant::now();
        let is_silent = || self.settled.try_lock().is_ok_and(|settled| settled.is_none());
        while detail.contains(OWN_TIMEOUT) && is_silent() && begin.elapsed() < BLAME_WAIT / 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Gloo's texts begin with the source line that threw.
        let detail = detail.rsplit("] ").next().unwrap_or(detail).trim_end_matches('.');
        CommErrorKind::PeerLost { rank: Some(peer), detail: detail.to_owned() }.into()
    }

    /// What a lost rank wrote before it left, and those that it blames, as this rank's own failure.
    fn follow(&self, rank: usize, patience: Duration) -> Option<Failure> {
        let (store, prefix, begin) = (self.store.clone(), self.prefix.clone(), Instant::now());
        let (mut seen, mut next, mut found) = (vec![self.rank], rank, None);
        let read = move || loop {
            let Ok(text) = store.get(&blame_key(&prefix, next)) else { return found };
            let blame = text.as_deref().map(read_blame);
            match blame {
                Some(Some((culprit, detail))) if culprit == next => return Some((culprit, detail)),
                // Two that wait for each other: no rank blames itself for what it waited for.
                Some(Some((culprit, _))) if seen.contains(&culprit) => return found,
                Some(Some((culprit, detail))) => {
                    found = Some((culprit, format!("rank {next} left: {detail}")));
                    seen.push(next);
                    next = culprit;
                }
                Some(None) => return found,
                None if begin.elapsed() >= patience => return found,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let (culprit, detail) = within(patience * 2, read)??;
        Some(CommErrorKind::PeerLost { rank: Some(culprit), detail }.into())
    }
}

fn blame_key(prefix: &str, rank: usize) -> String {
    format!("{prefix}/blame/{rank}")
}

fn read_blame(text: &[u8]) -> Option<(usize, String)> {
    let text = String::from_utf8_lossy(text);
    let (culprit, detail) = text.split_once('\n')?;
    Some((culprit.parse().ok()?, detail.to_owned()))
}

/// The answer of the store, if it comes in time. A server that is stopped keeps its connections and answers nothing, and
/// a client of TCPStore waits for it without a deadline: such a wait is left behind on a thread of its own.
fn within<R: Send + 'static>(patience: Duration, ask: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let asking = std::thread::Builder::new().name("store".into()).spawn(move || tell.send(ask()));
    asking.ok()?;
    told.recv_timeout(patience).ok()
}

/// A message under way. Borrows the bytes it reads or writes.
struct Work<'a> {
    raw: *mut RawWork,
    mesh: &'a Mesh,
    /// Global rank of the peer.
    peer: usize,
}

impl<'a> Work<'a> {
    /// # Safety
    /// `size` bytes at `data` must be valid until the work is dropped, and untouched by others where it receives.
    unsafe fn start(
        mesh: &'a Mesh,
        receive: bool,
        peer: usize,
        slot: c_int,
        data: *mut u8,
        size: usize,
    ) -> Result<Work<'a>, Failure> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the mesh is open; the caller vouches for the bytes; `raw` is written on success.
        let started =
            checked(unsafe { tangelo_gloo_start(mesh.raw, receive, peer as c_int, slot, data, size, &mut raw) });
        started.map_err(|detail| mesh.lost(peer, &detail))?;
        Ok(Work { raw, mesh, peer })
    }

    fn wait(&self, call: &Call) -> Result<(), Failure> {
        let left = call.deadline().saturating_duration_since(Instant::now());
        let mut done = false;
        // SAFETY: the work is alive; `done` is written before the call returns.
        let waited = checked(unsafe { tangelo_gloo_wait(self.raw, milliseconds(left), &mut done) });
        if let Some(failure) = self.mesh.aborted() {
            return Err(failure);
        }
        match waited {
            Ok(()) if done => Ok(()),
            Ok(()) => Err(Failure::backend("a wait ended without a message")),
            Err(_) if Instant::now() >= call.deadline() => Err(call.timed_out(Some(self.peer))),
            Err(detail) => Err(self.mesh.lost(self.peer, &detail)),
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        // SAFETY: made by tangelo_gloo_start, freed once. Gloo lets go of the bytes before this returns.
        unsafe { tangelo_gloo_free(self.mesh.raw, self.raw) };
    }
}

struct GlooBackend {
    mesh: Arc<Mesh>,
    id: u32,
    /// Global ranks of the group.
    members: Vec<usize>,
}

fn bytes_of(tensor: &Tensor) -> *mut u8 {
    tensor.data_ptr().cast()
}

/// A receive of a header, and the payload with it if that is small.
struct Inbox {
    buffer: Vec<u8>,
}

impl GlooBackend {
    /// Slots of a lane: headers, payloads.
    fn slots(&self, call: &Call) -> Result<[c_int; 2], Failure> {
        let slot = u64::from(self.id) * 4 + call.lane as u64 * 2;
        let slot = c_int::try_from(slot).map_err(|_| Failure::backend("more groups than message slots"))?;
        Ok([slot, slot + 1])
    }

    fn try_exchange(&self, call: &Call, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failure> {
        let mesh = self.mesh.as_ref();
        if let Some(failure) = mesh.aborted() {
            return Err(failure);
        }
        let [header_slot, payload_slot] = self.slots(call)?;
        // Buffers are made before the works that borrow them, so they are dropped after these.
        let mut outbox: Vec<Vec<u8>> = sends.iter().map(|send| first_message(call, send)).collect();
        let mut inbox: Vec<Inbox> =
            receives.iter().map(|_| Inbox { buffer: vec![0; Header::SIZE + INLINE_BYTES] }).collect();
        let (mut byte_out, mut bytes_in) = ([0u8], vec![0u8; receives.len()]);
        let mut sent = Vec::with_capacity(3 * sends.len());
        let mut headers = Vec::with_capacity(receives.len());
        let mut payloads = Vec::with_capacity(receives.len());
        let mut followers = Vec::new();

        for (receive, inbox) in receives.iter().zip(&mut inbox) {
            let (peer, buffer) = (self.members[receive.peer], &mut inbox.buffer);
            // SAFETY: the buffer outlives the work and is read only after its wait.
            headers.push(unsafe { Work::start(mesh, true, peer, header_slot, buffer.as_mut_ptr(), buffer.len()) }?);
        }
        for (send, message) in sends.iter().zip(&mut outbox) {
            let peer = self.members[send.peer];
            // SAFETY: the message outlives the work.
            sent.push(unsafe { Work::start(mesh, false, peer, header_slot, message.as_mut_ptr(), message.len()) }?);
            if send.num_bytes() > INLINE_BYTES {
                // SAFETY: the caller's tensor is contiguous, of this many bytes, and outlives the call.
                sent.push(unsafe {
                    Work::start(mesh, false, peer, payload_slot, bytes_of(&send.data), send.num_bytes())
                }?);
            }
            if send.num_bytes() >= FOLLOWED_BYTES {
                // SAFETY: the byte outlives the work; several sends only read it.
                sent.push(unsafe { Work::start(mesh, false, peer, payload_slot, byte_out.as_mut_ptr(), 1) }?);
            }
        }
        for (((receive, inbox), header), byte_in) in receives.iter().zip(&inbox).zip(&headers).zip(&mut bytes_in) {
            header.wait(call)?;
            self.check_header(call, receive, &inbox.buffer)?;
            if receive.num_bytes() <= INLINE_BYTES {
                // SAFETY: the tensor is contiguous and of this many bytes, the buffer at least as long; no overlap.
                unsafe {
                    let payload = inbox.buffer.as_ptr().add(Header::SIZE);
                    std::ptr::copy_nonoverlapping(payload, bytes_of(&receive.data), receive.num_bytes());
                }
            } else {
                let (peer, data) = (self.members[receive.peer], bytes_of(&receive.data));
                // SAFETY: the tensor is contiguous, of this many bytes, and outlives the call.
                payloads.push(unsafe { Work::start(mesh, true, peer, payload_slot, data, receive.num_bytes()) }?);
                if receive.num_bytes() >= FOLLOWED_BYTES {
                    // SAFETY: each work has a byte of its own, which outlives it.
                    followers.push(unsafe { Work::start(mesh, true, peer, payload_slot, byte_in, 1) }?);
                }
            }
        }
        followers.iter().chain(&payloads).chain(&sent).try_for_each(|work| work.wait(call))
    }

    fn check_header(&self, call: &Call, receive: &Transfer, buffer: &[u8]) -> Result<(), Failure> {
        let from = self.members[receive.peer];
        let encoded = buffer.first_chunk::<{ Header::SIZE }>();
        let theirs = encoded.and_then(Header::decode);
        let theirs =
            theirs.ok_or_else(|| Failure::backend(format!("rank {from} sent something that is no message")))?;
        Ok(call.expected(receive.num_bytes()).check(self.members[call.rank], &theirs, from)?)
    }
}

/// The header, followed by the payload where that is small.
fn first_message(call: &Call, send: &Transfer) -> Vec<u8> {
    let mut message = call.header(send.num_bytes()).encode().to_vec();
    if send.num_bytes() <= INLINE_BYTES {
        // SAFETY: the tensor is contiguous, on the CPU and of this many bytes.
        message.extend_from_slice(unsafe { std::slice::from_raw_parts(bytes_of(&send.data), send.num_bytes()) });
    }
    message
}

impl Backend for GlooBackend {
    fn exchange(&mut self, call: &Call, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failure> {
        self.try_exchange(call, sends, receives).map_err(|failure| self.mesh.settle(failure))
    }

    fn split(&mut self, _call: &Call, group: &SubGroup) -> Result<Box<dyn Backend>, Failure> {
        let members = group.members.iter().map(|&member| self.members[member]).collect();
        Ok(Box::new(GlooBackend { mesh: Arc::clone(&self.mesh), id: group.id, members }))
    }

    fn failed(&mut self, kind: &CommErrorKind) {
        // What failed beside the messages (a panic, no memory) is the first failure of all groups, too.
        _ = self.mesh.settle(kind.clone().into());
        // SAFETY: the mesh is open. Works of other threads are aborted and keep their connections until they are freed;
        // later calls of other groups get an error from the shim.
        unsafe { tangelo_gloo_hang_up(self.mesh.raw) };
    }

    fn abort_handle(&self) -> AbortHandle {
        // Weak: a forgotten handle must not keep the connections open, by which others see this rank leave.
        let mesh: Weak<Mesh> = Arc::downgrade(&self.mesh);
        AbortHandle::new(move |reason| {
            if let Some(mesh) = mesh.upgrade() {
                mesh.abort(reason);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An address of this machine that is not loopback, if it has a way out.
    fn outward_address() -> Option<IpAddr> {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
        // TEST-NET-1 (RFC 5737): nothing is sent there.
        socket.connect(("192.0.2.1", 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
    }

    #[test]
    fn the_own_address_is_the_one_that_leads_to_the_master() {
        assert_eq!(own_address("127.0.0.1", 29500).unwrap(), IpAddr::from([127, 0, 0, 1]));
        let error = own_address("no-such-host.invalid", 29500).unwrap_err();
        assert!(error.contains("no way to the master at no-such-host.invalid"), "{error}");
        match outward_address() {
            Some(ip) => assert_eq!(own_address(&ip.to_string(), 29500).unwrap(), ip),
            None => println!("skipped: this machine has loopback only"),
        }
    }

    #[test]
    fn ranks_meet_over_an_address_that_is_not_loopback() {
        let Some(ip) = outward_address() else {
            println!("skipped: this machine has loopback only");
            return;
        };
        let timeout = Duration::from_secs(60);
        let options = StoreOptions { host: ip.to_string(), port: 0, serve: true, timeout };
        let store = Store::open(&options).unwrap();
        let rank = &|rank: usize| {
            let options = GlooOptions {
                rank,
                size: 2,
                master_addr: ip.to_string(),
                master_port: store.port(),
                host_store: false,
                prefix: "outward".into(),
                init_timeout: timeout,
                timeout,
                interface: None,
            };
            let comm = connect(&options).unwrap();
            comm.all_gather_bytes(&[rank as u8]).unwrap()
        };
        let answers = std::thread::scope(|scope| {
            let threads = [0, 1].map(|number| scope.spawn(move || rank(number)));
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(answers, [vec![vec![0], vec![1]], vec![vec![0], vec![1]]]);
    }

    #[test]
    fn nobody_at_the_store_is_explained() {
        let options = GlooOptions {
            rank: 1,
            size: 2,
            master_addr: "127.0.0.1".into(),
            // Port 1 needs privileges to listen on, so nobody does.
            master_port: 1,
            host_store: false,
            prefix: "nobody".into(),
            init_timeout: Duration::from_millis(300),
            timeout: Duration::from_secs(1),
            interface: None,
        };
        let error = connect(&options).err().unwrap();
        assert_eq!((error.operation, error.rank), (Operation::Connect, 1));
        let text = error.to_string();
        assert!(
            text.contains("is rank 0 (or torchrun's agent) running") && text.contains("every one must start"),
            "{text}"
        );
    }
}
