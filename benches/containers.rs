//! What a slice costs: create + start + delete through `mig-runtime`, beside the same container through plain runc in the
//! same run. Prints medians, and the median of the pairwise ratios with a bootstrap interval: absolute times of a shared
//! machine mean nothing. Then many containers at once, and a driver that takes its time. `make bench` runs it; the tables in
//! docs/performance.md are its output.
//!
//! `cargo bench --bench containers -- [--rounds N] [--past N]`, as root, with `make build` done; podman only in the world of
//! scripts/engines.sh.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};

/// One way to run a container.
struct Case {
    name: &'static str,
    runtime: Vec<String>,
    config: Value,
    /// The machine that it runs on.
    machine: &'static str,
}

/// Wall and CPU time of one create + start + delete, in ms. CPU is that of every process that ran for it: runtime, shim,
/// engine, hooks.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--peak-of") {
        return peak_of(&args[at + 1..]);
    }
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)?.parse().ok());
    let rounds: usize = option("--rounds").unwrap_or(40);
    let dist = std::env::var_os("MIG_TEST_DIST")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/dist"), PathBuf::from);
    let runc =
        ["/usr/bin/runc", "/usr/sbin/runc"].into_iter().find(|p| Path::new(p).exists()).expect("runc is not installed");
    let dir = tempfile::Builder::new().prefix("mig-bench").tempdir_in(base()).unwrap();
    let bench = Bench { dir: dir.path().to_owned(), dist, runc };
    bench.lay_out();
    one_at_a_time(&bench, rounds, option("--past").unwrap_or(5000));
    by_podman(&bench, rounds);
    peaks(&bench);
    many_at_once(&bench, rounds.div_ceil(4));
    a_driver_that_takes_its_time(&bench);
    nothing_to_apply(&bench, rounds);
    for machine in MACHINES {
        let left = bench.migctl(machine.name, &["leases", "--json"]);
        let held = left["leases"].as_array().unwrap().iter().filter(|lease| lease["state"] != "idle").count();
        assert_eq!(held, 0, "leases are left over on {}: {left:#}", machine.name);
    }
}

/// A machine that containers run on.
struct Machine {
    name: &'static str,
    gpus: usize,
    /// 1g slices of another tool's on each GPU, one less on the last.
    taken: usize,
    /// What `nvml-sim create` is told besides.
    options: &'static [&'static str],
    /// Settings.
    settings: &'static str,
}

const MACHINES: [Machine; 6] = [
    Machine { name: "plain", gpus: 1, taken: 0, options: &[], settings: "" },
    Machine { name: "idle", gpus: 1, taken: 0, options: &[], settings: "[slices]\nidle_ttl = \"1h\"\n" },
    Machine { name: "files", gpus: 1, taken: 0, options: &["--driver-files"], settings: "" },
    Machine { name: "full", gpus: 1, taken: 7, options: &[], settings: "" },
    Machine { name: "eight", gpus: 8, taken: 7, options: &[], settings: "" },
    Machine { name: "empty", gpus: 8, taken: 0, options: &[], settings: "" },
];

/// Calls that take their time, and how many ms.
const SLOW: [(&str, &str); 2] = [("nvmlDeviceCreateGpuInstance*", "300"), ("nvmlGpuInstanceDestroy", "1000")];

