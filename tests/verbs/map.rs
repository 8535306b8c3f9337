//! `migctl map`: pictures of machines with something of everything on them.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::{DEMO, Init, World, binaries, run, text};
use crate::{asked, code, document, repository, schema, snapshot, stdout};

/// `migctl ARGS…` with these variables, in a UTF-8 locale.
pub fn migctl(world: &World, args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).args(args);
    for variable in ["LC_ALL", "LC_CTYPE", "LANG", "COLUMNS", "NO_COLOR"] {
        command.env_remove(variable);
    }
    run(command.env("LC_ALL", "C.UTF-8").envs(variables.iter().copied()))
}

fn drawn(world: &World, args: &[&str]) -> String {
    stdout(&migctl(world, &[&["map"], args].concat(), &[]))
}

fn wide(world: &World, args: &[&str], columns: &str) -> String {
    stdout(&migctl(world, &[&["map"], args].concat(), &[("COLUMNS", columns)]))
}

/// Cuts slices that are kept.
pub fn keep(world: &World, what: &str, gpu: &str, start: &str) {
    stdout(&world.migctl(&["create", what, "--gpu", gpu, "--start", start]));
}

/// A container of podman's with that name, and a slice.
pub fn podman(world: &World, name: &str, id: &str, gpu: &str, profile: &str) -> Init {
    let containers = "run/overlay-containers";
    let mut config = asked(profile);
    config["annotations"]["mig.gpu"] = gpu.into();
    let bundle = world.bundle(&format!("{containers}/{id}/userdata"), &config);
    let list = world.path(containers).join("containers.json");
    let mut known: Value = std::fs::read(&list).map_or(json!([]), |text| serde_json::from_slice(&text).unwrap());
    known.as_array_mut().unwrap().push(json!({"id": id, "names": [name]}));
    std::fs::write(&list, known.to_string()).unwrap();
    let pid_file = bundle.join("init.pid");
    let (root, bundle_, pid_file_) = (world.path("root"), bundle.display().to_string(), pid_file.display().to_string());
    let create = ["--root", root.to_str().unwrap(), "create", "--bundle", &bundle_, "--pid-file", &pid_file_, id];
    let output = world.shim(&create);
    assert!(output.status.success(), "{}", text(&output));
    let init = Init::start();
    std::fs::write(pid_file, init.pid().to_string()).unwrap();
    init
}

fn lease_of(world: &World, id: &str) -> Value {
    world.leases().into_iter().find(|lease| lease["holder"]["container"] == id).unwrap()
}

/// Two A100 with every state there is.
fn everything() -> (World, Vec<Init>) {
    let world = World::with(&["a100-sxm4-80gb", "a100-sxm4-80gb"], &["--seed", "map"]);
    world.recording_runtime(0);
    let on = |gpu: &str, profile: &str| {
        let mut config = asked(profile);
        config["annotations"]["mig.gpu"] = gpu.into();
        config
    };
    keep(&world, "2c.3g.40gb,1c.3g.40gb", "0", "4");
    keep(&world, "1g.10gb", "0", "0");
    keep(&world, "1g.10gb", "0", "1");
    let kept = document(&world, &["map"])["gpus"][0]["windows"][1]["gi"].to_string();
    stdout(&world.migctl(&["reserve", &format!("0/{kept}"), "--uid", "54321"]));
    keep(&world, "1g.10gb", "0", "2");
    let mut alive = vec![podman(&world, "jupyter-alice", &"3f0a51c2d4e6".repeat(5), "0", "1g.10gb")];
    // Foreign ones have all but the places that follow, so that these are the same every time.
    for start in ["0", "6"] {
        world.sim("make", &["--gpu", "1", "--profile", "1g.10gb", "--start", start]);
    }
    for (id, profile) in
        [("etl-nightly", "1g.10gb"), ("old-trainer", "1g.10gb"), ("whisper", "1g.20gb"), ("notebook-7", "1g.10gb")]
    {
        alive.push(world.living(id, &on("1", profile)).1);
    }
    let gi = |id: &str| lease_of(&world, id)["slices"][0]["gi"].to_string();
    world.sim("hold", &["--gpu", "1", "--gi", &gi("etl-nightly")]);
    alive.remove(1);
    let released = world.migctl(&["release", "etl-nightly"]);
    assert_eq!(code(&released), 75, "{}", text(&released));
    let token = lease_of(&world, "old-trainer")["token"].as_str().unwrap().to_owned();
    world.edit_lease(&token, |lease| {
        lease["state"] = "quarantined".into();
        lease["reason"] = "slice 1g.10gb on GPU 1 is half-made, and process 77 uses it".into();
    });
    world.sim("destroy", &["--gpu", "1", "--gi", &gi("notebook-7")]);
    (world, alive)
}

