#![allow(unsafe_code)] // bpf(2) has no safe wrapper.
//! Small eBPF programs on cgroups: their instructions, and the three commands of bpf(2) that
//! bring them there. Numbers are those of include/uapi/linux/bpf.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

pub const LOAD_WORD: u8 = 0x61;
pub const STORE_WORD: u8 = 0x63;
pub const AND: u8 = 0x54;
pub const SHIFT_RIGHT: u8 = 0x74;
pub const MOVE_REGISTER: u8 = 0xbc;
pub const MOVE: u8 = 0xb7;
pub const JUMP_UNEQUAL: u8 = 0x55;
pub const JUMP_UNEQUAL_REGISTER: u8 = 0x5d;
pub const JUMP_EQUAL: u8 = 0x15;
pub const EXIT: u8 = 0x95;

pub const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: to | from << 4, offset, immediate }
}

/// Where a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// When a device node is made or opened.
    Device,
    /// When a socket is connected to an IPv4 address.
    Connect4,
    /// When a socket that is not connected sends to an IPv4 address.
    SendTo4,
    /// When a datagram from an IPv4 address has been received.
    Received4,
}

impl Hook {
    /// Of the program, and of its place.
    fn kinds(self) -> (u32, u32) {
        const CGROUP_DEVICE: u32 = 15;
        const CGROUP_SOCK_ADDR: u32 = 18;
        match self {
            Self::Device => (CGROUP_DEVICE, 6),
            Self::Connect4 => (CGROUP_SOCK_ADDR, 10),
            Self::SendTo4 => (CGROUP_SOCK_ADDR, 14),
            Self::Received4 => (CGROUP_SOCK_ADDR, 19),
        }
    }
}

/// Has the kernel check and take a program.
pub fn load(hook: Hook, program: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        first: u64,
        license: u64,
        log: [u32; 2],
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        place: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    let (kind, place) = hook.kinds();
    let load = Load {
        kind,
        instructions: u32::try_from(program.len()).map_err(io::Error::other)?,
        first: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 2],
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        place,
    };
    // SAFETY: `load` is the beginning of union bpf_attr that this command reads; both pointers
    // in it outlive the call; the result is a new descriptor.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(BPF_PROG_LOAD, &load)?)) }
}

/// Puts a program on a cgroup, by its directory, beside those that are there, for the cgroup's life.
pub fn attach(hook: Hook, program: &OwnedFd, cgroup: &File) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        place: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attach = Attach {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        place: hook.kinds().1,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` is the beginning of union bpf_attr that this command reads.
    unsafe { bpf(BPF_PROG_ATTACH, &attach) }.map(drop)
}

/// The same until the link that it returns is closed. Linux 5.7 and newer.
pub fn link(hook: Hook, program: &OwnedFd, cgroup: &File) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Link {
        program: u32,
        target: u32,
        place: u32,
        flags: u32,
    }
    const BPF_LINK_CREATE: libc::c_int = 28;
    let link = Link {
        program: program.as_raw_fd().unsigned_abs(),
        target: cgroup.as_raw_fd().unsigned_abs(),
        place: hook.kinds().1,
        flags: 0,
    };
    // SAFETY: `link` is the beginning of union bpf_attr that this command reads; the result is a
    // new descriptor.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(BPF_LINK_CREATE, &link)?)) }
}

/// # Safety
/// `attributes` must be what `command` expects.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    let attributes: *const T = attributes;
    // SAFETY: the caller's promise; the kernel reads `size_of::<T>()` bytes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    match i32::try_from(result) {
        Ok(result @ 0..) => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
