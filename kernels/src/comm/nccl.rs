//! Ranks as processes with a GPU each: NCCL over NVLink, PCIe or the network.
//!
//! NCCL moves bytes only; sums are made by the code that all back ends share, so they have the same bits as on a CPU.
//! Every group has a stream of its own. At the start of a call it is made to wait for all that was queued so far on the
//! legacy default stream, where libtorch computes; the host then waits until the group's stream has done the call,
//! polling NCCL's own error state: so what was computed before a call is sent, what is computed after it sees what came,
//! and deadlines, aborts and the time that a call took mean what they say. A call in the background overlaps with what
//! is computed after it began; sums over ranks take their turn on the default stream.
//!
//! The communicator is non-blocking: `ncclInProgress` is polled like everything else, so that no call of NCCL, its
//! initialisation included, can hang this thread. It is used by one thread at a time, and closed by its last one; abort
//! handles only set a flag that the polling looks at. Groups are made in the same order by all their members. Calls of
//! several groups may be on the GPU at the same time: NCCL orders their kernels (NCCL_LAUNCH_ORDER_IMPLICIT) or needs
//! room on the GPU for all of them.
//!
//! libnccl is opened by its versioned name, which libtorch_cuda has loaded already; cudarc looks for unversioned names
//! only, which NVIDIA's wheels do not have, and panics without them. Its types are used, its loader is not.
//! NCCL does not check that ranks make the same call: here a mismatch ends at the deadline, in an error on every rank
//! that says where that rank was.
#![allow(unsafe_code)]

use super::backend::{AbortHandle, Backend, Call, Failure, SubGroup, Transfer};
use super::communicator::{CommOptions, Communicator};
use super::error::{CommError, CommErrorKind, Operation};
use super::store::Store;
use crate::device::{DeviceError, open_cuda};
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys::CUresult, sys::cuStreamQuery};
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclResult_t, ncclUniqueId};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::panic::Location;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// How this process joins the others.
#[derive(Clone, Debug)]
pub struct NcclOptions {
    /// This process' global rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Index of this rank's GPU in this process; two ranks must not share one.
    pub device_index: usize,
    /// Tells apart attempts and jobs that share a store.
    pub prefix: String,
    /// Deadline for the ranks to meet.
    pub init_timeout: Duration,
    /// Deadline of every call.
    pub timeout: Duration,
}

/// Meets the other ranks; the store carries NCCL's unique ids.
#[track_caller]
pub fn connect(store: &Store, options: &NcclOptions) -> Result<Communicator, CommError> {
    let site = Location::caller();
    let device = Device::Cuda(options.device_index);
    if options.size == 1 {
        return Ok(Communicator::single_on(device));
    }
    let ranks: Vec<usize> = (0..options.size).collect();
    let backend = NcclBackend::connect_world(store, options).map_err(|failure| CommError {
        rank: options.rank,
        phase: None,
        group: "world".into(),
        operation: Operation::Connect,
        sequence: 0,
        call_site: site,
        kind: failure.kind,
        hint: failure.hint,
    })?;
    let comm_options = CommOptions { timeout: options.timeout, init_timeout: options.init_timeout, device };
    Ok(Communicator::new(Some(Box::new(backend)), "world", options.rank, ranks, comm_options))
}

type Stream = *mut c_void;

macro_rules! library {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of libnccl that are used, resolved once.
        #[allow(non_snake_case)]
        struct Library { $($name: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Library {
            fn resolve(handle: *mut c_void) -> Result<Library, String> {
                Ok(Library { $($name: {
                    let name = concat!(stringify!($name), "\0");
                    // SAFETY: the handle is open and the name ends in a zero byte.
                    let symbol = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
                    if symbol.is_null() {
                        return Err(format!("libnccl.so.2 has no {}: it is too old", stringify!($name)));
                    }
                    // SAFETY: nccl.h 2.28 declares the function with this signature.
                    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(symbol) }
                },)* })
            }
        }
    };
}

