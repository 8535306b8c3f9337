//! A cgroup whose processes can't open the devices of other slices: with real processes, and nodes of a major that no driver
//! has. What such a cgroup lets be opened gives ENXIO, what it denies EPERM.
//!
//! On cgroup v1 where the machine has it, and on v2: where that is not what is mounted, a test starts itself again where it is.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{skip, text};
use mig_hook::container::Own;
use mig_hook::handover::in_cgroup;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

const ENGINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/engines.sh");
const OPENS: &str = "opens";
const DENIED: &str = "denied";

fn this_test() -> String {
    std::thread::current().name().unwrap().to_owned()
}

/// Whether cgroup v2 is all that is mounted.
fn v2_alone() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A cgroup to confine, and nodes to try.
struct Site {
    own: Own,
    /// Those below it, parents first.
    below: Vec<Own>,
    nodes: tempfile::TempDir,
    /// Of no driver.
    major: u32,
}

impl Site {
    fn on_v1() -> Option<Site> {
        if v2_alone() {
            skip(&this_test(), "there is no cgroup v1");
            return None;
        }
        Site::new()
    }

    /// `None` also where the test was over when it had been started again.
    fn on_v2() -> Option<Site> {
        if v2_alone() {
            return Site::new();
        }
        let mut again = Command::new("unshare");
        again.args(["--mount", "--propagation", "private", ENGINES, "view"]).env("ENG_CGROUPS", "2");
        let possible = again.args(["sh", "-c", "test -w /sys/fs/cgroup/cgroup.procs"]).output();
        if !possible.is_ok_and(|output| output.status.success()) {
            skip(&this_test(), "no cgroup v2 tree can be mounted");
            return None;
        }
        let mut again = Command::new("unshare");
        again.args(["--mount", "--propagation", "private", ENGINES, "view"]).env("ENG_CGROUPS", "2");
        // More than one thread, or the test would run in the main thread and not know its name.
        again.arg(std::env::current_exe().unwrap()).args(["--test-threads", "2", "--exact", &this_test()]);
        let output = again.output().unwrap();
        let said = text(&output);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "on cgroup v2:\n    {}",
            said.replace('\n', "\n    ")
        );
        None
    }

    fn new() -> Option<Site> {
        let no = |why: &str| {
            skip(&this_test(), why);
            None
        };
        let devices = std::fs::read_to_string("/proc/devices").unwrap();
        let taken: BTreeSet<u32> =
            devices.lines().filter_map(|line| line.trim().split_once(' ')?.0.parse().ok()).collect();
        // Numbers for local use (Documentation/admin-guide/devices.txt).
        let Some(major) = (240..=254).find(|major| !taken.contains(major)) else {
            return no("every major for local use is taken");
        };
        let token = format!("{}-{}", this_test().replace("::", "-"), std::process::id());
        let own = match Own::make(&token, |_| Ok::<(), mig_hook::container::ContainerError>(())) {
            Ok(own) => own,
            Err(error) => return no(&format!("no cgroup can be made: {error}")),
        };
        let site = Site { own, below: vec![], nodes: tempfile::tempdir().unwrap(), major };
        let path = site.nodes.path().join("probe");
        if let Err(error) = mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(major.into(), 0)) {
            return no(&format!("no device node can be made: {error}"));
        }
        match verdict(&mut cat(&path)) {
            OPENS => Some(site),
            _ => no("device nodes don't open below the directory for temporary files"),
        }
    }

    /// The cgroup at this path below ours.
    fn below(&mut self, relative: &str) -> usize {
        self.below.push(Own::at(&self.own.dir().join(relative)).unwrap());
        self.below.len() - 1
    }

    fn node(&self, kind: SFlag, major: u32, minor: u32) -> PathBuf {
        let path = self.nodes.path().join(format!("{}-{major}-{minor}", kind.bits()));
        if !path.exists() {
            mknod(&path, kind, Mode::S_IRUSR, makedev(major.into(), minor.into())).unwrap();
        }
        path
    }

    /// How these minors open in a cgroup, one after the other.
    fn verdicts<const N: usize>(&self, group: &Own, minors: [u32; N]) -> [&'static str; N] {
        minors.map(|minor| {
            let node = self.node(SFlag::S_IFCHR, self.major, minor);
            verdict(in_cgroup(&mut cat(&node), group.procs().unwrap()))
        })
    }

    fn devices<const N: usize>(&self, minors: [u32; N]) -> [(u32, u32); N] {
        minors.map(|minor| (self.major, minor))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for own in self.below.iter().rev().chain([&self.own]) {
            let gone = own.remove();
            assert!(std::thread::panicking() || gone.is_ok_and(|gone| gone), "{} is left", own.path());
        }
    }
}

