//! podman by annotation: hooks.d, precreate.

use std::collections::BTreeMap;
use std::process::Command;

use crate::common::{installed as installed_here, run, skip, text, wait_for};
use crate::{Engine, IMAGE, PROBE_AND_WAIT, Probe, SOON, Site, installed, kill, must};

pub fn each_has_its_own(site: Option<Site>, runtime: &str) {
    let Some(site) = site else { return };
    let podman = site.podman(runtime);
    let one = podman.start(&["mig.profile=1g.10gb"]);
    let two = podman.start(&["mig.profile=2g.20gb"]);
    let (seen_one, seen_two) = (podman.probe(&one), podman.probe(&two));
    site.assert_given(&seen_one, &["1g.10gb"]);
    site.assert_given(&seen_two, &["2g.20gb"]);
    assert_ne!(seen_one.variable("MIG_DEVICE_UUIDS"), seen_two.variable("MIG_DEVICE_UUIDS"));
    podman.assert_confined(&one, &seen_one);
    podman.assert_confined(&two, &seen_two);
    podman.ok(&["rm", "-f", "-t", "0", &one]);
    assert_eq!(site.instances().len(), 1, "the other's slice stays");
    podman.ok(&["rm", "-f", "-t", "0", &two]);
    site.clean("after both");
}

#[test]
fn two_at_once_open_their_own_slice_and_no_other() {
    each_has_its_own(Site::new(&["podman", "runc"]), "runc");
}

#[test]
fn two_at_once_open_their_own_slice_and_no_other_crun() {
    each_has_its_own(Site::new(&["podman", "crun"]), "crun");
}

#[test]
fn a_container_that_may_not_make_nodes_has_those_it_was_given() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let script = ["sh", "-c", "mig-probe; mig-probe 195:0"];
    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm", "--cap-drop", "MKNOD"], &script));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("mknod: /tmp/foreign: Operation not permitted"), "{}", text(&output));
    let opened = Probe::read(&text(&output)).nodes.values().filter(|(_, verdict)| verdict == "allowed").count();
    assert_eq!(opened, 6, "{}", text(&output));
    site.clean("after --rm");
}

#[test]
fn every_end_gives_the_slice_back() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let ask = ["mig.profile=1g.10gb"];
    for code in [0, 3] {
        let output = run(&mut podman.request(&ask, &[], &["sh", "-c", &format!("exit {code}")]));
        assert_eq!(output.status.code(), Some(code), "the exit code is the container's: {}", text(&output));
        // Is poststop over when podman run returns? With 4.3 it is; 5.4 lets conmon clean up behind its back.
        site.clean(&format!("after exit {code}"));
    }
    let ends: [(&str, &[&str]); 4] = [
        ("stop", &["stop", "-t", "0"]),
        ("kill", &["kill"]),
        ("kill by TERM", &["kill", "-s", "TERM"]),
        ("rm -f", &["rm", "-f", "-t", "0"]),
    ];
    for (end, words) in ends {
        let id = podman.start_with(&ask, "trap 'exit 0' TERM; sleep 600 & wait");
        assert_eq!(site.leases().len(), 1);
        podman.ok(&[words, &[id.as_str()]].concat());
        site.clean(&format!("after {end}"));
    }
    let id = podman.ok(&[&["create"], &["--annotation", ask[0], IMAGE, "true"][..]].concat());
    site.assert_clean("created: nothing is cut before a start");
    podman.ok(&["start", "-a", id.trim()]);
    site.clean("after create and start");
    assert_eq!(site.audited("grant"), site.audited("release"));
}

#[test]
fn a_restart_is_a_release_and_a_new_slice() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let id = podman.start(&["mig.profile=3g.40gb"]);
        let first = site.lease()["token"].clone();
        podman.ok(&["restart", "-t", "0", &id]);
        assert_ne!(site.lease()["token"], first);
        assert_eq!((site.audited("grant"), site.audited("release")), (2, 1));
        site.assert_given(&podman.probe(&id), &["3g.40gb"]);
        podman.ok(&["stop", "-t", "0", &id]);
        site.clean("after stop");
        podman.ok(&["start", &id]);
        assert_eq!(site.leases().len(), 1);
        podman.ok(&["rm", "-f", "-t", "0", &id]);
        site.clean("after rm");
    }
}

