//! What a loader would ask of a shared object: for which processes it is, and its SONAME (elf(5)).

use std::fs::File;
use std::os::unix::fs::FileExt;

/// For which processes a library is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bits {
    /// This machine's own.
    Sixtyfour,
    /// 32-bit x86, on x86-64.
    Thirtytwo,
}

/// Program headers, dynamic entries and characters that are looked at; no library has as many.
const SEGMENTS: usize = 128;
const DYNAMIC: usize = 1024;
const NAME: usize = 128;

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SONAME: u64 = 14;
const EM_386: u64 = 3;
const EM_X86_64: u64 = 62;
const EM_AARCH64: u64 = 183;

/// Kind and SONAME of a library; `None` where a process of this machine can't load it.
pub fn read(file: &File) -> Option<(Bits, Option<String>)> {
    let header = at(file, 0, 64)?;
    if !header.starts_with(b"\x7fELF") || header.get(5) != Some(&1) {
        return None;
    }
    let native = if cfg!(target_arch = "aarch64") { EM_AARCH64 } else { EM_X86_64 };
    let bits = match (header.get(4)?, number(&header, 18, 2)?) {
        (2, machine) if machine == native => Bits::Sixtyfour,
        (1, EM_386) if native == EM_X86_64 => Bits::Thirtytwo,
        _ => return None,
    };
    Some((bits, soname(file, &header, bits)))
}

/// Where a kind of file has its fields: offset and size.
struct Layout {
    word: usize,
    segments_at: usize,
    /// Size of a program header, then its fields: offset in the file, address, size in the file.
    segment: usize,
    segment_fields: [usize; 3],
    count_at: usize,
}

const WIDE: Layout = Layout { word: 8, segments_at: 32, segment: 56, segment_fields: [8, 16, 32], count_at: 56 };
const NARROW: Layout = Layout { word: 4, segments_at: 28, segment: 32, segment_fields: [4, 8, 16], count_at: 44 };

fn soname(file: &File, header: &[u8], bits: Bits) -> Option<String> {
    let layout = if bits == Bits::Sixtyfour { WIDE } else { NARROW };
    let word = layout.word;
    let count = number(header, layout.count_at, 2)?.min(SEGMENTS as u64) as usize;
    let segments = at(file, number(header, layout.segments_at, word)?, count * layout.segment)?;
    let segments: Vec<(u64, [u64; 3])> = segments
        .chunks_exact(layout.segment)
        .filter_map(|segment| {
            let [offset, address, size] = layout.segment_fields.map(|field| number(segment, field, word));
            Some((number(segment, 0, 4)?, [offset?, address?, size?]))
        })
        .collect();
    let (_, [dynamic, _, size]) = segments.iter().find(|(kind, _)| *kind == PT_DYNAMIC)?;
    let size = usize::try_from(*size).ok()?.min(DYNAMIC * 2 * word);
    let dynamic = at(file, *dynamic, size)?;
    let value = |wanted| {
        let entries = dynamic.chunks_exact(2 * word);
        entries
            .map(|entry| (number(entry, 0, word), number(entry, word, word)))
            .find(|(tag, _)| *tag == Some(wanted))?
            .1
    };
    let (strings, name) = (value(DT_STRTAB)?, value(DT_SONAME)?);
    let (_, [offset, address, _]) = segments.iter().find(|(kind, [_, address, size])| {
        *kind == PT_LOAD && strings.checked_sub(*address).is_some_and(|within| within < *size)
    })?;
    let place = (strings - address).checked_add(*offset)?.checked_add(name)?;
    let mut text = vec![0; NAME];
    let length = file.read_at(&mut text, place).ok()?;
    let text = text.get(..length)?;
    let name = std::str::from_utf8(text.get(..text.iter().position(|byte| *byte == 0)?)?).ok()?;
    // It becomes a file's name.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    (name.chars().all(plain) && name.starts_with("lib")).then(|| name.to_owned())
}

