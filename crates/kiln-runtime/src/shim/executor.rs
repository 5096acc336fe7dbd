//! The last step inside the container: libcontainer calls it instead of executing
//! the program itself.

use std::collections::HashMap;
use std::io::Write;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};

use super::init;
use super::program::Program;
use crate::sys;

#[derive(Clone)]
pub struct KilnExecutor {
    pub program: Program,
    /// Stay as the instance's first process and run the program below it.
    pub init: bool,
}

impl KilnExecutor {
    fn fail(&self, cause: &str) -> ! {
        // The descriptor is this process's last business: nothing else owns it here.
        let mut report = std::fs::File::from(sys::adopt_fd(self.program.report));
        let _ = report.write_all(cause.as_bytes());
        drop(report);
        sys::exit_now(127)
    }

    fn become_program(&self) -> ! {
        sys::reset_signals();
        let rights =
            sys::set_parent_death_signal(libc::SIGKILL).and_then(|()| self.program.drop_rights());
        if let Err(e) = rights {
            self.fail(&format!("cannot drop privileges: {e}"));
        }
        let cause = self.program.exec();
        self.fail(&cause)
    }
}

impl Executor for KilnExecutor {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        if !self.init {
            self.become_program();
        }
        // Changing user takes the signal away, so it is asked for here.
        if let Err(e) = sys::set_parent_death_signal(libc::SIGKILL) {
            self.fail(&format!("cannot tie the instance to its shim: {e}"));
        }
        match sys::fork() {
            Ok(sys::Fork::Child) => self.become_program(),
            Ok(sys::Fork::Parent(pid)) => init::run(pid, &self.program),
            Err(e) => self.fail(&format!("cannot fork: {e}")),
        }
    }

    /// Nothing: the exec itself tells better what is wrong.
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    /// Nothing: the environment is given with the exec.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}
