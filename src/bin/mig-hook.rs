//! First stage of the OCI hook: decides whether anything is to be done, then becomes `mig-engine`.
#![no_main]
mig_hook::entry!(mig_hook::first::hook);
