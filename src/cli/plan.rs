//! `migctl plan`: what a container with a request would get and where, or why it would get nothing. Changes nothing.

use std::path::{Path, PathBuf};

use anstyle::Style;
use anyhow::{Result, bail};
use serde::Serialize;

use crate::bundle;
use crate::config::Settings;
use crate::engine::{
    self, Count, Engine, Failure, GpuRoom, HeldSlice, Keeps, Kind, Occupier, Outcome, Plan, Planned, Refusal,
};
use crate::gpu::nvml::Nvml;
use crate::gpu::{MigMode, Placement};
use crate::hook;
use crate::host::{self, Host};
use crate::inventory::Standing;
use crate::lease::{self, Way};
use crate::profile;
use crate::report::{self, Exit};
use crate::request::{self, Request, Want};
use crate::shim;

use super::holder::Holder;

const BOLD: Style = Style::new().bold();

/// Arguments of `migctl plan`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// 1g.10gb, 2x1g.10gb,3g.40gb, 2g.20gb|1g.20gb, 8GiB, MIG-…: as in mig.profile, mig.memory and mig.uuid
    #[arg(value_name = "REQUEST", required_unless_present = "file")]
    request: Option<String>,
    /// Which GPU, by index, UUID or PCI address, as in mig.gpu
    #[arg(long, value_name = "GPU", requires = "request")]
    gpu: Option<String>,
    /// Whose container it would be [default: the caller's]: slices reserved for this user count
    #[arg(long = "as", value_name = "USER|UID", value_parser = super::target::user)]
    user: Option<u32>,
    /// Take the request, by annotation or environment, from an OCI config.json, and check its device rules too
    #[arg(long, value_name = "FILE", conflicts_with = "request")]
    file: Option<PathBuf>,
}

/// The document of `migctl plan`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// The request, as annotations.
    request: String,
    /// What a container's create would end with, and what this command ends with: 0, 65, 75 or 77.
    exit_code: u8,
    #[serde(flatten)]
    plan: Plan,
    /// Who has something on the GPUs that may serve a request that does not fit.
    holders: Vec<HolderRow>,
}

#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct HolderRow {
    #[serde(flatten)]
    who: Holder,
    state: Standing,
    /// What it has.
    slices: Vec<HeldSlice>,
    /// What ends it, where migctl does.
    command: Option<String>,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let request = match (&args.request, &args.file) {
        (Some(text), _) => request::typed(text, args.gpu.as_deref())?,
        (None, Some(file)) => request_of(settings, file)?,
        (None, None) => bail!(Failure::BadRequest("there is no request to plan for".into())),
    };
    let uid = args.user.or_else(|| host::user(std::process::id()));
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::look(settings, &nvml);
    let all_is_shown = settings.rootless.is_some() || nix::unistd::geteuid().is_root();
    let plan = match all_is_shown {
        true => engine.plan(&request, uid)?,
        false => engine.plan_unprivileged(&request, uid)?,
    };
    if plan.outcome == Outcome::Fits {
        check_nodes(settings, &plan)?;
    }
    let exit = plan.failure().map_or(Exit::Ok, |failure| report::exit_code(&failure.into()));
    let holders = plan.holders.iter().map(holder_row).collect();
    let answer = Answer { request: request.to_string(), exit_code: exit as u8, plan, holders };
    super::print(&answer, json, |answer| text(answer, &request))?;
    Ok(exit)
}

/// The request in a container's config, when nothing else in that config stands against a slice.
fn request_of(settings: &Settings, file: &Path) -> Result<Request> {
    let shown = file.display().to_string();
    let config = bundle::parse(&bundle::read(file)?, &shown)?;
    let Some(request) = shim::requested(true, settings, &config.value)? else {
        bail!(Failure::BadRequest(format!("{shown} asks for no slice: its container starts without one")));
    };
    let mut value = config.certain(&shown)?;
    let mut holder = lease::Holder::new(Way::Shim);
    hook::describe(&mut holder, &value);
    hook::check(settings, &mut value, file.parent(), holder.cgroup.is_some(), Host::known_majors)?;
    Ok(request)
}

/// A user without root gets a slice that exists only where its nodes are there and their modes let that user open them.
fn check_nodes(settings: &Settings, plan: &Plan) -> Result<()> {
    if settings.rootless.is_none() || plan.existing.is_empty() {
        return Ok(());
    }
    let host = engine::host_of(settings);
    let majors = host.known_majors()?;
    // Only names what is missing: nobody makes a node in a user namespace.
    engine::make_host_nodes(&host, &plan.existing, majors)?;
    hook::check_modes(settings, &engine::nodes_of(&host, &plan.existing, majors))
}

