//! The loader's cache of libraries.

use mig_hook::driver::ldcache;

pub fn check(data: &[u8]) {
    let entries = ldcache::entries(data);
    assert!(entries.len() <= data.len() / 24);
    let stands = |text: &str| {
        let at = text.as_ptr() as usize - data.as_ptr() as usize;
        data.get(at + text.len()) == Some(&0)
    };
    for (name, path) in &entries {
        assert!(stands(name) && stands(path), "{name:?} {path:?}");
        assert!(name.len() < libc_path_max() && path.len() < libc_path_max());
    }

    // What is written as glibc writes it is read as it was meant, behind an old cache too.
    let names: Vec<(String, String)> = String::from_utf8_lossy(data)
        .split(['\0', '\n'])
        .take(64)
        .map(|line| line.chars().take(1000).collect::<String>())
        .map(|line| (line.rsplit('/').next().unwrap_or_default().to_owned(), line))
        .collect();
    for old in [0, 3] {
        let cache = written(&names, old);
        let read: Vec<(String, String)> =
            ldcache::entries(&cache).into_iter().map(|(name, path)| (name.to_owned(), path.to_owned())).collect();
        assert_eq!(read, names, "behind {old} old entries");
    }
}

fn libc_path_max() -> usize {
    4096
}

/// glibc's sysdeps/generic/dl-cache.h: header of 48 bytes, entries of 24 (flags, key, value, os version, hwcap), strings.
fn written(names: &[(String, String)], old: u32) -> Vec<u8> {
    let mut cache = Vec::new();
    if old > 0 {
        cache.extend(b"ld.so-1.7.0\0");
        cache.extend(old.to_le_bytes());
        cache.resize((16 + old as usize * 12).next_multiple_of(8), 0xaa);
    }
    let start = cache.len();
    let strings_at = 48 + names.len() * 24;
    let mut table = Vec::new();
    let mut strings: Vec<u8> = Vec::new();
    let mut string = |text: &str| {
        let at = (strings_at + strings.len()) as u32;
        strings.extend(text.bytes().chain([0]));
        at.to_le_bytes()
    };
    for (name, path) in names {
        table.extend(1_u32.to_le_bytes());
        table.extend(string(name));
        table.extend(string(path));
        table.extend([0; 12]);
    }
    cache.extend(b"glibc-ld.so.cache1.1");
    cache.extend((names.len() as u32).to_le_bytes());
    cache.extend((strings.len() as u32).to_le_bytes());
    cache.push(2); // little-endian
    cache.resize(start + 48, 0);
    cache.extend(table);
    cache.extend(strings);
    cache
}
