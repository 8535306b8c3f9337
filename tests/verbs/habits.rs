//! Command lines of guides, and of nvidia-smi.

use serde_json::json;

use crate::common::{World, text};
use crate::{code, shown, snapshot};

#[test]
fn the_commands_of_guides_run() {
    let world = World::with(&["a100-sxm4-40gb"], &["--seed", "habits"]);
    let output = world.migctl(&["--gpuid", "0", "create", "instance", "--type", "1g.5gb"]);
    let said = text(&output);
    assert!(code(&output) == 0 && said.contains("this is `migctl --config "), "{said}");
    assert!(said.contains("create 1g.5gb --gpu 0`"), "{said}");
    assert_eq!(world.lease()["state"], json!("static"));
    let gi = world.instances()[0]["id"].to_string();
    for (args, part) in [(&["list", "instance"][..], "1g.5gb"), (&["list", "config"], "7g.40gb")] {
        let output = world.migctl(&[&["--gpuid", "0"], args].concat());
        assert!(code(&output) == 0 && text(&output).contains(part), "{args:?}: {}", text(&output));
    }
    let output = world.migctl(&["--gpuid", "0", "destroy", "instance", "--instanceid", &gi]);
    assert_eq!(code(&output), 0, "{}", text(&output));
    world.assert_clean("after destroy instance");
    let output = world.migctl(&["--gpuid", "0", "create", "instance", "--type", "1g.10gb+x"]);
    assert_eq!(code(&output), 65, "{}", text(&output));
}

#[test]
fn what_is_typed_for_nvidia_smi_is_told() {
    let world = World::with(&["a100-sxm4-80gb", "a100-sxm4-40gb"], &["--seed", "habits"]);
    let mut said = String::new();
    for line in [
        "-i 0 -mig 1",
        "mig -lgip",
        "mig -i 0 -cgi 19,3g.40gb -C",
        "mig -cgi 14 -C",
        "mig -cgi 5:0 -i 0",
        "mig -cci 0 -gi 1",
        "mig -lgi -i 1",
        "mig -dci",
        "mig -dgi -i 0",
        "-L",
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        assert_eq!(code(&world.migctl(&args)), 64, "{line}");
        said += &shown(&world, &args);
    }
    snapshot(&world, "habits", &said);
    world.assert_clean("after being told");
}
