//! `migctl map`: a picture of each GPU's memory slices and who has them, for terminals and, as SVG, for documents.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Cordon, Cordons, is_managed, rooms};
use crate::gpu::nvml::Nvml;
use crate::gpu::{Gpu, Instance, MigMode, Placement, Profile};
use crate::host;
use crate::inventory::{self, Occupied, Standing, inventory};
use crate::lease::{self, Lease, Slice, Step, Way, short};
use crate::placement::{self, Room};
use crate::profile;
use crate::report::{Exit, Misused};
use crate::request::GpuSelector;

pub(super) mod bar;
mod svg;

use super::holder::Holder;
use bar::{Block, Canvas, Line, Look, Span};

/// Columns of a picture where nothing says how wide it may be.
const WIDTH: usize = 80;
/// Wider bars are hard to take in at a glance.
pub(super) const WIDEST: usize = 160;
/// Looks at leases and GPUs until no lease has changed meanwhile: else a slice that is just given looks foreign.
const LOOKS: usize = 3;

/// Arguments of `migctl map`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these GPUs, by index, UUID or PCI address [default: all]
    #[arg(value_name = "GPU", value_parser = super::gpu_selector)]
    gpus: Vec<GpuSelector>,
    /// Write the picture as SVG to a file, or to standard output with `-`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ascii", "color"])]
    svg: Option<PathBuf>,
    /// Draw with ASCII characters, as is done where the locale is not UTF-8
    #[arg(long)]
    ascii: bool,
    /// Colours; `auto`: on a terminal, unless NO_COLOR is set
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    color: When,
}

/// When there is colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum When {
    Auto,
    Always,
    Never,
}

/// The document of `migctl map`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Map {
    /// Of the NVIDIA driver.
    pub driver_version: String,
    /// Whether we are root: to others the driver shows no placements.
    pub privileged: bool,
    /// In the order of their PCI addresses.
    pub gpus: Vec<GpuMap>,
}

/// One GPU.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct GpuMap {
    /// NVML index. Not the minor.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// MIG mode now.
    pub mig: MigMode,
    /// False where the setting `limits.gpus` leaves it out.
    pub managed: bool,
    /// Closed to new holders.
    pub cordon: Option<Closed>,
    /// Memory slices as its driver counts them; 0 where there are none to see.
    pub memory_slices: u32,
    /// By start. Together they cover every memory slice once.
    pub windows: Vec<Window>,
    /// Windows that leases record where the driver has something else now.
    pub displaced: Vec<Window>,
    /// Slices whose place the driver hides from those who are not root.
    pub unplaced: Vec<Window>,
    /// What could be cut now, each profile by itself, largest first. Profiles with an attribute (`+me`) are left out, and
    /// those that the setting `limits.profiles` does not allow.
    pub fits: Vec<Fit>,
}

/// Why a GPU is closed to new holders.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Closed {
    /// In the administrator's words.
    pub reason: Option<String>,
    /// Milliseconds since 1970.
    pub since_ms: u64,
}

/// A profile that could be cut now.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Fit {
    /// Its name.
    pub profile: String,
    /// How many of it, if nothing else is cut.
    pub count: u32,
}

/// Some memory slices of a GPU, and what is there.
#[derive(Debug, Default, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Window {
    /// First memory slice.
    pub start: u32,
    /// Memory slices.
    pub size: u32,
    /// How it stands.
    pub state: State,
    /// `1g.10gb`, or `profile N` where the GPU does not list it; null for room.
    pub profile: Option<String>,
    /// Memory in MiB, where it is a slice.
    pub memory_mib: Option<u64>,
    /// Compute slices, where it is a slice.
    pub compute_slices: Option<u32>,
    /// GPU-instance id; null for room, and for what is recorded only.
    pub gi: Option<u32>,
    /// By id.
    pub compute_instances: Vec<Compute>,
    /// It stays when its holder ends: cut by migctl, or given to it.
    pub kept: bool,
    #[serde(flatten)]
    pub held: Holder,
    /// Why it is releasing or quarantined.
    pub reason: Option<String>,
}

/// A compute instance.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Compute {
    /// Its id in the GPU instance.
    pub ci: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// `3g.40gb`, or `1c.3g.40gb` where it has a part of its GPU instance.
    pub profile: String,
    /// Compute slices.
    pub slices: u32,
}

