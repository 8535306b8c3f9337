//! `migctl list`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{DEMO, Init, World, binaries, config, run, text, wait_for};
use crate::{asked, code, document, schema, shown, snapshot, stdout};

/// Boards whose slices are counted in eighths and in twelfths; the same UUIDs in every run.
fn boards() -> World {
    let world = World::with(&["a100-sxm4-80gb", "h100-sxm-80gb", "rtx-pro-6000-blackwell-se"], &["--seed", "see"]);
    world.recording_runtime(0);
    world
}

/// A container that docker calls `name`, in files as docker and its containerd write them.
fn docker_container(world: &World, id: &str, name: &str, profile: &str) -> Init {
    let data = format!("docker/containers/{id}");
    world.write(&format!("{data}/config.v2.json"), &json!({"ID": id, "Name": format!("/{name}")}).to_string());
    let mut config = config(json!({"mig.profile": profile}), &[]);
    let hostname = world.path(&data).join("hostname");
    let mount = json!({"destination": "/etc/hostname", "type": "bind", "source": hostname, "options": ["rbind"]});
    config["mounts"].as_array_mut().unwrap().push(mount);
    let bundle = world.bundle(&format!("io.containerd.runtime.v2.task/moby/{id}"), &config);
    let (bundle, root, pid_file) = (bundle.display(), world.path("root"), bundle.join("init.pid"));
    let options = ["--bundle", &bundle.to_string(), "--pid-file", pid_file.to_str().unwrap()];
    let output = world.shim(&[&["--root", root.to_str().unwrap(), "create"][..], &options, &[id]].concat());
    assert!(output.status.success(), "{}", text(&output));
    let init = Init::start();
    std::fs::write(pid_file, init.pid().to_string()).unwrap();
    init
}

/// The rows of a listing with what one of their fields says.
fn rows(listing: &Value) -> Vec<&Value> {
    listing["gpus"].as_array().unwrap().iter().flat_map(|gpu| gpu["slices"].as_array().unwrap()).collect()
}

fn record(world: &World) -> (PathBuf, Value) {
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    let file = world.path("state/leases").join(format!("{token}.json"));
    let record = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    (file, record)
}

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
fn slices_show_what_runs_in_them_and_for_whom() {
    let world = boards();
    let id = "3f0a".repeat(16);
    let trainer = docker_container(&world, &id, "trainer", "3g.40gb");
    let (_bundle, _web) = world.living("web", &asked("1g.10gb"));
    world.sim("make", &["--gpu", "1", "--profile", "1g.20gb"]);
    world.sim("make", &["--gpu", "1", "--profile", "2g.20gb", "--no-ci"]);
    world.sim("make", &["--gpu", "2", "--profile", "1g.24gb+me.all"]);
    let listing = document(&world, &["list"]);
    let held = rows(&listing).into_iter().find(|row| row["container"] == json!(id)).unwrap().clone();
    let gi = held["gi"].to_string();
    world.sim("load", &["--gpu", "0", "--gi", &gi, "--memory", "30000", "--ecc", "2"]);
    let stranger = Init::start();
    let (pid, hopper) = (stranger.pid().to_string(), rows(&listing)[3]["gi"].to_string());
    world.sim("hold", &["--gpu", "1", "--gi", &hopper, "--pid", &pid, "--memory", "512"]);

    let listing = document(&world, &["list"]);
    let held = rows(&listing).into_iter().find(|row| row["container"] == json!(id)).unwrap();
    assert_eq!(
        (&held["name"], &held["engine"], &held["holder"]),
        (&json!("trainer"), &json!("docker"), &json!("trainer (docker)"))
    );
    assert_eq!((&held["pid"], &held["way"], &held["state"]), (&json!(trainer.pid()), &json!("shim"), &json!("held")));
    assert_eq!(
        (&held["memory_used_mib"], &held["memory_total_mib"], &held["ecc_errors"]),
        (&json!(30000), &json!(40192), &json!(2))
    );
    assert_eq!(
        (&held["sms"], &held["engines"]["copy"], &held["engines"]["decoders"]),
        (&json!(42), &json!(3), &json!(2))
    );
    let foreign = rows(&listing).into_iter().find(|row| row["processes"] != json!([])).unwrap();
    assert_eq!(foreign["state"], "foreign");
    assert_eq!(
        (&foreign["processes"][0]["pid"], &foreign["processes"][0]["memory_mib"]),
        (&json!(stranger.pid()), &json!(512))
    );
    assert_eq!(foreign["processes"][0]["name"], "sleep");
    let bare = rows(&listing).into_iter().find(|row| row["ci"] == Value::Null).unwrap();
    assert_eq!((&bare["uuid"], &bare["device"], &bare["memory_used_mib"]), (&Value::Null, &Value::Null, &Value::Null));

    let listed = shown(&world, &["list"]);
    assert!(listed.lines().all(|l| l == l.trim_end() && l.chars().count() <= 120), "{listed}");
    let users = [held["user"].as_str(), foreign["processes"][0]["user"].as_str()];
    let listed = users.iter().flatten().fold(listed, |text, user| text.replace(&format!(", {user}"), ", [user]"));
    snapshot(&world, "list", &listed);
}

