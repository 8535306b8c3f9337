//! kill -9 at every call of the driver and at every system call that changes something, on every way in and out, and state
//! that can't be written, or is not as it was: nothing is leaked or lost, nothing held twice, and no foreign slice touched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "crash/matrix.rs"]
mod matrix;
#[path = "crash/own.rs"]
mod own;
#[path = "crash/points.rs"]
mod points;
#[path = "crash/stage.rs"]
mod stage;
#[path = "crash/tries.rs"]
mod tries;
#[path = "crash/trouble.rs"]
mod trouble;
