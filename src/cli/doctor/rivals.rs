//! Others that cut slices, or give out what mig-hook cuts.

use std::path::PathBuf;

use super::gpus::Seen;
use super::root::Root;
use super::slurm::{self, Slurm};
use super::{Check, listed};
use crate::host;

/// Where systemd keeps what is enabled, a directory for each target.
const UNITS: &str = "/etc/systemd/system";
const LSF: [&str; 3] = ["/etc/lsf.conf", "/usr/share/lsf/conf/lsf.conf", "/opt/ibm/lsf/conf/lsf.conf"];
const PLUGINS: &str = "/var/lib/kubelet/device-plugins";

type Text = Option<(String, String)>;

pub(super) fn checks(root: &Root, slurm: &Slurm, gpus: &[Seen]) -> Vec<Check> {
    let targets = root.list(UNITS).into_iter().filter(|path| path.extension().is_some_and(|e| e == "wants"));
    let enabled: Vec<PathBuf> = targets.flat_map(|target| root.list(target)).collect();
    let processes = host::processes();
    let text = |paths: &[&str]| paths.iter().find_map(|path| Some((root.shown(path), root.read(path).ok()?)));
    let named = std::env::var_os("LSF_ENVDIR").map(|dir| PathBuf::from(dir).join("lsf.conf"));
    let named = named.and_then(|path| Some((path.display().to_string(), root.read(&path).ok()?)));
    vec![
        mig_manager(&enabled, &processes),
        dcgm(&processes),
        slurm_check(root, slurm, &slurm::given_out(slurm, gpus)),
        lsf(&named.or_else(|| text(&LSF))),
        kubernetes(&root.list(PLUGINS), &processes),
    ]
}

/// Processes of these names, which the kernel keeps to 15 bytes.
fn running(processes: &[(u32, String)], names: &[&str]) -> Vec<String> {
    let is = |name: &str| names.iter().any(|wanted| name == &wanted[..wanted.len().min(15)]);
    processes.iter().filter(|(_, name)| is(name)).map(|(pid, name)| format!("{name} (pid {pid})")).collect()
}

fn mig_manager(enabled: &[PathBuf], processes: &[(u32, String)]) -> Check {
    let id = "rival.mig-manager";
    let unit = enabled.iter().any(|path| path.ends_with("nvidia-mig-manager.service"));
    let found = running(processes, &["nvidia-mig-manager", "nvidia-mig-parted"]);
    let disable = "run: systemctl disable --now nvidia-mig-manager; in Kubernetes: take the label nvidia.com/mig.config \
                   from the node";
    match (found.is_empty(), unit) {
        (false, _) => {
            Check::fail(id, format!("{} cuts the same GPUs: it clears what it did not make", listed(&found)), disable)
        }
        (true, true) => Check::warn(id, "nvidia-mig-manager is enabled: it re-cuts the GPUs at boot", disable),
        (true, false) => Check::ok(id, "no NVIDIA MIG manager"),
    }
}

/// A handle that DCGM keeps lets a destroy fail though no process is listed (DCGM issues 95 and 276).
fn dcgm(processes: &[(u32, String)]) -> Check {
    let id = "rival.dcgm";
    let found = running(processes, &["nv-hostengine", "dcgm-exporter"]);
    match found.is_empty() {
        true => Check::ok(id, "no DCGM"),
        false => Check::warn(
            id,
            format!(
                "DCGM runs, {}: a slice that it watches may stay in use when its container has ended",
                listed(&found)
            ),
            "if migctl gc tells of slices in use, run: systemctl stop nvidia-dcgm && migctl gc; systemctl start nvidia-dcgm",
        ),
    }
}

fn slurm_check(root: &Root, slurm: &Slurm, given_out: &[String]) -> Check {
    let id = "rival.slurm";
    let Some((file, conf)) = &slurm.gres else {
        return match given_out {
            [] => Check::ok(id, "no gres.conf of Slurm"),
            _ => gives_out("slurm.conf", given_out),
        };
    };
    let file = root.shown(file);
    if conf.any("autodetect", |value| value.eq_ignore_ascii_case("nvml")) {
        return Check::warn(
            id,
            format!(
                "{file} has AutoDetect=nvml: slurmd gives out slices that mig-hook cut, and does not start while MIG is on \
                 and there is none"
            ),
            format!("write AutoDetect=off into {file}, name what Slurm is to give out, then: systemctl restart slurmd"),
        );
    }
    match given_out {
        [] => Check::ok(id, format!("{file} does not look for slices by itself")),
        _ => gives_out(&file, given_out),
    }
}

fn gives_out(file: &str, what: &[String]) -> Check {
    Check::fail(
        "rival.slurm",
        format!("Slurm gives out parts of GPUs that mig-hook cuts: {}: one job gets what another has", listed(what)),
        format!(
            "take them out of {file} and of Gres= in slurm.conf, or leave those GPUs to Slurm: limits.gpus in the settings"
        ),
    )
}

