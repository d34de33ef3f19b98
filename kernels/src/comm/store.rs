//! The key-value store where ranks meet: libtorch's TCPStore, one server and a client per rank.
//!
//! The same protocol as torch's, so under torchrun the agent's store can serve. Keys live as long as the server: those
//! that differ between attempts must say so.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Opaque: lives in the shim.
#[repr(C)]
pub(super) struct RawStore {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn tangelo_free(text: *mut c_char);
    fn tangelo_store_open(
        host: *const c_char,
        port: u16,
        serve: bool,
        timeout_ms: i64,
        out: *mut *mut RawStore,
    ) -> *mut c_char;
    fn tangelo_store_close(store: *mut RawStore);
    fn tangelo_store_port(store: *const RawStore) -> u16;
    fn tangelo_store_set(store: *mut RawStore, key: *const c_char, data: *const u8, size: usize) -> *mut c_char;
    fn tangelo_store_get(store: *mut RawStore, key: *const c_char, out: *mut *mut u8, size: *mut usize) -> *mut c_char;
    fn tangelo_store_wait(store: *mut RawStore, key: *const c_char, timeout_ms: i64) -> *mut c_char;
    fn tangelo_store_add(store: *mut RawStore, key: *const c_char, amount: i64, out: *mut i64) -> *mut c_char;
    fn tangelo_store_delete(store: *mut RawStore, key: *const c_char) -> *mut c_char;
}

/// Turns the shim's answer into a result and frees its text.
pub(super) fn checked(text: *mut c_char) -> Result<(), String> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a C string that it gave away.
    let message = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
    // SAFETY: as above; freed once.
    unsafe { tangelo_free(text) };
    Err(message)
}

pub(super) fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("{text:?} contains a zero byte"))
}

/// Whole milliseconds, rounded up: a wait that ran out ends after the deadline it was given, never just before it.
pub(super) fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX / 2).max(1)
}

/// A failed call of the store.
#[derive(Clone, Debug, thiserror::Error)]
#[error("store at {address}: {operation}: {detail}")]
pub struct StoreError {
    /// `host:port` of the server.
    pub address: String,
    /// What was asked of it.
    pub operation: String,
    /// What happened, and what to do about it.
    pub detail: String,
}

/// Where the store is, and whether this process serves it.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Host of the server (MASTER_ADDR).
    pub host: String,
    /// Port of the server (MASTER_PORT); 0 lets a serving process choose a free one.
    pub port: u16,
    /// Whether this process is the server, too.
    pub serve: bool,
    /// How long to wait for the server.
    pub timeout: Duration,
}

/// A connection to the store. Clones share it; calls from several threads take turns.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    raw: *mut RawStore,
    address: String,
}

// SAFETY: the shim's store is a TCPStore client, whose calls take its own lock; it is tied to no thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: made by tangelo_store_open, closed once, used by nobody else any more.
        unsafe { tangelo_store_close(self.raw) };
    }
}

impl Store {
    /// Connects, waiting for the server if need be; a serving process serves until its last handle is dropped.
    pub fn open(options: &StoreOptions) -> Result<Store, StoreError> {
        let address = format!("{}:{}", options.host, options.port);
        let mut raw = std::ptr::null_mut();
        let opened = c_string(&options.host).and_then(|host| {
            // SAFETY: host is a C string for the length of the call; `raw` is written on success.
            checked(unsafe {
                tangelo_store_open(host.as_ptr(), options.port, options.serve, milliseconds(options.timeout), &mut raw)
            })
        });
        opened.map_err(|detail| {
            let hint = match (options.serve, detail.contains("EADDRINUSE")) {
                (true, true) => "another process listens there: choose another MASTER_PORT",
                (true, false) => "this process could not listen there",
                (false, _) => "is rank 0 (or torchrun's agent) running, and reachable under this address?",
            };
            StoreError { address: address.clone(), operation: "open".into(), detail: format!("{detail} ({hint})") }
        })?;
        Ok(Store { inner: Arc::new(Inner { raw, address }) })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        // SAFETY: the store is open.
        unsafe { tangelo_store_port(self.inner.raw) }
    }