/// How a window stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    /// A holder has it, or is being given it.
    Held,
    /// Kept, and free for whoever asks.
    Static,
    /// What an ended holder had, for the next one of its profile; gone when its room is needed.
    Idle,
    /// Kept, and free for the containers of one user.
    Reserved,
    /// Not created by mig-hook, nor given to it.
    Foreign,
    /// Its holder has ended; it goes, or is given back, as soon as the driver lets us.
    Releasing,
    /// Neither usable nor surely ours to destroy.
    Quarantined,
    /// A lease records it, and the driver does not have it.
    Lost,
    /// Only root could know.
    Hidden,
    /// Room for a slice.
    #[default]
    Free,
    /// Free memory that no profile fits now: no compute slice is left for it.
    Unusable,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    if json && args.svg.is_some() {
        bail!(Misused("a picture is SVG or a JSON document: leave --svg or --json out".into()));
    }
    let map = read(settings, &Nvml::at(&settings.nvml), &args.gpus)?;
    match args.svg.as_deref() {
        None if json => super::print(&map, true, |_| String::new())?,
        // Not by print, which knows nothing of --color.
        None => super::write(text(&map, &canvas(args.ascii, args.color)).as_bytes())?,
        Some(file) if file == Path::new("-") => super::write(svg::picture(&map).as_bytes())?,
        Some(file) => std::fs::write(file, svg::picture(&map))
            .with_context(|| format!("cannot write the picture to {}", file.display()))?,
    }
    Ok(Exit::Ok)
}

// ---- reading ----

/// What is on these GPUs now, all of them where none is named. Takes no lock and writes nothing.
pub(super) fn read(settings: &Settings, gpu: &dyn Gpu, only: &[GpuSelector]) -> Result<Map> {
    let (mut leases, mut devices) = (super::recorded(settings)?, super::visible(gpu, only)?);
    for _ in 1..LOOKS {
        let after = super::recorded(settings)?;
        if after == leases {
            break;
        }
        (leases, devices) = (after, super::visible(gpu, only)?);
    }
    let cordons = super::readable_state(settings)?.map_or(Ok(Cordons::new()), |store| store.cordons())?;
    let rooms = rooms(&devices, &leases);
    let seen = inventory(&devices, &leases);
    let map = |(gpu, room)| gpu_map(settings, gpu, room, &leases, &cordons);
    let privileged = nix::unistd::geteuid().is_root();
    Ok(Map { driver_version: gpu.driver_version()?, privileged, gpus: seen.iter().zip(&rooms).map(map).collect() })
}

fn gpu_map(
    settings: &Settings,
    gpu: &inventory::Gpu<'_>,
    room: &Room<'_>,
    leases: &[Lease],
    cordons: &Cordons,
) -> GpuMap {
    let device = gpu.device;
    let (slices, _) = placement::memory_slices(room);
    let (windows, displaced) = taken(gpu, leases);
    let (mut windows, unplaced): (Vec<Window>, Vec<Window>) = windows.into_iter().partition(|window| window.size > 0);
    windows.extend(windows_between(&windows, placement::usable(room), slices));
    windows.sort_by_key(|window| window.start);
    let closed = |cordon: &Cordon| Closed { reason: cordon.reason.clone(), since_ms: cordon.since_ms };
    GpuMap {
        index: device.index,
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        mig: device.mig,
        managed: is_managed(settings, device),
        cordon: cordons.get(&device.uuid).map(closed),
        memory_slices: slices,
        windows,
        displaced,
        unplaced,
        fits: fits(settings, room),
    }
}

/// What could be cut, largest first.
fn fits(settings: &Settings, room: &Room<'_>) -> Vec<Fit> {
    let allowed = |name: &String| settings.profiles.as_ref().is_none_or(|allowed| allowed.contains(name));
    let mut plain: Vec<&Profile> = room.device.profiles.iter().collect();
    plain.retain(|p| !profile::has_attribute(&p.name) && allowed(&p.name));
    plain.sort_by_key(|p| std::cmp::Reverse((p.memory_mib, p.slices)));
    let fit = |p: &Profile| Fit { profile: p.name.clone(), count: placement::remaining(room, p) };
    plain.into_iter().map(fit).filter(|fit| fit.count > 0).collect()
}

