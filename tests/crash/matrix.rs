//! Every operation in every way in, killed at every point, and made good by `migctl gc` alone and by the next acquire alone.

use serde_json::{Value, json};

use crate::common::{config, text, token_in};
use crate::points::has_strace;
use crate::stage::{Act, Holder, Stage, WANTED, Way, is_killed};
use crate::tries::{Least, Recovery, kill_everywhere};

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Operation {
    /// A slice is cut, or taken where it is kept; of a command it is its whole life.
    Acquire,
    /// The same where another one was killed in the middle of it.
    Next,
    /// The same where something idle is in the way.
    Evict,
    /// The same where something idle is what is wanted.
    Reuse,
    /// The container is bound.
    Confirm,
    /// The holder has ended, and its end is told.
    Release,
    /// The same where what it had stays idle.
    Leave,
    /// gc, when the holder has ended and nobody has told.
    Reconcile,
    /// gc, when what is idle has been so for long enough.
    Expire,
    /// gc of what a killed acquire has left: a GPU instance without its compute instance.
    FinishHalf,
    /// The same with one of which its lease does not know.
    FinishUnrecorded,
}

use Operation::{
    Acquire, Confirm, Evict, Expire, FinishHalf, FinishUnrecorded, Leave, Next, Reconcile, Release, Reuse,
};

pub struct Row {
    operation: Operation,
    pub stage: Stage,
}

impl Row {
    /// `None`, and noted, where this can't be done here.
    pub fn new(operation: Operation, way: Way) -> Option<Row> {
        if !has_strace(&format!("{operation:?} by {way:?} in trouble")) {
            return None;
        }
        let row = Row { operation, stage: Stage::new(way, operation != Confirm)? };
        row.stage.settings(row.is_idle());
        Some(row)
    }

    pub fn name(&self) -> String {
        format!("{:?} by {:?}", self.operation, self.stage.way)
    }

    /// What its run does at least.
    fn least(&self) -> Least {
        let way = self.stage.way;
        let asks_driver = self.operation != Confirm && (self.operation, way) != (Release, Way::Cdi);
        let cuts = !matches!((self.operation, way), (Confirm | Reuse | Leave | FinishHalf, _) | (_, Way::Cdi));
        Least { system: 12, driver: if asks_driver { 8 } else { 0 }, changes: if cuts { 2 } else { 0 } }
    }

    fn is_idle(&self) -> bool {
        matches!(self.operation, Evict | Reuse | Leave | Expire)
    }

    /// Whoever is about to be killed, and the process that is.
    pub fn prepare(&self) -> (Holder, Act) {
        let stage = &self.stage;
        if self.is_idle() {
            stage.clear_idle();
        }
        assert_eq!(stage.others(), Vec::<Value>::new(), "{:?}: not a clean beginning", self.operation);
        stage.fresh_bundle();
        stage.fresh_dev();
        let ended = || {
            let mut holder = stage.granted("before");
            holder.die();
            stage.wait_for_processes();
            holder
        };
        let killed_in_the_middle = |how| {
            let (mut holder, act) = stage.asking();
            stage.world.fault("nvmlGpuInstanceCreateComputeInstance", &["--kill", how]);
            let output = stage.perform(&act, None);
            assert!(is_killed(&output), "{}", text(&output));
            holder.die();
            holder
        };
        match self.operation {
            Acquire => stage.asking(),
            Evict | Reuse => {
                stage.leave_idle(self.operation == Reuse);
                stage.asking()
            }
            Confirm => {
                let holder = stage.unbound();
                let act = stage.binding(&holder);
                (holder, act)
            }
            Release | Leave => {
                let holder = ended();
                let act = stage.releasing(&holder);
                (holder, act)
            }
            Reconcile => (ended(), Act::migctl(&["gc"])),
            Expire => {
                let holder = ended();
                stage.gc("before");
                let idle = stage.others();
                assert_eq!((idle.len(), &idle[0]["state"]), (1, &json!("idle")), "{idle:#?}");
                stage.world.edit_lease(idle[0]["token"].as_str().unwrap(), |l| l["idle_until_boot_ms"] = json!(1));
                (holder, Act::migctl(&["gc"]))
            }
            Next => {
                killed_in_the_middle("before").die();
                stage.asking()
            }
            FinishHalf => (killed_in_the_middle("before"), Act::migctl(&["gc"])),
            FinishUnrecorded => (killed_in_the_middle("after"), Act::migctl(&["gc"])),
        }
    }

