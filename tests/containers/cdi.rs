//! CDI: `--device mig-hook.io/slice=UUID` of slices that somebody else cut, in engines that have never heard of us.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{run, skip, text};
use crate::{Engine, IMAGE, Probe, SOON, Site, wait_for};

/// Where engines look, whatever they are told.
const SPECS: &str = "/var/run/cdi";

impl Site {
    /// Two slices that somebody else cut on GPU 0, offered in a spec of this test's own; the file is removed at the end.
    fn offering(&self) -> Offering<'_> {
        let name = self.world.path("").file_name().unwrap().to_str().unwrap().to_owned();
        let spec = PathBuf::from(format!("{SPECS}/{name}.json"));
        let runtime = crate::installed("runc");
        self.settings(&format!(
            "[runtime]\npath = \"{}\"\n[slices]\nforeign = \"idle\"\n[cdi]\nspec = \"{}\"",
            runtime.display(),
            spec.display()
        ));
        for profile in ["1g.10gb", "2g.20gb"] {
            self.sim("make", &["--gpu", "0", "--profile", profile]);
        }
        assert_eq!(self.gc(), Vec::<String>::new());
        let spec_value: Value = serde_json::from_slice(&std::fs::read(&spec).expect("gc wrote the spec")).unwrap();
        let device = |d: &Value| d["name"].as_str().unwrap().to_owned();
        let slices = spec_value["devices"].as_array().unwrap().iter().map(device).collect();
        Offering { site: self, spec, slices, foreign: self.instances() }
    }
}

struct Offering<'a> {
    site: &'a Site,
    spec: PathBuf,
    slices: Vec<String>,
    foreign: Vec<Value>,
}

impl Drop for Offering<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.spec);
    }
}

impl Offering<'_> {
    fn run(&self, engine: &Engine<'_>, slice: usize, options: &[&str], words: &[&str]) -> Command {
        let mut command = engine.command(&["run", "--device", &format!("mig-hook.io/slice={}", self.slices[slice])]);
        command.args(options).arg(IMAGE).args(words);
        command
    }

    fn start(&self, engine: &Engine<'_>, slice: usize) -> String {
        let options = ["-d", "--cap-add", "MKNOD"];
        crate::must(&mut self.run(engine, slice, &options, &["sh", "-c", crate::PROBE_AND_WAIT])).trim().to_owned()
    }

    fn profile(&self, slice: usize) -> String {
        let machine = self.site.machine();
        let has = |i: &Value| i["compute_instances"][0]["uuid"] == json!(self.slices[slice]);
        let (_, instance) = crate::instances_of(&machine).find(|(_, i)| has(i)).unwrap();
        instance["profile"].as_str().unwrap().to_owned()
    }

    /// Nothing is leased, and what somebody else cut is as it was.
    fn assert_free(&self, when: &str) {
        wait_for(when, SOON, || self.site.leases().is_empty());
        assert_eq!(self.site.instances(), self.foreign, "{when}");
    }

    /// The whole life, on an engine that knows nothing of us but the device.
    fn live_and_die(&self, engine: &Engine<'_>) {
        let site = self.site;
        let (one, two) = (self.start(engine, 0), self.start(engine, 1));
        for (slice, id) in [&one, &two].into_iter().enumerate() {
            let seen = engine.probe(id);
            site.assert_given(&seen, &[&self.profile(slice)]);
            engine.assert_confined(id, &seen);
        }
        assert_eq!(site.leases().len(), 2);
        assert!(site.leases().iter().all(|l| l["holder"]["way"] == "cdi"), "{:#?}", site.leases());

        let output = run(&mut self.run(engine, 0, &["--rm"], &["true"]));
        assert!(!output.status.success(), "a second container was let in: {}", text(&output));
        let held = format!("is held by container {}", &one[..12]);
        assert_eq!(site.audited("refusal"), 1);
        let audit = site.audit();
        let said = audit.iter().find(|line| line["event"] == "refusal").unwrap()["reason"].as_str().unwrap();
        assert!(said.contains(&held), "{said}");
        // crun keeps what a hook says to itself; runc's words reach the user.
        let crun = engine.env.iter().any(|(_, value)| value == "crun");
        if !crun {
            assert!(text(&output).contains(&held), "{}", text(&output));
        }
        assert_eq!(site.leases().len(), 2);

        engine.ok(&["restart", "-t", "0", &one]);
        assert_eq!(site.leases().len(), 2, "a restart is a release and a new lease");
        site.assert_given(&engine.probe(&one), &[&self.profile(0)]);
        engine.ok(&["stop", "-t", "0", &one]);
        engine.ok(&["rm", &one]);
        engine.ok(&["rm", "-f", &two]);
        self.assert_free("after stop and rm -f");

        let output = run(&mut self.run(engine, 0, &["--rm"], &["/nonexistent"]));
        assert_eq!(output.status.code(), Some(127), "{}", text(&output));
        if crun {
            site.gc(); // it calls no poststop then
        }
        self.assert_free("after a create that failed");
        assert!(Probe::read(&crate::must(&mut self.run(engine, 0, &["--rm"], &["mig-probe"]))).nodes.len() == 6);
        self.assert_free("after --rm");
    }
}

