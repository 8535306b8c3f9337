//! mig-parted's config format, version v1, as NVIDIA's tool of that name takes it: read, applied to the GPUs of a machine, and
//! written. Facts from its `api/spec/v1` and `pkg/types`. Pure.
//!
//! ```yaml
//! version: v1
//! mig-configs:
//!   some-name:
//!     - device-filter: ["0x20B210DE"]   # or one, or none for every board
//!       devices: all                    # or [0, 1]
//!       mig-enabled: true
//!       mig-devices: {"1g.10gb": 7}
//! ```

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use serde_saphyr::{DuplicateKeyPolicy, Spanned};

use crate::gpu::{Device, Instance, MigMode};
use crate::profile::{self, NameError};

/// Largest file that is read, in bytes: NVIDIA's own, with every board there is, has ten thousand.
pub const LARGEST: usize = 1 << 20;
/// Most slices of one kind that are wanted on one GPU: no board holds as many.
const MOST: usize = 64;
/// Every key that the format has, for those who mistype one.
const KEYS: [&str; 6] = ["version", "mig-configs", "device-filter", "devices", "mig-enabled", "mig-devices"];

/// What is wrong with a config file, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigFault(String);

/// A config file: layouts by name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct File {
    version: &'static str,
    mig_configs: BTreeMap<String, Vec<Entry>>,
}

/// What some GPUs shall be like.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// Line of the file, from 1.
    #[serde(skip)]
    pub line: u64,
    /// PCI device and vendor ids of the boards it is for; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "ids")]
    device_filter: Vec<u32>,
    devices: Devices,
    /// Whether MIG mode is on.
    pub mig_enabled: bool,
    /// How many of which.
    pub mig_devices: Names,
}

/// MIG devices by name, with their number: `1g.10gb`, `1c.3g.40gb`.
pub type Names = BTreeMap<String, usize>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Devices {
    All,
    /// By NVML index.
    Some(Vec<u32>),
}

/// The file as it is written, before it is looked at closely.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawFile {
    version: Spanned<String>,
    mig_configs: BTreeMap<String, Vec<Spanned<RawEntry>>>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawEntry {
    device_filter: Option<Spanned<Filter>>,
    devices: Devices,
    mig_enabled: bool,
    mig_devices: Option<BTreeMap<String, Spanned<u64>>>,
}

struct Filter(Vec<String>);

/// Reads a file, YAML or JSON. Unknown keys, keys given twice, and names that no profile can have are refused.
pub fn parse(text: &str) -> Result<File, ConfigFault> {
    if text.len() > LARGEST {
        return Err(ConfigFault(format!("it has {} bytes; a config file has at most {LARGEST}", text.len())));
    }
    let options = serde_saphyr::options! { duplicate_keys: DuplicateKeyPolicy::Error };
    let raw: RawFile = serde_saphyr::from_str_with_options(text, options).map_err(|error| unreadable(&error))?;
    if raw.version.value != "v1" {
        let (line, version) = (raw.version.referenced.line(), raw.version.value);
        return Err(ConfigFault(format!("line {line}: version is {version:?}, and only v1 is known")));
    }
    let mut mig_configs = BTreeMap::new();
    for (name, entries) in raw.mig_configs {
        if entries.is_empty() {
            return Err(ConfigFault(format!("config {name} is empty; it needs at least one entry with devices")));
        }
        let entries = entries.into_iter().map(entry).collect::<Result<_, _>>()?;
        mig_configs.insert(name, entries);
    }
    match mig_configs.is_empty() {
        true => Err(ConfigFault("mig-configs is empty; it needs at least one config".into())),
        false => Ok(File { version: "v1", mig_configs }),
    }
}

fn unreadable(error: &serde_saphyr::Error) -> ConfigFault {
    let text = error.without_snippet().to_string();
    let (text, line) = match error.location() {
        Some(at) => {
            let end = format!(" at line {}, column {}", at.line(), at.column());
            (text.strip_suffix(&end).unwrap_or(&text).to_owned(), format!("line {}: ", at.line()))
        }
        None => (text, String::new()),
    };
    let unknown = text.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
    let nearest = unknown.and_then(|key| {
        let near = |known: &&str| strsim::damerau_levenshtein(key, known);
        KEYS.into_iter().filter(|known| text.contains(&format!(" {known}"))).min_by_key(near)
    });
    let text = text.replace("duplicate mapping key: ", "key given twice: ");
    let text = text.split(", set DuplicateKeyPolicy").next().unwrap_or(&text);
    ConfigFault(match nearest {
        Some(nearest) => format!("{line}{text}; did you mean {nearest}?"),
        None => format!("{line}{text}"),
    })
}

