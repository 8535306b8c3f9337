//! What a container asks for: the grammar of the `mig.*` annotations and `MIG_*` environment variables.
//!
//! | annotation | environment | value |
//! |---|---|---|
//! | `mig.profile` | `MIG_PROFILE` | `1g.10gb`; a list `1g.10gb,2g.20gb`; counts `2x1g.10gb`; alternatives in order `2g.20gb\|1g.20gb` |
//! | `mig.memory` | `MIG_MEMORY` | a size, `8GiB`, instead of a profile; the same lists, counts and alternatives |
//! | `mig.gpu` | `MIG_GPU` | the parent GPU of all slices: index, `GPU-…` or PCI address; beside a profile or a memory size |
//! | `mig.uuid` | `MIG_UUID` | existing slices, a list of `MIG-…`; without a GPU |
//! | `mig.wait` | `MIG_WAIT` | how long to wait for room, `30s`, `5m` or `1h`; beside any of these |
//!
//! `|` binds weakest, then `,`, then the count. Spaces around the parts are ignored. In a pod, `mig.profile/NAME` is
//! for the container of that name.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::gpu::Device;
use crate::profile;

/// Longest value that is read, in bytes.
const MAX_VALUE: usize = 256;
/// Most slices in one alternative.
const MAX_SLICES: usize = 64;
/// Longest wait that is understood, in seconds: a week.
const MAX_WAIT_S: u32 = 7 * 24 * 3600;
/// Units of a wait, the largest first, in seconds.
const WAIT_UNITS: [(&str, u32); 3] = [("h", 3600), ("m", 60), ("s", 1)];
/// Most characters of a stranger's text in a message.
const MAX_SHOWN: usize = 60;

/// A container's request, parsed and bounded, not yet compared with any GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// What would do, best first: each alternative is a list of slices, all of them or none.
    pub alternatives: Vec<Vec<Want>>,
    /// The GPU that all slices must come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuSelector>,
    /// Seconds to wait for room at most; none: it is refused at once where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<u32>,
}

/// One wanted slice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Want {
    /// A slice of the profile of that name.
    Profile(String),
    /// A slice of the smallest profile with at least that much memory.
    Memory {
        /// Memory in bytes.
        bytes: u64,
    },
    /// This existing slice, `MIG-…`.
    Uuid(String),
}

impl Want {
    /// The annotation that asks for this kind of slice.
    pub fn key(&self) -> &'static str {
        match self {
            Want::Profile(_) => Key::Profile.annotation(),
            Want::Memory { .. } => Key::Memory.annotation(),
            Want::Uuid(_) => Key::Uuid.annotation(),
        }
    }
}

impl fmt::Display for Want {
    /// As it is written in a request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Want::Profile(name) => f.write_str(name),
            Want::Memory { bytes } => f.write_str(&profile::format_size(*bytes)),
            Want::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// How a request names a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuSelector {
    /// NVML index.
    Index(u32),
    /// `GPU-…`, hexadecimal digits in lower case.
    Uuid(String),
    /// PCI address as NVML writes it, `00000000:07:00.0`, hexadecimal digits in upper case.
    Pci(String),
}

impl GpuSelector {
    /// An index (`0`), a UUID (`GPU-…`) or a PCI address (`07:00.0`, with or without a domain).
    pub fn parse(text: &str) -> Option<GpuSelector> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            text.parse().ok().map(GpuSelector::Index)
        } else if let Some(rest) = text.strip_prefix("GPU-") {
            plain_uuid(rest).map(|uuid| GpuSelector::Uuid(format!("GPU-{uuid}")))
        } else {
            pci_address(text).map(GpuSelector::Pci)
        }
    }

    /// True when this GPU is meant.
    pub fn matches(&self, device: &Device) -> bool {
        match self {
            GpuSelector::Index(index) => device.index == *index,
            GpuSelector::Uuid(uuid) => device.uuid.eq_ignore_ascii_case(uuid),
            GpuSelector::Pci(address) => pci_address(&device.pci_bus_id).as_ref() == Some(address),
        }
    }
}