#[test]
fn a_command_that_is_not_there_leaves_nothing() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["/nonexistent"]));
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    site.assert_clean("runc calls poststop");
}

#[test]
fn what_crun_forgets_after_a_failed_create_is_freed_by_gc_and_by_the_next() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let podman = site.podman("crun");
    let fail = || {
        let output = run(&mut podman.request(&["mig.profile=7g.80gb"], &["--rm"], &["/nonexistent"]));
        assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    };
    fail();
    site.gc();
    site.assert_clean("after gc");
    // Each takes a whole GPU: the fourth and fifth fit only if what the others left is freed.
    (0..4).for_each(|_| fail());
    let said = must(&mut podman.request(&["mig.profile=7g.80gb"], &["--rm"], &["mig-probe"]));
    assert_eq!(Probe::read(&said).variable("MIG_DEVICE_PROFILES"), "7g.80gb");
    site.gc();
    site.assert_clean("after gc");
}

pub fn ends(site: Option<Site>) {
    let Some(site) = site else { return };
    let podman = site.podman("crun");
    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["sh", "-c", "exit 3"]));
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    site.clean("after exit 3");
    for end in [&["stop", "-t", "0"][..], &["kill"], &["rm", "-f", "-t", "0"]] {
        let id = podman.start(&["mig.profile=1g.10gb"]);
        podman.ok(&[end, &[id.as_str()]].concat());
        site.clean(&format!("after {end:?}"));
    }
}

#[test]
fn ends_under_crun() {
    ends(Site::new(&["podman", "crun"]));
}

#[test]
fn every_way_to_ask() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let cases: [(&[&str], &[&str]); 8] = [
        (&["mig.profile=2x1g.10gb"], &["1g.10gb", "1g.10gb"]),
        (&["mig.profile=2g.20gb,1g.10gb"], &["2g.20gb", "1g.10gb"]),
        // Four whole GPUs are never to be had here.
        (&["mig.profile=7g.80gb,7g.80gb,7g.80gb,7g.80gb|4g.40gb"], &["4g.40gb"]),
        (&["mig.memory=15GiB"], &["1g.20gb"]),
        (&["mig.memory=8GiB"], &["1g.10gb"]),
        (&["mig.profile=1g.10gb", "mig.gpu=2"], &["1g.10gb"]),
        (&["mig.profile=1g.10gb+me", "mig.gpu=1"], &["1g.10gb+me"]),
        (&["mig.profile=3x7g.80gb"], &["7g.80gb", "7g.80gb", "7g.80gb"]),
    ];
    for (requests, profiles) in cases {
        let id = podman.start(requests);
        site.assert_given(&podman.probe(&id), profiles);
        if let Some(index) = requests.iter().find_map(|r| r.strip_prefix("mig.gpu=")) {
            assert_eq!(site.lease()["slices"][0]["gpu_index"].to_string(), index);
        }
        podman.ok(&["rm", "-f", "-t", "0", &id]);
        site.clean(&format!("after {requests:?}"));
    }
}

/// The slice's nodes and nothing else are there and open, whatever else the container was given.
fn assert_open(engine: &Engine, options: &[&str]) {
    let options = [&["--rm"], options].concat();
    let output = run(&mut engine.request(&["mig.profile=1g.10gb"], &options, &["mig-probe"]));
    assert!(output.status.success(), "{options:?}: {}", text(&output));
    let seen = Probe::read(&text(&output));
    assert_eq!(seen.nodes.len(), 6, "{options:?}: {seen:?}");
    assert!(seen.nodes.values().all(|(_, verdict)| verdict == "allowed"), "{options:?}: {seen:?}");
    engine.site.clean(&format!("after {options:?}"));
}