fn entry(raw: Spanned<RawEntry>) -> Result<Entry, ConfigFault> {
    let line = raw.referenced.line();
    let raw = raw.value;
    let mut device_filter = Vec::new();
    if let Some(filter) = raw.device_filter {
        let at = filter.referenced.line();
        for id in filter.value.0.iter().filter(|id| !id.is_empty()) {
            device_filter.push(parse_id(id).ok_or_else(|| {
                ConfigFault(format!(
                    "line {at}: {id:?} is no device-filter; it is a PCI device and vendor id, as \"0x20B210DE\""
                ))
            })?);
        }
    }
    let mut mig_devices = Names::new();
    for (name, count) in raw.mig_devices.iter().flatten() {
        match check(name, count)? {
            0 => {}
            count => *mig_devices.entry(canonical(name).to_owned()).or_default() += count,
        }
    }
    match (raw.mig_enabled, &raw.mig_devices) {
        (true, None) => Err(ConfigFault(format!(
            "line {line}: mig-devices is missing; with mig-enabled: true it says what there shall be, {{}} for nothing"
        ))),
        (false, Some(_)) if !mig_devices.is_empty() => {
            Err(ConfigFault(format!("line {line}: mig-enabled is false, so mig-devices must be empty")))
        }
        _ => Ok(Entry { line, device_filter, devices: raw.devices, mig_enabled: raw.mig_enabled, mig_devices }),
    }
}

/// How many are wanted.
fn check(text: &str, count: &Spanned<u64>) -> Result<usize, ConfigFault> {
    let (line, count) = (count.referenced.line(), count.value);
    let fault = |why: String| Err(ConfigFault(format!("line {line}: {text:?} is no MIG device: {why}")));
    let Some(count) = usize::try_from(count).ok().filter(|count| *count <= MOST) else {
        return Err(ConfigFault(format!("line {line}: {count} of {text} are more than any GPU holds")));
    };
    match (profile::split_compute(text), profile::check_name(text)) {
        (Some((compute, whole)), _) if compute > profile::compute_slices(whole) => {
            fault(format!("a {whole} has {} compute slices", profile::compute_slices(whole)))
        }
        (Some(_), _) | (None, Ok(())) => Ok(count),
        (None, Err(NameError::Form)) => fault("names look like 1g.10gb, 1g.10gb+me or 1c.3g.40gb".into()),
        (None, Err(why)) => fault(why.to_string()),
    }
}

/// `3g.40gb` for `3c.3g.40gb`: the driver calls them the same.
fn canonical(name: &str) -> &str {
    match profile::split_compute(name) {
        Some((compute, whole)) if compute == profile::compute_slices(whole) => whole,
        _ => name,
    }
}

fn parse_id(text: &str) -> Option<u32> {
    let hex = text.strip_prefix("0x").or(text.strip_prefix("0X"))?;
    u32::from_str_radix(hex, 16).ok().filter(|_| hex.len() <= 8 && !hex.starts_with('+'))
}

impl File {
    /// The config of that name, or the only one.
    pub fn select(&self, name: Option<&str>) -> Result<(&str, &[Entry]), ConfigFault> {
        let names = || self.mig_configs.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let chosen = match name {
            Some(name) => self.mig_configs.get_key_value(name),
            None if self.mig_configs.len() == 1 => self.mig_configs.first_key_value(),
            None => return Err(ConfigFault(format!("it has several configs; name one with --config: {}", names()))),
        };
        match chosen {
            Some((name, entries)) => Ok((name, entries)),
            None => Err(ConfigFault(format!("it has no config {:?}, but {}", name.unwrap_or_default(), names()))),
        }
    }
}

/// What a config says of the GPUs of a machine.
#[derive(Debug)]
pub struct Meant<'a> {
    /// Indices of the GPUs that it is about, with what each shall be like.
    pub of: Vec<(usize, &'a Entry)>,
    /// NVML indices that it names and that are not here, or not managed.
    pub absent: Vec<u32>,
}

