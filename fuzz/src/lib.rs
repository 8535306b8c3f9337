//! What is fuzzed: one function a target, which takes any bytes and holds what the product makes of them against a rule.
//! `fuzz_targets/` hands it what libFuzzer thinks up; tests/corpus.rs of the product hands it every file of `corpus/`.

pub mod cdi;
pub mod config;
pub mod elf;
pub mod layout;
pub mod ldcache;
pub mod lease;
pub mod names;
pub mod plan;
pub mod proc;
pub mod request;
pub mod runtimes;
pub mod settings;
pub mod state;