library! {
    ncclGetVersion: fn(*mut c_int) -> ncclResult_t;
    ncclGetUniqueId: fn(*mut ncclUniqueId) -> ncclResult_t;
    ncclCommInitRankConfig: fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
    ncclCommGetAsyncError: fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
    ncclCommFinalize: fn(ncclComm_t) -> ncclResult_t;
    ncclCommDestroy: fn(ncclComm_t) -> ncclResult_t;
    ncclCommAbort: fn(ncclComm_t) -> ncclResult_t;
    ncclGetErrorString: fn(ncclResult_t) -> *const c_char;
    ncclGetLastError: fn(ncclComm_t) -> *const c_char;
    ncclGroupStart: fn() -> ncclResult_t;
    ncclGroupEnd: fn() -> ncclResult_t;
    ncclSend: fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> ncclResult_t;
    ncclRecv: fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> ncclResult_t;
    ncclAllGather: fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, Stream) -> ncclResult_t;
    ncclBroadcast: fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> ncclResult_t;
}

/// libnccl, or why there is none.
fn library() -> Result<&'static Library, Failure> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        open_cuda().map_err(|error: DeviceError| error.to_string())?;
        // SAFETY: libnccl's initialisers are made to be run by dlopen; the handle is never closed.
        let handle = unsafe { libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            return Err("libnccl.so.2 cannot be opened: install the CUDA build of torch 2.11.0, which brings it".into());
        }
        Library::resolve(handle)
    });
    library.as_ref().map_err(|detail| Failure::backend(detail.clone()))
}

/// Version of the NCCL that would be used, such as 22809, or why there is none.
pub fn version() -> Result<usize, String> {
    let library = library().map_err(|failure| failure.kind.to_string())?;
    let mut version = 0;
    // SAFETY: writes one int.
    let result = unsafe { (library.ncclGetVersion)(&mut version) };
    if result != ncclResult_t::ncclSuccess {
        return Err("ncclGetVersion failed".into());
    }
    usize::try_from(version).map_err(|_| format!("ncclGetVersion answered {version}"))
}

/// NCCL's defaults, but non-blocking.
fn config() -> ncclConfig_t {
    // NCCL_CONFIG_UNDEF_INT
    const DEFAULT: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22_809 as c_uint,
        blocking: 0,
        cgaClusterSize: DEFAULT,
        minCTAs: DEFAULT,
        maxCTAs: DEFAULT,
        netName: std::ptr::null(),
        splitShare: DEFAULT,
        trafficClass: DEFAULT,
        commName: std::ptr::null(),
        collnetEnable: DEFAULT,
        CTAPolicy: DEFAULT,
        shrinkShare: DEFAULT,
        nvlsCTAs: DEFAULT,
        nChannelsPerNetPeer: DEFAULT,
        nvlinkCentricSched: DEFAULT,
    }
}

struct NcclBackend {
    library: &'static Library,
    context: Arc<CudaContext>,
    /// This group's, apart from the one on which libtorch computes.
    stream: Arc<CudaStream>,
    /// Null once aborted or closed.
    comm: ncclComm_t,
    store: Store,
    prefix: String,
    init_timeout: Duration,
    /// Global ranks of the group.
    members: Vec<usize>,
    aborted: Arc<Mutex<Option<String>>>,
}

// SAFETY: the communicator is moved between threads with its owner and used by one at a time; the CUDA context is bound
// to the thread before each use.
unsafe impl Send for NcclBackend {}

/// What a wait is for: its deadline, and when it began.
#[derive(Clone, Copy)]
struct Patience {
    started: Instant,
    timeout: Duration,
}

impl Patience {
    fn new(timeout: Duration) -> Patience {
        Patience { started: Instant::now(), timeout }
    }

    fn of(call: &Call) -> Patience {
        Patience { started: call.started, timeout: call.timeout }
    }

