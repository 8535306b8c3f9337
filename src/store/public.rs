//! What others than root may know of a job: `public/KEY.json`, one file a job, readable by its group.
//!
//! The directory can be entered and not listed (0711), so that a job is found by who knows its key.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Lock, Store, StoreError, io_error, names_in, read_json};

impl Store {
    fn publication(&self, key: &str) -> PathBuf {
        self.dir.join("public").join(format!("{key}.json"))
    }

    /// Writes what is public of a job, for its group `gid`. `key` is a plain name.
    pub fn publish<T: Serialize>(&self, lock: &Lock, key: &str, gid: u32, record: &T) -> Result<(), StoreError> {
        let path = self.publication(key);
        self.open_to_all("public")?;
        let text = serde_json::to_vec(record).map_err(|e| io_error("write", &path)(e.into()))?;
        let temporary = self.dir.join("public").join(".write.tmp");
        self.unlink(lock, &temporary)?; // of a killed run
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let mut file = options.open(&temporary)?;
            file.write_all(&text)?;
            lchown(&temporary, None, Some(gid))?;
            file.set_permissions(Permissions::from_mode(0o640))?;
            fs::rename(&temporary, &path)
        };
        write().map_err(io_error("write", &path))
    }

    /// Takes it away again. What is not there is fine.
    pub fn unpublish(&self, lock: &Lock, key: &str) -> Result<(), StoreError> {
        self.unlink(lock, &self.publication(key))
    }

    /// What is public of a job; `None` where there is nothing. An error where it is not for who asks.
    pub fn published<T: DeserializeOwned>(&self, key: &str, version: u64) -> Result<Option<T>, StoreError> {
        let path = self.publication(key);
        match read_json(&path, version) {
            // Nothing is public yet, and the directory closed.
            Err(StoreError::NotRoot { .. }) if path.symlink_metadata().is_err() => Ok(None),
            record => record,
        }
    }

    /// Milliseconds for which it has been there.
    pub fn published_ms(&self, key: &str) -> Option<u64> {
        let age = self.publication(key).metadata().ok()?.modified().ok()?.elapsed().unwrap_or_default();
        u64::try_from(age.as_millis()).ok()
    }

    /// Keys of all jobs of which something is public.
    pub fn publications(&self) -> Result<Vec<String>, StoreError> {
        let key = |name: String| Some(name.strip_suffix(".json")?.to_owned());
        Ok(names_in(&self.dir.join("public"))?.filter_map(key).collect())
    }

    /// The directory of that user's own in which runtimes keep what they know of the containers of jobs, made where it is
    /// missing: `runtime/NAME`, 0700. By name, since that is what every release of Slurm can put into a path.
    pub fn runtime_root(&self, user: &str, uid: u32, gid: u32) -> Result<PathBuf, StoreError> {
        self.open_to_all("runtime")?;
        let path = self.dir.join("runtime").join(user);
        if user.contains('/') || user.starts_with('.') {
            return Err(io_error("create", &path)(io::ErrorKind::InvalidFilename.into()));
        }
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("create", &path)(e)),
            _ => {}
        }
        // Its parent is ours: nobody else can have put anything else there. One that is there may be of a run that was
        // killed, or of a user who had that name before.
        chown(&path, Some(uid), Some(gid)).map_err(io_error("give away", &path))?;
        Ok(path)
    }

    /// Makes a directory that anybody may enter, and the way to it.
    fn open_to_all(&self, name: &str) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        match DirBuilder::new().mode(0o711).create(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("create", &path)(e)),
            _ => {}
        }
        enterable(&self.dir)?;
        enterable(&path)
    }
}

/// Whatever the umask was.
fn enterable(dir: &Path) -> Result<(), StoreError> {
    let set = || match dir.metadata()?.mode() & 0o777 {
        0o711 => Ok(()),
        _ => fs::set_permissions(dir, Permissions::from_mode(0o711)),
    };
    set().map_err(io_error("open to all", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::store;
    use serde_json::{Value, json};

    #[test]
    fn what_is_public_is_one_groups_and_the_rest_stays_closed() {
        let (dir, store, lock) = store();
        assert_eq!(store.published::<Value>("slurm:a:1", 1).unwrap(), None);
        let gid = if nix::unistd::geteuid().is_root() { 4711 } else { nix::unistd::getegid().as_raw() };
        store.publish(&lock, "slurm:a:1", gid, &json!({"version": 1, "uid": 3})).unwrap();
        store.publish(&lock, "slurm:a:1", gid, &json!({"version": 1, "uid": 4})).unwrap();
        assert_eq!(store.published::<Value>("slurm:a:1", 1).unwrap().unwrap()["uid"], 4);
        assert_eq!(store.publications().unwrap(), ["slurm:a:1"]);
        let of = |name: &str| {
            let meta = dir.path().join(name).metadata().unwrap();
            (meta.mode() & 0o777, meta.gid())
        };
        assert_eq!(of("state/public/slurm:a:1.json"), (0o640, gid));
        assert_eq!((of("state").0, of("state/public").0), (0o711, 0o711));
        assert_eq!((of("state/leases").0, of("state/holders").0, of("state/queue").0), (0o700, 0o700, 0o700));
        store.unpublish(&lock, "slurm:a:1").unwrap();
        store.unpublish(&lock, "slurm:a:1").unwrap();
        assert!(store.publications().unwrap().is_empty());
        Store::open(&dir.path().join("state")).unwrap();
    }

    #[test]
    fn a_users_runtime_root_is_the_users() {
        if !nix::unistd::geteuid().is_root() {
            return; // chown
        }
        let (_dir, store, _lock) = store();
        let path = store.runtime_root("alice", 4711, 4712).unwrap();
        assert_eq!(store.runtime_root("alice", 4711, 4712).unwrap(), path);
        let meta = path.symlink_metadata().unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid(), meta.gid()), (0o700, 4711, 4712));
        store.runtime_root("alice", 4713, 4712).unwrap();
        assert_eq!(path.symlink_metadata().unwrap().uid(), 4713, "another one of that name");
        assert!(store.runtime_root("../x", 4711, 4712).is_err());
    }
}
