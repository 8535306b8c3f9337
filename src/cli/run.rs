//! `migctl run`: a command with slices of its own, from its start until the last of its processes has ended.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::unistd::Pid;

use crate::config::Settings;
use crate::container::Own;
use crate::engine::{self, Engine, Failure, Released, tickets_in};
use crate::gpu::nvml::Nvml;
use crate::handover::{self, SignalMask};
use crate::host::{self, ProcessId};
use crate::job::{self, Public};
use crate::lease::{Holder, Lease, Way};
use crate::report::{Exit, Misused, Refused};
use crate::request::{self, Request};
use crate::store::Store;

/// What a shell says when it can't find, or can't start, a program (POSIX, Shell Command Language 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_STARTED: u8 = 126;
/// How often a terminal is told how long it has waited.
const TICK: Duration = Duration::from_secs(1);

/// Arguments of `migctl run`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What it shall have: 1g.10gb, 2x1g.10gb,3g.40gb, 2g.20gb|1g.20gb, 8GiB, MIG-…; in a job that has slices, those are
    /// used
    #[arg(value_name = "REQUEST")]
    request: Option<String>,
    /// Wait in line for room, at most so long
    #[arg(long, value_name = "TIME", value_parser = super::wait)]
    wait: Option<u32>,
    /// On this GPU: index, UUID or PCI address
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,
    /// Keep the command from opening other slices than its own, by the device rules of a cgroup
    #[arg(long, conflicts_with = "shell")]
    confine: bool,
    /// Start nothing: print the variables for the shell that calls this, which holds the slices until it ends
    #[arg(long, conflicts_with = "command")]
    shell: bool,
    /// With --shell: it is this process that holds them [default: the calling shell]
    #[arg(long, value_name = "PID", requires = "shell")]
    pid: Option<u32>,
    /// The command and its arguments
    #[arg(value_name = "CMD", last = true, required_unless_present = "shell")]
    command: Vec<OsString>,
}

/// The exit code is the command's, 128 and its signal's number, or one of ours when it was not started.
pub(super) fn run(settings: &Settings, args: &Args) -> Result<u8> {
    let mut request = match &args.request {
        Some(text) => Some(request::typed(text, args.gpu.as_deref())?),
        None if args.gpu.is_some() => bail!(Misused("--gpu says only where; also ask for a profile".into())),
        None => None,
    };
    if let Some(job) = super::job::of_this_process(&settings.state_dir)? {
        return in_job(&job, request.as_ref(), args);
    }
    let Some(mut request) = request.take() else {
        bail!(Misused("what shall it have? name a profile, as in: migctl run 1g.10gb -- CMD".into()));
    };
    request.wait_s = args.wait;
    if !nix::unistd::geteuid().is_root() {
        bail!(Refused(not_root()));
    }
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let signals = Signals::begin()?;
    if args.shell {
        let shell = args.pid.map_or_else(calling_shell, host::process);
        let Some(shell) = shell else { bail!(Misused("the process that --pid names is not there".into())) };
        let holder = Holder { init: Some(shell), ..holder_of(shell.pid, host::process_name(shell.pid)) };
        let lease = acquire(settings, &engine, &request, &holder, &signals)?;
        let told = engine.nodes_for(&lease).map_err(Into::into).and_then(|_| export(&environment(&lease)));
        return told.inspect_err(|_| give_back(&engine, &lease));
    }
    let program = args.command.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let holder = holder_of(std::process::id(), program.to_string_lossy().into_owned());
    let lease = acquire(settings, &engine, &request, &holder, &signals)?;
    let confined = args.confine || settings.confine;
    let code = start(&engine, &lease, &args.command, confined, &signals);
    give_back(&engine, &lease);
    signals.obey()?;
    code
}

/// Within a job that has slices: the command becomes what this process is.
fn in_job(job: &Public, request: Option<&Request>, args: &Args) -> Result<u8> {
    if args.confine {
        let why = "--confine is for a command that gets slices of its own; jobs.confine of the settings is for jobs";
        bail!(Misused(format!("{why}, and this is job {}", job.key)));
    }
    if let Some(request) = request.filter(|request| !job.meets(request)) {
        let (has, wanted) = (job.profiles(), request::format_alternatives(&request.alternatives));
        bail!(Failure::BadRequest(format!(
            "job {} has {has}, not {wanted}; ask for that when the job is submitted, or leave it out here",
            job.key
        )));
    }
    if args.shell {
        return export(&job.environment());
    }
    let [program, words @ ..] = args.command.as_slice() else { return Ok(Exit::Ok as u8) };
    let error = Command::new(program).args(words).envs(job.environment()).exec();
    Ok(not_started(program, &error))
}

