//! Driver trouble on one GPU of two: it is noticed, told in words, settled or put into quarantine, and the other GPU serves
//! meanwhile. The table "Driver trouble" of docs/reliability.md names these tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Init, World, binaries, config, run, skip, state, text, token_in, wait_for};
use serde_json::{Value, json};

const A30: &str = "a30-24gb";
const CREATE: &str = "nvmlDeviceCreateGpuInstanceWithPlacement";
const CREATE_COMPUTE: &str = "nvmlGpuInstanceCreateComputeInstance";
const DESTROY: &str = "nvmlGpuInstanceDestroy";
const DESTROY_COMPUTE: &str = "nvmlComputeInstanceDestroy";
const IN_TIME: Duration = Duration::from_secs(30);
const NO_ROOM: i32 = 75;
const UNAVAILABLE: i32 = 69;

// ---- ways in ----

/// How a slice is asked for, and given back.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Precreate,
    Shim,
    Run,
    Job,
}

/// A holder: what its end takes.
#[derive(Debug)]
struct Held {
    way: Way,
    token: String,
    id: String,
}

/// A machine with two A30, and the ways that work on this host.
struct Site {
    world: World,
    ways: Vec<Way>,
    count: std::cell::Cell<u32>,
}

impl std::ops::Deref for Site {
    type Target = World;
    fn deref(&self) -> &World {
        &self.world
    }
}

impl Site {
    fn new() -> Site {
        let world = World::new(&[A30, A30]);
        world.recording_runtime(0);
        let mut ways = vec![Way::Precreate, Way::Shim];
        match world.path("m/dev/nvidia0").exists() {
            true => ways.extend([Way::Run, Way::Job]),
            false => skip("driver trouble under migctl run and job", "no device nodes can be made here"),
        }
        Site { world, ways, count: std::cell::Cell::new(0) }
    }

    fn ways(&self) -> Vec<Way> {
        self.ways.clone()
    }

    /// Arms a fault on GPU 0.
    fn trouble(&self, call: &str, how: &[&str]) {
        self.fault(call, &[&["--gpu", "0"], how].concat());
    }

    fn for_ever(&self, call: &str, code: &str) {
        self.trouble(call, &["--times", "forever", "--fail", code]);
    }

    fn over(&self) {
        self.sim("clear-faults", &[]);
    }

