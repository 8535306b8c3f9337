//! What people call their containers, in `migctl list`.

use serde_json::{Value, json};

use crate::common::run;
use crate::{Engine, PROBE_AND_WAIT, Site, must};

/// Starts a container of that name; its id.
fn start(engine: &Engine<'_>, name: &str, options: &[&str]) -> String {
    let options = [&["-d", "--name", name], options].concat();
    must(&mut engine.request(&["mig.profile=1g.10gb"], &options, &["sh", "-c", PROBE_AND_WAIT])).trim().to_owned()
}

/// Holder, engine, name, first process and state of the slice that a container has.
fn listed(site: &Site, container: &str) -> [Value; 5] {
    let document = site.document(&["list"]);
    let rows = document["gpus"].as_array().unwrap().iter().flat_map(|gpu| gpu["slices"].as_array().unwrap());
    let row = rows.into_iter().find(|row| row["container"] == container).unwrap_or_else(|| panic!("{document:#}"));
    ["holder", "engine", "name", "pid", "state"].map(|field| row[field].clone())
}

fn expected(engine: &str, name: &str, pid: u32) -> [Value; 5] {
    [json!(format!("{name} ({engine})")), json!(engine), json!(name), json!(pid), json!("held")]
}

#[test]
fn of_podman() {
    let Some(site) = Site::new(&["podman"]) else { return };
    let podman = site.podman("runc");
    // Newer versions keep those with --rm in a list of their own.
    for (name, options) in [("web", &[][..]), ("brief", &["--rm"])] {
        let id = start(&podman, name, options);
        assert_eq!(listed(&site, &id), expected("podman", name, podman.pid(&id)));
        podman.ok(&["rm", "-f", "-t", "0", &id]);
    }
    site.clean("after both");
}

#[test]
fn of_docker() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(&["--mig-env"]);
    let id = start(&docker, "trainer", &[]);
    assert_eq!(listed(&site, &id), expected("docker", "trainer", docker.pid(&id)));
    docker.ok(&["rename", "trainer", "old-trainer"]);
    assert_eq!(listed(&site, &id), expected("docker", "old-trainer", docker.pid(&id)));
    run(&mut docker.command(&["rm", "-f", &id]));
    site.clean("after rm -f");
}
