//! `migctl top`: one look as text and as a document, and the screen in a real terminal.

use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portable_pty::{Child, CommandBuilder, ExitStatus, MasterPty, PtySize, SlavePty, native_pty_system};
use serde_json::{Value, json};

use crate::common::{Init, World, binaries, text, wait_for};
use crate::map::{keep, migctl, podman};
use crate::{code, document, schema, snapshot, stdout};

const PATIENCE: Duration = Duration::from_secs(30);

/// An H100 and an A100, each with a container, and something running in them.
fn busy() -> (World, Init) {
    let world = World::with(&["h100-sxm-80gb", "a100-sxm4-80gb"], &["--seed", "top"]);
    world.recording_runtime(0);
    let trainer = podman(&world, "llama-finetune", &"ab12".repeat(16), "0", "3g.40gb");
    keep(&world, "1g.10gb", "0", "0");
    keep(&world, "2c.3g.40gb,1c.3g.40gb", "1", "0");
    let lease = world.leases().into_iter().find(|lease| lease["state"] == "active").unwrap();
    let gi = lease["slices"][0]["gi"].to_string();
    world.sim("load", &["--gpu", "0", "--gi", &gi, "--memory", "20000", "--sm", "75", "--dram", "40"]);
    world.sim("hold", &["--gpu", "0", "--gi", &gi, "--pid", &trainer.pid().to_string(), "--memory", "1536"]);
    (world, trainer)
}

#[test]
fn one_look_as_text() {
    let (world, trainer) = busy();
    let looked = stdout(&migctl(&world, &["top", "--once"], &[]));
    // Pids have their width from run to run: the words of that table, not its columns.
    let (picture, processes) = looked.split_at(looked.rfind("\n\n").unwrap());
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let processes: Vec<String> = processes.lines().map(words).collect();
    let processes = processes.join("\n").replace(&trainer.pid().to_string(), "[pid]");
    snapshot(&world, "top-once", &format!("{picture}{processes}"));
    assert_eq!(stdout(&migctl(&world, &["top"], &[])), looked, "without a terminal there is one look");
    let ascii = stdout(&migctl(&world, &["top", "--ascii", "1"], &[("COLUMNS", "40")]));
    assert!(ascii.is_ascii() && ascii.starts_with("GPU 1") && !ascii.contains("GPU 0"), "{ascii}");
}

#[test]
fn one_look_as_a_document() {
    let (world, trainer) = busy();
    let look = document(&world, &["top", "--once"]);
    let slices = look["slices"].as_array().unwrap();
    assert_eq!(slices.len(), 4, "two compute instances share one GPU instance: {look:#}");
    let held = slices.iter().find(|slice| slice["holder"] == "llama-finetune").unwrap();
    assert_eq!(
        (&held["memory_used_mib"], &held["sm_percent"], &held["dram_percent"]),
        (&json!(21536), &json!(75.0), &json!(40.0))
    );
    let process = &held["processes"][0];
    assert_eq!((&process["pid"], &process["name"]), (&json!(trainer.pid()), &json!("sleep")));
    assert_eq!(process["memory_mib"], 1536);
    for shared in slices.iter().filter(|slice| slice["gpu_index"] == 1) {
        assert_eq!(shared["sm_percent"], Value::Null, "Ampere does not tell");
        assert_eq!(shared["memory_used_mib"], 0);
    }
}