fn states(map: &Value) -> Vec<&str> {
    let windows = map["gpus"].as_array().unwrap().iter().flat_map(|gpu| gpu["windows"].as_array().unwrap());
    let mut states: Vec<&str> = windows.map(|window| window["state"].as_str().unwrap()).collect();
    states.sort_unstable();
    states.dedup();
    states
}

/// Windows cover each GPU once.
fn assert_covered(map: &Value) {
    for gpu in map["gpus"].as_array().unwrap() {
        let mut next = 0;
        for window in gpu["windows"].as_array().unwrap() {
            assert_eq!(window["start"], next, "{gpu:#}");
            next += window["size"].as_u64().unwrap();
        }
        assert_eq!(gpu["memory_slices"], next, "{gpu:#}");
    }
}

#[test]
fn every_state_is_told_apart_without_colour_too() {
    let (world, _alive) = everything();
    let map = document(&world, &["map"]);
    assert_covered(&map);
    assert_eq!(
        states(&map),
        ["foreign", "free", "held", "lost", "quarantined", "releasing", "reserved", "static", "unusable"]
    );
    snapshot(&world, "map-a100", &drawn(&world, &[]));
    snapshot(&world, "map-a100-ascii", &drawn(&world, &["--ascii"]));
    snapshot(&world, "map-a100-narrow", &wide(&world, &[], "40"));
    snapshot(&world, "map-a100-wide", &wide(&world, &[], "150"));
    let colored = drawn(&world, &["--color", "always"]);
    let (mut readable, mut plain) = (String::new(), String::new());
    for (n, part) in colored.split("\x1b[").enumerate() {
        let (code, text) = if n == 0 { ("", part) } else { part.split_once('m').unwrap() };
        readable +=
            &if n == 0 { text.to_owned() } else { format!("{{{}}}{text}", if code == "0" { "" } else { code }) };
        plain += text;
    }
    snapshot(&world, "map-a100-color", &readable);
    let trimmed: Vec<&str> = plain.lines().map(str::trim_end).collect();
    assert_eq!(trimmed, drawn(&world, &[]).lines().collect::<Vec<_>>(), "colour adds nothing but colour");
}

#[test]
fn boards_count_their_own_slices() {
    let world = World::with(&["h100-sxm-80gb", "a30-24gb", "rtx-pro-6000-blackwell-se"], &["--seed", "map"]);
    world.recording_runtime(0);
    let _trainer = podman(&world, "llama-finetune", &"ab12".repeat(16), "0", "3g.40gb");
    for start in 0..4 {
        keep(&world, "1g.10gb", "0", &start.to_string());
    }
    keep(&world, "2g.12gb", "1", "2");
    world.sim("make", &["--gpu", "2", "--profile", "2g.48gb", "--start", "6"]);
    let map = document(&world, &["map"]);
    assert_covered(&map);
    let slices: Vec<&Value> = map["gpus"].as_array().unwrap().iter().map(|gpu| &gpu["memory_slices"]).collect();
    assert_eq!(slices, [8, 4, 12]);
    let fits = json!([{"profile": "2g.48gb", "count": 1}, {"profile": "1g.24gb", "count": 2}]);
    assert_eq!(map["gpus"][2]["fits"], fits);
    snapshot(&world, "map-boards", &drawn(&world, &[]));
    snapshot(&world, "map-boards-narrow", &wide(&world, &["--ascii"], "40"));
    // By index, UUID or PCI address; twice is once.
    let uuid = map["gpus"][1]["uuid"].as_str().unwrap();
    assert_eq!(drawn(&world, &["1"]), drawn(&world, &[uuid, "1"]));
    assert!(drawn(&world, &["1"]).starts_with("GPU 1  NVIDIA A30\n"));
}

