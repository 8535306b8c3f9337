//! A MIG slice for every container.
//!
//! A container asks for a MIG slice by annotation or environment. We locate a free slice of that profile or create one
//! at the best placement, put its device nodes and UUID into the container, record who holds it, and give it back when
//! the container ends. No daemon.
//!
//! ```text
//! bin/       mig-hook, mig-runtime (first stages, over `first` alone), mig-engine, migctl
//! ways in    cli  hook  classic  shim  report                               know argv, stdin, stdout, exit codes
//! engine     engine                                                         the only file that orders lease, GPU and lock
//! pure       request  cut  profile  placement  lease  job  slurm            no file, no process, no clock
//!            queue  inventory  layout  mig_parted  edits  injection  cdi
//!            history  metrics
//! edges      gpu  store  host  names  bundle  runtime  config  container    one machine each; never import the engine or each other
//!            driver  cdi_file
//! start      first  handover                                                is anything asked? else exec the low-level runtime
//! ```
//!
//! Rows above import rows below, never upward; `tests/layout.rs` keeps this true. `unsafe` is denied here and allowed in
//! three files: `gpu/ffi.rs` (NVML), `handover.rs` (what a process inherits and hands on) and `container/bpf.rs` (bpf(2));
//! docs/decisions/0001.

#![deny(unsafe_code)]

pub mod first;
pub mod handover;

#[cfg(feature = "engine")]
pub mod bundle;
#[cfg(feature = "engine")]
pub mod cdi;
#[cfg(feature = "engine")]
pub mod cdi_file;
#[cfg(feature = "engine")]
pub mod classic;
#[cfg(feature = "engine")]
pub mod cli;
#[cfg(feature = "engine")]
pub mod config;
#[cfg(feature = "engine")]
pub mod container;
#[cfg(feature = "engine")]
pub mod cut;
#[cfg(feature = "engine")]
pub mod driver;
#[cfg(feature = "engine")]
pub mod edits;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
pub mod gpu;
#[cfg(feature = "engine")]
pub mod history;
#[cfg(feature = "engine")]
pub mod hook;
#[cfg(feature = "engine")]
pub mod host;
#[cfg(feature = "engine")]
pub mod injection;
#[cfg(feature = "engine")]
pub mod inventory;
#[cfg(feature = "engine")]
pub mod job;
#[cfg(feature = "engine")]
pub mod layout;
#[cfg(feature = "engine")]
pub mod lease;
#[cfg(feature = "engine")]
pub mod metrics;
#[cfg(feature = "engine")]
pub mod mig_parted;
#[cfg(feature = "engine")]
pub mod names;
#[cfg(feature = "engine")]
pub mod placement;
#[cfg(feature = "engine")]
pub mod profile;
#[cfg(feature = "engine")]
pub mod queue;
#[cfg(feature = "engine")]
pub mod report;
#[cfg(feature = "engine")]
pub mod request;
#[cfg(feature = "engine")]
pub mod runtime;
#[cfg(feature = "engine")]
pub mod shim;
#[cfg(feature = "engine")]
pub mod slurm;
#[cfg(feature = "engine")]
pub mod store;
