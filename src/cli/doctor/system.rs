//! Who looks, and what enforces device rules.

use super::Check;
use crate::first;

pub(super) fn checks() -> Vec<Check> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // Who is root in a user namespace only is somebody else outside.
    let uid = first::rootless().unwrap_or_else(|| nix::unistd::geteuid().as_raw());
    vec![user(uid), cgroup(&mounts)]
}

fn user(uid: u32) -> Check {
    match uid {
        0 => Check::ok("system.user", "looked at as root"),
        uid => Check::warn(
            "system.user",
            format!("uid {uid} sees no slices, no state and no other user's open devices: these checks are left out"),
            "look again as root: sudo migctl doctor",
        ),
    }
}

/// From the text of /proc/self/mounts: runtimes take the unified hierarchy where /sys/fs/cgroup is one.
fn cgroup(mounts: &str) -> Check {
    let id = "system.cgroup";
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let fields: Vec<_> = fields.filter(|fields| fields.len() > 3).collect();
    let unified = fields.iter().any(|f| f[1] == "/sys/fs/cgroup" && f[2] == "cgroup2");
    let devices = fields.iter().any(|f| f[2] == "cgroup" && f[3].split(',').any(|option| option == "devices"));
    match (unified, devices) {
        (true, _) => Check::ok(id, "cgroup v2: device rules are BPF programs"),
        (false, true) => Check::ok(id, "cgroup v1 with the devices controller"),
        (false, false) => Check::fail(
            id,
            "neither cgroup v2 at /sys/fs/cgroup nor v1's devices controller is mounted: nothing keeps a container from \
             other slices",
            "mount one; without systemd: mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn what_enforces_device_rules() {
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs ro 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup \
                      /sys/fs/cgroup/devices cgroup rw,nosuid,devices 0 0\n";
        for (mounts, status, said) in [
            (v2, Status::Ok, "v2"),
            (hybrid, Status::Ok, "v1"),
            (&hybrid.replace(",devices ", ",memory "), Status::Fail, "neither"),
            ("", Status::Fail, "neither"),
        ] {
            let check = cgroup(mounts);
            assert!(check.status == status && check.found.contains(said), "{mounts}: {check:?}");
        }
    }

    #[test]
    fn who_is_not_root_is_told_what_is_missing() {
        assert_eq!(user(0).status, Status::Ok);
        assert_eq!((user(1000).status, user(1000).remedy.unwrap().contains("sudo")), (Status::Warn, true));
    }
}