impl fmt::Display for GpuSelector {
    /// As it is written in a request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GpuSelector::Index(index) => write!(f, "{index}"),
            GpuSelector::Uuid(text) | GpuSelector::Pci(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Request {
    /// `mig.profile=2x1g.10gb|2g.20gb mig.gpu=0`: the annotations that ask for the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.alternatives.iter().flatten().next().map_or(Key::Profile.annotation(), Want::key);
        write!(f, "{key}={}", format_alternatives(&self.alternatives))?;
        if let Some(gpu) = &self.gpu {
            write!(f, " {}={gpu}", Key::Gpu.annotation())?;
        }
        match self.wait_s {
            Some(seconds) => write!(f, " {}={}", Key::Wait.annotation(), format_wait(seconds)),
            None => Ok(()),
        }
    }
}

/// A time to wait as it is written in a request: `90s`, `5m`, `1h`.
pub fn format_wait(seconds: u32) -> String {
    let (unit, size) = WAIT_UNITS.into_iter().find(|(_, size)| seconds.is_multiple_of(*size)).unwrap_or(("s", 1));
    format!("{}{unit}", seconds / size)
}

/// Seconds of a time as it is written in a request.
pub fn parse_wait(text: &str) -> Option<u32> {
    let (unit, size) = WAIT_UNITS.into_iter().find(|(unit, _)| text.ends_with(unit))?;
    let number = text.strip_suffix(unit)?;
    let plain = (1..=6).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
    let seconds = number.parse::<u32>().ok().filter(|_| plain)?.checked_mul(size)?;
    (1..=MAX_WAIT_S).contains(&seconds).then_some(seconds)
}

/// Alternatives as they are written in a request: `2x1g.10gb,2g.20gb|3g.40gb`.
pub fn format_alternatives(alternatives: &[Vec<Want>]) -> String {
    alternatives.iter().map(|wants| format_wants(wants)).collect::<Vec<_>>().join("|")
}

/// One alternative as it is written in a request: `2x1g.10gb,2g.20gb`.
pub fn format_wants(wants: &[Want]) -> String {
    let runs = wants.chunk_by(|a, b| a == b).filter_map(|run| run.first().map(|want| (run.len(), want)));
    let parts: Vec<String> =
        runs.map(|(count, want)| if count == 1 { want.to_string() } else { format!("{count}x{want}") }).collect();
    parts.join(",")
}

/// Why a request is refused. Every one of these is the caller's mistake; the sentences quote at most 60 characters of
/// the caller's text, and only printable ASCII of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A `mig.` annotation that means nothing.
    #[error("unknown annotation {key}; valid are {valid}, each also as KEY/CONTAINER for one container of a pod")]
    UnknownKey {
        /// The annotation, safe to print.
        key: String,
        /// The valid ones, the most similar one first.
        valid: String,
    },
    /// Quotes that were meant for somebody else.
    #[error("annotation {key}: leave the quotes out; only podman before 5.0 needs them, around a value with commas")]
    Quoted {
        /// The annotation, safe to print.
        key: String,
    },
    /// `mig.profile/NAME` with a NAME that no container has.
    #[error(
        "annotation {key}: what follows the / must be a container's name of at most 128 letters, digits, '.', '_' or '-'"
    )]
    ContainerName {
        /// The annotation, safe to print.
        key: String,
    },
    /// `mig.profile/NAME` where the engine does not tell the container's name.
    #[error("{key} names one container of a pod, but this engine does not tell which this one is; use {base} instead")]
    NoName {
        /// The annotation, safe to print.
        key: String,
        /// The key without a name.
        base: &'static str,
    },
    /// A value that can't be read.
    #[error("{key}: {problem}")]
    Value {
        /// The annotation or variable.
        key: String,
        /// What is wrong, with the offending part.
        problem: String,
    },
    /// Keys or values that contradict each other.
    #[error("{one} and {other} contradict each other: {rule}")]
    Conflict {
        /// One annotation or variable.
        one: String,
        /// The other one.
        other: String,
        /// What is allowed.
        rule: &'static str,
    },
}

/// The request in a container's annotations; `None` when they ask for nothing.
///
/// Every key under `mig.` must be known; `mig.lease` is ours and skipped. As soon as one key carries a container's name
/// (whosever), the unnamed keys apply to nobody, so that a sidecar never gets a slice by accident. Values that apply to
/// other containers are not looked at. Where the engine does not tell a `container_name`, named keys are refused: nobody
/// could say whether they mean this container, and it must not start without the slice that was meant for it.
pub fn from_annotations<'a>(
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
    container_name: Option<&str>,
) -> Result<Option<Request>, RequestError> {
    let mut unnamed = Asked::default();
    let mut named = Asked::default();
    let mut any_named = false;
    for (key, value) in annotations {
        if !crate::first::ours(key) || key == "mig.lease" {
            continue;
        }
        if key.starts_with('"') {
            return Err(RequestError::Quoted { key: shown(key) });
        }
        let (base, name) = match key.split_once('/') {
            Some((base, name)) => (base, Some(name)),
            None => (key, None),
        };
        let known = Key::ALL.into_iter().find(|k| k.annotation() == base).ok_or_else(|| unknown_key(key, base))?;
        let Some(name) = name else {
            unnamed.put(known, key, value)?;
            continue;
        };
        if !is_container_name(name) {
            return Err(RequestError::ContainerName { key: shown(key) });
        }
        any_named = true;
        let Some(own_name) = container_name else {
            return Err(RequestError::NoName { key: shown(key), base: known.annotation() });
        };
        if own_name == name {
            named.put(known, key, value)?;
        }
    }
    if any_named { named.request() } else { unnamed.request() }
}

/// The request in a container's environment, given as `KEY=VALUE`; `None` when it asks for nothing. Other `MIG_*`
/// variables are none of our business. The caller decides whether environments count at all.
pub fn from_env<'a>(vars: impl Iterator<Item = &'a str>) -> Result<Option<Request>, RequestError> {
    let mut asked = Asked::default();
    for (name, value) in vars.filter_map(|var| var.split_once('=')) {
        if let Some(key) = Key::ALL.into_iter().find(|k| k.variable() == name) {
            asked.put(key, name, value)?;
        }
    }
    asked.request()
}

