//! Where a job's driver is found: files in the run folder, which all nodes of the job share. One holds the job's secret,
//! another, written once the driver listens, its address; a third appears where a node other than the driver's was asked to
//! end the job. All go when the job is over; what a killed or failed job or a late signal left is replaced or removed by the
//! next one, and an address at which nobody listens is not taken for a driver.

use crate::error::ControlError;
use crate::secret::Secret;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How often a node looks for the driver.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long an address may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The place where the processes of a job find one another.
#[derive(Clone, Debug)]
pub struct Meeting {
    folder: PathBuf,
}

impl Meeting {
    /// In this run folder.
    pub fn new(run_folder: &Path) -> Meeting {
        Meeting { folder: run_folder.to_owned() }
    }

    /// The file with the job's secret.
    pub fn secret_file(&self) -> PathBuf {
        self.folder.join(".job-secret")
    }

    fn address_file(&self) -> PathBuf {
        self.folder.join(".driver-address")
    }

    fn stop_file(&self) -> PathBuf {
        self.folder.join(".stop-asked")
    }

    /// A fresh secret, written for the others; what an earlier driver left is gone.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn open(&self) -> Result<Secret, ControlError> {
        let _ = std::fs::remove_file(self.address_file());
        let _ = std::fs::remove_file(self.stop_file());
        let secret = Secret::generate()?;
        secret.write(&self.secret_file())?;
        Ok(secret)
    }

    /// Says where the driver listens.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn announce(&self, address: &str) -> Result<(), ControlError> {
        let (path, partial) = (self.address_file(), self.folder.join(".driver-address.partial"));
        let written = std::fs::write(&partial, address).and_then(|()| std::fs::rename(&partial, &path));
        written.map_err(ControlError::io(format!("write the driver's address to {}", path.display())))
    }

    /// Asks the driver to end the job as a signal to it would: a node was told to stop.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn ask_to_stop(&self) -> Result<(), ControlError> {
        let path = self.stop_file();
        std::fs::write(&path, "").map_err(ControlError::io(format!("write {}", path.display())))
    }

    /// Waits until a node asks for the end of the job.
    pub async fn until_asked_to_stop(&self) {
        loop {
            // A shared folder may take its time.
            let path = self.stop_file();
            if tokio::task::spawn_blocking(move || path.exists()).await.unwrap_or(false) {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The job is over, well or not, and nobody joins any more. An address that stays tells agents that it was not well.
    pub fn close(&self, is_well: bool) {
        let _ = std::fs::remove_file(self.secret_file());
        let _ = std::fs::remove_file(self.stop_file());
        if is_well {
            let _ = std::fs::remove_file(self.address_file());
        }
    }

    /// Whether the driver at this address ended without closing.
    pub fn was_left(&self, address: &str) -> bool {
        std::fs::read_to_string(self.address_file()).is_ok_and(|found| found == address)
    }

    /// The address of the driver, once it listens.
    ///
    /// # Errors
    /// Nobody listens in time.
    pub async fn find(&self, within: Duration) -> Result<String, ControlError> {
        let begin = Instant::now();
        loop {
            let found = std::fs::read_to_string(self.address_file()).ok();
            if let Some(address) = &found
                && let Ok(Ok(_)) = tokio::time::timeout(ANSWER_WITHIN, TcpStream::connect(address.as_str())).await
            {
                return Ok(address.clone());
            }
            if begin.elapsed() >= within {
                return Err(self.nobody(found, within));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn nobody(&self, found: Option<String>, within: Duration) -> ControlError {
        let seen = match found {
            None => {
                "there is no such file: start the job on node 0, too, with a `job.dump_folder` that all nodes share"
                    .into()
            }
            Some(address) => {
                format!("it says {address}, where nobody answers: is node 0 running, and reachable from here?")
            }
        };
        let file = self.address_file();
        ControlError::Environment(format!("no driver after {} s by {}; {seen}", within.as_secs(), file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_driver_is_found_once_it_listens() {
        let folder = tempfile::tempdir().unwrap();
        let meeting = Meeting::new(folder.path());
        let soon = Duration::from_millis(300);
        let error = meeting.find(soon).await.unwrap_err().to_string();
        assert!(error.contains(".driver-address") && error.contains("node 0"), "{error}");
        // What a killed job left: an address without a listener.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        meeting.announce(&address).unwrap();
        let error = meeting.find(soon).await.unwrap_err().to_string();
        assert!(error.contains(&address), "{error}");
        let secret = meeting.open().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        meeting.announce(&address).unwrap();
        assert_eq!(meeting.find(Duration::from_secs(5)).await.unwrap(), address);
        let short = Duration::from_millis(50);
        assert!(tokio::time::timeout(short, meeting.until_asked_to_stop()).await.is_err());
        meeting.ask_to_stop().unwrap();
        tokio::time::timeout(Duration::from_secs(5), meeting.until_asked_to_stop()).await.unwrap();
        assert!(format!("{secret:?}").contains("..") && meeting.secret_file().is_file());
        meeting.close(false);
        assert!(meeting.was_left(&address));
        meeting.close(true);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