/// Slices that exist, and those that are recorded without one: where there is room for them in the picture, and elsewhere.
fn taken(gpu: &inventory::Gpu<'_>, leases: &[Lease]) -> (Vec<Window>, Vec<Window>) {
    let device = gpu.device;
    let mut windows: Vec<Window> = gpu.slices.iter().map(existing).collect();
    let mut displaced: Vec<Window> = Vec::new();
    for (lease, slice) in leases.iter().flat_map(|lease| lease.slices.iter().map(move |slice| (lease, slice))) {
        let there = device.instances.iter().any(|instance| slice.is_at(&device.uuid, instance));
        let gone = lease.state == lease::State::Releasing && matches!(slice.step, Step::Planned | Step::Gone);
        if slice.gpu != device.uuid || device.is_closed() || there || gone {
            continue;
        }
        let window = recorded(lease, slice);
        let same = |other: &Window| other.held.token == window.held.token && other.start == window.start;
        if windows.iter().chain(&displaced).any(same) {
            continue; // another compute instance of the same
        }
        let free = windows.iter().all(|other| mask(other) & mask(&window) == 0);
        if free { windows.push(window) } else { displaced.push(window) }
    }
    (windows, displaced)
}

fn mask(window: &Window) -> u32 {
    Placement { start: window.start, size: window.size }.mask()
}

fn existing(slice: &Occupied<'_>) -> Window {
    let Instance { id, profile, placement, compute } = slice.instance;
    let lease = slice.lease.or(slice.kept);
    let state = match slice.standing() {
        Standing::Held => State::Held,
        Standing::Static => State::Static,
        Standing::Idle => State::Idle,
        Standing::Reserved => State::Reserved,
        Standing::Releasing => State::Releasing,
        Standing::Quarantined => State::Quarantined,
        Standing::Foreign if *placement == Placement::UNKNOWN => State::Hidden,
        Standing::Foreign => State::Foreign,
        Standing::Lost => State::Lost,
    };
    let computes = compute.iter().map(|c| Compute {
        ci: c.id,
        uuid: c.uuid.clone(),
        profile: slice.profile.map_or_else(String::new, |p| profile::device_name(p, c)),
        slices: c.slices,
    });
    Window {
        start: placement.start,
        size: placement.size,
        state,
        profile: Some(slice.profile.map_or_else(|| format!("profile {}", profile.0), |p| p.name.clone())),
        memory_mib: slice.profile.map(|p| p.memory_mib),
        compute_slices: slice.profile.map(|p| p.slices),
        gi: Some(*id),
        compute_instances: computes.collect(),
        kept: slice.kept.is_some(),
        held: lease.map(Holder::of).unwrap_or_default(),
        reason: lease.and_then(|lease| lease.reason.clone()),
    }
}

fn recorded(lease: &Lease, slice: &Slice) -> Window {
    let state = match lease.state {
        lease::State::Pending => State::Held,
        lease::State::Releasing => State::Releasing,
        _ => State::Lost,
    };
    let whole = profile::split_compute(&slice.profile_name).map_or(slice.profile_name.as_str(), |(_, whole)| whole);
    Window {
        start: slice.placement.start,
        size: slice.placement.size,
        state,
        profile: Some(whole.to_owned()),
        memory_mib: Some(slice.memory_mib),
        compute_slices: Some(profile::compute_slices(whole)),
        kept: lease.state == lease::State::Static,
        held: Holder::of(lease),
        reason: lease.reason.clone(),
        ..Window::default()
    }
}

/// The windows between those that are taken.
fn windows_between(taken: &[Window], usable: u32, slices: u32) -> Vec<Window> {
    let occupied = taken.iter().fold(0, |all, window| all | mask(window));
    let bit = |mask: u32, slice: u32| mask >> slice & 1 == 1;
    let free: Vec<u32> = (0..slices).filter(|slice| !bit(occupied, *slice)).collect();
    let runs = free.chunk_by(|a, b| a + 1 == *b && bit(usable, *a) == bit(usable, *b));
    let window = |run: &[u32]| {
        let start = *run.first()?;
        let state = if bit(usable, start) { State::Free } else { State::Unusable };
        Some(Window { start, size: run.len() as u32, state, ..Window::default() })
    };
    runs.filter_map(window).collect()
}