/// A request as a person types it: profiles, amounts of memory or UUIDs, told apart by their look, and a GPU.
pub fn typed(text: &str, gpu: Option<&str>) -> Result<Request, RequestError> {
    let mut asked = Asked::default();
    let key = match text.trim() {
        text if text.starts_with("MIG-") => Key::Uuid,
        text if is_amount(text) => Key::Memory,
        _ => Key::Profile,
    };
    asked.put(key, TYPED, text)?;
    if let Some(gpu) = gpu {
        asked.put(Key::Gpu, "--gpu", gpu)?;
    }
    let empty = || RequestError::Value { key: TYPED.into(), problem: "it asks for nothing".into() };
    asked.request()?.ok_or_else(empty)
}

/// The profiles and amounts of memory of a list that is to be cut, compute instances (`1c.3g.40gb`) among them.
pub(crate) fn list_of_cuts(text: &str) -> Result<Vec<Want>, RequestError> {
    let entry = Entry { key: TYPED, value: text };
    check_characters(&entry)?;
    if text.contains('|') {
        return Err(entry.error("what is to be cut has no alternatives; name the one that is wanted".into()));
    }
    parse_list(&entry, text, |item| {
        if item.starts_with("MIG-") {
            return Err("it names an existing slice; a profile or an amount of memory can be cut".into());
        }
        if let Some((compute, whole)) = profile::split_compute(item) {
            let room = profile::compute_slices(whole);
            let too_large = || format!("{whole} has {room} compute slices, not {compute}");
            return if compute <= room { Ok(Want::Profile(item.to_owned())) } else { Err(too_large()) };
        }
        if is_amount(item) { parse_memory(item) } else { parse_profile(item) }
    })
}

/// Whether it looks like an amount of memory rather than a profile, however either is misspelled.
fn is_amount(text: &str) -> bool {
    text.contains(['B', 'i']) && !text.to_ascii_lowercase().contains("g.")
}

/// What a person types, in messages.
const TYPED: &str = "REQUEST";

/// The keys of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Profile,
    Memory,
    Gpu,
    Uuid,
    Wait,
}

impl Key {
    const ALL: [Key; 5] = [Key::Profile, Key::Memory, Key::Gpu, Key::Uuid, Key::Wait];

    fn annotation(self) -> &'static str {
        match self {
            Key::Profile => "mig.profile",
            Key::Memory => "mig.memory",
            Key::Gpu => "mig.gpu",
            Key::Uuid => "mig.uuid",
            Key::Wait => "mig.wait",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Key::Profile => "MIG_PROFILE",
            Key::Memory => "MIG_MEMORY",
            Key::Gpu => "MIG_GPU",
            Key::Uuid => "MIG_UUID",
            Key::Wait => "MIG_WAIT",
        }
    }
}

/// One key as the caller spelled it, with its value.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    key: &'a str,
    value: &'a str,
}

impl Entry<'_> {
    fn error(&self, problem: String) -> RequestError {
        RequestError::Value { key: shown(self.key), problem }
    }

    fn conflict(&self, other: &Entry<'_>, rule: &'static str) -> RequestError {
        RequestError::Conflict { one: shown(self.key), other: shown(other.key), rule }
    }
}

/// The raw keys that apply to one container.
#[derive(Debug, Default)]
struct Asked<'a> {
    profile: Option<Entry<'a>>,
    memory: Option<Entry<'a>>,
    gpu: Option<Entry<'a>>,
    uuid: Option<Entry<'a>>,
    wait: Option<Entry<'a>>,
}

impl<'a> Asked<'a> {
    fn put(&mut self, key: Key, spelled: &'a str, value: &'a str) -> Result<(), RequestError> {
        let entry = Entry { key: spelled, value };
        let slot = match key {
            Key::Profile => &mut self.profile,
            Key::Memory => &mut self.memory,
            Key::Gpu => &mut self.gpu,
            Key::Uuid => &mut self.uuid,
            Key::Wait => &mut self.wait,
        };
        match slot.replace(entry) {
            Some(before) if before.value != value => Err(before.conflict(&entry, "it is given twice with two values")),
            _ => Ok(()),
        }
    }

    fn request(&self) -> Result<Option<Request>, RequestError> {
        for entry in [self.profile, self.memory, self.gpu, self.uuid, self.wait].into_iter().flatten() {
            check_characters(&entry)?;
        }
        if let (Some(profile), Some(memory)) = (&self.profile, &self.memory) {
            return Err(profile.conflict(memory, "ask for a profile or for an amount of memory"));
        }
        let wait_s = self.wait.as_ref().map(read_wait).transpose()?;
        if let Some(uuid) = &self.uuid {
            return match self.profile.or(self.memory).or(self.gpu) {
                Some(other) => Err(uuid.conflict(&other, "an existing slice has its profile and its GPU already")),
                None => Ok(Some(Request { alternatives: vec![parse_uuids(uuid)?], gpu: None, wait_s })),
            };
        }
        let alternatives = match (&self.profile, &self.memory, &self.gpu) {
            (Some(entry), ..) => parse_alternatives(entry, parse_profile)?,
            (None, Some(entry), _) => parse_alternatives(entry, parse_memory)?,
            (None, None, Some(gpu)) => {
                return Err(
                    gpu.error("it says only where; also ask for a profile (1g.10gb) or memory (8GiB)".to_owned())
                );
            }
            (None, None, None) => {
                let nothing = |wait: &Entry<'_>| {
                    wait.error("it says only how long; also ask for a profile (1g.10gb) or memory (8GiB)".to_owned())
                };
                return self.wait.as_ref().map_or(Ok(None), |wait| Err(nothing(wait)));
            }
        };
        let gpu = self.gpu.as_ref().map(parse_gpu).transpose()?;
        Ok(Some(Request { alternatives, gpu, wait_s }))
    }
}

