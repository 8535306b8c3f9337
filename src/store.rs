//! Records under a lock: one JSON file a holder, written by temporary file and rename. Layout in docs/state.md.
//!
//! Knows names and JSON, not what a lease is. Every write takes a [`Lock`], or the [`Claim`] on that very record, so one without
//! does not compile.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::first::is_locked;

mod claim;
mod line;
mod public;

pub use claim::Claim;
pub use line::{Bell, Rung};

/// What a boot's state consists of, beside single files.
const DIRECTORIES: [&str; 6] = ["leases", "index", "intents", "queue", "holders", "claims"];

/// The state directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// Proof that this process holds the lock. Released on drop.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// Of [`Store::lock_alone`]: nobody begins anything.
    _alone: Option<File>,
}

/// Why the store can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory is root's, and we are not.
    #[error("cannot {what} {path}: permission denied; MIG slices are given out by root")]
    NotRoot {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: String,
    },
    /// The lock was not had in time.
    #[error("the lock {path} was not free within {waited:?}; it is held by {holder}")]
    Busy {
        /// The lock file.
        path: String,
        /// How long we waited.
        waited: Duration,
        /// pid and name of the process that has it.
        holder: String,
    },
    /// The directory could be changed by others.
    #[error(
        "state directory {path} belongs to uid {uid} with mode {mode:04o}; it must be ours, with mode 0700 or 0711"
    )]
    Unsafe {
        /// The directory.
        path: String,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// A record that this version does not understand.
    #[error("{path}: {reason}; it was written by another version of mig-hook or damaged: nothing was touched")]
    Unreadable {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| {
        let path = path.display().to_string();
        match source.kind() {
            io::ErrorKind::PermissionDenied => StoreError::NotRoot { what, path },
            _ => StoreError::Io { what, path, source },
        }
    }
}

impl Store {
    /// Opens the directory, making it (0700) where it is missing.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        for sub in std::iter::once("").chain(DIRECTORIES) {
            let path = dir.join(sub);
            match DirBuilder::new().recursive(sub.is_empty()).mode(0o700).create(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("create", &path)(e)),
                _ => {}
            }
        }
        let meta = dir.metadata().map_err(io_error("read", dir))?;
        let user = nix::unistd::geteuid();
        if meta.uid() == 0 && !user.is_root() {
            return Err(io_error("use", dir)(io::ErrorKind::PermissionDenied.into())); // what is public made it enterable
        }
        if meta.uid() != user.as_raw() || meta.mode() & 0o066 != 0 {
            let mode = meta.mode() & 0o7777;
            return Err(StoreError::Unsafe { path: dir.display().to_string(), uid: meta.uid(), mode });
        }
        Ok(Store { dir: dir.to_owned() })
    }

    /// The directory wherever it is, to look at: nothing is made, and where it is missing there are no records.
    pub fn at(dir: &Path) -> Store {
        Store { dir: dir.to_owned() }
    }

    /// An existing directory, to read from. `None` where there is no state yet; an error where we may not look.
    pub fn existing(dir: &Path) -> Result<Option<Store>, StoreError> {
        match fs::read_dir(dir.join("leases")) {
            Ok(_) => Ok(Some(Store { dir: dir.to_owned() })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("look at", dir)(e)),
        }
    }

    /// The process that has the lock at this moment, as far as /proc/locks names it. Takes nothing.
    pub fn locked_by(&self) -> Option<u32> {
        flock_holder(&self.dir.join("lock"))
    }

    /// The lock if there is state at all.
    pub fn lock_existing(&self, wait: Duration) -> Result<Option<Lock>, StoreError> {
        match self.dir.join("leases").symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("look at", &self.dir)(e)),
            Ok(_) => self.lock(wait).map(Some),
        }
    }

    /// The boot that what is there belongs to.
    pub fn boot(&self) -> Result<Option<String>, StoreError> {
        let path = self.dir.join("boot_id");
        match fs::read(&path) {
            // Whatever it is, it is another one.
            Ok(kept) => Ok(Some(String::from_utf8_lossy(&kept).trim().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Takes the lock, waiting at most `wait`.
    pub fn lock(&self, wait: Duration) -> Result<Lock, StoreError> {
        Ok(Lock { _file: flock(&self.dir.join("lock"), false, wait)?, _alone: None })
    }

    /// Forgets everything if the boot is another one: slices do not outlive a boot, and /run is not a tmpfs everywhere.
    pub fn begin_boot(&self, lock: &Lock, boot_id: &str) -> Result<(), StoreError> {
        match self.boot()? {
            Some(kept) if kept == boot_id => return Ok(()),
            None => {}
            Some(_) => {
                for sub in DIRECTORIES {
                    let dir = self.dir.join(sub);
                    for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))?.flatten() {
                        fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
                    }
                }
                for key in self.publications()? {
                    self.unpublish(lock, &key)?;
                }
                self.unlink(lock, &self.dir.join("cordons.json"))?;
            }
        }
        self.write(lock, &self.dir.join("boot_id"), format!("{boot_id}\n").as_bytes())
    }

    fn lease(&self, token: &str) -> PathBuf {
        self.dir.join("leases").join(format!("{token}.json"))
    }

    /// Writes a record, replacing what is there in one step.
    pub fn put<T: Serialize>(&self, lock: &Lock, token: &str, record: &T) -> Result<(), StoreError> {
        put_json(self, lock, &self.lease(token), record)
    }

    /// Every token that has a record, in name order.
    pub fn tokens(&self) -> Result<Vec<String>, StoreError> {
        let token = |name: String| Some(name.strip_suffix(".json")?.to_owned());
        let mut tokens: Vec<String> = names_in(&self.dir.join("leases"))?.filter_map(token).collect();
        tokens.sort();
        Ok(tokens)
    }

    /// A record; `None` where there is none. One of an unknown version is an error, and stays.
    pub fn get<T: DeserializeOwned>(&self, token: &str, version: u64) -> Result<Option<T>, StoreError> {
        read_json(&self.lease(token), version)
    }

    /// Removes a record with its intent and every index entry that names it. What is not there is fine. Those who wait for
    /// room are told.
    pub fn remove(&self, lock: &Lock, token: &str, index: Option<&str>) -> Result<(), StoreError> {
        if let Some(name) = index.filter(|name| self.indexed(name).as_deref() == Some(token)) {
            self.unlink(lock, &self.dir.join("index").join(name))?;
        }
        // The record goes last: while it is there, what a killed run left is found.
        self.unlink(lock, &self.intent(token, "ready"))?;
        self.unlink(lock, &self.intent(token, "released"))?;
        self.unlink(lock, &self.holder(token))?;
        self.unlink(lock, &self.claimed(token))?;
        self.unlink(lock, &self.half_written(token))?;
        self.unlink(lock, &self.lease(token))?;
        self.ring();
        Ok(())
    }

    /// Lets a container be found by its index name (`first::index_name`).
    pub fn index(&self, lock: &Lock, name: &str, token: &str) -> Result<(), StoreError> {
        self.write(lock, &self.dir.join("index").join(name), token.as_bytes())
    }

    /// The token of a container, by its index name.
    pub fn indexed(&self, name: &str) -> Option<String> {
        let token = fs::read_to_string(self.dir.join("index").join(name)).ok()?;
        crate::first::plain_name(&token).then_some(token)
    }

    /// What `put_cordons` wrote; the default where nothing is.
    pub fn cordons<T: DeserializeOwned + Default>(&self) -> Result<T, StoreError> {
        let path = self.dir.join("cordons.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| StoreError::Unreadable { path: path.display().to_string(), reason: e.to_string() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(T::default()),
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Records which GPUs are closed to new holders. Those who wait for room are told.
    pub fn put_cordons<T: Serialize>(&self, lock: &Lock, cordons: &T) -> Result<(), StoreError> {
        let path = self.dir.join("cordons.json");
        let text = serde_json::to_vec(cordons).map_err(|e| io_error("write", &path)(e.into()))?;
        self.write(lock, &path, &text)?;
        self.ring();
        Ok(())
    }

    fn intent(&self, token: &str, state: &str) -> PathBuf {
        self.dir.join("intents").join(format!("{token}.{state}"))
    }

    /// Makes an intent ready at acquire, so that announcing the end later needs neither space nor lock.
    pub fn ready_intent(&self, _lock: &Lock, token: &str) -> Result<(), StoreError> {
        let path = self.intent(token, "ready");
        File::create(&path).map(drop).map_err(io_error("create", &path))
    }

    /// Announces, without the lock, that the holder of `token` has ended. False where nothing was ready for it.
    pub fn announce(&self, token: &str) -> bool {
        fs::rename(self.intent(token, "ready"), self.intent(token, "released")).is_ok()
    }

    /// Takes it upon this process to release what `token` holds when the runtime has deleted its container: as long as that
    /// file is open, the poststop hook leaves it to us ([`crate::first::hook`]). `None`: somebody else has, or it is over.
    pub fn take_end(&self, token: &str) -> Option<File> {
        let options = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).to_owned();
        let file = options.open(self.intent(token, "ready")).ok()?;
        file.try_lock().is_ok().then_some(file)
    }

    /// Whether the end of that token's holder was announced.
    pub fn announced(&self, token: &str) -> bool {
        self.intent(token, "released").exists()
    }

    fn holder(&self, token: &str) -> PathBuf {
        self.dir.join("holders").join(token)
    }

    /// A descriptor that says, as long as any process has it open, that the holder of `token` is alive: a flock(2), which
    /// belongs to what is inherited and not to a process. The file is made once and never replaced. Close-on-exec: who hands
    /// it on takes that off.
    pub fn hold(&self, token: &str) -> Result<File, StoreError> {
        let path = self.holder(token);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        let file = options.open(&path).map_err(io_error("open", &path))?;
        // Only somebody who asks whether it is held can have it, for a moment.
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }

    /// Whether a process has that descriptor open.
    pub fn is_held(&self, token: &str) -> bool {
        is_locked(&self.holder(token))
    }

    fn write(&self, _lock: &Lock, path: &Path, text: &[u8]) -> Result<(), StoreError> {
        // One name is enough: writers hold the lock. What a killed one left is overwritten.
        replace(path, &self.dir.join(".write.tmp"), text)
    }

    fn unlink(&self, _lock: &Lock, path: &Path) -> Result<(), StoreError> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(e)),
            _ => Ok(()),
        }
    }
}