/// The GPUs that a config is about. Where several entries name one GPU, the last one counts, as for mig-parted.
pub fn meant<'a>(entries: &'a [Entry], devices: &[Device]) -> Meant<'a> {
    let passes = |entry: &Entry, device: &Device| {
        entry.device_filter.is_empty() || entry.device_filter.contains(&device.pci_device_id)
    };
    let names = |entry: &Entry, device: &Device| match &entry.devices {
        Devices::All => true,
        Devices::Some(indices) => indices.contains(&device.index),
    };
    let last = |device: &Device| entries.iter().rev().find(|entry| passes(entry, device) && names(entry, device));
    let of = devices.iter().enumerate().filter_map(|(n, device)| Some((n, last(device)?))).collect();
    let named = entries.iter().filter_map(|entry| match &entry.devices {
        Devices::All => None,
        Devices::Some(indices) => Some(indices),
    });
    let mut absent: Vec<u32> =
        named.flatten().copied().filter(|index| devices.iter().all(|device| device.index != *index)).collect();
    absent.sort_unstable();
    absent.dedup();
    Meant { of, absent }
}

/// The MIG devices of some GPU instances, as the format counts them. Half-made ones have none.
pub fn names_of<'a>(device: &Device, instances: impl IntoIterator<Item = &'a Instance>) -> Names {
    let mut names = Names::new();
    for instance in instances {
        let Some(profile) = device.profile(instance.profile) else { continue };
        for compute in &instance.compute {
            *names.entry(profile::device_name(profile, compute)).or_default() += 1;
        }
    }
    names
}

/// The names one by one, the largest compute instances first: so they pack best.
pub fn one_by_one(names: &Names) -> Vec<String> {
    let mut all: Vec<String> =
        names.iter().flat_map(|(name, count)| std::iter::repeat_n(name.clone(), *count)).collect();
    all.sort_by_key(|name| Reverse(profile::split_compute(name).map_or(u32::MAX, |(compute, _)| compute)));
    all
}

/// `2x1g.10gb, 3g.40gb`; `nothing` for none.
pub fn listed(names: &Names) -> String {
    let one = |(name, count): (&String, &usize)| match count {
        1 => name.clone(),
        count => format!("{count}x{name}"),
    };
    match names.is_empty() {
        true => "nothing".into(),
        false => names.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// What is in the first and not in the second.
pub fn less(names: &Names, others: &Names) -> Names {
    let left = |(name, count): (&String, &usize)| {
        let left = count.saturating_sub(others.get(name).copied().unwrap_or(0));
        (left > 0).then(|| (name.clone(), left))
    };
    names.iter().filter_map(left).collect()
}

/// A file with one config: `shown` with their MIG devices, those alike in one entry. `all` are the GPUs of the machine:
/// boards are told apart where that is needed to name those of one entry.
pub fn export(name: &str, shown: &[(Device, Names)], all: &[Device]) -> File {
    let mut groups: Vec<(Entry, Vec<&Device>)> = Vec::new();
    for (device, names) in shown {
        let mig_enabled = matches!(device.mig, MigMode::On | MigMode::DisablePending);
        let mig_devices = names.clone();
        let alike = |(entry, _): &&mut (Entry, _)| entry.mig_enabled == mig_enabled && entry.mig_devices == mig_devices;
        match groups.iter_mut().find(alike) {
            Some((_, devices)) => devices.push(device),
            None => {
                let entry =
                    Entry { line: 0, device_filter: Vec::new(), devices: Devices::All, mig_enabled, mig_devices };
                groups.push((entry, vec![device]));
            }
        }
    }
    let entries = groups.into_iter().map(|(entry, devices)| {
        let mut ids: Vec<u32> = devices.iter().map(|device| device.pci_device_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let of_these_boards = all.iter().filter(|device| ids.contains(&device.pci_device_id)).count();
        let whole_boards = of_these_boards == devices.len();
        let several = all.iter().any(|device| all[0].pci_device_id != device.pci_device_id);
        let devices = match whole_boards {
            true => Devices::All,
            false => Devices::Some(devices.iter().map(|device| device.index).collect()),
        };
        let device_filter = if several && of_these_boards != all.len() { ids } else { Vec::new() };
        Entry { device_filter, devices, ..entry }
    });
    File { version: "v1", mig_configs: BTreeMap::from([(name.to_owned(), entries.collect())]) }
}

impl fmt::Display for File {
    /// As YAML, laid out as mig-parted's examples are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Every JSON string is one of YAML, too.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        writeln!(f, "version: {}\nmig-configs:", self.version)?;
        for (name, entries) in &self.mig_configs {
            let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            let plain = plain && name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic()) && !is_word(name);
            writeln!(f, "  {}:", if plain { name.clone() } else { quoted(name) })?;
            for entry in entries {
                let mut start = "    - ";
                if !entry.device_filter.is_empty() {
                    let ids: Vec<String> = entry.device_filter.iter().map(|id| quoted(&shown_id(*id))).collect();
                    writeln!(f, "{start}device-filter: [{}]", ids.join(", "))?;
                    start = "      ";
                }
                match &entry.devices {
                    Devices::All => writeln!(f, "{start}devices: all")?,
                    Devices::Some(indices) => writeln!(f, "{start}devices: {indices:?}")?,
                }
                writeln!(f, "      mig-enabled: {}", entry.mig_enabled)?;
                match entry.mig_devices.is_empty() {
                    true => writeln!(f, "      mig-devices: {{}}")?,
                    false => writeln!(f, "      mig-devices:")?,
                }
                for (name, count) in &entry.mig_devices {
                    writeln!(f, "        {}: {count}", quoted(name))?;
                }
            }
        }
        Ok(())
    }
}

/// Whether YAML readers, old ones too, take it for something else than a string.
fn is_word(text: &str) -> bool {
    ["true", "false", "yes", "no", "on", "off", "y", "n", "null"].contains(&text.to_ascii_lowercase().as_str())
}

fn shown_id(id: u32) -> String {
    format!("0x{id:08X}")
}

fn ids<S: Serializer>(ids: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.iter().map(|id| shown_id(*id)))
}

