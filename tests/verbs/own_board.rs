//! A board that nobody knows, of an odd geometry, as sim/README.md describes one: what is cut goes by what the driver tells.

use serde_json::json;

use crate::common::{World, blocks, text};
use crate::{asked, code, document};

/// A machine with it.
fn fifths() -> World {
    let dir = tempfile::Builder::new().prefix("mig").tempdir().unwrap();
    let file = dir.path().join("fifths.json");
    std::fs::write(&file, blocks(include_str!("../../sim/README.md"), "json").remove(0)).unwrap();
    let world = World::at(dir, &[file.to_str().unwrap()], &[]);
    world.recording_runtime(0);
    world
}

#[test]
fn a_board_in_fifths_is_cut_to_the_last() {
    let world = fifths();
    let gpu = document(&world, &["profiles"])["gpus"][0].clone();
    assert_eq!(gpu["profiles"].as_array().unwrap().len(), 2, "{gpu:#}");
    let (_first, one) = world.living("one", &asked("3g.24gb"));
    let (_second, two) = world.living("two", &asked("1g.8gb"));
    let (_third, three) = world.living("three", &asked("1g.8gb"));
    let mut places: Vec<(u64, u64)> = world
        .instances()
        .iter()
        .map(|gi| (gi["placement"]["start"].as_u64().unwrap(), gi["placement"]["size"].as_u64().unwrap()))
        .collect();
    places.sort_unstable();
    assert!(places == [(0, 3), (3, 1), (4, 1)] || places == [(0, 1), (1, 1), (2, 3)], "{places:?}");
    let full = world.shim(&["create", "--bundle", world.bundle("four", &asked("1g.8gb")).to_str().unwrap(), "four"]);
    assert_ne!(code(&full), 0, "{}", text(&full));
    drop((one, two, three));
    for holder in ["one", "two", "three"] {
        assert_eq!(document(&world, &["release", holder])["outcome"], json!("done"));
    }
    world.assert_clean("after all are released");
}
