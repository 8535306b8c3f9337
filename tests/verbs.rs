//! `migctl` as shipped, on a simulated machine: a module a verb. Every `--json` document is held against
//! docs/schema/VERB.json, and what people see against tests/verbs/snapshots.
//!
//! After a change that is meant: `INSTA_UPDATE=always cargo test --test verbs` rewrites the snapshots, `UPDATE_SCHEMAS=1
//! cargo test --lib cli::schema` the schemas. Read the difference before you commit it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "verbs/apply.rs"]
mod apply;
#[path = "verbs/assert.rs"]
mod assert;
#[path = "verbs/cdi.rs"]
mod cdi;
#[path = "verbs/command_line.rs"]
mod command_line;
mod common;
#[path = "verbs/completions.rs"]
mod completions;
#[path = "verbs/configure.rs"]
mod configure;
#[path = "verbs/doctor.rs"]
mod doctor;
#[path = "verbs/documented.rs"]
mod documented;
#[path = "verbs/export.rs"]
mod export;
#[path = "verbs/gc.rs"]
mod gc;
#[path = "verbs/history.rs"]
mod history;
#[path = "verbs/job.rs"]
mod job;
#[path = "verbs/leases.rs"]
mod leases;
#[path = "verbs/list.rs"]
mod list;
#[path = "verbs/map.rs"]
mod map;
#[path = "verbs/metrics.rs"]
mod metrics;
#[path = "verbs/old_drivers.rs"]
mod old_drivers;
#[path = "verbs/own_board.rs"]
mod own_board;
#[path = "verbs/plan.rs"]
mod plan;
#[path = "verbs/profiles.rs"]
mod profiles;
#[path = "verbs/queue.rs"]
mod queue;
#[path = "verbs/release.rs"]
mod release;
#[path = "verbs/run.rs"]
mod run;
#[path = "verbs/slurm.rs"]
mod slurm;
#[path = "verbs/top.rs"]
mod top;

#[path = "verbs/adopt.rs"]
mod adopt;
#[path = "verbs/cordon.rs"]
mod cordon;
#[path = "verbs/create.rs"]
mod create;
#[path = "verbs/destroy.rs"]
mod destroy;
#[path = "verbs/drain.rs"]
mod drain;
#[path = "verbs/from_nvidia_smi.rs"]
mod from_nvidia_smi;
#[path = "verbs/habits.rs"]
mod habits;
#[path = "verbs/mode.rs"]
mod mode;
#[path = "verbs/reserve.rs"]
mod reserve;
#[path = "verbs/uncordon.rs"]
mod uncordon;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{World, binaries, config, text};
use serde_json::{Value, json};

/// A file of this repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A config that asks for slices by annotation.
fn asked(profile: &str) -> Value {
    config(json!({"mig.profile": profile}), &[])
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

/// What a call that must succeed without a complaint has printed.
fn stdout(output: &Output) -> String {
    assert_eq!(code(output), 0, "{}", text(output));
    assert!(output.stderr.is_empty(), "{}", text(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Where a document is not what its verb's schema says.
fn faults(verb: &str, document: &Value) -> Vec<String> {
    let schema = common::document(&repository(&format!("docs/schema/{verb}.json")));
    let validator = jsonschema::validator_for(&schema).unwrap();
    validator.iter_errors(document).map(|error| format!("at {:?}: {error}", error.instance_path().as_str())).collect()
}

/// Holds a verb's document against its schema.
fn schema(verb: &str, document: &Value) {
    let faults = faults(verb, document);
    assert!(faults.is_empty(), "not what docs/schema/{verb}.json says: {faults:#?}\n{document:#}");
}

/// The document of a verb that must succeed, held against its schema.
fn document(world: &World, args: &[&str]) -> Value {
    let document = world.document(args);
    schema(args[0], &document);
    document
}

/// A call and what comes of it, as a terminal would show it, with the exit code where it is not 0.
fn shown(world: &World, args: &[&str]) -> String {
    let output = world.migctl(args);
    let exit = match code(&output) {
        0 => String::new(),
        code => format!("[exit {code}]\n"),
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("$ migctl {}\n{stdout}{stderr}{exit}", args.join(" "))
}

/// Holds a text against tests/verbs/snapshots/NAME.snap, less what differs from run to run: this machine's directory,
/// where our binaries are, lease tokens, durations, pids. `World::with(boards, &["--seed", "x"])` has the same UUIDs
/// every time.
fn snapshot(world: &World, name: &str, text: &str) {
    let machine = world.path("m").parent().unwrap().display().to_string();
    let text = text.replace(&machine, "[world]").replace(&binaries().display().to_string(), "[bin]");
    let mut settings = insta::Settings::new();
    settings.set_snapshot_path("verbs/snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    // As wide as a token, so that columns stay columns.
    settings.add_filter(r"\b[0-9a-f]{32}\b", "<------------ token ----------->");
    settings.add_filter(r"\b(\d+d\d\dh|\d+h\d\dm|\d+m|\d+s)\b", "[time]");
    settings.add_filter(r"\bpid \d+", "pid [pid]");
    settings.bind(|| insta::assert_snapshot!(name, text));
}
