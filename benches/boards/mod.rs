//! GPUs as the simulator's tables have them.

use mig_hook::gpu::{Device, Engines, MigMode, Placement, Profile, ProfileId};
use serde_json::Value;

/// Some GPUs of one kind, by its key in sim/boards.json; `None`: there is no such kind.
pub fn devices(key: &str, indices: std::ops::Range<u32>) -> Option<Vec<Device>> {
    let tables: Value = serde_json::from_str(include_str!("../../sim/boards.json")).unwrap();
    let board = tables["gpus"].as_array().unwrap().iter().find(|gpu| gpu["key"] == key)?;
    let profiles: Vec<Profile> = board["profiles"].as_array().unwrap().iter().map(profile).collect();
    let device = |index: u32| Device {
        uuid: format!("GPU-{index:02}"),
        name: board["name"].as_str().unwrap_or(key).to_owned(),
        index,
        minor: index,
        pci_bus_id: format!("00000000:{index:02X}:00.0"),
        pci_device_id: 0,
        mig: MigMode::On,
        profiles: profiles.clone(),
        instances: vec![],
    };
    Some(indices.map(device).collect())
}

fn profile(row: &Value) -> Profile {
    let number = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
    let placement = |at: &Value| Placement { start: number(&at["start"]), size: number(&at["size"]) };
    let name = row["name"].as_str().unwrap().to_owned();
    // The tables lack the exact memory of some large profiles.
    let memory_mib = row["memory_size_mb"].as_u64().unwrap_or_else(|| u64::from(gigabytes(&name)) * 1024);
    Profile {
        id: ProfileId(number(&row["id"])),
        slices: number(&row["slice_count"]),
        memory_mib,
        sms: row["sm"].as_u64().map_or(0, |sms| u32::try_from(sms).unwrap()),
        max_instances: number(&row["instance_count"]),
        placements: row["placements"].as_array().unwrap().iter().map(placement).collect(),
        engines: Engines::default(),
        p2p: false,
        name,
    }
}

/// Memory by a profile's name: 10 of `1g.10gb+me`.
pub fn gigabytes(name: &str) -> u32 {
    let size = name.split_once("g.").and_then(|(_, rest)| rest.split_once("gb"));
    size.and_then(|(gigabytes, _)| gigabytes.parse().ok()).unwrap_or(0)
}
