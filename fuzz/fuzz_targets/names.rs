#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mig_hook_fuzz::names::check(data));
