//! The program of the services that end-to-end tests put under load; an example of nothing,
//! but only so is it built with those tests.

fn main() -> std::process::ExitCode {
    kiln_testkit::app::main()
}
