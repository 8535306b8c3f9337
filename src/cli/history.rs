//! `migctl history`: who held which slices, and how long, from the audit log.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use flate2::bufread::MultiGzDecoder;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::leases_in;
use crate::history::{End, Entry, Hold, Ledger, Part, Selection, Standing, Sums, Unreadable};
use crate::host;
use crate::lease::short;
use crate::report::{Exit, Misused};

/// Most bytes of a line. An audit line has some hundred.
const LONGEST_LINE: u64 = 1 << 20;

/// Arguments of `migctl history`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only what was held after that: an age (7d, 12h) or a local date or time
    #[arg(long, value_name = "AGE|TIME", value_parser = moment)]
    since: Option<u64>,
    /// Only what was held before that
    #[arg(long, value_name = "AGE|TIME", value_parser = moment)]
    until: Option<u64>,
    /// Only what that user's containers held: name or uid
    #[arg(long, value_parser = super::target::user)]
    user: Option<u32>,
    /// Only images with this in their name
    #[arg(long)]
    image: Option<String>,
    /// Only the container whose id begins so
    #[arg(long, value_name = "ID")]
    container: Option<String>,
    /// Sums instead of holds
    #[arg(long)]
    by: Option<By>,
    /// Show that many holds, those that ended last; 0: all
    #[arg(long, value_name = "N", default_value_t = 1000)]
    last: usize,
    /// Read this file (- is standard input) instead of log.audit_file and its rotated neighbours
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

/// What sums are made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum By {
    /// The login uid of who started the container.
    User,
    /// The image.
    Image,
    /// The profile of each slice.
    Profile,
    /// The container id.
    Container,
}

/// The document of `migctl history`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct History {
    /// The files that were read, oldest first; `-` is standard input.
    files: Vec<String>,
    /// Begin of the period, as RFC 3339 in UTC.
    since: Option<String>,
    /// End of the period.
    until: Option<String>,
    /// By start; none with `--by`.
    holds: Vec<HoldRow>,
    /// How many holds `--last` left out. The sums have them.
    omitted: u64,
    /// What `groups` are made by.
    by: Option<By>,
    /// The most slice-hours first; none without `--by`.
    groups: Vec<Group>,
    /// Everything that was meant.
    total: Sums,
    /// Requests that were refused in that time.
    refusals: u64,
    /// Lines that are no audit lines, such as one that a full disk cut.
    unreadable_lines: u64,
    /// What could not be read to its end, in words.
    damaged: Vec<String>,
}

/// What one container held.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct HoldRow {
    /// The lease.
    token: String,
    /// As RFC 3339 in UTC.
    start: String,
    /// When the slices were given back.
    end: Option<String>,
    /// From start to end, or to now; null where the end is not known.
    held_ms: Option<u64>,
    /// How much of that lies in the period.
    counted_ms: u64,
    /// Whether it has ended.
    state: End,
    /// Why it ended, in words.
    reason: Option<String>,
    /// Login uid of who started the container.
    uid: Option<u32>,
    /// The name of that user, where this machine knows it.
    user: Option<String>,
    /// Container id.
    container: Option<String>,
    /// Key of the job.
    job: Option<String>,
    /// Program of the command of `migctl run`.
    command: Option<String>,
    /// Its image, where the engine told it.
    image: Option<String>,
    /// In the order asked.
    slices: Vec<Part>,
}

/// Sums of one user, image, profile or container.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct Group {
    /// User name or uid, image, profile or container id; null where it is not known.
    name: Option<String>,
    /// What it comes to.
    #[serde(flatten)]
    sums: Sums,
    /// Requests that were refused; null with `--by profile`, since a refused request has no slices.
    refusals: Option<u64>,
}

