//! Once more on cgroup v2, where a BPF program decides which devices open: on a machine that has v1 too, whose other tests
//! run there.

use crate::{Site, WORLD, cgroup_v2, classic, containerd, docker, killed, podman, runtimes, skip};

/// Nothing to repeat where the other tests have cgroup v2 already; unless this is where they are repeated.
fn on_v2(engines: &[&str]) -> Option<Site> {
    if WORLD.is_ok() && cgroup_v2() && std::env::var_os("ENG_CGROUPS").is_none() {
        return skip("every test runs on cgroup v2 here");
    }
    Site::on_cgroup_v2(engines)
}

#[test]
fn podman_and_runc() {
    podman::each_has_its_own(on_v2(&["podman"]), "runc");
}

#[test]
fn podman_and_crun() {
    podman::each_has_its_own(on_v2(&["podman", "crun"]), "crun");
}

#[test]
fn ends_under_podman_and_crun() {
    podman::ends(on_v2(&["podman", "crun"]));
}

#[test]
fn a_conmon_that_is_killed() {
    killed::conmon(on_v2(&["podman"]));
}

#[test]
fn docker_and_runc() {
    docker::each_has_its_own(on_v2(&["docker"]));
}

#[test]
fn ends_under_docker() {
    docker::ends(on_v2(&["docker"]));
}

#[test]
fn containerd_by_ctr() {
    containerd::beside_one_that_does_not_ask(on_v2(&["containerd"]));
}

#[test]
fn runc() {
    runtimes::created_started_and_deleted(on_v2(&["runc"]), "runc");
}

#[test]
fn crun() {
    runtimes::created_started_and_deleted(on_v2(&["crun"]), "crun");
}

#[test]
fn youki() {
    runtimes::created_started_and_deleted(on_v2(&["youki"]), "youki");
}

#[test]
fn the_classic_hook_and_runc() {
    classic::given_while_it_is_created(on_v2(&["runc"]), "runc");
}

#[test]
fn the_classic_hook_and_crun() {
    classic::given_while_it_is_created(on_v2(&["crun"]), "crun");
}
