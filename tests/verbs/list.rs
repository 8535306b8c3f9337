//! `migctl list`.

use crate::common::{DEMO, World, text};
use crate::{asked, code, document, stdout};

#[test]
fn an_empty_machine_is_listed_without_state() {
    let world = World::new(&DEMO);
    let listed = stdout(&world.migctl(&["list"]));
    assert!(listed.starts_with("GPU 0  NVIDIA A100-SXM4-80GB  GPU-"), "{listed}");
    assert_eq!((listed.matches("GPU-").count(), listed.matches("no slices").count()), (3, 3), "{listed}");
    assert_eq!(document(&world, &["list"])["gpus"].as_array().unwrap().len(), 3);
    assert!(!world.path("state").exists(), "looking makes nothing");
}

#[test]
fn text_is_a_view_of_the_document() {
    let world = World::new(&DEMO);
    world.recording_runtime(0);
    let (_b1, _i1) = world.living("web", &asked("1g.10gb"));
    let engine_id = "3f0a".repeat(16);
    let (_b2, _i2) = world.living(&engine_id, &asked("2x2g.20gb"));
    world.sim("make", &["--gpu", "2", "--profile", "3g.40gb"]);
    world.sim("make", &["--gpu", "2", "--profile", "1g.10gb", "--no-ci"]);

    let document = document(&world, &["list"]);
    let listed = stdout(&world.migctl(&["list"]));
    let mut seen = vec![];
    for gpu in document["gpus"].as_array().unwrap() {
        assert!(listed.contains(&format!(
            "GPU {}  {}  {}\n",
            gpu["index"],
            gpu["name"].as_str().unwrap(),
            gpu["uuid"].as_str().unwrap()
        )));
        for slice in gpu["slices"].as_array().unwrap() {
            let profile = slice["profile"].as_str().unwrap();
            let place = format!("at {}:{}", slice["start"], slice["size"]);
            let row = match slice["uuid"].as_str() {
                Some(uuid) => listed.lines().find(|l| l.contains(uuid)).unwrap(),
                None => listed.lines().find(|l| l.contains("no CI")).unwrap(),
            };
            let holder = match slice["container"].as_str() {
                Some("web") => "container web",
                Some(_) => "container 3f0a3f0a3f0a ",
                None => "foreign",
            };
            assert!(row.contains(profile) && row.contains(&place) && row.contains(holder), "{slice} is not {row}");
            seen.push((profile.to_owned(), slice["state"].as_str().unwrap().to_owned()));
        }
    }
    seen.sort();
    let expected =
        [("1g.10gb", "foreign"), ("1g.10gb", "held"), ("2g.20gb", "held"), ("2g.20gb", "held"), ("3g.40gb", "foreign")];
    assert_eq!(seen, expected.map(|(p, s)| (p.to_owned(), s.to_owned())));

    assert!(listed.lines().all(|l| l == l.trim_end()), "no spaces at line ends: {listed}");
}

#[test]
fn a_missing_driver_is_said_and_leases_need_none() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("c1", &asked("1g.10gb"));
    let library = world.path("m/usr/lib/libnvidia-ml.so.1");
    std::fs::rename(&library, world.path("away")).unwrap();
    let output = world.migctl(&["list"]);
    assert!(code(&output) == 69 && text(&output).contains("libnvidia-ml.so.1"), "{}", text(&output));
    assert_eq!(world.leases().len(), 1);
    std::fs::rename(world.path("away"), &library).unwrap();
}
