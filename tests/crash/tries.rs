//! The tries: which points of a run, and what is made of each.
//!
//! One point in [`SAMPLE`], beginning at another one in each row, or all of them with MIG_TEST_CRASH=all.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;

use crate::common::text;
use crate::points::{self, Point};
use crate::stage::{Act, Stage, is_killed};

/// Of so many points one is tried where nobody asks for all.
const SAMPLE: usize = 24;

/// What makes a kill good.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Recovery {
    Gc,
    /// The next acquire, without gc.
    Acquire,
}

/// What a run does at least, or it is not what was meant.
pub struct Least {
    /// System calls that change something.
    pub system: usize,
    /// Calls of the driver.
    pub driver: usize,
    /// Those that change a GPU.
    pub changes: usize,
}

/// Of so many one is to be tried.
pub fn every() -> usize {
    if std::env::var_os("MIG_TEST_CRASH").is_some_and(|which| which == "all") { 1 } else { SAMPLE }
}

/// Those of a row that are to be tried; another sample for each `of`.
pub fn chosen<'a, T>(all: &'a [T], name: &str, of: impl Hash) -> Vec<&'a T> {
    let mut hasher = DefaultHasher::new();
    (name, of).hash(&mut hasher);
    // Not beyond the last of a short row, or nothing would be tried of it.
    let every = every().min(all.len().max(1));
    let first = usize::try_from(hasher.finish() % every as u64).unwrap();
    all.iter().skip(first).step_by(every).collect()
}

/// Kills what `prepare` makes ready at every point of its run, and has `make_good` look at what is left, in either way.
/// `end`: what is there after a run that was not killed.
pub fn kill_everywhere<T>(
    name: &str,
    stage: &Stage,
    least: Least,
    prepare: impl Fn() -> (T, Act),
    make_good: impl Fn(T, Recovery, &str),
    end: impl Fn(T, &str),
) {
    let unkilled = |run: &dyn Fn(&Act) -> std::process::Output, when: &str| {
        let (prepared, act) = prepare();
        let output = run(&act);
        assert!(output.status.success(), "{name} {when}: {}", text(&output));
        prepared
    };
    let recorded = unkilled(&|act| stage.record(act), "recorded");
    let system = points::changes(&stage.world, &stage.record_file());
    end(recorded, "after the run that was recorded");
    // For itself: the simulator makes calls to count.
    let count = |act: &Act| {
        stage.world.sim("count", &["on"]);
        stage.perform(act, None)
    };
    let counted = unkilled(&count, "counted");
    let driver = points::driver_calls(&stage.world);
    stage.world.sim("count", &["off"]);
    end(counted, "after the run that was counted");
    let changes = driver.iter().filter(|point| matches!(point, Point::After(..))).count();
    let found = (system.len(), driver.len() - changes, changes);
    assert!(
        found.0 >= least.system && found.1 >= least.driver && found.2 >= least.changes,
        "{name}: {found:?} points only: {:#?}",
        system.iter().map(|change| &change.line).collect::<Vec<_>>()
    );
    let points: Vec<Point> = system.into_iter().map(|change| change.point).chain(driver).collect();

    let attempt = |point: &Point, recovery: Recovery| {
        let when = format!("{name} killed {point}, then {recovery:?}");
        let (prepared, act) = prepare();
        let output = stage.perform(&act, Some(point));
        assert!(is_killed(&output) || output.status.success(), "{when}: {}", text(&output));
        make_good(prepared, recovery, &when);
        is_killed(&output)
    };
    let killed = [Recovery::Gc, Recovery::Acquire].map(|recovery| {
        let tried = chosen(&points, name, recovery == Recovery::Gc);
        let killed = tried.iter().filter(|point| attempt(point, recovery)).count();
        // Two runs may differ by a call.
        assert!(
            killed > 0 && killed + 1 + tried.len() / 10 >= tried.len(),
            "{name}: {killed} of {} killed",
            tried.len()
        );
        killed
    });
    note(&format!("kills\t{name}\t{}\t{}\t{}", points.len(), killed[0], killed[1]));
}

/// Notes what was tried: scripts/test-crash adds it up.
pub fn note(line: &str) {
    eprintln!("{}", line.replace('\t', "  "));
    if let Some(file) = std::env::var_os("MIG_TEST_CRASHES") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}
