//! A simulated `libnvidia-ml.so.1`: the C ABI of NVML over a machine that consists of a few small files, with
//! the rules by which the driver cuts GPUs into MIG instances. See `README.md`.

#![deny(unsafe_code)]

mod abi;
pub mod board;
pub mod branch;
pub mod calls;
pub mod code;
pub mod describe;
pub mod driver;
pub mod elf;
pub mod fault;
mod gpm;
pub mod hide;
mod idle;
pub mod layout;
pub mod ldcache;
pub mod load;
mod optional;
pub mod report;
pub mod rules;
mod session;
pub mod state;
pub mod store;
mod stubs;
pub mod tree;
pub mod window;