/// The checks that come before any grammar.
fn check_characters(entry: &Entry<'_>) -> Result<(), RequestError> {
    let value = entry.value;
    if value.len() > MAX_VALUE {
        return Err(entry.error(format!("the value is {} bytes long; at most {MAX_VALUE} are read", value.len())));
    }
    if !value.is_ascii() {
        return Err(entry.error(format!("the value '{}' is not plain ASCII", shown(value))));
    }
    if value.bytes().any(|b| b.is_ascii_control()) {
        return Err(entry.error(format!("the value '{}' contains control characters", shown(value))));
    }
    if value.trim().is_empty() {
        return Err(entry.error("the value is empty; leave the key out to ask for nothing".to_owned()));
    }
    Ok(())
}

/// `ITEM`, `NxITEM`, lists of them with `,` and alternatives of lists with `|`.
fn parse_alternatives(
    entry: &Entry<'_>,
    item: fn(&str) -> Result<Want, String>,
) -> Result<Vec<Vec<Want>>, RequestError> {
    entry.value.split('|').map(|list| parse_list(entry, list, item)).collect()
}

fn parse_list(
    entry: &Entry<'_>,
    list: &str,
    item: fn(&str) -> Result<Want, String>,
) -> Result<Vec<Want>, RequestError> {
    let mut wants = Vec::new();
    for part in list.split(',').map(str::trim) {
        if part.is_empty() {
            return Err(entry.error(format!("something is missing beside a ',' or '|' in '{}'", shown(entry.value))));
        }
        let (count, text) = split_count(part).map_err(|problem| entry.error(problem))?;
        let want = item(text).map_err(|problem| entry.error(format!("'{}': {problem}", shown(text))))?;
        if wants.len() + count > MAX_SLICES {
            return Err(entry.error(format!("'{}' is more than {MAX_SLICES} slices", shown(list.trim()))));
        }
        wants.extend(std::iter::repeat_n(want, count));
    }
    Ok(wants)
}

/// `2x1g.10gb` → 2 and `1g.10gb`; without a count, 1 and the text.
fn split_count(part: &str) -> Result<(usize, &str), String> {
    let Some((count, text)) = part.split_once('x').filter(|(count, _)| count.bytes().all(|b| b.is_ascii_digit()))
    else {
        return Ok((1, part));
    };
    match count.parse() {
        Ok(count) if (1..=MAX_SLICES).contains(&count) => Ok((count, text)),
        _ => Err(format!("'{}': a count is a number from 1 to {MAX_SLICES}, as in 2x1g.10gb", shown(part))),
    }
}