fn lsf(conf: &Text) -> Check {
    let id = "rival.lsf";
    let Some((file, text)) = conf else { return Check::ok(id, "no lsf.conf of LSF") };
    let value = |line: &str| {
        let (key, value) = line.trim().split_once('=')?;
        (key.trim() == "LSF_MANAGE_MIG").then(|| value.trim().trim_matches('"').to_ascii_lowercase())
    };
    match text.lines().filter_map(value).next_back().as_deref() {
        Some("y") => Check::fail(
            id,
            format!("{file} has LSF_MANAGE_MIG=Y: LSF cuts and destroys slices on these GPUs by itself"),
            format!(
                "leave the GPUs to one of the two: LSF_MANAGE_MIG=N in {file} and restart LSF's daemons; or stop using \
                 mig-hook here"
            ),
        ),
        _ => Check::ok(id, format!("{file} leaves MIG alone")),
    }
}

fn kubernetes(sockets: &[PathBuf], processes: &[(u32, String)]) -> Check {
    let id = "rival.kubernetes";
    let nvidia = |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nvidia"));
    let sockets = sockets.iter().filter(nvidia).map(|path| path.display().to_string());
    let found: Vec<String> = sockets.chain(running(processes, &["nvidia-device-plugin"])).collect();
    match found.is_empty() {
        true => Check::ok(id, "no NVIDIA device plugin of Kubernetes"),
        false => Check::warn(
            id,
            format!("NVIDIA's device plugin gives these GPUs to pods, too: {}", listed(&found)),
            "keep the plugin off this node, or leave it other GPUs: limits.gpus in the settings",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn said(check: &Check) -> String {
        format!("{}\n{}", check.found, check.remedy.as_deref().unwrap_or_default())
    }

    fn process(name: &str) -> [(u32, String); 1] {
        [(7, name.to_owned())]
    }

    #[test]
    fn who_cuts_by_itself() {
        assert_eq!(mig_manager(&[], &process("bash")).status, Status::Ok);
        let unit = PathBuf::from("/etc/systemd/system/multi-user.target.wants/nvidia-mig-manager.service");
        assert!(said(&mig_manager(&[unit], &[])).contains("systemctl disable --now nvidia-mig-manager"));
        let running = mig_manager(&[], &process("nvidia-mig-part"));
        assert!(running.status == Status::Fail && said(&running).contains("(pid 7)"), "{running:?}");
        for (text, status) in [
            ("LSF_MANAGE_MIG=Y\n", Status::Fail),
            ("LSF_MANAGE_MIG=N\nLSF_MANAGE_MIG = \"y\"\n", Status::Fail),
            ("# LSF_MANAGE_MIG=Y\n", Status::Ok),
            ("LSF_MANAGE_MIG=Y\nLSF_MANAGE_MIG=n\n", Status::Ok),
            ("LSF_GPU_AUTOCONFIG=Y\n", Status::Ok),
        ] {
            assert_eq!(lsf(&Some(("/etc/lsf.conf".into(), text.into()))).status, status, "{text}");
        }
        assert_eq!(lsf(&None).status, Status::Ok);
    }

    #[test]
    fn who_gives_out_what_we_cut() {
        let dir = tempfile::tempdir().unwrap();
        let gres = dir.path().join("etc/slurm/gres.conf");
        std::fs::create_dir_all(gres.parent().unwrap()).unwrap();
        let root = Root::at(dir.path()).unwrap();
        for (text, given_out, status) in [
            ("AutoDetect=nvml\n", &[][..], Status::Warn),
            ("NodeName=n[1-4] AutoDetect=NVML Name=gpu\n", &[], Status::Warn),
            ("# AutoDetect=nvml\nAutoDetect=off\n", &[], Status::Ok),
            ("Name=gpu Type=a100 # AutoDetect=nvml\n", &[], Status::Ok),
            ("Name=gpu Type=1g.10gb\n", &["gpu of 1g.10gb".to_owned()], Status::Fail),
        ] {
            std::fs::write(&gres, text).unwrap();
            assert_eq!(slurm_check(&root, &slurm::read(&root), given_out).status, status, "{text}");
        }
        assert_eq!(kubernetes(&["/p/kubelet.sock".into()], &[]).status, Status::Ok);
        assert!(said(&kubernetes(&["/p/nvidia-gpu.sock".into()], &[])).contains("/p/nvidia-gpu.sock"));
        assert_eq!(kubernetes(&[], &process("nvidia-device-p")).status, Status::Warn);
    }

    #[test]
    fn who_keeps_slices_busy() {
        assert_eq!(dcgm(&process("nv-hostengine-x")).status, Status::Ok);
        assert!(said(&dcgm(&process("nv-hostengine"))).contains("nv-hostengine (pid 7)"));
    }
}