/// What has been read so far: bounded by the holds that are shown, the groups, and the grants without a release.
struct Reading<'a> {
    args: &'a Args,
    selection: Selection,
    ledger: Ledger,
    shown: VecDeque<(Hold, u64)>,
    omitted: u64,
    total: Sums,
    refusals: u64,
    groups: HashMap<Option<String>, (Sums, u64)>,
    users: Users,
    unreadable: u64,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    if let (Some(since), Some(until)) = (args.since, args.until)
        && since >= until
    {
        bail!(Misused("--since is not before --until; nothing lies between them".into()));
    }
    let sources = sources(settings, args.from.as_deref())?;
    let mut reading = Reading::new(args);
    let mut damaged = Vec::new();
    for source in &sources {
        if let Err(error) = open(source).and_then(|lines| reading.take_in(lines)) {
            damaged.push(format!("{}: {error}", source.name));
        }
    }
    reading.close(settings)?;
    let document = reading.document(sources.into_iter().map(|source| source.name).collect(), damaged);
    super::print(&document, json, text)?;
    Ok(Exit::Ok)
}

/// What is read.
struct Source {
    name: String,
    /// None: standard input.
    file: Option<File>,
}

/// What is to be read, oldest first.
fn sources(settings: &Settings, from: Option<&Path>) -> Result<Vec<Source>> {
    if let Some(path) = from {
        let name = path.display().to_string();
        let open = || File::open(path).with_context(|| format!("cannot read {name}"));
        let file = if name == "-" { None } else { Some(open()?) };
        return Ok(vec![Source { name, file }]);
    }
    let Some(audit) = &settings.audit_file else {
        bail!(Misused(
            "there is no audit file: the setting log.audit_file = \"/var/log/mig-hook-audit.jsonl\" makes one; what the \
             journal has of it shows: journalctl -t mig-hook -o cat | migctl history --from -"
                .into()
        ));
    };
    let mut sources = Vec::new();
    let mut seen = BTreeSet::new();
    // The newest first: one that is rotated meanwhile is met again under its next name.
    for path in std::iter::once(audit.clone()).chain(rotated(audit)?.into_iter().rev()) {
        let name = path.display().to_string();
        match File::open(&path).and_then(|file| Ok((file.metadata()?, file))) {
            Ok((about, _)) if !seen.insert((about.dev(), about.ino())) => {}
            Ok((_, file)) => sources.insert(0, Source { name, file: Some(file) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // nothing was logged yet, or it was deleted now
            Err(error) => bail!(anyhow::Error::new(error).context(format!("cannot read {name}"))),
        }
    }
    Ok(sources)
}

/// What logrotate made of a file, oldest first: `FILE.2.gz`, `FILE.1`, or `FILE-20260131.gz` with `dateext`.
fn rotated(file: &Path) -> Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let entries = match dir.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => bail!(anyhow::Error::new(error).context(format!("cannot list {}", dir.display()))),
    };
    let mut found: Vec<(Age, PathBuf)> = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let rest = path.file_name().and_then(|other| other.to_str()).and_then(|other| other.strip_prefix(name));
        found.extend(rest.and_then(age).map(|age| (age, path)));
    }
    found.sort();
    // While gzip is at work there are both: FILE.1 is whole, FILE.1.gz is not yet.
    found.dedup_by(|packed, plain| packed.0 == plain.0);
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// How old a rotated file is, by the end of its name. The oldest is the least.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Age {
    Date(String),
    Number(std::cmp::Reverse<u32>),
}

fn age(ending: &str) -> Option<Age> {
    let ending = ending.strip_suffix(".gz").unwrap_or(ending);
    if let Some(number) = ending.strip_prefix('.') {
        return number.parse().ok().map(|number| Age::Number(std::cmp::Reverse(number)));
    }
    let date = ending.strip_prefix('-')?;
    let is_date = date.len() >= 8 && date.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    is_date.then(|| Age::Date(date.to_owned()))
}

/// The lines of a file, unpacked where it is compressed by gzip.
fn open(source: &Source) -> io::Result<Box<dyn BufRead + '_>> {
    let mut lines: Box<dyn BufRead> = match &source.file {
        Some(file) => Box::new(BufReader::with_capacity(1 << 16, file)),
        None => Box::new(BufReader::with_capacity(1 << 16, io::stdin().lock())),
    };
    match lines.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        true => Ok(Box::new(BufReader::new(MultiGzDecoder::new(lines)))),
        false => Ok(lines),
    }
}