// ---- drawing ----

impl State {
    /// Its word, in legends.
    pub(super) fn word(self) -> &'static str {
        match self {
            State::Held => "held",
            State::Static => "static (kept, free to use)",
            State::Idle => "idle (kept a while, gone when its room is needed)",
            State::Reserved => "reserved for a user",
            State::Foreign => "foreign (not of mig-hook)",
            State::Releasing => "releasing",
            State::Quarantined => "quarantined",
            State::Lost => "lost (recorded, but gone)",
            State::Hidden => "known to root only",
            State::Free => "room",
            State::Unusable => "memory without a compute slice",
        }
    }
}

impl Window {
    /// Who has it, or how it stands where nobody has.
    pub(super) fn who(&self) -> String {
        let whom = |uid| host::user_name(uid).unwrap_or_else(|| format!("uid {uid}"));
        match (self.state, &self.held.name, &self.held.container) {
            (State::Reserved, ..) => {
                self.held.reserved_for.map_or_else(String::new, |uid| format!("for {}", whom(uid)))
            }
            (State::Static, ..) => "static".into(),
            (State::Idle, ..) => "idle".into(),
            (State::Foreign, ..) => "foreign".into(),
            (_, Some(name), _) => name.clone(),
            (_, None, Some(id)) => short(id).to_owned(),
            _ if self.held.job.is_some() => self.held.job.clone().unwrap_or_default(),
            (State::Held, ..) if self.held.way == Some(Way::Run) => self.held.holder.clone().unwrap_or_default(),
            (State::Held, ..) => "being created".into(),
            (State::Releasing, ..) => "releasing".into(),
            (State::Quarantined, ..) => "quarantined".into(),
            (State::Lost, ..) => "lost".into(),
            (State::Hidden, ..) => "-".into(),
            (State::Free | State::Unusable, ..) => String::new(),
        }
    }

    /// Its compute instances where they share it, each with its compute slices; what nobody has of them comes last.
    fn parts(&self) -> Option<Vec<(u32, String)>> {
        let all = self.compute_slices.unwrap_or(0);
        let computes = self.gi.map(|_| &self.compute_instances)?;
        if computes.is_empty() {
            return Some(vec![(1, "no CI".into())]);
        }
        if computes.iter().any(|c| c.slices == all) {
            return None;
        }
        let mut parts: Vec<(u32, String)> =
            computes.iter().map(|c| (c.slices, format!("{}c CI {}", c.slices, c.ci))).collect();
        let rest = all.saturating_sub(computes.iter().map(|c| c.slices).sum());
        if rest > 0 {
            parts.push((rest, "-".into()));
        }
        Some(parts)
    }
}

/// What the picture is drawn on: this terminal, or where standard output leads.
pub(super) fn canvas(ascii: bool, color: When) -> Canvas {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let terminal = std::io::stdout().is_terminal();
    let columns = set("COLUMNS").and_then(|columns| columns.parse().ok());
    let width = columns.or_else(|| {
        let size = terminal.then(ratatui::crossterm::terminal::size)?.ok()?;
        Some(size.0.into())
    });
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| set(name)).unwrap_or_default();
    let utf8 = locale.to_ascii_lowercase().replace('-', "").contains("utf8");
    let color = match color {
        When::Always => true,
        When::Never => false,
        When::Auto => anstream::AutoStream::choice(&std::io::stdout()) != anstream::ColorChoice::Never,
    };
    Canvas { width: width.filter(|width| *width > 0).unwrap_or(WIDTH).min(WIDEST), ascii: ascii || !utf8, color }
}

fn text(map: &Map, canvas: &Canvas) -> String {
    if map.gpus.is_empty() {
        return "no NVIDIA GPU\n".into();
    }
    let mut lines = Vec::new();
    for gpu in &map.gpus {
        lines.extend(picture(gpu, canvas, |window| block_of(window, canvas)));
        lines.push(Vec::new());
    }
    lines.extend(legend(&map.gpus, canvas));
    canvas.text(&lines)
}