#[test]
fn one_gpu_is_listed_by_index_uuid_or_pci_address() {
    let world = boards();
    let all = document(&world, &["list"]);
    let wanted = &all["gpus"][1];
    for name in ["1", wanted["uuid"].as_str().unwrap(), wanted["pci_bus_id"].as_str().unwrap(), "0f:00.0"] {
        let listing = document(&world, &["list", name]);
        assert_eq!(listing["gpus"], json!([wanted]), "{name}");
    }
    let output = world.migctl(&["list", "7"]);
    assert!(code(&output) == 65 && text(&output).contains("no GPU here is 7; there is GPU 0 ("), "{}", text(&output));
    let output = world.migctl(&["list", "seven"]);
    assert!(code(&output) == 64 && text(&output).contains("index, UUID (GPU-…) or PCI address"), "{}", text(&output));
}

#[test]
fn kept_reserved_and_lost_slices_are_told_apart() {
    let world = boards();
    let (_bundle, _init) = world.living("c1", &asked("1g.10gb"));
    let (file, held) = record(&world);
    let state_of = |change: &dyn Fn(&mut Value)| {
        let mut record = held.clone();
        change(&mut record);
        std::fs::write(&file, record.to_string()).unwrap();
        let listing = document(&world, &["list"]);
        let row = rows(&listing)[0].clone();
        (row["state"].as_str().unwrap().to_owned(), row["holder"].as_str().unwrap().to_owned(), rows(&listing).len())
    };
    let keep = |record: &mut Value| {
        record["state"] = json!("static");
        record["holder"]["way"] = json!("create");
        record["holder"]["container"] = Value::Null;
    };
    assert_eq!(state_of(&keep), ("static".into(), "kept for anybody".into(), 1));
    let reserve = |record: &mut Value| {
        keep(record);
        record["reserved_for"] = json!(4_000_000_000_u32);
    };
    assert_eq!(state_of(&reserve), ("reserved".into(), "kept for uid 4000000000".into(), 1));
    let (state, holder, _) = state_of(&|record| record["state"] = json!("quarantined"));
    assert_eq!((state.as_str(), holder.as_str()), ("quarantined", "container c1"));
    assert_eq!(state_of(&|_| {}).0, "held");
    // Another tool destroys it under its holder.
    let gi = held["slices"][0]["gi"].to_string();
    world.sim("destroy", &["--gpu", &held["slices"][0]["gpu_index"].to_string(), "--gi", &gi]);
    assert_eq!(state_of(&|_| {}), ("lost".into(), "container c1".into(), 1));
    let listed = stdout(&world.migctl(&["list"]));
    assert!(listed.contains("lost") && listed.contains(held["slices"][0]["uuid"].as_str().unwrap()), "{listed}");
}

