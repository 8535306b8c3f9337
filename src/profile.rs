//! Profile names and memory sizes as people write them, and the profile of one GPU that they mean.
//!
//! Names are only checked for their form here. What exists is decided by what the driver reports for each GPU: the same
//! board has other names under other driver branches, so there is no built-in table.

use crate::gpu::{ComputeInstance, Device, MigMode, Profile};
use crate::request::Want;

/// Why a text is no profile name for a container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// `1c.3g.40gb`: a compute instance that takes only part of its GPU instance.
    #[error(
        "it names a compute instance inside a GPU instance; a container is given a whole GPU instance, written as {whole}"
    )]
    ComputeInstance {
        /// The name of the GPU instance in it.
        whole: String,
    },
    /// `1G.10GB`.
    #[error("profile names are lower case: {lower}")]
    Case {
        /// The name as it should be written.
        lower: String,
    },
    /// Anything else.
    #[error("it is not a profile name; names look like 1g.10gb, 3g.40gb or 1g.10gb+me (migctl profiles lists them)")]
    Form,
}

/// Checks that a text has the form of a GPU-instance profile name, in its canonical lower case: `1g.10gb`,
/// `1g.10gb+me`, `1g.24gb+me.all`, `2g.48gb+gfx`, `1g.24gb-me`. Suffixes that do not exist yet are accepted: the
/// driver decides.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if is_gpu_instance(name) {
        return Ok(());
    }
    let lower = name.to_ascii_lowercase();
    if let Some((_, whole)) = split_compute(&lower) {
        return Err(NameError::ComputeInstance { whole: whole.to_owned() });
    }
    if is_gpu_instance(&lower) { Err(NameError::Case { lower }) } else { Err(NameError::Form) }
}

/// The compute slices and the GPU-instance profile of a compute-instance name: 1 and `3g.40gb` of `1c.3g.40gb`.
pub fn split_compute(name: &str) -> Option<(u32, &str)> {
    let (compute, whole) = name.split_once('.')?;
    let slices = compute.strip_suffix('c').filter(|_| number_before(compute, "c", 3) == Some(""))?;
    if is_gpu_instance(whole) { Some((slices.parse().ok()?, whole)) } else { None }
}

/// Compute slices of a GPU-instance profile by its name: 3 of `3g.40gb`. 0 for what is no such name.
pub fn compute_slices(name: &str) -> u32 {
    name.split_once('g').and_then(|(slices, _)| slices.parse().ok()).unwrap_or(0)
}

/// The name of a MIG device: its profile's, with the compute slices in front where it has not all of them (`1c.3g.40gb`).
pub fn device_name(profile: &Profile, compute: &ComputeInstance) -> String {
    match compute.slices == profile.slices {
        true => profile.name.clone(),
        false => format!("{}c.{}", compute.slices, profile.name),
    }
}

/// True for a profile with an attribute (`+me`, `+me.all`, `+gfx`, `-me`): it is handed out only when asked for by
/// name.
pub fn has_attribute(name: &str) -> bool {
    name.contains(['+', '-'])
}

fn is_gpu_instance(name: &str) -> bool {
    let Some(rest) = number_before(name, "g.", 3).and_then(|rest| number_before(rest, "gb", 5)) else { return false };
    let Some(attribute) = rest.strip_prefix(['+', '-']) else { return rest.is_empty() };
    attribute.len() <= 16
        && attribute.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase()))
}

/// What follows a positive decimal number of at most `digits` digits and then `unit`.
fn number_before<'a>(text: &'a str, unit: &str, digits: usize) -> Option<&'a str> {
    let end = text.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    if number.is_empty() || number.len() > digits || number.starts_with('0') { None } else { rest.strip_prefix(unit) }
}

/// Why a text is no memory size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number, or none of the four units.
    #[error(
        "it is not a memory size; write a number and GiB, MiB (powers of 1024), GB or MB (powers of 1000), as 8GiB or 1.5GiB"
    )]
    Form,
    /// Zero.
    #[error("a slice needs more than no memory")]
    Zero,
    /// Does not fit 64 bits.
    #[error("it is larger than any GPU memory")]
    TooLarge,
}

