//! The job's secret: every call between processes carries it, and who does not know it is refused.
//!
//! It is given by a file or the environment, never on a command line, where every user of the machine can read it. It
//! tells strangers and other jobs apart; it does not hide what travels: there is no TLS.

use crate::error::{Cause, ControlError, RankFailure, log};
use crate::wire::SECRET_HEADER;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use subtle::ConstantTimeEq;
use tangelo_core::env;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

const MIN_CHARACTERS: usize = 32;

/// A job's secret. Debug output does not show it.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// A fresh one of 256 bits.
    pub fn generate() -> Result<Secret, ControlError> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes)
            .map_err(|e| ControlError::Environment(format!("the system gives no random numbers: {e}")))?;
        Ok(Secret(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>().into()))
    }

    /// From the file that `TANGELO_JOB_SECRET_FILE` names, else from `TANGELO_JOB_SECRET`.
    pub fn from_env() -> Result<Secret, ControlError> {
        if let Ok(path) = std::env::var(env::JOB_SECRET_FILE) {
            return Secret::read(Path::new(&path));
        }
        let text = std::env::var(env::JOB_SECRET).map_err(|_| {
            ControlError::Environment(format!(
                "neither {} nor {} is set; whoever starts this process must give it the job's secret",
                env::JOB_SECRET_FILE,
                env::JOB_SECRET
            ))
        })?;
        Secret::parse(&text, env::JOB_SECRET)
    }

    /// From a file; white space around it does not count.
    pub fn read(path: &Path) -> Result<Secret, ControlError> {
        let text = std::fs::read_to_string(path)
            .map_err(ControlError::io(format!("read the job's secret from {}", path.display())))?;
        Secret::parse(&text, &path.display().to_string())
    }

    /// Into a new file that only its owner can read, in place of what was there.
    pub fn write(&self, path: &Path) -> Result<(), ControlError> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        // An older file or link may belong to somebody else, or be open to others: it is not written into.
        let _ = std::fs::remove_file(path);
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let written = options.open(path).and_then(|mut file| file.write_all(self.0.as_bytes()));
        written.map_err(ControlError::io(format!("write the job's secret to {}", path.display())))
    }

    fn parse(text: &str, source: &str) -> Result<Secret, ControlError> {
        let text = text.trim();
        if text.len() < MIN_CHARACTERS || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ControlError::Environment(format!(
                "the job's secret in {source} has {} characters; expected at least {MIN_CHARACTERS} of printable ASCII \
                 without spaces",
                text.len()
            )));
        }
        Ok(Secret(text.into()))
    }

    /// Whether this is the secret, in a time that does not tell how much of it is right.
    pub(crate) fn matches(&self, offered: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(offered).into()
    }
}

/// Puts the secret on every call of a client.
#[derive(Clone)]
pub(crate) struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    pub fn new(secret: &Secret) -> Result<Bearer, ControlError> {
        let mut value = MetadataValue::try_from(&*secret.0)
            .map_err(|_| ControlError::Environment("the job's secret cannot be sent as a header".into()))?;
        value.set_sensitive(true);
        Ok(Bearer(value))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(SECRET_HEADER, self.0.clone());
        Ok(request)
    }
}

/// Refuses calls without the secret, and says so in the log: the first of them each, then ever fewer.
#[derive(Clone)]
pub(crate) struct Guard {
    secret: Secret,
    name: Arc<str>,
    refused: Arc<AtomicU64>,
}

impl Guard {
    /// `name` is who guards itself, for the log.
    pub fn new(secret: Secret, name: &str) -> Guard {
        Guard { secret, name: name.into(), refused: Arc::default() }
    }

    /// Calls refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let offered = request.metadata().get(SECRET_HEADER);
        if offered.is_some_and(|offered| self.secret.matches(offered.as_bytes())) {
            return Ok(request);
        }
        let count = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let what = if offered.is_some() { "a wrong secret" } else { "no secret" };
        if count <= 16 || count.is_power_of_two() {
            let from = request.remote_addr().map_or("an unknown address".into(), |a| a.to_string());
            log(format!("{} refused a call from {from} with {what} ({count} so far)", self.name));
        }
        Err(RankFailure::new(Cause::Refused, format!("{} refused a call with {what}", self.name)).status())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn a_secret_survives_a_file_that_only_its_owner_reads() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let secret = Secret::generate().unwrap();
        secret.write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Secret::read(&path).unwrap().matches(secret.0.as_bytes()));
        assert!(!Secret::generate().unwrap().matches(secret.0.as_bytes()));
        assert!(!secret.matches(&secret.0.as_bytes()[1..]) && !secret.matches(b""));
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn a_weak_secret_is_refused() {
        expect!["the job's secret in here has 5 characters; expected at least 32 of printable ASCII without spaces"]
            .assert_eq(&Secret::parse(" hello ", "here").unwrap_err().to_string());
    }
}