fn at(file: &File, offset: u64, size: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; size];
    let length = file.read_at(&mut bytes, offset).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let mut word = [0; 8];
    word.get_mut(..size)?.copy_from_slice(bytes.get(at..at.checked_add(size)?)?);
    Some(u64::from_le_bytes(word))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// The least that a library consists of: header, one segment over all of it, the dynamic section, and the SONAME.
    pub fn library(bits: Bits, soname: &str) -> Vec<u8> {
        let wide = bits == Bits::Sixtyfour;
        let (header, layout) = if wide { (64, WIDE) } else { (52, NARROW) };
        let word = layout.word;
        let dynamic = header + 2 * layout.segment;
        let strings = dynamic + 3 * 2 * word;
        let base = 0x10_000; // addresses are not offsets
        let mut bytes = vec![0; strings + 1];
        bytes.extend(soname.as_bytes());
        bytes.push(0);
        let size = bytes.len();
        let mut put = |at: usize, number: usize, size: usize| {
            bytes[at..at + size].copy_from_slice(&number.to_le_bytes()[..size]);
        };
        put(0, 0x464c_457f, 4);
        put(4, if wide { 2 } else { 1 }, 1);
        put(5, 1, 1);
        let machine = if !wide {
            EM_386
        } else if cfg!(target_arch = "aarch64") {
            EM_AARCH64
        } else {
            EM_X86_64
        };
        put(18, machine as usize, 2);
        put(layout.segments_at, header, word);
        put(layout.count_at, 2, 2);
        let [offset, address, length] = layout.segment_fields;
        for (at, kind, from, long) in
            [(header, PT_LOAD, 0, size), (header + layout.segment, PT_DYNAMIC, dynamic, 3 * 2 * word)]
        {
            put(at, kind as usize, 4);
            put(at + offset, from, word);
            put(at + address, base + from, word);
            put(at + length, long, word);
        }
        for (place, (tag, value)) in [(DT_STRTAB, base + strings), (DT_SONAME, 1)].into_iter().enumerate() {
            put(dynamic + place * 2 * word, tag as usize, word);
            put(dynamic + (place * 2 + 1) * word, value, word);
        }
        bytes
    }

    #[test]
    fn both_kinds_are_read_and_a_soname_that_is_no_file_name_is_not() {
        for bits in [Bits::Sixtyfour, Bits::Thirtytwo] {
            assert_eq!(of(&library(bits, "libcuda.so.1")), Some((bits, Some("libcuda.so.1".into()))));
            for bad in ["lib/../../etc/passwd", "libx\n", "cuda", "", &format!("lib{}", "x".repeat(200))] {
                assert_eq!(of(&library(bits, bad)), Some((bits, None)), "{bad:?}");
            }
        }
    }

    fn of(bytes: &[u8]) -> Option<(Bits, Option<String>)> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(&file)
    }

    /// The C library that this test was loaded with, and readelf's word for its SONAME.
    #[test]
    fn a_real_library() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path =
            maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains("/libc.so"));
        let Some(path) = path else {
            eprintln!("SKIP: this test is static");
            return;
        };
        assert_eq!(read(&File::open(path).unwrap()), Some((Bits::Sixtyfour, Some("libc.so.6".into()))));
    }

    #[test]
    fn what_is_no_library_is_none() {
        assert_eq!(of(b""), None);
        assert_eq!(of(b"#!/bin/sh\n"), None);
        assert_eq!(of(b"\x7fELF\x02\x01\x01"), None);
        let mut foreign = b"\x7fELF\x02\x01\x01".to_vec();
        foreign.resize(64, 0);
        foreign[18] = 0x16; // s390
        assert_eq!(of(&foreign), None);
        foreign[18] = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        assert_eq!(of(&foreign), Some((Bits::Sixtyfour, None)), "without a SONAME");
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(at in 0_usize..200, with in any::<u64>(), cut in 0_usize..260) {
            let mut bytes = library(Bits::Sixtyfour, "libcuda.so.1");
            if let Some(place) = bytes.get_mut(at..at + 8) {
                place.copy_from_slice(&with.to_le_bytes());
            }
            of(&bytes);
            bytes.truncate(cut);
            of(&bytes);
        }

        #[test]
        fn no_bytes_make_it_panic(rest in proptest::collection::vec(any::<u8>(), 0..300), class in 1_u8..3) {
            let mut bytes = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
            bytes.resize(18, 0);
            bytes.push(if class == 1 { 3 } else { 62 });
            bytes.push(0);
            bytes.extend(rest);
            of(&bytes);
        }
    }
}