/// The units of a memory size, with their bytes.
const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];

/// Bytes of `8GiB`, `8GB`, `8192MiB`, `8000MB` or `1.5GiB`. A fraction of a byte is rounded up, since a size asks for
/// "at least".
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, bytes)| text.strip_suffix(name).map(|number| (number, u128::from(*bytes))))
        .ok_or(SizeError::Form)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if is_digits(fraction) && fraction.len() <= 9 => (whole, fraction),
        Some(_) => return Err(SizeError::Form),
        None => (number, ""),
    };
    if !is_digits(whole) {
        return Err(SizeError::Form);
    }
    // At most 20 digits before the point and 9 behind it: 10^29 × 2^30 is below 2^128.
    if whole.len() > 20 {
        return Err(SizeError::TooLarge);
    }
    let scale = fraction.bytes().fold(1_u128, |scale, _| scale * 10);
    let scaled = whole.bytes().chain(fraction.bytes()).fold(0_u128, |n, digit| n * 10 + u128::from(digit - b'0'));
    match u64::try_from((scaled * unit).div_ceil(scale)) {
        Ok(0) => Err(SizeError::Zero),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(SizeError::TooLarge),
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// A number of bytes as [`parse_size`] reads it back exactly: in a whole unit where there is one, else in decimal MB.
pub fn format_size(bytes: u64) -> String {
    if let Some((name, unit)) = UNITS.iter().find(|(_, unit)| bytes.is_multiple_of(*unit)) {
        return format!("{}{name}", bytes / unit);
    }
    let decimal = format!("{}.{:06}", bytes / 1_000_000, bytes % 1_000_000);
    format!("{}MB", decimal.trim_end_matches('0'))
}

/// The profile of that exact name on one GPU.
pub fn resolve_name<'a>(device: &'a Device, name: &str) -> Option<&'a Profile> {
    device.profiles.iter().find(|p| p.name == name)
}

/// The profile of one GPU that a want means; none for an existing slice.
pub fn resolve<'a>(device: &'a Device, want: &Want) -> Option<&'a Profile> {
    match want {
        Want::Profile(name) => resolve_name(device, name),
        Want::Memory { bytes } => resolve_memory(device, *bytes),
        Want::Uuid(_) => None,
    }
}

/// The smallest profile of one GPU with at least `bytes` of memory by the driver's own MiB: least memory, then fewest
/// compute slices. Never one with an attribute.
pub fn resolve_memory(device: &Device, bytes: u64) -> Option<&Profile> {
    device
        .profiles
        .iter()
        .filter(|p| !has_attribute(&p.name))
        .filter(|p| u128::from(p.memory_mib) << 20 >= u128::from(bytes))
        .min_by_key(|p| (p.memory_mib, p.slices, p.id))
}

/// The sentence for something that none of these GPUs offers, with what each GPU model does offer. `subject` is as
/// `profile 1g.10gb` or `a profile with at least 100GiB`.
pub fn not_offered(subject: &str, devices: &[&Device]) -> String {
    let mut groups: Vec<Vec<&Device>> = Vec::new();
    for device in devices {
        match groups.iter_mut().find(|group| group.first().is_some_and(|first| offers_the_same(first, device))) {
            Some(group) => group.push(device),
            None => groups.push(vec![device]),
        }
    }
    match groups.as_slice() {
        [] => format!("{subject} is not offered: there is no GPU to look at"),
        [group] => match group.as_slice() {
            [device] => format!("{subject} is not offered by {}; it {}", device.label(), offer(device, "s")),
            group => format!("{subject} is not offered by {}; they {}", gpus(group), offer(group[0], "")),
        },
        groups => {
            let offers: Vec<String> = groups
                .iter()
                .map(|group| format!("{} {}", gpus(group), offer(group[0], if group.len() == 1 { "s" } else { "" })))
                .collect();
            format!("{subject} is not offered by any GPU: {}", offers.join("; "))
        }
    }
}

