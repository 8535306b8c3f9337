//! Device programs of cgroup v2 as lists of instructions: a new one that decides as the old one did, and also lets some
//! devices be read and written; and one that denies some devices and nothing else.
//!
//! An added program can only narrow: the kernel allows what all of them allow. So to widen, the old one is rewritten.

use std::collections::BTreeSet;

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
const IF: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const UNLESS: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const IF_ABOVE: u8 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const IF_BELOW: u8 = 0xa5; // BPF_JMP | BPF_JLT | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
/// `access_type` of `struct bpf_cgroup_dev_ctx`: the kind of device below, what is done with it above.
const CHARACTER: i32 = 2; // BPF_DEVCG_DEV_CHAR
const KIND: i32 = 0xffff;
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

/// The program that lets nothing be done with these character devices (major, minor), and everything else. It grows with
/// the gaps between the minors, not with their number.
pub fn deny(devices: &BTreeSet<(u32, u32)>) -> Result<Vec<Instruction>, String> {
    let mut new = vec![
        op(LOAD_WORD, 2, 1, 0, 0), // access_type
        op(LOAD_WORD, 3, 1, 4, 0), // major
        op(LOAD_WORD, 4, 1, 8, 0), // minor
        op(AND, 2, 0, 0, KIND),
        op(IF, 2, 0, 2, CHARACTER),
        op(SET, 0, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ];
    for (major, first, last) in ranges(devices) {
        new.extend([
            op(UNLESS, 3, 0, 4, major as i32),
            op(IF_BELOW, 4, 0, 3, first as i32),
            op(IF_ABOVE, 4, 0, 2, last as i32),
            op(SET, 0, 0, 0, 0),
            op(EXIT, 0, 0, 0, 0),
        ]);
    }
    new.extend([op(SET, 0, 0, 0, 1), op(EXIT, 0, 0, 0, 0)]);
    match new.len() <= MOST {
        true => Ok(new),
        false => Err(format!("a program that denies just these devices would have more than {MOST} instructions")),
    }
}

/// Majors with their runs of minors, first and last.
fn ranges(devices: &BTreeSet<(u32, u32)>) -> Vec<(u32, u32, u32)> {
    let mut ranges: Vec<(u32, u32, u32)> = vec![];
    for (major, minor) in devices {
        match ranges.last_mut() {
            Some((same, _, last)) if (*same, last.saturating_add(1)) == (*major, *minor) => *last = *minor,
            _ => ranges.push((*major, *minor, *minor)),
        }
    }
    ranges
}

fn op(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, constant }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u32 = 1;
    const CHAR: u32 = 2;

    /// Runs a program as the kernel does, as far as programs of this kind go. `None`: it does something else.
    fn decide(program: &[Instruction], [access_type, major, minor]: [u32; 3]) -> Option<bool> {
        let mut registers = [0_u64; 11];
        let mut at = 0_usize;
        loop {
            let i = *program.get(at)?;
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let (constant, old) = (i64::from(i.constant) as u64, registers[to]);
            at += 1;
            let other = if i.code & 8 == 0 { constant } else { registers[from] };
            match i.code {
                EXIT => return Some(registers[0] as u32 != 0),
                LOAD_WORD if from == 1 => {
                    registers[to] = u64::from(*[access_type, major, minor].get(usize::try_from(i.offset).ok()? / 4)?);
                }
                0xb7 | 0xbf => registers[to] = other,
                0xb4 | 0xbc => registers[to] = u64::from(other as u32),
                0x54 | 0x5c => registers[to] = u64::from(old as u32 & other as u32),
                0x57 | 0x5f => registers[to] = old & other,
                0x74 => registers[to] = u64::from(old as u32 >> constant),
                0x77 => registers[to] = old >> constant,
                0x05 | 0x15 | 0x1d | 0x55 | 0x5d | IF_ABOVE | IF_BELOW => {
                    let jumps = match i.code {
                        0x15 | 0x1d => old == other,
                        0x55 | 0x5d => old != other,
                        IF_ABOVE => old > other,
                        IF_BELOW => old < other,
                        _ => true,
                    };
                    at = if jumps { at.checked_add_signed(i.offset.into())? } else { at };
                }
                _ => return None,
            }
        }
    }

    /// A rule as runc and crun compile it: kind of device, access bits, major and minor where they matter, verdict.
    type Rule = (Option<u32>, u32, Option<u32>, Option<u32>, bool);

    /// In their way: the parts into registers 2 to 5, one block a rule, the default at the end.
    fn compile(rules: &[Rule], default: bool) -> Vec<Instruction> {
        let mut program = vec![
            op(0x61, 2, 1, 0, 0),
            op(0x54, 2, 0, 0, 0xffff),
            op(0x61, 3, 1, 0, 0),
            op(0x74, 3, 0, 0, 16),
            op(0x61, 4, 1, 4, 0),
            op(0x61, 5, 1, 8, 0),
        ];
        for (kind, access, major, minor, allow) in rules {
            let mut block = vec![];
            // "Not all of what is wanted is in this rule": next.
            block.push(op(0xbc, 1, 3, 0, 0));
            block.push(op(0x54, 1, 0, 0, *access as i32));
            block.push(op(0x5d, 1, 3, 0, 0));
            for (register, wanted) in [(2, kind), (4, major), (5, minor)] {
                block.extend(wanted.map(|value| op(0x55, register, 0, 0, value as i32)));
            }
            block.extend([op(0xb4, 0, 0, 0, i32::from(*allow)), op(0x95, 0, 0, 0, 0)]);
            let end = block.len() as i16;
            for (n, i) in block.iter_mut().enumerate().filter(|(_, i)| i.code == 0x5d || i.code == 0x55) {
                i.offset = end - n as i16 - 1;
            }
            program.extend(block);
        }
        program.extend([op(0xb4, 0, 0, 0, i32::from(default)), op(0x95, 0, 0, 0, 0)]);
        program
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(prop_oneof![Just(195), Just(240), 0..6_u32]);
        (proptest::option::of(1..3_u32), 0..8_u32, number(), number(), any::<bool>())
    }

    proptest! {
        /// For every question: what it was, or ours with nothing but read and write.
        #[test]
        fn the_old_decision_or_ours(
            rules in proptest::collection::vec(rule(), 0..6),
            default in any::<bool>(),
            ours in proptest::collection::vec((prop_oneof![Just(195_u32), Just(240)], 0..4_u32), 0..6),
        ) {
            let old = compile(&rules, default);
            let new = widen(&old, &ours).unwrap();
            prop_assert!(is_wide(&new, &ours));
            for kind in [0, BLOCK, CHAR, 3] {
                for access in 0..16 {
                    for major in [0, 1, 5, 194, 195, 196, 240, u32::MAX] {
                        for minor in [0, 1, 2, 3, 4, 195, 240, u32::MAX] {
                            let question = [access << 16 | kind, major, minor];
                            let own = kind == CHAR && access & !6 == 0 && ours.contains(&(major, minor));
                            let was = decide(&old, question).unwrap();
                            prop_assert_eq!(decide(&new, question), Some(was || own), "{:?}", question);
                        }
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn exactly_what_is_denied_is(
            denied in proptest::collection::btree_set((prop_oneof![Just(195_u32), Just(240)], 0..12_u32), 0..20),
        ) {
            let program = deny(&denied).unwrap();
            for kind in [0, BLOCK, CHAR, 3] {
                for access in 0..8 {
                    for major in [0, 1, 194, 195, 196, 240, u32::MAX] {
                        for minor in (0..14).chain([u32::MAX]) {
                            let question = [access << 16 | kind, major, minor];
                            let is_denied = kind == CHAR && denied.contains(&(major, minor));
                            prop_assert_eq!(decide(&program, question), Some(!is_denied), "{:?}", question);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_thousand_minors_but_a_few_are_a_short_program() {
        // What mig-minors lists, less two slices.
        let denied = (1..=4322).filter(|minor| ![12, 13, 30, 31].contains(minor)).map(|minor| (236, minor)).collect();
        assert_eq!(ranges(&denied), [(236, 1, 11), (236, 14, 29), (236, 32, 4322)]);
        assert!(deny(&denied).unwrap().len() < 30);
        let every_second = (0..2000).map(|minor| (236, 2 * minor)).collect();
        assert!(deny(&every_second).unwrap_err().contains("more than 4096 instructions"));
    }

    #[test]
    fn what_would_change_its_meaning_is_not_moved() {
        let ours = [(195, 0)];
        let exit = op(0x95, 0, 0, 0, 0);
        assert!(widen(&[op(0x85, 0, 0, 0, 1), exit], &ours).is_err(), "a call");
        assert!(widen(&[op(0x18, 1, 1, 0, 7), op(0, 0, 0, 0, 0), exit], &ours).is_err(), "a map");
        assert!(widen(&[op(0x18, 0, 0, 0, 7), op(0, 0, 0, 0, 0), exit], &ours).is_ok(), "a constant");
        assert!(widen(&vec![exit; MOST], &ours).is_err());
    }

    #[test]
    fn widened_again_only_for_others() {
        let once = widen(&compile(&[], false), &[(195, 0)]).unwrap();
        assert!(is_wide(&once, &[(195, 0)]) && !is_wide(&once, &[(195, 1)]));
        let twice = widen(&once, &[(195, 1)]).unwrap();
        let open = |major, minor| decide(&twice, [6 << 16 | CHAR, major, minor]).unwrap();
        assert!(open(195, 0) && open(195, 1) && !open(195, 2));
    }
}