    /// Gives way for a moment: none at first, then ever longer up to 50 us.
    fn pause(&self) -> Result<(), Failure> {
        let waited = self.started.elapsed();
        if waited >= self.timeout {
            return Err(CommErrorKind::Timeout { waited, rank: None }.into());
        }
        if waited < Duration::from_micros(200) {
            std::hint::spin_loop();
        } else if waited < Duration::from_millis(5) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

fn cuda_failure(error: DriverError) -> Failure {
    Failure::backend(format!("CUDA: {error}"))
}

impl NcclBackend {
    fn connect_world(store: &Store, options: &NcclOptions) -> Result<NcclBackend, Failure> {
        let library = library()?;
        let context = CudaContext::new(options.device_index)
            .map_err(|error| Failure::backend(format!("GPU {} cannot be used: {error}", options.device_index)))?;
        let mut backend = NcclBackend {
            library,
            stream: context.new_stream().map_err(cuda_failure)?,
            context,
            comm: std::ptr::null_mut(),
            store: store.clone(),
            prefix: options.prefix.clone(),
            init_timeout: options.init_timeout,
            members: (0..options.size).collect(),
            aborted: Arc::default(),
        };
        backend.initialise(0, options.rank)?;
        Ok(backend)
    }

    /// The first member makes the unique id, the others read it in the store.
    fn initialise(&mut self, group_id: u32, rank: usize) -> Result<(), Failure> {
        self.bind()?;
        let key = format!("{}/nccl/{group_id}/{}", self.prefix, self.members[0]);
        let id = if rank == 0 { self.publish_id(&key)? } else { self.read_id(&key)? };
        let as_int = |n: usize| c_int::try_from(n).map_err(|_| Failure::backend(format!("{n} ranks are too many")));
        let (size, rank) = (as_int(self.members.len())?, as_int(rank)?);
        let patience = Patience::new(self.init_timeout);
        let mut config = config();
        // SAFETY: comm and config are valid for the call; NCCL copies the config; non-blocking, so it returns at once.
        let result = unsafe { (self.library.ncclCommInitRankConfig)(&mut self.comm, size, id, rank, &mut config) };
        let settled = self.settle(result, patience);
        if settled.is_err() {
            // Half made: only abort is allowed.
            self.abort_communicator();
        }
        settled
    }

    fn publish_id(&self, key: &str) -> Result<ncclUniqueId, Failure> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes one id.
        self.check(unsafe { (self.library.ncclGetUniqueId)(&mut id) })?;
        let bytes = id.internal.map(|byte| byte as u8);
        self.store.set(key, &bytes).map_err(|error| Failure::backend(error.to_string()))?;
        Ok(id)
    }

    fn read_id(&self, key: &str) -> Result<ncclUniqueId, Failure> {
        let bytes = self.store.wait(key, self.init_timeout).map_err(|error| Failure::backend(error.to_string()))?;
        let bytes = <[u8; 128]>::try_from(bytes);
        let bytes = bytes.map_err(|bytes| Failure::backend(format!("an NCCL id of {} bytes", bytes.len())))?;
        Ok(ncclUniqueId { internal: bytes.map(|byte| byte as c_char) })
    }

    /// Makes this rank's GPU the thread's current one: NCCL uses the current one, and libtorch changes it.
    fn bind(&self) -> Result<(), Failure> {
        self.context.bind_to_thread().map_err(cuda_failure)
    }

    fn stream(&self) -> Stream {
        self.stream.cu_stream().cast()
    }

    fn check(&self, result: ncclResult_t) -> Result<(), Failure> {
        if matches!(result, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) {
            return Ok(());
        }
        // SAFETY: both answer C strings that NCCL keeps.
        let [what, why] = unsafe {
            [(self.library.ncclGetErrorString)(result), (self.library.ncclGetLastError)(self.comm)].map(|text| {
                if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
            })
        };
        let detail = format!("NCCL: {what}: {}", why.trim());
        Err(match result {
            ncclResult_t::ncclRemoteError => CommErrorKind::PeerLost { rank: None, detail }.into(),
            _ => Failure {
                kind: CommErrorKind::Backend(detail),
                hint: Some("NCCL_DEBUG=INFO says more; two ranks must not share a GPU".into()),
            },
        })
    }

    fn aborted(&self) -> Result<(), Failure> {
        match self.aborted.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(reason) => Err(CommErrorKind::Aborted(reason.clone()).into()),
            None => Ok(()),
        }
    }

