//! The files of a machine, shared by every process that loads its library.
//!
//! `live` starts with a generation number and a flag word, so that a reading call costs one `pread`: odd
//! generations mean that a writer is at work (or died there), and nothing read under them is kept.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::code::{Code, Outcome};
use crate::fault::{MAX_FAULTS, MUTATORS, Plan, Scope, Tally};
use crate::state::{Config, State};
use crate::tree;
use crate::window;

/// Directory of the machine's files, beside the library or one level up.
pub const DIR: &str = "nvml-sim";

const MACHINE: &str = "machine.json";
const STATE: &str = "state.json";
const PLAN: &str = "plan.json";
const LIVE: &str = "live";
const LOCK: &str = "lock";

const FLAGS_AT: u64 = 8;
const TALLIES_AT: u64 = 16;
const COUNTS_AT: u64 = TALLIES_AT + 16 * MAX_FAULTS as u64;

/// A file of the machine that cannot be used.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused.
    Io(PathBuf, io::Error),
    /// It does not say what it should.
    Format(PathBuf, serde_json::Error),
    /// The rules refused.
    Refused(Code),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Format(path, error) => {
                write!(f, "{} is damaged ({error}); create the machine anew", path.display())
            }
            Self::Refused(code) => write!(f, "the driver's rules say: {code}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<Code> for Error {
    fn from(code: Code) -> Self {
        Self::Refused(code)
    }
}