#[test]
fn other_options_do_not_matter() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let cases: [&[&str]; 6] = [
        &["--user", "1000"],
        &["--pid", "host"],
        &["--network", "host", "--ipc", "host", "--read-only"],
        &["--cap-add", "ALL", "--security-opt", "seccomp=unconfined"],
        // Of the host's devices and mounts under our names nothing stays.
        &["--device", "/dev/null:/dev/nvidia0", "--device", "/dev/zero:/dev/nvidia-caps/nvidia-cap1"],
        &["-v", "/dev/null:/dev/nvidia1", "--mount", "type=tmpfs,dst=/dev/nvidia-caps"],
    ];
    cases.iter().for_each(|options| assert_open(&podman, options));
    if installed_here("crun") {
        // runc mounts nodes from the host's /dev into a user namespace, and the simulated machine has none there.
        assert_open(&site.podman_alone("crun"), &["--uidmap", "0:100000:65536"]);
    }
}

#[test]
fn other_options_do_not_matter_to_docker() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(&["--mig-env"]);
    let cases: [&[&str]; 3] =
        [&["--user", "1000", "--init"], &["--pid", "host"], &["--device", "/dev/null:/dev/nvidia0"]];
    cases.iter().for_each(|options| assert_open(&docker, options));
}

#[test]
fn with_an_init_process_and_without_a_cgroup_for_conmon() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        for option in ["--init", "--cgroups=no-conmon"] {
            if option == "--init" && !installed_here("catatonit") {
                skip("podman --init", "catatonit is not installed");
                continue;
            }
            let ask = ["mig.profile=1g.10gb"];
            let started =
                must(&mut podman.request(&ask, &["-d", "--cap-add", "MKNOD", option], &["sh", "-c", PROBE_AND_WAIT]));
            let id = started.trim();
            let seen = podman.probe(id);
            site.assert_given(&seen, &["1g.10gb"]);
            podman.assert_confined(id, &seen);
            podman.ok(&["rm", "-f", "-t", "0", id]);
            site.assert_clean(&format!("after rm -f of one with {option}: at once"));
        }
    }
}

/// Measured with podman 4.3 and crun 1.8.1: a container without a cgroup opens every device that it can make a node of.
#[test]
fn without_a_cgroup_nothing_enforces_device_rules_so_it_is_refused() {
    let Some(site) = Site::new(&["podman", "crun"]) else { return };
    let podman = site.podman("crun");
    let ask = ["mig.profile=1g.10gb"];
    let reason = ["without a cgroup", "--cgroups=disabled", "requests.open_device_rules"];
    let output = podman.assert_refused(&ask, &["--rm", "--cgroups=disabled"], &reason);
    assert_eq!(output.status.code(), Some(126), "{}", text(&output));
    let runtime = format!("[runtime]\npath = \"{}\"", installed("crun").display());
    site.settings(&format!("{runtime}\n[requests]\nopen_device_rules = true"));
    assert_open(&podman, &["--cgroups=disabled"]);
}

#[test]
fn beside_one_that_does_not_ask() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let asking = podman.start(&["mig.profile=1g.10gb"]);
        let plain = podman.start(&[]);
        assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
        assert!(podman.probe(&plain).is_empty(), "no node and no variable");
        let everything = site.others(&Probe::default());
        let verdicts = podman.try_devices(&plain, &everything);
        assert_eq!(verdicts.len(), everything.len());
        assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");
        podman.ok(&["rm", "-f", "-t", "0", &plain]);
        site.assert_given(&podman.probe(&asking), &["1g.10gb"]);
        assert_eq!(site.leases().len(), 1, "its end is nobody else's");
        podman.ok(&["rm", "-f", "-t", "0", &asking]);
        site.assert_clean("after rm -f: at once");
    }
}