    /// Makes a kill good in one way, and looks at what is there.
    fn make_good(&self, mut holder: Holder, recovery: Recovery, when: &str) {
        let stage = &self.stage;
        stage.check_moment(when);
        let tokens = stage.tokens();
        if self.operation != Confirm {
            holder.die();
            stage.wait_for_processes();
        }
        match recovery {
            Recovery::Gc => {
                stage.gc(when);
                let left = stage.check_settled(when);
                match self.operation {
                    Confirm => self.assert_kept(&left, &holder, when),
                    // Whole and for the next one, or not there at all.
                    _ if self.is_idle() => assert!(left.len() <= 1 && left.iter().all(is_idle), "{when}: {left:#?}"),
                    _ => stage.check_no_trace(&tokens, when),
                }
            }
            Recovery::Acquire if self.operation == Confirm => {
                let next = stage.world.orphaned_precreate(&config(json!({"mig.profile": "1g.6gb"}), &[]));
                assert!(next.status.success(), "{when}: {}", text(&next));
                let next = token_in(&next.stdout);
                let (new, old): (Vec<Value>, _) =
                    stage.check_settled(when).into_iter().partition(|lease| lease["token"] == next);
                assert_eq!((new.len(), &new[0]["state"]), (1, &json!("active")), "{when}");
                self.assert_kept(&old, &holder, when);
            }
            Recovery::Acquire => {
                let next = stage.granted(when);
                let left = stage.check_settled(when);
                let held = (&left[0]["state"], &left[0]["token"]);
                assert_eq!((left.len(), held), (1, (&json!("active"), &json!(next.token))), "{when}: {left:#?}");
                let profile = left[0]["slices"][0]["profile_name"].as_str();
                assert!(stage.way == Way::Cdi || profile == Some(WANTED), "{when}: {left:#?}");
                stage.must_release(next, when);
            }
        }
        self.end(holder, when);
        stage.check_no_trace(&tokens, when);
    }

    /// A container that lives keeps what it has, bound or not.
    fn assert_kept(&self, leases: &[Value], holder: &Holder, when: &str) {
        let kept = (leases.len(), &leases[0]["state"], &leases[0]["token"]);
        assert_eq!(kept, (1, &json!("active"), &json!(holder.token)), "{when}: {leases:#?}");
    }

    /// Nothing is left to end but what is idle.
    pub fn end(&self, mut holder: Holder, when: &str) {
        let stage = &self.stage;
        if self.operation == Confirm {
            stage.must_release(holder, when);
        } else {
            holder.die();
            stage.wait_for_processes();
        }
        stage.gc(when);
        if self.is_idle() {
            stage.clear_idle();
        }
    }
}

fn is_idle(lease: &Value) -> bool {
    lease["state"] == "idle"
}

fn try_row(operation: Operation, way: Way) {
    let Some(row) = Row::new(operation, way) else { return };
    kill_everywhere(
        &row.name(),
        &row.stage,
        row.least(),
        || row.prepare(),
        |holder, recovery, when| row.make_good(holder, recovery, when),
        |holder, when| row.end(holder, when),
    );
}

macro_rules! rows {
    ($($name:ident: $operation:expr, $way:ident;)*) => {
        $(#[test]
        fn $name() {
            try_row($operation, Way::$way);
        })*
    };
}

rows! {
    acquire_by_podman: Acquire, Podman;
    acquire_by_the_shim: Acquire, Shim;
    acquire_by_the_classic_hook: Acquire, Classic;
    acquire_by_cdi: Acquire, Cdi;
    a_command_from_start_to_end: Acquire, Run;
    acquire_by_a_job: Acquire, Job;
    confirm_by_podman: Confirm, Podman;
    confirm_by_the_shim: Confirm, Shim;
    release_by_podman: Release, Podman;
    release_by_the_shim: Release, Shim;
    release_by_the_classic_hook: Release, Classic;
    release_by_cdi: Release, Cdi;
    release_by_a_job: Release, Job;
    release_of_a_command_by_migctl: Release, Run;
    gc_of_podmans: Reconcile, Podman;
    gc_of_the_shims: Reconcile, Shim;
    gc_of_the_classic_hooks: Reconcile, Classic;
    gc_of_cdis: Reconcile, Cdi;
    gc_of_a_commands: Reconcile, Run;
    gc_of_a_jobs: Reconcile, Job;
    acquire_by_podman_after_a_kill: Next, Podman;
    acquire_by_the_shim_after_a_kill: Next, Shim;
    gc_of_half_a_slice: FinishHalf, Podman;
    gc_of_a_slice_that_was_not_recorded: FinishUnrecorded, Shim;
    eviction_by_podman: Evict, Podman;
    eviction_by_the_shim: Evict, Shim;
    eviction_by_the_classic_hook: Evict, Classic;
    eviction_by_a_command: Evict, Run;
    eviction_by_a_job: Evict, Job;
    reuse_by_podman: Reuse, Podman;
    reuse_by_the_shim: Reuse, Shim;
    reuse_by_the_classic_hook: Reuse, Classic;
    reuse_by_a_command: Reuse, Run;
    reuse_by_a_job: Reuse, Job;
    leaving_idle_by_podman: Leave, Podman;
    leaving_idle_by_the_shim: Leave, Shim;
    leaving_idle_by_the_classic_hook: Leave, Classic;
    leaving_idle_by_a_job: Leave, Job;
    gc_of_what_was_idle_long_enough: Expire, Podman;
}
