//! The few system calls no safe wrapper exists for. Everything here is a thin,
//! documented call; no decision is taken in this file.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which side of a [`fork`] the caller is on.
pub enum Fork {
    Child,
    Parent(i32),
}

/// Forks. Only the re-executed, single-threaded shim and the container's first
/// process may call this.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the callers are single-threaded processes, so the child may go on
    // allocating and locking as it likes.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Ends the process without running anything registered for its end.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Gives the kernel back what was freed and lies between things that are still used; where
/// the allocator is another than glibc's it does so by itself, or not at all.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: any thread may call it at any time (malloc_trim(3)); it only looks at what is
    // free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The kernel sends this process `signal` when its parent ends.
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    // SAFETY: plain integers only.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) }).map(drop)
}

pub fn set_child_subreaper() -> io::Result<()> {
    // SAFETY: plain integers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Takes one capability out of the bounding set.
pub fn drop_bounding(capability: u32) -> io::Result<()> {
    // SAFETY: plain integers only.
    check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }).map(drop)
}

/// Empties the ambient set.
pub fn clear_ambient() -> io::Result<()> {
    // SAFETY: plain integers only.
    check(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    })
    .map(drop)
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two 32-bit words a set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Sets this process's effective and permitted sets; the inheritable set is emptied.
pub fn set_capabilities(set: u64) -> io::Result<()> {
    let header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let word = |shift: u32| {
        let bits = u32::try_from((set >> shift) & u64::from(u32::MAX)).unwrap_or(0);
        CapData {
            effective: bits,
            permitted: bits,
            inheritable: 0,
        }
    };
    let data = [word(0), word(32)];
    // SAFETY: header and data are what capset(2) version 3 asks for, and live across the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) } as i32).map(drop)
}

/// Reads this process's permitted set.
pub fn permitted_capabilities() -> io::Result<u64> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: header and data are what capget(2) version 3 asks for, and live across the call.
    check(unsafe { libc::syscall(libc::SYS_capget, &mut header, data.as_mut_ptr()) } as i32)?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Installs one seccomp filter for this process. Unlike seccompiler's own call it
/// leaves no-new-privileges as it is.
pub fn install_seccomp(filter: &[seccompiler::sock_filter]) -> io::Result<()> {
    #[repr(C)]
    struct Program {
        len: libc::c_ushort,
        filter: *const seccompiler::sock_filter,
    }
    let program = Program {
        len: libc::c_ushort::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr(),
    };
    const SECCOMP_SET_MODE_FILTER: libc::c_long = 1;
    // SAFETY: `program` describes `filter`, and both live across the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) } as i32)
        .map(drop)
}

/// Replaces the program. Only returns when that failed.
pub fn execve(path: &CStr, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| {
        let mut pointers: Vec<*const libc::c_char> = list.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        pointers
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end with null and point to strings that live across the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Gives every signal its default action, as a new program expects it. (Rust
/// ignores SIGPIPE, and ignored signals stay so across exec.)
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always a valid action. Signals that can't be changed
        // (SIGKILL, SIGSTOP, the C library's own) are refused, which is right.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero set is a valid, empty `sigset_t`.
    unsafe {
        let none: libc::sigset_t = mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Waits for a blocked signal; `None`: woken without one.
pub fn wait_signal() -> Option<i32> {
    // SAFETY: `all` is filled before use, and no information about the signal is asked for.
    let signal = unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigwaitinfo(&all, std::ptr::null_mut())
    };
    (signal > 0).then_some(signal)
}

/// Sends any signal, also a real-time one. A process that is gone is no error.
pub fn kill(pid: i32, signal: i32) {
    // SAFETY: plain integers only.
    unsafe { libc::kill(pid, signal) };
}

/// `pidfd_send_signal(2)`: to exactly the process that was opened.
pub fn signal_pidfd(fd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no information is passed with the signal.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    } as i32)
    .map(drop)
}

/// Closes every descriptor from `first` on.
pub fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: the callers own no descriptor from `first` on which they still use.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_int::MAX, 0) } as i32)
        .map(drop)
}

/// Takes over descriptor `fd`, which nothing else in this process owns.
pub fn adopt_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller says that it is open and that nobody else closes it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Attributes for [`set_mount_attributes`], as in `struct mount_attr`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub user_namespace: u64,
}

/// `mount_setattr(2)` (Linux 5.12) on the mount that `fd` stands for.
pub fn set_mount_attributes(
    fd: BorrowedFd<'_>,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is empty, `attributes` has the kernel's layout and size.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes,
            mem::size_of::<MountAttributes>(),
        )
    } as i32)
    .map(drop)
}

/// `struct loop_info64` and `struct loop_config` of <linux/loop.h>.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// The number of a loop device that is free now (another process may take it).
pub fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: this request takes no argument.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
    u32::try_from(number).map_err(io::Error::other)
}

/// Binds `file` to a loop device, read-only; the binding ends with the last use.
pub fn configure_loop(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all fields are integers and arrays of them, for which zero is valid.
    let mut config: LoopConfig = unsafe { mem::zeroed() };
    config.fd = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
    config.block_size = 4096;
    config.info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
    // SAFETY: `config` has the layout LOOP_CONFIGURE asks for and lives across the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &config) }).map(drop)
}

/// `bpf(2)` with an attribute block of at most 128 bytes.
fn bpf(command: libc::c_int, attributes: &[u64; 16]) -> io::Result<i32> {
    // SAFETY: the block is longer than any attribute used here, zero where unused,
    // and what it points to lives across the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            mem::size_of_val(attributes),
        )
    } as i32)
}

/// Loads a `BPF_PROG_TYPE_CGROUP_DEVICE` program.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u64 = 15;
    let mut attributes = [0_u64; 16];
    // Two 32-bit fields: the type, the number of instructions.
    attributes[0] = BPF_PROG_TYPE_CGROUP_DEVICE | (instructions.len() as u64) << 32;
    attributes[1] = instructions.as_ptr() as u64;
    attributes[2] = c"Apache-2.0".as_ptr() as u64;
    bpf(BPF_PROG_LOAD, &attributes).map(adopt_fd)
}

/// Attaches such a program to a v2 control group, beside those already there.
pub fn attach_device_program(group: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u64 = 6;
    const BPF_F_ALLOW_MULTI: u64 = 2;
    let mut attributes = [0_u64; 16];
    let word = |fd: BorrowedFd<'_>| u64::from(fd.as_raw_fd().unsigned_abs());
    attributes[0] = word(group) | word(program) << 32;
    attributes[1] = BPF_CGROUP_DEVICE | BPF_F_ALLOW_MULTI << 32;
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
