//! Signals that end a person's command, held back while it changes something, so that it can put it in order first.

use std::cell::Cell;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::report::Exit;

/// From here on SIGINT, SIGTERM and SIGHUP are read instead, so that the last word is ours.
pub(super) fn held_back() -> Result<SignalFd> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

/// Whether one of them has come.
#[derive(Debug)]
pub(super) struct Interrupt {
    signals: SignalFd,
    came: Cell<Option<Exit>>,
}

impl Interrupt {
    /// Begins to hold them back.
    pub(super) fn begin() -> Result<Interrupt> {
        Ok(Interrupt { signals: held_back()?, came: Cell::new(None) })
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
