//! Device programs of cgroup v2 as lists of instructions: a new one that decides as the old one did, and also lets some
//! devices be read and written.
//!
//! An added program could only narrow: the kernel allows what all of them allow. So the old one is rewritten.

/// One instruction: `struct bpf_insn` of linux/bpf.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low four bits, source register in the high four.
    pub registers: u8,
    /// Offset of a jump, in instructions, or of a memory access, in bytes.
    pub offset: i16,
    /// Constant.
    pub constant: i32,
}

/// Operations that we write, and those of other programs that can't be moved.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const LOAD_WIDE: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW
const AND: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K: 32 bits
const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const UNLESS: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
/// `access_type` of `struct bpf_cgroup_dev_ctx`: the kind of device below, what is done with it above.
const CHARACTER: i32 = 2; // BPF_DEVCG_DEV_CHAR
const READ_WRITE: i32 = (2 | 4) << 16; // BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE
/// Fewest instructions that every kernel takes from root (BPF_MAXINSNS).
const MOST: usize = 4096;

/// The program that lets these character devices (major, minor) be read and written, and else decides as `old`.
pub fn widen(old: &[Instruction], devices: &[(u32, u32)]) -> Result<Vec<Instruction>, String> {
    // The kernel shows such an instruction with an id in the place of a descriptor: it would mean another thing.
    if old.iter().any(|i| i.code == CALL || (i.code == LOAD_WIDE && i.registers >> 4 != 0)) {
        return Err("one of them uses maps or functions, and can't be rewritten".into());
    }
    let new = [&beginning(devices), old].concat();
    match new.len() <= MOST {
        true => Ok(new),
        false => Err(format!("one of them would have more than {MOST} instructions")),
    }
}

/// Whether [`widen`] has been here with the same devices.
pub fn is_wide(program: &[Instruction], devices: &[(u32, u32)]) -> bool {
    program.starts_with(&beginning(devices))
}

fn beginning(devices: &[(u32, u32)]) -> Vec<Instruction> {
    let op =
        |code, to: u8, from: u8, offset, constant| Instruction { code, registers: from << 4 | to, offset, constant };
    let to_old = i16::try_from(devices.len() * 4).unwrap_or(i16::MAX);
    // Register 1, the context, stays for the old program.
    let mut new = vec![
        op(LOAD_WORD, 2, 1, 0, 0), // access_type
        op(LOAD_WORD, 3, 1, 4, 0), // major
        op(LOAD_WORD, 4, 1, 8, 0), // minor
        // A character device, and nothing but read and write: mknod stays what it was.
        op(AND, 2, 0, 0, !READ_WRITE),
        op(UNLESS, 2, 0, to_old, CHARACTER),
    ];
    for (major, minor) in devices {
        new.extend([
            op(UNLESS, 3, 0, 3, *major as i32),
            op(UNLESS, 4, 0, 2, *minor as i32),
            op(SET, 0, 0, 0, 1),
            op(EXIT, 0, 0, 0, 0),
        ]);
    }
    new
}
