//! The loader's cache of libraries: `/etc/ld.so.cache` in glibc's new format, by itself or behind the old one (glibc,
//! sysdeps/generic/dl-cache.h). Its entries, not its order: nobody bisects here.

/// Largest cache that is read, in bytes. One with 10,000 libraries has 600 KB.
pub const LIMIT: u64 = 16 << 20;
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0";
const NEW_MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
/// Of the old format: magic and padding, then how many entries of which size follow.
const OLD_COUNT_AT: usize = 12;
const OLD_HEADER: usize = 16;
const OLD_ENTRY: usize = 12;
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// `cache_file_new_flags_endian_big`
const BIG_ENDIAN: u8 = 3;

/// Name that programs ask for, and path, of each library in a cache; empty where it is none that we know.
pub fn entries(bytes: &[u8]) -> Vec<(&str, &str)> {
    read(bytes).unwrap_or_default()
}

fn read(bytes: &[u8]) -> Option<Vec<(&str, &str)>> {
    let new = match bytes.strip_prefix(OLD_MAGIC) {
        Some(_) => {
            let old = (number(bytes, OLD_COUNT_AT)? as usize).checked_mul(OLD_ENTRY)?.checked_add(OLD_HEADER)?;
            bytes.get(old.checked_next_multiple_of(8)?..)? // the new one is aligned, and offsets count from it
        }
        None => bytes,
    };
    if !new.starts_with(NEW_MAGIC) || new.get(28)? & 3 == BIG_ENDIAN {
        return None;
    }
    let count = number(new, NEW_MAGIC.len())? as usize;
    let table = new.get(HEADER..HEADER.checked_add(count.checked_mul(ENTRY)?)?)?;
    let entry = |entry: &[u8]| Some((text(new, number(entry, 4)?)?, text(new, number(entry, 8)?)?));
    Some(table.chunks_exact(ENTRY).filter_map(entry).collect())
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The C string at an offset.
fn text(bytes: &[u8], at: u32) -> Option<&str> {
    let rest = bytes.get(at as usize..)?;
    let rest = &rest[..rest.len().min(libc::PATH_MAX as usize)];
    std::str::from_utf8(&rest[..rest.iter().position(|byte| *byte == 0)?]).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A cache with one entry for each pair, written by the description of the format.
    pub fn cache(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = NEW_MAGIC.to_vec();
        let mut strings = Vec::new();
        bytes.extend((pairs.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.push(2);
        bytes.resize(HEADER, 0);
        for (name, path) in pairs {
            bytes.extend(0x303_u32.to_le_bytes());
            for text in [name, path] {
                let at = HEADER + ENTRY * pairs.len() + strings.len();
                bytes.extend((at as u32).to_le_bytes());
                strings.extend(text.as_bytes());
                strings.push(0);
            }
            bytes.extend([0; 12]);
        }
        bytes.extend(strings);
        bytes
    }

    const PAIRS: [(&str, &str); 2] = [("libcuda.so.1", "/usr/lib/libcuda.so.1"), ("libx.so", "/lib/libx.so")];

    #[test]
    fn the_new_format_by_itself_and_behind_the_old_one() {
        let new = cache(&PAIRS);
        assert_eq!(entries(&new), PAIRS);
        let mut both = OLD_MAGIC.to_vec();
        both.push(0);
        both.extend(1_u32.to_le_bytes());
        both.extend([7; OLD_ENTRY]);
        both.extend([0; 4]); // 28 bytes, aligned to 32
        both.extend(&new);
        assert_eq!(entries(&both), PAIRS);
    }

    #[test]
    fn what_is_no_such_cache_has_no_entries() {
        let mut big = cache(&PAIRS);
        big[28] = BIG_ENDIAN;
        for bytes in [&b""[..], b"text", b"ld.so-1.7.0\0\xff\xff\xff\xff", &cache(&PAIRS)[..HEADER + 1], &big] {
            assert_eq!(entries(bytes), []);
        }
        let mut wild = cache(&PAIRS);
        wild[HEADER + 4..HEADER + 8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(entries(&wild), PAIRS[1..], "an entry that points outside is left out");
    }

    /// As ldconfig itself tells it.
    #[test]
    fn this_machines_own_cache_says_what_ldconfig_says() {
        let Ok(bytes) = std::fs::read("/etc/ld.so.cache") else {
            eprintln!("SKIP: no /etc/ld.so.cache");
            return;
        };
        let Ok(output) = std::process::Command::new("/sbin/ldconfig").arg("-p").output() else {
            eprintln!("SKIP: no ldconfig");
            return;
        };
        let said = String::from_utf8(output.stdout).unwrap();
        let lines = said.lines().filter_map(|line| line.trim().split_once(" => "));
        let told: Vec<(&str, &str)> =
            lines.map(|(name, path)| (name.split(' ').next().unwrap_or_default(), path)).collect();
        assert!(told.len() > 10, "{said}");
        assert_eq!(entries(&bytes), told);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0_usize..200, with in any::<u32>()) {
            entries(&bytes);
            let mut damaged = cache(&PAIRS);
            if let Some(place) = damaged.get_mut(at..at + 4) {
                place.copy_from_slice(&with.to_le_bytes());
            }
            entries(&damaged);
            damaged.truncate(at);
            entries(&damaged);
        }
    }
}
