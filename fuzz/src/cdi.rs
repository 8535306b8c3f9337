//! CDI specs: NVIDIA's, from which the driver's files are taken, and whether one is ours.

use std::path::{Component, Path};

use mig_hook::cdi;
use serde_json::Value;

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if cdi::is_ours(text) {
        let spec: Value = serde_json::from_str(text).unwrap();
        assert_eq!(spec["kind"], cdi::KIND, "another vendor's file is not replaced");
    }
    let Ok(Some(files)) = cdi::driver_files(text) else { return };
    assert!(text.contains(&cdi::NVIDIA_KIND[..6]));
    for (host, container, options) in files {
        assert!(host.is_absolute(), "{host:?}");
        let parts: Vec<Component> = Path::new(&container).components().collect();
        assert_eq!(parts.first(), Some(&Component::RootDir), "{container:?}");
        assert!(!parts.contains(&Component::ParentDir), "{container:?}");
        let top = parts.get(1).map(|part| part.as_os_str().to_owned());
        let top = top.expect("not the whole file system");
        assert!(!["dev", "proc", "sys"].iter().any(|closed| top == **closed), "{container:?} is not the driver's");
        assert!(options.iter().any(|option| option == "bind" || option == "rbind"), "{options:?}");
    }
}
