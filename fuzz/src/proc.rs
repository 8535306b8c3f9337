//! What the kernel and the driver say in /proc: device numbers, capabilities. Their texts with anything between the lines.

use std::cell::RefCell;
use std::path::Path;

use mig_hook::host::{self, Host};
use tempfile::TempDir;

thread_local! {
    static ROOT: RefCell<TempDir> = RefCell::new(tempfile::Builder::new().prefix("mig-fuzz").tempdir().unwrap());
}

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    capability(text);
    devices(text);
    ROOT.with_borrow(|root| minors(root.path(), text));
}

/// The `access` file of an instance: other lines, before and after, change nothing.
fn capability(text: &str) {
    let number = text.bytes().fold(7_u32, |n, b| n.wrapping_mul(31).wrapping_add(b.into()));
    let other = |line: &&str| !line.starts_with("DeviceFileMinor:");
    let noise: Vec<&str> = text.lines().filter(other).collect();
    let noise = noise.join("\n");
    let file = format!("{noise}\nDeviceFileMinor: {number}\nDeviceFileMode: 292\n{noise}\n");
    assert_eq!(host::access_minor(&file), Some(number));
    assert_eq!(host::access_minor(&noise), None);
    if let Some(read) = host::access_minor(text) {
        assert!(text.contains(&read.to_string()), "{read}");
        assert_eq!(host::field(text, "DeviceFileMinor"), Some(read), "both readers agree");
    }
}

/// /proc/devices: what stands under the block devices is none of the driver's.
fn devices(text: &str) {
    let character: Vec<&str> = text.lines().take_while(|line| !line.starts_with("Block devices")).collect();
    let character = character.join("\n");
    for name in ["nvidia", "nvidia-caps", "nvidia-uvm"] {
        let found = host::major(text, name);
        assert!(found.is_none_or(|major| character.contains(&major.to_string())), "{name}: {found:?}");
        let more = format!("{text}\nBlock devices:\n 77 {name}\n");
        assert_eq!(host::major(&more, name), found, "{name} as a block device");
        let first = format!("Character devices:\n 78 {name}\n{text}");
        assert_eq!(host::major(&first, name), Some(78), "the first one counts");
    }
}

/// mig-minors: every line has its minor in the answer, or there is none at all.
fn minors(root: &Path, text: &str) {
    let caps = root.join("driver/nvidia-caps");
    let gpu = root.join("driver/nvidia/capabilities/gpu0");
    std::fs::create_dir_all(&caps).unwrap();
    std::fs::create_dir_all(&gpu).unwrap();
    std::fs::write(caps.join("mig-minors"), text).unwrap();
    let here = |line: &&str| {
        let name = line.split(['/', ' ']).next().unwrap();
        !name.starts_with("gpu") || name == "gpu0"
    };
    match Host::at(root, root, root).capability_minors() {
        Ok(minors) => {
            assert_eq!(minors.len(), text.lines().filter(here).count(), "{minors:?}");
            assert!(minors.iter().all(|minor| text.contains(&minor.to_string())), "{minors:?}");
        }
        Err(error) => {
            let plain = |line: &str| line.split_once(' ').is_some_and(|(_, minor)| minor.parse::<u32>().is_ok());
            assert!(!text.lines().all(plain), "{error}");
        }
    }
}
