//! What monitoring wants to know, as text that both OpenMetrics 1.0 and Prometheus' text format 0.0.4 (node_exporter's
//! textfile collector) read. Pure.
//!
//! So there are gauges and counters only (0.0.4 has no info and no stateset), no timestamps (node_exporter drops a file
//! that has them), and in help texts neither quotes nor backslashes, which the two escape differently. `# UNIT` and `#
//! EOF` are comments in 0.0.4. What is left: OpenMetrics declares a counter without the `_total` of its samples, so
//! that node_exporter passes it on as untyped, which changes no query. Sources: the OpenMetrics 1.0 specification;
//! `expfmt/text_parse.go` of prometheus/common and `collector/textfile.go` of prometheus/node_exporter; tried with
//! node_exporter 1.5, promtool 2.42 and prometheus_client 0.26.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::gpu::{Device, MigMode, Placement, Reading, Utilisation};
use crate::inventory::Standing;
use crate::lease::{Lease, State};

/// Everything that is told.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Of mig-hook.
    pub version: &'a str,
    /// `None` where the driver could not be read.
    pub driver: Option<Driver<'a>>,
    /// `None` where the leases could not be read.
    pub leases: Option<Leases<'a>>,
}

/// The driver and its GPUs.
#[derive(Debug)]
pub struct Driver<'a> {
    /// As `580.82.07`.
    pub version: String,
    /// In the order of their indices.
    pub gpus: Vec<GpuFacts<'a>>,
}

/// The leases of this machine.
#[derive(Debug)]
pub struct Leases<'a> {
    /// All of them.
    pub all: &'a [Lease],
    /// How many gc would free, beside those that are on their way out already.
    pub stale: usize,
}

/// One GPU.
#[derive(Debug)]
pub struct GpuFacts<'a> {
    /// As the driver reports it.
    pub device: &'a Device,
    /// Whether it is closed to new holders.
    pub cordoned: bool,
    /// What it tells of itself.
    pub reading: Reading,
    /// Free placements of each profile, in the order of the device's.
    pub free: Vec<u32>,
    /// Its slices: one for each compute instance, or for a GPU instance without any.
    pub slices: Vec<SliceFacts>,
    /// Slices that leases have and the driver does not.
    pub lost: usize,
    /// How busy GPU instances were, by id; none where the driver can't tell.
    pub utilisation: Vec<(u32, Utilisation)>,
}

/// One slice.
#[derive(Debug)]
pub struct SliceFacts {
    /// GPU instance.
    pub gi: u32,
    /// Compute instance.
    pub ci: Option<u32>,
    /// Its profile, `1c.3g.40gb` for a part of a GPU instance.
    pub profile: String,
    /// Of the GPU instance.
    pub placement: Placement,
    /// `MIG-…`.
    pub uuid: Option<String>,
    /// How it stands.
    pub standing: Standing,
    /// Multiprocessors.
    pub sms: u32,
    /// What it tells of itself.
    pub reading: Reading,
    /// Who has it.
    pub tenant: Option<Tenant>,
}

/// Who has a slice, as far as known.
#[derive(Debug, Default)]
pub struct Tenant {
    /// Milliseconds since 1970.
    pub since_ms: u64,
    /// `docker`, `podman`, …
    pub engine: Option<String>,
    /// What its engine calls the container, else its id.
    pub container: Option<String>,
    /// Its id.
    pub container_id: Option<String>,
    /// Its pod.
    pub pod: Option<String>,
    /// Its image.
    pub image: Option<String>,
    /// Key of the job.
    pub job: Option<String>,
    /// Who started it.
    pub user: Option<String>,
}

const STATES: [(State, &str); 6] = [
    (State::Pending, "pending"),
    (State::Active, "active"),
    (State::Static, "static"),
    (State::Idle, "idle"),
    (State::Releasing, "releasing"),
    (State::Quarantined, "quarantined"),
];
const STANDINGS: [(Standing, &str); 8] = [
    (Standing::Held, "held"),
    (Standing::Static, "static"),
    (Standing::Idle, "idle"),
    (Standing::Reserved, "reserved"),
    (Standing::Releasing, "releasing"),
    (Standing::Quarantined, "quarantined"),
    (Standing::Foreign, "foreign"),
    (Standing::Lost, "lost"),
];

