//! What `mig-hook` and `mig-runtime` become when there is something to do. Not for people.
#![no_main]
mig_hook::entry!(mig_hook::report::engine_main);