fn one_at_a_time(bench: &Bench, rounds: usize, past: usize) {
    let plain = || bench.config(json!({}));
    let asking = || bench.config(json!({"mig.profile": "1g.10gb"}));
    let case =
        |name, machine, more: &[&str], config| Case { name, runtime: bench.shim(machine, more), config, machine };
    let fresh = "1g.10gb cut fresh";
    let cases = [
        Case { name: "runc", runtime: vec![bench.runc.into()], config: plain(), machine: "plain" },
        Case {
            name: "runc, the same devices written by hand",
            runtime: vec![bench.runc.into()],
            config: bench.by_hand(&asking()),
            machine: "plain",
        },
        case("nothing asked, 2.6 KB config", "plain", &[], plain()),
        case("nothing asked, 9 KB config", "plain", &["--mig-env"], padded(plain(), 9 * 1024)),
        case(fresh, "plain", &[], asking()),
        case("1g.10gb that an earlier container left (`idle_ttl`)", "idle", &[], asking()),
        case("1g.10gb cut fresh, with the driver's files", "files", &[], asking()),
        case("1g.10gb cut fresh, 1 GPU with 6 slices", "full", &[], asking()),
        case("1g.10gb cut fresh, 8 GPUs with 55 slices", "eight", &[], asking()),
    ];
    println!("create + start + delete, {rounds} rounds, each case once a round in turn; runc {}", version(bench.runc));
    println!();
    println!("| case | wall ms | ratio to runc (95 % interval) | CPU ms | CPU more than runc | NVML calls (inits) |");
    println!("|---|---|---|---|---|---|");
    bench.compare(&cases, rounds);
    for _ in 0..past {
        bench.ended_container();
    }
    let again = [
        Case { name: "runc", runtime: vec![bench.runc.into()], config: plain(), machine: "plain" },
        case("1g.10gb cut fresh, after many others", "plain", &[], asking()),
    ];
    println!();
    println!("after {past} containers that had slices on the same machine:");
    println!();
    println!("| case | wall ms | ratio to runc (95 % interval) | CPU ms | CPU more than runc | NVML calls (inits) |");
    println!("|---|---|---|---|---|---|");
    bench.compare(&again, rounds);
}

/// `podman run --rm` with our precreate hook, in the world of scripts/engines.sh.
fn by_podman(bench: &Bench, rounds: usize) {
    println!();
    let Some(world) = std::env::var_os("ENG_DIR").map(PathBuf::from) else {
        println!("podman: left out, since scripts/bench does not run it in a world of its own here");
        return;
    };
    let podman = world.join("bin/podman");
    let hooks = bench.path("hooks.d");
    std::fs::create_dir_all(&hooks).unwrap();
    let mut hook: Value = serde_json::from_str(include_str!("../hooks/mig-hook-precreate.json.in")).unwrap();
    hook["hook"]["path"] = json!(bench.dist.join("mig-hook"));
    hook["hook"]["args"] = json!(["mig-hook", "--config", bench.settings("plain"), "precreate"]);
    std::fs::write(hooks.join("mig-hook-precreate.json"), hook.to_string()).unwrap();
    let image = "localhost/busybox";
    let ask = ["--annotation", "mig.profile=1g.10gb"];
    let cases: [(&str, bool, &[&str]); 3] =
        [("podman", false, &[]), ("nothing asked", true, &[]), ("1g.10gb cut fresh", true, &ask)];
    let run = |(_, hooked, options): &(&str, bool, &[&str])| {
        let mut command = Command::new(&podman);
        if *hooked {
            command.env("ENG_HOOKS_DIR", &hooks);
        }
        let (cpu, start) = (children_cpu(), Instant::now());
        ok(command.args(["run", "--rm"]).args(*options).args([image, "true"]));
        Cost { wall: start.elapsed().as_secs_f64() * 1e3, cpu: children_cpu() - cpu }
    };
    let mut costs: Vec<Vec<Cost>> = cases.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for n in (0..cases.len()).map(|n| (n + round) % cases.len()) {
            let cost = run(&cases[n]);
            if round > 0 {
                costs[n].push(cost);
            }
        }
    }
    let version = Command::new(&podman).arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).trim().replace("podman version ", "");
    println!("podman {version} run --rm, {rounds} rounds");
    println!();
    println!("| case | wall ms | ratio to podman without our hook (95 % interval) |");
    println!("|---|---|---|");
    for ((name, ..), costs_of) in cases.iter().zip(&costs) {
        let ratios: Vec<f64> = costs_of.iter().zip(&costs[0]).map(|(a, b)| a.wall / b.wall).collect();
        let (low, high) = bootstrap(&ratios);
        let (wall, ratio) = (median(costs_of.iter().map(|c| c.wall)), median(ratios.iter().copied()));
        println!("| {name} | {wall:.1} | {ratio:.3} ({low:.3}–{high:.3}) |");
    }
}

