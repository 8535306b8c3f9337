//! `migctl completions`: what makes a shell complete migctl's verbs, options and values.

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::report::{Exit, Misused};

/// Arguments of `migctl completions`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell that is to read it
    shell: Shell,
}

/// Shells that people of Linux servers have.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(super) fn run(args: &Args, json: bool) -> Result<Exit> {
    if json {
        bail!(Misused("completions prints a shell's script and has no JSON document; leave --json out".into()));
    }
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "migctl", &mut script);
    super::write(&script)?;
    Ok(Exit::Ok)
}