fn holder_row(holder: &Occupier) -> HolderRow {
    let who = match &holder.lease {
        Some(lease) => Holder::of(lease),
        None => Holder { pid: holder.pid, ..Holder::default() },
    };
    HolderRow { who, state: holder.standing, slices: holder.slices.clone(), command: holder.command.clone() }
}

fn text(answer: &Answer, request: &Request) -> String {
    let plan = &answer.plan;
    let mut parts = match plan.outcome {
        Outcome::Fits => vec![fits(answer)],
        Outcome::Refused => refused(answer, request),
        Outcome::Unknown => vec![unknown(answer)],
    };
    parts.extend(freed_first(plan));
    parts.join("\n")
}

fn fits(answer: &Answer) -> String {
    let plan = &answer.plan;
    let mut out = format!("{} fits; a container would get\n", answer.request);
    let row = |slice: &Planned| {
        vec![
            format!("  {}", slice.profile),
            super::word(slice.source),
            format!("{}on GPU {} ({})", at(slice.placement), slice.gpu_index, slice.gpu_name),
            slice.gi.map_or(String::new(), |gi| format!("GI {gi}")),
            slice.uuid.clone().unwrap_or_default(),
        ]
    };
    let keeps = keeps(plan);
    let is_one = plan.slices.len() == 1;
    for slice in &plan.slices {
        out += &super::table(&[row(slice)]);
        let and_keeps = if is_one && !keeps.is_empty() { format!(": {}", keeps.join("; ")) } else { String::new() };
        out += &format!("    {}{and_keeps}\n", slice.why);
    }
    if !is_one {
        out += &keeps.iter().map(|part| format!("{part}.\n")).collect::<String>();
    }
    for passed in &plan.refused_alternatives {
        out += &format!("Not taken: {} ({}).\n", passed.wanted, super::word(passed.refusal.kind).replace('-', " "));
    }
    out
}

/// What stays possible where something is cut, and the largest slice that still fits on another GPU.
fn keeps(plan: &Plan) -> Vec<String> {
    let cut = |keeps: &Keeps| match keeps.profiles.as_slice() {
        [] => format!("GPU {} is full then", keeps.gpu_index),
        profiles => format!("GPU {} keeps room for {}", keeps.gpu_index, counted(profiles, "or")),
    };
    let mut parts: Vec<String> = plan.keeps.iter().map(cut).collect();
    let is_other = |gpu: &&GpuRoom| gpu.closed.is_none() && plan.keeps.iter().all(|keeps| keeps.gpu_index != gpu.index);
    let fitting = |gpu: &GpuRoom| {
        let fitting = gpu.profiles.iter().filter(|p| p.fits > Some(0) && !profile::has_attribute(&p.name));
        fitting.map(|p| (p.memory_mib, profile::compute_slices(&p.name), p.name.clone())).max()
    };
    let others: Vec<_> = plan.gpus.iter().filter(is_other).map(|gpu| (gpu.index, fitting(gpu))).collect();
    let largest = others.iter().filter_map(|(_, largest)| largest.as_ref()).max();
    if let (false, Some(largest)) = (parts.is_empty(), largest) {
        let there = others.iter().filter(|(_, fitting)| fitting.as_ref() == Some(largest));
        let indices: Vec<String> = there.map(|(index, _)| index.to_string()).collect();
        parts.push(format!("{} still fits on GPU {}", largest.2, indices.join(", ")));
    }
    parts
}

/// The reason, the offer or the room that there is, and what to do.
fn refused(answer: &Answer, request: &Request) -> Vec<String> {
    let plan = &answer.plan;
    let mut parts = vec![reasons(answer)];
    match plan.refusal.as_ref().map(|refusal| refusal.kind) {
        Some(Kind::NotOffered | Kind::NeverFits) => parts.extend([offer(plan), closed(plan)]),
        Some(Kind::NoRoom | Kind::Fragmented) => parts.extend([room(answer), closed(plan), ends(answer)]),
        Some(Kind::Held | Kind::InUse) => parts.push(ends(answer)),
        _ => {}
    }
    parts.extend(line(plan));
    parts.extend(fits_now(plan, request));
    parts.retain(|part| !part.is_empty());
    parts
}

/// Who else waits for room, and whether this one would.
fn line(plan: &Plan) -> Option<String> {
    let others = match plan.in_line {
        0 => None,
        1 => Some("One waits in line for room, and comes first: migctl queue\n".to_owned()),
        n => Some(format!("{n} wait in line for room, and come first: migctl queue\n")),
    };
    let own = plan.would_wait_s.map(|wait| format!("It would wait in line for up to {wait} s.\n"));
    let both: String = [others, own].into_iter().flatten().collect();
    (!both.is_empty()).then_some(both)
}