fn holder_of(pid: u32, command: String) -> Holder {
    let printable = command.chars().filter(|c| !c.is_control()).take(60).collect();
    Holder { command: Some(printable), ..engine::new_holder(Way::Run, pid) }
}

fn environment(lease: &Lease) -> Vec<(&'static str, String)> {
    job::environment(&lease.uuids(), &lease.profiles(), &lease.token)
}

fn acquire(
    settings: &Settings,
    engine: &Engine<'_>,
    request: &Request,
    holder: &Holder,
    signals: &Signals,
) -> Result<Lease> {
    let progress = holder.owner.filter(|_| request.wait_s.is_some()).and_then(|owner| Progress::begin(settings, owner));
    let given = engine.acquire_unless(request, holder, Some(signals.descriptor()?));
    drop(progress);
    if let (Ok(lease), true) = (&given, signals.end_us()) {
        give_back(engine, lease);
    }
    signals.obey()?;
    Ok(given?)
}

/// Runs the command to its end, with everything by which it can be seen that its tree is alive: an inherited lock, a cgroup
/// of its own where there can be one, and its first process.
fn start(engine: &Engine<'_>, lease: &Lease, words: &[OsString], confined: bool, signals: &Signals) -> Result<u8> {
    let [program, arguments @ ..] = words else { return Ok(Exit::Ok as u8) };
    engine.nodes_for(lease)?;
    // It is this process that is seen, and after a kill what is in the cgroup.
    let us = host::process(std::process::id()).context("this process is not in /proc")?;
    let recorded = |path: &str| engine.attach(&lease.token, us, path);
    let cgroup = match Own::make(&lease.token, recorded) {
        Ok(cgroup) => Some(cgroup),
        Err(gone @ Failure::Stale(_)) => return Err(gone.into()),
        Err(error) if confined => return Err(error).context("the command can't be confined"),
        Err(error) => {
            tracing::info!("the command gets no cgroup of its own: {error}");
            None
        }
    };
    let held = engine.hold(&lease.token)?;
    if let Some(cgroup) = cgroup.as_ref().filter(|_| confined) {
        engine.confine(Some(lease), cgroup)?;
    }
    let mut command = Command::new(program);
    command.args(arguments).envs(environment(lease));
    handover::dies_with_us(&mut command);
    signals.before.in_child(&mut command);
    if let Some(cgroup) = &cgroup {
        handover::in_cgroup(&mut command, cgroup.procs()?);
    }
    fcntl(held.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    if signals.end_us() {
        return Ok(Exit::Interrupted as u8); // nobody is there yet to hand it on to
    }
    let spawned = command.spawn();
    drop(held);
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Ok(not_started(program, &error)),
    };
    loop {
        signals.forward_next(child.id())?;
        if let Some(status) = child.try_wait()? {
            return Ok(code_of(status));
        }
    }
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(Exit::Internal as i32);
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn not_started(program: &OsString, error: &std::io::Error) -> u8 {
    eprintln!("migctl: cannot start {}: {error}", Path::new(program).display());
    if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_STARTED }
}

fn give_back(engine: &Engine<'_>, lease: &Lease) {
    let kept = match engine.release(&lease.token, None, "its command has ended") {
        Ok(Released::Done | Released::Unknown) => return,
        Ok(Released::Busy { reason }) => reason,
        Ok(Released::Announced) => "the lock was not free".into(),
        Err(error) => error.to_string(),
    };
    eprintln!("migctl: {} is not free yet: {kept}; the next request or migctl gc frees it", lease.profiles());
}

fn not_root() -> String {
    "slices are cut by root; in a Slurm job that asked for one (--gres=mig:1g.10gb) migctl run uses that, and an \
     administrator gives a user slices by: migctl reserve --uid USER REQUEST"
        .to_owned()
}

/// The shell that runs us. What `$(…)` starts is a copy of it, which has ended in a moment, and so has what makes us root.
fn calling_shell() -> Option<ProcessId> {
    let makes_root = |pid| {
        let program = host::program(pid)?;
        Some(["sudo", "doas"].map(OsStr::new).contains(&program.file_name()?))
    };
    let mut shell = host::parent(std::process::id())?;
    while let Some(above) = host::parent(shell)
        && (makes_root(shell) == Some(true) || host::is_copy(shell, above))
    {
        shell = above;
    }
    host::process(shell)
}

/// Prints variables as commands of a POSIX shell. None of the values has a quote in it.
fn export(variables: &[(&str, String)]) -> Result<u8> {
    let lines: String = variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    super::write(lines.as_bytes())?;
    Ok(Exit::Ok as u8)
}

