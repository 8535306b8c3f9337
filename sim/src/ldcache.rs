//! `etc/ld.so.cache` as ldconfig writes it: glibc's format 1.1 (glibc, sysdeps/generic/dl-cache.h and elf/cache.c).

use std::cmp::Ordering;

use crate::elf::Bits;

const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// `cache_file_new_flags_endian_little`
const LITTLE_ENDIAN: u8 = 2;

/// A library as programs ask for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What they ask for.
    pub name: String,
    /// Where it is, in the root that the cache is for.
    pub path: String,
    /// For whom.
    pub bits: Bits,
}

/// The text of a cache with these entries.
pub fn text(entries: &[Entry]) -> Vec<u8> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    // The loader bisects: largest name first, and of the same name the one for more bits.
    sorted
        .sort_by(|a, b| compare(&b.name, &a.name).then((b.bits == Bits::Sixtyfour).cmp(&(a.bits == Bits::Sixtyfour))));
    let mut strings: Vec<u8> = Vec::new();
    let base = HEADER + ENTRY * sorted.len();
    let mut place = |text: &str| {
        let at = (base + strings.len()) as u32;
        strings.extend(text.as_bytes());
        strings.push(0);
        at
    };
    let table: Vec<[u32; 3]> =
        sorted.iter().map(|entry| [flags(entry.bits), place(&entry.name), place(&entry.path)]).collect();
    let mut bytes = MAGIC.to_vec();
    bytes.extend((sorted.len() as u32).to_le_bytes());
    bytes.extend((strings.len() as u32).to_le_bytes());
    bytes.push(LITTLE_ENDIAN);
    bytes.resize(HEADER, 0);
    for entry in table {
        bytes.extend(entry.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend([0; 12]); // no OS version, no hardware capabilities
    }
    bytes.extend(strings);
    bytes
}

/// FLAG_ELF_LIBC6 with FLAG_X8664_LIB64, FLAG_AARCH64_LIB64, or nothing for i386 (glibc, sysdeps/generic/ldconfig.h).
fn flags(bits: Bits) -> u32 {
    match bits {
        Bits::Thirtytwo => 0x0003,
        Bits::Sixtyfour if cfg!(target_arch = "aarch64") => 0x0a03,
        Bits::Sixtyfour => 0x0303,
    }
}

/// `_dl_cache_libcmp`: runs of digits count as numbers, and come after everything else.
fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        match (a, b) {
            ([], []) => return Ordering::Equal,
            ([x, ..], [y, ..]) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (left, right) = (digits(&mut a), digits(&mut b));
                if left != right {
                    return left.cmp(&right);
                }
            }
            ([x, ..], _) if x.is_ascii_digit() => return Ordering::Greater,
            (_, [y, ..]) if y.is_ascii_digit() => return Ordering::Less,
            ([x, rest_a @ ..], [y, rest_b @ ..]) if x == y => (a, b) = (rest_a, rest_b),
            _ => return a.cmp(b),
        }
    }
}

fn digits(text: &mut &[u8]) -> u64 {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    *text = rest;
    number.iter().fold(0, |value: u64, digit| value.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn ldconfig_reads_it() {
        let entry = |name: &str, bits| Entry { name: name.into(), path: format!("/usr/lib/{name}"), bits };
        let entries = [
            entry("libcuda.so", Bits::Sixtyfour),
            entry("libcuda.so.1", Bits::Thirtytwo),
            entry("libcuda.so.1", Bits::Sixtyfour),
            entry("libnvidia-nvvm.so.4", Bits::Sixtyfour),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        std::fs::write(&path, text(&entries)).unwrap();
        let Ok(output) = Command::new("/sbin/ldconfig").arg("-C").arg(&path).arg("-p").output() else {
            eprintln!("SKIP: no ldconfig");
            return;
        };
        let said = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = said.lines().skip(1).map(str::trim).filter(|l| l.starts_with("lib")).collect();
        let own = if cfg!(target_arch = "aarch64") { "AArch64" } else { "x86-64" };
        let expected = [
            format!("libnvidia-nvvm.so.4 (libc6,{own}) => /usr/lib/libnvidia-nvvm.so.4"),
            format!("libcuda.so.1 (libc6,{own}) => /usr/lib/libcuda.so.1"),
            "libcuda.so.1 (libc6) => /usr/lib/libcuda.so.1".to_owned(),
            format!("libcuda.so (libc6,{own}) => /usr/lib/libcuda.so"),
        ];
        assert_eq!(lines, expected, "{said}");
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        assert_eq!(compare("libx.so.9", "libx.so.10"), Ordering::Less);
        assert_eq!(compare("libx.so", "libx.so.1"), Ordering::Less);
        assert_eq!(compare("liba9", "liba.so"), Ordering::Greater);
        assert_eq!(compare("libx.so.1", "libx.so.1"), Ordering::Equal);
    }
}
