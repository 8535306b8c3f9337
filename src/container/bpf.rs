//! bpf(2), as far as device programs of a cgroup need it. No crate has all of it: aya and libbpf load and attach programs, but
//! neither reads the instructions of one that is loaded already.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use super::program::Instruction;

/// Constants and structures of linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const CGROUP_DEVICE: u32 = 6; // BPF_CGROUP_DEVICE
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
/// Beside it may be others, in its cgroup and below, and all of them decide (BPF_F_ALLOW_MULTI).
pub const ALLOW_MULTI: u32 = 1 << 1;
const F_REPLACE: u32 = 1 << 2;
/// BPF_CGROUP_MAX_PROGS in kernel/bpf/cgroup.c.
const MOST: usize = 64;

#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    _pad: u32,
    /// prog_attach_flags, link_ids, link_attach_flags, revision: Linux 6.17 to 7.1 writes the last whatever size it is told
    /// (https://github.com/opencontainers/cgroups/pull/69).
    _rest: [u64; 4],
}

#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct GetInfo {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    xlated_len: u32,
    jited: u64,
    xlated: u64,
    load_time: u64,
    created_by: u32,
    map_count: u32,
    maps: u64,
    name: Name,
    ifindex: u32,
    gpl_compatible: u32,
}

#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: Name,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
    replace_fd: u32,
}

/// A program's name, of letters, digits, `_` and `.`, filled up with NUL.
pub type Name = [u8; 16];

/// A device program that is attached to a cgroup.
#[derive(Debug)]
pub struct Attached {
    fd: File,
    flags: u32,
    gpl: bool,
    /// Its name.
    pub name: Name,
}

/// The device programs of this very cgroup (an open directory), not those of its ancestors.
pub fn attached(cgroup: &File) -> io::Result<Vec<Attached>> {
    let mut ids = [0_u32; MOST];
    let mut query = Query {
        target_fd: number(cgroup),
        attach_type: CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: MOST as u32,
        ..Query::default()
    };
    // SAFETY: `query` is what this command takes, and `ids` has room for as many as it says.
    unsafe { bpf(PROG_QUERY, &mut query) }?;
    let all = ids.iter().take(query.prog_cnt as usize);
    all.map(|id| read(*id, query.attach_flags)).collect()
}

fn read(id: u32, flags: u32) -> io::Result<Attached> {
    let mut by_id = ById { id, ..ById::default() };
    // SAFETY: `by_id` is what this command takes.
    let fd = own(unsafe { bpf(PROG_GET_FD_BY_ID, &mut by_id) }?);
    let info = info(&fd, &mut [])?;
    Ok(Attached { fd, flags, gpl: info.gpl_compatible & 1 == 1, name: info.name })
}

impl Attached {
    /// Whether it was attached with [`ALLOW_MULTI`].
    pub fn allows_others(&self) -> bool {
        self.flags & ALLOW_MULTI != 0
    }

    /// What it does, as the kernel runs it.
    pub fn instructions(&self) -> io::Result<Vec<Instruction>> {
        let length = info(&self.fd, &mut [])?.xlated_len as usize / size_of::<Instruction>();
        let mut instructions = vec![Instruction::default(); length];
        let info = info(&self.fd, &mut instructions)?;
        // A hardened kernel (net.core.bpf_jit_harden with kernel.kptr_restrict) hides the instructions.
        match length == 0 || info.xlated == 0 {
            true => Err(io::Error::other("the kernel does not show its instructions")),
            false => Ok(instructions),
        }
    }
}

fn info(fd: &File, into: &mut [Instruction]) -> io::Result<Info> {
    let mut info = Info {
        xlated_len: size_of_val(into) as u32,
        xlated: if into.is_empty() { 0 } else { into.as_mut_ptr() as u64 },
        ..Info::default()
    };
    let mut get = GetInfo { fd: number(fd), info_len: size_of::<Info>() as u32, info: &raw mut info as u64 };
    // SAFETY: `get` is what this command takes; `info` lives, and `into` has room for as many bytes as it says.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut get) }?;
    Ok(info)
}

/// Puts a program of these instructions in the place of an attached one, in one step, with its name, licence and flags.
pub fn replace(cgroup: &File, old: &Attached, instructions: &[Instruction]) -> io::Result<()> {
    let new = load(old.name, if old.gpl { c"GPL" } else { c"" }, instructions)?;
    // Without MULTI there is one program at most, and attaching replaces it.
    match old.allows_others() {
        true => attach(cgroup, &new, old.flags | F_REPLACE, Some(&old.fd)),
        false => attach(cgroup, &new, old.flags, None),
    }
}

/// Attaches a program of these instructions, with these flags (linux/bpf.h).
pub fn add(cgroup: &File, name: Name, instructions: &[Instruction], flags: u32) -> io::Result<()> {
    attach(cgroup, &load(name, c"", instructions)?, flags, None)
}

fn load(name: Name, license: &CStr, instructions: &[Instruction]) -> io::Result<File> {
    let mut load = Load {
        kind: PROG_TYPE_CGROUP_DEVICE,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name,
        ..Load::default()
    };
    raise_memlock();
    // SAFETY: `load` is what this command takes; the instructions and the licence live until it returns.
    unsafe { bpf(PROG_LOAD, &mut load) }.map(own)
}

fn attach(cgroup: &File, program: &File, flags: u32, replaced: Option<&File>) -> io::Result<()> {
    let mut attach = Attach {
        target_fd: number(cgroup),
        program_fd: number(program),
        attach_type: CGROUP_DEVICE,
        flags,
        replace_fd: replaced.map_or(0, number),
    };
    // SAFETY: `attach` is what this command takes.
    unsafe { bpf(PROG_ATTACH, &mut attach) }.map(drop)
}

/// Kernels before 5.11 count programs against this limit, 64 KiB by default for all of root's together.
fn raise_memlock() {
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: setrlimit reads the structure it is given. Where it may not be raised, loading tells.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &all) };
}

fn number(file: &File) -> u32 {
    file.as_raw_fd() as u32
}

fn own(fd: libc::c_long) -> File {
    // SAFETY: the kernel has just returned this descriptor to us; nobody else owns it.
    unsafe { File::from_raw_fd(fd as RawFd) }
}

/// # Safety
///
/// `attributes` must be the structure of that command, and every address in it must be valid for what the command does there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: as the caller promises.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