    /// Waits until NCCL has taken in the calls so far.
    fn settle(&self, result: ncclResult_t, patience: Patience) -> Result<(), Failure> {
        self.check(result)?;
        let mut state = result;
        while state == ncclResult_t::ncclInProgress {
            self.aborted()?;
            // SAFETY: the communicator exists (NCCL sets it before it answers `in progress`); writes one result.
            self.check(unsafe { (self.library.ncclCommGetAsyncError)(self.comm, &mut state) })?;
            self.check(state)?;
            if state == ncclResult_t::ncclInProgress {
                patience.pause()?;
            }
        }
        Ok(())
    }

    /// Waits until the stream has done everything so far.
    fn finish(&self, patience: Patience) -> Result<(), Failure> {
        loop {
            // SAFETY: the context is bound, and the stream lives.
            match unsafe { cuStreamQuery(self.stream.cu_stream()) } {
                CUresult::CUDA_SUCCESS => return Ok(()),
                CUresult::CUDA_ERROR_NOT_READY => {}
                error => return Err(Failure::backend(format!("CUDA failed during a collective: {error:?}"))),
            }
            self.aborted()?;
            let mut state = ncclResult_t::ncclSuccess;
            // SAFETY: the communicator is open; writes one result.
            self.check(unsafe { (self.library.ncclCommGetAsyncError)(self.comm, &mut state) })?;
            self.check(state)?;
            patience.pause()?;
        }
    }

    /// Queues NCCL's part of a call, and waits for its end.
    fn launch(&mut self, call: &Call, queue: impl FnOnce(&Self) -> Result<(), Failure>) -> Result<(), Failure> {
        if self.comm.is_null() {
            return Err(Failure::backend("the NCCL communicator was closed after an earlier failure"));
        }
        self.aborted()?;
        self.bind()?;
        self.stream.join(&self.context.default_stream()).map_err(cuda_failure)?;
        // SAFETY: paired with ncclGroupEnd below, on every path.
        self.check(unsafe { (self.library.ncclGroupStart)() })?;
        let queued = queue(self);
        // SAFETY: as above.
        let ended = unsafe { (self.library.ncclGroupEnd)() };
        queued?;
        self.settle(ended, Patience::of(call))?;
        self.finish(Patience::of(call))
    }

    fn abort_communicator(&mut self) {
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() && self.bind().is_ok() {
            // SAFETY: the communicator is open, used by this thread only, and not used again.
            _ = unsafe { (self.library.ncclCommAbort)(comm) };
        }
    }
}

/// Everything is sent as bytes: NCCL does no arithmetic here.
const BYTES: ncclDataType_t = ncclDataType_t::ncclUint8;

fn num_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