/// The whole picture of one GPU; `block` says what its windows look like.
pub(super) fn picture(gpu: &GpuMap, canvas: &Canvas, block: impl Fn(&Window) -> Block) -> Vec<Vec<Span>> {
    let mut lines = vec![title(gpu, canvas)];
    if let Some(why) = no_bar(gpu) {
        lines.extend(canvas.wrap(Look::Note, "", &why));
        return lines;
    }
    let blocks: Vec<Block> = gpu.windows.iter().map(block).collect();
    lines.extend(bar::draw(gpu.memory_slices, &blocks, canvas));
    for window in gpu.windows.iter().chain(&gpu.displaced) {
        if let Some(note) = note(window) {
            lines.extend(canvas.wrap(Look::Note, &format!("{} ", canvas.mark(window.state)), &note));
        }
    }
    lines.extend(canvas.wrap(Look::Note, "", &fitting(gpu)));
    lines
}

/// The box of a window: profile, holder, and at the bottom its ids.
pub(super) fn block_of(window: &Window, canvas: &Canvas) -> Block {
    let Window { start, size, state, .. } = *window;
    let mut lines = Vec::new();
    if let Some(profile) = &window.profile {
        let brief = profile.split('.').next().unwrap_or_default().to_owned();
        lines.push(Line::Title(Some(canvas.mark(state)), vec![profile.clone(), brief]));
        lines.push(Line::Name(window.who()));
    } else if state == State::Free {
        lines.push(Line::Title(None, vec!["free".into(), String::new()]));
    }
    let gi = window.gi.map(|gi| Line::Text(vec![format!("GI {gi}"), gi.to_string()]));
    let foot = match window.parts() {
        Some(parts) => {
            lines.extend(gi);
            Some(Line::Parts(parts))
        }
        None => gi,
    };
    Block { start, size, state, selected: false, lines, foot }
}

fn title(gpu: &GpuMap, canvas: &Canvas) -> Vec<Span> {
    let mut spans = vec![
        Span::new(format!("GPU {}", gpu.index), Look::Strong),
        Span::new(format!("  {}", canvas.clean(&gpu.name)), Look::Plain),
    ];
    spans.extend(remarks(gpu).iter().map(|remark| Span::new(format!("  {}", canvas.clean(remark)), Look::Warning)));
    canvas.cut(spans)
}

/// What is special about a GPU.
fn remarks(gpu: &GpuMap) -> Vec<String> {
    let cordoned = |closed: &Closed| match &closed.reason {
        Some(reason) => format!("cordoned: {reason}"),
        None => "cordoned".into(),
    };
    let pending = (gpu.mig == MigMode::DisablePending).then(|| "MIG mode goes off with the next reset".to_owned());
    let unmanaged = (!gpu.managed).then(|| "not managed (limits.gpus)".to_owned());
    [gpu.cordon.as_ref().map(cordoned), pending, unmanaged].into_iter().flatten().collect()
}

/// Why a GPU has no bar, if it has none.
fn no_bar(gpu: &GpuMap) -> Option<String> {
    let index = gpu.index;
    match gpu.mig {
        MigMode::Unsupported => Some("this board has no MIG".into()),
        MigMode::Off => Some(format!("MIG mode is off; migctl mode on {index} turns it on")),
        MigMode::EnablePending => Some("MIG mode comes on with the next reset of the GPU".into()),
        _ if gpu.memory_slices == 0 => {
            Some("the driver shows placements to root only; migctl list shows the MIG devices".into())
        }
        MigMode::On | MigMode::DisablePending => None,
    }
}

/// What the picture alone does not tell of a window.
fn note(window: &Window) -> Option<String> {
    let Window { start, size, .. } = window;
    let what = format!("{} at {start}:{size}", window.profile.as_deref().unwrap_or_default());
    match (window.state, &window.reason) {
        (State::Releasing | State::Quarantined, Some(reason)) => {
            Some(format!("{what} is {}: {reason}", super::word(window.state)))
        }
        (State::Lost, _) => {
            let (whom, when) = match window.held.container {
                Some(_) => (format!(" for {}", window.who()), " when its holder has ended"),
                None => (String::new(), ""),
            };
            Some(format!("{what} is recorded{whom}, but the driver does not have it; migctl gc forgets it{when}"))
        }
        _ => None,
    }
}

