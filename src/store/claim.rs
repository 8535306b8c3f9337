//! Work on the slices of one lease, which takes the driver's time: done without the lock, by whoever has claimed the lease.
//!
//! `claims/TOKEN` is locked (flock(2)) as long as somebody works on that lease: what is Pending or Releasing and claimed is
//! under way, and what is not was left by a killed process. A claim is made, and what was done recorded, under the lock; in
//! between the claim is the right to write that one record. Who would rather find nothing under way waits for that with
//! [`Store::lock_alone`], and those who want to begin something wait for it: [`Store::enter`].

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Lock, Store, StoreError, flock, io_error, json_line, names_in, replace};
use crate::first::is_locked;

/// Proof that this process works on a lease. Given up on drop.
#[derive(Debug)]
pub struct Claim {
    token: String,
    _file: File,
}

impl Store {
    pub(super) fn claimed(&self, token: &str) -> PathBuf {
        self.dir.join("claims").join(token)
    }

    pub(super) fn half_written(&self, token: &str) -> PathBuf {
        self.dir.join("claims").join(format!("{token}.tmp"))
    }

    /// Takes the lock to begin something: not before those who want to be alone. Waits at most `wait`.
    pub fn enter(&self, wait: Duration) -> Result<Lock, StoreError> {
        let begun = Instant::now();
        drop(flock(&self.dir.join("alone"), true, wait)?);
        self.lock(wait.saturating_sub(begun.elapsed()))
    }

    /// Takes the lock when nobody works on any lease, and keeps others from beginning to. Waits at most `wait`.
    pub fn lock_alone(&self, wait: Duration) -> Result<Lock, StoreError> {
        let begun = Instant::now();
        let left = || wait.saturating_sub(begun.elapsed());
        let alone = flock(&self.dir.join("alone"), false, wait)?;
        loop {
            let lock = self.lock(left())?;
            match self.claims()?.first() {
                None => return Ok(Lock { _alone: Some(alone), ..lock }),
                Some(token) => {
                    drop(lock);
                    self.wait_for_claim(token, left())?;
                }
            }
        }
    }

    /// Begins work on a lease. `None`: somebody else is at it.
    pub fn claim(&self, _lock: &Lock, token: &str) -> Result<Option<Claim>, StoreError> {
        let path = self.claimed(token);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        let file = options.open(&path).map_err(io_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { token: token.to_owned(), _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
        }
    }

    /// Whether somebody works on that lease.
    pub fn is_claimed(&self, token: &str) -> bool {
        is_locked(&self.claimed(token))
    }

    /// Waits until nobody works on that lease any more; [`StoreError::Busy`] names who still does.
    pub fn wait_for_claim(&self, token: &str, wait: Duration) -> Result<(), StoreError> {
        let path = self.claimed(token);
        match path.symlink_metadata() {
            Ok(_) => flock(&path, true, wait).map(drop),
            Err(_) => Ok(()), // with its lease
        }
    }

    /// Writes the record of a claimed lease.
    pub fn put_claimed<T: Serialize>(&self, claim: &Claim, record: &T) -> Result<(), StoreError> {
        let path = self.lease(&claim.token);
        replace(&path, &self.half_written(&claim.token), &json_line(&path, record)?)
    }

    fn claims(&self) -> Result<Vec<String>, StoreError> {
        Ok(names_in(&self.dir.join("claims"))?.filter(|token| self.is_claimed(token)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::store;
    use serde_json::{Value, json};

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn one_works_on_a_lease_and_writes_it_without_the_lock() {
        let (dir, store, lock) = store();
        let claim = store.claim(&lock, "t1").unwrap().unwrap();
        assert!(store.claim(&lock, "t1").unwrap().is_none(), "claimed twice");
        assert!(store.is_claimed("t1") && !store.is_claimed("t2"));
        drop(lock);
        store.put_claimed(&claim, &json!({"version": 1, "step": "whole"})).unwrap();
        assert_eq!(store.get::<Value>("t1", 1).unwrap().unwrap()["step"], "whole");
        drop(claim);
        assert!(!store.is_claimed("t1"));
        let lock = store.lock(SOON).unwrap();
        store.remove(&lock, "t1", None).unwrap();
        assert_eq!(dir.path().join("state/claims").read_dir().unwrap().count(), 0);
    }

    #[test]
    fn whoever_wants_to_be_alone_waits_for_claims_and_keeps_others_out() {
        let (_dir, store, lock) = store();
        let claim = store.claim(&lock, "t1").unwrap().unwrap();
        drop(lock);
        let error = store.lock_alone(SOON).unwrap_err().to_string();
        assert!(error.contains("claims/t1") && error.contains(&std::process::id().to_string()), "{error}");
        drop(claim);
        let alone = store.lock_alone(SOON).unwrap();
        assert!(matches!(store.enter(SOON), Err(StoreError::Busy { .. })));
        drop(alone);
        store.enter(SOON).unwrap();
    }

    #[test]
    fn work_that_ends_is_waited_for() {
        let (_dir, store, lock) = store();
        let claim = store.claim(&lock, "t1").unwrap().unwrap();
        assert!(matches!(store.wait_for_claim("t1", SOON), Err(StoreError::Busy { .. })));
        let end = std::thread::spawn(move || {
            std::thread::sleep(SOON);
            drop(claim);
        });
        store.wait_for_claim("t1", Duration::from_secs(60)).unwrap();
        store.wait_for_claim("no-such", Duration::ZERO).unwrap();
        end.join().unwrap();
    }
}
