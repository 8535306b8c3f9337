//! `migctl configure`: the files of the engines, in a directory of the test's own. Real engines read what it writes in
//! tests/containers/configured.rs.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::{self, World, binaries, installed, run, text};
use crate::{schema, shown, snapshot};
use serde_json::{Value, json};

/// An engine, and its file as somebody may have written it.
const ENGINES: [(&str, &str, &str); 4] = [
    ("docker", "docker/daemon.json", "{\n    \"log-driver\": \"journald\", \"x-unknown\": [1,2]\n}\n"),
    ("podman", "containers.conf.d/50-mig-hook.conf", "# mine\n[engine]\nruntime = \"runc\"\n"),
    ("containerd", "containerd/config.toml", "version = 2 # two\n\n[grpc]\n  gid = 0\n"),
    ("crio", "crio.conf.d/50-mig-hook.conf", "[crio.runtime]\n# none\nlog_level = \"info\"\n"),
];

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.0.path().join(relative)
    }

    fn write(&self, relative: &str, text: &str) -> PathBuf {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// What is in a directory, but for directories.
    fn files(&self) -> Vec<String> {
        let mut found = vec![];
        let mut open = vec![self.0.path().to_owned()];
        while let Some(dir) = open.pop() {
            for entry in dir.read_dir().unwrap().flatten() {
                match entry.path() {
                    path if path.is_dir() => open.push(path),
                    path => found.push(path.strip_prefix(self.0.path()).unwrap().display().to_string()),
                }
            }
        }
        found.sort();
        found
    }
}

fn configure(engine: &str, file: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(binaries().join("migctl"));
    command.env_remove("CONTAINERS_CONF");
    run(command.args(["configure", engine, "--file"]).arg(file).args(more))
}

/// The document of a call that must succeed.
fn document(engine: &str, file: &Path, more: &[&str]) -> Value {
    let output = configure(engine, file, &[more, &["--json"]].concat());
    assert!(output.status.success(), "{engine} {more:?}: {}", text(&output));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    schema("configure", &document);
    assert_eq!(document["engine"], engine);
    document
}

fn refused(engine: &str, file: &Path, more: &[&str], code: i32, words: &[&str]) {
    let before = std::fs::read(file).ok();
    let output = configure(engine, file, more);
    assert_eq!(output.status.code(), Some(code), "{engine} {more:?}: {}", text(&output));
    assert!(output.stdout.is_empty(), "{}", text(&output));
    for word in words {
        assert!(text(&output).contains(word), "{word:?} is not in: {}", text(&output));
    }
    assert_eq!(std::fs::read(file).ok(), before, "nothing was changed");
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn in_again_and_out_byte_for_byte() {
    for (engine, file, original) in ENGINES {
        let dir = Dir::new();
        let path = dir.write(file, original);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let shown = document(engine, &path, &["--dry-run"]);
        assert_eq!((&shown["outcome"], &shown["dry_run"]), (&json!("configured"), &json!(true)));
        assert!(shown["diff"].as_str().unwrap().contains("mig-runtime"), "{shown:#}");
        assert_eq!((dir.files(), read(&path).as_str()), (vec![file.to_owned()], original), "a dry run changes nothing");

        let done = document(engine, &path, &[]);
        assert_eq!(done["diff"], shown["diff"]);
        let after = read(&path);
        assert!(after.contains(binaries().join("mig-runtime").to_str().unwrap()), "{after}");
        let backup = PathBuf::from(done["backup"].as_str().unwrap());
        assert_eq!(read(&backup), original);
        for file in [&path, &backup] {
            assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640, "{}", file.display());
        }
        // A directory of drop-ins has no place for a file of another name: CRI-O reads them all.
        assert_eq!(backup.parent() == path.parent(), !file.contains(".d/"), "{}", backup.display());

        let modified = path.metadata().unwrap().ino();
        let again = document(engine, &path, &[]);
        assert_eq!((&again["outcome"], &again["diff"]), (&json!("unchanged"), &json!("")));
        assert_eq!((path.metadata().unwrap().ino(), read(&path)), (modified, after), "nothing is written again");
        assert_eq!(dir.files().len(), 2);

        let shown = document(engine, &path, &["--remove", "--dry-run"]);
        assert_eq!(shown["outcome"], "restored");
        assert_eq!(document(engine, &path, &["--remove"])["diff"], shown["diff"]);
        assert_eq!((dir.files(), read(&path).as_str()), (vec![file.to_owned()], original));
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(document(engine, &path, &["--remove"])["outcome"], "absent");
    }
}