type Sample = (Vec<(&'static str, String)>, f64);

/// The whole text.
pub fn exposition(facts: &Facts<'_>) -> String {
    let mut text = Text::default();
    let up = facts.driver.is_some() && facts.leases.is_some();
    text.gauge("mig_up", "1 when the driver and the leases could be read, else 0.", [(vec![], f64::from(up))]);
    let version = |version: &str| [(vec![("version", version.to_owned())], 1.0)];
    text.gauge("mig_build_info", "The version of mig-hook.", version(facts.version));
    if let Some(driver) = &facts.driver {
        text.gauge("mig_driver_info", "The version of the NVIDIA driver.", version(&driver.version));
        gpus(&mut text, &driver.gpus);
        slices(&mut text, &driver.gpus);
    }
    if let Some(known) = &facts.leases {
        leases(&mut text, known);
    }
    text.end()
}

fn gpus(text: &mut Text, gpus: &[GpuFacts<'_>]) {
    let each = |value: fn(&GpuFacts<'_>) -> Option<f64>| {
        gpus.iter().filter_map(move |gpu| Some((vec![("gpu", gpu.device.index.to_string())], value(gpu)?)))
    };
    let info = |gpu: &GpuFacts<'_>| {
        let device = gpu.device;
        let labels = vec![
            ("gpu", device.index.to_string()),
            ("uuid", device.uuid.clone()),
            ("name", device.name.clone()),
            ("pci_bus_id", device.pci_bus_id.clone()),
            ("minor", device.minor.to_string()),
        ];
        (labels, 1.0)
    };
    text.gauge("mig_gpu_info", "A GPU. The label gpu is its NVML index, here and everywhere.", gpus.iter().map(info));
    text.gauge(
        "mig_gpu_mig_enabled",
        "Whether MIG mode is on. Only of GPUs that have MIG.",
        each(|gpu| match gpu.device.mig {
            MigMode::Unsupported => None,
            mode => Some(f64::from(matches!(mode, MigMode::On | MigMode::DisablePending))),
        }),
    );
    text.gauge(
        "mig_gpu_mig_pending",
        "Whether the next reset of the GPU changes its MIG mode. Only of GPUs that have MIG.",
        each(|gpu| match gpu.device.mig {
            MigMode::Unsupported => None,
            mode => Some(f64::from(matches!(mode, MigMode::EnablePending | MigMode::DisablePending))),
        }),
    );
    let cordoned = each(|gpu| Some(f64::from(gpu.cordoned)));
    text.gauge("mig_gpu_cordoned", "Whether the GPU is closed to new holders.", cordoned);
    let total = each(|gpu| gpu.reading.memory_total_mib.map(bytes));
    text.gauge_of("mig_gpu_memory_bytes", "bytes", "Memory of the whole GPU.", total);
    let used = each(|gpu| gpu.reading.memory_used_mib.map(bytes));
    text.gauge_of("mig_gpu_memory_used_bytes", "bytes", "Memory of the whole GPU that is in use.", used);
    text.counter(
        "mig_gpu_ecc_errors",
        "Uncorrected ECC errors since the driver was loaded. Only of GPUs with MIG off: else the slices count.",
        each(|gpu| gpu.reading.ecc_errors.map(|errors| errors as f64)),
    );
    let divided = each(|gpu| memory_slices(gpu.device).map(f64::from));
    text.gauge("mig_gpu_memory_slices", "Memory slices that the GPU is divided into for MIG.", divided);
    let by_state = |value: fn(&GpuFacts<'_>, Standing) -> Option<f64>| {
        let states =
            move |gpu| STANDINGS.iter().filter_map(move |(standing, word)| Some((gpu, word, value(gpu, *standing)?)));
        gpus.iter().flat_map(states).map(|(gpu, word, value)| {
            (vec![("gpu", gpu.device.index.to_string()), ("state", (*word).to_owned())], value)
        })
    };
    text.gauge(
        "mig_gpu_memory_slices_occupied",
        "Memory slices that GPU instances take, by how these stand.",
        by_state(|gpu, standing| {
            let closed = memory_slices(gpu.device).is_none() || standing == Standing::Lost;
            (!closed).then(|| occupied(gpu, standing).into())
        }),
    );
    text.gauge(
        "mig_gpu_slices",
        "Slices by how they stand. A lost one is in a lease, and the driver does not have it.",
        by_state(|gpu, standing| {
            memory_slices(gpu.device)?;
            Some(match standing {
                Standing::Lost => gpu.lost as f64,
                _ => gpu.slices.iter().filter(|slice| slice.standing == standing).count() as f64,
            })
        }),
    );
    let profiles = |value: fn(&GpuFacts<'_>, usize) -> f64| {
        gpus.iter().flat_map(move |gpu| {
            gpu.device.profiles.iter().enumerate().map(move |(n, profile)| {
                (vec![("gpu", gpu.device.index.to_string()), ("profile", profile.name.clone())], value(gpu, n))
            })
        })
    };
    text.gauge(
        "mig_profile_free",
        "Free placements of a profile, which may overlap. 0 while the GPU is cordoned.",
        profiles(|gpu, n| if gpu.cordoned { 0.0 } else { gpu.free.get(n).copied().unwrap_or(0).into() }),
    );
    text.gauge(
        "mig_profile_max",
        "How many slices of a profile an empty GPU has room for.",
        profiles(|gpu, n| gpu.device.profiles[n].max_instances.into()),
    );
}

fn slices(text: &mut Text, gpus: &[GpuFacts<'_>]) {
    let labels = |gpu: &GpuFacts<'_>, slice: &SliceFacts| {
        let ci = slice.ci.map(|ci| ci.to_string()).unwrap_or_default();
        vec![("gpu", gpu.device.index.to_string()), ("gi", slice.gi.to_string()), ("ci", ci)]
    };
    let each = |value: fn(&SliceFacts) -> Option<f64>| {
        gpus.iter()
            .flat_map(move |gpu| gpu.slices.iter().filter_map(move |slice| Some((labels(gpu, slice), value(slice)?))))
    };
    let info = |gpu: &GpuFacts<'_>, slice: &SliceFacts| {
        let none = Tenant::default();
        let tenant = slice.tenant.as_ref().unwrap_or(&none);
        let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
        let mut labels = labels(gpu, slice);
        labels.extend([
            ("profile", slice.profile.clone()),
            ("placement", slice.placement.to_string()),
            ("uuid", or_empty(&slice.uuid)),
            ("state", standing_word(slice.standing).to_owned()),
            ("engine", or_empty(&tenant.engine)),
            ("container", or_empty(&tenant.container)),
            ("container_id", or_empty(&tenant.container_id)),
            ("pod", or_empty(&tenant.pod)),
            ("image", or_empty(&tenant.image)),
            ("job", or_empty(&tenant.job)),
            ("user", or_empty(&tenant.user)),
        ]);
        (labels, 1.0)
    };
    text.gauge(
        "mig_slice_info",
        "A slice, how it stands and who has it: the one place for names, to be joined on gpu, gi and ci.",
        gpus.iter().flat_map(|gpu| gpu.slices.iter().map(move |slice| info(gpu, slice))),
    );
    text.gauge_of(
        "mig_slice_held_since_timestamp_seconds",
        "seconds",
        "When the slice was given to who has it, in seconds since 1970.",
        each(|slice| slice.tenant.as_ref().map(|tenant| tenant.since_ms as f64 / 1000.0)),
    );
    text.gauge_of(
        "mig_slice_memory_bytes",
        "bytes",
        "Memory of the slice. Compute instances of one GPU instance share it.",
        each(|slice| slice.reading.memory_total_mib.map(bytes)),
    );
    text.gauge_of(
        "mig_slice_memory_used_bytes",
        "bytes",
        "Memory of the slice that is in use, by all compute instances of its GPU instance.",
        each(|slice| slice.reading.memory_used_mib.map(bytes)),
    );
    text.gauge("mig_slice_sms", "Multiprocessors of the slice.", each(|slice| Some(slice.sms.into())));
    text.counter(
        "mig_slice_ecc_errors",
        "Uncorrected ECC errors of the caches and registers of the slice since the driver was loaded.",
        each(|slice| slice.reading.ecc_errors.map(|errors| errors as f64)),
    );
    let busy = |value: fn(&Utilisation) -> Option<f64>| {
        gpus.iter().flat_map(move |gpu| {
            gpu.utilisation.iter().filter_map(move |(gi, utilisation)| {
                let labels = vec![("gpu", gpu.device.index.to_string()), ("gi", gi.to_string())];
                Some((labels, value(utilisation)? / 100.0))
            })
        })
    };
    text.gauge_of(
        "mig_instance_sm_utilization_ratio",
        "ratio",
        "Multiprocessors of a GPU instance that were busy while the metrics were read. From Hopper on.",
        busy(|utilisation| utilisation.sm),
    );
    text.gauge_of(
        "mig_instance_graphics_utilization_ratio",
        "ratio",
        "Time in which any work ran in a GPU instance while the metrics were read. From Hopper on.",
        busy(|utilisation| utilisation.graphics),
    );
    text.gauge_of(
        "mig_instance_dram_utilization_ratio",
        "ratio",
        "Memory bandwidth of a GPU instance that was used while the metrics were read. From Hopper on.",
        busy(|utilisation| utilisation.dram),
    );
}

fn leases(text: &mut Text, leases: &Leases<'_>) {
    let count = |state| leases.all.iter().filter(|lease| lease.state == state).count() as f64;
    let by_state = STATES.iter().map(|(state, word)| (vec![("state", (*word).to_owned())], count(*state)));
    text.gauge("mig_leases", "Leases by state.", by_state);
    text.gauge(
        "mig_leases_stale",
        "Leases of holders that have ended and were not noticed: migctl gc would free them.",
        [(vec![], leases.stale as f64)],
    );
    let since = leases.all.iter().filter(|lease| lease.state == State::Releasing).filter_map(|lease| lease.ended_ms);
    text.gauge_of(
        "mig_lease_releasing_since_timestamp_seconds",
        "seconds",
        "Since when the oldest lease waits for the driver to let go, in seconds since 1970. Only while one waits.",
        since.min().map(|ms| (vec![], ms as f64 / 1000.0)),
    );
}

/// Memory slices of a GPU; `None` where it can't be cut or the driver hides what is on it.
fn memory_slices(device: &Device) -> Option<u32> {
    device.profiles.iter().flat_map(|profile| &profile.placements).map(|at| at.start + at.size).max()
}

/// A GPU instance with several compute instances is counted once.
fn occupied(gpu: &GpuFacts<'_>, standing: Standing) -> u32 {
    let instances: BTreeSet<(u32, u32)> = gpu
        .slices
        .iter()
        .filter(|slice| slice.standing == standing)
        .map(|slice| (slice.gi, slice.placement.size))
        .collect();
    instances.iter().map(|(_, size)| size).sum()
}

fn standing_word(standing: Standing) -> &'static str {
    STANDINGS.iter().find(|(other, _)| *other == standing).map_or("", |(_, word)| word)
}