impl Serialize for Devices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Devices::All => serializer.serialize_str("all"),
            Devices::Some(indices) => indices.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Devices, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Devices;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("all, or a list of GPU indices as [0, 1]")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Devices, E> {
                match text {
                    "all" => Ok(Devices::All),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Devices, A::Error> {
                let mut indices = Vec::new();
                while let Some(index) = list.next_element()? {
                    indices.push(index);
                }
                Ok(Devices::Some(indices))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Filter, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Filter;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a PCI device and vendor id in quotes, as \"0x20B210DE\", or a list of them")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Filter, E> {
                Ok(Filter(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Filter, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(Filter(ids))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(entry: &str) -> String {
        format!("version: v1\nmig-configs:\n  a:\n    - {}\n", entry.replace('\n', "\n      "))
    }

    fn fault(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_ways_to_write_an_entry() {
        let text = with(
            "device-filter: [\"0x20B210DE\", \"0x20b510de\"]\ndevices: [0,1]\nmig-enabled: true\nmig-devices:\n  1g.10gb: 2\n  \"3c.3g.40gb\": 1\n  1g.20gb: 0",
        );
        let file = parse(&text).unwrap();
        let (name, [entry]) = file.select(None).unwrap() else { panic!() };
        assert_eq!((name, entry.line), ("a", 4));
        assert_eq!(entry.device_filter, [0x20b2_10de, 0x20b5_10de]);
        assert_eq!(entry.devices, Devices::Some(vec![0, 1]));
        assert_eq!(listed(&entry.mig_devices), "2x1g.10gb, 3g.40gb");
        let one =
            parse(&with("device-filter: \"0x20B710DE\"\ndevices: all\nmig-enabled: yes\nmig-devices: {}")).unwrap();
        assert_eq!(one.select(Some("a")).unwrap().1[0].device_filter, [0x20b7_10de]);
        let json = r#"{"version": "v1", "mig-configs": {"a": [{"devices": "all", "mig-enabled": false}]}}"#;
        assert!(!parse(json).unwrap().select(None).unwrap().1[0].mig_enabled);
        let shared = "version: v1\nmig-configs:\n  a: &off\n    - {devices: all, mig-enabled: false}\n  b: *off\n";
        let file = parse(shared).unwrap();
        assert!(!file.select(Some("b")).unwrap().1[0].mig_enabled, "anchors and aliases are YAML, too");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let on = "devices: all\nmig-enabled: true\n";
        for (text, why) in [
            (with(&format!("{on}mig-device:\n  1g.5gb: 7")), "line 6: unknown field `mig-device`"),
            (with(&format!("{on}mig-device:\n  1g.5gb: 7")), "did you mean mig-devices?"),
            ("version: v1\nmig-config: {}\n".into(), "line 2: unknown field `mig-config`"),
            ("version: v1\nmig-config: {}\n".into(), "did you mean mig-configs?"),
            ("version: v2\nmig-configs: {}\n".into(), "line 1: version is \"v2\""),
            ("mig-configs: {}\n".into(), "missing field `version`"),
            ("version: v1\nmig-configs: {}\n".into(), "mig-configs is empty"),
            ("version: v1\nmig-configs: {a: []}\n".into(), "config a is empty"),
            (with("devices: all\nmig-devices: {}"), "missing field `mig-enabled`"),
            (with("mig-enabled: false"), "missing field `devices`"),
            (with(on), "line 4: mig-devices is missing"),
            (with("devices: all\nmig-enabled: false\nmig-devices: {1g.5gb: 1}"), "line 4: mig-enabled is false"),
            (with("devices: some\nmig-enabled: false"), "expected all, or a list of GPU indices"),
            (with("devices: [0, x]\nmig-enabled: false"), "line 4"),
            (with("devices: {}\nmig-enabled: false"), "expected all, or a list"),
            (with("devices: [-1]\nmig-enabled: false"), "line 4"),
            (with("devices: all\ndevice-filter: A100\nmig-enabled: false"), "line 5: \"A100\" is no device-filter"),
            (with("devices: all\ndevice-filter: 0x20B210DE\nmig-enabled: false"), "in quotes"),
            (with(&format!("{on}mig-devices:\n  1g.5gb: 1\n  1g.5gb: 2")), "line 8: key given twice: 1g.5gb"),
            (with(&format!("{on}mig-devices:\n  1g.5gb: -1")), "line 7"),
            (with(&format!("{on}mig-devices:\n  1g.5gb: 1000000000000")), "line 7: 1000000000000 of 1g.5gb are more"),
            (with(&format!("{on}mig-devices:\n  1g5gb: 1")), "line 7: \"1g5gb\" is no MIG device: names look like"),
            (with(&format!("{on}mig-devices:\n  1G.5GB: 1")), "lower case: 1g.5gb"),
            (with(&format!("{on}mig-devices:\n  4c.3g.20gb: 1")), "a 3g.20gb has 3 compute slices"),
            ("version: v1\nmig-configs:\n  a: [\n".into(), "line"),
            ("42\n".into(), "line 1"),
            (String::new(), "line 1"),
        ] {
            let said = fault(&text);
            assert!(said.contains(why), "{text}\n{said}");
            assert!(!said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn hostile_files_end_soon() {
        assert!(fault(&" ".repeat(LARGEST + 1)).contains("at most"));
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"{a: ".repeat(100_000)).is_err());
        let mut bomb = String::from("version: v1\nmig-configs:\n  a: &a [{devices: all, mig-enabled: false}]\n");
        for (name, of) in
            ["b", "c", "d", "e", "f", "g", "h", "i"].into_iter().zip(["a", "b", "c", "d", "e", "f", "g", "h"])
        {
            bomb += &format!("  {name}: &{name} [{}]\n", vec![format!("*{of}"); 12].join(","));
        }
        assert!(parse(&bomb).is_err());
    }

    #[test]
    fn a_config_is_chosen_by_name_or_for_being_the_only_one() {
        let file = parse("version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false}], b: [{devices: all, mig-enabled: false}]}").unwrap();
        assert_eq!(file.select(Some("b")).unwrap().0, "b");
        assert_eq!(file.select(None).unwrap_err().to_string(), "it has several configs; name one with --config: a, b");
        assert_eq!(file.select(Some("c")).unwrap_err().to_string(), "it has no config \"c\", but a, b");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[\\-{}\\[\\]:,\"a-z0-9.&* \n]{0,200}") {
            let _ = parse(&text);
        }
    }
}