#[test]
fn no_file_before_is_no_file_after() {
    for (engine, file, _) in ENGINES {
        let dir = Dir::new();
        let path = dir.path(file); // its directory is missing, too
        assert_eq!(document(engine, &path, &[])["backup"], Value::Null);
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o644);
        assert_eq!(document(engine, &path, &[])["outcome"], "unchanged");
        assert_eq!(document(engine, &path, &["--remove"])["outcome"], "restored");
        assert_eq!(dir.files(), Vec::<String>::new());
        assert_eq!(document(engine, &path, &["--remove"])["outcome"], "absent");
        refused(engine, &dir.path("a/b/c"), &[], 74, &["is the engine installed"]);
    }
}

#[test]
fn what_others_have_changed_since_stays() {
    for (engine, file, original) in ENGINES {
        let dir = Dir::new();
        let path = dir.write(file, original);
        document(engine, &path, &[]);
        let (from, to) = match engine {
            "docker" => ("journald", "json-file"),
            "podman" => ("# mine", "# theirs"),
            "containerd" => ("gid = 0", "gid = 7"),
            _ => ("info", "debug"),
        };
        let changed = read(&path).replace(from, to);
        std::fs::write(&path, &changed).unwrap();
        assert_eq!(document(engine, &path, &[])["outcome"], "unchanged");
        assert_eq!(read(&path), changed);
        let done = document(engine, &path, &["--remove"]);
        assert_eq!(done["outcome"], "removed");
        assert!(done["notes"][0].as_str().unwrap().contains("only what mig-hook needs"), "{done:#}");
        let after = read(&path);
        assert!(after.contains(to) && !after.contains("mig-runtime"), "{engine}: {after}");
        assert_eq!(dir.files(), [file]);
    }
}

#[test]
fn other_options_later_are_another_edit_of_the_same_original() {
    let dir = Dir::new();
    let original = "{\"default-runtime\": \"runc\"}";
    let path = dir.write("daemon.json", original);
    document("docker", &path, &[]);
    let entry = |path: &Path| common::document(path)["runtimes"]["mig"].clone();
    assert_eq!(entry(&path)["runtimeArgs"][0], "--mig-env");
    let done = document("docker", &path, &["--default"]);
    assert!(done["notes"][0].as_str().unwrap().contains("was runc"), "{done:#}");
    assert_eq!(common::document(&path)["default-runtime"], "mig");
    assert!(!read(&path).contains("--mig-env"), "an image's ENV must not count in a default runtime");
    assert_eq!(document("docker", &path, &["--default"])["outcome"], "unchanged");
    document("docker", &path, &[]);
    assert_eq!(common::document(&path)["default-runtime"], "runc");
    assert_eq!(read(&dir.path("daemon.json.mig-hook.bak")), original);
    // The runtime of those who choose it and the one of all the others.
    document("docker", &path, &["--name", "all", "--default"]);
    assert_eq!(common::document(&path)["default-runtime"], "all");
    assert_eq!(entry(&path)["runtimeArgs"][0], "--mig-env");
    assert_eq!(read(&dir.path("daemon.json.mig-hook.bak")), original);
    assert_eq!(document("docker", &path, &[])["outcome"], "unchanged");
    document("docker", &path, &["--default"]);
    assert_eq!(common::document(&path)["default-runtime"], "mig");
    document("docker", &path, &["--name", "all", "--default"]);
    assert_eq!(common::document(&path)["default-runtime"], "all");
    assert_eq!(document("docker", &path, &["--remove"])["outcome"], "removed");
    assert_eq!(common::document(&path)["runtimes"].as_object().unwrap().len(), 1);
    assert_eq!(document("docker", &path, &["--remove", "--name", "all"])["outcome"], "restored");
    assert_eq!((read(&path).as_str(), dir.files().len()), (original, 1));
}