fn offers_the_same(a: &Device, b: &Device) -> bool {
    a.name == b.name
        && a.mig == b.mig
        && a.profiles.len() == b.profiles.len()
        && a.profiles.iter().zip(&b.profiles).all(|(x, y)| x.name == y.name)
}

/// `GPU 0, 1 (NVIDIA A30)`.
fn gpus(group: &[&Device]) -> String {
    let indices: Vec<String> = group.iter().map(|d| d.index.to_string()).collect();
    let name = group.first().map_or("", |d| d.name.as_str());
    format!("GPU {} ({name})", indices.join(", "))
}

/// `offers 1g.5gb, 1g.10gb`, or why there is nothing; `s` is the ending of the verb.
fn offer(device: &Device, s: &str) -> String {
    if device.profiles.is_empty() {
        let has = if s.is_empty() { "have" } else { "has" };
        return match device.mig {
            MigMode::Unsupported => format!("{has} no MIG"),
            MigMode::Off | MigMode::EnablePending => format!("{has} MIG mode off"),
            MigMode::On | MigMode::DisablePending => format!("offer{s} no profile"),
        };
    }
    let mut offered: Vec<&Profile> = device.profiles.iter().collect();
    offered.sort_by(|a, b| (a.slices, a.memory_mib, &a.name).cmp(&(b.slices, b.memory_mib, &b.name)));
    let names: Vec<&str> = offered.iter().map(|p| p.name.as_str()).collect();
    format!("offer{s} {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Engines, ProfileId};
    use proptest::prelude::*;

    fn device(index: u32, name: &str, profiles: &[(&str, u32, u64)]) -> Device {
        Device {
            name: name.to_owned(),
            mig: if profiles.is_empty() { MigMode::Off } else { MigMode::On },
            profiles: (0_u32..)
                .zip(profiles)
                .map(|(id, (name, slices, memory_mib))| Profile {
                    id: ProfileId(id),
                    name: (*name).to_owned(),
                    slices: *slices,
                    memory_mib: *memory_mib,
                    sms: 14 * slices,
                    engines: Engines::default(),
                    p2p: false,
                    max_instances: 1,
                    placements: Vec::new(),
                })
                .collect(),
            ..crate::gpu::tests::device(index)
        }
    }

    fn a100_40(index: u32) -> Device {
        let profiles = [
            ("1g.5gb", 1, 4864),
            ("1g.5gb+me", 1, 4864),
            ("2g.10gb", 2, 9984),
            ("1g.10gb", 1, 9984),
            ("3g.20gb", 3, 20096),
            ("4g.20gb", 4, 20096),
            ("7g.40gb", 7, 40320),
        ];
        device(index, "NVIDIA A100-SXM4-40GB", &profiles)
    }

    #[test]
    fn names_of_every_known_form_are_accepted() {
        for name in ["1g.10gb", "7g.141gb", "1g.10gb+me", "1g.24gb+me.all", "4g.96gb+gfx", "2g.48gb-me"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn other_names_are_refused_with_the_reason() {
        for name in
            ["", "g.gb", "1g", "1g.10", "01g.10gb", "0g.10gb", "1g.10gb+", "1g.10gb+me.", "1g.10gb me", "1gx10gb"]
        {
            assert_eq!(check_name(name), Err(NameError::Form), "{name}");
        }
        assert_eq!(check_name("1G.10GB+ME"), Err(NameError::Case { lower: "1g.10gb+me".to_owned() }));
        assert_eq!(check_name("1c.3g.40gb"), Err(NameError::ComputeInstance { whole: "3g.40gb".to_owned() }));
    }

    #[test]
    fn a_compute_instance_is_named_after_its_gpu_instance() {
        assert_eq!(split_compute("1c.3g.40gb+me"), Some((1, "3g.40gb+me")));
        for name in ["3g.40gb", "c.3g.40gb", "0c.3g.40gb", "1c3g.40gb", "1c.1c.3g.40gb", ""] {
            assert_eq!(split_compute(name), None, "{name}");
        }
        assert_eq!([compute_slices("3g.40gb"), compute_slices("7g.141gb"), compute_slices("x")], [3, 7, 0]);
        let device = a100_40(0);
        let compute = |slices| ComputeInstance { id: 0, slices, sms: 14, uuid: String::new() };
        assert_eq!(device_name(&device.profiles[4], &compute(3)), "3g.20gb");
        assert_eq!(device_name(&device.profiles[4], &compute(1)), "1c.3g.20gb");
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("8GB"), Ok(8_000_000_000));
        assert_eq!(parse_size("8192MiB"), Ok(8 << 30));
        assert_eq!(parse_size("8000MB"), Ok(8_000_000_000));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("0.1GiB"), Ok(107_374_183), "rounded up");
        assert_eq!(parse_size("0GiB"), Err(SizeError::Zero));
        assert_eq!(parse_size("17179869184GiB"), Err(SizeError::TooLarge), "2^64");
        assert_eq!(parse_size("99999999999999999999.999999999GiB"), Err(SizeError::TooLarge));
        assert_eq!(parse_size(&format!("{}GiB", "9".repeat(200))), Err(SizeError::TooLarge));
        for text in
            ["", "8", "GiB", "8G", "8gib", "8 GiB", "+8GiB", "-8GiB", ".5GiB", "1.GiB", "1.2.3GiB", "1e3MB", "0x8GB"]
        {
            assert_eq!(parse_size(text), Err(SizeError::Form), "{text}");
        }
    }

    #[test]
    fn memory_means_the_least_profile_without_attribute() {
        let device = a100_40(0);
        let name = |bytes| resolve_memory(&device, bytes).map(|p| p.name.as_str());
        assert_eq!(name(1), Some("1g.5gb"));
        assert_eq!(name(4864 << 20), Some("1g.5gb"));
        assert_eq!(name((4864 << 20) + 1), Some("1g.10gb"), "least compute of equal memory");
        assert_eq!(name(8 << 30), Some("1g.10gb"));
        assert_eq!(name(40 << 30), None, "40 GiB are more than the driver gives");
        assert_eq!(name(40_000_000_000), Some("7g.40gb"));
        assert_eq!(name(u64::MAX), None);
    }

    #[test]
    fn a_refusal_lists_what_each_model_offers() {
        let (a, b, off) = (a100_40(0), a100_40(1), device(2, "NVIDIA A30", &[]));
        assert_eq!(
            not_offered("profile 1g.7gb", &[&a]),
            "profile 1g.7gb is not offered by GPU 0 (NVIDIA A100-SXM4-40GB); it offers 1g.5gb, 1g.5gb+me, 1g.10gb, \
             2g.10gb, 3g.20gb, 4g.20gb, 7g.40gb"
        );
        assert!(
            not_offered("profile 1g.7gb", &[&a, &b]).contains("GPU 0, 1 (NVIDIA A100-SXM4-40GB); they offer 1g.5gb,")
        );
        let mixed = not_offered("profile 1g.7gb", &[&a, &off, &b]);
        assert!(mixed.starts_with("profile 1g.7gb is not offered by any GPU: GPU 0, 1 (NVIDIA A100"), "{mixed}");
        assert!(mixed.ends_with("; GPU 2 (NVIDIA A30) has MIG mode off"), "{mixed}");
        assert!(not_offered("profile 1g.7gb", &[]).contains("no GPU"));
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC*") {
            let _ = check_name(&text);
            let _ = parse_size(&text);
        }

        #[test]
        fn parsers_never_panic_on_near_misses(text in "[0-9.gbGBiMcx+-]{0,40}") {
            let _ = check_name(&text);
            let _ = parse_size(&text);
        }

        #[test]
        fn a_size_reads_back_as_itself(bytes in 1_u64..) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn memory_resolves_to_enough_and_to_the_least(bytes in 1_u64..(50 << 30)) {
            let device = a100_40(0);
            let enough = |p: &&Profile| p.memory_mib << 20 >= bytes && !has_attribute(&p.name);
            let least = device.profiles.iter().filter(enough).map(|p| p.memory_mib).min();
            prop_assert_eq!(resolve_memory(&device, bytes).map(|p| p.memory_mib), least);
        }
    }
}