/// podman builds the environment of a session from the image's and the user's: what precreate added is not in it. The
/// device cgroup and the nodes are the container's.
#[test]
fn a_session_has_the_devices_but_the_variables_only_when_told() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let id = podman.start(&["mig.profile=1g.10gb"]);
        let seen = podman.probe(&id);
        let session = Probe::read(&podman.ok(&["exec", &id, "mig-probe"]));
        assert_eq!(session.nodes, seen.nodes, "devices, each of them open");
        assert_eq!(session.variables, BTreeMap::new(), "the limit that docs/engines.md tells of");
        // Its remedy: podman itself knows the environment of the container's first process.
        let format = "{{range .Config.Env}}{{println .}}{{end}}";
        let words = "\"$0\" exec --env-file <(\"$0\" inspect -f \"$2\" \"$1\" | grep MIG-) \"$1\" mig-probe";
        let mut command = Command::new("bash");
        command.envs(podman.env.iter().map(|(k, v)| (k, v))).args(["-c", words]).arg(&podman.program);
        let told = Probe::read(&must(command.args([&id, format])));
        for name in ["CUDA_VISIBLE_DEVICES", "MIG_DEVICE_UUIDS"] {
            assert_eq!(told.variable(name), seen.variable(name));
        }
        podman.ok(&["rm", "-f", "-t", "0", &id]);
        site.assert_clean("after rm -f");
    }
}

#[test]
fn each_life_of_a_restart_policy_has_its_own_slice() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let ask = ["mig.profile=1g.10gb"];
        let options = ["-d", "--restart=always"];
        let id = must(&mut podman.request(&ask, &options, &["sh", "-c", PROBE_AND_WAIT])).trim().to_owned();
        let first = site.lease()["token"].clone();
        kill(podman.pid(&id));
        wait_for("the second life", SOON, || {
            site.audited("grant") == 2 && podman.inspect(&id, ".State.Running") == "true"
        });
        assert_ne!(site.lease()["token"], first);
        assert_eq!((site.audited("release"), site.instances().len()), (1, 1));
        podman.ok(&["stop", "-t", "0", &id]);
        site.clean("after stop: no third life");
        podman.ok(&["rm", &id]);

        let id = must(&mut podman.request(&ask, &["-d", "--restart=on-failure:2"], &["false"]));
        wait_for("the third life's end", SOON, || site.audited("grant") == 5 && site.audited("release") == 5);
        assert_eq!(podman.inspect(id.trim(), ".RestartCount"), "2");
        site.assert_clean("after the last life: at once");
        podman.ok(&["rm", id.trim()]);
    }
}

/// Into a /dev that is the host's no runtime makes nodes: the container would run without what it asked for.
#[test]
fn the_hosts_dev_is_refused() {
    let Some(site) = Site::new(&["podman", "docker"]) else { return };
    for engine in [site.podman("runc"), site.docker(&["--mig-env"])] {
        engine.assert_refused(&["mig.profile=1g.10gb"], &["--rm", "-v", "/dev:/dev"], &["/dev"]);
    }
    site.assert_clean("after refusals");
}

#[test]
fn what_was_created_may_be_started_later() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let id = podman.ok(&["create", "--annotation", "mig.profile=1g.10gb", IMAGE, "sh", "-c", PROBE_AND_WAIT]);
    podman.ok(&["init", id.trim()]);
    assert_eq!(site.gc(), ["kept"], "podman is gone, but the container lives");
    podman.ok(&["start", id.trim()]);
    site.assert_given(&podman.probe(id.trim()), &["1g.10gb"]);
    podman.ok(&["rm", "-f", "-t", "0", id.trim()]);
    site.clean("after rm");
}