fn podman(runtime: &str) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let offering = site.offering();
    let mut podman = site.podman(runtime);
    std::fs::create_dir_all(site.path("no-hooks")).unwrap();
    podman.env.retain(|(key, _)| *key != "ENG_HOOKS_DIR");
    podman.env.push(("ENG_HOOKS_DIR", site.shown("no-hooks")));
    offering.live_and_die(&podman);

    let second = format!("mig-hook.io/slice={}", offering.slices[1]);
    let seen = Probe::read(&crate::must(&mut offering.run(&podman, 0, &["--rm", "--device", &second], &["mig-probe"])));
    assert_eq!(seen.nodes.len(), 8, "the nodes of both slices: {seen:?}");
    assert_eq!(site.audited("grant"), site.audited("release"));

    let refused = site.audited("refusal");
    let output = run(&mut offering.run(&podman, 0, &["--rm", "--privileged"], &["true"]));
    assert!(!output.status.success(), "--privileged reaches every slice: {}", text(&output));
    assert!(site.audited("refusal") > refused, "{}", text(&output));
    // It was refused while its first process lived, and crun runs no poststop of a create that failed: then gc gives back.
    site.document(&["gc"]);
    offering.assert_free("after a refusal");
    // A slice that is gone: the spec is behind until somebody of ours looks, and the container does not start.
    site.sim("reboot", &[]);
    assert!(!run(&mut offering.run(&podman, 0, &["--rm"], &["true"])).status.success());
    assert!(!offering.spec.exists(), "the refused create has mended the spec");
}

/// `migctl run -- podman run`: the container uses what the command around it holds.
#[test]
fn podman_within_migctl_run() {
    let Some(site) = Site::new(&["podman", "runc"]) else { return };
    let podman = site.podman_alone("runc");
    let name = site.path("").file_name().unwrap().to_str().unwrap().to_owned();
    let spec = format!("{SPECS}/{name}.json");
    let migctl = crate::binaries().join("migctl");
    let script = site.script(
        "job",
        &format!(
            "set -e\n{migctl} --config {config} cdi --lease $MIG_LEASE --output {spec}\n\
             {podman} run --rm --device mig-hook.io/slice=$MIG_LEASE {IMAGE} sh -c 'echo $CUDA_VISIBLE_DEVICES; mig-probe'\n\
             echo outside $CUDA_VISIBLE_DEVICES",
            migctl = migctl.display(),
            config = site.config().display(),
            podman = podman.program.display(),
        ),
    );
    let mut command = Command::new(&migctl);
    command.envs(podman.env.iter().map(|(name, value)| (name, value)));
    command.arg("--config").arg(site.config()).args(["run", "2g.20gb", "--"]).arg(script);
    let output = run(&mut command);
    let _ = std::fs::remove_file(&spec);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let uuid = said.lines().find_map(|line| line.strip_prefix("outside ")).expect("its end").to_owned();
    assert!(uuid.starts_with("MIG-") && said.contains(&format!("CUDA_VISIBLE_DEVICES={uuid}\n")), "{said}");
    let verdict = |line: &&str| line.starts_with("/dev/nvidia-caps/");
    let caps: Vec<&str> = said.lines().filter(verdict).collect();
    assert!(caps.len() == 2 && caps.iter().all(|line| line.contains("allowed")), "{said}");
    site.clean("after migctl run");
}

#[test]
fn podman_by_device() {
    podman("runc");
}

#[test]
fn podman_by_device_crun() {
    podman("crun");
}

#[test]
fn docker_by_device() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = Engine { site: &site, program: site.dir.join("bin/docker"), env: vec![], runtime: None };
    let version = docker.ok(&["version", "--format", "{{.Server.Version}}"]);
    let major: u32 = version.split('.').next().unwrap().parse().unwrap();
    if major < 25 {
        return skip("cdi::docker_by_device", &format!("docker {} has no CDI: 25 or newer is needed", version.trim()));
    }
    site.offering().live_and_die(&docker);
}
