//! The state directory, its lock, and the leases in it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::{Check, counted, listed, quoted};
use crate::config::Settings;
use crate::engine::Engine;
use crate::gpu::nvml::Nvml;
use crate::host;
use crate::lease::{Lease, State, VERSION};
use crate::store::Store;

/// A lock that is held at both ends of this time is not just passing.
const LOCK_PAUSE: Duration = Duration::from_millis(500);

/// What is known of one record.
struct Record {
    token: String,
    /// Why it can't be read.
    lease: Result<Lease, String>,
    /// Whether somebody stands behind it.
    alive: bool,
}

pub(super) fn checks(settings: &Settings, nvml: &Nvml) -> Vec<Check> {
    let dir = &settings.state_dir;
    let ours = nix::unistd::geteuid().as_raw();
    let directory = match dir.symlink_metadata() {
        Err(_) => return vec![Check::ok("state.directory", format!("no {} yet: no slice was given", dir.display()))],
        Ok(meta) if ours != 0 && meta.uid() != ours => {
            return vec![Check::skip("state.directory", format!("{} is for root to see", dir.display()))];
        }
        Ok(meta) => directory(dir, meta.is_dir(), (meta.uid(), meta.mode() & 0o7777), ours),
    };
    let Some(store) = Store::existing(dir).ok().flatten().filter(|_| directory.remedy.is_none()) else {
        return vec![directory];
    };
    let mut checks = vec![directory];
    checks.extend(boot(store.boot().ok().flatten().as_deref(), host::boot_id().ok().as_deref()));
    checks.push(lock(held_long(&store)));
    checks.extend(leases(dir, &records(&store, settings, nvml)));
    checks
}

fn directory(dir: &Path, is_dir: bool, (uid, mode): (u32, u32), ours: u32) -> Check {
    let (id, shown) = ("state.directory", quoted(&dir.to_string_lossy()));
    if !is_dir {
        let found = format!("{shown} is no directory: no container gets a slice");
        return Check::fail(id, found, format!("run: rm {shown}\nmig-hook makes the directory when it is needed"));
    }
    // As the store has it: jobs open it to those who know a job's key.
    match uid == ours && mode & 0o066 == 0 {
        true => Check::ok(id, format!("{shown} is closed to others")),
        false => Check::fail(
            id,
            format!(
                "{shown} belongs to uid {uid} with mode {mode:04o}, not to uid {ours} with 0700 or 0711: every request \
                 is refused"
            ),
            format!(
                "see what lies in it, and who put it there; then run: chown {ours}:{ours} {shown} && chmod 700 {shown}"
            ),
        ),
    }
}

fn boot(kept: Option<&str>, now: Option<&str>) -> Option<Check> {
    let (kept, now) = (kept?, now?);
    (kept != now).then(|| {
        let found = "the state is of an earlier boot, and slices do not outlive one: the next request empties it";
        Check::warn("state.boot", found, "to empty it now, run: migctl gc")
    })
}

/// Who has the lock, if it is the same process for a while.
fn held_long(store: &Store) -> Option<(u32, String)> {
    let first = store.locked_by()?;
    std::thread::sleep(LOCK_PAUSE);
    let pid = store.locked_by().filter(|second| *second == first)?;
    Some((pid, host::process_name(pid)))
}

fn lock(held: Option<(u32, String)>) -> Check {
    let id = "state.lock";
    match held {
        None => Check::ok(id, "the lock is free"),
        Some((pid, name)) => Check::warn(
            id,
            format!(
                "process {pid} ({name}) has the lock for longer than {} ms: others wait for it",
                LOCK_PAUSE.as_millis()
            ),
            format!("see what it does: ps -o pid,etime,stat,wchan:20,args -p {pid}; if it hangs: kill {pid}"),
        ),
    }
}

fn records(store: &Store, settings: &Settings, nvml: &Nvml) -> Vec<Record> {
    let engine = Engine::open(settings, nvml).ok();
    let record = |token: String| {
        // Gone since it was listed: ended.
        let lease = store.get::<Lease>(&token, VERSION).map_err(|error| error.to_string()).transpose()?;
        let alive = lease.as_ref().is_ok_and(|lease| engine.as_ref().is_some_and(|engine| stands(engine, lease)));
        Some(Record { token, lease, alive })
    };
    store.tokens().unwrap_or_default().into_iter().filter_map(record).collect()
}

