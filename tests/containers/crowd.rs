//! Many containers at once on two A100 and one H100.

use std::collections::BTreeSet;
use std::process::{Output, Stdio};

use crate::common::text;
use crate::{Site, must};

/// Starts `count` containers that ask for `profile` at the same time; `fit` of them get one and the others the reason.
fn crowd(runtime: &str, profile: &str, count: usize, fit: usize) {
    let Some(site) = Site::new(&["podman", runtime]) else { return };
    let podman = site.podman(runtime);
    let request = format!("mig.profile={profile}");
    let start = |_| {
        let mut command = podman.request(&[&request], &["-d"], &["sh", "-c", crate::PROBE_AND_WAIT]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..count).map(start).collect();
    let outputs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let (given, refused): (Vec<&Output>, Vec<&Output>) = outputs.iter().partition(|o| o.status.success());
    for output in &refused {
        assert_eq!(output.status.code(), Some(126), "{}", text(output));
        assert!(text(output).contains(profile) && text(output).contains("(container "), "{}", text(output));
    }
    assert_eq!(given.len(), fit, "{}", refused.first().map(|o| text(o)).unwrap_or_default());

    let leases = site.assert_consistent(&[], "while they run");
    assert_eq!((leases.len(), site.instances().len()), (fit, fit));
    let ids: Vec<String> = given.iter().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).collect();
    let mut seen = BTreeSet::new();
    for id in &ids {
        let probe = podman.probe(id);
        site.assert_given(&probe, &[profile]);
        assert!(seen.insert(probe.variable("CUDA_VISIBLE_DEVICES").to_owned()), "a slice in two containers: {probe:?}");
    }
    let mut remove = vec!["rm", "-f", "-t", "0"];
    remove.extend(ids.iter().map(String::as_str));
    must(&mut podman.command(&remove));
    site.clean("after all");
    assert_eq!((site.audited("grant"), site.audited("refusal"), site.audited("release")), (fit, count - fit, fit));
}

#[test]
fn twenty_at_once_for_six_places() {
    crowd("runc", "3g.40gb", 20, 6);
}

#[test]
fn twenty_three_at_once_for_twenty_one_places() {
    crowd("crun", "1g.10gb", 23, 21);
}

#[test]
fn twelve_that_come_and_go_take_turns() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    // More than fit at once, each for a moment: whoever is refused comes again.
    let turn = |_| loop {
        let output = podman.request(&["mig.profile=7g.80gb"], &["--rm"], &["mig-probe"]).output().unwrap();
        match output.status.code() {
            Some(0) => return crate::Probe::read(&text(&output)),
            Some(126) => assert!(text(&output).contains("no room for 7g.80gb"), "{}", text(&output)),
            _ => panic!("{}", text(&output)),
        }
    };
    let probes: Vec<crate::Probe> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|n| scope.spawn(move || [turn(n), turn(n)])).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(probes.iter().all(|probe| probe.variable("MIG_DEVICE_PROFILES") == "7g.80gb"));
    site.clean("after all");
    assert_eq!((site.audited("grant"), site.audited("release")), (12, 12));
}