impl<'a> Reading<'a> {
    fn new(args: &'a Args) -> Reading<'a> {
        let selection = Selection {
            since_ms: args.since,
            until_ms: args.until,
            uid: args.user,
            image: args.image.clone(),
            container: args.container.clone(),
        };
        Reading {
            args,
            selection,
            ledger: Ledger::default(),
            shown: VecDeque::new(),
            omitted: 0,
            total: Sums::default(),
            refusals: 0,
            groups: HashMap::new(),
            users: Users::default(),
            unreadable: 0,
        }
    }

    /// Reads to the end.
    fn take_in(&mut self, mut lines: Box<dyn BufRead + '_>) -> io::Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if (&mut lines).take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let text = line.trim_ascii();
            // The journal has other lines of ours, too.
            if text.is_empty() || (self.args.from.is_some() && !text.starts_with(b"{")) {
                continue;
            }
            match self.ledger.read(text) {
                Ok(Some(Entry::Hold(hold))) => self.add(hold),
                Ok(Some(Entry::Refusal(who, time_ms))) if self.selection.includes(&who, time_ms) => {
                    self.refusals += 1;
                    if self.args.by.is_some_and(|by| by != By::Profile) {
                        let name = self.name(who.uid, &who.image, &who.container);
                        self.groups.entry(name).or_default().1 += 1;
                    }
                }
                Ok(Some(Entry::Refusal(..)) | None) => {}
                Err(Unreadable) => self.unreadable += 1,
            }
        }
    }

    /// Adds the holds that have no release, by what the leases say that stand now.
    fn close(&mut self, settings: &Settings) -> Result<()> {
        let store = super::readable_state(settings)?;
        let leases = store.as_ref().map(leases_in).transpose()?;
        let boot = host::boot_id()?;
        let standing = match &leases {
            None if !nix::unistd::geteuid().is_root() => Standing::Hidden,
            leases => {
                let leases = leases.as_deref().unwrap_or_default();
                Standing::Known { leases, boot: &boot, own_log: self.args.from.is_none() }
            }
        };
        let ledger = std::mem::take(&mut self.ledger);
        ledger.close(&standing, host::wall_ms()).into_iter().for_each(|hold| self.add(hold));
        Ok(())
    }

    fn add(&mut self, hold: Hold) {
        let Some(counted) = self.selection.counted(&hold) else { return };
        self.total.add(&hold, hold.slices.iter(), counted);
        match self.args.by {
            Some(By::Profile) => {
                let mut profiles: Vec<&str> = hold.slices.iter().map(|slice| slice.profile.as_str()).collect();
                profiles.sort_unstable();
                profiles.dedup();
                for profile in profiles {
                    let slices = hold.slices.iter().filter(|slice| slice.profile == profile);
                    self.groups.entry(Some(profile.to_owned())).or_default().0.add(&hold, slices, counted);
                }
            }
            Some(_) => {
                let name = self.name(hold.who.uid, &hold.who.image, &hold.who.container);
                self.groups.entry(name).or_default().0.add(&hold, hold.slices.iter(), counted);
            }
            None => {
                self.shown.push_back((hold, counted));
                if self.args.last > 0 && self.shown.len() > self.args.last {
                    self.shown.pop_front();
                    self.omitted += 1;
                }
            }
        }
    }

    /// What somebody is called in the groups.
    fn name(&mut self, uid: Option<u32>, image: &Option<String>, container: &Option<String>) -> Option<String> {
        match self.args.by {
            Some(By::User) => uid.map(|uid| self.users.name(uid).unwrap_or_else(|| uid.to_string())),
            Some(By::Image) => image.clone(),
            Some(By::Container) => container.clone(),
            Some(By::Profile) | None => None,
        }
    }

    fn document(mut self, files: Vec<String>, damaged: Vec<String>) -> History {
        let mut shown: Vec<(Hold, u64)> = self.shown.drain(..).collect();
        shown.sort_by_key(|(hold, _)| hold.start_ms);
        let holds = shown.into_iter().map(|(hold, counted)| self.row(hold, counted)).collect();
        let refusals = |count| (self.args.by != Some(By::Profile)).then_some(count);
        let group = |(name, (sums, refused))| Group { name, sums, refusals: refusals(refused) };
        let mut groups: Vec<Group> = self.groups.drain().map(group).collect();
        groups.sort_by(|a, b| b.sums.slice_hours.total_cmp(&a.sums.slice_hours).then_with(|| a.name.cmp(&b.name)));
        History {
            files,
            since: self.args.since.map(utc),
            until: self.args.until.map(utc),
            holds,
            omitted: self.omitted,
            by: self.args.by,
            groups,
            total: self.total,
            refusals: self.refusals,
            unreadable_lines: self.unreadable,
            damaged,
        }
    }

