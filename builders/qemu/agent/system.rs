//! The calls that std does not have. The only `unsafe` of the agent: it has no
//! dependencies, so that one file for `rustc` is all it takes to build it.
#![allow(unsafe_code, reason = "declared here as libc has them for Linux, glibc and musl alike")]

use std::ffi::{c_int, c_long, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

pub(crate) const SIGHUP: c_int = 1;
pub(crate) const SIGKILL: c_int = 9;

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: c_long,
}

/// `struct rand_pool_info` of linux/random.h.
#[repr(C)]
struct RandomPool {
    bits: c_int,
    size: c_int,
    bytes: [u8; 512],
}

unsafe extern "C" {
    // These take numbers, and hurt nobody's memory.
    safe fn daemon(keep_folder: c_int, keep_streams: c_int) -> c_int;
    safe fn setsid() -> c_int;
    safe fn kill(pid: c_int, signal: c_int) -> c_int;
    safe fn sync();

    fn waitid(kind: c_int, id: c_uint, info: *mut u64, options: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn clock_settime(clock: c_int, time: *const Timespec) -> c_int;
}

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Goes on as a process of its own, without a terminal, and lets the caller's
/// end. Only while there is one thread.
pub(crate) fn leave() -> io::Result<()> {
    checked(daemon(0, 0))
}

/// Sends a signal to a process, or (negative) to a group. One that cannot be
/// sent has nobody to reach.
pub(crate) fn send_signal(to: i32, signal: c_int) {
    // 0, 1 and -1 are not for us.
    if to.unsigned_abs() > 1 {
        kill(to, signal);
    }
}

/// Waits until a child has ended, and leaves it to be buried: until then its
/// number is no other process's.
pub(crate) fn await_exit(child: u32) {
    const P_PID: c_int = 1;
    const WEXITED_WNOWAIT: c_int = 4 | 0x0100_0000;
    let mut info = [0_u64; 16];
    loop {
        // SAFETY: writes a siginfo_t: 128 bytes, aligned as these.
        let done = checked(unsafe { waitid(P_PID, child, info.as_mut_ptr(), WEXITED_WNOWAIT) });
        if !done.is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
            return;
        }
    }
}

/// Writes what the kernel holds in memory to all disks.
pub(crate) fn sync_all() {
    sync();
}

/// Gives the kernel's random number generator bytes, and has them counted as
/// random.
pub(crate) fn add_entropy(seed: &[u8; 512]) -> io::Result<()> {
    const RNDADDENTROPY: c_ulong = 0x4008_5203;
    let device = File::options().write(true).open("/dev/urandom")?;
    let pool = RandomPool { bits: 512 * 8, size: 512, bytes: *seed };
    // SAFETY: reads the struct that linux/random.h says, of the size it names.
    checked(unsafe { ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) })
}

/// Makes it use them at once. Otherwise it would go on for up to a minute with
/// a key that every other guest of this checkpoint has.
pub(crate) fn reseed() -> io::Result<()> {
    const RNDRESEEDCRNG: c_ulong = 0x5207;
    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: takes no argument.
    checked(unsafe { ioctl(device.as_raw_fd(), RNDRESEEDCRNG, 0) })
}

/// Sets the wall clock.
pub(crate) fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const CLOCK_REALTIME: c_int = 0;
    let seconds = i64::try_from(nanoseconds / 1_000_000_000).map_err(io::Error::other)?;
    let time = Timespec { seconds, nanoseconds: (nanoseconds % 1_000_000_000) as c_long };
    // SAFETY: reads the struct, which lives until it returns.
    checked(unsafe { clock_settime(CLOCK_REALTIME, &raw const time) })
}

/// Has a command lead a session of its own, in the control group whose
/// `cgroup.procs` is `group`.
pub(crate) fn set_apart(command: &mut Command, group: Option<File>) {
    let work = move || {
        setsid();
        match &group {
            Some(group) => io::Write::write_all(&mut &*group, b"0"),
            None => Ok(()),
        }
    };
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(work) };
}
