//! mig-parted's config files.

use mig_hook::mig_parted::{self, File};

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = match mig_parted::parse(text) {
        Ok(file) => file,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let names: Vec<String> =
        serde_json::to_value(&file).unwrap()["mig-configs"].as_object().unwrap().keys().cloned().collect();
    for name in &names {
        let (found, entries) = file.select(Some(name)).unwrap();
        assert!(found == name && !entries.is_empty());
        for entry in entries {
            assert!(entry.mig_enabled || entry.mig_devices.is_empty(), "{entry:?}");
            assert!(entry.mig_devices.values().all(|count| (1..=128).contains(count)), "{entry:?}");
        }
    }
    same(&file, &file.to_string());
    same(&file, &serde_json::to_string(&file).unwrap());
}

/// What `export` and `--json` write is read as what was meant.
fn same(file: &File, text: &str) {
    let again = mig_parted::parse(text).unwrap_or_else(|error| panic!("{error}:\n{text}"));
    let content = |file: &File| serde_json::to_value(file).unwrap();
    assert_eq!(content(&again), content(file), "{text}");
}
