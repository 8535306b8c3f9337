//! What a slice costs: create + start + delete through `mig-runtime`, beside the same container through plain runc in the
//! same run. Prints medians, and the median of the pairwise ratios with a bootstrap interval: absolute times of a shared
//! machine mean nothing. `make bench` runs it; the table in docs/performance.md is its output.
//!
//! `cargo bench --bench containers -- [--rounds N]`, as root, with `make build` done.

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
    let bench = Bench { dir: dir.path().to_owned() };
    bench.lay_out(&dist, runc);

    let shim = |more: &[&str]| {
        let mut words = vec![dist.join("mig-runtime").display().to_string()];
        words.extend(["--mig-config".to_owned(), bench.path("config.toml").display().to_string()]);
        words.extend(more.iter().map(|w| (*w).to_owned()));
        words
    };
    let docker_like = padded(bench.config(json!({})), 9 * 1024);
    let cases = [
        Case { name: "runc", runtime: vec![runc.into()], config: bench.config(json!({})) },
        Case { name: "mig-runtime, nothing asked", runtime: shim(&[]), config: bench.config(json!({})) },
        Case { name: "mig-runtime, nothing asked, 9 KB config", runtime: shim(&["--mig-env"]), config: docker_like },
        Case {
            name: "mig-runtime, 1g.10gb cut fresh",
            runtime: shim(&[]),
            config: bench.config(json!({"mig.profile": "1g.10gb"})),
        },
    ];
    println!("create + start + delete, {rounds} rounds, each case once a round in turn; runc {}", version(runc));
    println!();
    println!("| case | wall ms | ratio to runc (95 % interval) | CPU ms | CPU more than runc |");
    println!("|---|---|---|---|---|");
    let mut costs: Vec<Vec<Cost>> = cases.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds + 3 {
        // The order turns, so that no case always follows the same one.
        for n in (0..cases.len()).map(|n| (n + round) % cases.len()) {
            let cost = bench.cycle(&cases[n], round);
            if round >= 3 {
                costs[n].push(cost);
            }
        }
    }
    let plain = costs[0].clone();
    for (case, costs) in cases.iter().zip(&costs) {
        let ratios: Vec<f64> = costs.iter().zip(&plain).map(|(a, b)| a.wall / b.wall).collect();
        let (low, high) = bootstrap(&ratios);
        let cpu: Vec<f64> = costs.iter().zip(&plain).map(|(a, b)| a.cpu - b.cpu).collect();
        println!(
            "| {} | {:.1} | {:.3} ({low:.3}–{high:.3}) | {:.1} | {:+.1} ms |",
            case.name,
            median(costs.iter().map(|c| c.wall)),
            median(ratios.iter().copied()),
            median(costs.iter().map(|c| c.cpu)),
            median(cpu.into_iter()),
        );
    }
    println!();
    println!("peak memory of our processes (the low-level runtime is a stub that does nothing):");
    println!();
    println!("| process | MB |");
    println!("|---|---|");
    for (name, words) in bench.peaks(&dist) {
        println!("| {name} | {:.1} |", peak(&words));
    }
    let left = bench.migctl(&dist, &["leases", "--json"]);
    assert_eq!(left["leases"], json!([]), "leases are left over");
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
}

impl Bench {
    fn path(&self, relative: &str) -> PathBuf {
        self.dir.join(relative)
    }

    /// A busybox root, a simulated machine, settings, and a runtime that does nothing.
    fn lay_out(&self, dist: &Path, runc: &str) {
        std::fs::create_dir_all(self.path("b/rootfs/bin")).unwrap();
        std::fs::copy("/bin/busybox", self.path("b/rootfs/bin/true")).expect("busybox-static is not installed");
        ok(Command::new(runc).args(["spec", "--bundle"]).arg(self.path("b")));
        let machine = self.path("m");
        ok(Command::new(dist.join("nvml-sim")).arg("create").arg(&machine).args(["--gpu", "a100-sxm4-80gb"]));
        let (dir, machine) = (self.dir.display(), machine.display());
        let text = |runtime: &str| {
            format!(
                "state_dir = \"{dir}/state\"\n[driver]\nroot = \"{machine}\"\nproc_root = \"{machine}/proc\"\n\
                 dev_root = \"{machine}/dev\"\n[runtime]\npath = \"{runtime}\"\n"
            )
        };
        std::fs::write(self.path("config.toml"), text(runc)).unwrap();
        std::fs::write(self.path("stub.toml"), text("/bin/true")).unwrap();
    }

    fn config(&self, annotations: Value) -> Value {
        let mut config: Value = serde_json::from_slice(&std::fs::read(self.path("b/config.json")).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["/bin/true"]);
        config["process"]["rlimits"] = json!([]);
        config["annotations"] = annotations;
        config
    }

    /// One container from create to delete. Only the three calls are timed, not the wait for its end.
    fn cycle(&self, case: &Case, round: usize) -> Cost {
        std::fs::write(self.path("b/config.json"), serde_json::to_vec_pretty(&case.config).unwrap()).unwrap();
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
    fn peaks(&self, dist: &Path) -> Vec<(&'static str, Vec<String>)> {
        let stub = self.path("stub.toml").display().to_string();
        let root = self.path("root").display().to_string();
        let bundle = self.path("b").display().to_string();
        let runtime = dist.join("mig-runtime").display().to_string();
        let create = |id: &str| {
            let words = [&runtime, "--mig-config", &stub, "--root", &root, "create", "--bundle", &bundle, id];
            words.map(str::to_owned).to_vec()
        };
        std::fs::write(self.path("b/config.json"), self.config(json!({})).to_string()).unwrap();
        let nothing = ("first stage, then nothing asked", create("peak0"));
        let asking = self.path("asking");
        std::fs::create_dir_all(&asking).unwrap();
        std::fs::write(asking.join("config.json"), self.config(json!({"mig.profile": "1g.10gb"})).to_string()).unwrap();
        let mut slice = create("peak1");
        let at = slice.iter().position(|w| *w == bundle).unwrap();
        slice[at] = asking.display().to_string();
        let gc = [&dist.join("migctl").display().to_string(), "--config", &stub, "gc"].map(str::to_owned).to_vec();
        vec![nothing, ("mig-engine, 1g.10gb cut fresh", slice), ("migctl gc, slice given back", gc)]
    }

    fn migctl(&self, dist: &Path, args: &[&str]) -> Value {
        let output = Command::new(dist.join("migctl"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .args(args)
            .output()
            .unwrap();
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