    fn command(&self, way: Way, id: &str, profile: &str, gpu: Option<&str>) -> Command {
        let annotations = match gpu {
            Some(gpu) => json!({"mig.profile": profile, "mig.gpu": gpu}),
            None => json!({"mig.profile": profile}),
        };
        let config = config(annotations, &[]);
        let mut command = match way {
            Way::Precreate => {
                let mut command = Command::new(binaries().join("mig-hook"));
                command.arg("--config").arg(self.config()).arg("precreate");
                command
            }
            Way::Shim => {
                let bundle = self.bundle(id, &config);
                let mut command = self.shim_command(&["--root", &self.path("root").display().to_string(), "create"]);
                command.arg("--bundle").arg(&bundle).arg("--pid-file").arg(bundle.join("pid")).arg(id);
                command
            }
            Way::Run | Way::Job => {
                let mut command = Command::new(binaries().join("migctl"));
                command.arg("--config").arg(self.config());
                match way {
                    Way::Run => command.arg("run"),
                    _ => command.args(["job", "start", "--uid", "4711", "--gid", "4711", "--key", id]),
                };
                command.args(gpu.into_iter().flat_map(|gpu| ["--gpu", gpu])).arg(profile);
                if way == Way::Run {
                    command.args(["--", "true"]);
                }
                command
            }
        };
        let input = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &input, config.to_string().as_bytes()).unwrap();
        std::io::Seek::rewind(&mut &input).unwrap();
        command.stdin(input);
        command
    }

    fn new_id(&self) -> String {
        self.count.set(self.count.get() + 1);
        format!("pbs:{}", self.count.get())
    }

    fn start(&self, way: Way, id: &str, profile: &str, gpu: Option<&str>) -> Child {
        self.command(way, id, profile, gpu).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn ask(&self, way: Way, profile: &str, gpu: Option<&str>) -> (String, Output) {
        let id = self.new_id();
        let child = self.start(way, &id, profile, gpu);
        (id, child.wait_with_output().unwrap())
    }

    /// One that must be served. `Way::Run` has ended by then.
    fn granted(&self, way: Way, profile: &str, gpu: Option<&str>) -> Held {
        let before = self.tokens();
        let (id, output) = self.ask(way, profile, gpu);
        assert!(output.status.success(), "{way:?} {profile} on {gpu:?}: {}", text(&output));
        let new = || {
            let leases = self.leases();
            let mut active =
                leases.iter().filter(|lease| lease["state"] == "active").map(|lease| lease["token"].as_str().unwrap());
            active.find(|token| !before.iter().any(|old| old == token)).unwrap().to_owned()
        };
        let token = match way {
            Way::Precreate => token_in(&output.stdout),
            Way::Run => String::new(),
            Way::Shim | Way::Job => new(),
        };
        Held { way, token, id }
    }

    /// One that must be refused, in these words.
    fn refused(&self, way: Way, gpu: Option<&str>, code: i32, words: &[&str]) {
        let (_, output) = self.ask(way, "1g.6gb", gpu);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(code), "{way:?} on {gpu:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{way:?}: {word:?} is not in: {said}"));
        let last = self.audit().pop().unwrap();
        assert_eq!(last["event"], "refusal", "{last}");
        let reason = last["reason"].as_str().unwrap();
        words.iter().for_each(|word| assert!(reason.contains(word), "{way:?}: {word:?} is not in the audit: {reason}"));
    }

    fn end(&self, held: &Held) -> Output {
        match held.way {
            Way::Precreate => {
                let state = state(&held.id, 0, &self.path("bundle"));
                self.hook(&["poststop", "--lease", &held.token], &state)
            }
            Way::Shim => self.shim(&["--root", &self.path("root").display().to_string(), "delete", &held.id]),
            Way::Run => run(&mut Command::new("true")),
            Way::Job => self.migctl(&["job", "end", "--key", &held.id]),
        }
    }

    fn freed(&self, held: &Held) {
        let output = self.end(held);
        assert!(output.status.success(), "{held:?}: {}", text(&output));
        assert!(!self.tokens().contains(&held.token), "{held:?} is still there: {:#?}", self.leases());
    }

    fn tokens(&self) -> Vec<String> {
        self.leases().iter().map(|lease| lease["token"].as_str().unwrap().to_owned()).collect()
    }

    fn lease_of(&self, held: &Held) -> Value {
        let leases = self.leases();
        leases.iter().find(|l| l["token"] == *held.token).unwrap_or_else(|| panic!("no lease of {held:?}")).clone()
    }

    /// Another container gets a slice without naming a GPU: the engine finds one.
    fn others_serve(&self, when: &str) {
        assert_eq!(self.granted_anywhere("4g.24gb"), 1, "{when}");
    }

    /// The GPU of one that is served and ended.
    fn granted_anywhere(&self, profile: &str) -> u64 {
        let held = self.granted(Way::Precreate, profile, None);
        let gpu = self.lease_of(&held)["slices"][0]["gpu_index"].as_u64().unwrap();
        self.freed(&held);
        gpu
    }

    fn others_serve_on(&self, gpu: &str) {
        self.granted_and_ended(Way::Precreate, gpu);
    }

    fn granted_and_ended(&self, way: Way, gpu: &str) {
        let held = self.granted(way, "1g.6gb", Some(gpu));
        if way != Way::Run {
            self.freed(&held);
        }
    }

    /// What gc, or its dry run, says of one lease: result and reason.
    fn gc(&self, held: &Held, args: &[&str]) -> (String, String) {
        let output = self.migctl(&[&["gc", "--json"], args].concat());
        let document: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("gc {args:?}: {}", text(&output)));
        let actions = document["actions"].as_array().unwrap();
        let of: Vec<&Value> = actions.iter().filter(|action| action["token"] == *held.token).collect();
        assert_eq!(of.len(), 1, "one action for {held:?}: {document:#}");
        let stuck = actions.iter().any(|action| action["result"] != "kept" && action["result"] != "freed");
        assert_eq!(output.status.code(), Some(if stuck { NO_ROOM } else { 0 }), "{document:#}");
        (of[0]["result"].as_str().unwrap().to_owned(), of[0]["reason"].as_str().unwrap().to_owned())
    }

    /// The same, which must be that.
    fn gc_says(&self, held: &Held, args: &[&str], result: &str, words: &[&str]) {
        let (did, why) = self.gc(held, args);
        let fits = did == result && words.iter().all(|word| why.contains(word));
        assert!(fits, "wanted {result} {words:?} for {held:?}: {did}: {why}");
    }

    /// A container on GPU 0, bound, that lives as long as the process.
    fn living(&self, way: Way, gpu: &str) -> (Held, Init) {
        let held = self.granted(way, "1g.6gb", Some(gpu));
        let init = Init::start();
        match way {
            Way::Precreate => {
                self.bundle("bundle", &config(json!({"mig.profile": "1g.6gb"}), &[]));
                let state = state(&held.id, init.pid(), &self.path("bundle"));
                let output = self.hook(&["createRuntime", "--lease", &held.token], &state);
                assert!(output.status.success(), "{}", text(&output));
                self.edit_lease(&held.token, |lease| lease["holder"]["cgroup"] = Value::Null);
            }
            Way::Shim => drop(self.write(&format!("{}/pid", held.id), &init.pid().to_string())),
            Way::Run | Way::Job => panic!("{way:?} has no init"),
        }
        (held, init)
    }

    fn doctor(&self, id: &str) -> String {
        let output = self.migctl(&["doctor", "--json"]);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = document["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["id"] == id);
        check.unwrap_or_else(|| panic!("doctor has no {id}: {document:#}")).to_string()
    }
}

fn has_fired(world: &World) -> bool {
    let faults: Value = serde_json::from_str(&world.sim("faults", &["--json"])).unwrap();
    faults["faults"].as_array().unwrap().iter().any(|fault| fault["fired"].as_u64() > Some(0))
}

// ---- the page ----

