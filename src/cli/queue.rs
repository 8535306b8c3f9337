//! `migctl queue`: those who wait for room, in the order of their arrival, and what each waits for.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Engine, Failure, Standing};
use crate::gpu::nvml::Nvml;
use crate::host;
use crate::lease::Way;
use crate::names::{self, Named};
use crate::queue::Ticket;
use crate::report::Exit;
use crate::request::Request;

/// Arguments of `migctl queue`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show who waits, first come first (this is what `migctl queue` alone does)
    List,
    /// Take one out of the line: its container is refused
    Cancel {
        /// Its number
        ticket: u64,
    },
}

/// The document of `migctl queue`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Queue {
    /// The ticket that was taken out of the line, for `cancel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    cancelled: Option<u64>,
    /// Those who wait, first come first; not for `cancel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting: Option<Vec<Row>>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    /// Its number. Greater ones came later; none comes again in this boot.
    ticket: u64,
    /// Its place in the line, from 1.
    position: usize,
    /// What is asked for, as the annotations that ask for the same.
    request: String,
    way: Way,
    /// For whom, in words for people: `trainer (docker)`.
    holder: String,
    /// Id of the container, where known.
    container: Option<String>,
    /// Its image, where the engine tells it.
    image: Option<String>,
    /// Login uid of who started it.
    uid: Option<u32>,
    /// How long it has waited.
    waited_ms: u64,
    /// After how long it is refused.
    left_ms: u64,
    /// How often a later one has started on GPUs that it could have used.
    overtaken: u32,
    /// How often that may be.
    limit: u32,
    /// Whether it was overtaken as often as may be: nobody behind it starts before it does.
    barrier: bool,
    /// What it waits for, in words; null when it is its turn.
    waits_for: Option<String>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let queue = match args.verb {
        Some(Verb::Cancel { ticket }) => match Engine::open(settings, &nvml)?.cancel(ticket)? {
            Some(ticket) => Queue { cancelled: Some(ticket.number), waiting: None },
            None => bail!(Failure::BadRequest(format!("nobody waits with ticket {ticket}; see migctl queue"))),
        },
        None | Some(Verb::List) => {
            let line = Engine::look(settings, &nvml).line()?;
            let rows = line.into_iter().enumerate().map(|(at, standing)| row(at + 1, standing)).collect();
            Queue { cancelled: None, waiting: Some(rows) }
        }
    };
    super::print(&queue, json, text)?;
    Ok(Exit::Ok)
}

fn row(position: usize, standing: Standing) -> Row {
    let Standing { ticket, is_barrier, waits_for } = standing;
    let who = ticket.held_by();
    let Ticket { number, request, holder, since_boot_ms, until_boot_ms, overtaken, limit, .. } = ticket;
    let named = match (&holder.bundle, &holder.container) {
        (Some(bundle), Some(container)) => names::look_up(bundle, container),
        _ => Named::default(),
    };
    let now = host::boot_ms();
    Row {
        ticket: number,
        position,
        request: Request { wait_s: None, ..request }.to_string(),
        way: holder.way,
        holder: super::holder::called(&named, who),
        container: holder.container,
        image: holder.image,
        uid: holder.uid,
        waited_ms: now.saturating_sub(since_boot_ms),
        left_ms: until_boot_ms.saturating_sub(now),
        overtaken,
        limit,
        barrier: is_barrier,
        waits_for,
    }
}

fn text(queue: &Queue) -> String {
    if let Some(ticket) = queue.cancelled {
        return format!("ticket {ticket} is taken out of the line");
    }
    let waiting = queue.waiting.as_deref().unwrap_or_default();
    if waiting.is_empty() {
        return "nobody waits".into();
    }
    let titles = ["", "TICKET", "REQUEST", "HOLDER", "WAY", "OVERTAKEN", "SINCE"].map(str::to_owned).to_vec();
    let mut rows = vec![titles];
    rows.extend(waiting.iter().map(columns));
    let reasons = waiting.iter().map(|row| format!("   {}\n", row.waits_for.as_deref().unwrap_or("it is its turn")));
    // Below each one, what it waits for.
    let reasons = std::iter::once(String::new()).chain(reasons);
    super::table(&rows).lines().zip(reasons).map(|(line, reason)| format!("{line}\n{reason}")).collect()
}

fn columns(row: &Row) -> Vec<String> {
    let barrier = if row.barrier { ", nobody passes" } else { "" };
    vec![
        row.position.to_string(),
        row.ticket.to_string(),
        row.request.clone(),
        row.holder.clone(),
        super::word(row.way),
        format!("{} of {}{barrier}", row.overtaken, row.limit),
        super::duration(row.waited_ms),
    ]
}