fn peaks(bench: &Bench) {
    println!();
    println!("peak memory of our processes (the low-level runtime is a stub that does nothing):");
    println!();
    println!("| process | MB |");
    println!("|---|---|");
    for (name, words) in bench.peaks() {
        println!("| {name} | {:.1} |", peak(&words));
    }
}

/// 56 containers, all created, then all started, then all deleted: with 8 GPUs each has a slice.
fn many_at_once(bench: &Bench, rounds: usize) {
    const MANY: usize = 56;
    let with_slice = Case {
        name: "56 with a slice",
        runtime: bench.shim("empty", &[]),
        config: bench.config(json!({"mig.profile": "1g.10gb"})),
        machine: "empty",
    };
    let plain = Case {
        name: "56 under runc",
        runtime: vec![bench.runc.into()],
        config: bench.config(json!({})),
        machine: "empty",
    };
    for at in 0..MANY {
        bench.bundle(&format!("many{at}"));
    }
    let mut walls: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for n in [round % 2, (round + 1) % 2] {
            let wall = bench.crowd([&plain, &with_slice][n], MANY);
            if round > 0 {
                walls[n].push(wall);
            }
        }
    }
    let ratios: Vec<f64> = walls[1].iter().zip(&walls[0]).map(|(slice, plain)| slice / plain).collect();
    let (low, high) = bootstrap(&ratios);
    println!();
    println!("{MANY} containers at once on 8 GPUs, {rounds} rounds: all created, then all deleted");
    println!();
    println!("| case | wall ms | ratio to runc (95 % interval) |");
    println!("|---|---|---|");
    println!("| {} | {:.0} | 1.000 |", plain.name, median(walls[0].iter().copied()));
    let slice = median(walls[1].iter().copied());
    println!("| {} | {slice:.0} | {:.3} ({low:.3}–{high:.3}) |", with_slice.name, median(ratios.iter().copied()));
}

/// Creates at once with a driver that takes 300 ms to cut and 1 s to destroy, one thing at a time on each GPU.
fn a_driver_that_takes_its_time(bench: &Bench) {
    bench.slow_down("empty");
    let case = Case {
        name: "",
        runtime: bench.shim_over_nothing("empty"),
        config: bench.config(json!({"mig.profile": "7g.80gb"})),
        machine: "empty",
    };
    println!();
    println!(
        "a driver that takes 300 ms to cut and 1 s to destroy, one at a time on each GPU (median of 5, no container):"
    );
    println!();
    println!("| at once, each on a GPU of its own | cut, ms | ratio | given back, ms | ratio |");
    println!("|---|---|---|---|---|");
    let mut one = None;
    for count in [1, 2, 4, 8] {
        let times: Vec<(f64, f64)> = (0..5).map(|_| bench.cut_and_give_back(&case, count)).collect();
        let (cut, back) = (median(times.iter().map(|t| t.0)), median(times.iter().map(|t| t.1)));
        let (first_cut, first_back) = *one.get_or_insert((cut, back));
        println!("| {count} | {cut:.0} | {:.2} | {back:.0} | {:.2} |", cut / first_cut, back / first_back);
    }
}

