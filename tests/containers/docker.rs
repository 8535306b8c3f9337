//! docker by runtime.

use crate::common::{run, skip, text, wait_for};
use crate::{IMAGE, PROBE_AND_WAIT, Probe, SOON, Site, kill, must, pids_of};

const BY_NAME: &[&str] = &["--mig-env"];

#[test]
fn two_at_once_open_their_own_slice_and_no_other() {
    each_has_its_own(Site::new(&["docker"]));
}

pub fn each_has_its_own(site: Option<Site>) {
    let Some(site) = site else { return };
    let docker = site.docker(BY_NAME);
    let one = docker.start(&["mig.profile=2g.20gb"]);
    let two = docker.start(&["mig.profile=1g.10gb,1g.10gb"]);
    let (seen_one, seen_two) = (docker.probe(&one), docker.probe(&two));
    site.assert_given(&seen_one, &["2g.20gb"]);
    site.assert_given(&seen_two, &["1g.10gb", "1g.10gb"]);
    docker.assert_confined(&one, &seen_one);
    docker.assert_confined(&two, &seen_two);
    let session = Probe::read(&docker.ok(&["exec", &one, "mig-probe"]));
    assert_eq!(session.variables, seen_one.variables, "docker exec sees the variables");
    let own = Probe::read(&docker.ok(&["exec", "-e", "CUDA_VISIBLE_DEVICES=0", &one, "mig-probe"]));
    assert_eq!(own.variable("CUDA_VISIBLE_DEVICES"), seen_one.variable("CUDA_VISIBLE_DEVICES"));
    docker.ok(&["rm", "-f", &one, &two]);
    site.clean("after rm -f");
}

#[test]
fn every_end_gives_the_slice_back() {
    ends(Site::new(&["docker"]));
}

pub fn ends(site: Option<Site>) {
    let Some(site) = site else { return };
    let docker = site.docker(BY_NAME);
    let ask = ["mig.profile=1g.10gb"];
    for code in [0, 3] {
        let output = run(&mut docker.request(&ask, &["--rm"], &["sh", "-c", &format!("exit {code}")]));
        assert_eq!(output.status.code(), Some(code), "the exit code is the container's: {}", text(&output));
        site.clean(&format!("after exit {code}"));
    }
    for end in [&["stop", "-t", "0"][..], &["kill"], &["rm", "-f"]] {
        let id = docker.start(&ask);
        assert_eq!(site.leases().len(), 1);
        docker.ok(&[end, &[id.as_str()]].concat());
        site.clean(&format!("after {end:?}"));
    }
    let id = docker.start(&ask);
    kill(docker.pid(&id));
    site.clean("after kill -9 of its first process");
    let output = run(&mut docker.request(&ask, &["--rm"], &["/nonexistent"]));
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    site.clean("after a command that is not there");
    assert_eq!(site.audited("grant"), site.audited("release"));
}

#[test]
fn a_restart_is_a_release_and_a_new_slice() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    let id = docker.start(&["mig.profile=1g.10gb"]);
    let first = site.lease()["token"].clone();
    docker.ok(&["restart", "-t", "0", &id]);
    assert_ne!(site.lease()["token"], first);
    assert_eq!((site.audited("grant"), site.audited("release")), (2, 1));
    docker.ok(&["stop", "-t", "0", &id]);
    site.clean("after stop");
    docker.ok(&["start", &id]);
    assert_eq!(site.leases().len(), 1);
    docker.ok(&["rm", "-f", &id]);
    site.clean("after rm");
}

#[test]
fn a_refusal_is_in_dockers_own_error() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    docker.assert_refused(&["mig.profile=3g.13gb"], &["--rm"], &["mig: ", "3g.13gb", "1g.10gb"]);
    docker.assert_refused(&["mig.profile=1g.10gb"], &["--rm", "--privileged"], &["mig: ", "other slices than its own"]);
    let id = docker.start(&["mig.profile=1g.10gb", "mig.gpu=0"]);
    docker.assert_refused(&["mig.profile=7g.80gb", "mig.gpu=0"], &["--rm"], &["mig: ", "7g.80gb", &id[..12]]);
    docker.ok(&["rm", "-f", &id]);
    site.clean("after all");
}

#[test]
fn what_does_not_ask_is_left_alone() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let (by_name, by_default) = (site.docker(BY_NAME), site.docker(&[]));
    let nothing = Probe::read(&must(&mut by_name.request(&[], &["--rm"], &["mig-probe"])));
    assert!(nothing.is_empty(), "{nothing:?}");
    // An image's ENV counts only where the user has chosen the runtime by name: as a default runtime it must not.
    let image = format!("localhost/asking-{}", std::process::id());
    let tar = site.dir.join("rootfs.tar").display().to_string();
    by_name.ok(&["import", "--change", "ENV MIG_PROFILE=1g.10gb", &tar, &image]);
    let nothing = Probe::read(&must(&mut by_default.request(&[], &["--rm", &image], &["mig-probe"])));
    assert!(nothing.is_empty(), "{nothing:?}");
    assert!(!site.path("state").exists(), "no state was made");
    let given = Probe::read(&must(&mut by_name.request(&[], &["--rm", &image], &["mig-probe"])));
    assert_eq!(given.variable("MIG_DEVICE_PROFILES"), "1g.10gb");
    site.clean("after all");
}

