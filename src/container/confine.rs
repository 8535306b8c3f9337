//! What the processes of an [`Own`] cgroup may not open: rules of cgroup v1 (security/device_cgroup.c in Linux,
//! Documentation/admin-guide/cgroup-v1/devices.rst), or one more device program of v2.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::cgroup::{Place, Version, again};
use super::{ContainerError, Own, bpf, failed, program, refused};

/// What our program is called: the one that gives way when a cgroup is confined anew.
const PROGRAM: bpf::Name = *b"mig_confine\0\0\0\0\0";

/// Major and minor of character devices.
type Devices = BTreeSet<(u32, u32)>;

impl Own {
    /// From now on the processes in this cgroup and below it can open `allowed` and not `denied` (EPERM; those in both are
    /// allowed), and all other devices as before. What they have open already stays open. Whatever was denied by an earlier
    /// call, as for a job that had a cgroup of this name before, `allowed` opens.
    ///
    /// On v1 an error comes where a cgroup above denies one of `allowed`; v2 does not tell. Where a v1 cgroup lists what may
    /// be opened, and has one entry for all devices of a major, `allowed` is all that stays of it.
    ///
    /// On v2 it is refused where a device program allows none beside it, and afterwards the kernel refuses (EPERM) such a
    /// program for this cgroup. Slurm's cgroup/v2 attaches such ones to a job where gres.conf names device files and
    /// ConstrainDevices is on.
    pub fn confine(&self, allowed: &[(u32, u32)], denied: &[(u32, u32)]) -> Result<(), ContainerError> {
        let allowed: Devices = allowed.iter().copied().collect();
        let denied: Devices = denied.iter().copied().filter(|device| !allowed.contains(device)).collect();
        match self.place.version {
            Version::One => by_rules(&self.dir(), &allowed, &denied),
            Version::Two => by_program(&self.place, &denied),
        }
    }
}

fn by_rules(dir: &Path, allowed: &Devices, denied: &Devices) -> Result<(), ContainerError> {
    let list = dir.join("devices.list");
    let read = || fs::read_to_string(&list).map_err(failed(format!("read {}", list.display())));
    let (allow, deny) =
        rules(&read()?, allowed, denied).map_err(|why| refused(format!("{}: {why}", list.display())))?;
    write(&dir.join("devices.allow"), &allow, "; does a cgroup above it deny this device?")?;
    write(&dir.join("devices.deny"), &deny, "")?;
    // To take away an entry that isn't there is no error for the kernel.
    match covering(&read()?, denied).first() {
        Some(entry) => Err(refused(format!("{} still has the entry {}", list.display(), entry.line))),
        None => Ok(()),
    }
}

fn write(file: &Path, rules: &[String], hint: &str) -> Result<(), ContainerError> {
    let shown = file.display();
    let mut open = File::options().write(true).open(file).map_err(failed(format!("open {shown}")))?;
    // One write is one rule.
    rules.iter().try_for_each(|rule| {
        open.write_all(rule.as_bytes()).map_err(failed(format!("write {rule:?} to {shown}{hint}")))
    })
}

/// What is to be written to devices.allow, and then to devices.deny, of a cgroup with this devices.list.
fn rules(list: &str, allowed: &Devices, denied: &Devices) -> Result<(Vec<String>, Vec<String>), String> {
    let allow = allowed.iter().map(|(major, minor)| format!("c {major}:{minor} rw")).collect();
    let deny = |numbers: String| format!("c {numbers} rwm");
    if list.starts_with("a ") {
        // Everything but exceptions, which it does not show.
        return Ok((allow, denied.iter().map(|(major, minor)| deny(format!("{major}:{minor}"))).collect()));
    }
    // Entries have no exceptions: one goes whole.
    let gone = covering(list, denied).into_iter().map(|entry| match entry.major {
        "*" => {
            Err(format!("the entry {} lets devices of every major be opened, and can't have exceptions", entry.line))
        }
        major => Ok(deny(format!("{major}:{}", entry.minor))),
    });
    Ok((allow, gone.collect::<Result<_, _>>()?))
}

/// An entry of devices.list for character devices.
struct Entry<'a> {
    line: &'a str,
    major: &'a str,
    minor: &'a str,
}

/// The entries by which one of these devices can be opened.
fn covering<'a>(list: &'a str, devices: &Devices) -> Vec<Entry<'a>> {
    let entries = list.lines().filter_map(|line| {
        let (numbers, access) = line.strip_prefix("c ")?.split_once(' ')?;
        let (major, minor) = numbers.split_once(':')?;
        access.contains(['r', 'w']).then_some(Entry { line, major, minor })
    });
    let is = |wanted: &str, number: u32| wanted == "*" || wanted.parse() == Ok(number);
    let covers =
        |entry: &Entry| devices.iter().any(|(major, minor)| is(entry.major, *major) && is(entry.minor, *minor));
    entries.filter(covers).collect()
}

fn by_program(place: &Place, denied: &Devices) -> Result<(), ContainerError> {
    let dir = place.dir();
    let instructions = program::deny(denied).map_err(refused)?;
    let attach = || {
        let cgroup = File::open(&dir)?;
        match bpf::attached(&cgroup)?.iter().find(|program| program.name == PROGRAM) {
            Some(old) => bpf::replace(&cgroup, old, &instructions),
            None => bpf::add(&cgroup, PROGRAM, &instructions, bpf::ALLOW_MULTI),
        }
    };
    must_allow_others(place)?;
    again(attach).map_err(failed(format!("attach a device program to {}", dir.display())))
}

