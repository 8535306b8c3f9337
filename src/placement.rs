//! Where slices go: GPU inventories, leases and a request in, placements or the reason why not out. Pure and
//! deterministic.
//!
//! The default policy ([`Policy::Scc`], size-weighted capability) looks at what a placement takes away from later
//! requests. For a GPU whose memory slices `mask` are occupied,
//!
//! ```text
//! Φ(mask) = Σ over the profiles offered, of size × number of its placements that are still free
//! ```
//!
//! counts the slices that could still be cut. A slice goes where Φ falls least; among equals to the GPU with the fewest
//! free slices, then by GPU order, then to the lowest start. On an empty eight-slice GPU this is the order that the
//! driver itself prefers (1g at 6, 2g and 3g at 4); the gain is in the choice among GPUs. Profiles with an attribute
//! (`+me`, `+gfx`, `-me` …) repeat the windows of the plain ones and do not enter Φ.
//!
//! Windows are bit masks of memory slices, as many as the driver reports: eighths on most boards, quarters on an A30,
//! twelfths on an RTX PRO 6000. From them a table of Φ over all masks is made for each GPU model, so that every look while
//! slices are chosen, and choices taken back, is one load.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::gpu::{Device, Placement, Profile, ProfileId};
use crate::profile;
use crate::request::{self, Want};

/// Placements that are tried for one request before it is given up: greedy needs one for each slice, the rest is for
/// going back on an earlier choice.
const TRIALS: u32 = 20_000;
/// The same for the question whether the request fits when nothing else runs, asked only for a refusal.
const TRIALS_WHEN_EMPTY: u32 = 2_000;
/// Boards of more memory slices get no table: 2^12 masks are filled in some µs, 2^20 are not. None is known.
const MOST_TABULATED: u32 = 12;
/// Most sets of blockers in a refusal, and in its text.
const MAX_BLOCKER_SETS: usize = 8;
const MAX_BLOCKERS_SHOWN: usize = 3;

/// Which of the free placements is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Where the least capability is lost, see the module's documentation.
    #[default]
    Scc,
    /// First GPU, lowest start.
    FirstFit,
    /// First GPU, and there the start that leaves the most placements free, as the driver chooses by itself.
    Driver,
    /// GPU with the fewest free slices, start as in `driver`.
    Binpack,
    /// GPU with the most free slices, start as in `driver`. Refuses far more large requests than the others.
    Spread,
}

impl Policy {
    /// The policy of that name, as the setting `placement.policy` spells it.
    pub fn named(name: &str) -> Option<Policy> {
        match name {
            "scc" => Some(Policy::Scc),
            "first-fit" => Some(Policy::FirstFit),
            "driver" => Some(Policy::Driver),
            "binpack" => Some(Policy::Binpack),
            "spread" => Some(Policy::Spread),
            _ => None,
        }
    }
}

/// A window of memory slices that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The profile of the slice in it, counted against that profile's limit; `None` for room that is only kept free.
    pub profile: Option<ProfileId>,
    /// Where it is.
    pub placement: Placement,
}

/// One GPU as the allocator sees it. GPUs are given in PCI bus order; for an allow-list of profiles, with only those
/// left in `device.profiles`.
#[derive(Debug, Clone)]
pub struct Room<'a> {
    /// What it offers, and the instances that exist (foreign ones too: they are occupied room).
    pub device: &'a Device,
    /// Windows that leases hold. One at the very placement of an instance, or listed twice, counts once.
    pub occupied: Vec<Window>,
}

/// One wanted slice with the profile that serves it on each GPU.
#[derive(Debug, Clone)]
pub struct Candidates<'a> {
    /// As it was asked for, for messages.
    pub label: String,
    /// For each room in order, the one profile that will do there (never a larger one), or none.
    pub per_room: Vec<Option<&'a Profile>>,
}

/// A slice to be cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// GPU UUID.
    pub gpu: String,
    /// The driver's profile id.
    pub profile: ProfileId,
    /// Name of the profile, as `1g.10gb`.
    pub profile_name: String,
    /// Exactly where.
    pub placement: Placement,
}

/// What kind of refusal it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// No GPU here, or not the one asked for, offers it. Waiting does not help.
    NotOffered {
        /// The whole sentence, with what is offered.
        text: String,
    },
    /// Offered, but more than these GPUs hold when nothing else runs. Waiting does not help.
    NeverFits,
    /// Something has to end first.
    NoRoom,
    /// Enough is free, but not in the right places: with the running slices moved it would fit.
    Fragmented,
}

/// A taken window, for messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// GPU UUID.
    pub gpu: String,
    /// Name of its profile; none for room that is only kept free, or a profile that the GPU does not list.
    pub profile: Option<String>,
    /// Where it is.
    pub placement: Placement,
}

/// What is taken on one GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// GPU UUID.
    pub gpu: String,
    /// `GPU 0 (NVIDIA A100-SXM4-80GB)`.
    pub label: String,
    /// Memory slices that are free.
    pub free: u32,
    /// Memory slices in all.
    pub slices: u32,
    /// Taken windows, by start.
    pub held: Vec<Held>,
}

/// Why nothing was placed. [`NoPlace::explain`] puts it in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoPlace {
    /// The kind of refusal.
    pub reason: Reason,
    /// What was asked for, as `2x1g.10gb|2g.20gb`.
    pub wanted: String,
    /// The GPUs that offer any of it, with what is taken there.
    pub holding: Vec<Holding>,
    /// The smallest sets of windows whose end would make room, each set by itself enough; empty when none is known.
    /// For one slice these are exactly the sets with the fewest windows and, among those, the fewest slices (at most
    /// eight sets). For several slices it is one window where one is enough, else one set that has none to spare.
    pub smallest_blockers: Vec<Vec<Held>>,
}

impl NoPlace {
    /// The refusal in words, with what `holder` says of each taken window, and whose end would make room.
    pub fn explain(&self, holder: impl Fn(&Held) -> String) -> String {
        let wanted = &self.wanted;
        let mut text = match &self.reason {
            Reason::NotOffered { text } => return text.clone(),
            Reason::NeverFits => {
                return format!("{wanted} is more than the GPUs here hold, even with nothing else on them");
            }
            Reason::NoRoom => format!("no room for {wanted}"),
            Reason::Fragmented => {
                format!(
                    "no room for {wanted} as the running slices lie (fragmented: moved together, they would leave room)"
                )
            }
        };
        let who = |held: &Held| format!("{held} ({})", holder(held));
        for (n, holding) in self.holding.iter().enumerate() {
            let held = counted(&holding.held, &holder);
            text += &format!("{} {} holds {held}", if n == 0 { ":" } else { ";" }, holding.label);
        }
        let sets: Vec<String> = self
            .smallest_blockers
            .iter()
            .take(MAX_BLOCKERS_SHOWN)
            .map(|set| set.iter().map(who).collect::<Vec<_>>().join(" and "))
            .collect();
        match sets.is_empty() {
            true => text,
            false => format!("{text}; it would fit after the end of {}", sets.join(", or of ")),
        }
    }
}

/// Taken windows with their holders, those of one profile and one holder counted: `3g.40gb at 4:4 (container web), 2x
/// 1g.10gb (kept)`.
fn counted(held: &[Held], holder: impl Fn(&Held) -> String) -> String {
    let mut groups: Vec<(usize, &Held, String)> = Vec::new();
    for one in held {
        let who = holder(one);
        match groups.iter_mut().find(|(_, first, theirs)| first.profile == one.profile && *theirs == who) {
            Some((count, ..)) => *count += 1,
            None => groups.push((1, one, who)),
        }
    }
    let shown = |(count, first, who): &(usize, &Held, String)| match count {
        1 => format!("{first} ({who})"),
        _ => format!("{count}x {} ({who})", first.name()),
    };
    match groups.is_empty() {
        true => "nothing".to_owned(),
        false => groups.iter().map(shown).collect::<Vec<_>>().join(", "),
    }
}

impl Held {
    /// Its profile, or what it is instead.
    pub fn name(&self) -> &str {
        self.profile.as_deref().unwrap_or("a slice")
    }
}

impl fmt::Display for Held {
    /// `2g.12gb at 0:2`: start, then size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name(), self.placement)
    }
}

