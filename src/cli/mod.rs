//! `migctl`: argv, stdout and exit codes of the command for people and scripts. One verb a file.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::config::Settings;
use crate::report::{self, Exit};

mod cdi;
mod completions;
mod configure;
mod gc;
mod leases;
mod list;
mod release;

/// Version of every verb's `--json` document.
const JSON_VERSION: u32 = 1;

/// See and free the MIG slices that containers hold, and make engines give them.
#[derive(Debug, Parser)]
#[command(name = "migctl", version, max_term_width = 100)]
pub struct Args {
    /// Settings file [default: /etc/mig-hook/config.toml, which may be missing]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print a JSON document instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show GPUs, the slices on them, and who holds which
    List,
    /// Show what is recorded of each holder
    Leases,
    /// Give back the slices of a container that has ended
    Release(release::Args),
    /// Free what nobody holds any more, and finish what was interrupted
    Gc,
    /// Print or write the CDI spec of the slices that a container may name
    Cdi(cdi::Args),
    /// Register mig-hook with a container engine, or take it out again
    Configure(configure::Args),
    /// Print the script that makes a shell complete migctl's command line
    Completions(completions::Args),
}

/// Parses the command line, runs the verb, and turns the outcome into an exit code.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            return ExitCode::from(code as u8);
        }
    };
    match run(&args) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(error) => {
            eprintln!("migctl: {}", report::sentence(&error));
            ExitCode::from(report::exit_code(&error) as u8)
        }
    }
}

fn run(args: &Args) -> Result<Exit> {
    let settings = || -> Result<Settings> {
        let settings = Settings::load(args.config.as_deref())?;
        report::start_logging(&settings, true);
        Ok(settings)
    };
    match &args.verb {
        Verb::List => list::run(&settings()?, args.json),
        Verb::Leases => leases::run(&settings()?, args.json),
        Verb::Release(verb) => release::run(&settings()?, verb, args.json),
        Verb::Gc => gc::run(&settings()?, args.json),
        // A CDI spec is JSON in any case.
        Verb::Cdi(verb) => cdi::run(&settings()?, verb),
        Verb::Configure(verb) => configure::run(&settings()?, verb, args.json),
        // Works whatever is in the settings.
        Verb::Completions(verb) => completions::run(verb, args.json),
    }
}

/// A verb's document with its version.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Document<'a, T: Serialize> {
    /// Another number says that something here has changed its meaning or has gone.
    #[cfg_attr(test, schemars(extend("const" = JSON_VERSION)))]
    version: u32,
    #[serde(flatten)]
    body: &'a T,
}

/// Prints a document as JSON, or as the text that is a view of it.
fn print<T: Serialize>(body: &T, json: bool, text: impl Fn(&T) -> String) -> Result<()> {
    let mut shown = match json {
        true => serde_json::to_string_pretty(&Document { version: JSON_VERSION, body })?,
        false => text(body),
    };
    if !shown.is_empty() && !shown.ends_with('\n') {
        shown.push('\n');
    }
    write(shown.as_bytes())
}

/// Writes to standard output. A closed pipe (`| head`) is no error.
fn write(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// The word of a state, as the JSON documents spell it.
fn word<T: Serialize>(state: T) -> String {
    serde_json::to_value(state).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Rows in columns as wide as their widest cell, two spaces apart.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Milliseconds as `45s`, `12m`, `3h05m`, `2d04h`.
fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m"),
        (0, hours, minutes) => format!("{hours}h{minutes:02}m"),
        (days, hours, _) => format!("{days}d{hours:02}h"),
    }
}

#[cfg(test)]
mod schema;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn durations_and_columns() {
        assert_eq!(duration(45_000), "45s");
        assert_eq!(duration(3_900_000), "1h05m");
        assert_eq!(duration(187_200_000), "2d04h");
        assert_eq!(table(&[vec!["a".into(), "b".into()], vec!["ccc".into(), "d".into()]]), "a    b\nccc  d\n");
    }
}