/// `migctl apply` of what is there already.
fn nothing_to_apply(bench: &Bench, rounds: usize) {
    let layout = bench.path("layout.yaml");
    let text = "version: v1\nmig-configs:\n  all-1g:\n    - devices: all\n      mig-enabled: true\n      mig-devices: {1g.10gb: 7}\n";
    std::fs::write(&layout, text).unwrap();
    let layout = layout.display().to_string();
    let config = bench.settings("empty").display().to_string();
    for (call, _) in SLOW {
        bench.sim("empty", &["latency", "--call", call, "--ms", "0"]);
    }
    bench.sim("empty", &["serialise", "off"]);
    let apply = || {
        let start = Instant::now();
        ok(Command::new(bench.dist.join("migctl")).args(["--config", &config, "apply", &layout]));
        start.elapsed().as_secs_f64() * 1e3
    };
    apply();
    let times: Vec<f64> = (0..rounds).map(|_| apply()).collect();
    println!();
    println!(
        "`migctl apply` with nothing to do, 8 GPUs with 7 slices each: {:.1} ms (median of {rounds})",
        median(times.into_iter())
    );
    ok(Command::new(bench.dist.join("migctl")).args(["--config", &config, "destroy", "--all"]));
}

/// A tmpfs that programs run from, as the engines' /run is on most hosts; else /tmp.
fn base() -> &'static str {
    let runs = |dir: &str| {
        let copy =
            tempfile::Builder::new().prefix("mig-bench").tempdir_in(dir).map(|dir| (dir.path().join("true"), dir));
        copy.is_ok_and(|(program, _dir)| {
            std::fs::copy("/bin/busybox", &program).is_ok()
                && Command::new(&program).status().is_ok_and(|s| s.success())
        })
    };
    if runs("/dev/shm") { "/dev/shm" } else { "/tmp" }
}

struct Bench {
    dir: PathBuf,
    dist: PathBuf,
    runc: &'static str,
}

impl Bench {
    fn path(&self, relative: &str) -> PathBuf {
        self.dir.join(relative)
    }

    fn settings(&self, machine: &str) -> PathBuf {
        self.path(&format!("{machine}.toml"))
    }

    fn shim(&self, machine: &str, more: &[&str]) -> Vec<String> {
        let (shim, config) = (self.dist.join("mig-runtime"), self.settings(machine));
        let words = [shim.display().to_string(), "--mig-config".to_owned(), config.display().to_string()];
        words.into_iter().chain(more.iter().map(|w| (*w).to_owned())).collect()
    }

    /// The same with a low-level runtime that does nothing.
    fn shim_over_nothing(&self, machine: &str) -> Vec<String> {
        let mut words = self.shim(machine, &[]);
        words[2] = self.path(&format!("{machine}-stub.toml")).display().to_string();
        words
    }

    /// A busybox root, simulated machines with settings, and a runtime that does nothing.
    fn lay_out(&self) {
        std::fs::create_dir_all(self.path("b/rootfs/bin")).unwrap();
        std::fs::copy("/bin/busybox", self.path("b/rootfs/bin/true")).expect("busybox-static is not installed");
        ok(Command::new(self.runc).args(["spec", "--bundle"]).arg(self.path("b")));
        // config.json itself is edited by what is measured.
        std::fs::copy(self.path("b/config.json"), self.path("template.json")).unwrap();
        for machine in MACHINES {
            self.machine(&machine);
        }
    }

    fn machine(&self, machine: &Machine) {
        let (name, root) = (machine.name, self.path(machine.name));
        let gpus = std::iter::repeat_n(["--gpu", "a100-sxm4-80gb"], machine.gpus).flatten();
        ok(Command::new(self.dist.join("nvml-sim")).arg("create").arg(&root).args(gpus).args(machine.options));
        for gpu in 0..machine.gpus {
            let less = usize::from(gpu + 1 == machine.gpus);
            for _ in 0..machine.taken.saturating_sub(less) {
                self.sim(name, &["make", "--gpu", &gpu.to_string(), "--profile", "1g.10gb"]);
            }
        }
        let (dir, root) = (self.dir.display(), root.display());
        let text = |runtime: &str| {
            format!(
                "state_dir = \"{dir}/{name}-state\"\n[driver]\nroot = \"{root}\"\nproc_root = \"{root}/proc\"\n\
                 dev_root = \"{root}/dev\"\n[runtime]\npath = \"{runtime}\"\n{}",
                machine.settings
            )
        };
        std::fs::write(self.settings(name), text(self.runc)).unwrap();
        std::fs::write(self.path(&format!("{name}-stub.toml")), text("/bin/true")).unwrap();
    }