#[test]
fn memory_without_a_compute_slice_is_not_room() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "map"]);
    for start in 0..7 {
        keep(&world, "1g.10gb", "0", &start.to_string());
    }
    let map = document(&world, &["map"]);
    let last = &map["gpus"][0]["windows"][7];
    assert_eq!((&last["state"], &last["start"], &last["size"]), (&json!("unusable"), &json!(7), &json!(1)));
    assert_eq!(map["gpus"][0]["fits"], json!([]));
    snapshot(&world, "map-seven-ones", &drawn(&world, &[]));
}

#[test]
fn machines_with_nothing_to_draw() {
    let world = World::with(&DEMO, &["--seed", "map"]);
    let map = document(&world, &["map"]);
    assert_covered(&map);
    assert_eq!(states(&map), ["free"]);
    snapshot(&world, "map-empty", &drawn(&world, &[]));
    assert!(!world.path("state").exists(), "looking leaves nothing behind");

    let off = World::with(&["a100-sxm4-80gb", "h100-sxm-80gb"], &["--seed", "map", "--mig", "off"]);
    off.sim("mode", &["--gpu", "0", "on"]);
    assert_eq!(document(&off, &["map"])["gpus"][1]["windows"], json!([]));
    snapshot(&off, "map-off", &drawn(&off, &[]));
}

#[test]
fn a_gpu_that_is_cordoned_or_not_managed_says_so() {
    let world = World::with(&DEMO, &["--seed", "map"]);
    stdout(&world.migctl(&["cordon", "0", "--reason", "fan is <loud> & \"old\""]));
    world.settings("[limits]\ngpus = [\"0\", \"2\"]\nprofiles = [\"1g.10gb\", \"3g.40gb\"]");
    snapshot(&world, "map-cordoned", &drawn(&world, &[]));
    let map = document(&world, &["map"]);
    assert_eq!(map["gpus"][0]["cordon"]["reason"], "fan is <loud> & \"old\"");
    assert_eq!((&map["gpus"][0]["managed"], &map["gpus"][1]["managed"]), (&json!(true), &json!(false)));
    let svg = drawn(&world, &["--svg", "-"]);
    let warnings: Vec<String> = elements(&svg, "tspan").into_iter().filter(|text| text.contains("cordoned")).collect();
    assert_eq!(warnings, ["cordoned: fan is <loud> & \"old\""]);
}

/// The texts of all elements of that name.
fn elements(svg: &str, name: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).unwrap();
    let named = document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", name)));
    named
        .map(|node| node.descendants().filter_map(|inner| inner.text().filter(|_| inner.is_text())).collect())
        .collect()
}

#[test]
fn the_svg_is_whole_and_says_the_same() {
    let (world, _alive) = everything();
    let svg = drawn(&world, &["--svg", "-"]);
    let published = repository("docs/map.svg");
    if std::env::var_os("UPDATE_PICTURES").is_some() {
        std::fs::write(&published, &svg).unwrap();
    }
    let known = std::fs::read_to_string(&published).unwrap_or_default();
    assert!(
        known == svg,
        "docs/map.svg is not what migctl draws; look at it after: UPDATE_PICTURES=1 cargo test --test verbs map::"
    );
    for outside in ["http://", "https://", "url(h", "@import", "href"] {
        let inside = svg.replace("http://www.w3.org/2000/svg", "");
        assert!(!inside.contains(outside), "{outside} leads out of the file");
    }
    let map = document(&world, &["map"]);
    let titles = elements(&svg, "title");
    for window in map["gpus"].as_array().unwrap().iter().flat_map(|gpu| gpu["windows"].as_array().unwrap()) {
        let place = format!("{}:{}", window["start"], window["size"]);
        let profile = window["profile"].as_str().unwrap_or_default();
        let told = titles.iter().any(|title| title.contains(&place) && title.contains(profile));
        assert!(told, "{window:#} is not in {titles:#?}");
    }
    assert!(elements(&svg, "desc")[0].contains("jupyter-alice"), "{svg}");

    let file = world.path("picture.svg");
    let written = migctl(&world, &["map", "--svg", file.to_str().unwrap()], &[]);
    assert_eq!(stdout(&written), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), svg);
}

