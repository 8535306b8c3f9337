//! Gives the cdylib the SONAME by which every NVML client asks for the driver's library, and `--version` the commit that
//! `make build` names, and the target.

use std::env;

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnvidia-ml.so.1");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=MIG_HOOK_COMMIT");
    let target = env::var("TARGET").unwrap_or_default();
    let built = match env::var("MIG_HOOK_COMMIT") {
        Ok(commit) if !commit.is_empty() => format!("{commit}, {target}"),
        _ => target,
    };
    println!("cargo:rustc-env=NVML_SIM_VERSION={} ({built})", env::var("CARGO_PKG_VERSION").unwrap_or_default());
}
