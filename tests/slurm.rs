//! Real Slurm with our scripts, files and binaries: what is asked for, scheduled, got in every step, and given back at every
//! kind of end. A cluster a test. Run by scripts/test-slurm, which makes the namespaces and the user for it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "slurm/cluster.rs"]
mod cluster;
mod common;
#[path = "slurm/containers.rs"]
mod containers;
#[path = "slurm/documents.rs"]
mod documents;
#[path = "slurm/ends.rs"]
mod ends;
#[path = "slurm/submit.rs"]
mod submit;