/// What is being cut now is not stale: only under the lock would that be sure.
fn stands(engine: &Engine, lease: &Lease) -> bool {
    match lease.state {
        State::Pending => lease.holder.owner.is_some_and(host::alive),
        _ => engine.is_alive(lease),
    }
}

fn leases(dir: &Path, records: &[Record]) -> Vec<Check> {
    let mut checks = Vec::new();
    for record in records {
        if let Err(reason) = &record.lease {
            let file = quoted(&dir.join("leases").join(format!("{}.json", record.token)).to_string_lossy());
            checks.push(Check::fail(
                format!("state.lease.{}", record.token),
                format!("{reason}; while it lies there, nothing is given"),
                format!(
                    "finish with the mig-hook that wrote it, or take it away: mv {file} /root/\nits slices then show as \
                     foreign in migctl list"
                ),
            ));
        }
    }
    let readable: Vec<(&Lease, bool)> =
        records.iter().filter_map(|r| r.lease.as_ref().ok().map(|lease| (lease, r.alive))).collect();
    // Slices that can't be destroyed are told with their holders; what is kept has none.
    let settled =
        |lease: &Lease| matches!(lease.state, State::Releasing | State::Quarantined | State::Static | State::Idle);
    let stale: Vec<String> = readable
        .iter()
        .filter(|(lease, alive)| !alive && !settled(lease))
        .map(|(lease, _)| format!("{} of {}", lease.profiles(), lease.held_by()))
        .collect();
    let held = readable.iter().filter(|(lease, alive)| *alive && !settled(lease)).count();
    checks.push(match stale.as_slice() {
        [] => Check::ok("state.leases", format!("{}, each with a living holder", counted(held, "lease"))),
        stale => Check::warn(
            "state.leases",
            format!("stale, the holder is gone: {}; the next request frees it", listed(stale)),
            "to free it now, run: migctl gc",
        ),
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::lease::Way;
    use crate::lease::tests::lease;

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    #[test]
    fn the_directory_is_ours_alone() {
        let at = |is_dir, meta| directory(Path::new("/run/mig-hook"), is_dir, meta, 0);
        assert_eq!(at(true, (0, 0o700)).status, Status::Ok);
        assert_eq!(at(true, (0, 0o711)).status, Status::Ok, "a job was here");
        for (is_dir, meta, part) in [
            (true, (0, 0o755), "chmod 700 /run/mig-hook"),
            (true, (1000, 0o700), "belongs to uid 1000"),
            (false, (0, 0o600), "no directory"),
        ] {
            let check = at(is_dir, meta);
            assert!(check.status == Status::Fail && said(&check).contains(part), "{check:?}");
        }
    }

    #[test]
    fn another_boot_and_a_lock_that_is_not_let_go() {
        assert_eq!((boot(Some("a"), Some("a")), boot(None, Some("a"))), (None, None));
        assert!(said(&boot(Some("a"), Some("b")).unwrap()).contains("migctl gc"));
        assert_eq!(lock(None).status, Status::Ok);
        assert!(said(&lock(Some((7, "mig-engine".into())))).contains("process 7 (mig-engine)"));
    }

    #[test]
    fn stale_and_unreadable_leases_are_told_apart() {
        let record = |state, alive| Record { token: "t".into(), lease: Ok(lease(state, Way::Shim)), alive };
        let dir = Path::new("/run/mig-hook");
        let all = |records: &[Record]| leases(dir, records);
        assert_eq!(all(&[record(State::Active, true)])[0].found, "1 lease, each with a living holder");
        assert_eq!(all(&[record(State::Active, false)])[0].status, Status::Warn);
        assert_eq!(all(&[record(State::Releasing, false)])[0].status, Status::Ok, "told elsewhere");
        let bad = Record { token: "abc".into(), lease: Err("x: has version 9".into()), alive: false };
        let checks = all(&[bad, record(State::Active, true)]);
        assert_eq!((checks[0].id.as_str(), checks[0].status), ("state.lease.abc", Status::Fail));
        assert!(said(&checks[0]).contains("mv /run/mig-hook/leases/abc.json"), "{checks:?}");
    }
}
