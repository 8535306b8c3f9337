//! Many `migctl run --wait` at once, as shipped, on two simulated GPUs: full, fair, and nothing lost when some are killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{World, binaries, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const WRAPPERS: usize = 56;
/// Wrappers beside these that are killed, waiting or holding.
const VICTIMS: usize = 24;
const PROFILES: [&str; 7] = ["1g.10gb", "2g.20gb", "1g.10gb", "3g.40gb", "1g.20gb", "7g.80gb", "1g.10gb"];
const LIMIT: Duration = Duration::from_secs(240);

fn start(world: &World, profile: &str, script: &str) -> Child {
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).args(["run", "--wait", "1h", profile, "--", "sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The same every time: where a test is to be random, its failures shall come again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below
    }
}

/// What a look at the line found against the rule.
#[derive(Default)]
struct Watch {
    most_overtaken: u64,
    longest_line: usize,
    turn_since: BTreeMap<u64, Instant>,
    /// The longest that one whose turn it was had not started.
    longest_turn: Duration,
}

impl Watch {
    fn look(&mut self, line: &[Value]) {
        self.longest_line = self.longest_line.max(line.len());
        let mut turns = BTreeMap::new();
        for waiter in line {
            let (overtaken, limit) = (waiter["overtaken"].as_u64().unwrap(), waiter["limit"].as_u64().unwrap());
            assert!(overtaken <= limit && limit == 16, "{waiter:#}");
            self.most_overtaken = self.most_overtaken.max(overtaken);
            if waiter["waits_for"].is_null() {
                let ticket = waiter["ticket"].as_u64().unwrap();
                let since = self.turn_since.get(&ticket).copied().unwrap_or_else(Instant::now);
                self.longest_turn = self.longest_turn.max(since.elapsed());
                turns.insert(ticket, since);
            }
        }
        self.turn_since = turns;
    }
}

#[test]
fn fifty_six_wrappers_keep_two_gpus_full_and_none_starves_or_loses_anything() {
    let world = World::new(&["a100-sxm4-80gb", "a100-sxm4-80gb"]);
    if !world.path("m/dev/nvidia0").exists() {
        return common::skip("fifty_six_wrappers_…", "no device nodes can be made here");
    }
    let (held, done) = (world.path("held"), world.path("done"));
    std::fs::create_dir_all(&held).unwrap();
    std::fs::create_dir_all(&done).unwrap();
    // A slice that two have at the same time: the second mkdir fails, and so does its wrapper.
    let work = |n: usize| {
        let (held, done) = (held.display(), done.display());
        format!("mkdir {held}/$MIG_UUID && sleep 0.{} && rmdir {held}/$MIG_UUID && touch {done}/{n}", 2 + n % 5)
    };
    let begun = Instant::now();
    let mut wrappers: Vec<(usize, Child)> = Vec::new();
    let mut victims: Vec<Child> = Vec::new();
    for n in 0..WRAPPERS {
        wrappers.push((n, start(&world, PROFILES[n % PROFILES.len()], &work(n))));
        if n % 2 == 0 && victims.len() < VICTIMS {
            victims.push(start(&world, PROFILES[n * 3 % PROFILES.len()], "exec sleep 600"));
        }
    }
    let (mut dice, mut watch, mut killed) = (Dice(7), Watch::default(), 0);
    while !wrappers.is_empty() || !victims.is_empty() {
        assert!(begun.elapsed() < LIMIT, "{} wrappers are left: {:#?}", wrappers.len(), world.document(&["queue"]));
        watch.look(world.document(&["queue"])["waiting"].as_array().unwrap());
        if !victims.is_empty() {
            let mut victim = victims.swap_remove(dice.roll(victims.len()));
            kill(Pid::from_raw(victim.id().cast_signed()), Signal::SIGKILL).unwrap();
            victim.wait().unwrap();
            killed += 1;
        }
        wrappers.retain_mut(|(n, child)| match child.try_wait().unwrap() {
            None => true,
            Some(status) if status.success() => false,
            Some(status) => panic!("{n} ({}): {status}, {}", PROFILES[*n % PROFILES.len()], said(child)),
        });
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((std::fs::read_dir(&done).unwrap().count(), killed), (WRAPPERS, VICTIMS), "all served");
    assert_eq!(std::fs::read_dir(&held).unwrap().count(), 0);
    eprintln!(
        "{WRAPPERS} served and {VICTIMS} killed in {:?}; {} in line at most, overtaken {} times at most; the longest turn \
         took {:?}",
        begun.elapsed(),
        watch.longest_line,
        watch.most_overtaken,
        watch.longest_turn
    );
    // Full means that nobody waits for whom there is room: one whose turn it is takes it, or is passed over after 5 s.
    assert!(watch.longest_line > 20, "{}", watch.longest_line);
    assert!(watch.longest_turn < Duration::from_secs(10), "room was left unused for {:?}", watch.longest_turn);
    wait_for("the killed ones' slices", Duration::from_secs(20), || {
        world.migctl(&["gc"]);
        world.leases().is_empty()
    });
    world.assert_clean("after all");
    assert_eq!(world.document(&["queue"])["waiting"].as_array().unwrap().len(), 0);
    let left = |dir: &Path| -> Vec<String> {
        dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(left(&world.path("state/holders")), Vec::<String>::new());
    let line: Vec<String> =
        left(&world.path("state/queue")).into_iter().filter(|n| n != "last" && n != "scanned").collect();
    assert_eq!(line, Vec::<String>::new());
}

fn said(child: &mut Child) -> String {
    use std::io::Read;
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}
