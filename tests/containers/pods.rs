//! podman's pods, and the Kubernetes files that it plays.

use crate::common::text;
use crate::{IMAGE, Site, must};

#[test]
fn a_pods_members_that_ask_have_slices_and_its_infra_container_has_none() {
    for runtime in ["runc", "crun"] {
        let Some(site) = Site::new(&["podman", runtime]) else { continue };
        let podman = site.podman(runtime);
        let pod = podman.ok(&["pod", "create"]).trim().to_owned();
        let options = ["-d", "--pod", &pod, "--cap-add", "MKNOD"];
        let life = ["sh", "-c", "trap exit TERM; mig-probe; echo probed; sleep 600 & wait"];
        let start = |ask: &[&str]| must(&mut podman.request(ask, &options, &life)).trim().to_owned();
        let (one, two, plain) = (start(&["mig.profile=1g.10gb"]), start(&["mig.profile=2g.20gb"]), start(&[]));
        let (seen_one, seen_two) = (podman.probe(&one), podman.probe(&two));
        site.assert_given(&seen_one, &["1g.10gb"]);
        site.assert_given(&seen_two, &["2g.20gb"]);
        podman.assert_confined(&one, &seen_one);
        podman.assert_confined(&two, &seen_two);
        assert!(podman.probe(&plain).is_empty());
        assert_eq!(site.leases().len(), 2, "none is the infra container's");
        podman.ok(&["pod", "restart", &pod]);
        assert_eq!((site.leases().len(), site.instances().len()), (2, 2));
        assert_eq!((site.audited("grant"), site.audited("release")), (4, 2));
        podman.ok(&["pod", "stop", "-t", "0", &pod]);
        site.clean("after pod stop");
        podman.ok(&["pod", "start", &pod]);
        assert_eq!(site.leases().len(), 2);
        podman.ok(&["pod", "rm", "-f", "-t", "0", &pod]);
        site.assert_clean("after pod rm -f: at once");
    }
}

/// A pod as Kubernetes writes it: two containers that probe and wait.
fn kube(site: &Site, name: &str, annotations: &str, first: &str) -> String {
    let container = |name: &str, more: &str| {
        format!(
            "  - name: {name}\n    image: {IMAGE}\n    command: [/bin/sh, -c, \"trap exit TERM; mig-probe; echo probed; sleep 600 & wait\"]\n    \
             env: [{{name: PATH, value: /bin}}{more}]\n"
        )
    };
    let (one, two) = (container("one", first), container("two", ""));
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  annotations: {annotations}\nspec:\n  containers:\n{one}{two}"
    );
    site.write("pod.yaml", &pod).display().to_string()
}

#[test]
fn a_played_pods_annotation_is_for_each_of_its_containers() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    let file = kube(&site, "every", "{mig.profile: 1g.10gb}", "");
    podman.ok(&["play", "kube", &file]);
    let seen = ["one", "two"].map(|name| podman.probe(&format!("every-{name}")));
    seen.iter().for_each(|probe| site.assert_given(probe, &["1g.10gb"]));
    assert_ne!(seen[0].variable("MIG_DEVICE_UUIDS"), seen[1].variable("MIG_DEVICE_UUIDS"));
    assert_eq!(site.leases().len(), 2, "none is the infra container's");
    podman.ok(&["play", "kube", "--down", &file]);
    site.assert_clean("after play kube --down: at once");

    // podman tells no hook and no runtime the name that a container has in the pod.
    let file = kube(&site, "every", "{mig.profile/one: 1g.10gb}", "");
    let output = podman.run(&["play", "kube", &file]);
    assert!(text(&output).contains("does not tell which this one is"), "{}", text(&output));
    site.assert_clean("after the refusal");
    podman.ok(&["play", "kube", "--down", &file]);
}

#[test]
fn one_container_of_a_played_pod_asks_by_its_environment_through_the_shim() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman_by_shim("--mig-env");
    let file = kube(&site, "single", "{}", ", {name: MIG_PROFILE, value: 2g.20gb}");
    podman.ok(&["play", "kube", &file]);
    let seen = ["one", "two"].map(|name| podman.probe(&format!("single-{name}")));
    site.assert_given(&seen[0], &["2g.20gb"]);
    assert!(seen[1].is_empty(), "{:?}", seen[1]);
    assert_eq!(site.leases().len(), 1);
    podman.ok(&["play", "kube", "--down", &file]);
    site.assert_clean("after play kube --down: at once");
}