    fn sim(&self, machine: &str, words: &[&str]) -> String {
        let output = Command::new(self.dist.join("nvml-sim"))
            .arg(words[0])
            .arg(self.path(machine))
            .args(&words[1..])
            .output()
            .unwrap();
        assert!(output.status.success(), "nvml-sim {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the cases in turn, and prints a line for each; the first is what the others are compared with.
    fn compare(&self, cases: &[Case], rounds: usize) {
        let mut costs: Vec<Vec<Cost>> = cases.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds + 3 {
            // The order turns, so that no case always follows the same one.
            for n in (0..cases.len()).map(|n| (n + round) % cases.len()) {
                let cost = self.cycle(&cases[n], round);
                if round >= 3 {
                    costs[n].push(cost);
                }
            }
        }
        for (case, costs_of) in cases.iter().zip(&costs) {
            let ratios: Vec<f64> = costs_of.iter().zip(&costs[0]).map(|(a, b)| a.wall / b.wall).collect();
            let (low, high) = bootstrap(&ratios);
            let cpu: Vec<f64> = costs_of.iter().zip(&costs[0]).map(|(a, b)| a.cpu - b.cpu).collect();
            println!(
                "| {} | {:.1} | {:.3} ({low:.3}–{high:.3}) | {:.1} | {:+.1} ms | {} |",
                case.name,
                median(costs_of.iter().map(|c| c.wall)),
                median(ratios.iter().copied()),
                median(costs_of.iter().map(|c| c.cpu)),
                median(cpu.into_iter()),
                self.calls(case),
            );
        }
    }

    /// Calls of the driver's library that one container makes, and how often it is opened.
    fn calls(&self, case: &Case) -> String {
        self.sim(case.machine, &["count", "on"]);
        self.cycle(case, 0);
        let counts: Value = serde_json::from_str(&self.sim(case.machine, &["counts", "--json"])).unwrap();
        let of = |wanted: fn(&str) -> bool| -> u64 {
            let counts = counts.as_object().unwrap().iter().filter(|(call, _)| wanted(call));
            counts.filter_map(|(_, count)| count.as_u64()).sum()
        };
        self.sim(case.machine, &["count", "off"]);
        format!("{} ({})", of(|_| true), of(|call| call.starts_with("nvmlInit")))
    }

    /// What an administrator who cuts and passes slices by hand would write: our config without hooks and marks.
    fn by_hand(&self, asking: &Value) -> Value {
        self.write_config("b", asking);
        let shim = self.shim_over_nothing("plain");
        let bundle = self.path("b").display().to_string();
        let run = |words: &[&str]| {
            ok(Command::new(&shim[0]).args(&shim[1..]).arg("--root").arg(self.path("root")).args(words));
        };
        run(&["create", "--bundle", &bundle, "by-hand"]);
        let mut config: Value = serde_json::from_slice(&std::fs::read(self.path("b/config.json")).unwrap()).unwrap();
        run(&["delete", "by-hand"]);
        assert!(config["linux"]["devices"].as_array().is_some_and(|devices| devices.len() >= 6), "{config:#}");
        config.as_object_mut().unwrap().retain(|key, _| key != "hooks" && key != "annotations");
        config
    }

    /// A container that had a slice, as far as we are concerned: no runtime runs.
    fn ended_container(&self) {
        let config = self.config(json!({"mig.profile": "1g.10gb"}));
        self.write_config("b", &config);
        let shim = self.shim_over_nothing("plain");
        let bundle = self.path("b").display().to_string();
        for words in [&["create", "--bundle", &bundle, "past"][..], &["delete", "past"]] {
            ok(Command::new(&shim[0]).args(&shim[1..]).arg("--root").arg(self.path("root")).args(words));
        }
    }

    /// A bundle of that name with the same root file system.
    fn bundle(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
    }

    fn write_config(&self, bundle: &str, config: &Value) {
        let mut config = config.clone();
        config["root"] = json!({"path": self.path("b/rootfs"), "readonly": true});
        std::fs::write(self.path(bundle).join("config.json"), serde_json::to_vec_pretty(&config).unwrap()).unwrap();
    }

    /// Every command at the same time; how long until the last one has ended, in ms.
    fn at_once(&self, case: &Case, commands: &[Vec<String>]) -> f64 {
        let start = Instant::now();
        let spawn = |words: &Vec<String>| {
            let mut command = Command::new(&case.runtime[0]);
            command.args(&case.runtime[1..]).arg("--root").arg(self.path("root")).args(words);
            command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
        };
        let children: Vec<_> = commands.iter().map(spawn).collect();
        for (mut child, words) in children.into_iter().zip(commands) {
            assert!(child.wait().unwrap().success(), "{words:?}");
        }
        start.elapsed().as_secs_f64() * 1e3
    }

    /// That many containers created at once, then deleted at once.
    fn crowd(&self, case: &Case, count: usize) -> f64 {
        let names: Vec<String> = (0..count).map(|at| format!("many{at}")).collect();
        names.iter().for_each(|name| self.write_config(name, &case.config));
        let bundle = |name: &String| self.path(name).display().to_string();
        let create = |name: &String| vec!["create".to_owned(), "--bundle".to_owned(), bundle(name), name.clone()];
        let created = self.at_once(case, &names.iter().map(create).collect::<Vec<_>>());
        let delete = |name: &String| vec!["delete".to_owned(), "--force".to_owned(), name.clone()];
        created + self.at_once(case, &names.iter().map(delete).collect::<Vec<_>>())
    }

    fn slow_down(&self, machine: &str) {
        for (call, ms) in SLOW {
            self.sim(machine, &["latency", "--call", call, "--ms", ms]);
        }
        self.sim(machine, &["serialise", "gpu"]);
    }

    /// Milliseconds until that many have their slices, and until these are gone.
    fn cut_and_give_back(&self, case: &Case, count: usize) -> (f64, f64) {
        let names: Vec<String> = (0..count).map(|at| format!("many{at}")).collect();
        names.iter().for_each(|name| self.write_config(name, &case.config));
        let bundle = |name: &String| self.path(name).display().to_string();
        let create = |name: &String| vec!["create".to_owned(), "--bundle".to_owned(), bundle(name), name.clone()];
        let delete = |name: &String| vec!["delete".to_owned(), name.clone()];
        (
            self.at_once(case, &names.iter().map(create).collect::<Vec<_>>()),
            self.at_once(case, &names.iter().map(delete).collect::<Vec<_>>()),
        )
    }

    fn config(&self, annotations: Value) -> Value {
        let mut config: Value = serde_json::from_slice(&std::fs::read(self.path("template.json")).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["/bin/true"]);
        config["process"]["rlimits"] = json!([]);
        config["annotations"] = annotations;
        config
    }

    /// One container from create to delete. Only the three calls are timed, not the wait for its end.
    fn cycle(&self, case: &Case, round: usize) -> Cost {
        self.write_config("b", &case.config);
        let id = format!("bench{round}");
        let pid_file = self.path("pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut cost = Cost { wall: 0.0, cpu: 0.0 };
        let bundle = self.path("b").display().to_string();
        let create =
            ["create", "--bundle", &bundle, "--pid-file", &pid_file.display().to_string(), &id].map(str::to_owned);
        self.timed(case, &create, &mut cost);
        self.timed(case, &["start".into(), id.clone()], &mut cost);
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z")) {
            assert!(Instant::now() < until, "the container did not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.timed(case, &["delete".into(), id], &mut cost);
        cost
    }

    fn timed(&self, case: &Case, words: &[String], cost: &mut Cost) {
        let mut command = Command::new(&case.runtime[0]);
        command.args(&case.runtime[1..]).arg("--root").arg(self.path("root")).args(words);
        let (cpu, start) = (children_cpu(), Instant::now());
        ok(&mut command);
        cost.wall += start.elapsed().as_secs_f64() * 1e3;
        cost.cpu += children_cpu() - cpu;
    }

    /// Command lines of each process of ours, with a low-level runtime that does nothing.
    fn peaks(&self) -> Vec<(&'static str, Vec<String>)> {
        let stub = self.path("plain-stub.toml").display().to_string();
        let root = self.path("root").display().to_string();
        let bundle = self.path("b").display().to_string();
        let runtime = self.dist.join("mig-runtime").display().to_string();
        let create = |id: &str| {
            let words = [&runtime, "--mig-config", &stub, "--root", &root, "create", "--bundle", &bundle, id];
            words.map(str::to_owned).to_vec()
        };
        self.write_config("b", &self.config(json!({})));
        let nothing = ("first stage, then nothing asked", create("peak0"));
        self.bundle("asking");
        let asking = self.path("asking");
        self.write_config("asking", &self.config(json!({"mig.profile": "1g.10gb"})));
        let mut slice = create("peak1");
        let at = slice.iter().position(|w| *w == bundle).unwrap();
        slice[at] = asking.display().to_string();
        let gc = [&self.dist.join("migctl").display().to_string(), "--config", &stub, "gc"].map(str::to_owned).to_vec();
        vec![nothing, ("mig-engine, 1g.10gb cut fresh", slice), ("migctl gc, slice given back", gc)]
    }

    fn migctl(&self, machine: &str, args: &[&str]) -> Value {
        let config = self.settings(machine);
        let output = Command::new(self.dist.join("migctl")).arg("--config").arg(config).args(args).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn ok(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn version(runc: &str) -> String {
    let output = Command::new(runc).arg("--version").output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().replace("runc version ", "")
}

/// A config as large as docker's: the padding is what docker's seccomp profile would be.
fn padded(mut config: Value, bytes: usize) -> Value {
    let names: Vec<String> =
        (0..).map(|n| format!("x{n:04}")).take(bytes.saturating_sub(config.to_string().len()) / 8).collect();
    config["x-padding"] = json!(names);
    config
}

/// CPU time in ms of every child that has been waited for, and of theirs.
fn children_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let ms = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 * 1e3 + t.tv_usec() as f64 / 1e3;
    ms(usage.user_time()) + ms(usage.system_time())
}

/// Runs this program again to run `words`, so that the peak is of that child alone, in MB.
fn peak(words: &[String]) -> f64 {
    let output = Command::new(std::env::current_exe().unwrap()).arg("--peak-of").args(words).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().parse::<f64>().expect("no figure") / 1024.0
}

fn peak_of(words: &[String]) {
    // Through a small shell: a child's peak begins with its parent's memory, and ours is larger than what is measured.
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg("exec \"$@\"")
        .arg("sh")
        .args(words)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{words:?}: {status}");
    println!("{}", getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss());
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n % 2 == 1 { sorted[n / 2] } else { f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]) }
}

/// 95 % interval of the median by 2,000 resamplings with a fixed seed.
fn bootstrap(values: &[f64]) -> (f64, f64) {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as usize % values.len()
    };
    let mut medians: Vec<f64> = (0..2000).map(|_| median((0..values.len()).map(|_| values[next()]))).collect();
    medians.sort_by(f64::total_cmp);
    (medians[50], medians[1949])
}