    /// Sets a key; every rank sees it when this returns.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.with_key("set", key, |key| {
            // SAFETY: key and value are valid for the length of the call.
            checked(unsafe { tangelo_store_set(self.inner.raw, key.as_ptr(), value.as_ptr(), value.len()) })
        })
    }

    /// The value of a key, or `None` where it was never set.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.with_key("get", key, |key| {
            let (mut data, mut size) = (std::ptr::null_mut(), 0);
            // SAFETY: key is valid for the length of the call; data and size are written before it returns.
            checked(unsafe { tangelo_store_get(self.inner.raw, key.as_ptr(), &mut data, &mut size) })?;
            if data.is_null() {
                return Ok(None);
            }
            // SAFETY: the shim gave away `size` initialised bytes.
            let value = unsafe { std::slice::from_raw_parts(data, size) }.to_vec();
            // SAFETY: as above; freed once.
            unsafe { tangelo_free(data.cast()) };
            Ok(Some(value))
        })
    }

    /// Waits until a key is set, and returns its value.
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let started = Instant::now();
        self.with_key("wait", key, |key| {
            // SAFETY: key is valid for the length of the call.
            checked(unsafe { tangelo_store_wait(self.inner.raw, key.as_ptr(), milliseconds(timeout)) })
                .map_err(|detail| format!("not set after {:.1} s: {detail}", started.elapsed().as_secs_f64()))
        })?;
        self.get(key)?.ok_or_else(|| self.error("wait", key, "the key vanished".into()))
    }

    /// Adds to a counter (0 at first) and returns its new value.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        self.with_key("add", key, |key| {
            let mut value = 0;
            // SAFETY: key is valid for the length of the call; value is written before it returns.
            checked(unsafe { tangelo_store_add(self.inner.raw, key.as_ptr(), amount, &mut value) })?;
            Ok(value)
        })
    }

    /// Removes a key, if it is there.
    pub fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.with_key("delete", key, |key| {
            // SAFETY: key is valid for the length of the call.
            checked(unsafe { tangelo_store_delete(self.inner.raw, key.as_ptr()) })
        })
    }

    pub(super) fn raw(&self) -> *mut RawStore {
        self.inner.raw
    }

    fn with_key<R>(
        &self,
        operation: &str,
        key: &str,
        body: impl FnOnce(&CStr) -> Result<R, String>,
    ) -> Result<R, StoreError> {
        c_string(key).and_then(|key| body(&key)).map_err(|detail| self.error(operation, key, detail))
    }

    fn error(&self, operation: &str, key: &str, detail: String) -> StoreError {
        StoreError { address: self.inner.address.clone(), operation: format!("{operation} {key:?}"), detail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve() -> (Store, Store) {
        let timeout = Duration::from_secs(20);
        let options = StoreOptions { host: "127.0.0.1".into(), port: 0, serve: true, timeout };
        let server = Store::open(&options).unwrap();
        let client = Store::open(&StoreOptions { port: server.port(), serve: false, ..options }).unwrap();
        (server, client)
    }

    #[test]
    fn keys_and_counters_are_shared() {
        let (server, client) = serve();
        assert_eq!(client.get("a").unwrap(), None);
        server.set("a", &[0, 255, 7]).unwrap();
        assert_eq!(client.get("a").unwrap().unwrap(), [0, 255, 7]);
        server.set("empty", &[]).unwrap();
        assert_eq!(client.get("empty").unwrap().unwrap(), [0u8; 0]);
        assert_eq!((client.add("n", 2).unwrap(), server.add("n", 3).unwrap()), (2, 5));
        client.delete("a").unwrap();
        assert_eq!(server.get("a").unwrap(), None);
    }

    #[test]
    fn waiting_ends_with_the_key_or_the_deadline() {
        let (server, client) = serve();
        let waiter = std::thread::spawn(move || client.wait("late", Duration::from_secs(20)));
        server.set("late", b"here").unwrap();
        assert_eq!(waiter.join().unwrap().unwrap(), b"here");
        let error = server.wait("never", Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("never") && error.contains("not set after"), "{error}");
    }

    #[test]
    fn a_port_in_use_is_explained() {
        let (server, _client) = serve();
        let timeout = Duration::from_secs(2);
        let options = StoreOptions { host: "127.0.0.1".into(), port: server.port(), serve: true, timeout };
        let error = Store::open(&options).err().unwrap().to_string();
        assert!(error.contains("choose another MASTER_PORT"), "{error}");
    }
}