impl Backend for NcclBackend {
    fn exchange(&mut self, call: &Call, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failure> {
        self.launch(call, |this| {
            for send in sends {
                let (data, peer) = (send.data.data_ptr(), send.peer as c_int);
                // SAFETY: contiguous memory of this many bytes on this GPU, kept by the caller until the call ends.
                this.check(unsafe {
                    (this.library.ncclSend)(data, send.num_bytes(), BYTES, peer, this.comm, this.stream())
                })?;
            }
            for receive in receives {
                let (data, peer) = (receive.data.data_ptr(), receive.peer as c_int);
                // SAFETY: as above.
                let result = unsafe {
                    (this.library.ncclRecv)(data, receive.num_bytes(), BYTES, peer, this.comm, this.stream())
                };
                this.check(result)?;
            }
            Ok(())
        })
    }

    fn all_gather(&mut self, call: &Call, output: &Tensor, input: &Tensor, counts: &[usize]) -> Result<(), Failure> {
        let even = counts.iter().all(|count| *count == counts[0]);
        if !even {
            // NCCL has no uneven gather: one broadcast per rank, in one group, pipelines as well.
            return self.launch(call, |this| {
                let size = output.kind().elt_size_in_bytes();
                let mut data = output.data_ptr().cast::<u8>();
                for (root, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                    let (place, bytes) = (data.cast::<c_void>(), count * size);
                    // SAFETY: place begins rank root's part of the output, of this many bytes; in place is allowed.
                    let result = unsafe {
                        data = data.add(bytes);
                        (this.library.ncclBroadcast)(
                            place,
                            place,
                            bytes,
                            BYTES,
                            root as c_int,
                            this.comm,
                            this.stream(),
                        )
                    };
                    this.check(result)?;
                }
                Ok(())
            });
        }
        self.launch(call, |this| {
            let (from, to) = (input.data_ptr(), output.data_ptr());
            // SAFETY: the output holds size times the input's bytes, both contiguous on this GPU until the call ends.
            this.check(unsafe {
                (this.library.ncclAllGather)(from, to, num_bytes(input), BYTES, this.comm, this.stream())
            })
        })
    }

    fn broadcast(&mut self, call: &Call, data: &Tensor, root: usize) -> Result<(), Failure> {
        self.launch(call, |this| {
            let place = data.data_ptr();
            // SAFETY: contiguous memory of this many bytes on this GPU until the call ends; in place is allowed.
            this.check(unsafe {
                (this.library.ncclBroadcast)(
                    place,
                    place,
                    num_bytes(data),
                    BYTES,
                    root as c_int,
                    this.comm,
                    this.stream(),
                )
            })
        })
    }

    fn split(&mut self, call: &Call, group: &SubGroup) -> Result<Box<dyn Backend>, Failure> {
        let mut child = NcclBackend {
            library: self.library,
            context: Arc::clone(&self.context),
            stream: self.context.new_stream().map_err(cuda_failure)?,
            comm: std::ptr::null_mut(),
            store: self.store.clone(),
            prefix: self.prefix.clone(),
            init_timeout: self.init_timeout,
            members: group.members.iter().map(|&member| self.members[member]).collect(),
            aborted: Arc::clone(&self.aborted),
        };
        let rank = group.members.iter().position(|&member| member == call.rank);
        let rank = rank.ok_or_else(|| Failure::backend("a rank is not in its own group"))?;
        child.initialise(group.id, rank)?;
        Ok(Box::new(child))
    }

    fn failed(&mut self, _kind: &CommErrorKind) {
        // Also frees the stream of a kernel that waits for a dead peer.
        self.abort_communicator();
    }

    fn abort_handle(&self) -> AbortHandle {
        let aborted = Arc::clone(&self.aborted);
        AbortHandle::new(move |reason| {
            aborted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        })
    }
}

impl Drop for NcclBackend {
    /// Finalize, wait, destroy; abort where that fails or the peers do not come along.
    fn drop(&mut self) {
        if self.comm.is_null() {
            return;
        }
        let finalized = self.bind().and_then(|()| {
            // SAFETY: the communicator is open and all its calls have ended.
            let result = unsafe { (self.library.ncclCommFinalize)(self.comm) };
            self.settle(result, Patience::new(Duration::from_secs(10)))
        });
        if finalized.is_err() {
            return self.abort_communicator();
        }
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        // SAFETY: finalized, and not used again.
        _ = unsafe { (self.library.ncclCommDestroy)(comm) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::driver_present;

    #[test]
    fn without_a_driver_there_is_a_message_and_no_panic() {
        match version() {
            Ok(version) => assert!(version >= 22_800, "{version}"),
            Err(text) if driver_present() => assert!(text.contains("nccl") || text.contains("GPU"), "{text}"),
            Err(text) => assert!(text.contains("no CUDA driver"), "{text}"),
        }
    }

    #[test]
    fn the_configuration_has_the_size_of_the_header_it_claims() {
        // nccl.h 2.28.9: size_t, 2 unsigned, 4 int, pointer, 2 int, pointer, 6 int.
        assert_eq!(config().size, 80);
    }
}