fn cat(node: &Path) -> Command {
    let mut command = Command::new("cat");
    command.arg(node).env("LC_ALL", "C");
    command
}

fn verdict(command: &mut Command) -> &'static str {
    let output = command.output().unwrap();
    match text(&output) {
        said if said.contains("No such device or address") => OPENS,
        said if said.contains("Operation not permitted") => DENIED,
        said => panic!("neither ENXIO nor EPERM: {said:?}"),
    }
}

fn own_devices_open_and_others_do_not(site: Option<Site>) {
    let Some(mut site) = site else { return };
    let before = site.below("before/inner");
    site.below.insert(0, Own::at(&site.own.dir().join("before")).unwrap());
    let before = before + 1;
    // A process that is in it already.
    let node = site.node(SFlag::S_IFCHR, site.major, 8);
    let mut waiting = Command::new("sh");
    waiting.args(["-c", "read line; exec cat \"$0\""]).arg(&node).env("LC_ALL", "C");
    waiting.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut waiting = in_cgroup(&mut waiting, site.own.procs().unwrap()).spawn().unwrap();

    let denied: Vec<(u32, u32)> = (1..=8).map(|minor| (site.major, minor)).collect();
    site.own.confine(&site.devices([7]), &denied).unwrap();

    let expected = [DENIED, DENIED, OPENS, DENIED, OPENS];
    let minors = [1, 6, 7, 8, 9];
    assert_eq!(site.verdicts(&site.own, minors), expected);
    assert_eq!(site.verdicts(&site.below[before], minors), expected, "a cgroup that was there");
    let after = site.below("after");
    assert_eq!(site.verdicts(&site.below[after], minors), expected, "a cgroup that was made later");
    waiting.stdin.take().unwrap().write_all(b"\n").unwrap();
    let said = text(&waiting.wait_with_output().unwrap());
    assert!(said.contains("Operation not permitted"), "{said}");

    let inside = |command: &mut Command| verdict(in_cgroup(command, site.own.procs().unwrap()));
    assert_eq!(inside(&mut cat(&site.node(SFlag::S_IFCHR, site.major - 1, 8))), OPENS, "another major");
    assert_eq!(inside(&mut cat(&site.node(SFlag::S_IFBLK, site.major, 8))), OPENS, "a block device");
    let null = in_cgroup(&mut cat(Path::new("/dev/null")), site.own.procs().unwrap()).status().unwrap();
    assert!(null.success());
    assert_eq!(verdict(&mut cat(&node)), OPENS, "outside of it nothing has changed");
}

#[test]
fn own_devices_open_and_others_do_not_on_v1() {
    own_devices_open_and_others_do_not(Site::on_v1());
}

#[test]
fn own_devices_open_and_others_do_not_on_v2() {
    own_devices_open_and_others_do_not(Site::on_v2());
}

fn confined_anew(site: Option<Site>) {
    let Some(site) = site else { return };
    site.own.confine(&site.devices([7]), &site.devices([8, 9])).unwrap();
    assert_eq!(site.verdicts(&site.own, [7, 8, 9]), [OPENS, DENIED, DENIED]);
    site.own.confine(&site.devices([8]), &site.devices([7, 8, 9])).unwrap();
    assert_eq!(site.verdicts(&site.own, [7, 8, 9]), [DENIED, OPENS, DENIED]);
}

