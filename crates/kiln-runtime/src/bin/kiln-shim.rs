//! The shim as a program of its own, so that tests of other crates need no `kiln`.

fn main() -> std::process::ExitCode {
    kiln_runtime::shim::main(std::env::args_os().skip(1))
}
