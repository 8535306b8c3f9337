//! `migctl metrics`: what monitoring wants to know, for node_exporter's textfile collector.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};

use super::holder::Holder;
use super::list::reading;
use crate::cdi_file;
use crate::config::Settings;
use crate::engine::{Cordons, Engine, Failure};
use crate::gpu::nvml::Nvml;
use crate::gpu::{ComputeInstance, Device, Gpu, GpuError, Sample, Utilisation};
use crate::inventory::{self, Occupied, inventory};
use crate::lease::{Lease, State};
use crate::metrics::{Driver, Facts, GpuFacts, Leases, SliceFacts, Tenant, exposition};
use crate::profile;
use crate::report::{Exit, Misused};
use crate::store::Store;

/// Time over which it is measured how busy GPU instances are. NVML wants 100 ms or more (nvmlGpmSampleGet).
const MEASURED: Duration = Duration::from_millis(200);

/// Arguments of `migctl metrics`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write them into this file, in one step, instead of to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What is recorded on this machine.
#[derive(Default)]
struct Recorded {
    leases: Vec<Lease>,
    stale: usize,
    cordons: Cordons,
}

/// Where driver or leases can't be read, `mig_up` is 0, and the exit code says why. What has been read is told all the
/// same.
pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    if json {
        bail!(Misused("metrics prints OpenMetrics text and has no JSON document; leave --json out".into()));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(Failure::NotAllowed("leases and slices are shown to root only: run migctl metrics as root".into()));
    }
    let nvml = Nvml::at(&settings.nvml);
    let recorded = recorded(settings, &nvml);
    let devices = nvml.devices().and_then(|devices| Ok((nvml.driver_version()?, devices)));
    let none = Recorded::default();
    let known = recorded.as_ref().unwrap_or(&none);
    let driver = match &devices {
        // Without the leases every slice would seem foreign.
        Ok((version, devices)) if recorded.is_ok() => Some(driver(&nvml, version, devices, known)),
        _ => None,
    };
    let leases = recorded.is_ok().then_some(Leases { all: &known.leases, stale: known.stale });
    let text = exposition(&Facts { version: env!("CARGO_PKG_VERSION"), driver, leases });
    match &args.output {
        Some(path) => cdi_file::replace(path, &text).with_context(|| format!("cannot write {}", path.display()))?,
        None => super::write(text.as_bytes())?,
    }
    match (recorded, devices) {
        (Err(error), _) => Err(error),
        (_, Err(error)) => Err(Error::new(Failure::Gpu(error))),
        (Ok(_), Ok(_)) => Ok(Exit::Ok),
    }
}

fn recorded(settings: &Settings, nvml: &Nvml) -> Result<Recorded> {
    let Some(store) = Store::existing(&settings.state_dir)? else { return Ok(Recorded::default()) };
    let engine = Engine::open(settings, nvml)?;
    let leases = engine.leases()?;
    // A Pending one may be another process's work of this moment.
    let settled = leases.iter().filter(|lease| matches!(lease.state, State::Active | State::Quarantined));
    let stale = settled.filter(|lease| !engine.is_alive(lease)).count();
    Ok(Recorded { stale, leases, cordons: store.cordons()? })
}

fn driver<'a>(nvml: &Nvml, version: &str, devices: &'a [Device], known: &'a Recorded) -> Driver<'a> {
    let busy = utilisation(nvml, devices);
    let gpu = |gpu| facts(nvml, gpu, known, &busy);
    Driver { version: version.to_owned(), gpus: inventory(devices, &known.leases).into_iter().map(gpu).collect() }
}

fn facts<'a>(
    nvml: &Nvml,
    gpu: inventory::Gpu<'a>,
    known: &Recorded,
    busy: &[(String, u32, Utilisation)],
) -> GpuFacts<'a> {
    let device = gpu.device;
    GpuFacts {
        cordoned: known.cordons.contains_key(&device.uuid),
        reading: reading(nvml, &device.uuid),
        free: device.profiles.iter().map(|profile| inventory::free(device, &known.leases, profile)).collect(),
        slices: gpu.slices.iter().flat_map(|slice| slices(nvml, slice)).collect(),
        lost: gpu.lost.len(),
        utilisation: busy.iter().filter(|(gpu, ..)| *gpu == device.uuid).map(|(_, gi, busy)| (*gi, *busy)).collect(),
        device,
    }
}

/// One for each compute instance, or one without.
fn slices(nvml: &Nvml, slice: &Occupied<'_>) -> Vec<SliceFacts> {
    let one = |compute: Option<&ComputeInstance>| {
        let name = slice.profile.map(|p| compute.map_or_else(|| p.name.clone(), |c| profile::device_name(p, c)));
        let reading = compute.map(|compute| reading(nvml, &compute.uuid)).unwrap_or_default();
        SliceFacts {
            gi: slice.instance.id,
            ci: compute.map(|compute| compute.id),
            profile: name.unwrap_or_else(|| format!("profile {}", slice.instance.profile.0)),
            placement: slice.instance.placement,
            uuid: compute.map(|compute| compute.uuid.clone()),
            standing: slice.standing(),
            sms: reading.sms.or(compute.map(|compute| compute.sms)).unwrap_or(0),
            reading,
            tenant: slice.lease.map(tenant),
        }
    };
    match slice.instance.compute.as_slice() {
        [] => vec![one(None)],
        several => several.iter().map(|compute| one(Some(compute))).collect(),
    }
}

fn tenant(lease: &Lease) -> Tenant {
    let holder = Holder::of(lease);
    Tenant {
        since_ms: lease.created_ms,
        engine: holder.engine,
        container: holder.name.or_else(|| holder.container.clone()),
        container_id: holder.container,
        pod: holder.pod,
        image: holder.image,
        job: holder.job,
        user: holder.user.or_else(|| holder.uid.map(|uid| uid.to_string())),
    }
}

/// How busy each GPU instance is, by GPU and id; none where the driver can't tell.
fn utilisation(nvml: &Nvml, devices: &[Device]) -> Vec<(String, u32, Utilisation)> {
    let sample = |gpu: &str, gi: u32| told(nvml.sample(gpu, gi)).flatten();
    let mut before: Vec<(&str, u32, Sample<'_>)> = Vec::new();
    for device in devices {
        let of = |gi: u32| Some((device.uuid.as_str(), gi, sample(&device.uuid, gi)?));
        before.extend(device.instances.iter().filter_map(|instance| of(instance.id)));
    }
    if before.is_empty() {
        return Vec::new();
    }
    std::thread::sleep(MEASURED);
    let busy = |(gpu, gi, before): &(&str, u32, Sample<'_>)| {
        let after = sample(gpu, *gi)?;
        Some(((*gpu).to_owned(), *gi, told(nvml.utilisation(before, &after))?))
    };
    before.iter().filter_map(busy).collect()
}

/// An instance may go between two looks, and a GPU may refuse its counters: then they are left out.
fn told<T>(read: Result<T, GpuError>) -> Option<T> {
    read.inspect_err(|error| tracing::debug!("how busy an instance is can't be told: {error}")).ok()
}