    fn row(&mut self, hold: Hold, counted_ms: u64) -> HoldRow {
        let end = hold.held_ms.filter(|_| hold.end == End::Released).map(|held| utc(hold.start_ms + held));
        HoldRow {
            token: hold.token,
            start: utc(hold.start_ms),
            end,
            held_ms: hold.held_ms,
            counted_ms,
            state: hold.end,
            reason: hold.reason,
            uid: hold.who.uid,
            user: hold.who.uid.and_then(|uid| self.users.name(uid)),
            container: hold.who.container,
            job: hold.who.job,
            command: hold.who.command,
            image: hold.who.image,
            slices: hold.slices,
        }
    }
}

/// Names of users, each looked up once: where they come from may be far away.
#[derive(Debug, Default)]
struct Users(BTreeMap<u32, Option<String>>);

impl Users {
    fn name(&mut self, uid: u32) -> Option<String> {
        self.0.entry(uid).or_insert_with(|| host::user_name(uid)).clone()
    }
}

/// Milliseconds since 1970 of `7d` (ago), `2026-01-31`, `2026-01-31 12:00` (both local) or `2026-01-31T12:00:00Z`.
fn moment(text: &str) -> Result<u64, String> {
    let now = host::wall_ms();
    if let Ok(age) = humantime::parse_duration(text) {
        return Ok(now.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)));
    }
    let local = || text.parse::<DateTime>().ok()?.to_zoned(TimeZone::system()).ok();
    let time = text.parse::<Timestamp>().ok().or_else(|| local().map(|time| time.timestamp()));
    let ms = time.and_then(|time| u64::try_from(time.as_millisecond()).ok());
    ms.ok_or_else(|| {
        "write an age, as 7d or 12h30m, or a time, as 2026-01-31, \"2026-01-31 12:00\" or 2026-01-31T12:00:00Z".into()
    })
}

fn time(ms: u64) -> Timestamp {
    i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).unwrap_or(Timestamp::MAX)
}

fn utc(ms: u64) -> String {
    time(ms).to_string()
}

