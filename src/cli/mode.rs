//! `migctl mode`: MIG mode of GPUs, and what stands in the way of changing it.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Changed, Client, Engine};
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Gpu, MigMode};
use crate::report::{Exit, Misused};

use super::target::{self, Named};

/// Agents that keep a GPU open, by the beginning of their name (the kernel keeps 15 characters), and what stops each. Those
/// of NVIDIA are named in its MIG guide; the units are those of its packages.
const AGENTS: [(&str, &str); 8] = [
    ("nv-hostengine", "systemctl stop nvidia-dcgm"),
    ("dcgm-exporter", "systemctl stop dcgm-exporter"),
    ("nvidia-persiste", "systemctl stop nvidia-persistenced"),
    ("nvsm", "systemctl stop nvsm"),
    ("nvidia_gpu_expo", "systemctl stop nvidia_gpu_exporter"),
    ("nvidia-cuda-mps", "echo quit | nvidia-cuda-mps-control"),
    ("Xorg", "systemctl isolate multi-user.target"),
    ("nvidia-device-p", "kubectl delete the node's pod of nvidia-device-plugin"),
];

/// Arguments of `migctl mode`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What to do
    to: To,
    /// Index, UUID or PCI address; or all. For status all of them by default
    #[arg(value_name = "GPU")]
    gpus: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    /// Turn MIG mode on
    On,
    /// Turn MIG mode off; refused while GPU instances are there
    Off,
    /// Only show it
    Status,
}

/// The document of `migctl mode`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// Those that were named.
    gpus: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Row {
    #[serde(flatten)]
    gpu: Named,
    /// As the driver reports it now.
    mig: MigMode,
    /// What became of the change; null for status.
    outcome: Option<Outcome>,
    /// Why it is not in effect.
    reason: Option<String>,
    /// Processes that are in the way of the change, or of the reset that it waits for.
    clients: Vec<Client>,
    /// What to do next, in this order.
    next: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// It was so already; nothing was done.
    Already,
    /// It is in effect.
    Done,
    /// It waits for a reset of the GPU.
    Pending,
    /// Clients are in the way.
    InUse,
    /// The driver did not do it.
    Refused,
}

/// Ends with 75 when a mode is not in effect yet, and with 69 when the driver did not change it.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let rows = match args.to {
        To::Status => status(&nvml, args)?,
        To::On => change(settings, &nvml, args, true)?,
        To::Off => change(settings, &nvml, args, false)?,
    };
    let answer = Answer { gpus: rows };
    super::print(&answer, json, text)?;
    let has = |wanted| answer.gpus.iter().any(|row| row.outcome == Some(wanted));
    Ok(match (has(Outcome::Refused), has(Outcome::InUse) || has(Outcome::Pending)) {
        (true, _) => Exit::Unavailable,
        (false, true) => Exit::NoRoom,
        (false, false) => Exit::Ok,
    })
}

/// Needs neither root nor state.
fn status(nvml: &Nvml, args: &Args) -> Result<Vec<Row>> {
    let devices = nvml.devices()?;
    let all = ["all".to_owned()];
    let found = target::find_gpus(&devices, if args.gpus.is_empty() { &all } else { &args.gpus })?;
    let row = |device: &Device| Row { next: to_reset(device), ..row(device, None) };
    Ok(found.into_iter().map(row).collect())
}

fn change(settings: &Settings, nvml: &Nvml, args: &Args, on: bool) -> Result<Vec<Row>> {
    if args.gpus.is_empty() {
        bail!(Misused("which GPU? Name it by its index, UUID or PCI address, or say all".into()));
    }
    let engine = Engine::open(settings, nvml)?;
    engine.clear_idle()?;
    let devices = engine.managed_gpus()?;
    let found = target::find_gpus(&devices, &args.gpus)?;
    if let Some(why) = found.iter().find_map(|device| engine.why_not_mode(device, on)) {
        return Err(why.into());
    }
    found.into_iter().map(|device| change_one(&engine, device, on)).collect()
}

fn change_one(engine: &Engine<'_>, device: &Device, on: bool) -> Result<Row> {
    let (changed, device) = engine.set_mode(&device.uuid, on)?;
    let word = if on { "on" } else { "off" };
    Ok(match changed {
        Changed::Already => row(&device, Some(Outcome::Already)),
        Changed::Done => row(&device, Some(Outcome::Done)),
        Changed::Refused(why) => Row { reason: Some(why), ..row(&device, Some(Outcome::Refused)) },
        Changed::Pending => {
            let clients = engine.clients(&device)?;
            let mut next = to_stop(&clients);
            next.extend(to_reset(&device));
            let reason = Some("this GPU changes its mode at a reset, or when the machine boots".into());
            Row { reason, clients, next, ..row(&device, Some(Outcome::Pending)) }
        }
        Changed::InUse(clients) => {
            let mut next = to_stop(&clients);
            match to_reset(&device) {
                reset if !reset.is_empty() => next.extend(reset),
                _ => next.push(format!("migctl mode {word} {}", device.index)),
            }
            let why = "the driver says that a client uses it".to_owned();
            let none = "; no process shows it: a container's or virtual machine's may";
            let reason = Some(if clients.is_empty() { why + none } else { why });
            Row { reason, clients, next, ..row(&device, Some(Outcome::InUse)) }
        }
    })
}

fn row(device: &Device, outcome: Option<Outcome>) -> Row {
    Row { gpu: Named::of(device), mig: device.mig, outcome, reason: None, clients: Vec::new(), next: Vec::new() }
}

/// What ends each client, as far as known; systemd tells the unit of the others.
fn to_stop(clients: &[Client]) -> Vec<String> {
    let stop = |client: &Client| match AGENTS.iter().find(|(name, _)| client.name.starts_with(name)) {
        Some((_, stop)) => (*stop).to_owned(),
        None => format!("end process {} ({}); systemctl status {0} names its unit", client.pid, client.name),
    };
    let mut commands: Vec<String> = clients.iter().map(stop).collect();
    commands.dedup();
    commands
}

/// What brings a pending mode into effect.
fn to_reset(device: &Device) -> Vec<String> {
    match device.mig {
        MigMode::EnablePending | MigMode::DisablePending => {
            vec![format!(
                "nvidia-smi --gpu-reset -i {}, which takes all slices of the GPU away; or a reboot",
                device.index
            )]
        }
        _ => Vec::new(),
    }
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    for row in &answer.gpus {
        let mode = match row.mig {
            MigMode::Unsupported => "has no MIG",
            MigMode::Off => "has MIG off",
            MigMode::On => "has MIG on",
            MigMode::EnablePending => "has MIG off, and on after a reset",
            MigMode::DisablePending => "has MIG on, and off after a reset",
        };
        let already = if row.outcome == Some(Outcome::Already) { " already" } else { "" };
        let reason = row.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        out += &format!("{} {mode}{already}{reason}\n", row.gpu.label());
        for client in &row.clients {
            out += &format!("  in the way: process {} ({})\n", client.pid, client.name);
        }
        for step in &row.next {
            out += &format!("  next: {step}\n");
        }
    }
    if out.is_empty() { "no NVIDIA GPU\n".into() } else { out }
}