#[test]
fn a_killed_containerd_shim_frees_its_slice() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    let id = docker.start(&["mig.profile=1g.10gb"]);
    let shims = pids_of(&["containerd-shim", &format!("-id {id}")]);
    assert_eq!(shims.len(), 1, "the shim of {id}");
    kill(shims[0]);
    site.clean("after kill -9 of the containerd shim, without gc");
    docker.ok(&["rm", "-f", &id]);
}

#[test]
fn each_life_of_a_restart_policy_has_its_own_slice() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    let ask = ["mig.profile=1g.10gb"];
    let id = must(&mut docker.request(&ask, &["-d", "--restart=always"], &["sleep", "600"])).trim().to_owned();
    let first = site.lease()["token"].clone();
    kill(docker.pid(&id));
    wait_for("the second life", SOON, || site.audited("grant") == 2 && docker.inspect(&id, ".State.Running") == "true");
    assert_ne!(site.lease()["token"], first);
    assert_eq!((site.audited("release"), site.instances().len()), (1, 1));
    docker.ok(&["stop", "-t", "0", &id]);
    site.clean("after stop: no third life");
    docker.ok(&["rm", &id]);

    let id = must(&mut docker.request(&ask, &["-d", "--restart=on-failure:2"], &["false"]));
    wait_for("the third life's end", SOON, || site.audited("grant") == 5 && site.audited("release") == 5);
    assert_eq!(docker.inspect(id.trim(), ".RestartCount"), "2");
    site.assert_clean("after the last life: at once");
    docker.ok(&["rm", id.trim()]);
}

#[test]
fn what_was_created_may_be_started_later() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    let asking = docker.asking(&["mig.profile=1g.10gb"]);
    let asking: Vec<&str> = asking.iter().map(String::as_str).collect();
    let id = docker.ok(&[&["create"], &asking[..], &[IMAGE, "sh", "-c", PROBE_AND_WAIT]].concat()).trim().to_owned();
    site.assert_clean("created: nothing is cut before a start");
    docker.ok(&["start", &id]);
    site.assert_given(&docker.probe(&id), &["1g.10gb"]);
    docker.ok(&["rm", "-f", &id]);
    site.assert_clean("after rm -f: at once");
}

#[test]
fn beside_one_that_does_not_ask() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(BY_NAME);
    let asking = docker.start(&["mig.profile=1g.10gb"]);
    let plain = docker.ok(&["run", "-d", "--cap-add", "MKNOD", IMAGE, "sh", "-c", PROBE_AND_WAIT]).trim().to_owned();
    let by_shim = docker.start(&[]);
    assert_eq!((site.leases().len(), site.instances().len()), (1, 1));
    let everything = site.others(&Probe::default());
    for id in [&plain, &by_shim] {
        assert!(docker.probe(id).is_empty(), "no node and no variable");
        let verdicts = docker.try_devices(id, &everything);
        assert_eq!(verdicts.len(), everything.len());
        assert!(verdicts.values().all(|verdict| verdict == "denied"), "{verdicts:?}");
    }
    docker.ok(&["rm", "-f", &plain, &by_shim]);
    site.assert_given(&docker.probe(&asking), &["1g.10gb"]);
    docker.ok(&["rm", "-f", &asking]);
    site.assert_clean("after rm -f: at once");
}

#[test]
fn an_annotation_needs_no_option_of_the_runtime() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(&[]);
    if let Err(why) = docker.hears_annotations() {
        return skip("docker run --annotation", &why);
    }
    let runtime = docker.runtime.clone().unwrap();
    let options = ["run", "-d", "--cap-add", "MKNOD", "--runtime", &runtime, "--annotation"];
    let id = docker.ok(&[&options[..], &["mig.profile=1g.10gb", IMAGE, "sh", "-c", PROBE_AND_WAIT]].concat());
    let id = id.trim();
    let seen = docker.probe(id);
    site.assert_given(&seen, &["1g.10gb"]);
    docker.assert_confined(id, &seen);
    docker.ok(&["restart", "-t", "0", id]);
    assert_eq!((site.leases().len(), site.audited("grant")), (1, 2));
    docker.ok(&["rm", "-f", id]);
    site.assert_clean("after rm -f: at once");
    let output = docker.run(&[&options[..], &["mig.profile=3g.13gb", IMAGE, "true"]].concat());
    assert!(!output.status.success() && text(&output).contains("3g.13gb"), "{}", text(&output));
}
