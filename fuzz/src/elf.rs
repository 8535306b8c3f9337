//! Kind and SONAME of a shared object.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek, Write};

use mig_hook::driver::elf::{self, Bits};

thread_local! {
    static FILE: RefCell<File> = RefCell::new(tempfile::tempfile().unwrap());
}

pub fn check(data: &[u8]) {
    if let Some((_, Some(name))) = read(data) {
        is_name(&name, data);
    }
    // A library that is laid out as linkers do, with the name that these bytes can give.
    let plain = |b: &&u8| b.is_ascii_alphanumeric() || b"._+-".contains(b);
    let name: Vec<u8> = b"lib".iter().chain(data.iter().filter(plain).take(120)).copied().collect();
    let name = String::from_utf8(name).unwrap();
    for (bits, library) in [(Bits::Sixtyfour, library(&name, 8)), (Bits::Thirtytwo, library(&name, 4))] {
        assert_eq!(read(&library), Some((bits, Some(name.clone()))));
    }
}

fn read(data: &[u8]) -> Option<(Bits, Option<String>)> {
    FILE.with_borrow_mut(|file| {
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(data).unwrap();
        elf::read(file)
    })
}

fn is_name(name: &str, data: &[u8]) {
    assert!(name.starts_with("lib") && name.len() < 128 && !name.contains('/'), "{name:?}");
    let with_end: Vec<u8> = name.bytes().chain([0]).collect();
    assert!(data.windows(with_end.len()).any(|window| window == with_end), "{name:?} stands in the file");
}

/// elf(5): header, PT_LOAD of all, PT_DYNAMIC; then strings and the dynamic section. Loaded at 0x1000.
fn library(name: &str, word: usize) -> Vec<u8> {
    let wide = word == 8;
    let number = |value: u64, size: usize| value.to_le_bytes()[..size].to_vec();
    let (header, segment) = if wide { (64, 56) } else { (52, 32) };
    let strings_at = header + 2 * segment;
    let strings: Vec<u8> = [0].into_iter().chain(name.bytes()).chain([0]).collect();
    let dynamic_at = (strings_at + strings.len()).next_multiple_of(8);
    let base = 0x1000;
    let dynamic: Vec<u8> = [(14, 1), (5, base + strings_at as u64), (0, 0)]
        .into_iter()
        .flat_map(|(tag, value)| [number(tag, word), number(value, word)].concat())
        .collect();
    let end = dynamic_at + dynamic.len();

    let mut file = vec![0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    file.extend(number(3, 2)); // ET_DYN
    file.extend(number(if wide { 62 } else { 3 }, 2));
    file.extend(number(1, 4));
    file.extend(number(0, word));
    file.extend(number(header as u64, word));
    file.extend(number(0, word));
    file.extend(number(0, 4));
    for half in [header, segment, 2] {
        file.extend(number(half as u64, 2));
    }
    file.resize(header, 0);
    for (kind, offset, size) in [(1, 0, end), (2, dynamic_at, dynamic.len())] {
        let at = file.len();
        file.extend(number(kind, 4));
        if wide {
            file.extend(number(4, 4));
        }
        file.extend(number(offset as u64, word));
        file.extend(number(base + offset as u64, word));
        file.extend(number(base + offset as u64, word));
        file.extend(number(size as u64, word));
        file.extend(number(size as u64, word));
        file.resize(at + segment, 0);
    }
    file.extend(&strings);
    file.resize(dynamic_at, 0);
    file.extend(&dynamic);
    file
}
