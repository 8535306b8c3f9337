//! `migctl profiles`.

use serde_json::{Value, json};

use crate::common::World;
use crate::{asked, document, shown, snapshot, stdout};

fn of<'a>(offer: &'a Value, name: &str) -> &'a Value {
    offer["profiles"].as_array().unwrap().iter().find(|profile| profile["name"] == name).unwrap()
}

#[test]
fn offers_are_the_drivers_with_what_is_free_now() {
    let world = World::with(&["a100-sxm4-80gb", "rtx-pro-6000-blackwell-se"], &["--seed", "see"]);
    world.recording_runtime(0);
    let free = |name: &str| of(&document(&world, &["profiles", "0"])["gpus"][0], name)["free"].clone();
    assert_eq!((free("1g.10gb"), free("3g.40gb"), free("7g.80gb")), (json!(7), json!(2), json!(1)));
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb", "--start", "4"]);
    assert_eq!(
        (free("1g.10gb"), free("3g.40gb"), free("4g.40gb"), free("7g.80gb")),
        (json!(4), json!(1), json!(1), json!(0))
    );

    // The room of a lease whose slice is gone is not free: its holder lives.
    let (_bundle, _init) = world.living("c1", &asked("2g.20gb"));
    let taken = (free("1g.10gb"), free("2g.20gb"), free("3g.40gb"));
    assert_eq!(taken, (json!(2), json!(1), json!(0)));
    let slice = world.lease()["slices"][0].clone();
    world.sim("destroy", &["--gpu", "0", "--gi", &slice["gi"].to_string()]);
    assert_eq!((free("1g.10gb"), free("2g.20gb"), free("3g.40gb")), taken);

    let offers = document(&world, &["profiles"]);
    let half = of(&offers["gpus"][0], "3g.40gb");
    assert_eq!(
        (&half["id"], &half["total"], &half["memory_mib"], &half["sms"]),
        (&json!(9), &json!(2), &json!(40192), &json!(42))
    );
    assert_eq!(half["placements"], json!([{"start": 0, "size": 4}, {"start": 4, "size": 4}]));
    assert_eq!(half["engines"], json!({"copy": 3, "decoders": 2, "encoders": 0, "jpeg": 0, "ofa": 0}));
    let splits: Vec<&Value> = half["splits"].as_array().unwrap().iter().map(|split| &split["slices"]).collect();
    assert_eq!(splits, [3, 2, 1], "an instance of it exists");
    assert_eq!(of(&offers["gpus"][1], "2g.48gb")["splits"], Value::Null, "none exists to be asked");

    let text = shown(&world, &["profiles"]);
    assert!(text.lines().all(|l| l == l.trim_end() && l.chars().count() <= 120), "{text}");
    snapshot(&world, "profiles", &text);
}

#[test]
fn a_gpu_without_mig_says_how_to_get_it() {
    let world = World::with(&["h100-sxm-80gb"], &["--mig", "off"]);
    let text = stdout(&world.migctl(&["profiles"]));
    assert!(text.contains("MIG is off; migctl mode on 0 turns it on"), "{text}");
    assert_eq!(document(&world, &["profiles"])["gpus"][0]["profiles"], json!([]));
}