/// Signals, read instead of obeyed.
struct Signals {
    /// Those that were held back already.
    before: SignalMask,
    /// Those that would end us.
    ends: SignalFd,
    /// All that can be handed on, and the one that says that a child has changed.
    all: SignalFd,
    /// The one that has ended us.
    end: Cell<Option<Signal>>,
}

/// Our own faults, and a terminal's stops, which the child gets too: obeyed as always.
const OBEYED: [Signal; 11] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGTRAP,
    Signal::SIGABRT,
    Signal::SIGSYS,
    Signal::SIGPIPE,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];
/// Those that nobody dies of (signal(7)).
const HARMLESS: [Signal; 4] = [Signal::SIGCHLD, Signal::SIGCONT, Signal::SIGURG, Signal::SIGWINCH];

impl Signals {
    /// From here on. What we were started to ignore is left alone, and ignored by the command too.
    fn begin() -> Result<Signals> {
        handover::notice_children();
        let before = SignalMask::now();
        let taken = |signal: &Signal| !OBEYED.contains(signal) && !handover::is_ignored(*signal as i32);
        let all: SigSet = Signal::iterator().filter(taken).collect();
        let mut ends = all;
        HARMLESS.into_iter().for_each(|signal| ends.remove(signal));
        all.thread_block()?;
        let open = |signals: &SigSet| SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Signals { before, ends: open(&ends)?, all: open(&all)?, end: Cell::new(None) })
    }

    /// Readable when one has come that would have ended us.
    fn descriptor(&self) -> Result<File> {
        Ok(self.ends.as_fd().try_clone_to_owned()?.into())
    }

    /// Whether one has come that would have ended us.
    fn end_us(&self) -> bool {
        if let (None, Ok(Some(info))) = (self.end.get(), self.ends.read_signal()) {
            self.end.set(signal_of(&info));
        }
        self.end.get().is_some()
    }

    /// Ends us as that one would have.
    fn obey(&self) -> Result<()> {
        let Some(signal) = self.end.get() else { return Ok(()) };
        let _ = SigSet::all().thread_unblock();
        let _ = raise(signal);
        bail!(Failure::Interrupted)
    }

    /// Waits for the next one and hands it on, unless the terminal has sent it to the whole foreground group, or it says
    /// that the child has changed.
    fn forward_next(&self, child: u32) -> Result<()> {
        let mut polled = [PollFd::new(self.all.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => return Ok(()),
            other => other?,
        };
        let Some(info) = self.all.read_signal()? else { return Ok(()) };
        match signal_of(&info) {
            None | Some(Signal::SIGCHLD) => {}
            // That the terminal is gone is told to its session's leader alone, and that may be us (tty_signal_session_leader in
            // Linux, drivers/tty/tty_jobctrl.c).
            Some(signal) if info.ssi_code == libc::SI_KERNEL && signal != Signal::SIGHUP => {}
            // It may have ended in this moment.
            Some(signal) => drop(kill(Pid::from_raw(child.cast_signed()), signal)),
        }
        Ok(())
    }
}

fn signal_of(info: &siginfo) -> Option<Signal> {
    Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
}

/// Tells a terminal every second that we wait, and where. (Elsewhere it is told once, by the log.)
struct Progress {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// `owner`: as in the ticket. `None` where there is no terminal.
    fn begin(settings: &Settings, owner: ProcessId) -> Option<Progress> {
        if !std::io::stderr().is_terminal() {
            return None;
        }
        let (end, ended) = channel();
        let store = Store::at(&settings.state_dir);
        let thread = std::thread::spawn(move || tell(&store, owner, &ended));
        Some(Progress { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn tell(store: &Store, owner: ProcessId, ended: &Receiver<()>) {
    let begun = Instant::now();
    let mut told = false;
    while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        let tickets = tickets_in(store).unwrap_or_default();
        let Some(at) = tickets.iter().position(|ticket| ticket.holder.owner == Some(owner)) else { continue };
        let limit_ms = tickets[at].until_boot_ms.saturating_sub(tickets[at].since_boot_ms);
        let limit = request::format_wait(u32::try_from(limit_ms / 1000).unwrap_or(u32::MAX));
        let (place, of, waited) = (at + 1, tickets.len(), begun.elapsed().as_secs());
        let line = format!("waits in line, place {place} of {of}, at most {limit}: {waited}s");
        let _ = write!(std::io::stderr(), "\r\x1b[Kmigctl: {line}");
        told = true;
    }
    if told {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
}