/// The profiles that serve each want on each GPU, or the refusal when there are none anywhere.
pub fn candidates<'a>(rooms: &[Room<'a>], wants: &[Want]) -> Result<Vec<Candidates<'a>>, NoPlace> {
    let candidates_for = |want: &Want| {
        let per_room: Vec<_> = rooms.iter().map(|room| profile::resolve(room.device, want)).collect();
        if per_room.iter().any(Option::is_some) {
            return Ok(Candidates { label: want.to_string(), per_room });
        }
        let devices: Vec<&Device> = rooms.iter().map(|room| room.device).collect();
        let text = match want {
            Want::Profile(name) => profile::not_offered(&format!("profile {name}"), &devices),
            Want::Memory { .. } => profile::not_offered(&format!("a profile with at least {want}"), &devices),
            Want::Uuid(uuid) => format!("{uuid} names an existing slice: it can be found, not placed"),
        };
        Err(not_offered(request::format_wants(wants), text))
    };
    wants.iter().map(candidates_for).collect()
}

fn not_offered(wanted: String, text: String) -> NoPlace {
    NoPlace { reason: Reason::NotOffered { text }, wanted, holding: Vec::new(), smallest_blockers: Vec::new() }
}

/// Places all wanted slices or none; the choices come in the order of the wants.
///
/// Several slices are placed hardest first, each where the policy likes it best; where that fails, earlier choices are
/// taken back, within a bound. One slice that fits anywhere is never refused.
pub fn place(rooms: &[Room<'_>], wants: &[Candidates<'_>], policy: Policy) -> Result<Vec<Choice>, NoPlace> {
    if let Some(want) = wants.iter().find(|want| want.per_room.iter().all(Option::is_none)) {
        let text = format!("{} is offered by no GPU here", want.label);
        return Err(not_offered(labels(wants), text));
    }
    let boards = boards(rooms);
    let windows: Vec<Vec<Window>> = rooms.iter().map(taken).collect();
    let order = hardest_first(wants);
    let wants_in_order: Vec<&Candidates<'_>> = order.iter().map(|&n| &wants[n]).collect();
    let live: Vec<State> = boards.iter().zip(&windows).map(|(board, windows)| board.state(windows)).collect();
    let Some(spots) = Search::new(&boards, Some(policy), TRIALS).run(live, &wants_in_order) else {
        return Err(refusal(&boards, &windows, wants, &wants_in_order));
    };
    let mut choices: Vec<(usize, Choice)> =
        order.into_iter().zip(spots).map(|(n, spot)| (n, spot.choice(&boards))).collect();
    choices.sort_by_key(|(n, _)| *n);
    Ok(choices.into_iter().map(|(_, choice)| choice).collect())
}

/// Whether all wanted slices fit, with at most `trials` placements tried: one is enough for one slice, and for several
/// greedy needs one each.
pub fn fits(rooms: &[Room<'_>], wants: &[Candidates<'_>], policy: Policy, trials: u32) -> bool {
    let boards = boards(rooms);
    let live = boards.iter().zip(rooms).map(|(board, room)| board.state(&taken(room))).collect();
    let order: Vec<&Candidates<'_>> = hardest_first(wants).into_iter().map(|n| &wants[n]).collect();
    Search::new(&boards, Some(policy), trials).run(live, &order).is_some()
}

/// How many more slices of a profile could be cut on a GPU, when nothing else is.
pub fn remaining(room: &Room<'_>, profile: &Profile) -> u32 {
    let boards = boards(std::slice::from_ref(room));
    let mut state = boards.first().map(|board| board.state(&taken(room))).unwrap_or_default();
    let mut count = 0;
    // All are of one size: the lowest free start never costs another.
    for mask in profile.placements.iter().filter_map(|at| window_mask(*at)) {
        if mask & state.mask == 0 && state.allowance(profile) > 0 {
            state.occupy(mask, Some(profile));
            count += 1;
        }
    }
    count
}

/// The memory slices of a GPU, and how many of them are free.
pub fn memory_slices(room: &Room<'_>) -> (u32, u32) {
    let boards = boards(std::slice::from_ref(room));
    boards.first().map_or((0, 0), |board| (board.slices, board.free(board.state(&taken(room)).mask)))
}

/// The memory slices of a GPU that could still become a part of some slice, as a mask. Free ones beyond it are of no use as
/// things stand: with seven `1g` on an eight-slice GPU no compute slice is left for the eighth.
pub fn usable(room: &Room<'_>) -> u32 {
    let boards = boards(std::slice::from_ref(room));
    let state = boards.first().map(|board| board.state(&taken(room))).unwrap_or_default();
    let allowed = room.device.profiles.iter().filter(|profile| state.allowance(profile) > 0);
    let windows = allowed.flat_map(|profile| &profile.placements).filter_map(|at| window_mask(*at));
    windows.filter(|window| window & state.mask == 0).fold(0, |all, window| all | window)
}

/// Why each choice of [`place`] was made, in a line, by what the policy weighs.
pub fn reasons(rooms: &[Room<'_>], wants: &[Candidates<'_>], choices: &[Choice], policy: Policy) -> Vec<String> {
    let boards = boards(rooms);
    let mut states: Vec<State> = boards.iter().zip(rooms).map(|(board, room)| board.state(&taken(room))).collect();
    let search = Search::new(&boards, Some(policy), 0);
    let mut reasons = vec![String::new(); choices.len()];
    for n in hardest_first(wants) {
        let spots = search.spots(&states, &wants[n]);
        let is_chosen = |spot: &Spot<'_>| {
            choices.get(n).is_some_and(|c| c.gpu == boards[spot.room].device.uuid && c.placement == spot.placement)
        };
        let Some(rank) = spots.iter().position(is_chosen) else { continue };
        let spot = spots[rank];
        reasons[n] = match (free_placements(&states, &wants[n]), rank) {
            (1, _) => "the only free place for it".into(),
            (_, 0) => boards[spot.room].reason(policy, states[spot.room].mask),
            _ => "a better place would leave no room for the rest of the request".into(),
        };
        states[spot.room].occupy(spot.mask, Some(spot.profile));
    }
    reasons
}

/// How many placements could serve a want now, on all GPUs together.
fn free_placements(states: &[State], want: &Candidates<'_>) -> usize {
    let on = |(state, profile): (&State, &Option<&Profile>)| match profile {
        Some(profile) if state.allowance(profile) > 0 => {
            profile.placements.iter().filter_map(|at| window_mask(*at)).filter(|mask| mask & state.mask == 0).count()
        }
        _ => 0,
    };
    states.iter().zip(&want.per_room).map(on).sum()
}

fn labels(wants: &[Candidates<'_>]) -> String {
    let runs =
        wants.chunk_by(|a, b| a.label == b.label).filter_map(|run| run.first().map(|want| (run.len(), &want.label)));
    let parts: Vec<String> =
        runs.map(|(count, label)| if count == 1 { label.clone() } else { format!("{count}x{label}") }).collect();
    parts.join(",")
}

/// Indices of the wants: larger first, then those with fewer placements, then those with an attribute, then as asked.
fn hardest_first(wants: &[Candidates<'_>]) -> Vec<usize> {
    let hardness = |want: &Candidates<'_>| {
        let profiles = || want.per_room.iter().flatten();
        let size = profiles().filter_map(|p| p.placements.first()).map(|p| p.size).max().unwrap_or(0);
        let starts = profiles().map(|p| p.placements.len()).min().unwrap_or(0);
        let plain = !profiles().any(|p| profile::has_attribute(&p.name));
        (std::cmp::Reverse(size), starts, plain)
    };
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_by_cached_key(|&n| hardness(&wants[n]));
    order
}

/// The memory slices of a placement as a mask; none for an empty window, or one beyond slice 31, which no board has.
fn window_mask(placement: Placement) -> Option<u32> {
    let end = placement.start.checked_add(placement.size)?;
    (placement.size > 0 && end <= u32::BITS).then(|| placement.mask())
}

/// That many slices from the first on.
fn lowest(slices: u32) -> u32 {
    Placement { start: 0, size: slices }.mask()
}

/// The taken windows of a room, each once, by start.
fn taken(room: &Room<'_>) -> Vec<Window> {
    let instances = room.device.instances.iter().map(|i| Window { profile: Some(i.profile), placement: i.placement });
    let mut windows: Vec<Window> = Vec::new();
    for window in instances.chain(room.occupied.iter().copied()) {
        if !windows.iter().any(|seen| seen.placement == window.placement) {
            windows.push(window);
        }
    }
    windows.sort_by_key(|window| window.placement);
    windows
}

/// What stays the same on a GPU while slices come and go.
#[derive(Debug, Clone)]
struct Board<'a> {
    device: &'a Device,
    /// Boards with equal profiles have equal numbers.
    model: usize,
    /// Windows of the profiles without attribute: what Φ counts.
    plain: Vec<u32>,
    /// Memory slices in all.
    slices: u32,
    /// Memory of one slice in GiB, rounded, at least 1: makes capability on different boards comparable. It changes
    /// nothing where all boards have slices of one size.
    weight: u64,
}