fn bytes(mib: u64) -> f64 {
    (mib << 20) as f64
}

/// Text that grows by a family at a time. A family without samples is left out.
#[derive(Debug, Default)]
struct Text(String);

impl Text {
    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        self.family(name, "gauge", "", help, samples);
    }

    fn gauge_of(&mut self, name: &str, unit: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        self.family(name, "gauge", unit, help, samples);
    }

    fn counter(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        self.family(name, "counter", "", help, samples);
    }

    fn family(&mut self, name: &str, kind: &str, unit: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        let suffix = if kind == "counter" { "_total" } else { "" };
        let mut seen = BTreeSet::new();
        for (labels, value) in samples {
            if seen.is_empty() {
                let _ = writeln!(self.0, "# TYPE {name} {kind}");
                if !unit.is_empty() {
                    let _ = writeln!(self.0, "# UNIT {name} {unit}");
                }
                let _ = writeln!(self.0, "# HELP {name} {help}");
            }
            let labels: Vec<String> =
                labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            // Two samples of the same labels would make a reader refuse the whole text.
            if seen.insert(labels.clone()) {
                let _ = writeln!(self.0, "{name}{suffix}{labels} {value}");
            }
        }
    }

    fn end(mut self) -> String {
        self.0 += "# EOF\n";
        self.0
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_said_and_the_rest_is_told() {
        let text = exposition(&Facts { version: "1", driver: None, leases: None });
        let expected = "# TYPE mig_up gauge\n# HELP mig_up 1 when the driver and the leases could be read, else 0.\nmig_up 0\n\
                        # TYPE mig_build_info gauge\n# HELP mig_build_info The version of mig-hook.\n\
                        mig_build_info{version=\"1\"} 1\n# EOF\n";
        assert_eq!(text, expected);
        let leases = Some(Leases { all: &[], stale: 0 });
        let text = exposition(&Facts { version: "1", driver: None, leases });
        assert!(text.contains("mig_up 0\n") && text.contains("mig_leases_stale 0\n"), "{text}");
    }

    #[test]
    fn hostile_names_stay_in_their_quotes() {
        let mut text = Text::default();
        let name = "a\\b\"} 1\nmig_up 0\r\u{e9}";
        text.gauge("x", "h", [(vec![("l", name.to_owned())], 1.5)]);
        assert_eq!(text.end(), "# TYPE x gauge\n# HELP x h\nx{l=\"a\\\\b\\\"} 1\\nmig_up 0\r\u{e9}\"} 1.5\n# EOF\n");
    }

    #[test]
    fn the_same_labels_come_once_and_counters_say_total() {
        let mut text = Text::default();
        text.counter("x", "h", [(vec![], 1.0), (vec![], 2.0)]);
        text.gauge("y", "h", []);
        assert_eq!(text.end(), "# TYPE x counter\n# HELP x h\nx_total 1\n# EOF\n");
    }
}