#[test]
fn a_user_sees_what_runs_where_the_driver_hides_the_places() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "map"]);
    world.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    let dir = world.path("m").parent().unwrap().to_owned();
    assert!(run(Command::new("chmod").args(["-R", "a+rX"]).arg(&dir)).status.success());
    let program = world.path("migctl");
    // By another process: what a test beside this one forks would have it open for writing, and then nobody can run it.
    assert!(run(Command::new("cp").arg(binaries().join("migctl")).arg(&program)).status.success());
    let as_user = |args: &[&str]| {
        let mut command = Command::new(&program);
        stdout(&run(command.arg("--config").arg(world.config()).args(args).uid(65534).gid(65534)))
    };
    let map: Value = serde_json::from_str(&as_user(&["map", "--json"])).unwrap();
    schema("map", &map);
    let hidden = &map["gpus"][0]["unplaced"][0];
    assert_eq!(
        (&map["privileged"], &hidden["profile"], &hidden["state"]),
        (&json!(false), &json!("2g.20gb"), &json!("hidden"))
    );
    assert!(as_user(&["map"]).contains("to root only"));
    let top = as_user(&["top"]);
    assert!(top.contains("2g.20gb") && top.contains("0.0/20 GiB"), "{top}");
}

#[test]
fn terminals_and_locales() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "map"]);
    let map = |variables: &[(&str, &str)]| stdout(&migctl(&world, &["map"], variables));
    let boxes = map(&[]);
    assert!(boxes.contains('┌') && !boxes.contains('\x1b'), "{boxes}");
    assert_eq!(map(&[("LC_ALL", "de_DE.utf8")]), boxes);
    let ascii = stdout(&migctl(&world, &["map", "--ascii"], &[]));
    assert!(ascii.is_ascii(), "{ascii}");
    for variables in [[("LC_ALL", "C"), ("LANG", "C.UTF-8")], [("LC_ALL", ""), ("LANG", "POSIX")]] {
        assert_eq!(map(&variables), ascii, "{variables:?}");
    }
    // What is no width is none.
    for columns in ["", "0", "wide", "-5"] {
        assert_eq!(map(&[("COLUMNS", columns)]), boxes, "{columns}");
    }
    for columns in [1, 2, 10, 79, 81, 1000] {
        map(&[("COLUMNS", &columns.to_string())]);
    }
}

#[test]
fn wrong_calls_say_what_is_wrong() {
    let world = World::with(&["a100-sxm4-80gb"], &["--seed", "map"]);
    let refused = |args: &[&str], expected: i32, words: &[&str]| {
        let output = migctl(&world, &[&["map"], args].concat(), &[]);
        assert_eq!(code(&output), expected, "{args:?}: {}", text(&output));
        assert!(output.stdout.is_empty() && words.iter().all(|word| text(&output).contains(word)), "{}", text(&output));
    };
    refused(&["7"], 65, &["no GPU here is 7", "GPU 0 (NVIDIA A100-SXM4-80GB) GPU-"]);
    refused(&["first"], 64, &["'first'", "index, UUID (GPU-…) or PCI address"]);
    refused(&["--svg", "-", "--json"], 64, &["--svg or --json"]);
    refused(&["--svg", "-", "--ascii"], 64, &["--ascii"]);
    refused(&["--color", "red"], 64, &["auto, always, never"]);
    refused(&["--svg", "/nonexistent/x.svg"], 74, &["/nonexistent/x.svg"]);
    assert!(!Path::new("/nonexistent").exists());
}