/// Why not, a line for each alternative; whose room it is comes below.
fn reasons(answer: &Answer) -> String {
    let plan = &answer.plan;
    match (plan.refused_alternatives.as_slice(), &plan.refusal) {
        ([], Some(refusal)) => why_not(&answer.request, refusal) + "\n",
        (alternatives, _) => alternatives.iter().map(|a| why_not(&a.wanted, &a.refusal) + "\n").collect(),
    }
}

fn why_not(wanted: &str, refusal: &Refusal) -> String {
    match refusal.kind {
        Kind::NoRoom => format!("{wanted} does not fit now: there is no room."),
        Kind::Fragmented => format!(
            "{wanted} does not fit now: the free room lies in pieces. Moved together, the running slices would leave enough."
        ),
        Kind::NeverFits => format!("{wanted} never fits: it is more than these GPUs hold with nothing else on them."),
        Kind::NotOffered => format!("{wanted} is offered by no GPU that may serve it."),
        _ => format!("A container would be refused: {}", refusal.sentence),
    }
}

/// What each GPU model offers.
fn offer(plan: &Plan) -> String {
    let mut models: Vec<(Vec<String>, &str, String)> = Vec::new();
    for gpu in &plan.gpus {
        let mut profiles: Vec<_> = gpu.profiles.iter().collect();
        profiles.sort_by_key(|p| (profile::compute_slices(&p.name), p.memory_mib, p.name.len()));
        let names: Vec<String> = profiles.iter().map(|p| format!("{}x {}", p.total, p.name)).collect();
        let offered = match (names.is_empty(), gpu.mig) {
            (false, _) => names.join(", "),
            (true, MigMode::Unsupported) => "no MIG".into(),
            (true, MigMode::On | MigMode::DisablePending) => "no profile that containers may ask for".into(),
            (true, MigMode::Off | MigMode::EnablePending) => "MIG mode is off".into(),
        };
        match models.iter_mut().find(|(_, name, theirs)| *name == gpu.name && *theirs == offered) {
            Some((indices, ..)) => indices.push(gpu.index.to_string()),
            None => models.push((vec![gpu.index.to_string()], &gpu.name, offered)),
        }
    }
    let row = |(indices, name, offered): &(Vec<String>, &str, String)| {
        vec![format!("  GPU {}", indices.join(", ")), (*name).to_owned(), offered.clone()]
    };
    let rows: Vec<Vec<String>> = models.iter().map(row).collect();
    if rows.is_empty() { String::new() } else { format!("Offered:\n{}", super::table(&rows)) }
}

/// Each GPU that may serve the request, with what is free and who holds the rest.
fn room(answer: &Answer) -> String {
    let mut out = String::new();
    for gpu in answer.plan.gpus.iter().filter(|gpu| gpu.closed.is_none()) {
        let free = gpu.free_memory_slices.zip(gpu.memory_slices);
        let free = free.map(|(free, slices)| format!("  {free} of {slices} memory slices free")).unwrap_or_default();
        let title = super::styled(BOLD, &format!("GPU {}  {}", gpu.index, gpu.name));
        out += &format!("{title}{free}\n{}", super::table(&rows_on(&answer.holders, gpu.index)));
    }
    out
}

/// The GPUs that an administrator could open.
fn closed(plan: &Plan) -> String {
    let closed = plan.gpus.iter().filter_map(|gpu| gpu.closed.as_ref()).filter(|closed| closed.kind != Kind::NoGpu);
    closed.map(|closed| format!("{}\n", closed.sentence)).collect()
}

fn rows_on(holders: &[HolderRow], gpu: u32) -> Vec<Vec<String>> {
    let slices = holders.iter().flat_map(|holder| holder.slices.iter().map(move |slice| (slice, holder)));
    let mut here: Vec<(&HeldSlice, &HolderRow)> = slices.filter(|(slice, _)| slice.gpu_index == gpu).collect();
    here.sort_by_key(|(slice, _)| slice.placement);
    let row = |(slice, holder): &(&HeldSlice, &HolderRow)| {
        let place = at(slice.placement).trim_end().to_owned();
        vec![format!("  {}", slice.profile), place, name(holder), holder.who.details()]
    };
    here.iter().map(row).collect()
}

/// Whose end would make it fit.
fn ends(answer: &Answer) -> String {
    let line = |set: &Vec<usize>| {
        let holders: Vec<&HolderRow> = set.iter().filter_map(|n| answer.holders.get(*n)).collect();
        let parts: Vec<String> = holders.chunk_by(|a, b| are_foreign_on_one_gpu(a, b)).map(end).collect();
        format!("  - {}\n", parts.join("\n    and "))
    };
    match answer.plan.ends.as_slice() {
        [] => String::new(),
        [set] => format!("It would fit after the end of\n{}", line(set)),
        sets => format!("It would fit after the end of one of\n{}", sets.iter().map(line).collect::<String>()),
    }
}

