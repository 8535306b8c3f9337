//! What `mig-hook` and `mig-runtime` become when there is something to do. Not for people.
#![no_main]

use std::ffi::OsString;

use mig_hook::handover::Sigpipe;
use mig_hook::report::{self, Exit};
use mig_hook::{hook, shim};

mig_hook::entry!(run);

/// `mig-engine WAY ARGS…`
fn run(args: Vec<OsString>) -> i32 {
    let pipe = Sigpipe::ignore();
    report::report_panics();
    let rest = args.get(2..).unwrap_or_default();
    match args.get(1).and_then(|way| way.to_str()) {
        Some("hook") => hook::main(rest) as i32,
        Some("shim") => shim::main(rest.to_vec(), pipe),
        Some("--version") => {
            println!("mig-engine {}", mig_hook::first::VERSION);
            Exit::Ok as i32
        }
        _ => {
            eprintln!("mig-engine is started by mig-hook and mig-runtime, not by hand; see migctl --help");
            Exit::Usage as i32
        }
    }
}
