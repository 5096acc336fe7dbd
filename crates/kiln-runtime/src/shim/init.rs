//! `init: true`: the instance's first process stays kiln's own, passes signals on
//! to the program and reaps what the program leaves behind. It isn't executed anew
//! (the image may lack every library): it is the shim's own forked code, not
//! dumpable, without any descriptor of the host, and with the program's
//! capabilities.

use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use rustix::process::{WaitOptions, wait};

use super::program::Program;
use crate::sys;

/// Never returns; the exit code is the program's, 128 + n when signal n ended it.
pub fn run(child: i32, program: &Program) -> ! {
    let ready = sys::close_from(3).and_then(|()| program.drop_capabilities());
    if ready.is_err() {
        sys::exit_now(126);
    }
    let all = SigSet::all();
    let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&all), None);
    loop {
        // Whatever has ended by now, and then whatever comes.
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(None) => break,
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == child => {
                    if let Some(code) = status.exit_status() {
                        sys::exit_now(code);
                    }
                    if let Some(signal) = status.terminating_signal() {
                        sys::exit_now(128 + signal);
                    }
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => sys::exit_now(126),
            }
        }
        if let Some(signal) = sys::wait_signal() {
            if signal != libc::SIGCHLD {
                // The real-time ones have no name in the safe wrapper.
                sys::kill(child, signal);
            }
        }
    }
}