#[test]
fn an_entry_made_by_hand_is_taken_over_and_out() {
    let dir = Dir::new();
    let by_hand =
        "{ \"runtimes\": { \"mig\": { \"path\": \"/usr/bin/mig-runtime\", \"runtimeArgs\": [\"--mig-env\"] } } }\n";
    let path = dir.write("daemon.json", by_hand);
    assert_eq!(document("docker", &path, &[])["outcome"], "configured");
    assert_eq!(read(&dir.path("daemon.json.mig-hook.bak")), by_hand);
    // Beside another of migctl's it counts as part of the file.
    let args = ["--name", "other"];
    document("docker", &path, &args);
    assert_eq!(document("docker", &path, &[])["outcome"], "unchanged");
    assert_eq!(document("docker", &path, &[&["--remove"][..], &args].concat())["outcome"], "removed");
    // The file as it was had an entry of ours: putting it back would remove nothing.
    assert_eq!(document("docker", &path, &["--remove"])["outcome"], "removed");
    assert_eq!((common::document(&path), dir.files()), (json!({"runtimes": {}}), vec!["daemon.json".to_owned()]));
    std::fs::write(&path, by_hand).unwrap();
    document("docker", &path, &args);
    assert_eq!(document("docker", &path, &[&["--remove"][..], &args].concat())["outcome"], "restored");
    assert_eq!((read(&path).as_str(), dir.files().len()), (by_hand, 1));
}

#[test]
fn the_low_level_runtime_is_pinned() {
    let dir = Dir::new();
    let program = dir.write("bin/chained", "#!/bin/sh\n");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let program = program.to_str().unwrap();
    let file = json!({"runtimes": {"nvidia": {"path": program}, "argued": {"path": program, "runtimeArgs": ["-x"]}}});
    let path = dir.write("daemon.json", &file.to_string());
    let args = || common::document(&path)["runtimes"]["mig"]["runtimeArgs"].clone();
    document("docker", &path, &["--runtime", "nvidia"]);
    assert_eq!(args(), json!(["--mig-env", format!("--mig-runtime={program}")]));
    let settings = dir.write("own.toml", &format!("[runtime]\npath = \"{program}\"\n"));
    document("docker", &path, &["--config", settings.to_str().unwrap()]);
    let config = format!("--mig-config={}", settings.display());
    assert_eq!(args(), json!(["--mig-env", format!("--mig-runtime={program}"), config]));
    let shim = binaries().join("mig-runtime");
    for (given, words) in [
        ("argued", &["runtimeArgs", "script"][..]),
        ("nonsense", &["no low-level runtime nonsense"]),
        ("/nonexistent/runc", &["/nonexistent/runc", "absolute path"]),
        ("./runc", &["absolute path"]),
        (shim.to_str().unwrap(), &["mig-runtime itself"]),
    ] {
        let code = if given == "argued" { 65 } else { 64 };
        refused("docker", &path, &["--runtime", given], code, words);
    }
    // Engines that hand on no options: the settings must say it.
    for engine in ["podman", "containerd", "crio"] {
        let path = dir.path("new.conf");
        refused(engine, &path, &["--runtime", program], 64, &["[runtime] path", program, "/etc/mig-hook/config.toml"]);
        refused(engine, &path, &["--config", settings.to_str().unwrap()], 64, &["without options", "--config"]);
        refused(engine, &path, &["--default"], 64, &["docker only"]);
    }
}