/// What comes and goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    /// Occupied memory slices.
    mask: u32,
    /// Profiles of the instances whose number is limited by more than room, ascending, one entry an instance.
    limited: Vec<ProfileId>,
}

fn boards<'a>(rooms: &[Room<'a>]) -> Vec<Board<'a>> {
    let mut boards: Vec<Board<'a>> = Vec::with_capacity(rooms.len());
    for (n, room) in rooms.iter().enumerate() {
        let alike = boards.iter().find(|board| board.device.profiles == room.device.profiles);
        boards.push(match alike {
            Some(board) => Board { device: room.device, ..board.clone() },
            None => board(room.device, n),
        });
    }
    boards
}

fn board(device: &Device, model: usize) -> Board<'_> {
    let plain = device.profiles.iter().filter(|p| !profile::has_attribute(&p.name));
    let windows = || device.profiles.iter().flat_map(|p| p.placements.iter().map(move |at| (p, *at)));
    let largest = windows().max_by_key(|(_, at)| at.size);
    let masks = windows().filter_map(|(_, at)| window_mask(at));
    Board {
        device,
        model,
        plain: plain.flat_map(|p| &p.placements).filter_map(|at| window_mask(*at)).collect(),
        slices: masks.map(|mask| u32::BITS - mask.leading_zeros()).max().unwrap_or(0),
        weight: largest.map_or(1, |(p, at)| {
            let mib = p.memory_mib / u64::from(at.size.max(1));
            (mib.saturating_add(512) / 1024).clamp(1, 1 << 20)
        }),
    }
}

impl Board<'_> {
    fn state(&self, windows: &[Window]) -> State {
        let mut state = State::default();
        for window in windows {
            state.occupy(window.placement.mask(), window.profile.and_then(|id| self.device.profile(id)));
        }
        state
    }

    /// The number of plain placements, no larger than this window, that lie in its way: on an eight-slice board the
    /// upper half costs less than the lower.
    fn smaller_placements(&self, window: u32) -> u64 {
        let in_the_way = |other: &&u32| *other & window != 0 && other.count_ones() <= window.count_ones();
        self.plain.iter().filter(in_the_way).count() as u64
    }

    /// What a policy weighs, for the spot that it likes best.
    fn reason(&self, policy: Policy, before: u32) -> String {
        const START: &str = "and there the start that leaves the most placements";
        let (slices, free) = (self.slices, self.free(before));
        match policy {
            Policy::Scc => "takes the least from later requests".into(),
            Policy::FirstFit => "the first GPU with room, and there the lowest start".into(),
            Policy::Driver => format!("the first GPU with room, {START}"),
            Policy::Binpack => {
                format!("the GPU with room that has the fewest free slices ({free} of {slices}), {START}")
            }
            Policy::Spread => format!("the GPU with room that has the most free slices ({free} of {slices}), {START}"),
        }
    }

    fn free(&self, mask: u32) -> u32 {
        (lowest(self.slices) & !mask).count_ones()
    }

    fn held(&self, window: &Window) -> Held {
        let profile = window.profile.and_then(|id| self.device.profile(id)).map(|p| p.name.clone());
        Held { gpu: self.device.uuid.clone(), profile, placement: window.placement }
    }
}

impl State {
    fn occupy(&mut self, mask: u32, profile: Option<&Profile>) {
        self.mask |= mask;
        if let Some(profile) = profile.filter(|p| is_limited(p)) {
            let at = self.limited.partition_point(|id| *id <= profile.id);
            self.limited.insert(at, profile.id);
        }
    }

    /// How many more instances of the profile its limit allows, room aside.
    fn allowance(&self, profile: &Profile) -> usize {
        let limit = usize::try_from(profile.max_instances).unwrap_or(usize::MAX);
        limit.saturating_sub(self.limited.iter().filter(|id| **id == profile.id).count())
    }
}

/// True when the driver allows fewer instances of the profile than it has placements, as for `+me`: a limit that room
/// alone does not express. (Overlapping placements make some plain profiles limited too; counting them is harmless.)
fn is_limited(profile: &Profile) -> bool {
    usize::try_from(profile.max_instances).is_ok_and(|limit| limit < profile.placements.len())
}

/// What the free windows of a board are worth together, for every mask of occupied slices.
#[derive(Debug, Default)]
struct Worth {
    /// Each window with what it is worth.
    windows: Vec<(u32, u32)>,
    /// By the mask of the *free* slices; empty for a board that is too wide for a table.
    table: Vec<u32>,
}

impl Worth {
    fn of(board: &Board<'_>, worth: impl Fn(u32) -> u32) -> Worth {
        let windows: Vec<(u32, u32)> = board.plain.iter().map(|window| (*window, worth(*window))).collect();
        if board.slices > MOST_TABULATED {
            return Worth { windows, table: Vec::new() };
        }
        // What lies within a set of free slices: each set's own windows, then those of all its subsets added up, one slice
        // after the other.
        let mut table = vec![0; 1 << board.slices];
        for (window, worth) in &windows {
            table[*window as usize] += worth;
        }
        for slice in 0..board.slices {
            for sets in table.chunks_exact_mut(2 << slice) {
                let (without, with) = sets.split_at_mut(1 << slice);
                for (with, without) in with.iter_mut().zip(without) {
                    *with += *without;
                }
            }
        }
        Worth { windows, table }
    }

    fn at(&self, occupied: u32) -> u32 {
        match self.table.is_empty() {
            true => self.windows.iter().filter(|(window, _)| window & occupied == 0).map(|(_, worth)| worth).sum(),
            false => self.table[!occupied as usize & (self.table.len() - 1)],
        }
    }
}

/// One way to place one slice.
#[derive(Debug, Clone, Copy)]
struct Spot<'a> {
    /// What the policy minimises, in order of weight.
    cost: [u64; 4],
    room: usize,
    profile: &'a Profile,
    placement: Placement,
    mask: u32,
}

impl Spot<'_> {
    fn choice(&self, boards: &[Board<'_>]) -> Choice {
        Choice {
            gpu: boards.get(self.room).map(|board| board.device.uuid.clone()).unwrap_or_default(),
            profile: self.profile.id,
            profile_name: self.profile.name.clone(),
            placement: self.placement,
        }
    }
}

/// Depth first over the placements of each want, best first; its first descent is the greedy choice.
#[derive(Debug)]
struct Search<'b, 'a> {
    boards: &'b [Board<'a>],
    /// None: pack tightly from the hardest slice down, to explain a refusal; nothing that comes later matters.
    policy: Option<Policy>,
    /// What the policy weighs, by [`Board::model`]; nothing for policies that weigh nothing.
    worth: Vec<Worth>,
    /// Placements that may still be tried. None left after a failure: nothing is proven.
    trials: u32,
}

