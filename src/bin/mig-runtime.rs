//! First stage of the runtime shim: becomes the low-level runtime, or `mig-engine` when a slice is asked for or held.
#![no_main]
mig_hook::entry!(mig_hook::first::runtime);