/// The names in a directory of the state; none where it is missing.
fn names_in(dir: &Path) -> Result<impl Iterator<Item = String> + use<>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries.map_err(io_error("list", dir))?),
    };
    Ok(entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok()))
}

/// Writes a record, replacing what is there in one step.
fn put_json<T: Serialize>(store: &Store, lock: &Lock, path: &Path, record: &T) -> Result<(), StoreError> {
    store.write(lock, path, &json_line(path, record)?)
}

fn json_line<T: Serialize>(path: &Path, record: &T) -> Result<Vec<u8>, StoreError> {
    let mut text = serde_json::to_vec(record).map_err(|e| io_error("write", path)(e.into()))?;
    text.push(b'\n');
    Ok(text)
}

fn replace(path: &Path, temporary: &Path, text: &[u8]) -> Result<(), StoreError> {
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options.open(temporary)?.write_all(text)?;
        fs::rename(temporary, path)
    };
    write().map_err(io_error("write", path))
}

/// Has that file locked, for us alone or `shared`, waiting at most `wait`. It is made once and never replaced: a renamed one
/// would give each caller an inode of its own.
fn flock(path: &Path, shared: bool, wait: Duration) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path).map_err(io_error("open", path))?;
    match if shared { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(io_error("lock", path)(error)),
    }
    // flock(2) has no timeout, and an alarm never fires under crun, which blocks every signal: so a thread waits. When
    // we give up, it is left behind and ends with the process; should it get the lock after all, the send fails and
    // the lock is dropped with the message.
    let (sender, receiver) = mpsc::sync_channel(0);
    std::thread::spawn(move || {
        let locked = if shared { file.lock_shared() } else { file.lock() };
        sender.send(locked.map(|()| file))
    });
    match receiver.recv_timeout(wait) {
        Ok(locked) => locked.map_err(io_error("lock", path)),
        Err(_) => Err(StoreError::Busy { holder: holder_of(path), path: path.display().to_string(), waited: wait }),
    }
}

