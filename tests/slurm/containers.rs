//! `srun --container`: bundles of users, run without root by mig-runtime and a real runc, as oci.conf says.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use crate::cluster::{Cluster, SOON};
use crate::common::{document, run, text, wait_for};
use crate::submit::uuids;

/// A bundle of our user's, with a root of busybox.
pub fn bundle(cluster: &Cluster, script: &str) -> PathBuf {
    let bundle = cluster.path("home/bundle");
    let script = format!(
        "set -e; mkdir -p {0}/rootfs/bin {0}/rootfs/dev {0}/rootfs/proc {0}/rootfs/sys {0}/rootfs/tmp; cd {0}; \
         cp $(command -v busybox) rootfs/bin/; for a in sh env ls sleep cat trap; do ln -s busybox rootfs/bin/$a; done; \
         /usr/bin/runc spec --rootless || /usr/sbin/runc spec --rootless",
        bundle.display()
    ) + &format!("; cat > run.sh <<'SCRIPT'\n{script}\nSCRIPT");
    let made = run(&mut cluster.user("sh", &["-c", &script]));
    assert!(made.status.success(), "{}", text(&made));
    let path = bundle.join("config.json");
    let mut config = document(&path);
    config["process"]["terminal"] = json!(false);
    std::fs::write(&path, config.to_string()).unwrap();
    bundle
}

#[test]
fn containers_of_a_job_have_its_slices() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"], &["a100-sxm4-80gb"]]);
    let bundle = bundle(&cluster, "");
    let container = format!("--container={}", bundle.display());
    for node in &cluster.nodes {
        let on = format!("--nodelist={}", node.name);
        let args = [
            &on,
            "--gres=mig:2g.20gb",
            &container,
            "/bin/sh",
            "-c",
            "env; ls -l /dev/nvidia* /dev/nvidia-caps; exit 5",
        ];
        let output = cluster.run("srun", &args);
        let shown = text(&output);
        assert_eq!(output.status.code(), Some(5), "the container's own code: {shown}\n{}", cluster.logs());
        assert_eq!(uuids(&shown).len() % 2, 0, "{shown}");
        assert!(shown.contains("CUDA_VISIBLE_DEVICES=MIG-") && shown.contains("nvidia-cap"), "{shown}");
        assert!(shown.contains("MIG_DEVICE_PROFILES=2g.20gb"), "{shown}");
        assert!(!shown.contains("error: _try_parse"), "state of what has gone is answered: {shown}");
        cluster.assert_clean("after a container");
    }
    let plain = cluster.out("srun", &[&container, "/bin/sh", "-c", "env; ls /dev"]);
    assert!(uuids(&plain).is_empty() && !plain.contains("nvidia"), "{plain}");
}

#[test]
fn a_cancelled_container_gives_its_slices_back() {
    let cluster = Cluster::new(&[&["a100-sxm4-80gb"]]);
    let bundle = bundle(&cluster, "");
    let container = format!("--container={}", bundle.display());
    // Deaf to TERM, as a first process is.
    let job = cluster.batch(&["--gres=mig:1g.10gb", &container], "echo $CUDA_VISIBLE_DEVICES; exec sleep 600");
    wait_for("the container", SOON, || !uuids(&cluster.output(&job)).is_empty());
    cluster.out("scancel", &[&job]);
    cluster.assert_clean("after scancel");
    let left = run(Command::new("pgrep").args(["-u", "migtest", "-f", "sleep 600"]));
    assert!(left.stdout.is_empty(), "{}", text(&left));
}