#[test]
fn a_refusal_is_readable_and_ends_with_126() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let cases: [(&[&str], &[&str], &[&str]); 6] = [
        (&["mig.profile=3g.13gb"], &[], &["3g.13gb", "1g.10gb"]),
        (&["mig.profil=1g.10gb"], &[], &["mig.profil", "mig.profile"]),
        (&["mig.profile=1g.10gb", "mig.gpu=7"], &[], &["mig.gpu"]),
        (&["mig.profile=4x7g.80gb"], &[], &["7g.80gb"]),
        (&["mig.profile=1g.10gb"], &["--privileged"], &["other slices than its own", "--privileged"]),
        (&["mig.profile=1g.10gb"], &["--device-cgroup-rule", "c *:* rwm"], &["other slices than its own"]),
    ];
    if !podman.reads_csv() {
        let quoted = ["\"mig.profile=1g.10gb,1g.10gb\""];
        podman.assert_refused(&quoted, &[], &["leave the quotes out"]);
    }
    for (requests, options, words) in cases {
        let output = podman.assert_refused(requests, options, words);
        assert_eq!(output.status.code(), Some(126), "{}", text(&output));
    }
    site.assert_clean("after refusals");
    let id = podman.start(&["mig.profile=1g.10gb", "mig.gpu=0"]);
    let output = podman.assert_refused(&["mig.profile=7g.80gb", "mig.gpu=0"], &[], &["7g.80gb", &id[..12]]);
    assert_eq!(output.status.code(), Some(126), "{}", text(&output));
    podman.ok(&["rm", "-f", "-t", "0", &id]);
    site.clean("after all");
}

#[test]
fn a_container_that_asks_for_nothing_does_not_meet_us() {
    let Some(site) = Site::new(&["podman"]) else { return };
    site.write("config.toml", "this is no settings file");
    let podman = site.podman("runc");
    let id = podman.ok(&["run", "-d", "--annotation", "migration=1", IMAGE, "sh", "-c", PROBE_AND_WAIT]);
    let probe = podman.probe(id.trim());
    assert!(probe.is_empty(), "{probe:?}");
    let config = std::fs::read_to_string(podman.inspect(id.trim(), ".OCIConfigPath")).unwrap();
    assert!(!config.contains("mig-hook") && !config.contains("nvidia"), "{config}");
    podman.ok(&["rm", "-f", "-t", "0", id.trim()]);
    assert!(!site.path("state").exists(), "no state was made");

    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["true"]));
    assert_eq!(output.status.code(), Some(126), "one that asks is refused: {}", text(&output));
    assert!(text(&output).contains("config.toml"), "with the reason: {}", text(&output));
}

#[test]
fn the_shim_as_podmans_runtime() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman_by_shim("");
    let id = podman.start(&["mig.profile=1g.10gb"]);
    let seen = podman.probe(&id);
    site.assert_given(&seen, &["1g.10gb"]);
    podman.assert_confined(&id, &seen);
    let in_session = Probe::read(&podman.ok(&["exec", &id, "mig-probe"]));
    assert_eq!(in_session.variables, seen.variables, "a session in the container sees the variables");
    podman.ok(&["stop", "-t", "0", &id]);
    site.clean("after stop");
    podman.ok(&["rm", &id]);
    let output = run(&mut podman.request(&["mig.profile=1g.10gb"], &["--rm"], &["/nonexistent"]));
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    site.clean("after a command that is not there");
    let output = podman.assert_refused(&["mig.profile=3g.13gb"], &[], &["3g.13gb", "1g.10gb"]);
    assert_eq!(output.status.code(), Some(126), "{}", text(&output));
}

#[test]
fn hook_and_shim_together_take_one_slice() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let wrapper = site.wrapper("").display().to_string();
    let podman = site.podman(&wrapper);
    let id = podman.start(&["mig.profile=7g.80gb"]);
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    let seen = podman.probe(&id);
    site.assert_given(&seen, &["7g.80gb"]);
    assert_eq!(Probe::read(&podman.ok(&["exec", &id, "mig-probe"])).variables, seen.variables);
    podman.ok(&["restart", "-t", "0", &id]);
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    podman.ok(&["stop", "-t", "0", &id]);
    site.clean("after stop");
    assert_eq!((site.audited("grant"), site.audited("release")), (2, 2));
    let output = run(&mut podman.request(&["mig.profile=7g.80gb"], &["--rm"], &["/nonexistent"]));
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    site.clean("after a command that is not there");
}