/// A record; `None` where there is none. One of an unknown version is an error.
fn read_json<T: DeserializeOwned>(path: &Path, version: u64) -> Result<Option<T>, StoreError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("read", path)(e)),
    };
    let unreadable = |reason| StoreError::Unreadable { path: path.display().to_string(), reason };
    let found: Versioned = serde_json::from_slice(&text).map_err(|e| unreadable(e.to_string()))?;
    match found.version.as_u64() {
        Some(v) if v == version => {}
        Some(v) => return Err(unreadable(format!("has version {v}, this mig-hook reads version {version}"))),
        None => return Err(unreadable("has no version".into())),
    }
    serde_json::from_slice(&text).map(Some).map_err(|e| unreadable(e.to_string()))
}

/// What every record has, of whatever version.
#[derive(Deserialize)]
struct Versioned {
    #[serde(default)]
    version: serde_json::Value,
}

/// Who holds a flock.
fn holder_of(path: &Path) -> String {
    match flock_holder(path) {
        Some(pid) => {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name: String = name.chars().filter(|c| !c.is_control()).collect();
            format!("process {pid} ({name})")
        }
        None => "a process that /proc/locks does not name".into(),
    }
}

fn flock_holder(path: &Path) -> Option<u32> {
    let meta = path.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    flock_in(&fs::read_to_string("/proc/locks").unwrap_or_default(), &format!("{major:02x}:{minor:02x}:{}", meta.ino()))
}