/// None of this file is left out of the page.
#[test]
fn every_trouble_is_on_the_page() {
    let page = include_str!("../docs/reliability.md");
    let table = page.split("\n## Driver trouble\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let tests = include_str!("trouble.rs").split("#[test]\nfn ").skip(1).map(|rest| rest.split('(').next().unwrap());
    let left_out: Vec<&str> = tests.skip(1).filter(|test| !table.contains(&format!("`trouble::{test}`"))).collect();
    assert_eq!(left_out, Vec::<&str>::new());
}

// ---- a GPU that fails ----

/// What a GPU that fails is said to need.
const CODES: [(&str, &str); 6] = [
    ("GPU_IS_LOST", "needs a reset or a reboot"),
    ("RESET_REQUIRED", "nvidia-smi --gpu-reset"),
    ("IRQ_ISSUE", "dmesg"),
    ("TIMEOUT", "dmesg"),
    ("UNKNOWN", "dmesg"),
    ("4242", "NVML error 4242"),
];

/// Every call of a start and of a look at the GPUs, with every such code: by itself the engine takes the other GPU, and who
/// names this one is told what it needs.
#[test]
fn a_gpu_that_fails_at_any_call_is_left_for_another() {
    let site = Site::new();
    let calls = [
        "nvml*",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetMinorNumber",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
        "nvmlDeviceGetGpuInstances",
        "nvmlDeviceGetHandleByUUID",
        CREATE,
        "nvmlGpuInstanceGetInfo",
        "nvmlDeviceGetGpuInstanceById",
        CREATE_COMPUTE,
        "nvmlComputeInstanceGetInfo_v2",
    ];
    let looks = 8; // the first ones are made of every GPU, before anything is cut
    // What was cut there can't be undone while these fail: it is in the way.
    let blocking = ["nvmlDeviceGetHandleByUUID", "nvmlDeviceGetGpuInstanceById"];
    // Every call with every way in or every code, in turn.
    let ways = site.ways();
    for (n, call) in calls.into_iter().enumerate() {
        for (m, (code, remedy)) in CODES.into_iter().enumerate().filter(|(m, _)| (n + m) % 2 == 0 || *call == *"nvml*")
        {
            let way = ways[(n + m / 2) % ways.len()];
            site.for_ever(call, code);
            let held = site.granted(way, "4g.24gb", None);
            if way != Way::Run {
                assert_eq!(site.lease_of(&held)["slices"][0]["gpu_index"], 1, "{call} {code}");
                site.end(&held); // of a job also what is left of its first try
                assert!(!site.tokens().contains(&held.token), "{call} {code}: {:#?}", site.leases());
            }
            // Another time it may be there; in the middle of cutting it is the driver's failure.
            let later = n < looks || blocking.contains(&call);
            site.refused(way, Some("0"), if later { NO_ROOM } else { UNAVAILABLE }, &["GPU 0", remedy]);
            site.over();
            site.migctl(&["gc"]);
            site.assert_clean(&format!("{call} {code}"));
            let held = site.granted(way, "1g.6gb", Some("0"));
            if way != Way::Run {
                site.freed(&held);
            }
        }
    }
    site.assert_clean("at the end");
}

/// A GPU of which every call fails, under holders that live and that end.
#[test]
fn leases_on_a_lost_gpu_wait_for_it() {
    let site = Site::new();
    let (living, init) = site.living(Way::Precreate, "0");
    let (of_shim, _init) = site.living(Way::Shim, "0");
    let mut ended = vec![of_shim, site.granted(Way::Precreate, "1g.6gb", Some("0"))];
    if site.ways().contains(&Way::Job) {
        ended.push(site.granted(Way::Job, "1g.6gb", Some("0")));
    }
    let there = site.granted(Way::Precreate, "1g.6gb", Some("1"));
    site.for_ever("nvml*", "GPU_IS_LOST");
    for held in &ended {
        let output = site.end(held);
        assert!(output.status.success() || held.way == Way::Job, "an end never fails: {}", text(&output));
        let now = site.lease_of(held);
        let reason = now["reason"].as_str().unwrap();
        assert!(now["state"] == "releasing" && reason.contains("GPU 0") && reason.contains("reboot"), "{now:#}");
        for args in [&["--dry-run"][..], &[]] {
            site.gc_says(held, args, "failed", &["GPU 0", "needs a reset or a reboot"]);
        }
    }
    for args in [&["--dry-run"][..], &[]] {
        site.gc_says(&living, args, "kept", &["alive"]);
    }
    site.freed(&there);
    site.others_serve("while a GPU is lost");
    // What people see: the rest, and that a GPU is missing.
    let verbs: [&[&str]; 7] = [
        &["list"],
        &["map"],
        &["top", "--once"],
        &["plan", "1g.6gb"],
        &["profiles"],
        &["mode", "status"],
        &["create", "--dry-run", "1g.6gb"],
    ];
    for args in verbs {
        let output = site.migctl(args);
        let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let told = complaint.contains("GPU 0 is left out") && complaint.contains("needs a reset or a reboot");
        assert!(output.status.success() && told && !said.is_empty(), "{args:?}: {}", text(&output));
    }
    assert!(site.doctor("gpu.unseen").contains("lost, or not to be opened"));
    for args in [
        &["create", "1g.6gb", "--gpu", "0"][..],
        &["destroy", "--all", "--gpu", "0"],
        &["mode", "on", "0"],
        &["plan", "1g.6gb", "--gpu", "0"],
    ] {
        let output = site.migctl(args);
        assert!(!output.status.success() && text(&output).contains("GPU 0 is left out"), "{args:?}: {}", text(&output));
    }
    // It comes back as it was.
    site.over();
    site.gc_says(&ended[0], &[], "freed", &["ended"]); // and with it the others
    assert_eq!(site.tokens(), std::slice::from_ref(&living.token));
    drop(init);
    site.gc_says(&living, &[], "freed", &["gone"]);
    site.assert_clean("when it is back");
    assert!(site.granted(Way::Precreate, "4g.24gb", Some("0")).token.len() == 32);
}

/// Who is killed or ends while the driver fails leaves nothing behind that gc does not find.
#[test]
fn a_gpu_that_is_lost_while_it_is_cut_keeps_its_place_until_it_is_back() {
    let site = Site::new();
    for call in [CREATE, CREATE_COMPUTE] {
        site.trouble(call, &["--delay-ms", "300"]);
        let child = site.start(Way::Precreate, "c", "4g.24gb", None);
        wait_for("the call", IN_TIME, || has_fired(&site));
        site.for_ever("nvml*", "GPU_IS_LOST");
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{call}: {}", text(&output));
        let leases = site.leases();
        let of = |state: &str| {
            leases
                .iter()
                .filter(|l| l["state"] == state)
                .map(|l| l["slices"][0]["gpu_index"].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!((of("active"), of("releasing")), (vec![json!(1)], vec![json!(0)]), "{call}: {leases:#?}");
        site.over();
        let held = Held { way: Way::Precreate, token: token_in(&output.stdout), id: "c".into() };
        site.gc_says(&held, &[], "kept", &[]);
        site.freed(&held);
        site.assert_clean(call);
    }
}

// ---- in use ----

/// IN_USE for as long as a release tries: what each way in outwaits, by itself or with the next gc.
#[test]
fn in_use_for_a_moment_is_outwaited() {
    let site = Site::new();
    for way in site.ways() {
        for call in [DESTROY_COMPUTE, DESTROY] {
            let before = Instant::now();
            let held = if way == Way::Run {
                site.trouble(call, &["--fail", "IN_USE", "--times", "2"]);
                site.granted(way, "1g.6gb", Some("0"))
            } else {
                let held = site.granted(way, "1g.6gb", Some("0"));
                site.trouble(call, &["--fail", "IN_USE", "--times", "2"]);
                site.freed(&held);
                held
            };
            assert!(before.elapsed() < Duration::from_secs(20), "{held:?}: {:?}", before.elapsed());
            site.assert_clean(&format!("{call}, {way:?}"));
            site.over();
        }
    }
    // Beyond a release's three tries: gc goes on for 10 s.
    let held = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    site.trouble(DESTROY, &["--fail", "IN_USE", "--times", "6"]);
    assert!(site.end(&held).status.success());
    assert_eq!(site.lease_of(&held)["state"], "releasing");
    site.gc_says(&held, &[], "freed", &["ended"]);
    site.assert_clean("after gc");
    // What migctl takes away.
    site.document(&["create", "1g.6gb", "--gpu", "0"]);
    site.trouble(DESTROY, &["--fail", "IN_USE", "--times", "2"]);
    site.document(&["destroy", "--all", "--yes"]);
    site.assert_clean("after destroy");
}

/// IN_USE for ever: a bound, a sentence that says who, and nobody else waits.
#[test]
fn in_use_for_ever_is_named_bounded_and_in_nobodys_way() {
    let site = Site::new();
    let process = Init::start();
    let pid = process.pid().to_string();
    let mut releasing = Vec::new();
    for (n, way) in site.ways().into_iter().filter(|way| *way != Way::Run).enumerate() {
        let held = site.granted(way, "1g.6gb", Some("0"));
        let gi = site.lease_of(&held)["slices"][0]["gi"].to_string();
        // One with a process that the driver lists, the others with somebody whom it does not.
        let who: (&[&str], String) = match n {
            0 => (&["--pid", &pid], format!("process {pid} (sleep) uses it")),
            _ => (&[], "in use by another client".into()),
        };
        site.sim("hold", &[&["--gpu", "0", "--gi", &gi], who.0].concat());
        site.end(&held);
        let now = site.lease_of(&held);
        let reason = now["reason"].as_str().unwrap();
        let told = reason.contains("GPU 0") && reason.contains("in use by another client") && reason.contains(&who.1);
        assert!(now["state"] == "releasing" && told, "{now:#}");
        releasing.push((held, gi, who.1));
    }
    // gc tries for 10 s, without the lock: others come and go meanwhile, also on this GPU.
    let begun = Instant::now();
    let mut gc = Command::new(binaries().join("migctl"));
    gc.arg("--config").arg(site.config()).args(["gc", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut gc = gc.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    site.others_serve("while gc tries");
    site.others_serve_on("0");
    assert!(gc.try_wait().unwrap().is_none(), "gc is still at it");
    // Who needs this very room waits as long, and no longer.
    let (_, whole) = site.ask(Way::Precreate, "4g.24gb", Some("0"));
    assert!(whole.status.code() == Some(NO_ROOM) && text(&whole).contains("which has ended"), "{}", text(&whole));
    let output = gc.wait_with_output().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(output.status.code(), Some(NO_ROOM), "{}", text(&output));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (held, gi, who) in releasing {
        let of = said["actions"].as_array().unwrap().iter().find(|action| action["token"] == *held.token).unwrap();
        let told = of["result"] == "busy" && of["reason"].as_str().unwrap().contains(&who);
        assert!(told, "{of:#}");
        site.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    }
    assert!(site.migctl(&["gc"]).status.success());
    site.assert_clean("when all is let go");
}

/// An idle slice that does not go makes no room; on the other GPU there is.
#[test]
fn an_idle_slice_in_use_makes_no_room() {
    let site = Site::new();
    site.settings("[slices]\nidle_ttl = \"1h\"");
    let held = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    assert!(site.end(&held).status.success());
    assert_eq!(site.lease()["state"], "idle");
    let gi = site.lease()["slices"][0]["gi"].to_string();
    site.sim("hold", &["--gpu", "0", "--gi", &gi]);
    let (_, output) = site.ask(Way::Precreate, "4g.24gb", Some("0"));
    let told = ["an idle slice does not make room", "GPU 0", "in use by another client"];
    let said = text(&output);
    assert!(output.status.code() == Some(NO_ROOM) && told.iter().all(|word| said.contains(word)), "{said}");
    let other = site.granted(Way::Precreate, "4g.24gb", None);
    assert_eq!(site.lease_of(&other)["slices"][0]["gpu_index"], 1);
    site.settings("");
    site.sim("unhold", &["--gpu", "0", "--gi", &gi]);
    site.freed(&other);
    site.migctl(&["gc"]);
    site.assert_clean("when it is let go");
}

// ---- room that is not there ----

/// The driver refuses what looked free, once and for ever, the instance and its compute instance.
#[test]
fn room_that_the_driver_refuses_is_looked_for_elsewhere() {
    let site = Site::new();
    for call in [CREATE, CREATE_COMPUTE] {
        for way in site.ways() {
            site.trouble(call, &["--fail", "INSUFFICIENT_RESOURCES"]);
            let held = site.granted(way, "1g.6gb", Some("0")); // asked again
            if way != Way::Run {
                assert_eq!(site.instances().len(), 1, "{call} {way:?}");
                site.freed(&held);
            }
            site.for_ever(call, "INSUFFICIENT_RESOURCES");
            site.refused(way, Some("0"), NO_ROOM, &["GPU 0", call, "no room (insufficient resources)"]);
            site.assert_clean(&format!("{call} {way:?}, refused"));
            assert_eq!(site.granted_anywhere("4g.24gb"), 1);
            site.over();
        }
    }
}

/// A rival tool cuts and destroys on the same GPU all the time.
#[test]
fn a_rival_that_cuts_at_the_same_time_loses_nothing_and_takes_nothing() {
    let site = Site::new();
    site.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", "3"]); // nobody's
    let (stop, lost) = (site.path("stop"), site.path("lost"));
    let script = format!(
        "sim={sim} m={m}\nwhile [ ! -e {stop} ]; do\n  for start in 0 1 2; do\n    made=$($sim make $m --gpu 0 --profile 1g.6gb \
         --start $start --json 2>/dev/null) || continue\n    gi=$(echo \"$made\" | tr -d ' \\n' | sed 's/.*\"gpu_instance\":\\([0-9]*\\).*/\\1/')\n    \
         $sim destroy $m --gpu 0 --gi $gi || echo \"$made\" >> {lost}\n  done\ndone",
        sim = binaries().join("nvml-sim").display(),
        m = site.path("m").display(),
        stop = stop.display(),
        lost = lost.display(),
    );
    let rival = Command::new("sh").args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut given, mut refused) = (0, 0);
    for n in 0..24 {
        let way = [Way::Precreate, Way::Shim][n % 2];
        let (id, output) = site.ask(way, ["1g.6gb", "2g.12gb"][n / 2 % 2], Some("0"));
        if !output.status.success() {
            let said = text(&output);
            assert!(output.status.code() == Some(NO_ROOM) && said.contains("GPU 0"), "{said}");
            refused += 1;
            continue;
        }
        given += 1;
        let lease = site.lease();
        let slice = &lease["slices"][0];
        let mine = |gi: &&Value| {
            gi["id"] == slice["gi"] && gi["placement"] == slice["placement"] && gi["profile_id"] == slice["profile"]
        };
        assert_eq!(site.instances().iter().filter(mine).count(), 1, "{slice:#}");
        site.freed(&Held { way, token: lease["token"].as_str().unwrap().to_owned(), id });
    }
    let other = site.granted(Way::Precreate, "4g.24gb", None);
    assert_eq!(site.lease_of(&other)["slices"][0]["gpu_index"], 1);
    site.freed(&other);
    std::fs::write(stop, "").unwrap();
    let output = rival.wait_with_output().unwrap();
    assert!(
        !lost.exists(),
        "the rival's were destroyed: {}: {}",
        std::fs::read_to_string(&lost).unwrap(),
        text(&output)
    );
    assert!(given > 0, "{refused} refused");
    assert_eq!((site.leases().len(), site.instances().len()), (0, 1), "after the rival");
}

// ---- slow ----

/// A call that takes seconds on one GPU: the other is cut and given back meanwhile, and nobody waits for the slow one. Who is
/// killed in it is cleared up.
#[test]
fn a_slow_gpu_keeps_nobody_from_the_other() {
    let site = Site::new();
    let ways = site.ways();
    std::thread::scope(|scope| {
        // Each with its own machine.
        let sites: Vec<Site> = ways.iter().map(|_| Site::new()).collect();
        let trial = |site: Site, way: Way| {
            site.trouble(CREATE, &["--delay-ms", "30000"]);
            let mut slow = site.start(way, "pbs:slow", "4g.24gb", None);
            wait_for("the slow call", IN_TIME, || has_fired(&site));
            for other in [Way::Precreate, Way::Shim] {
                let held = site.granted(other, "2g.12gb", None);
                assert_eq!(site.lease_of(&held)["slices"][0]["gpu_index"], 1, "{other:?} beside {way:?}");
                site.freed(&held);
            }
            assert!(slow.try_wait().unwrap().is_none(), "{way:?}: the slow one is still under way");
            let cutting = site.lease();
            assert_eq!(cutting["state"], "pending", "{cutting}");
            let held = Held { way, token: cutting["token"].as_str().unwrap().to_owned(), id: String::new() };
            site.gc_says(&held, &[], "kept", &["being cut"]);
            // It gives up.
            slow.kill().unwrap();
            slow.wait().unwrap();
            wait_for("the end of the shim's engine", IN_TIME, || site.gc(&held, &["--dry-run"]).0 != "kept");
            site.gc_says(&held, &[], "freed", &["died"]);
            site.assert_clean("after the kill");
        };
        for (site, way) in sites.into_iter().zip(&ways) {
            scope.spawn(move || trial(site, *way));
        }
    });
}

#[test]
fn an_acquire_that_needs_the_room_waits_for_a_busy_slice() {
    let site = Site::new();
    let held = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    let gi = site.lease_of(&held)["slices"][0]["gi"].to_string();
    site.sim("hold", &["--gpu", "0", "--gi", &gi]);
    site.end(&held);
    let world = &site.world;
    world.sim("count", &["on"]);
    let waiter = std::thread::scope(|scope| {
        let ask = config(json!({"mig.profile": "4g.24gb", "mig.gpu": "0"}), &[]).to_string();
        let waiter = scope.spawn(move || world.hook(&["precreate"], ask.as_bytes()));
        wait_for("two tries of the acquire", Duration::from_secs(10), || {
            let counts: Value = serde_json::from_str(&world.sim("counts", &["--json"])).unwrap();
            counts[DESTROY_COMPUTE].as_u64() >= Some(2)
        });
        let let_go = Instant::now();
        world.sim("unhold", &["--gpu", "0", "--gi", &gi]);
        let output = waiter.join().unwrap();
        assert!(let_go.elapsed() < IN_TIME, "{:?}", let_go.elapsed());
        output
    });
    assert!(waiter.status.success(), "{}", text(&waiter));
    let leases = world.assert_consistent(&[], "after the wait");
    assert_eq!((leases.len(), &leases[0]["token"]), (1, &json!(token_in(&waiter.stdout))));
}

#[test]
fn a_rivals_bare_instance_that_came_between_stays() {
    // It has the room between our look and our call: the driver refuses us, so the instance there is not ours to undo.
    let world = World::new(&[A30]);
    world.fault(CREATE, &["--delay-ms", "1500"]);
    let (output, foreign) = std::thread::scope(|scope| {
        let hook = scope
            .spawn(|| world.hook(&["precreate"], config(json!({"mig.profile": "1g.6gb"}), &[]).to_string().as_bytes()));
        let step = || world.leases().first().map(|l| l["slices"][0]["step"] == "creating-instance");
        wait_for("a call on its way", Duration::from_secs(10), || step() == Some(true));
        let start = world.leases()[0]["slices"][0]["placement"]["start"].to_string();
        world.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", &start, "--no-ci"]);
        let foreign = world.instances();
        (hook.join().unwrap(), foreign)
    });
    assert_eq!(foreign.len(), 1);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(world.assert_consistent(&foreign, "after the race").len(), 1);
}

/// A GPU instance without its compute instance goes again, also where it can't be destroyed at once.
#[test]
fn a_slice_that_is_half_made_is_undone() {
    let site = Site::new();
    for code in ["UNKNOWN", "INSUFFICIENT_RESOURCES", "NO_PERMISSION"] {
        site.fault(CREATE_COMPUTE, &["--times", "forever", "--fail", code]);
        let (_, output) = site.ask(Way::Precreate, "4g.24gb", None);
        assert!(!output.status.success() && output.stdout.is_empty(), "{code}: {}", text(&output));
        site.assert_clean(code);
        site.over();
    }
    site.trouble(CREATE_COMPUTE, &["--fail", "UNKNOWN"]);
    site.trouble(DESTROY, &["--fail", "IN_USE"]);
    let held = site.granted(Way::Precreate, "4g.24gb", None);
    let leases = site.assert_consistent(&[], "with one that could not be undone");
    assert_eq!((leases.len(), site.instances().len()), (2, 2));
    assert_eq!(site.lease_of(&held)["slices"][0]["gpu_index"], 1);
    assert!(site.migctl(&["gc"]).status.success());
    site.freed(&held);
    site.assert_clean("after gc");
}

// ---- what others do to a GPU ----

const LOST: &str = "it is not there any more: its GPU was reset, or another tool destroyed it";

/// Destroyed, wholly or but for its GPU instance; with a rival's in its place, which has the same id and UUID.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Harm {
    Reset,
    Instance,
    Compute,
    Twin,
}

impl Site {
    fn harm(&self, held: &Held, harm: Harm) {
        let slice = self.lease_of(held)["slices"][0].clone();
        let start = slice["placement"]["start"].to_string();
        match harm {
            Harm::Reset => self.sim("reset", &["--gpu", "0"]),
            Harm::Instance | Harm::Compute | Harm::Twin => {
                self.sim("destroy", &["--gpu", "0", "--gi", &slice["gi"].to_string()])
            }
        };
        match harm {
            Harm::Reset | Harm::Instance => {}
            // The same as without its compute instance.
            Harm::Compute => {
                drop(self.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", &start, "--no-ci"]))
            }
            Harm::Twin => {
                // Noticed before the rival comes: afterwards nothing tells the two apart.
                self.gc_says(held, &[], "quarantined", &[LOST]);
                self.sim("make", &["--gpu", "0", "--profile", "1g.6gb", "--start", &start]);
            }
        }
    }
}

/// Under a holder that lives: quarantine until it is dead. Its place and its minors are nobody else's, and what a rival has
/// made there is not ours to destroy.
#[test]
fn a_slice_that_goes_under_a_living_holder_is_quarantined() {
    for harm in [Harm::Reset, Harm::Instance, Harm::Compute, Harm::Twin] {
        for way in [Way::Precreate, Way::Shim] {
            let site = Site::new();
            let (held, init) = site.living(way, "0");
            let before = site.lease_of(&held);
            site.harm(&held, harm);
            let foreign = if harm == Harm::Twin { site.instances() } else { vec![] };
            if harm == Harm::Twin {
                assert_eq!(
                    foreign[0]["compute_instances"][0]["uuid"], before["slices"][0]["uuid"],
                    "the same UUID again"
                );
            } else {
                if harm != Harm::Compute {
                    assert!(site.doctor("gpu.0.lost").contains("a reset, or another tool"));
                }
                site.gc_says(&held, &["--dry-run"], "quarantined", &[LOST]);
                assert_eq!(site.lease_of(&held), before, "a dry run does nothing");
                site.gc_says(&held, &[], "quarantined", &[LOST]);
            }
            let now = site.lease_of(&held);
            assert_eq!((&now["state"], &now["reason"]), (&json!("quarantined"), &json!(LOST)), "{harm:?}");
            assert_eq!(now["slices"][0]["ci_minor"], before["slices"][0]["ci_minor"], "its minors stay its own");
            let last = site.audit().pop().unwrap();
            assert_eq!((&last["event"], &last["token"]), (&json!("lost"), &before["token"]), "{last}");
            site.gc_says(&held, &[], "kept", &["quarantined"]);
            site.others_serve("while a slice is lost");
            // The place stays taken, and by name a twin is not given either.
            let whole = site.ask(Way::Precreate, "4g.24gb", Some("0")).1;
            assert!(text(&whole).contains("quarantined"), "{harm:?}: {}", text(&whole));
            if harm == Harm::Twin {
                site.settings("[slices]\nforeign = \"idle\"");
                let uuid = &before["slices"][0]["uuid"];
                let named = site.hook(&["precreate"], config(json!({"mig.uuid": uuid}), &[]).to_string().as_bytes());
                assert!(
                    named.status.code() == Some(NO_ROOM) && text(&named).contains("is held by"),
                    "{}",
                    text(&named)
                );
                site.settings("");
                site.recording_runtime(0);
            }
            // Beside it there is room on this GPU too.
            site.others_serve_on("0");
            drop(init);
            match way {
                Way::Shim => site.freed(&held),
                _ => site.gc_says(&held, &[], "freed", &["nothing holds it any more"]),
            }
            assert_eq!((site.leases(), site.instances()), (vec![], foreign), "{harm:?}");
        }
    }
}

/// Nobody looked before its end: what is ours goes, and a rival's of another profile stays, whatever id and UUID it has.
#[test]
fn a_slice_that_went_unseen_is_released_all_the_same() {
    let site = Site::new();
    for way in site.ways().into_iter().filter(|way| *way != Way::Run) {
        for harm in [Harm::Reset, Harm::Instance, Harm::Compute] {
            let held = site.granted(way, "1g.6gb", Some("0"));
            site.harm(&held, harm);
            site.freed(&held);
            site.assert_clean(&format!("{way:?} after {harm:?}"));
        }
        let held = site.granted(way, "1g.6gb", Some("0"));
        let ours = site.lease_of(&held)["slices"][0].clone();
        site.harm(&held, Harm::Instance);
        let start = ours["placement"]["start"].to_string();
        site.sim("make", &["--gpu", "0", "--profile", "1g.6gb+me", "--start", &start]);
        let foreign = site.instances();
        let same = (&foreign[0]["id"], &foreign[0]["compute_instances"][0]["uuid"]);
        assert_eq!(same, (&ours["gi"], &ours["uuid"]), "ids and UUIDs come again");
        site.freed(&held);
        assert_eq!((site.instances(), site.leases()), (foreign, vec![]));
        site.sim("destroy", &["--gpu", "0", "--gi", &ours["gi"].to_string()]);
    }
}

/// Between our two calls.
#[test]
fn a_slice_that_goes_while_it_is_cut_is_cut_elsewhere() {
    let site = Site::new();
    site.trouble(CREATE_COMPUTE, &["--delay-ms", "1000"]);
    let child = site.start(Way::Precreate, "c", "4g.24gb", None);
    wait_for("the call", IN_TIME, || has_fired(&site));
    let gi = site.instances()[0]["id"].to_string();
    site.sim("destroy", &["--gpu", "0", "--gi", &gi]);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let leases = site.assert_consistent(&[], "after it went");
    assert_eq!((leases.len(), &leases[0]["slices"][0]["gpu_index"]), (1, &json!(1)));
}

/// Between precreate and createRuntime: the container that would have nothing does not start.
#[test]
fn a_container_whose_slice_went_before_it_was_bound_is_not_started() {
    let site = Site::new();
    let held = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    site.harm(&held, Harm::Reset);
    site.gc_says(&held, &[], "quarantined", &[LOST]);
    let init = Init::start();
    let bound = site.hook(&["createRuntime", "--lease", &held.token], &state("c1", init.pid(), &site.path("bundle")));
    let said = text(&bound);
    assert!(
        bound.status.code() == Some(NO_ROOM)
            && said.contains("has lost its slice")
            && said.contains("start the container again"),
        "{said}"
    );
    site.freed(&held);
    site.assert_clean("after poststop");
}

/// The driver gives ids again: a new instance whose minors a living holder has is undone, and placed elsewhere.
#[test]
fn minors_of_a_living_holder_are_nobody_elses() {
    let site = Site::new();
    let (held, init) = site.living(Way::Precreate, "0");
    site.harm(&held, Harm::Reset);
    site.gc_says(&held, &[], "quarantined", &[LOST]);
    // As if the driver numbered what comes next as it had numbered that.
    let next = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    let minor = site.lease_of(&next)["slices"][0]["ci_minor"].clone();
    site.freed(&next);
    site.edit_lease(&held.token, |lease| lease["slices"][0]["ci_minor"] = minor.clone());
    let other = site.granted(Way::Precreate, "1g.6gb", Some("0"));
    assert_eq!(site.instances().len(), 1, "what was cut first is undone");
    assert_ne!(site.lease_of(&other)["slices"][0]["ci_minor"], minor);
    site.freed(&other);
    // Where every place has such minors there is no room; on the other GPU there is.
    let taken = site.granted(Way::Precreate, "2g.12gb", Some("0"));
    site.edit_lease(&held.token, |lease| {
        lease["slices"][0]["gi_minor"] = json!(minor.as_u64().unwrap() - 1 + 9);
    });
    site.refused(Way::Precreate, Some("0"), NO_ROOM, &["capability minor", "still belongs to another lease"]);
    site.freed(&taken);
    site.others_serve("where minors are taken");
    drop(init);
    site.gc_says(&held, &[], "freed", &["nothing holds it any more"]);
    site.others_serve_on("0");
    site.assert_clean("at the end");
}

// ---- MIG mode ----

/// Off at once or pending, with leases and without: said with the command that turns it on again.
#[test]
fn mig_mode_that_somebody_turns_off_is_told_with_what_turns_it_on() {
    let site = Site::new();
    let (held, init) = site.living(Way::Precreate, "0");
    site.sim("mode", &["--gpu", "1", "off"]);
    let pending = ["GPU 1", "has MIG on only until a reset", "migctl mode on 1"];
    for way in site.ways() {
        site.refused(way, Some("1"), 65, &pending);
    }
    site.sim("reset", &["--gpu", "1"]);
    let off = ["GPU 1", "has MIG mode off", "migctl mode on 1"];
    for way in site.ways() {
        site.refused(way, Some("1"), 65, &off);
        site.granted_and_ended(way, "0");
    }
    let created = site.migctl(&["create", "1g.6gb", "--gpu", "1"]);
    assert!(!created.status.success() && off.iter().all(|word| text(&created).contains(word)), "{}", text(&created));
    let on = site.migctl(&["mode", "on", "1"]);
    assert!(on.status.code() == Some(NO_ROOM) && text(&on).contains("reset"), "{}", text(&on));
    site.refused(Way::Precreate, Some("1"), 65, &["after a reset", "nvidia-smi --gpu-reset -i 1"]);
    site.sim("reset", &["--gpu", "1"]);
    site.granted_and_ended(Way::Precreate, "1");
    // With a holder: its slice goes with the mode.
    site.sim("reset", &["--gpu", "0"]);
    site.sim("mode", &["--gpu", "0", "off"]);
    site.sim("reset", &["--gpu", "0"]);
    site.gc_says(&held, &["--dry-run"], "quarantined", &[LOST]);
    site.gc_says(&held, &[], "quarantined", &[LOST]);
    site.refused(Way::Precreate, Some("0"), 65, &["GPU 0", "has MIG mode off", "migctl mode on 0"]);
    site.others_serve("with MIG off on a GPU");
    drop(init);
    site.gc_says(&held, &[], "freed", &["nothing holds it any more"]);
    site.migctl(&["mode", "on", "0"]);
    site.sim("reset", &["--gpu", "0"]);
    site.granted_and_ended(Way::Precreate, "0");
    site.assert_clean("at the end");
}

// ---- a driver that is not there ----

/// What nvmlInit answers, or what is loaded in its place: exit code 69 and what to do; an end is recorded and finished later.
#[test]
fn a_driver_that_does_not_start_is_told_and_ends_wait_for_it() {
    let site = Site::new();
    let library = site.path("m/usr/lib/libnvidia-ml.so.1");
    let away = site.path("away");
    let troubles: [(&str, &[&str]); 8] = [
        ("missing", &["libnvidia-ml.so.1", "No such file", "is the driver installed and loaded?"]),
        ("no library", &["libnvidia-ml.so.1", "is the driver installed and loaded?"]),
        ("DRIVER_NOT_LOADED", &["driver is not loaded", "is the driver installed and loaded?"]),
        ("UNINITIALIZED", &["libnvidia-ml.so.1", "is the driver installed and loaded?"]),
        ("LIB_RM_VERSION_MISMATCH", &["was changed and not loaded again", "reboot", "modprobe -r nvidia_uvm"]),
        ("NO_PERMISSION", &["libnvidia-ml.so.1"]),
        ("UNKNOWN", &["libnvidia-ml.so.1"]),
        ("4242", &["NVML error 4242"]),
    ];
    for (n, (trouble, words)) in troubles.into_iter().enumerate() {
        let ways: Vec<Way> = site.ways().into_iter().filter(|way| *way != Way::Run).collect();
        let held = site.granted(ways[n % ways.len()], "1g.6gb", None);
        match trouble {
            "missing" => std::fs::rename(&library, &away).unwrap(),
            "no library" => {
                std::fs::rename(&library, &away).unwrap();
                std::fs::write(&library, "no library").unwrap();
            }
            code => site.fault("nvmlInit*", &["--times", "forever", "--fail", code]),
        }
        for way in site.ways() {
            site.refused(way, None, UNAVAILABLE, words);
        }
        site.end(&held);
        let now = site.lease_of(&held);
        let told = words.iter().all(|word| now["reason"].as_str().unwrap().contains(word));
        assert!(now["state"] == "releasing" && told, "{trouble}: {now:#}");
        for args in [&["--dry-run"][..], &[]] {
            site.gc_says(&held, args, "failed", words);
        }
        match trouble {
            "missing" | "no library" => std::fs::rename(&away, &library).unwrap(),
            _ => site.over(),
        }
        site.gc_says(&held, &[], "freed", &["ended"]);
        site.assert_clean(trouble);
    }
}

/// A driver that lets us look and not change anything.
#[test]
fn a_driver_that_forbids_a_change_is_told() {
    let site = Site::new();
    for way in site.ways() {
        for call in [CREATE, CREATE_COMPUTE] {
            site.for_ever(call, "NO_PERMISSION");
            site.refused(way, Some("0"), 77, &["GPU 0", "insufficient permissions", "needs root"]);
            site.over();
        }
        site.assert_clean(&format!("{way:?}"));
        if way == Way::Run {
            continue;
        }
        let held = site.granted(way, "1g.6gb", Some("0"));
        for (call, code) in [(DESTROY_COMPUTE, "NO_PERMISSION"), (DESTROY, "UNKNOWN"), (DESTROY, "TIMEOUT")] {
            site.for_ever(call, code);
            site.end(&held);
            assert!(site.lease_of(&held)["reason"].as_str().unwrap().contains("GPU 0"), "{way:?} {call}");
            site.gc_says(&held, &[], "failed", &["GPU 0", call]);
            site.others_serve("beside it");
            site.over();
        }
        site.gc_says(&held, &[], "freed", &["ended"]);
    }
    site.assert_clean("at the end");
}

/// What migctl does on a GPU that fails is told with the GPU and undone; on the other one it works.
#[test]
fn migctl_undoes_what_a_gpu_refuses_and_works_on_the_other() {
    let site = Site::new();
    for (call, code) in [(CREATE, "GPU_IS_LOST"), (CREATE_COMPUTE, "UNKNOWN"), (CREATE, "INSUFFICIENT_RESOURCES")] {
        site.for_ever(call, code);
        let created = site.migctl(&["create", "1g.6gb,2g.12gb", "--gpu", "0"]);
        assert!(!created.status.success() && text(&created).contains(&format!("GPU 0: {call}")), "{}", text(&created));
        site.assert_clean(code);
        site.document(&["create", "1g.6gb", "--gpu", "1"]);
        site.document(&["destroy", "--all", "--yes"]);
        site.over();
    }
    site.document(&["create", "1g.6gb", "--gpu", "0"]);
    site.document(&["create", "1g.6gb", "--gpu", "1"]);
    site.for_ever(DESTROY_COMPUTE, "IN_USE");
    let destroyed = site.migctl(&["destroy", "--all", "--yes"]);
    let said = text(&destroyed);
    let told = said.contains("GPU 0: ") && said.contains("in use by another client");
    assert!(destroyed.status.code() == Some(NO_ROOM) && told, "{said}");
    assert_eq!(site.lease()["slices"][0]["gpu_index"], 0, "the other one is gone");
    assert_eq!(site.lease()["state"], "static");
    site.over();
    site.document(&["destroy", "--all", "--yes"]);
    site.assert_clean("when it is let go");
}
