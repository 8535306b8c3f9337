//! A mig-parted config on the command line: the file, the config in it, and the GPUs that it is about.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::engine::{Failure, Target};
use crate::gpu::nvml::Nvml;
use crate::gpu::{Device, Gpu};
use crate::mig_parted::{self, Entry, LARGEST, Names, meant, names_of};

/// What names a config.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    /// A config file of mig-parted, version v1, YAML or JSON; - for standard input
    #[arg(value_name = "FILE", required_unless_present = "file")]
    path: Option<PathBuf>,
    /// The same, as mig-parted has it
    #[arg(short = 'f', long = "config-file", value_name = "FILE", conflicts_with = "path")]
    file: Option<PathBuf>,
    /// The config in it; may be left out where there is only one
    #[arg(id = "layout", short = 'c', long = "config", alias = "selected-config", value_name = "NAME")]
    name: Option<String>,
}

/// A config that was read.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) name: String,
    entries: Vec<Entry>,
    source: String,
}

impl Source {
    /// Reads the file and chooses the config.
    pub(super) fn read(&self) -> Result<Config> {
        let path = self.path.as_deref().or(self.file.as_deref()).unwrap_or(Path::new("-"));
        let source = if path == Path::new("-") { "standard input".into() } else { path.display().to_string() };
        let mut text = Vec::new();
        let most = LARGEST as u64 + 1; // one more, so that a longer file is seen to be one
        match path == Path::new("-") {
            true => std::io::stdin().lock().take(most).read_to_end(&mut text),
            false => std::fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut text)),
        }
        .with_context(|| format!("cannot read {source}"))?;
        let Ok(text) = String::from_utf8(text) else {
            bail!(Failure::BadRequest(format!("{source} is not UTF-8 text")));
        };
        let file = mig_parted::parse(&text).with_context(|| source.clone())?;
        let (name, entries) = file.select(self.name.as_deref()).with_context(|| source.clone())?;
        Ok(Config { name: name.to_owned(), entries: entries.to_vec(), source })
    }
}

/// A config with the GPUs of this machine.
#[derive(Debug)]
pub(super) struct Meant {
    /// What each GPU that it is about shall be like.
    pub(super) targets: Vec<Target>,
    /// NVML indices of managed GPUs that it is not about.
    pub(super) unnamed: Vec<u32>,
    /// NVML indices that it names and that are not here, or not managed.
    pub(super) absent: Vec<u32>,
}

impl Config {
    /// What the config means on these GPUs. One that is about none of them is refused.
    pub(super) fn on(&self, devices: &[Device], mode_only: bool) -> Result<Meant> {
        let found = meant(&self.entries, devices);
        let target = |(n, entry): &(usize, &Entry)| {
            let names = Some(entry.mig_devices.clone()).filter(|_| !mode_only);
            Some(Target { gpu: devices.get(*n)?.uuid.clone(), mig: entry.mig_enabled, names })
        };
        let targets: Vec<Target> = found.of.iter().filter_map(target).collect();
        if targets.is_empty() {
            let id = |device: &Device| format!("{} is 0x{:08X}", device.label(), device.pci_device_id);
            let here: Vec<String> = devices.iter().map(id).collect();
            bail!(Failure::BadRequest(format!(
                "{}: config {} is about no GPU of this machine, by its devices and device-filter: {}",
                self.source,
                self.name,
                here.join(", ")
            )));
        }
        let named = |device: &&Device| targets.iter().any(|target| target.gpu == device.uuid);
        let unnamed = devices.iter().filter(|device| !named(device)).map(|device| device.index).collect();
        Ok(Meant { targets, unnamed, absent: found.absent })
    }
}

/// The MIG devices of a GPU. A user without root is shown no GPU instances, but the devices themselves.
pub(super) fn present(nvml: &Nvml, device: &Device) -> Result<Names> {
    if !device.is_closed() {
        return Ok(names_of(device, &device.instances));
    }
    let mut names = Names::new();
    for device in nvml.mig_devices(&device.uuid)? {
        *names.entry(device.profile).or_default() += 1;
    }
    Ok(names)
}

/// What a person is told of GPUs that a config says nothing of, or that are not there.
pub(super) fn notes(config: &str, unnamed: &[u32], absent: &[u32]) -> String {
    let list = |indices: &[u32]| indices.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let mut out = String::new();
    if !unnamed.is_empty() {
        out += &format!("GPU {}: {config} says nothing of it\n", list(unnamed));
    }
    if !absent.is_empty() {
        out += &format!("GPU {}: named by {config}, but not here or not managed\n", list(absent));
    }
    out
}