fn parse_profile(text: &str) -> Result<Want, String> {
    match profile::check_name(text) {
        Ok(()) => Ok(Want::Profile(text.to_owned())),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_memory(text: &str) -> Result<Want, String> {
    match profile::parse_size(text) {
        Ok(bytes) => Ok(Want::Memory { bytes }),
        Err(error) => Err(error.to_string()),
    }
}

/// A list of existing slices, each once.
fn parse_uuids(entry: &Entry<'_>) -> Result<Vec<Want>, RequestError> {
    let mut wants = Vec::new();
    for part in entry.value.split(',').map(str::trim) {
        let Some(uuid) = slice_uuid(part) else {
            return Err(entry.error(format!(
                "'{}' is not the UUID of a MIG slice; migctl list shows them, as MIG-aca87b1e-f22b-5b07-8b5e-6bd4e1e4a3a5",
                shown(part)
            )));
        };
        let want = Want::Uuid(uuid);
        if wants.contains(&want) {
            return Err(entry.error(format!("{want} is listed twice")));
        }
        wants.push(want);
    }
    Ok(wants)
}

/// `MIG-<uuid>` or, from drivers before 470, `MIG-GPU-<uuid>/<gi>/<ci>`; hexadecimal digits in lower case.
fn slice_uuid(text: &str) -> Option<String> {
    let rest = text.strip_prefix("MIG-")?;
    let Some(old) = rest.strip_prefix("GPU-") else { return Some(format!("MIG-{}", plain_uuid(rest)?)) };
    let mut parts = old.split('/');
    let (uuid, gi, ci) = (plain_uuid(parts.next()?)?, parts.next()?, parts.next()?);
    let is_id = |id: &str| matches!(id.len(), 1..=3) && id.bytes().all(|b| b.is_ascii_digit());
    (parts.next().is_none() && is_id(gi) && is_id(ci)).then(|| format!("MIG-GPU-{uuid}/{gi}/{ci}"))
}

/// 8-4-4-4-12 hexadecimal digits, in lower case.
fn plain_uuid(text: &str) -> Option<String> {
    let is_uuid =
        text.split('-').map(str::len).eq([8, 4, 4, 4, 12]) && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
    is_uuid.then(|| text.to_ascii_lowercase())
}

fn parse_gpu(entry: &Entry<'_>) -> Result<GpuSelector, RequestError> {
    let text = entry.value.trim();
    GpuSelector::parse(text).ok_or_else(|| {
        entry.error(format!(
            "'{}' names no GPU; write its index (0), its UUID (GPU-…) or its PCI address (0000:07:00.0), as nvidia-smi shows them",
            shown(text)
        ))
    })
}

fn read_wait(entry: &Entry<'_>) -> Result<u32, RequestError> {
    let text = entry.value.trim();
    parse_wait(text).ok_or_else(|| {
        let rule = "write a number and a unit: 30s, 5m or 1h, at most a week; leave it out to be refused at once";
        entry.error(format!("'{}' is no time to wait; {rule}", shown(text)))
    })
}

/// `07:00.0`, `0000:07:00.0` or `00000000:07:00.0` in NVML's form: eight digits of domain, upper case.
fn pci_address(text: &str) -> Option<String> {
    let (domain, rest) = match text.rsplit_once(':')?.0.split_once(':') {
        Some((domain, _)) => (domain, text.get(domain.len() + 1..)?),
        None => ("0000", text),
    };
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let is_hex = |part: &str, digits: usize| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    let fits = (is_hex(domain, 4) || is_hex(domain, 8)) && is_hex(bus, 2) && is_hex(slot, 2) && is_hex(function, 1);
    fits.then(|| format!("{domain:0>8}:{bus}:{slot}.{function}").to_ascii_uppercase())
}

fn is_container_name(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn unknown_key(key: &str, base: &str) -> RequestError {
    let mut valid: Vec<&str> = Key::ALL.into_iter().map(Key::annotation).collect();
    let tried: String = base.chars().take(MAX_SHOWN).collect();
    // A stable sort: keys that are equally far away stay in their usual order, and far-off keys move nothing.
    valid.sort_by_key(|known| match strsim::levenshtein(&tried, known) {
        near @ 0..=3 => near,
        _ => usize::MAX,
    });
    RequestError::UnknownKey { key: shown(key), valid: valid.join(", ") }
}

/// A stranger's text, safe for a terminal and a log line: printable ASCII, the rest as `?`, and not much of it.
fn shown(text: &str) -> String {
    let mut safe: String =
        text.chars().take(MAX_SHOWN).map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        safe.push_str("...");
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: &str = "aca87b1e-f22b-5b07-8b5e-6bd4e1e4a3a5";

    fn annotations(pairs: &[(&str, &str)]) -> Result<Option<Request>, RequestError> {
        from_annotations(pairs.iter().copied(), None)
    }

    fn refusal(pairs: &[(&str, &str)]) -> String {
        annotations(pairs).unwrap_err().to_string()
    }

    fn profiles(names: &[&str]) -> Vec<Want> {
        names.iter().map(|name| Want::Profile((*name).to_owned())).collect()
    }

    #[test]
    fn the_first_stage_looks_for_the_same_variables() {
        assert_eq!(Key::ALL.map(Key::variable), crate::first::REQUEST_VARIABLES);
    }

    #[test]
    fn nothing_asked() {
        assert_eq!(annotations(&[]), Ok(None));
        assert_eq!(annotations(&[("io.podman.x", "1"), ("migrate", "yes"), ("mig.lease", "\u{7}")]), Ok(None));
        assert_eq!(
            from_env(["PATH=/bin", "MIG_DEVICE_UUIDS=x", "MIG_PROFILE", "mig.profile=1g.5gb"].into_iter()),
            Ok(None)
        );
    }

    #[test]
    fn lists_counts_and_alternatives() {
        let request = annotations(&[("mig.profile", " 2x1g.10gb , 2g.20gb | 3g.40gb+me ")]).unwrap().unwrap();
        assert_eq!(request.alternatives, [profiles(&["1g.10gb", "1g.10gb", "2g.20gb"]), profiles(&["3g.40gb+me"])]);
        assert_eq!(request.to_string(), "mig.profile=2x1g.10gb,2g.20gb|3g.40gb+me");
        let request = annotations(&[("mig.memory", "2x8GiB|10GB"), ("mig.gpu", "3")]).unwrap().unwrap();
        let memory = |bytes| Want::Memory { bytes };
        assert_eq!(request.alternatives, [vec![memory(8 << 30); 2], vec![memory(10_000_000_000)]]);
        assert_eq!(request.gpu, Some(GpuSelector::Index(3)));
        assert_eq!(request.to_string(), "mig.memory=2x8GiB|10GB mig.gpu=3");
    }

    #[test]
    fn what_is_typed_is_told_apart_by_its_look() {
        let shown = |text: &str| typed(text, None).unwrap().to_string();
        assert_eq!(shown("2x1g.10gb|2g.20gb"), "mig.profile=2x1g.10gb|2g.20gb");
        assert_eq!(shown("8GiB"), "mig.memory=8GiB");
        assert_eq!(shown(&format!("MIG-{UUID}")), format!("mig.uuid=MIG-{UUID}"));
        assert_eq!(typed("1g.10gb", Some("1")).unwrap().gpu, Some(GpuSelector::Index(1)));
        assert_eq!(
            typed("", None).unwrap_err().to_string(),
            "REQUEST: the value is empty; leave the key out to ask for nothing"
        );
        let twice = typed(&format!("MIG-{UUID}"), Some("0")).unwrap_err().to_string();
        assert!(twice.starts_with("REQUEST and --gpu contradict each other"), "{twice}");
        assert!(typed("1c.3g.40gb", None).unwrap_err().to_string().contains("written as 3g.40gb"));
    }

    #[test]
    fn a_request_is_a_plain_value() {
        let request = annotations(&[("mig.profile", "1g.10gb"), ("mig.gpu", "07:00.0")]).unwrap().unwrap();
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(json, r#"{"alternatives":[[{"profile":"1g.10gb"}]],"gpu":{"pci":"00000000:07:00.0"}}"#);
        assert_eq!(serde_json::from_str::<Request>(&json).unwrap(), request);
    }

    #[test]
    fn values_that_are_refused() {
        for value in ["", "  ", ",", "1g.10gb,", "|1g.10gb", "1g.10gb||2g.20gb", "0x1g.10gb", "x1g.10gb", "65x1g.10gb"]
        {
            assert!(annotations(&[("mig.profile", value)]).is_err(), "{value}");
        }
        assert!(annotations(&[("mig.profile", "64x1g.10gb")]).is_ok());
        assert!(annotations(&[("mig.profile", "64x1g.10gb|64x1g.20gb")]).is_ok(), "the bound is for one alternative");
        assert_eq!(
            refusal(&[("mig.profile", "60x1g.10gb, 5x1g.10gb")]),
            "mig.profile: '60x1g.10gb, 5x1g.10gb' is more than 64 slices"
        );
        assert!(
            refusal(&[("mig.profile", "99999999999999999999x1g.10gb")]).contains("a count is a number from 1 to 64")
        );
        assert!(refusal(&[("mig.profile", "1G.10GB")]).contains("lower case: 1g.10gb"));
        assert!(refusal(&[("mig.profile", "1c.3g.40gb")]).contains("compute instance inside a GPU instance"));
        assert!(refusal(&[("mig.memory", "8G")]).contains("GiB"));
        assert_eq!(
            refusal(&[("mig.profile", "1g.10gb\u{1b}[31m")]),
            "mig.profile: the value '1g.10gb?[31m' contains control characters"
        );
        assert_eq!(
            refusal(&[("mig.profile", "1g.10gb\0")]),
            "mig.profile: the value '1g.10gb?' contains control characters"
        );
        assert!(refusal(&[("mig.profile", "1g․10gb")]).contains("not plain ASCII"));
        assert_eq!(
            refusal(&[("mig.profile", &"a".repeat(257))]),
            "mig.profile: the value is 257 bytes long; at most 256 are read"
        );
    }

    #[test]
    fn unknown_keys_are_refused_nearest_first() {
        let also = "each also as KEY/CONTAINER for one container of a pod";
        assert_eq!(
            refusal(&[("mig.profil", "1g.10gb")]),
            format!(
                "unknown annotation mig.profil; valid are mig.profile, mig.memory, mig.gpu, mig.uuid, mig.wait, {also}"
            )
        );
        assert!(refusal(&[("mig.uid", "x")]).contains("valid are mig.uuid, "));
        assert!(refusal(&[("mig.gpus/web", "x")]).contains("valid are mig.gpu, "));
        for key in ["mig.waits", "mig.", "mig.Profile", "mig.lease/web", "mig.profile.x", "mig.\u{1b}[2J"] {
            let text = refusal(&[(key, "30s")]);
            assert!(text.starts_with("unknown annotation mig."), "{text}");
            assert!(text.bytes().all(|b| !b.is_ascii_control()), "{text}");
        }
        assert!(refusal(&[(&format!("mig.{}", "x".repeat(100_000)), "1")]).len() < 300);
        assert!(refusal(&[("\"mig.profile", "1g.10gb,1g.10gb\"")]).contains("leave the quotes out"));
    }

    #[test]
    fn conflicts() {
        let uuid = format!("MIG-{UUID}");
        let both = [("mig.profile", "1g.10gb"), ("mig.memory", "8GiB")];
        assert!(refusal(&both).starts_with("mig.profile and mig.memory contradict each other"));
        assert!(refusal(&[("mig.uuid", &uuid), ("mig.profile", "1g.10gb")]).contains("contradict"));
        assert!(refusal(&[("mig.uuid", &uuid), ("mig.memory", "8GiB")]).contains("contradict"));
        assert!(refusal(&[("mig.uuid", &uuid), ("mig.gpu", "0")]).contains("contradict"));
        assert!(refusal(&[("mig.gpu", "0")]).contains("also ask for a profile"));
        assert!(refusal(&[("mig.profile", "1g.10gb"), ("mig.profile", "2g.20gb")]).contains("twice"));
        assert!(annotations(&[("mig.profile", "1g.10gb"), ("mig.profile", "1g.10gb")]).is_ok());
    }

    #[test]
    fn existing_slices() {
        let (new, old) = (format!("MIG-{UUID}"), format!("MIG-GPU-{UUID}/7/0"));
        let request = annotations(&[("mig.uuid", &format!("{} , {old}", new.replace('a', "A")))]).unwrap().unwrap();
        assert_eq!(request.alternatives, [vec![Want::Uuid(new.clone()), Want::Uuid(old.clone())]]);
        assert_eq!(request.to_string(), format!("mig.uuid={new},{old}"));
        for bad in
            ["MIG-", "GPU-x", UUID, "MIG-1g.10gb", &format!("2x{new}"), &format!("{new}|{old}"), &format!("{old}/1")]
        {
            assert!(refusal(&[("mig.uuid", bad)]).contains("is not the UUID of a MIG slice"), "{bad}");
        }
        assert!(refusal(&[("mig.uuid", &format!("{new},{new}"))]).contains("listed twice"));
    }

    #[test]
    fn gpus() {
        let gpu =
            |text: &str| annotations(&[("mig.profile", "1g.10gb"), ("mig.gpu", text)]).map(|r| r.unwrap().gpu.unwrap());
        assert_eq!(gpu(" 12 "), Ok(GpuSelector::Index(12)));
        assert_eq!(gpu(&format!("GPU-{}", UUID.to_ascii_uppercase())), Ok(GpuSelector::Uuid(format!("GPU-{UUID}"))));
        for text in ["0a:00.0", "0000:0A:00.0", "00000000:0a:00.0"] {
            assert_eq!(gpu(text), Ok(GpuSelector::Pci("00000000:0A:00.0".to_owned())), "{text}");
        }
        for text in
            ["-1", "4294967296", "gpu0", "GPU-1", "7:0.0", "000:07:00.0", "::07:00.0", "1:0000:07:00.0", "0000:07:00"]
        {
            assert!(gpu(text).unwrap_err().to_string().contains("names no GPU"), "{text}");
        }
    }

    #[test]
    fn times_to_wait() {
        let wait = |text: &str| annotations(&[("mig.profile", "1g.10gb"), ("mig.wait", text)]).map(|r| r.unwrap());
        for (text, seconds, shown) in
            [("30s", 30, "30s"), (" 5m ", 300, "5m"), ("120s", 120, "2m"), ("1h", 3600, "1h"), ("90m", 5400, "90m")]
        {
            let request = wait(text).unwrap();
            assert_eq!((request.wait_s, format_wait(seconds).as_str()), (Some(seconds), shown), "{text}");
        }
        assert_eq!(wait("168h").unwrap().wait_s, Some(MAX_WAIT_S));
        for text in
            ["0s", "30", "s", "-1s", "+1s", "1.5m", "5 m", "5M", "1d", "169h", "9999999s", "999999h", "5min", "1h30m"]
        {
            let error = wait(text).unwrap_err().to_string();
            assert!(error.contains("is no time to wait; write a number and a unit"), "{text}: {error}");
        }
        assert!(refusal(&[("mig.wait", "30s")]).contains("says only how long"));
        assert!(refusal(&[("mig.gpu", "0"), ("mig.wait", "30s")]).contains("says only where"));
        let named = annotations(&[("mig.uuid", &format!("MIG-{UUID}")), ("mig.wait", "30s")]).unwrap().unwrap();
        assert_eq!(named.to_string(), format!("mig.uuid=MIG-{UUID} mig.wait=30s"));
    }

    #[test]
    fn a_selector_meets_its_gpu() {
        let device = Device {
            uuid: format!("GPU-{UUID}"),
            minor: 5,
            pci_bus_id: "00000000:0A:00.0".to_owned(),
            ..crate::gpu::tests::device(1)
        };
        let selects = |text: &str| {
            let request = annotations(&[("mig.memory", "1GiB"), ("mig.gpu", text)]).unwrap().unwrap();
            request.gpu.unwrap().matches(&device)
        };
        assert!(selects("1") && selects("0a:00.0") && selects(&format!("GPU-{UUID}")));
        assert!(!selects("5") && !selects("0b:00.0") && !selects("GPU-00000000-0000-0000-0000-000000000000"));
    }

    #[test]
    fn containers_of_a_pod() {
        let pod = [("mig.profile", "7g.80gb"), ("mig.profile/web", "1g.10gb"), ("mig.memory/db", "not looked at")];
        let ask = |name| from_annotations(pod.iter().copied(), name);
        assert_eq!(ask(Some("web")).unwrap().unwrap().alternatives, [profiles(&["1g.10gb"])]);
        assert_eq!(ask(Some("sidecar")), Ok(None), "a named key switches the unnamed off");
        let unnamed = ask(None).unwrap_err().to_string();
        assert!(unnamed.starts_with("mig.profile/web names one container of a pod"), "{unnamed}");
        assert!(ask(Some("db")).unwrap_err().to_string().starts_with("mig.memory/db: 'not looked at'"));
        let gpu_only = [("mig.profile", "1g.10gb"), ("mig.gpu/web", "0")];
        assert_eq!(from_annotations(gpu_only.into_iter(), Some("db")), Ok(None));
        assert!(from_annotations(gpu_only.into_iter(), Some("web")).is_err());
        for key in ["mig.profile/", "mig.profile/a/b", "mig.profile/../x", "mig.profile/a b", "mig.profile/ü"] {
            assert!(matches!(annotations(&[(key, "1g.10gb")]), Err(RequestError::ContainerName { .. })), "{key}");
        }
    }

    #[test]
    fn environment() {
        let request = from_env(["MIG_PROFILE=1g.10gb", "MIG_GPU=0", "MIG_WAIT=30s"].into_iter()).unwrap().unwrap();
        assert_eq!(request.to_string(), "mig.profile=1g.10gb mig.gpu=0 mig.wait=30s");
        assert!(from_env(["MIG_PROFILE=1g.10gb", "MIG_PROFILE=1g.10gb"].into_iter()).is_ok());
        let twice = from_env(["MIG_PROFILE=1g.10gb", "MIG_PROFILE=2g.20gb"].into_iter()).unwrap_err();
        assert_eq!(
            twice.to_string(),
            "MIG_PROFILE and MIG_PROFILE contradict each other: it is given twice with two values"
        );
        assert!(
            from_env(["MIG_PROFILE="].into_iter())
                .unwrap_err()
                .to_string()
                .starts_with("MIG_PROFILE: the value is empty")
        );
    }

    fn request() -> impl Strategy<Value = Request> {
        let profile = "[1-9]g\\.[1-9][0-9]{0,2}gb(\\+me|\\+me\\.all|\\+gfx|-me)?".prop_map(Want::Profile);
        let memory = (1_u64..1 << 40).prop_map(|bytes| Want::Memory { bytes });
        let gpu = prop_oneof![
            any::<u32>().prop_map(GpuSelector::Index),
            "GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}".prop_map(GpuSelector::Uuid),
            "[0-9A-F]{8}:[0-9A-F]{2}:[0-9A-F]{2}\\.[0-7]".prop_map(GpuSelector::Pci),
        ];
        let list = |want: BoxedStrategy<Want>| prop::collection::vec(prop::collection::vec(want, 1..4), 1..4);
        let wait = || prop::option::of(1..=MAX_WAIT_S);
        let asked = (prop_oneof![list(profile.boxed()), list(memory.boxed())], prop::option::of(gpu), wait())
            .prop_map(|(alternatives, gpu, wait_s)| Request { alternatives, gpu, wait_s });
        let uuid = (prop::collection::hash_set("MIG-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", 1..5), wait());
        let uuid = uuid.prop_map(|(set, wait_s)| Request {
            alternatives: vec![set.into_iter().map(Want::Uuid).collect()],
            gpu: None,
            wait_s,
        });
        prop_oneof![3 => asked, 1 => uuid]
    }

    proptest! {
        #[test]
        fn any_annotation_is_read_or_refused_in_a_clean_sentence(
            key in "mig\\.(profile|memory|gpu|uuid|wait|\\PC{0,80})(/\\PC{0,20})?",
            value in any::<String>(),
            name in "\\PC{0,20}",
        ) {
            if let Err(error) = from_annotations([(key.as_str(), value.as_str())].into_iter(), Some(&name)) {
                let text = error.to_string();
                prop_assert!(text.len() < 500, "{}", text);
                prop_assert!(text.chars().all(|c| !c.is_control()), "{:?}", text);
            }
        }

        #[test]
        fn any_environment_is_read_or_refused(
            vars in prop::collection::vec("(MIG_(PROFILE|MEMORY|GPU|UUID|WAIT)=)?[ -~]{0,40}", 0..6),
        ) {
            let _ = from_env(vars.iter().map(String::as_str));
        }

        #[test]
        fn near_misses_are_bounded(value in "[0-9gbxGiBMme.,|+ -]{0,120}") {
            for key in ["mig.profile", "mig.memory"] {
                if let Ok(Some(request)) = annotations(&[(key, &value)]) {
                    prop_assert!(!request.alternatives.is_empty());
                    prop_assert!(request.alternatives.iter().all(|wants| (1..=MAX_SLICES).contains(&wants.len())));
                }
            }
        }

        #[test]
        fn a_request_reads_back_as_itself(request in request()) {
            let text = request.to_string();
            let pairs: Vec<(&str, &str)> = text.split(' ').filter_map(|part| part.split_once('=')).collect();
            prop_assert_eq!(annotations(&pairs), Ok(Some(request)));
        }

        #[test]
        fn counts_expand(counts in prop::collection::vec(1_usize..30, 1..5)) {
            let value = counts.iter().map(|n| format!("{n}x1g.10gb")).collect::<Vec<_>>().join(",");
            let total: usize = counts.iter().sum();
            match annotations(&[("mig.profile", &value)]) {
                Ok(Some(request)) => prop_assert_eq!(request.alternatives[0].len(), total),
                other => prop_assert!(total > MAX_SLICES && other.is_err()),
            }
        }
    }
}