impl From<Error> for Code {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(code) => code,
            Error::Io(..) | Error::Format(..) => Self::UNKNOWN,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Head {
    generation: u64,
    flags: u64,
}

/// What the machine was at some moment.
#[derive(Debug)]
pub struct Snapshot {
    generation: u64,
    /// Its instances.
    pub state: State,
    /// Its orders.
    pub plan: Plan,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    root: PathBuf,
    /// Its fixed part.
    pub config: Config,
    /// Missing where only the library is there, as in a container: then nothing can be changed.
    live: Option<File>,
    window: Option<Window>,
    cache: Mutex<Option<Arc<Snapshot>>>,
}

/// The view behind a library, and what of it this process can open.
#[derive(Debug)]
struct Window {
    library: PathBuf,
    whole: Config,
    gpus: Vec<usize>,
}

/// Leave for one call to go on.
#[derive(Debug)]
pub struct Pass {
    head: Head,
    delay: Duration,
    kill_after: bool,
}

impl Machine {
    /// Writes the files of a new machine into `library_dir`.
    pub fn create(library_dir: &Path, config: Config, state: &State) -> Result<Self, Error> {
        let dir = library_dir.join(DIR);
        fs::create_dir_all(&dir).map_err(|error| Error::Io(dir.clone(), error))?;
        write_json(&dir.join(MACHINE), &config)?;
        write_json(&dir.join(STATE), state)?;
        write_json(&dir.join(PLAN), &Plan::default())?;
        // Unprivileged clients count calls too.
        for (name, content) in [(LOCK, &[][..]), (LIVE, &[0; COUNTS_AT as usize][..])] {
            let path = dir.join(name);
            fs::write(&path, content)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o666)))
                .map_err(|error| Error::Io(path, error))?;
        }
        let machine = Self::open(library_dir)?;
        machine.draw(state)?;
        Ok(machine)
    }

    /// Opens the machine whose library this is: by its files, or where these are not by what is behind the library.
    pub fn of_library(library: &Path) -> Result<Self, Error> {
        let dir = library.parent().unwrap_or(Path::new("/"));
        match Self::open(dir) {
            Err(Error::Io(path, error)) if error.kind() == io::ErrorKind::NotFound => {
                Self::look(library).unwrap_or(Err(Error::Io(path, error)))
            }
            outcome => outcome,
        }
    }

    /// The machine that a container sees; `None` where the library shows none.
    fn look(library: &Path) -> Option<Result<Self, Error>> {
        let whole = match window::look(library) {
            Ok(view) => view?.config,
            Err(error) => return Some(Err(Error::Io(library.to_owned(), error))),
        };
        let Some(gpus) = window::visible_gpus(Path::new("/dev"), &whole) else {
            return Some(Err(Error::Refused(Code::DRIVER_NOT_LOADED)));
        };
        let mut config = whole.clone();
        config.gpus = gpus.iter().filter_map(|index| whole.gpus.get(*index).cloned()).collect();
        let window = Some(Window { library: library.to_owned(), whole, gpus });
        Some(Ok(Self { dir: PathBuf::new(), root: "/".into(), config, live: None, window, cache: Mutex::default() }))
    }

    /// Opens the machine whose library lies in `library_dir`.
    pub fn open(library_dir: &Path) -> Result<Self, Error> {
        let beside = library_dir.join(DIR);
        let above = library_dir.parent().unwrap_or(library_dir).join(DIR);
        let dir = if !beside.exists() && above.exists() { above } else { beside };
        let config: Config = read_json(&dir.join(MACHINE))?;
        let path = dir.join(LIVE);
        let live = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .or_else(|_| File::open(&path))
            .map_err(|error| Error::Io(path, error))?;
        let root = dir.parent().unwrap_or(library_dir).join(&config.root);
        Ok(Self { dir, root, config, live: Some(live), window: None, cache: Mutex::default() })
    }

    /// The driver root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether uid 0 is, seen from here, who made the machine as root: in the user namespace of somebody else it is not,
    /// as the driver asks for CAP_SYS_ADMIN in the first one.
    pub fn belongs_to_root(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.metadata().is_ok_and(|meta| meta.uid() == 0))
    }

    /// Whether this process can open /dev/nvidia-caps/nvidia-cap1, the capability `mig/config`. No driver answers here.
    pub fn may_configure(&self) -> bool {
        window::opens(&self.root.join("dev/nvidia-caps/nvidia-cap1"), self.config.majors.caps, 1)
    }

    fn io(&self, name: &str) -> impl FnOnce(io::Error) -> Error {
        let path = self.dir.join(name);
        move |error| Error::Io(path, error)
    }

    /// Opened for each use: a descriptor inherited over fork would share its lock with the child.
    fn lock(&self, name: &str) -> Result<Flock<File>, Error> {
        let path = self.dir.join(name);
        let file = OpenOptions::new()
            .read(true)
            .open(&path)
            .or_else(|_| OpenOptions::new().write(true).create(true).truncate(false).mode(0o666).open(&path))
            .map_err(|error| Error::Io(path.clone(), error))?;
        let mut file = file;
        loop {
            match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(lock) => return Ok(lock),
                Err((back, nix::errno::Errno::EINTR)) => file = back,
                Err((_, errno)) => return Err(Error::Io(path, errno.into())),
            }
        }
    }

    fn live(&self) -> Result<&File, Error> {
        self.live.as_ref().ok_or(Error::Refused(Code::NO_PERMISSION))
    }

    fn head(&self) -> Result<Head, Error> {
        if self.window.is_some() {
            return Ok(Head { generation: 1, flags: 0 }); // never kept
        }
        let mut word = [0; 16];
        self.live()?.read_exact_at(&mut word, 0).map_err(self.io(LIVE))?;
        let [generation, flags] = [0, 8].map(|at| number(&word, at));
        Ok(Head { generation, flags })
    }

    fn poke(&self, at: u64, numbers: &[u64]) -> Result<(), Error> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        self.live()?.write_all_at(&bytes, at).map_err(self.io(LIVE))
    }

    /// Replaces a file so that readers notice, and see either the old or the new one.
    fn publish<T: Serialize>(&self, _held: &Flock<File>, name: &str, value: &T) -> Result<(), Error> {
        let fresh = self.dir.join(format!(".{name}.new"));
        write_json(&fresh, value)?;
        let busy = self.head()?.generation | 1;
        self.poke(0, &[busy])?;
        fs::rename(&fresh, self.dir.join(name)).map_err(self.io(name))?;
        self.poke(0, &[busy + 1])
    }

    fn read(&self, head: Head) -> Result<Arc<Snapshot>, Error> {
        if let Some(Window { library, whole, gpus }) = &self.window {
            let view = window::look(library).map_err(|error| Error::Io(library.clone(), error))?;
            let state = view.ok_or(Code::UNKNOWN)?.state;
            let state = window::visible_state(Path::new("/dev"), whole, &state, gpus);
            return Ok(Arc::new(Snapshot { generation: head.generation, state, plan: Plan::default() }));
        }
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        match cache.as_ref() {
            Some(known) if known.generation == head.generation && head.generation.is_multiple_of(2) => {
                Ok(Arc::clone(known))
            }
            _ => {
                let fresh = Arc::new(Snapshot {
                    generation: head.generation,
                    state: read_json(&self.dir.join(STATE))?,
                    plan: read_json(&self.dir.join(PLAN))?,
                });
                *cache = Some(Arc::clone(&fresh));
                Ok(fresh)
            }
        }
    }

    /// The machine as it is now.
    pub fn snapshot(&self) -> Result<Arc<Snapshot>, Error> {
        self.read(self.head()?)
    }

    /// The machine as the call with this pass finds it.
    pub fn view(&self, pass: &Pass) -> Outcome<Arc<Snapshot>> {
        Ok(self.read(pass.head)?)
    }

    /// Changes the state under the lock and brings /proc into step, which also mends what a killed process left.
    pub fn change<T>(&self, edit: impl FnOnce(&Config, &mut State) -> Outcome<T>) -> Result<T, Error> {
        self.live()?;
        let lock = self.lock(LOCK)?;
        let before: State = read_json(&self.dir.join(STATE))?;
        let mut after = before.clone();
        let result = edit(&self.config, &mut after);
        if result.is_ok() && after != before {
            self.publish(&lock, STATE, &after)?;
        }
        let state = if result.is_ok() { &after } else { &before };
        tree::sync(&self.root, &self.config, state).map_err(|error| Error::Io(self.root.join("proc"), error))?;
        if result.is_ok() {
            self.draw(state)?;
        }
        Ok(result?)
    }

    /// Shows containers what there is, where the machine has a driver tree.
    fn draw(&self, state: &State) -> Result<(), Error> {
        let Some((library, size)) = &self.config.window else { return Ok(()) };
        let library = self.root.join(library);
        if window::look(&library).is_ok_and(|view| view.is_some_and(|view| view.state == *state)) {
            return Ok(());
        }
        window::draw(&library, *size, &self.config, state).map_err(|error| Error::Io(library, error))
    }

    /// Like [`Self::change`], on behalf of the call with this pass; `serialise` makes it wait its turn.
    pub fn change_slowly<T>(
        &self,
        pass: &mut Pass,
        gpu: usize,
        edit: impl FnOnce(&Config, &mut State) -> Outcome<T>,
    ) -> Outcome<T> {
        let scope = if pass.head.flags == 0 { None } else { self.view(pass)?.plan.serialise };
        let _turn = match scope {
            None => None,
            Some(Scope::System) => Some(self.lock("turn-system")?),
            Some(Scope::Gpu) => Some(self.lock(&format!("turn-gpu{gpu}"))?),
        };
        thread::sleep(std::mem::take(&mut pass.delay));
        Ok(self.change(edit)?)
    }

    /// Changes the orders. `tallies` of new faults start at nought.
    pub fn order<T>(&self, edit: impl FnOnce(&mut Plan, &mut Vec<Tally>) -> T) -> Result<T, Error> {
        let lock = self.lock(LOCK)?;
        let mut plan: Plan = read_json(&self.dir.join(PLAN))?;
        let mut tallies = self.tallies(plan.faults.len())?;
        let result = edit(&mut plan, &mut tallies);
        tallies.resize(plan.faults.len(), Tally::default());
        self.publish(&lock, PLAN, &plan)?;
        self.poke_tallies(&tallies)?;
        self.poke(FLAGS_AT, &[u64::from(plan.active(&tallies))])?;
        Ok(result)
    }

    /// How the first `count` faults fared.
    pub fn tallies(&self, count: usize) -> Result<Vec<Tally>, Error> {
        let mut bytes = vec![0; 16 * count.min(MAX_FAULTS)];
        self.live()?.read_exact_at(&mut bytes, TALLIES_AT).map_err(self.io(LIVE))?;
        Ok(bytes.chunks_exact(16).map(|pair| Tally { counted: number(pair, 0), fired: number(pair, 8) }).collect())
    }

    fn poke_tallies(&self, tallies: &[Tally]) -> Result<(), Error> {
        let numbers: Vec<u64> = tallies.iter().flat_map(|tally| [tally.counted, tally.fired]).collect();
        self.poke(TALLIES_AT, &numbers)
    }

    /// How often each call of `names` was made while counting was on.
    pub fn counts(&self, names: &[&'static str]) -> Result<Vec<(&'static str, u64)>, Error> {
        names.iter().enumerate().map(|(place, name)| Ok((*name, self.count(place)?))).collect()
    }

    fn count(&self, place: usize) -> Result<u64, Error> {
        let mut word = [0; 8];
        match self.live()?.read_at(&mut word, COUNTS_AT + 8 * place as u64) {
            Ok(_) => Ok(u64::from_ne_bytes(word)),
            Err(error) => Err(self.io(LIVE)(error)),
        }
    }

    /// Sets all counts to nought.
    pub fn clear_counts(&self, names: &[&str]) -> Result<(), Error> {
        let _lock = self.lock(LOCK)?;
        self.poke(COUNTS_AT, &vec![0; names.len()])
    }

    /// Lets a call go on, late, or not at all, as ordered. `names` lists the calls by place of their count, `gpu` tells which one
    /// this call is about.
    pub fn pass(
        &self,
        name: &str,
        names: fn() -> Vec<&'static str>,
        gpu: impl FnOnce(&State) -> Option<usize>,
    ) -> Outcome<Pass> {
        let head = self.head()?;
        if head.flags == 0 {
            return Ok(Pass { head, delay: Duration::ZERO, kill_after: false });
        }
        let snapshot = self.read(head)?;
        let plan = &snapshot.plan;
        let verdict = {
            let _lock = self.lock(LOCK)?;
            let mut tallies = self.tallies(plan.faults.len())?;
            let before = tallies.clone();
            let verdict = plan.judge(name, gpu(&snapshot.state), &mut tallies);
            if tallies != before {
                self.poke_tallies(&tallies)?;
                if !plan.active(&tallies) {
                    self.poke(FLAGS_AT, &[0])?;
                }
            }
            if let (true, Some(place)) = (plan.counting, names().iter().position(|known| *known == name)) {
                self.poke(COUNTS_AT + 8 * place as u64, &[self.count(place)? + 1])?;
            }
            verdict
        };
        if verdict.kill_before {
            die();
        }
        if let Some(code) = verdict.fail {
            thread::sleep(verdict.delay);
            return Err(code);
        }
        let mut delay = verdict.delay;
        if plan.serialise.is_none() || !MUTATORS.contains(&name) {
            thread::sleep(std::mem::take(&mut delay));
        }
        Ok(Pass { head, delay, kill_after: verdict.kill_after })
    }

    /// Ends a call.
    pub fn leave(&self, pass: &Pass) {
        thread::sleep(pass.delay);
        if pass.kill_after {
            die();
        }
    }
}

fn die() {
    // SIGKILL cannot be refused by its own sender.
    let _ = kill(Pid::from_raw(std::process::id() as i32), Signal::SIGKILL);
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|error| Error::Io(path.to_owned(), error))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Format(path.to_owned(), error))
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let bytes = serde_json::to_vec(value).map_err(|error| Error::Format(path.to_owned(), error))?;
    fs::write(path, bytes)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)))
        .map_err(|error| Error::Io(path.to_owned(), error))
}
