//! Shared objects that hold nothing but their own name: what a driver tree has in the place of NVIDIA's libraries.
//!
//! Any loader takes them: a SONAME, a symbol, no code and no relocation. So no compiler is needed where a machine is made.
//! Layout: elf(5) and the System V ABI.

/// The one symbol: a C string, the name of the file and its driver's version.
pub const SYMBOL: &str = "nvml_sim_file";

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_GNU_STACK: u32 = 0x6474_e551;
const READ_WRITE: u32 = 6;

/// For which processes a library is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// 32-bit x86.
    Thirtytwo,
    /// This machine's own 64-bit architecture.
    Sixtyfour,
}

impl Bits {
    /// `e_machine`: EM_386; EM_X86_64 or EM_AARCH64.
    fn machine(self) -> u16 {
        match self {
            Self::Thirtytwo => 3,
            Self::Sixtyfour if cfg!(target_arch = "aarch64") => 183,
            Self::Sixtyfour => 62,
        }
    }

    fn wide(self) -> bool {
        self == Self::Sixtyfour
    }

    /// Size of an address.
    fn word(self) -> usize {
        if self.wide() { 8 } else { 4 }
    }

    /// Sizes of the file header, a program header and a symbol.
    fn sizes(self) -> (usize, usize, usize) {
        if self.wide() { (64, 56, 24) } else { (52, 32, 16) }
    }
}

/// Little-endian numbers, one after the other.
struct Image {
    bytes: Vec<u8>,
    bits: Bits,
}

impl Image {
    fn half(&mut self, number: u16) -> &mut Self {
        self.bytes.extend(number.to_le_bytes());
        self
    }

    fn number(&mut self, number: u32) -> &mut Self {
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// An address, an offset or a size.
    fn word(&mut self, number: usize) -> &mut Self {
        self.bytes.extend(number.to_le_bytes().iter().take(self.bits.word()));
        self
    }

    fn segment(&mut self, kind: u32, at: usize, size: usize, align: usize) {
        let wide = self.bits.wide();
        self.number(kind);
        if wide {
            self.number(READ_WRITE);
        }
        self.word(at).word(at).word(at).word(size).word(size);
        if !wide {
            self.number(READ_WRITE);
        }
        self.word(align);
    }

    fn symbol(&mut self, name: u32, value: usize, size: usize) {
        // STB_GLOBAL, STT_OBJECT, and any section but "undefined": there are none.
        let (info, section) = if size > 0 { (0x11, 1) } else { (0, 0) };
        self.number(name);
        if self.bits.wide() {
            self.bytes.extend([info, 0]);
            self.half(section).word(value).word(size);
        } else {
            self.word(value).word(size);
            self.bytes.extend([info, 0]);
            self.half(section);
        }
    }
}

/// A library with this SONAME, in which [`SYMBOL`] says `text`.
pub fn shared_object(bits: Bits, soname: &str, text: &str) -> Vec<u8> {
    let (header, segment, symbol) = bits.sizes();
    let strings = format!("\0{soname}\0{SYMBOL}\0");
    let symbol_name = (soname.len() + 2) as u32;
    // DT_SONAME, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL: each a tag and a value.
    let dynamic_at = header + 3 * segment;
    let dynamic_size = 7 * 2 * bits.word();
    let symbols_at = dynamic_at + dynamic_size;
    let hash_at = symbols_at + 2 * symbol;
    let strings_at = hash_at + 5 * 4;
    let text_at = strings_at + strings.len();
    let size = text_at + text.len() + 1;

    let mut image = Image { bytes: b"\x7fELF".to_vec(), bits };
    image.bytes.extend([if bits.wide() { 2 } else { 1 }, 1, 1, 0]);
    image.bytes.resize(16, 0);
    // ET_DYN, EV_CURRENT, no entry, program headers behind this one, no sections.
    image.half(3).half(bits.machine()).number(1).word(0).word(header).word(0).number(0);
    image.half(header as u16).half(segment as u16).half(3).half(0).half(0).half(0);
    // Writable, since glibc before 2.35 writes addresses into the dynamic section.
    image.segment(PT_LOAD, 0, size, 0x1000);
    image.segment(PT_DYNAMIC, dynamic_at, dynamic_size, bits.word());
    // Without it glibc takes the stack for one that has to be executable.
    image.segment(PT_GNU_STACK, 0, 0, 16);
    let entries = [(14, 1), (4, hash_at), (5, strings_at), (6, symbols_at), (10, strings.len()), (11, symbol), (0, 0)];
    for (tag, value) in entries {
        image.word(tag).word(value);
    }
    image.symbol(0, 0, 0);
    image.symbol(symbol_name, text_at, text.len() + 1);
    // One bucket with the one symbol, and the chain that ends there.
    image.number(1).number(2).number(1).number(0).number(0);
    image.bytes.extend(strings.as_bytes());
    image.bytes.extend(text.as_bytes());
    image.bytes.push(0);
    image.bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn readelf_reads_a_soname_and_a_symbol() {
        let dir = tempfile::tempdir().unwrap();
        for (bits, class) in [(Bits::Sixtyfour, "ELF64"), (Bits::Thirtytwo, "ELF32")] {
            let path = dir.path().join("libx.so");
            std::fs::write(&path, shared_object(bits, "libx.so.1", "libx.so of 1.2")).unwrap();
            let Ok(output) =
                Command::new("readelf").args(["-h", "-d", "-l", "--use-dynamic", "-s"]).arg(&path).output()
            else {
                eprintln!("SKIP: no readelf");
                return;
            };
            let said = String::from_utf8_lossy(&output.stdout);
            for part in [class, "[libx.so.1]", SYMBOL, "DYN (Shared object file)"] {
                assert!(said.contains(part), "{part}: {said}{}", String::from_utf8_lossy(&output.stderr));
            }
            assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        }
    }
}
