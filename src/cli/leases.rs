//! `migctl leases`: what is recorded of each holder. Reads the state and the engines' files, not the GPU.

use anyhow::Result;
use serde::Serialize;

use super::holder::Holder;
use crate::config::Settings;
use crate::engine::leases_in;
use crate::lease::Lease;
use crate::report::Exit;
use crate::store::Store;

/// The document of `migctl leases`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Leases {
    /// The records as they are on disk, one for each holder or kept slice.
    leases: Vec<Lease>,
    /// For each of them, in the same order, who it is.
    holders: Vec<Holder>,
}

pub(super) fn run(settings: &Settings, json: bool) -> Result<Exit> {
    let leases = Store::existing(&settings.state_dir)?.map_or(Ok(Vec::new()), |store| leases_in(&store))?;
    let holders = leases.iter().map(Holder::of).collect();
    super::print(&Leases { leases, holders }, json, text)?;
    Ok(Exit::Ok)
}

fn text(body: &Leases) -> String {
    if body.leases.is_empty() {
        return "no leases\n".into();
    }
    let titles = ["TOKEN", "STATE", "GPU", "SLICES", "HOLDER", "PID", "USER", "WAY", "SINCE"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(body.leases.iter().zip(&body.holders).map(|(lease, holder)| row(lease, holder)));
    super::table(&rows)
}

fn row(lease: &Lease, holder: &Holder) -> Vec<String> {
    let mut gpus: Vec<String> = lease.slices.iter().map(|s| s.gpu_index.to_string()).collect();
    gpus.dedup();
    let unknown = || "-".to_owned();
    vec![
        lease.token.clone(),
        super::word(lease.state),
        gpus.join(","),
        lease.profiles(),
        holder.holder.clone().unwrap_or_else(unknown),
        holder.pid.map_or_else(unknown, |pid| pid.to_string()),
        holder.user.clone().or(holder.uid.map(|uid| uid.to_string())).unwrap_or_else(unknown),
        super::word(lease.holder.way),
        holder.held_ms.map_or_else(unknown, super::duration),
    ]
}
