//! `migctl`: see and free MIG slices.

fn main() -> std::process::ExitCode {
    mig_hook::cli::main()
}