#[test]
fn wrong_files_and_names_are_said() {
    let dir = Dir::new();
    for (engine, bad, words) in [
        ("docker", "{\n \"a\": 1,\n}", &["daemon.json", "line 3", "JSON"][..]),
        ("docker", "{}\n// no comments in docker's JSON", &["line 2"]),
        ("podman", "[engine]\nhooks_dir = [", &["line 2", "TOML"]),
        ("containerd", "disabled_plugins = [\"cri\"]\n", &["version 1", "containerd config migrate"]),
        ("crio", "x\n", &["line 1", "TOML"]),
        ("docker", r#"{"runtimes": {"mig": {"path": "/opt/other"}}}"#, &["another's", "/opt/other", "--name"]),
    ] {
        let path = dir.write("daemon.json", bad);
        for more in [&[][..], &["--dry-run"], &["--remove"]] {
            refused(engine, &path, more, 65, words);
        }
    }
    let path = dir.write("daemon.json", "{}");
    for name in ["runc", "", "a/b", ".."] {
        refused("docker", &path, &["--name", name], 64, &["--name"]);
    }
    for more in [&["--remove", "--default"][..], &["--remove", "--runtime", "runc"], &["extra"]] {
        refused("docker", &path, more, 64, &["Usage"]);
    }
    refused("lxc", &path, &[], 64, &["docker", "podman", "containerd", "crio"]);
    std::fs::write(&path, [0x7b, 0xff, 0x7d]).unwrap();
    refused("docker", &path, &[], 65, &["UTF-8"]);
    refused("docker", Path::new("/dev"), &[], 74, &["/dev"]);
}

#[test]
fn a_link_stays_a_link_and_line_ends_stay() {
    let dir = Dir::new();
    let real = dir.write("real/daemon.json", "{\r\n\t\"debug\": true\r\n}");
    symlink("real/daemon.json", dir.path("daemon.json")).unwrap();
    document("docker", &dir.path("daemon.json"), &[]);
    assert!(dir.path("daemon.json").is_symlink());
    assert_eq!(dir.files(), ["daemon.json", "real/daemon.json", "real/daemon.json.mig-hook.bak"]);
    let after = read(&real);
    assert!(after.matches('\n').count() > 3 && !after.ends_with('\n'), "{after:?}");
    assert_eq!(after.matches('\n').count(), after.matches("\r\n").count());
    document("docker", &dir.path("daemon.json"), &["--remove"]);
    assert_eq!(read(&real), "{\r\n\t\"debug\": true\r\n}");
    symlink("nowhere", dir.path("dangling")).unwrap();
    refused("docker", &dir.path("dangling"), &[], 74, &["dangling"]);
}

#[test]
fn a_user_may_look_and_not_touch() {
    if !nix::unistd::geteuid().is_root() || !installed("setpriv") {
        return common::skip("a_user_may_look_and_not_touch", "needs root and setpriv");
    }
    let dir = Dir::new();
    let path = dir.write("daemon.json", "{}\n");
    std::fs::set_permissions(dir.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let as_user = |more: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(binaries().join("migctl"));
        run(command.args(["configure", "docker", "--file"]).arg(&path).args(more))
    };
    let shown = as_user(&["--dry-run"]);
    if text(&shown).contains("setpriv: failed to execute") {
        return common::skip("a_user_may_look_and_not_touch", "the binaries are where no user may go");
    }
    assert!(shown.status.success() && text(&shown).contains("+    \"mig\""), "{}", text(&shown));
    let output = as_user(&[]);
    assert_eq!(output.status.code(), Some(77), "{}", text(&output));
    assert!(text(&output).contains("daemon.json") && text(&output).contains("run this as root"), "{}", text(&output));
    assert_eq!((read(&path).as_str(), dir.files()), ("{}\n", vec!["daemon.json".to_owned()]));
}

#[test]
fn podman_is_told_what_stands_in_the_way() {
    let dir = Dir::new();
    dir.write("containers.conf", "[engine]\nhooks_dir = [\"/opt/a\"]\n");
    dir.write("containers.conf.d/10.conf", "[engine]\nhooks_dir = [\"/opt/b\"]\n");
    dir.write("containers.conf.d/20.txt", "no configuration");
    dir.write("containers.conf.d/99.conf", "[engine]\nhooks_dir = [\"/opt/c\"]\n");
    let path = dir.path("containers.conf.d/50-mig-hook.conf");
    let done = document("podman", &path, &[]);
    let file: toml::Table = read(&path).parse().unwrap();
    let hooks = file["engine"]["hooks_dir"].as_array().unwrap();
    assert_eq!((hooks.len(), hooks[0].as_str()), (2, Some("/opt/b")), "what is in effect here stays: {hooks:?}");
    let notes = done["notes"].to_string();
    for part in ["99.conf is read later", "make install", "users' own podman"] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    let mut command = Command::new(binaries().join("migctl"));
    command.env("CONTAINERS_CONF", "/x.conf").args(["configure", "podman", "--file"]).arg(&path);
    assert!(text(&run(&mut command)).contains("CONTAINERS_CONF=/x.conf is set here"));
}

#[test]
fn text_is_for_people() {
    let dir = Dir::new();
    let path = dir.write("daemon.json", "{}\n");
    let shown = path.display();
    let said = |more: &[&str]| {
        let output = configure("docker", &path, more);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(said(&["--dry-run"]).contains(&format!("{shown}: mig would be configured\n")));
    let done = said(&[]);
    assert!(done.starts_with(&format!("--- {shown}\n+++ {shown}\n@@ ")), "{done}");
    assert!(
        done.ends_with(&format!(
            "{shown}: mig configured\nbefore: {shown}.mig-hook.bak\nnext: systemctl reload docker\n"
        )),
        "{done}"
    );
    assert_eq!(said(&[]), format!("{shown}: mig is already configured\n"));
    let out = said(&["--remove"]);
    // dockerd that reloads a file without runtimes keeps those it has.
    assert!(out.ends_with(&format!("{shown}: as it was before mig was configured\nnext: systemctl restart docker\n")));
    assert_eq!(said(&["--remove"]), format!("{shown}: mig is not configured, nothing to remove\n"));
}

#[test]
fn a_stale_backup_is_never_put_back() {
    let dir = Dir::new();
    let path = dir.write("daemon.json", "{\"a\": 1}");
    document("docker", &path, &[]);
    // Somebody took the entry out by hand and wrote another file.
    std::fs::write(&path, "{\"b\": 2}").unwrap();
    let absent = document("docker", &path, &["--remove"]);
    assert_eq!(absent["outcome"], "absent");
    assert!(absent["notes"][0].as_str().unwrap().contains("mig-hook.bak is left"), "{absent:#}");
    document("docker", &path, &[]);
    assert_eq!(read(&dir.path("daemon.json.mig-hook.bak")), "{\"b\": 2}");
    document("docker", &path, &["--remove"]);
    assert_eq!((read(&path).as_str(), dir.files().len()), ("{\"b\": 2}", 1));
    // The file is gone, the backup is not.
    document("docker", &path, &[]);
    std::fs::remove_file(&path).unwrap();
    refused("docker", &path, &[], 65, &["mig-hook.bak has what it was"]);
    assert_eq!(read(&dir.path("daemon.json.mig-hook.bak")), "{\"b\": 2}");
}

#[test]
fn what_people_see() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let file = world.write("daemon.json", "{\n  \"log-driver\": \"journald\"\n}\n").display().to_string();
    let configure = ["configure", "docker", "--file", file.as_str()];
    let done = shown(&world, &configure);
    let removed = shown(&world, &[&configure[..], &["--remove"]].concat());
    snapshot(&world, "configure", &format!("{done}\n{removed}"));
}
