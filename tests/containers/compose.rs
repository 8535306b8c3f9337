//! docker compose: docker-compose 1 (Python) or 2, whichever is installed.

use std::process::Command;

use crate::common::{self, run, skip};
use crate::{Engine, IMAGE, Probe, Site, must};

/// A project of one service that asks, by `request`, and one that does not.
struct Project<'a> {
    docker: &'a Engine<'a>,
    file: String,
}

impl<'a> Project<'a> {
    fn new(docker: &'a Engine<'a>, request: &str) -> Project<'a> {
        let runtime = docker.runtime.as_deref().unwrap();
        let service = format!(
            "\n    image: {IMAGE}\n    network_mode: none\n    cap_add: [MKNOD]\n    stop_grace_period: 0s\n    \
             command: [sh, -c, \"mig-probe; echo probed; exec sleep 600\"]\n"
        );
        let text = format!("services:\n  train:{service}    runtime: {runtime}\n    {request}\n  plain:{service}");
        let file = docker.site.write(&format!("{runtime}/compose.yaml"), &text);
        Project { docker, file: file.display().to_string() }
    }

    fn ok(&self, words: &[&str]) -> String {
        must(compose(self.docker).args(["-f", &self.file]).args(words))
    }

    fn container(&self, service: &str) -> String {
        self.ok(&["ps", "-q", service]).trim().to_owned()
    }
}

fn compose(docker: &Engine) -> Command {
    let mut command = Command::new("docker-compose");
    command.env("DOCKER_HOST", format!("unix://{}/docker/d.sock", docker.site.dir.display()));
    command
}

/// Its major version; why there is none.
fn version(docker: &Engine) -> Result<u32, String> {
    if !common::installed("docker-compose") {
        return Err("docker-compose is not installed".to_owned());
    }
    let said = must(compose(docker).args(["version", "--short"]));
    let major = said.trim().trim_start_matches('v').split('.').next().unwrap_or_default().parse();
    major.map_err(|_| format!("docker-compose calls itself {said:?}"))
}

fn lives(project: &Project, site: &Site) {
    let docker = project.docker;
    project.ok(&["up", "-d"]);
    let train = project.container("train");
    let seen = docker.probe(&train);
    site.assert_given(&seen, &["1g.10gb"]);
    docker.assert_confined(&train, &seen);
    assert!(docker.probe(&project.container("plain")).is_empty());
    let session = Probe::read(&project.ok(&["exec", "-T", "train", "mig-probe"]));
    assert_eq!(session.variables, seen.variables);
    let first = site.lease()["token"].clone();
    project.ok(&["restart", "train"]);
    assert_ne!(site.lease()["token"], first);
    project.ok(&["stop"]);
    site.clean("after compose stop: at once");
    project.ok(&["up", "-d"]);
    assert_eq!(site.leases().len(), 1);
    project.ok(&["down"]);
    site.assert_clean("after compose down: at once");
}

#[test]
fn a_service_asks_by_its_environment() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(&["--mig-env"]);
    if let Err(why) = version(&docker) {
        return skip("docker compose", &why);
    }
    lives(&Project::new(&docker, "environment: {MIG_PROFILE: 1g.10gb}"), &site);

    let refused = Project::new(&docker, "environment: {MIG_PROFILE: 3g.13gb}");
    let output = run(compose(&docker).args(["-f", &refused.file, "up", "-d"]));
    let said = common::text(&output);
    assert!(!output.status.success() && said.contains("3g.13gb") && said.contains("1g.10gb"), "{said}");
    site.assert_clean("after a refusal");
    refused.ok(&["down"]);
}

#[test]
fn a_service_asks_by_annotation() {
    let Some(site) = Site::new(&["docker"]) else { return };
    let docker = site.docker(&[]);
    let why = match (version(&docker), docker.hears_annotations()) {
        (Ok(1), _) => "docker-compose 1 knows none".to_owned(),
        (Ok(_), Ok(())) => return lives(&Project::new(&docker, "annotations: {mig.profile: 1g.10gb}"), &site),
        (Err(why), _) | (_, Err(why)) => why,
    };
    skip("compose annotations", &why);
}
