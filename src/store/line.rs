//! Those who wait: for each a record and a bell, `queue/NUMBER.json` and `queue/NUMBER.bell`.
//!
//! The bell is a FIFO that the waiting process keeps open. Who changes something rings every bell: a byte, which stays
//! until it is read, so that none is lost. Nobody has it open any more: the waiter is dead, however it died. And whoever
//! holds the writing end open learns of that at once. (inotify would do too, but root's processes share 128 instances of
//! it, systemd among them: `fs.inotify.max_user_instances`.)

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Lock, Store, StoreError, io_error, names_in, put_json, read_json};

/// A waiter's own bell.
#[derive(Debug)]
pub struct Bell(File);

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// The bell was rung, or the one before in the line has gone.
    Yes,
    /// Nothing happened in that time.
    No,
    /// The process on whose behalf it waits has ended.
    Abandoned,
}

impl Bell {
    /// Waits until it is rung, at most `limit`. `before`: the bell of the one before in the line ([`Store::bell_of`]);
    /// `asker`: the process on whose behalf, as a pidfd.
    pub fn wait(&mut self, before: Option<&File>, asker: Option<&File>, limit: Duration) -> Rung {
        let mut polled = vec![PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        // Of a writing end without a reader POLLERR is told unasked.
        polled.extend(before.map(|bell| PollFd::new(bell.as_fd(), PollFlags::empty())));
        polled.extend(asker.map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN)));
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        // A signal that we survive (SIGCONT) only means to look again.
        let happened = poll(&mut polled, limit).unwrap_or(1) > 0;
        let any = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
        if asker.is_some() && any(polled.last()) {
            return Rung::Abandoned;
        }
        if happened {
            // Emptied before anything is looked at: a ring that comes while we look is heard afterwards.
            let mut bytes = [0; 4096];
            while self.0.read(&mut bytes).is_ok_and(|n| n == bytes.len()) {}
        }
        if happened { Rung::Yes } else { Rung::No }
    }
}

impl Store {
    fn ticket_file(&self, number: u64, kind: &str) -> PathBuf {
        self.dir.join("queue").join(format!("{number}.{kind}"))
    }

    /// Everybody in the line by number, first come first. Some may be dead: they have no [bell](Store::bell_of).
    pub fn tickets(&self) -> Result<Vec<u64>, StoreError> {
        let number = |name: String| name.strip_suffix(".bell")?.parse().ok();
        let mut numbers: Vec<u64> = names_in(&self.dir.join("queue"))?.filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A place at the end of the line: its number, which does not come again in this boot, and its bell. To be filled by
    /// `put_ticket` under the same lock.
    pub fn line_up(&self, lock: &Lock) -> Result<(u64, Bell), StoreError> {
        let last = self.dir.join("queue").join("last");
        let recorded = fs::read_to_string(&last).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let number = recorded.max(self.tickets()?.last().copied()).unwrap_or(0) + 1;
        self.write(lock, &last, format!("{number}\n").as_bytes())?;
        let path = self.ticket_file(number, "bell");
        let made = nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR);
        made.map_err(|errno| io_error("create", &path)(errno.into()))?;
        // Open for writing too, so that it is not at its end whenever the last who rang has closed it.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
        Ok((number, Bell(options.open(&path).map_err(io_error("open", &path))?)))
    }

    /// Writes the record of one in the line.
    pub fn put_ticket<T: Serialize>(&self, lock: &Lock, number: u64, record: &T) -> Result<(), StoreError> {
        put_json(self, lock, &self.ticket_file(number, "json"), record)
    }

    /// The record of one in the line; `None` where it has left. One of an unknown version is an error, and stays.
    pub fn ticket<T: DeserializeOwned>(&self, number: u64, version: u64) -> Result<Option<T>, StoreError> {
        read_json(&self.ticket_file(number, "json"), version)
    }

    /// Takes one out of the line. What is not there is fine.
    pub fn remove_ticket(&self, lock: &Lock, number: u64) -> Result<(), StoreError> {
        self.unlink(lock, &self.ticket_file(number, "json"))?;
        self.unlink(lock, &self.ticket_file(number, "bell"))
    }