#[test]
fn a_cgroup_that_an_earlier_job_left_serves_the_next_on_v1() {
    confined_anew(Site::on_v1());
}

#[test]
fn a_cgroup_that_an_earlier_job_left_serves_the_next_on_v2() {
    confined_anew(Site::on_v2());
}

/// As many as mig-minors lists.
fn thousands(site: Option<Site>) {
    let Some(site) = site else { return };
    let own = site.devices([12, 13, 3000]);
    let denied: Vec<(u32, u32)> = (1..=4322).map(|minor| (site.major, minor)).collect();
    site.own.confine(&own, &denied).unwrap();
    let minors = [1, 11, 12, 13, 14, 2999, 3000, 3001, 4322, 4323];
    let expected = [DENIED, DENIED, OPENS, OPENS, DENIED, DENIED, OPENS, DENIED, DENIED, OPENS];
    assert_eq!(site.verdicts(&site.own, minors), expected);
}

#[test]
fn thousands_are_denied_on_v1() {
    thousands(Site::on_v1());
}

#[test]
fn thousands_are_denied_on_v2() {
    thousands(Site::on_v2());
}

/// A v1 cgroup that lists what may be opened, with these entries, and one below it. `M` stands for our major.
fn strict(entries: &[&str]) -> Option<(Site, usize)> {
    let mut site = Site::on_v1()?;
    let above = site.below("strict");
    let dir = site.below[above].dir();
    std::fs::write(dir.join("devices.deny"), "a").unwrap();
    for entry in ["c 1:3 rwm"].iter().chain(entries) {
        std::fs::write(dir.join("devices.allow"), entry.replace('M', &site.major.to_string())).unwrap();
    }
    let job = site.below("strict/job");
    Some((site, job))
}

fn list(own: &Own) -> String {
    std::fs::read_to_string(own.dir().join("devices.list")).unwrap()
}

#[test]
fn single_entries_go_from_a_list_of_what_may_be_opened() {
    let Some((site, job)) = strict(&["c M:7 rwm", "c M:8 rw"]) else { return };
    let job = &site.below[job];
    assert_eq!(site.verdicts(job, [7, 8, 9]), [OPENS, OPENS, DENIED]);
    job.confine(&site.devices([7]), &site.devices([8, 9])).unwrap();
    assert_eq!(site.verdicts(job, [7, 8, 9]), [OPENS, DENIED, DENIED]);
    assert_eq!(list(job), format!("c 1:3 rwm\nc {}:7 rwm\n", site.major));
}

#[test]
fn of_an_entry_for_a_major_what_is_allowed_stays() {
    let Some((site, job)) = strict(&["c M:* rw", "c *:* m"]) else { return };
    let job = &site.below[job];
    assert_eq!(site.verdicts(job, [7, 8, 9]), [OPENS, OPENS, OPENS]);
    job.confine(&site.devices([7, 9]), &site.devices([8])).unwrap();
    assert_eq!(site.verdicts(job, [6, 7, 8, 9]), [DENIED, OPENS, DENIED, OPENS]);
    // With mknod alone nothing is opened.
    assert_eq!(list(job), format!("c 1:3 rwm\nc *:* m\nc {0}:7 rw\nc {0}:9 rw\n", site.major));
}

#[test]
fn an_entry_for_every_major_is_refused_and_nothing_changes() {
    let Some((site, job)) = strict(&["c *:* rwm"]) else { return };
    let job = &site.below[job];
    let before = list(job);
    let error = job.confine(&site.devices([7]), &site.devices([8])).unwrap_err().to_string();
    assert!(error.contains("devices.list: the entry c *:* rwm lets devices of every major be opened"), "{error}");
    assert_eq!(list(job), before);
}

#[test]
fn what_a_cgroup_above_denies_cannot_be_allowed() {
    let Some(mut site) = Site::on_v1() else { return };
    let job = site.below("job");
    site.own.confine(&[], &site.devices([7])).unwrap();
    let error = site.below[job].confine(&site.devices([7]), &[]).unwrap_err().to_string();
    assert!(error.contains("does a cgroup above it deny this device?"), "{error}");
}