#[test]
fn documents_come_one_a_line_until_nobody_reads_them() {
    let (world, _trainer) = busy();
    let mut command = Command::new(binaries().join("migctl"));
    command.arg("--config").arg(world.config()).args(["top", "--json", "--interval", "100ms"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for n in 0..3 {
        let look: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        schema("top", &look);
        assert_eq!(look["slices"][0]["sm_percent"].is_null(), n == 0, "utilisation takes two looks: {look:#}");
    }
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn wrong_calls_say_what_is_wrong() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let output = migctl(&world, &["top", "--interval", "50ms"], &[]);
    assert!(code(&output) == 64 && text(&output).contains("the least is 100ms"), "{}", text(&output));
    let output = migctl(&world, &["top", "--interval", "soon"], &[]);
    assert!(code(&output) == 64 && text(&output).contains("--interval"), "{}", text(&output));
    let output = migctl(&world, &["top", "9"], &[]);
    assert!(code(&output) == 65 && text(&output).contains("no GPU here is 9"), "{}", text(&output));
}

fn size(columns: u16) -> NonZero<u16> {
    NonZero::new(columns).unwrap()
}

/// `migctl top` in a terminal of its own.
struct Terminal {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    keys: Box<dyn Write + Send>,
    screen: Arc<Mutex<vt100::Parser>>,
    /// Its modes before.
    modes: String,
    _slave: Box<dyn SlavePty + Send>,
}

impl Terminal {
    fn start(world: &World, rows: u16, cols: u16, args: &[&str]) -> Terminal {
        let pair = native_pty_system().openpty(PtySize { rows, cols, pixel_width: 0, pixel_height: 0 }).unwrap();
        let mut command = CommandBuilder::new(binaries().join("migctl"));
        command.args(["--config", world.config().to_str().unwrap(), "top", "--interval", "100ms"]);
        command.args(args);
        for variable in ["NO_COLOR", "COLUMNS", "LC_CTYPE", "LANG"] {
            command.env_remove(variable);
        }
        command.env("LC_ALL", "C.UTF-8");
        command.env("TERM", "xterm-256color");
        let modes = format!("{:?}", pair.master.get_termios());
        let child = pair.slave.spawn_command(command).unwrap();
        let (mut reader, keys) = (pair.master.try_clone_reader().unwrap(), pair.master.take_writer().unwrap());
        let screen = Arc::new(Mutex::new(vt100::Parser::new(size(rows), size(cols), 0)));
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..n]);
            }
        });
        Terminal { child, master: pair.master, keys, screen, modes, _slave: pair.slave }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    fn wait(&self, what: &str, done: impl Fn(&str) -> bool) {
        let until = std::time::Instant::now() + PATIENCE;
        while !done(&self.text()) {
            assert!(std::time::Instant::now() < until, "{what}: not on the screen:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn shows(&self, words: &str) {
        self.wait(words, |text| text.contains(words));
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn resize(&self, rows: u16, cols: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(size(rows), size(cols));
        self.master.resize(PtySize { rows, cols, pixel_width: 0, pixel_height: 0 }).unwrap();
    }

    /// The selected row of the table.
    fn selected(&self) -> String {
        self.text().lines().find(|line| line.starts_with('▶')).unwrap_or_default().to_owned()
    }

    /// Waits for its end, and holds the terminal against what it was.
    fn end(mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of top", PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(format!("{:?}", self.master.get_termios()), self.modes, "the modes are as before");
        wait_for("the last of the output", PATIENCE, || !self.screen.lock().unwrap().screen().alternate_screen());
        assert!(!self.screen.lock().unwrap().screen().hide_cursor(), "the cursor is back");
        status.unwrap()
    }
}

#[test]
fn the_screen_shows_what_changes_and_obeys_its_keys() {
    let (world, trainer) = busy();
    let mut top = Terminal::start(&world, 40, 90, &[]);
    top.shows("SM 75%, DRAM 40%");
    assert_ne!(format!("{:?}", top.master.get_termios()), top.modes, "keys come raw");
    let screen = top.text();
    for words in
        ["GPU 0  NVIDIA H100", "GPU 1  NVIDIA A100", "llama-finetune", "┏", "21/40 GiB", "q quit", "every 100ms"]
    {
        assert!(screen.contains(words), "{words} is not in\n{screen}");
    }
    let first = top.selected();
    assert!(first.contains("1g.10gb"), "{screen}");
    top.press("j");
    top.wait("the next slice", |_| top.selected().contains("3g.40gb"));
    top.shows(&trainer.pid().to_string());
    top.shows("sleep");
    top.press("\x1b[A"); // up
    top.wait("the slice before", |_| top.selected() == first);
    top.press("g");
    top.wait("the first of the next GPU", |_| top.selected().contains("2c.3g.40gb"));
    top.press("s");
    top.shows("sort: memory");
    top.wait("the fullest comes first", |text| {
        let mut rows = text.lines().skip_while(|line| !line.contains("PROFILE"));
        rows.nth(1).is_some_and(|row| row.contains("llama-finetune"))
    });
    top.press("?");
    top.shows("another slice");
    top.press("\x1b"); // Esc closes the help, and then ends
    top.wait("no help", |text| !text.contains("another slice"));

    top.press("p");
    top.shows("paused");
    drop(trainer);
    let held = world.leases().into_iter().find(|lease| lease["state"] == "active").unwrap();
    world.sim("unhold", &["--gpu", "0", "--gi", &held["slices"][0]["gi"].to_string()]);
    let freed = world.migctl(&["gc"]);
    assert!(freed.status.success(), "{}", text(&freed));
    std::thread::sleep(Duration::from_millis(500));
    assert!(top.text().contains("llama-finetune"), "paused");
    top.press("p");
    top.wait("its container has ended", |text| !text.contains("llama-finetune") && text.contains("free"));

    for (rows, cols) in [(24, 80), (5, 20), (1, 1), (60, 200), (24, 80)] {
        top.resize(rows, cols);
        std::thread::sleep(Duration::from_millis(200));
    }
    top.shows("q quit");
    top.wait("a bar as wide as the terminal", |text| text.lines().any(|line| line.chars().count() == 80));
    top.press("q");
    assert!(top.end().success());
}

#[test]
fn whatever_ends_it_leaves_the_terminal_as_it_was() {
    let (world, _trainer) = busy();
    for key in ["q", "\x03", "\x1b"] {
        let mut top = Terminal::start(&world, 24, 80, &[]);
        top.shows("PROFILE");
        top.press(key);
        assert!(top.end().success(), "{key:?}");
    }
    for signal in [nix::sys::signal::SIGTERM, nix::sys::signal::SIGHUP] {
        let top = Terminal::start(&world, 24, 80, &[]);
        top.shows("PROFILE");
        let pid = nix::unistd::Pid::from_raw(top.child.process_id().unwrap() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
        let status = top.end();
        assert!(status.signal().is_some(), "whoever waits sees the signal: {status:?}");
    }
}

#[test]
fn it_outlives_a_driver_that_fails_and_a_state_that_goes() {
    let (world, _trainer) = busy();
    let mut top = Terminal::start(&world, 30, 80, &[]);
    top.shows("llama-finetune");
    world.fault("nvmlDeviceGetHandleByIndex*", &["--times", "forever", "--fail", "GPU_IS_LOST"]);
    top.shows("the GPU is lost; it needs");
    assert!(top.text().contains("llama-finetune"), "the last look stays: {}", top.text());
    world.sim("clear-faults", &["--all"]);
    top.wait("looks again", |text| !text.contains("the GPU is lost") && text.contains("every 100ms"));
    // Whose they are is forgotten with it.
    std::fs::remove_dir_all(world.path("state")).unwrap();
    top.wait("all are foreign", |text| text.contains("foreign") && !text.contains("llama-finetune"));
    top.press("q");
    assert!(top.end().success());
}

#[test]
fn it_takes_no_lock() {
    let (world, _trainer) = busy();
    let mut top = Terminal::start(&world, 24, 80, &["--ascii"]);
    top.shows("PROFILE");
    assert!(top.text().is_ascii(), "{}", top.text());
    let descriptors = format!("/proc/{}/fd", top.child.process_id().unwrap());
    for _ in 0..50 {
        let open = std::fs::read_dir(&descriptors).unwrap().flatten().filter_map(|fd| fd.path().read_link().ok());
        let locks: Vec<_> = open.filter(|path| path.ends_with("state/lock")).collect();
        assert!(locks.is_empty(), "{locks:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nor does it wait for the lock of others.
    let lock = std::fs::File::open(world.path("state/lock")).unwrap();
    lock.lock().unwrap();
    assert!(stdout(&migctl(&world, &["top", "--once"], &[])).contains("llama-finetune"));
    top.press("q");
    assert!(top.end().success());
}
