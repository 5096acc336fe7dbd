//! The program of the services that end-to-end tests put under load; an example of nothing,
//! but only so is it built with those tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    match kiln_testkit::app::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("app: {error}");
            ExitCode::FAILURE
        }
    }
}