/// Refuses a cgroup to which no program can be added, or only so that another has no effect any more. The kernel runs those of
/// the nearest cgroup that has some, and those further up that allow others (BPF_PROG_ATTACH in linux/bpf.h;
/// compute_effective_progs and hierarchy_allows_attach in kernel/bpf/cgroup.c).
fn must_allow_others(place: &Place) -> Result<(), ContainerError> {
    let dir = place.dir();
    for dir in dir.ancestors().take_while(|dir| dir.starts_with(&place.mount)) {
        let programs = again(|| bpf::attached(&File::open(dir)?));
        let programs = programs.map_err(failed(format!("read the device programs of {}", dir.display())))?;
        if let Some(alone) = programs.iter().find(|program| !program.allows_others()) {
            let name = String::from_utf8_lossy(&alone.name);
            return Err(refused(format!(
                "the device program {:?} of {} allows none beside it (it was attached without BPF_F_ALLOW_MULTI), so that \
                 nothing more can be denied here",
                name.trim_end_matches('\0'),
                dir.display()
            )));
        }
        if !programs.is_empty() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::Command;

    fn devices(list: &[(u32, u32)]) -> Devices {
        list.iter().copied().collect()
    }

    #[test]
    fn what_is_written_depends_on_what_the_list_begins_with() {
        let (own, others) = (devices(&[(240, 7)]), devices(&[(195, 1), (240, 8)]));
        let written = |list: &str| rules(list, &own, &others).map(|(allow, deny)| (allow.join(", "), deny.join(", ")));
        let expected = |deny: &str| Ok(("c 240:7 rw".to_owned(), deny.to_owned()));
        assert_eq!(written("a *:* rwm\n"), expected("c 195:1 rwm, c 240:8 rwm"));
        assert_eq!(written(""), expected(""));
        assert_eq!(written("c 1:3 rwm\nc 240:8 r\nc 240:9 rw\nb 195:1 rwm\n"), expected("c 240:8 rwm"));
        assert_eq!(written("c 240:* rwm\nc 195:* m\nc 195:1 w\n"), expected("c 240:* rwm, c 195:1 rwm"));
        assert_eq!(written("c *:8 m\n"), expected(""));
        assert!(written("c *:8 r\n").unwrap_err().contains("c *:8 r lets devices of every major"));
    }

    /// Where cgroup v2 is mounted. `None` also where the test was over when it had been started again with such a mount.
    fn tree() -> Option<PathBuf> {
        const TREE: &str = "MIG_TEST_CGROUP2";
        if let Some(dir) = std::env::var_os(TREE) {
            return Some(dir.into());
        }
        let dir = tempfile::tempdir().unwrap();
        let with_tree = |words: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "sh", "-c"]).env(TREE, dir.path());
            command.arg("mount -t cgroup2 none $MIG_TEST_CGROUP2 && exec \"$@\"").arg("sh").args(words).output()
        };
        if !with_tree(&["sh", "-c", "test -w $MIG_TEST_CGROUP2/cgroup.procs"])
            .is_ok_and(|output| output.status.success())
        {
            eprintln!("SKIP: no cgroup v2 tree can be mounted here");
            return None;
        }
        let (exe, thread) = (std::env::current_exe().unwrap(), std::thread::current());
        // More than one thread, or the test would run in the main thread and not know its name.
        let words = [exe.to_str().unwrap(), "--test-threads", "2", "--exact", thread.name().unwrap()];
        let output = with_tree(&words).unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        None
    }

    #[test]
    fn a_program_that_stands_alone_is_not_switched_off() {
        let Some(mount) = tree() else { return };
        let name = format!("/mig-hook-test-{}", std::process::id());
        let job =
            Own { place: Place { version: Version::Two, mount, root: String::new(), below: name.clone() + "/job" } };
        let above = job.dir().parent().unwrap().to_owned();
        let [alone, gives_way, together] = [0, 1, bpf::ALLOW_MULTI];
        let attach = |dir: &Path, flags| {
            let nothing = program::deny(&devices(&[])).unwrap();
            bpf::add(&File::open(dir).unwrap(), *b"theirs\0\0\0\0\0\0\0\0\0\0", &nothing, flags)
        };
        for (dir, flags) in [(&above, alone), (&above, gives_way), (&job.dir(), alone), (&job.dir(), gives_way)] {
            fs::create_dir_all(job.dir()).unwrap();
            attach(dir, flags).unwrap();
            let error = job.confine(&[], &[(240, 8)]).unwrap_err().to_string();
            // In one case the kernel would let it happen.
            let kernel = attach(&job.dir(), together);
            fs::remove_dir(job.dir()).unwrap();
            fs::remove_dir(&above).unwrap();
            assert!(error.contains(&format!("\"theirs\" of {} allows none beside it", dir.display())), "{error}");
            assert_eq!(kernel.is_ok(), dir == &above && flags == gives_way, "{kernel:?}");
        }
        fs::create_dir_all(job.dir()).unwrap();
        attach(&above, together).unwrap();
        attach(&job.dir(), together).unwrap();
        let done = job.confine(&[], &[(240, 8)]);
        let later = attach(&job.dir(), gives_way).unwrap_err();
        let programs = bpf::attached(&File::open(job.dir()).unwrap()).unwrap().len();
        fs::remove_dir(job.dir()).unwrap();
        fs::remove_dir(&above).unwrap();
        done.unwrap();
        assert_eq!((programs, later.raw_os_error()), (2, Some(libc::EPERM)));
    }
}