/// Who has the flock of a file in the text of /proc/locks: `N: FLOCK ADVISORY WRITE PID MAJ:MIN:INODE 0 EOF`.
fn flock_in(locks: &str, file: &str) -> Option<u32> {
    let mut held = locks.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    held.find(|f| f.get(1) == Some(&"FLOCK") && f.get(5) == Some(&file))?.get(4)?.parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(crate) fn store() -> (tempfile::TempDir, Store, Lock) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("state")).unwrap();
        let lock = store.lock(Duration::ZERO).unwrap();
        (dir, store, lock)
    }

    #[test]
    fn a_record_comes_back_and_goes() {
        let (_dir, store, lock) = store();
        store.put(&lock, "t1", &json!({"version": 1, "x": 2})).unwrap();
        store.index(&lock, "c1.00", "t1").unwrap();
        assert_eq!(store.get::<Value>("t1", 1).unwrap().unwrap()["x"], 2);
        assert_eq!(store.tokens().unwrap(), ["t1"]);
        store.remove(&lock, "t1", Some("c1.00")).unwrap();
        store.remove(&lock, "t1", Some("c1.00")).unwrap();
        assert_eq!(store.get::<Value>("t1", 1).unwrap(), None);
        assert_eq!(store.indexed("c1.00"), None);
    }

    #[test]
    fn an_index_entry_of_another_lease_stays() {
        let (_dir, store, lock) = store();
        store.index(&lock, "c1.00", "new").unwrap();
        store.remove(&lock, "old", Some("c1.00")).unwrap();
        assert_eq!(store.indexed("c1.00").as_deref(), Some("new"));
    }

    #[test]
    fn an_unknown_version_is_an_error_that_says_so() {
        let (_dir, store, lock) = store();
        store.put(&lock, "t1", &json!({"version": 7})).unwrap();
        let error = store.get::<Value>("t1", 1).unwrap_err().to_string();
        assert!(error.contains("version 7") && error.contains("nothing was touched"), "{error}");
    }

    #[test]
    fn another_boot_forgets_and_the_same_one_keeps() {
        let (_dir, store, lock) = store();
        store.begin_boot(&lock, "boot-a").unwrap();
        store.put(&lock, "t1", &json!({"version": 1})).unwrap();
        store.put_cordons(&lock, &json!({"GPU-0": {}})).unwrap();
        store.begin_boot(&lock, "boot-a").unwrap();
        assert_eq!((store.tokens().unwrap().len(), store.boot().unwrap().as_deref()), (1, Some("boot-a")));
        assert_eq!(store.cordons::<Value>().unwrap()["GPU-0"], json!({}));
        store.begin_boot(&lock, "boot-b").unwrap();
        assert!(store.tokens().unwrap().is_empty());
        assert_eq!(store.cordons::<Value>().unwrap(), Value::Null);
    }

    #[test]
    fn looking_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(&dir.path().join("state"));
        assert!(store.lock_existing(Duration::ZERO).unwrap().is_none());
        assert_eq!((store.tokens().unwrap(), store.boot().unwrap()), (Vec::new(), None));
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
        let store = Store::open(&dir.path().join("state")).unwrap();
        assert!(store.lock_existing(Duration::ZERO).unwrap().is_some());
    }

    #[test]
    fn a_held_lock_is_waited_for_and_its_holder_named() {
        let (_dir, store, _lock) = store();
        let error = store.lock(Duration::from_millis(20)).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
    }

    #[test]
    fn a_lock_on_a_file_of_the_same_number_elsewhere_is_nobodys_here() {
        let locks = "1: FLOCK  ADVISORY  WRITE 666 00:2f:17 0 EOF\n2: FLOCK  ADVISORY  WRITE 7 00:1a:17 0 EOF\n";
        assert_eq!(flock_in(locks, "00:1a:17"), Some(7));
        assert_eq!(flock_in(locks, "00:1b:17"), None);
    }

    #[test]
    fn an_end_can_be_announced_without_the_lock() {
        let (_dir, store, lock) = store();
        assert!(!store.announce("t1"));
        store.ready_intent(&lock, "t1").unwrap();
        assert!(!store.announced("t1"));
        assert!(store.announce("t1"));
        assert!(store.announced("t1"));
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        DirBuilder::new().mode(0o755).create(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Unsafe { .. })));
    }
}
