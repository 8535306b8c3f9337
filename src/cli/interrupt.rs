//! Signals that end a person's command, held back while it changes something, so that it can put it in order first.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::report::Exit;

/// Whether one of them has come.
#[derive(Debug)]
pub(super) struct Interrupt {
    signals: SignalFd,
    came: Cell<Option<Exit>>,
}

impl Interrupt {
    /// From here on SIGINT, SIGTERM and SIGHUP are read instead, so that the last word is ours.
    pub(super) fn begin() -> Result<Interrupt> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Interrupt { signals, came: Cell::new(None) })
    }

    /// Waits for one, at most so long: the exit code for it, if it came.
    pub(super) fn wait(&self, limit: Duration) -> Option<Exit> {
        let limit = PollTimeout::try_from(limit.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], limit);
        self.came()
    }

    /// The exit code for the first that came, if one has.
    pub(super) fn came(&self) -> Option<Exit> {
        if self.came.get().is_none()
            && let Ok(Some(info)) = self.signals.read_signal()
        {
            let terminated = i32::try_from(info.ssi_signo) == Ok(Signal::SIGTERM as i32);
            self.came.set(Some(if terminated { Exit::Terminated } else { Exit::Interrupted }));
        }
        self.came.get()
    }
}