impl<'b, 'a> Search<'b, 'a> {
    fn new(boards: &'b [Board<'a>], policy: Option<Policy>, trials: u32) -> Search<'b, 'a> {
        let worth = |(room, board): (usize, &Board<'_>)| match policy {
            _ if board.model != room => Worth::default(),
            Some(Policy::Scc) => Worth::of(board, u32::count_ones),
            Some(Policy::Driver | Policy::Binpack | Policy::Spread) => Worth::of(board, |_| 1),
            Some(Policy::FirstFit) | None => Worth::default(),
        };
        Search { boards, policy, worth: boards.iter().enumerate().map(worth).collect(), trials }
    }

    /// A spot for each want, in their order.
    fn run(&mut self, mut states: Vec<State>, wants: &[&Candidates<'a>]) -> Option<Vec<Spot<'a>>> {
        let mut spots = Vec::with_capacity(wants.len());
        self.descend(&mut states, wants, &mut spots).then_some(spots)
    }

    fn descend(&mut self, states: &mut [State], wants: &[&Candidates<'a>], spots: &mut Vec<Spot<'a>>) -> bool {
        let Some((want, rest)) = wants.split_first() else { return true };
        for spot in self.spots(states, want) {
            if self.trials == 0 {
                return false;
            }
            self.trials -= 1;
            let before = states[spot.room].clone();
            states[spot.room].occupy(spot.mask, Some(spot.profile));
            spots.push(spot);
            if self.descend(states, rest, spots) {
                return true;
            }
            spots.pop();
            states[spot.room] = before;
        }
        false
    }

    /// Every spot for one slice, best first, but for GPUs that are in every way like an earlier one.
    fn spots(&self, states: &[State], want: &Candidates<'a>) -> Vec<Spot<'a>> {
        let mut spots = Vec::new();
        for (room, (board, state)) in self.boards.iter().zip(states).enumerate() {
            let Some(profile) = want.per_room.get(room).copied().flatten() else { continue };
            let like_this = |other: usize| {
                self.boards[other].model == board.model
                    && states[other] == *state
                    && want.per_room[other].is_some_and(|p| p.id == profile.id)
            };
            if state.allowance(profile) == 0 || (0..room).any(like_this) {
                continue;
            }
            for placement in &profile.placements {
                let Some(mask) = window_mask(*placement).filter(|mask| mask & state.mask == 0) else { continue };
                let cost = self.cost(board, room, state.mask, mask, placement.start);
                spots.push(Spot { cost, room, profile, placement: *placement, mask });
            }
        }
        spots.sort_unstable_by_key(|spot| spot.cost);
        spots
    }

    /// Lower is better. GPU and start are always in it, so no two spots cost the same.
    fn cost(&self, board: &Board<'_>, room: usize, before: u32, window: u32, start: u32) -> [u64; 4] {
        let (gpu, start, free) = (room as u64, u64::from(start), u64::from(board.free(before)));
        let worth = &self.worth[board.model];
        let lost = u64::from(worth.at(before) - worth.at(before | window));
        match self.policy {
            Some(Policy::Scc) => [lost * board.weight, free, gpu, start],
            Some(Policy::FirstFit) => [gpu, start, 0, 0],
            Some(Policy::Driver) => [gpu, lost, start, 0],
            Some(Policy::Binpack) => [free, gpu, lost, start],
            Some(Policy::Spread) => [u64::from(u32::MAX) - free, gpu, lost, start],
            // Slices that are limited to a few per GPU come last among their size: leave room on many GPUs.
            None => [board.smaller_placements(window), u64::from(u32::MAX) - free, gpu, start],
        }
    }
}

/// Why the wants did not fit, and what would make them.
fn refusal<'a>(
    boards: &[Board<'a>],
    windows: &[Vec<Window>],
    wants: &[Candidates<'a>],
    in_order: &[&Candidates<'a>],
) -> NoPlace {
    let offers = |room: usize| wants.iter().any(|want| want.per_room.get(room).is_some_and(Option::is_some));
    let holding =
        boards.iter().zip(windows).enumerate().filter(|(room, _)| offers(*room)).map(|(_, (board, windows))| Holding {
            gpu: board.device.uuid.clone(),
            label: board.device.label(),
            free: board.free(board.state(windows).mask),
            slices: board.slices,
            held: windows.iter().map(|window| board.held(window)).collect(),
        });
    let mut refusal = NoPlace {
        reason: Reason::NoRoom,
        wanted: labels(wants),
        holding: holding.collect(),
        smallest_blockers: Vec::new(),
    };

    if never_fits(boards, wants, in_order) {
        refusal.reason = Reason::NeverFits;
        return refusal;
    }
    if fits_repacked(boards, windows, wants) {
        refusal.reason = Reason::Fragmented;
    }
    let sets = match in_order {
        [want] => smallest_for_one(boards, &vec![State::default(); boards.len()], windows, want),
        _ => small_for_several(boards, windows, in_order),
    };
    refusal.smallest_blockers = sets
        .into_iter()
        .map(|set| set.into_iter().filter_map(|(room, n)| Some(boards[room].held(windows[room].get(n)?))).collect())
        .collect();
    refusal
}

/// True when it is proven that the wants do not fit even on empty GPUs: more of one profile than the limits allow, or
/// every way to place them tried. A search that runs out of trials proves nothing.
fn never_fits<'a>(boards: &[Board<'a>], wants: &[Candidates<'a>], in_order: &[&Candidates<'a>]) -> bool {
    let above_the_limits = |want: &Candidates<'_>| {
        let same = wants.iter().filter(|other| other.label == want.label).count() as u64;
        same > want.per_room.iter().flatten().map(|p| u64::from(p.max_instances)).sum()
    };
    let mut search = Search::new(boards, None, TRIALS_WHEN_EMPTY);
    wants.iter().any(above_the_limits)
        || search.run(vec![State::default(); boards.len()], in_order).is_none() && search.trials > 0
}

/// True when the wants and all running slices fit together, placed anew from the hardest down. A slice may move to any
/// GPU with the same profiles; room that is only kept free stays where it is. Greedy, and still exact for plain
/// profiles on boards of one model; with attributes or mixed models it may overlook a packing.
fn fits_repacked(boards: &[Board<'_>], windows: &[Vec<Window>], wants: &[Candidates<'_>]) -> bool {
    let mut items: Vec<Candidates<'_>> = wants.to_vec();
    let mut fixed = vec![State::default(); boards.len()];
    for (room, board) in boards.iter().enumerate() {
        for window in &windows[room] {
            let Some(profile) = window.profile.and_then(|id| board.device.profile(id)) else {
                fixed[room].occupy(window.placement.mask(), None);
                continue;
            };
            let alike = boards.iter().map(|other| (other.model == board.model).then_some(profile));
            items.push(Candidates { label: String::new(), per_room: alike.collect() });
        }
    }
    let in_order: Vec<&Candidates<'_>> = hardest_first(&items).into_iter().map(|n| &items[n]).collect();
    let trials = u32::try_from(in_order.len()).unwrap_or(u32::MAX);
    Search::new(boards, None, trials).run(fixed, &in_order).is_some()
}

/// Windows by room and number.
type Set = Vec<(usize, usize)>;

/// The sets of windows that must end for one slice to fit beside what is `fixed`: fewest windows, then fewest slices.
fn smallest_for_one(boards: &[Board<'_>], fixed: &[State], windows: &[Vec<Window>], want: &Candidates<'_>) -> Vec<Set> {
    let mut best = (usize::MAX, u32::MAX);
    let mut sets: Vec<Set> = Vec::new();
    for room in 0..boards.len() {
        let Some(profile) = want.per_room.get(room).copied().flatten() else { continue };
        for placement in &profile.placements {
            let free_of_fixed = |mask: &u32| mask & fixed[room].mask == 0;
            let Some(mask) = window_mask(*placement).filter(free_of_fixed) else { continue };
            let Some(set) = blockers_of(&fixed[room], &windows[room], profile, mask) else { continue };
            let slices = set.iter().filter_map(|n| windows[room].get(*n)).map(|window| window.placement.size).sum();
            let size = (set.len(), slices);
            let set: Set = set.into_iter().map(|n| (room, n)).collect();
            if size < best {
                best = size;
                sets.clear();
            }
            if size == best && sets.len() < MAX_BLOCKER_SETS && !sets.contains(&set) {
                sets.push(set);
            }
        }
    }
    sets
}

/// The windows of one GPU, by number, that must end for a slice to fit at exactly `mask`: those in the way and, where
/// the profile's limit is reached, as many more of that profile as needed. None when even that is not enough.
fn blockers_of(fixed: &State, windows: &[Window], profile: &Profile, mask: u32) -> Option<Vec<usize>> {
    let allowed = fixed.allowance(profile);
    let of_this_profile = |n: &usize| is_limited(profile) && windows[*n].profile == Some(profile.id);
    let (mut ending, staying): (Vec<usize>, Vec<usize>) =
        (0..windows.len()).partition(|&n| windows[n].placement.mask() & mask != 0);
    let counted: Vec<usize> = staying.into_iter().filter(of_this_profile).collect();
    let too_many = (counted.len() + 1).saturating_sub(allowed);
    if too_many > counted.len() {
        return None;
    }
    ending.extend(counted.into_iter().take(too_many));
    ending.sort_unstable();
    Some(ending)
}

/// For several slices: each single window whose end is enough (those of the fewest slices), else one set that is enough
/// and has no window to spare. Placements are not taken back here: it explains a refusal, it does not decide one.
fn small_for_several<'a>(boards: &[Board<'a>], windows: &[Vec<Window>], wants: &[&Candidates<'a>]) -> Vec<Set> {
    let fits_without = |set: &Set| {
        let rest = |room: usize| {
            let staying = windows[room].iter().enumerate().filter(|(n, _)| !set.contains(&(room, *n)));
            staying.map(|(_, window)| *window).collect::<Vec<_>>()
        };
        let states = boards.iter().enumerate().map(|(room, board)| board.state(&rest(room))).collect();
        let trials = u32::try_from(wants.len()).unwrap_or(u32::MAX);
        Search::new(boards, None, trials).run(states, wants).is_some()
    };
    let size = |(room, n): &(usize, usize)| windows[*room][*n].placement.size;
    let all = || windows.iter().enumerate().flat_map(|(room, windows)| (0..windows.len()).map(move |n| (room, n)));

    let mut enough: Vec<(usize, usize)> = all().filter(|one| fits_without(&vec![*one])).collect();
    if let Some(least) = enough.iter().map(size).min() {
        enough.retain(|one| size(one) == least);
        enough.truncate(MAX_BLOCKER_SETS);
        return enough.into_iter().map(|one| vec![one]).collect();
    }

    // End everything, then let each window stay that can. Small ones stay first, so that few have to end.
    let mut ending: Set = all().collect();
    if !fits_without(&ending) {
        return Vec::new();
    }
    let mut smallest_first = ending.clone();
    smallest_first.sort_by_key(size);
    for one in smallest_first {
        let without_it: Set = ending.iter().copied().filter(|other| *other != one).collect();
        if fits_without(&without_it) {
            ending = without_it;
        }
    }
    vec![ending]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Engines, Instance};
    use proptest::prelude::*;

    /// Id, name, compute slices, MiB, limit, size in memory slices, starts.
    type Row = (u32, &'static str, u32, u64, u32, u32, &'static [u32]);

    const A100_80: [Row; 7] = [
        (19, "1g.10gb", 1, 9728, 7, 1, &[0, 1, 2, 3, 4, 5, 6]),
        (20, "1g.10gb+me", 1, 9728, 1, 1, &[0, 1, 2, 3, 4, 5, 6]),
        (15, "1g.20gb", 1, 19968, 4, 2, &[0, 2, 4, 6]),
        (14, "2g.20gb", 2, 19968, 3, 2, &[0, 2, 4]),
        (9, "3g.40gb", 3, 40192, 2, 4, &[0, 4]),
        (5, "4g.40gb", 4, 40192, 1, 4, &[0]),
        (0, "7g.80gb", 7, 80640, 1, 8, &[0]),
    ];
    const A30: [Row; 5] = [
        (14, "1g.6gb", 1, 5952, 4, 1, &[0, 1, 2, 3]),
        (21, "1g.6gb+me", 1, 5952, 1, 1, &[0, 1, 2, 3]),
        (5, "2g.12gb", 2, 11968, 2, 2, &[0, 2]),
        (6, "2g.12gb+me", 2, 11968, 1, 2, &[0, 2]),
        (0, "4g.24gb", 4, 24000, 1, 4, &[0]),
    ];
    const RTX_PRO_6000: [Row; 7] = [
        (14, "1g.24gb", 1, 24192, 4, 3, &[0, 3, 6, 9]),
        (65, "1g.24gb+me.all", 1, 24192, 1, 3, &[0, 3, 6, 9]),
        (67, "1g.24gb-me", 1, 24192, 4, 3, &[0, 3, 6, 9]),
        (5, "2g.48gb", 2, 48512, 2, 6, &[0, 6]),
        (64, "2g.48gb+me.all", 2, 48512, 1, 6, &[0, 6]),
        (0, "4g.96gb", 4, 97408, 1, 12, &[0]),
        (32, "4g.96gb+gfx", 4, 97408, 1, 12, &[0]),
    ];

    fn device(index: u32, name: &str, rows: &[Row]) -> Device {
        let profile = |row: &Row| Profile {
            id: ProfileId(row.0),
            name: row.1.to_owned(),
            slices: row.2,
            memory_mib: row.3,
            sms: 14 * row.2,
            engines: Engines::default(),
            p2p: false,
            max_instances: row.4,
            placements: row.6.iter().map(|start| Placement { start: *start, size: row.5 }).collect(),
        };
        Device {
            name: name.to_owned(),
            profiles: rows.iter().map(profile).collect(),
            ..crate::gpu::tests::device(index)
        }
    }

    fn a100(index: u32) -> Device {
        device(index, "NVIDIA A100-SXM4-80GB", &A100_80)
    }

    fn a30(index: u32) -> Device {
        device(index, "NVIDIA A30", &A30)
    }

    /// Adds instances, as `("3g.40gb", 4)`: profile and start.
    fn with(mut device: Device, instances: &[(&str, u32)]) -> Device {
        for (name, start) in instances {
            let profile = profile::resolve_name(&device, name).unwrap();
            let placement = *profile.placements.iter().find(|p| p.start == *start).unwrap();
            let instance = Instance { id: placement.start, profile: profile.id, placement, compute: Vec::new() };
            device.instances.push(instance);
        }
        device
    }

    fn rooms(devices: &[Device]) -> Vec<Room<'_>> {
        devices.iter().map(|device| Room { device, occupied: Vec::new() }).collect()
    }

    fn named(names: &[&str]) -> Vec<Want> {
        names.iter().map(|name| Want::Profile((*name).to_owned())).collect()
    }

    fn place_by(devices: &[Device], names: &[&str], policy: Policy) -> Result<Vec<Choice>, NoPlace> {
        let rooms = rooms(devices);
        place(&rooms, &candidates(&rooms, &named(names))?, policy)
    }

    /// GPU index and start of each slice.
    fn spots(devices: &[Device], names: &[&str], policy: Policy) -> Vec<(usize, u32)> {
        let index = |uuid: &str| devices.iter().position(|d| d.uuid == uuid).unwrap();
        let choices = place_by(devices, names, policy).unwrap();
        choices.iter().map(|choice| (index(&choice.gpu), choice.placement.start)).collect()
    }

    fn refused(devices: &[Device], names: &[&str]) -> NoPlace {
        place_by(devices, names, Policy::Scc).unwrap_err()
    }

    fn set(held: &[Held]) -> Vec<String> {
        held.iter().map(|held| format!("{} {held}", held.gpu)).collect()
    }

    #[test]
    fn capability_of_an_eight_slice_board() {
        let device = a100(0);
        let boards = boards(&[Room { device: &device, occupied: Vec::new() }]);
        let values =
            [(0x00, 41), (0x01, 20), (0x10, 24), (0x40, 26), (0xC0, 26), (0x0F, 13), (0xF0, 20), (0x80, 27), (0xFF, 0)];
        let capability = Worth::of(&boards[0], u32::count_ones);
        for (mask, value) in values {
            assert_eq!(capability.at(mask), value, "{mask:#04x}");
        }
        assert_eq!((boards[0].slices, boards[0].weight), (8, 10));
    }

    #[test]
    fn boards_are_measured_in_their_own_slices() {
        let devices = [a30(0), device(1, "NVIDIA RTX PRO 6000", &RTX_PRO_6000), device(2, "no MIG", &[])];
        let boards = boards(&rooms(&devices));
        let capability = |board: &Board<'_>| Worth::of(board, u32::count_ones).at(0);
        let measures: Vec<_> = boards.iter().map(|b| (b.slices, b.weight, capability(b))).collect();
        assert_eq!(measures, [(4, 6, 12), (12, 8, 36), (0, 1, 0)]);
    }

    #[test]
    fn what_lies_beyond_the_offer_takes_none_of_it() {
        let mut device = with(a100(0), &[("3g.40gb", 4)]);
        device.profiles.truncate(1);
        assert_eq!(memory_slices(&Room { device: &device, occupied: Vec::new() }), (7, 4));
    }

    #[test]
    fn starts_on_an_empty_gpu() {
        let expected = [("1g.10gb", 6), ("1g.20gb", 6), ("2g.20gb", 4), ("3g.40gb", 4), ("4g.40gb", 0), ("7g.80gb", 0)];
        for (name, start) in expected {
            for policy in [Policy::Scc, Policy::Driver, Policy::Binpack, Policy::Spread] {
                assert_eq!(spots(&[a100(0)], &[name], policy), [(0, start)], "{name} {policy:?}");
            }
            let lowest = [(0, 0)];
            assert_eq!(spots(&[a100(0)], &[name], Policy::FirstFit), lowest, "{name}");
        }
    }

    #[test]
    fn documented_sequences_of_the_driver() {
        // MIG user guide: -cgi 19,14,5 and 9,19,14,19, one after the other.
        for sequence in [
            &[("1g.10gb", 6), ("2g.20gb", 4), ("4g.40gb", 0)][..],
            &[("3g.40gb", 4), ("1g.10gb", 0), ("2g.20gb", 2), ("1g.10gb", 1)][..],
            &[("2g.20gb", 4), ("1g.10gb", 6), ("1g.10gb", 0), ("1g.10gb", 1), ("1g.10gb", 2), ("1g.10gb", 3)][..],
        ] {
            let mut gpu = [a100(0)];
            for (name, start) in sequence {
                assert_eq!(spots(&gpu, &[name], Policy::Driver), [(0, *start)], "{name} in {sequence:?}");
                gpu = gpu.map(|device| with(device, &[(name, *start)]));
            }
        }
    }

    #[test]
    fn policies_choose_the_gpu() {
        let devices = [with(a100(0), &[("1g.10gb", 0)]), with(a100(1), &[("4g.40gb", 0)]), a100(2)];
        assert_eq!(spots(&devices, &["3g.40gb"], Policy::Scc), [(1, 4)], "keeps the empty GPU whole");
        assert_eq!(spots(&devices, &["1g.10gb"], Policy::Scc), [(0, 1)], "completes a broken pair");
        assert_eq!(spots(&devices, &["1g.10gb"], Policy::FirstFit), [(0, 1)]);
        assert_eq!(spots(&devices, &["1g.10gb"], Policy::Driver), [(0, 1)]);
        assert_eq!(spots(&devices, &["1g.10gb"], Policy::Binpack), [(1, 6)]);
        assert_eq!(spots(&devices, &["1g.10gb"], Policy::Spread), [(2, 6)]);
        assert_eq!(serde_json::to_string(&Policy::FirstFit).unwrap(), r#""first-fit""#);
    }

    #[test]
    fn capability_is_compared_by_memory_on_a_mixed_node() {
        // Memory finds 1g.10gb on the A100 and 1g.6gb on the A30; a slice of an A30 is worth 6, of an A100 10.
        let devices = [a100(0), a30(1)];
        let rooms = rooms(&devices);
        let want = candidates(&rooms, &[Want::Memory { bytes: 5 << 30 }]).unwrap();
        let choice = &place(&rooms, &want, Policy::Scc).unwrap()[0];
        assert_eq!(
            (choice.gpu.as_str(), choice.profile_name.as_str(), choice.profile),
            ("GPU-1", "1g.6gb", ProfileId(14))
        );
    }

    #[test]
    fn a_limited_profile_is_given_once_a_gpu() {
        let devices = [with(a100(0), &[("1g.10gb+me", 6)]), a100(1)];
        assert_eq!(spots(&devices, &["1g.10gb+me"], Policy::FirstFit), [(1, 0)]);
        let refusal = refused(&devices, &["1g.10gb+me", "1g.10gb+me"]);
        assert_eq!(refusal.reason, Reason::NoRoom);
        assert_eq!(refusal.wanted, "2x1g.10gb+me");
        assert_eq!(refusal.smallest_blockers.iter().map(|s| set(s)).collect::<Vec<_>>(), [["GPU-0 1g.10gb+me at 6:1"]]);
    }

    #[test]
    fn leases_take_room_beyond_the_instances() {
        let gpu = with(a100(0), &[("4g.40gb", 0)]);
        let me = Window { profile: Some(ProfileId(20)), placement: Placement { start: 4, size: 1 } };
        let kept = Window { profile: None, placement: Placement { start: 6, size: 1 } };
        let of_the_instance = Window { profile: Some(ProfileId(5)), placement: Placement { start: 0, size: 4 } };
        let rooms = [Room { device: &gpu, occupied: vec![me, me, kept, of_the_instance] }];
        let ask = |name: &str| place(&rooms, &candidates(&rooms, &named(&[name])).unwrap(), Policy::Scc);
        assert_eq!(ask("1g.10gb").unwrap()[0].placement, Placement { start: 5, size: 1 });
        let refusal = ask("1g.10gb+me").unwrap_err();
        assert_eq!(
            refusal.explain(|_| "c1".into()),
            "no room for 1g.10gb+me: GPU 0 (NVIDIA A100-SXM4-80GB) holds 4g.40gb at 0:4 (c1), 1g.10gb+me at 4:1 (c1), \
             a slice at 6:1 (c1); it would fit after the end of 1g.10gb+me at 4:1 (c1)"
        );
        assert_eq!((refusal.holding[0].free, refusal.holding[0].slices), (2, 8));
    }

    #[test]
    fn several_slices_come_in_the_order_of_the_request() {
        let devices = [a100(0)];
        let names = ["1g.10gb", "2g.20gb", "4g.40gb"];
        let choices = place_by(&devices, &names, Policy::Scc).unwrap();
        assert_eq!(choices.iter().map(|c| c.profile_name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(spots(&devices, &names, Policy::Scc), [(0, 6), (0, 4), (0, 0)]);
        assert_eq!(place(&rooms(&devices), &[], Policy::Scc), Ok(Vec::new()));
    }

    #[test]
    fn free_memory_without_a_compute_slice_is_of_no_use() {
        let ones: Vec<(&str, u32)> = (0..7).map(|start| ("1g.10gb", start)).collect();
        assert_eq!(usable(&rooms(&[with(a100(0), &ones)])[0]), 0);
        assert_eq!(usable(&rooms(&[with(a100(0), &ones[..6])])[0]), 0b1100_0000);
        assert_eq!(usable(&rooms(&[with(a30(0), &[("2g.12gb", 0)])])[0]), 0b1100);
    }

    #[test]
    fn refusals_say_what_kind_they_are() {
        let full = [with(a100(0), &[("7g.80gb", 0)])];
        assert_eq!(refused(&full, &["1g.10gb"]).reason, Reason::NoRoom);
        let pieces = [with(a100(0), &[("1g.10gb", 0), ("1g.10gb", 4)])];
        let refusal = refused(&pieces, &["4g.40gb"]);
        assert_eq!(refusal.reason, Reason::Fragmented);
        assert_eq!(refusal.smallest_blockers.iter().map(|s| set(s)).collect::<Vec<_>>(), [["GPU-0 1g.10gb at 0:1"]]);
        let refusal = refused(&pieces, &["3g.40gb"]);
        assert_eq!(refusal.smallest_blockers.len(), 2, "either will do");
        assert!(
            refusal
                .explain(|_| String::new())
                .starts_with("no room for 3g.40gb as the running slices lie (fragmented: "),
            "{refusal:?}"
        );
        let refusal = refused(&[a100(0)], &["4g.40gb", "4g.40gb"]);
        assert_eq!(refusal.reason, Reason::NeverFits);
        assert_eq!(
            refusal.explain(|_| String::new()),
            "2x4g.40gb is more than the GPUs here hold, even with nothing else on them"
        );
        let devices: Vec<Device> = (0..16).map(a100).collect();
        assert_eq!(refused(&devices, &["2g.20gb"; 64]).reason, Reason::NeverFits, "more than can be searched through");
        let refusal = refused(&full, &["1g.6gb"]);
        assert!(
            refusal.explain(|_| String::new()).starts_with("profile 1g.6gb is not offered by GPU 0 (NVIDIA A100"),
            "{refusal:?}"
        );
        assert!(refused(&[], &["1g.6gb"]).explain(|_| String::new()).contains("no GPU"));
        let json = serde_json::to_string(&refusal).unwrap();
        assert_eq!(serde_json::from_str::<NoPlace>(&json).unwrap(), refusal);
    }

    #[test]
    fn equal_slices_of_one_holder_are_counted() {
        let ones = [("1g.10gb", 0), ("1g.10gb", 1), ("1g.10gb", 2), ("3g.40gb", 4)];
        let holder = |held: &Held| if held.placement.start == 1 { "container web" } else { "kept" }.to_owned();
        let text = refused(&[with(a100(0), &ones), with(a100(1), &[("7g.80gb", 0)])], &["7g.80gb"]).explain(holder);
        assert_eq!(
            text,
            "no room for 7g.80gb: GPU 0 (NVIDIA A100-SXM4-80GB) holds 2x 1g.10gb (kept), 1g.10gb at 1:1 (container web), \
             3g.40gb at 4:4 (kept); GPU 1 (NVIDIA A100-SXM4-80GB) holds 7g.80gb at 0:8 (kept); it would fit after the end \
             of 7g.80gb at 0:8 (kept)"
        );
    }

    #[test]
    fn blockers_of_several_slices() {
        let ones = [("1g.10gb", 0), ("1g.10gb", 1), ("1g.10gb", 2), ("1g.10gb", 4), ("1g.10gb", 5)];
        let devices = [with(a100(0), &[("3g.40gb", 0), ("3g.40gb", 4)]), with(a100(1), &ones)];
        let sets = refused(&devices, &["3g.40gb", "3g.40gb"]).smallest_blockers;
        assert_eq!(sets.len(), 1);
        assert_eq!(set(&sets[0]), ["GPU-0 3g.40gb at 0:4", "GPU-0 3g.40gb at 4:4"]);
        let devices = [with(a100(0), &[("7g.80gb", 0)]), with(a100(1), &ones)];
        let sets = refused(&devices, &["3g.40gb", "3g.40gb"]).smallest_blockers;
        assert_eq!(sets.iter().map(|s| set(s)).collect::<Vec<_>>(), [["GPU-0 7g.80gb at 0:8"]]);
    }

    #[test]
    fn windows_that_no_board_has_are_never_used() {
        let beyond: [Row; 1] = [(1, "1g.1gb", 1, 1024, 9, 8, &[28, 32, u32::MAX])];
        assert_eq!(refused(&[device(0, "odd", &beyond)], &["1g.1gb"]).reason, Reason::NeverFits);
        let empty: [Row; 1] = [(1, "1g.1gb", 1, 1024, 9, 0, &[0])];
        assert_eq!(refused(&[device(0, "odd", &empty)], &["1g.1gb"]).reason, Reason::NeverFits);
        let whole: [Row; 1] = [(1, "1g.1gb", 1, 1024, 1, 32, &[0])];
        assert_eq!(spots(&[device(0, "odd", &whole)], &["1g.1gb"], Policy::Scc), [(0, 0)]);
    }

    #[test]
    fn packing_anew_agrees_with_the_closed_form() {
        // A multiset fits on G eight-slice boards if and only if these five hold.
        let closed = |gpus: usize, n: [usize; 6]| {
            let [n1, n1d, n2, n3, n4, n7] = n;
            n7 + n4 <= gpus
                && 2 * n7 + n4 + n3 <= 2 * gpus
                && 3 * n7 + 2 * n4 + n3 + n2 <= 3 * gpus
                && 7 * n7 + 4 * n4 + 3 * n3 + 2 * n2 + n1d + n1 <= 7 * gpus
                && 8 * n7 + 4 * n4 + 4 * n3 + 2 * n2 + 2 * n1d + n1 <= 8 * gpus
        };
        let names = ["1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"];
        for gpus in 1..=2_usize {
            let devices: Vec<Device> = (0..).map(a100).take(gpus).collect();
            let rooms = rooms(&devices);
            let boards = boards(&rooms);
            let bounds = [7, 4, 3, 2, 1, 1].map(|most| most * gpus + 1);
            let total: usize = bounds.iter().product();
            for number in 0..total {
                let mut rest = number;
                let counts = bounds.map(|bound| {
                    let digit = rest % bound;
                    rest /= bound;
                    digit
                });
                let wants: Vec<&str> = (0..6).flat_map(|n| std::iter::repeat_n(names[n], counts[n])).collect();
                if wants.len() > 7 * gpus {
                    continue;
                }
                let wants = candidates(&rooms, &named(&wants)).unwrap();
                let fits = fits_repacked(&boards, &vec![Vec::new(); gpus], &wants);
                assert_eq!(fits, closed(gpus, counts), "{counts:?} on {gpus}");
            }
        }
    }

    /// Up to three GPUs of three kinds, partly filled at random with what their limits allow.
    fn node() -> impl Strategy<Value = Vec<Device>> {
        let fill = prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..10);
        prop::collection::vec((0..3_usize, fill), 1..4).prop_map(|gpus| {
            let gpu = |(index, (kind, fill)): (u32, (usize, Vec<(prop::sample::Index, prop::sample::Index)>))| {
                let rows: [&[Row]; 3] = [&A100_80, &A30, &RTX_PRO_6000];
                let mut device = device(index, ["A100", "A30", "RTX PRO 6000"][kind], rows[kind]);
                for (profile, start) in fill {
                    let profile = profile.get(&device.profiles).clone();
                    let placement = *start.get(&profile.placements);
                    let same = device.instances.iter().filter(|i| i.profile == profile.id).count();
                    let free = device.instances.iter().all(|i| i.placement.mask() & placement.mask() == 0);
                    if free && same < profile.max_instances as usize {
                        let id = device.instances.len() as u32;
                        device.instances.push(Instance { id, profile: profile.id, placement, compute: Vec::new() });
                    }
                }
                device
            };
            (0..).zip(gpus).map(gpu).collect()
        })
    }

    /// A node, and names of slices that some GPU of it offers.
    fn node_and_names(most: usize) -> impl Strategy<Value = (Vec<Device>, Vec<String>)> {
        (node(), prop::collection::vec(any::<prop::sample::Index>(), 1..=most)).prop_map(|(devices, picks)| {
            let all: Vec<String> = devices.iter().flat_map(|d| &d.profiles).map(|p| p.name.clone()).collect();
            let names = picks.iter().map(|pick| pick.get(&all).clone()).collect();
            (devices, names)
        })
    }

    fn policy() -> impl Strategy<Value = Policy> {
        prop::sample::select(vec![Policy::Scc, Policy::FirstFit, Policy::Driver, Policy::Binpack, Policy::Spread])
    }

    fn reasons_of(devices: &[Device], names: &[&str], policy: Policy) -> Vec<String> {
        let rooms = rooms(devices);
        let wants = candidates(&rooms, &named(names)).unwrap();
        reasons(&rooms, &wants, &place(&rooms, &wants, policy).unwrap(), policy)
    }

    #[test]
    fn every_policy_gives_its_own_reason() {
        let devices = [with(a100(0), &[("3g.40gb", 4)]), a100(1)];
        let reason = |policy| reasons_of(&devices, &["1g.10gb"], policy).remove(0);
        assert_eq!(reason(Policy::Scc), "takes the least from later requests");
        assert_eq!(reason(Policy::FirstFit), "the first GPU with room, and there the lowest start");
        assert_eq!(
            reason(Policy::Driver),
            "the first GPU with room, and there the start that leaves the most placements"
        );
        assert!(reason(Policy::Binpack).starts_with("the GPU with room that has the fewest free slices (4 of 8), and"));
        assert!(reason(Policy::Spread).starts_with("the GPU with room that has the most free slices (8 of 8), and"));
        assert_eq!(reasons_of(&devices[..1], &["4g.40gb"], Policy::Scc), ["the only free place for it"]);
        assert_eq!(reasons_of(&[a100(0), a100(1)], &["7g.80gb"], Policy::FirstFit).len(), 1);
        assert!(
            reasons_of(&[a100(0), a100(1)], &["7g.80gb"], Policy::FirstFit)[0].contains("first GPU"),
            "not the only"
        );
    }

    #[test]
    fn a_second_choice_says_so() {
        // The memory goes to the A100 first, and has to leave it to the profile that the A30 does not have.
        let devices = [with(a100(0), &[("3g.40gb", 4), ("1g.20gb", 2)]), a30(1)];
        let rooms = rooms(&devices);
        let wants = [Want::Memory { bytes: 10 << 30 }, Want::Profile("2g.20gb".into())];
        let wants = candidates(&rooms, &wants).unwrap();
        let choices = place(&rooms, &wants, Policy::FirstFit).unwrap();
        assert_eq!(choices[0].gpu, "GPU-1");
        let said = reasons(&rooms, &wants, &choices, Policy::FirstFit);
        assert_eq!(
            said,
            ["a better place would leave no room for the rest of the request", "the only free place for it"]
        );
    }

    #[test]
    fn what_remains_of_each_profile() {
        let count = |device: &Device, name: &str| {
            remaining(&Room { device, occupied: Vec::new() }, profile::resolve_name(device, name).unwrap())
        };
        let empty = a100(0);
        let all = A100_80.map(|row| count(&empty, row.1));
        assert_eq!(all, [7, 1, 4, 3, 2, 1, 1], "as many as the driver's instanceCount says");
        let gpu = with(a100(0), &[("1g.10gb+me", 2), ("3g.40gb", 4)]);
        assert_eq!(A100_80.map(|row| count(&gpu, row.1)), [3, 0, 1, 1, 0, 0, 0]);
        assert_eq!(memory_slices(&Room { device: &gpu, occupied: Vec::new() }), (8, 3));
        assert_eq!(A30.map(|row| count(&a30(0), row.1)), [4, 1, 2, 1, 1]);
        let rtx = device(0, "RTX", &RTX_PRO_6000);
        assert_eq!(RTX_PRO_6000.map(|row| count(&rtx, row.1)), RTX_PRO_6000.map(|row| row.4));
    }

    /// Puts a slice where the driver would take it, or says that it would not.
    fn create(devices: &mut [Device], gpu: &str, name: &str, placement: Placement) -> bool {
        let Some(device) = devices.iter_mut().find(|d| d.uuid == gpu) else { return false };
        let Some(profile) = profile::resolve_name(device, name).cloned() else { return false };
        let same = device.instances.iter().filter(|i| i.profile == profile.id).count();
        let free = device.instances.iter().all(|i| i.placement.mask() & placement.mask() == 0);
        let fine = free && same < profile.max_instances as usize && profile.placements.contains(&placement);
        if fine {
            device.instances.push(Instance { id: 99, profile: profile.id, placement, compute: Vec::new() });
        }
        fine
    }

    /// Tries everything.
    fn fits_somehow(devices: &[Device], names: &[&str]) -> bool {
        let Some((name, rest)) = names.split_first() else { return true };
        devices.iter().any(|device| {
            let placements = profile::resolve_name(device, name).map(|p| p.placements.as_slice()).unwrap_or_default();
            placements.iter().any(|placement| {
                let mut after = devices.to_vec();
                create(&mut after, &device.uuid, name, *placement) && fits_somehow(&after, rest)
            })
        })
    }

    fn as_strs(names: &[String]) -> Vec<&str> {
        names.iter().map(String::as_str).collect()
    }

    proptest! {
        #[test]
        fn what_is_placed_can_be_created((devices, names) in node_and_names(4), policy in policy()) {
            if let Ok(choices) = place_by(&devices, &as_strs(&names), policy) {
                prop_assert_eq!(choices.len(), names.len());
                let mut devices = devices;
                for (choice, name) in choices.iter().zip(&names) {
                    prop_assert_eq!(&choice.profile_name, name);
                    prop_assert!(create(&mut devices, &choice.gpu, name, choice.placement), "{:?}", choice);
                }
            }
        }

        #[test]
        fn worth_is_what_the_free_windows_add_up_to(
            slices in 1..=20_u32,
            windows in prop::collection::vec((0..20_u32, 1..=20_u32), 1..12),
            occupied in any::<u32>(),
        ) {
            let mut device = device(0, "odd", &[(0, "1g.1gb", 1, 1024, 1, 1, &[])]);
            let fitting = windows.iter().filter(|(start, size)| start + size <= slices);
            device.profiles[0].placements = fitting.map(|(start, size)| Placement { start: *start, size: *size }).collect();
            let boards = boards(&[Room { device: &device, occupied: Vec::new() }]);
            let free = |(start, size): &&(u32, u32)| {
                start + size <= slices && (*start..start + size).all(|slice| occupied >> slice & 1 == 0)
            };
            let sum: u32 = windows.iter().filter(free).map(|(_, size)| size).sum();
            prop_assert_eq!(Worth::of(&boards[0], u32::count_ones).at(occupied), sum);
        }

        #[test]
        fn scc_is_what_its_definition_says((devices, names) in node_and_names(1)) {
            let capability = |device: &Device, mask: u32| -> u32 {
                let plain = device.profiles.iter().filter(|p| !profile::has_attribute(&p.name));
                plain.flat_map(|p| &p.placements).filter(|at| at.mask() & mask == 0).map(|at| at.size).sum()
            };
            let mut best: Option<[u32; 4]> = None;
            for (gpu, device) in devices.iter().enumerate() {
                let Some(profile) = profile::resolve_name(device, &names[0]) else { continue };
                let mask = device.instances.iter().fold(0, |mask, instance| mask | instance.placement.mask());
                let (slices, weight) = match device.name.as_str() {
                    "A30" => (4, 6),
                    "A100" => (8, 10),
                    _ => (12, 8),
                };
                for at in &profile.placements {
                    let mut after = vec![device.clone()];
                    if create(&mut after, &device.uuid, &names[0], *at) {
                        let lost = capability(device, mask) - capability(device, mask | at.mask());
                        let cost = [lost * weight, slices - mask.count_ones(), gpu as u32, at.start];
                        best = Some(best.map_or(cost, |best| best.min(cost)));
                    }
                }
            }
            let placed = place_by(&devices, &as_strs(&names), Policy::Scc).ok().map(|choices| {
                let gpu = devices.iter().position(|device| device.uuid == choices[0].gpu).unwrap();
                (gpu as u32, choices[0].placement.start)
            });
            prop_assert_eq!(placed, best.map(|[_, _, gpu, start]| (gpu, start)));
        }

        #[test]
        fn what_fits_is_never_refused((devices, names) in node_and_names(3), policy in policy()) {
            let names = as_strs(&names);
            prop_assert_eq!(place_by(&devices, &names, policy).is_ok(), fits_somehow(&devices, &names));
        }

        #[test]
        fn fits_is_what_place_finds((devices, names) in node_and_names(3), policy in policy()) {
            let (names, rooms) = (as_strs(&names), rooms(&devices));
            let wants = candidates(&rooms, &named(&names)).unwrap();
            prop_assert_eq!(fits(&rooms, &wants, policy, TRIALS), place(&rooms, &wants, policy).is_ok());
        }

        #[test]
        fn every_choice_has_a_reason((devices, names) in node_and_names(4), policy in policy()) {
            if place_by(&devices, &as_strs(&names), policy).is_ok() {
                let reasons = reasons_of(&devices, &as_strs(&names), policy);
                prop_assert!(reasons.iter().all(|reason| !reason.is_empty()), "{:?}", reasons);
            }
        }

        #[test]
        fn a_slice_is_usable_when_something_can_be_cut_over_it(devices in node()) {
            for room in rooms(&devices) {
                let mut over = 0;
                for profile in &room.device.profiles {
                    for at in &profile.placements {
                        let mut after = vec![room.device.clone()];
                        over |= if create(&mut after, &room.device.uuid, &profile.name, *at) { at.mask() } else { 0 };
                    }
                }
                prop_assert_eq!(usable(&room), over);
            }
        }

        #[test]
        fn as_many_as_remain_can_be_cut((devices, names) in node_and_names(1)) {
            let name = as_strs(&names)[0];
            for device in &devices {
                let Some(profile) = profile::resolve_name(device, name) else { continue };
                let count = remaining(&Room { device, occupied: Vec::new() }, profile) as usize;
                let one = std::slice::from_ref(device);
                prop_assert!(count == 0 || place_by(one, &vec![name; count], Policy::Scc).is_ok());
                prop_assert!(place_by(one, &vec![name; count + 1], Policy::Scc).is_err());
            }
        }

        #[test]
        fn the_same_again((devices, names) in node_and_names(4), policy in policy()) {
            let names = as_strs(&names);
            prop_assert_eq!(place_by(&devices, &names, policy), place_by(&devices, &names, policy));
        }

        #[test]
        fn ending_the_blockers_makes_room((devices, names) in node_and_names(3)) {
            let names = as_strs(&names);
            let Err(refusal) = place_by(&devices, &names, Policy::Scc) else { return Ok(()) };
            let without = |set: &[Held]| {
                let mut devices = devices.clone();
                for device in &mut devices {
                    let uuid = device.uuid.clone();
                    let ends = |i: &Instance| set.iter().any(|held| held.gpu == uuid && held.placement == i.placement);
                    device.instances.retain(|i| !ends(i));
                }
                devices
            };
            let empty: Vec<Held> = refusal.holding.iter().flat_map(|h| h.held.clone()).collect();
            prop_assert_eq!(refusal.reason == Reason::NeverFits, !fits_somehow(&without(&empty), &names));
            prop_assert_eq!(refusal.smallest_blockers.is_empty(), refusal.reason == Reason::NeverFits);
            for set in &refusal.smallest_blockers {
                prop_assert!(fits_somehow(&without(set), &names), "{:?}", refusal);
                for n in 0..set.len() {
                    let mut fewer = set.clone();
                    fewer.remove(n);
                    prop_assert!(names.len() > 1 || !fits_somehow(&without(&fewer), &names), "{:?}", refusal);
                }
            }
        }

        #[test]
        fn one_slice_has_the_fewest_blockers((devices, names) in node_and_names(1)) {
            let names = as_strs(&names);
            let Err(refusal) = place_by(&devices, &names, Policy::Scc) else { return Ok(()) };
            let size = |device: &Device, keep: u32| {
                let ending = || device.instances.iter().enumerate().filter(move |(n, _)| keep >> n & 1 == 0);
                (ending().count(), ending().map(|(_, i)| i.placement.size).sum::<u32>())
            };
            let mut least = None;
            for device in &devices {
                for keep in 0..1_u32 << device.instances.len() {
                    let mut after = device.clone();
                    let mut bits = (0..).map(|n| keep >> n & 1 == 1);
                    after.instances.retain(|_| bits.next().unwrap());
                    if fits_somehow(&[after], &names) && least.is_none_or(|least| size(device, keep) < least) {
                        least = Some(size(device, keep));
                    }
                }
            }
            for set in &refusal.smallest_blockers {
                let total = set.iter().map(|held| held.placement.size).sum::<u32>();
                prop_assert_eq!(Some((set.len(), total)), least);
            }
        }
    }
}