/// A time of the document as the clock on the wall shows it.
fn local(utc: &str) -> String {
    let time = utc.parse::<Timestamp>().unwrap_or_default().to_zoned(TimeZone::system());
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn text(history: &History) -> String {
    let mut out = match history.by {
        Some(by) => sums_table(history, by),
        None => holds_table(history),
    };
    if history.omitted > 0 {
        out += &format!("{} that ended earlier: --last 0 shows all\n", super::counted(history.omitted, "more hold"));
    }
    out += &total(history);
    if history.unreadable_lines > 0 {
        out += &format!("{} could not be read\n", super::counted(history.unreadable_lines, "line"));
    }
    for damaged in &history.damaged {
        out += &format!("not read to its end: {damaged}\n");
    }
    out
}

fn holds_table(history: &History) -> String {
    let titles = ["START", "HELD FOR", "USER", "HOLDER", "IMAGE", "SLICES", "GPU", "END"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(history.holds.iter().map(|hold| {
        let or_dash = |text: Option<&str>| super::printable(text.unwrap_or("-"));
        let mut gpus: Vec<String> =
            hold.slices.iter().map(|s| s.gpu_index.map_or_else(|| s.gpu.clone(), |index| index.to_string())).collect();
        gpus.dedup();
        let uid = hold.uid.map(|uid| uid.to_string());
        vec![
            local(&hold.start),
            hold.held_ms.map_or("?".into(), super::duration),
            or_dash(hold.user.as_deref().or(uid.as_deref())),
            or_dash(hold.container.as_deref().map(short).or(hold.job.as_deref()).or(hold.command.as_deref())),
            or_dash(hold.image.as_deref()),
            super::printable(&hold.slices.iter().map(|s| s.profile.as_str()).collect::<Vec<_>>().join(",")),
            super::printable(&gpus.join(",")),
            match (hold.state, &hold.reason) {
                (End::Holding, None) => "still held".into(),
                (End::Holding, Some(reason)) => format!("still held: {reason}"),
                (_, reason) => or_dash(reason.as_deref()),
            },
        ]
    }));
    if history.holds.is_empty() { String::new() } else { super::table(&rows) }
}

fn sums_table(history: &History, by: By) -> String {
    let mut titles = vec![super::word(by).to_uppercase()];
    titles
        .extend(["HOLDS", "HELD NOW", "SLICE-HOURS", "GIB-HOURS", "COMPUTE-SLICE-HOURS", "REFUSED"].map(str::to_owned));
    let mut rows = vec![titles];
    rows.extend(history.groups.iter().map(|group| {
        let sums = &group.sums;
        let name = group.name.as_deref().unwrap_or("-");
        vec![
            super::printable(if by == By::Container { short(name) } else { name }),
            sums.holds.to_string(),
            sums.holding.to_string(),
            format!("{:.2}", sums.slice_hours),
            format!("{:.2}", sums.gib_hours),
            format!("{:.2}", sums.compute_slice_hours),
            group.refusals.map_or("-".into(), |refusals| refusals.to_string()),
        ]
    }));
    if history.groups.is_empty() { String::new() } else { super::table(&rows) }
}

fn total(history: &History) -> String {
    let sums = &history.total;
    let mut out = match sums.holds {
        0 => "no holds".to_owned(),
        holds => {
            let (slices, gib, compute) = (sums.slice_hours, sums.gib_hours, sums.compute_slice_hours);
            let holds = super::counted(holds, "hold");
            format!("{holds}: {slices:.2} slice-hours, {gib:.2} GiB-hours, {compute:.2} compute-slice-hours")
        }
    };
    if sums.unknown_ends > 0 {
        out += &format!("; {} no known end and count{} no hours", have(sums.unknown_ends), s(sums.unknown_ends));
    }
    if history.refusals > 0 {
        out += &format!("; {} refused", super::counted(history.refusals, "request"));
    }
    out + "\n"
}

fn have(n: u64) -> String {
    format!("{n} {}", if n == 1 { "has" } else { "have" })
}

/// The ending of a verb.
fn s(n: u64) -> &'static str {
    if n == 1 { "s" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_ages_local_times_or_instants() {
        assert_eq!(moment("2026-01-31T12:00:00Z"), Ok(1_769_860_800_000));
        assert_eq!(moment("2026-01-31T12:00:00+02:00"), Ok(1_769_853_600_000));
        let of = |text: &str| text.parse::<DateTime>().unwrap().to_zoned(TimeZone::system()).unwrap();
        let midnight = of("2026-01-31T00:00").timestamp().as_millisecond();
        assert_eq!(moment("2026-01-31"), Ok(midnight as u64));
        assert_eq!(moment("2026-01-31 12:30"), moment("2026-01-31T12:30:00"));
        let week = host::wall_ms() - moment("7d").unwrap();
        assert!((604_800_000..604_900_000).contains(&week), "{week}");
        for wrong in ["", "7", "yesterday", "2026-02-30", "1969-01-01T00:00:00Z"] {
            assert!(moment(wrong).unwrap_err().contains("7d"), "{wrong}");
        }
    }

    #[test]
    fn rotated_files_are_known_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "a.jsonl",
            "a.jsonl.1",
            "a.jsonl.1.gz",
            "a.jsonl.10.gz",
            "a.jsonl.2.gz",
            "a.jsonl-20260102",
            "a.jsonl-20260101.gz",
            "a.jsonl.bak",
            "a.jsonl.1.xz",
            "b.jsonl.1",
            "a.jsonl-old",
        ];
        for name in names {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = rotated(&dir.path().join("a.jsonl")).unwrap();
        let found: Vec<&str> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        let expected = ["a.jsonl-20260101.gz", "a.jsonl-20260102", "a.jsonl.10.gz", "a.jsonl.2.gz", "a.jsonl.1"];
        assert_eq!(found, expected);
    }
}
