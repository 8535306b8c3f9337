//! Takes symbols out of a shared object, so that dlsym(3) doesn't find them: what an old driver's library looks like.
//! Layout: elf(5), 64 bits, little-endian.

use anyhow::{Context, Result, ensure};

const SHT_DYNSYM: u32 = 11;
const SECTION: usize = 64;
const SYMBOL: usize = 24;
/// Where a symbol says its binding and type; among global ones no local one may stand.
const INFO: usize = 4;
/// STB_WEAK, STT_NOTYPE: with no section, something undefined that nobody misses.
const WEAK: u8 = 0x20;

fn half(image: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?).into())
}

fn number(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?))
}

fn word(image: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?)).ok()
}

/// Where the symbols for the loader begin, how many there are, and where their names begin.
fn symbols(image: &[u8]) -> Option<(usize, usize, usize)> {
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (sections, count) = (word(image, 0x28)?, half(image, 0x3c)?);
    let section = |index: usize| sections + index * SECTION;
    let found = (0..count).map(section).find(|at| number(image, at + 4) == Some(SHT_DYNSYM))?;
    let names = section(number(image, found + 0x28)? as usize);
    Some((word(image, found + 0x18)?, word(image, found + 0x20)? / SYMBOL, word(image, names + 0x18)?))
}

/// Takes the symbols with these names out. A hash table still leads to their places, where no name is that a loader
/// would compare with.
pub fn hide(image: &mut [u8], names: &[&str]) -> Result<()> {
    let (table, count, strings) = symbols(image).context("it is no shared object of 64 bits with a symbol table")?;
    let mut hidden = 0;
    for at in (0..count).map(|index| table + index * SYMBOL) {
        let start = strings + number(image, at).context("its symbol table is cut off")? as usize;
        let text = image.get(start..).unwrap_or_default();
        let name = text.split(|byte| *byte == 0).next().unwrap_or_default();
        if names.iter().any(|wanted| wanted.as_bytes() == name) {
            image[at..at + SYMBOL].fill(0);
            image[at + INFO] = WEAK;
            hidden += 1;
        }
    }
    ensure!(hidden == names.len(), "it has {hidden} of the {} calls that are to be taken out", names.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::{self, Bits, shared_object};

    #[test]
    fn what_is_no_library_is_refused() {
        let narrow = shared_object(Bits::Thirtytwo, "libx.so.1", "x");
        let without_sections = shared_object(Bits::Sixtyfour, "libx.so.1", "x");
        for mut image in [Vec::new(), b"\x7fELF".to_vec(), narrow, without_sections] {
            hide(&mut image, &[elf::SYMBOL]).unwrap_err();
        }
    }
}