    /// The bell of one in the line, to ring it, or to learn when it goes; `None`: it is dead.
    pub fn bell_of(&self, number: u64) -> Option<File> {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
        options.open(self.ticket_file(number, "bell")).ok()
    }

    /// Tells everybody in the line that something has changed. Needs no lock, and can't fail in a way that matters: a bell
    /// that is full has been rung.
    pub fn ring(&self) {
        for number in self.tickets().unwrap_or_default() {
            if let Some(mut bell) = self.bell_of(number) {
                let _ = bell.write_all(b"!");
            }
        }
    }

    /// When the line was looked at last, in ms since boot: when the lock was had for it.
    pub fn scanned(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join("queue").join("scanned")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Records that.
    pub fn put_scanned(&self, lock: &Lock, boot_ms: u64) -> Result<(), StoreError> {
        self.write(lock, &self.dir.join("queue").join("scanned"), format!("{boot_ms}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::store;
    use serde_json::{Value, json};

    const SOON: Duration = Duration::from_millis(10);

    #[test]
    fn numbers_count_on_also_when_everybody_has_left() {
        let (_dir, store, lock) = store();
        let (first, _bell) = store.line_up(&lock).unwrap();
        let (second, _bell2) = store.line_up(&lock).unwrap();
        assert_eq!((first, second, store.tickets().unwrap()), (1, 2, vec![1, 2]));
        store.put_ticket(&lock, 2, &json!({"version": 1})).unwrap();
        assert!(store.ticket::<Value>(2, 1).unwrap().is_some() && store.ticket::<Value>(1, 1).unwrap().is_none());
        assert!(store.ticket::<Value>(2, 7).unwrap_err().to_string().contains("version"));
        for number in [1, 2, 2] {
            store.remove_ticket(&lock, number).unwrap();
        }
        assert!(store.tickets().unwrap().is_empty());
        assert_eq!(store.line_up(&lock).unwrap().0, 3);
    }

    #[test]
    fn a_ring_is_heard_also_one_that_came_before_the_wait() {
        let (_dir, store, lock) = store();
        let (_, mut bell) = store.line_up(&lock).unwrap();
        assert_eq!(bell.wait(None, None, SOON), Rung::No);
        (0..3).for_each(|_| store.ring());
        assert_eq!(bell.wait(None, None, Duration::from_secs(60)), Rung::Yes);
        assert_eq!(bell.wait(None, None, SOON), Rung::No, "once for all of them");
        store.bell_of(1).unwrap().write_all(&[b'!'; 5000]).unwrap();
        assert_eq!(bell.wait(None, None, Duration::from_secs(60)), Rung::Yes);
        assert_eq!(bell.wait(None, None, SOON), Rung::No, "it was emptied");
    }

    #[test]
    fn who_is_gone_has_no_bell_and_the_next_one_learns_it() {
        let (_dir, store, lock) = store();
        let (first, bell) = store.line_up(&lock).unwrap();
        let (_, mut second) = store.line_up(&lock).unwrap();
        let before = store.bell_of(first).unwrap();
        assert_eq!(second.wait(Some(&before), None, SOON), Rung::No);
        drop(bell);
        assert!(store.bell_of(first).is_none());
        assert_eq!(second.wait(Some(&before), None, Duration::from_secs(60)), Rung::Yes);
        store.ring();
    }

    #[test]
    fn the_end_of_the_asker_ends_the_wait() {
        let (_dir, store, lock) = store();
        let (_, mut bell) = store.line_up(&lock).unwrap();
        let mut asker = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let pidfd = crate::handover::process(asker.id()).unwrap();
        assert_eq!(bell.wait(None, Some(&pidfd), SOON), Rung::No);
        asker.kill().unwrap();
        assert_eq!(bell.wait(None, Some(&pidfd), Duration::from_secs(60)), Rung::Abandoned);
        asker.wait().unwrap();
    }
}