/// What could be cut now.
fn fitting(gpu: &GpuMap) -> String {
    let mut parts: Vec<String> = gpu.fits.iter().map(|fit| format!("{}x{}", fit.count, fit.profile)).collect();
    let last = parts.pop();
    let list = match (parts.as_slice(), last) {
        (_, None) => "nothing".into(),
        ([], Some(last)) => last,
        (parts, Some(last)) => format!("{} or {last}", parts.join(", ")),
    };
    match gpu.cordon {
        Some(_) => format!("fits once it is open again: {list}"),
        None => format!("fits now: {list}"),
    }
}

/// The marks that occur.
pub(super) fn legend(gpus: &[GpuMap], canvas: &Canvas) -> Vec<Vec<Span>> {
    let windows = gpus.iter().flat_map(|gpu| gpu.windows.iter().chain(&gpu.displaced));
    let states: BTreeSet<State> = windows.map(|window| window.state).collect();
    let entry = |state: State| {
        vec![
            Span::new(canvas.mark(state).to_string(), Look::Mark(state)),
            Span::new(format!(" {}", state.word()), Look::Note),
        ]
    };
    canvas.flow(states.into_iter().filter(|state| *state != State::Free).map(entry).collect(), 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canvas(width: usize) -> Canvas {
        Canvas { width, ascii: false, color: false }
    }

    #[test]
    fn room_is_told_from_memory_that_nothing_fits() {
        let window = |start, size| Window { start, size, state: State::Held, ..Window::default() };
        let spans = |taken: &[Window], usable| -> Vec<(u32, u32, State)> {
            windows_between(taken, usable, 8).iter().map(|w| (w.start, w.size, w.state)).collect()
        };
        use State::{Free, Unusable};
        assert_eq!(spans(&[], 0xff), [(0, 8, Free)]);
        assert_eq!(spans(&[window(0, 7)], 0), [(7, 1, Unusable)]);
        assert_eq!(
            spans(&[window(1, 2), window(4, 1)], 0b0110_0001),
            [(0, 1, Free), (3, 1, Unusable), (5, 2, Free), (7, 1, Unusable)]
        );
        assert_eq!(spans(&[window(0, 8)], 0), []);
    }

    #[test]
    fn compute_instances_that_share_are_told_apart() {
        let compute = |ci, slices| Compute { ci, uuid: format!("MIG-{ci}"), profile: String::new(), slices };
        let window =
            |compute_instances| Window { gi: Some(2), compute_slices: Some(3), compute_instances, ..Window::default() };
        assert_eq!(window(vec![compute(0, 3)]).parts(), None);
        assert_eq!(window(vec![]).parts().unwrap(), [(1, "no CI".to_owned())]);
        let shared = window(vec![compute(0, 1), compute(1, 2)]).parts().unwrap();
        assert_eq!(shared, [(1, "1c CI 0".to_owned()), (2, "2c CI 1".to_owned())]);
        assert_eq!(window(vec![compute(4, 1)]).parts().unwrap()[1], (2, "-".to_owned()));
    }

    #[test]
    fn a_machine_without_a_gpu_and_gpus_without_a_picture() {
        let mut map = Map { driver_version: "580".into(), privileged: true, gpus: vec![] };
        assert_eq!(text(&map, &canvas(80)), "no NVIDIA GPU\n");
        let gpu = |mig| GpuMap {
            index: 3,
            uuid: "GPU-3".into(),
            name: "X".into(),
            mig,
            managed: true,
            cordon: None,
            memory_slices: 0,
            windows: vec![],
            displaced: vec![],
            unplaced: vec![],
            fits: vec![],
        };
        for (mig, says) in [
            (MigMode::Unsupported, "no MIG"),
            (MigMode::Off, "migctl mode on 3"),
            (MigMode::EnablePending, "comes on with the next reset"),
            (MigMode::DisablePending, "goes off with the next reset"),
            (MigMode::On, "to root only"),
        ] {
            map.gpus = vec![gpu(mig)];
            let text = text(&map, &canvas(80));
            assert!(text.starts_with("GPU 3  X") && text.contains(says), "{text}");
        }
    }
}