fn are_foreign_on_one_gpu(a: &HolderRow, b: &HolderRow) -> bool {
    let gpu = |row: &HolderRow| row.slices.first().map(|slice| slice.gpu_index);
    a.state == Standing::Foreign && b.state == Standing::Foreign && gpu(a) == gpu(b)
}

/// A holder with what it has, and what ends it; or several foreign slices of one GPU.
fn end(holders: &[&HolderRow]) -> String {
    let [holder] = holders else { return end_of_foreign(holders) };
    let slices = list(&holder.slices);
    let command = holder.command.as_ref().map(|command| format!(": {command}")).unwrap_or_default();
    match holder.state {
        Standing::Foreign | Standing::Static | Standing::Reserved => format!("{slices}, {}{command}", name(holder)),
        _ => format!("{}, which has {slices}{command}", name(holder)),
    }
}

/// `2x 1g.10gb and 3g.40gb on GPU 6, foreign: migctl destroy 6/7 6/8 6/2`.
fn end_of_foreign(holders: &[&HolderRow]) -> String {
    let slices: Vec<&HeldSlice> = holders.iter().flat_map(|holder| &holder.slices).collect();
    let mut counts: Vec<Count> = Vec::new();
    for slice in &slices {
        match counts.iter_mut().find(|one| one.profile == slice.profile) {
            Some(one) => one.count += 1,
            None => counts.push(Count { profile: slice.profile.clone(), count: 1 }),
        }
    }
    let gpu = slices.first().map_or(0, |slice| slice.gpu_index);
    let places: Vec<String> = slices.iter().filter_map(|slice| Some(format!("{gpu}/{}", slice.gi?))).collect();
    format!("{} on GPU {gpu}, foreign: migctl destroy {}", counted(&counts, "and"), places.join(" "))
}

fn name(holder: &HolderRow) -> String {
    let who = holder.who.holder.clone().unwrap_or_else(|| "foreign".into());
    match holder.state {
        Standing::Releasing => format!("{who}, which has ended"),
        Standing::Quarantined => format!("{who}, quarantined"),
        _ => who,
    }
}

fn list(slices: &[HeldSlice]) -> String {
    let one = |s: &HeldSlice| format!("{} {}on GPU {}", s.profile, at(s.placement), s.gpu_index);
    slices.iter().map(one).collect::<Vec<_>>().join(" and ")
}

fn fits_now(plan: &Plan, request: &Request) -> Option<String> {
    let largest = plan.fits_now.first()?;
    let names: Vec<&str> = plan.fits_now.iter().map(|one| one.profile.as_str()).collect();
    let by_memory = request.alternatives.iter().flatten().any(|want| matches!(want, Want::Memory { .. }));
    let amount = match by_memory {
        true => format!(", which is {} of memory", profile::format_size(largest.memory_mib << 20)),
        false => String::new(),
    };
    Some(format!("What fits now, at most: {}{amount}\n", names.join(" or ")))
}

fn unknown(answer: &Answer) -> String {
    let plan = &answer.plan;
    let why = plan.refusal.as_ref().map(|refusal| refusal.sentence.as_str()).unwrap_or_default();
    let open: Vec<String> =
        plan.gpus.iter().filter(|gpu| gpu.closed.is_none()).map(|gpu| gpu.index.to_string()).collect();
    format!(
        "Nothing speaks against {}: the settings allow it, and MIG mode is on (GPU {}). Whether it fits now can't be told:\n\
         {why}.\n\nRoot is shown all of it: sudo migctl plan. What rootless podman would get: podman unshare migctl plan\n",
        answer.request,
        open.join(", ")
    )
}

fn freed_first(plan: &Plan) -> Option<String> {
    let row =
        |freed: &engine::Freed| vec![format!("  {}", list(&freed.slices)), freed.name.clone(), freed.reason.clone()];
    let rows: Vec<Vec<String>> = plan.freed_first.iter().map(row).collect();
    (!rows.is_empty()).then(|| format!("Freed first:\n{}", super::table(&rows)))
}

/// `4g.40gb, 2x 2g.20gb or 5x 1g.10gb`.
fn counted(counts: &[Count], conjunction: &str) -> String {
    let names: Vec<String> = counts
        .iter()
        .map(|one| if one.count == 1 { one.profile.clone() } else { format!("{}x {}", one.count, one.profile) })
        .collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} {conjunction} {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// `at 4:4 `, or nothing where the driver does not show it.
fn at(placement: Placement) -> String {
    match placement == Placement::UNKNOWN {
        true => String::new(),
        false => format!("at {placement} "),
    }
}