#[test]
fn a_user_sees_mig_devices_without_their_placement() {
    let world = boards();
    world.sim("make", &["--gpu", "0", "--profile", "2g.20gb"]);
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb", "--no-ci"]);
    let seen_by_root = document(&world, &["list", "0"]);
    // Somebody who may read this machine's files, and has no state.
    let dir = world.path("m").parent().unwrap().to_owned();
    let open = run(Command::new("chmod").args(["-R", "a+rX"]).arg(&dir));
    assert!(open.status.success(), "{}", text(&open));
    let program = world.path("migctl");
    assert!(run(Command::new("cp").arg(binaries().join("migctl")).arg(&program)).status.success());
    let as_user = |args: &[&str]| {
        let mut command = Command::new(&program);
        run(command.arg("--config").arg(world.config()).args(args).uid(65534).gid(65534))
    };
    let output = as_user(&["list", "0", "--json"]);
    let listing: Value = serde_json::from_str(&stdout(&output)).unwrap();
    schema("list", &listing);
    assert_eq!(listing["privileged"], false);
    let [slice] = rows(&listing)[..] else { panic!("only what has a MIG device: {listing:#}") };
    let same = rows(&seen_by_root).into_iter().find(|row| row["profile"] == "2g.20gb").unwrap();
    for field in ["gi", "ci", "device", "uuid", "profile", "memory_total_mib", "sms", "engines"] {
        assert_eq!(slice[field], same[field], "{field}");
    }
    assert_eq!((&slice["start"], &slice["state"]), (&Value::Null, &Value::Null));
    let listed = stdout(&as_user(&["list"]));
    assert!(listed.contains(same["uuid"].as_str().unwrap()), "{listed}");
    assert!(listed.contains("no slices (those without a MIG device are shown to root only)"), "{listed}");
}

#[test]
fn what_the_driver_does_not_tell_is_left_out() {
    let world = boards();
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    for call in [
        "nvmlDeviceGetMemory*",
        "nvmlDeviceGetAttributes*",
        "nvmlDeviceGetCompute*",
        "nvmlDeviceGetMigDeviceHandleByIndex",
    ] {
        world.sim("fault", &["--call", call, "--fail", "UNKNOWN", "--times", "forever"]);
    }
    let listing = document(&world, &["list", "0"]);
    let row = rows(&listing)[0];
    for field in ["memory_used_mib", "ecc_errors", "device"] {
        assert_eq!(row[field], Value::Null, "{field}");
    }
    assert_eq!((&row["sms"], &row["memory_mib"], &row["state"]), (&json!(14), &json!(9728), &json!("foreign")));
    assert!(stdout(&world.migctl(&["list", "0"])).contains("- / 9728"));
}

#[test]
fn a_process_cannot_colour_the_terminal_by_its_name() {
    let world = boards();
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let gi = world.instances()[0]["id"].to_string();
    let odd = world.path("\u{1b}[31mred");
    std::fs::copy("/bin/sleep", &odd).unwrap();
    let mut process = Command::new(&odd).arg("600").spawn().unwrap();
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &process.id().to_string()]);
    wait_for("the process's name", Duration::from_secs(5), || {
        document(&world, &["list", "0"])["gpus"][0]["slices"][0]["processes"][0]["name"] == "[31mred"
    });
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_terminal_gets_colours_and_a_pipe_does_not() {
    let world = boards();
    world.sim("make", &["--gpu", "0", "--profile", "1g.10gb"]);
    let plain = stdout(&world.migctl(&["list"]));
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    let coloured = |variables: &[(&str, &str)]| {
        let migctl = format!("{} --config {} list", binaries().join("migctl").display(), world.config().display());
        let mut command = Command::new("script");
        command.args(["-qec", &migctl, "/dev/null"]).env("TERM", "xterm-256color").env_remove("NO_COLOR");
        stdout(&run(command.envs(variables.iter().copied())))
    };
    let shown = coloured(&[]);
    assert!(shown.contains("\u{1b}[33mforeign\u{1b}[0m"), "{shown:?}");
    assert!(!coloured(&[("NO_COLOR", "1")]).contains('\u{1b}'));
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
