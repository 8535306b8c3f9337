//! `migctl leases`: what is recorded of each holder. Reads the state only, not the GPU.

use anyhow::Result;
use serde::Serialize;

use crate::config::Settings;
use crate::engine::leases_in;
use crate::host;
use crate::lease::{Lease, short};
use crate::report::Exit;
use crate::store::Store;

/// The document of `migctl leases`: the records as they are on disk.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Leases {
    /// One for each holder.
    leases: Vec<Lease>,
}

pub(super) fn run(settings: &Settings, json: bool) -> Result<Exit> {
    let leases = match Store::existing(&settings.state_dir) {
        Some(store) => leases_in(&store)?,
        None => vec![],
    };
    super::print(&Leases { leases }, json, text)?;
    Ok(Exit::Ok)
}

fn text(body: &Leases) -> String {
    if body.leases.is_empty() {
        return "no leases\n".into();
    }
    let titles = ["TOKEN", "STATE", "CONTAINER", "SLICES", "GPU", "SINCE"].map(str::to_owned).to_vec();
    let row = |lease: &Lease| {
        let gpus: Vec<String> = lease.slices.iter().map(|s| s.gpu_index.to_string()).collect();
        vec![
            lease.token.clone(),
            super::word(lease.state),
            lease.holder.container.as_deref().map_or("-", short).to_owned(),
            lease.profiles(),
            gpus.join(","),
            super::duration(host::boot_ms().saturating_sub(lease.created_boot_ms)),
        ]
    };
    let mut rows = vec![titles];
    rows.extend(body.leases.iter().map(row));
    super::table(&rows)
}
