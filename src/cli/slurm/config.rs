//! `migctl slurm config`: what Slurm's files have to say, for this node or for several.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Deserialize;

use crate::cdi_file;
use crate::cli::configure;
use crate::config::Settings;
use crate::engine::managed;
use crate::gpu::Gpu;
use crate::gpu::nvml::Nvml;
use crate::host;
use crate::report::{Exit, Misused, Unusable};
use crate::slurm::conf::Conf;
use crate::slurm::counts::{self, Board, Cluster, Container, Node};

/// Where `make install` puts the scripts that Slurm starts, seen from the directory above migctl's own.
const SCRIPTS: &str = "libexec/mig-hook/slurm";
/// Where slurm.conf is, unless `SLURM_CONF` says otherwise.
const SLURM_CONF: &str = "/etc/slurm/slurm.conf";

/// Arguments of `migctl slurm config`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Facts of another node of the cluster, as --json printed them there; may be given again
    #[arg(long = "node", value_name = "FILE")]
    nodes: Vec<PathBuf>,
    /// Slurm's name of this node [default: the host's name up to the first dot]
    #[arg(long, value_name = "NODE")]
    name: Option<String>,
    /// Slurm's name of the cluster [default: ClusterName of slurm.conf]
    #[arg(long, value_name = "CLUSTER")]
    cluster: Option<String>,
    /// The slurm.conf of this cluster [default: $SLURM_CONF, else /etc/slurm/slurm.conf]
    #[arg(long, value_name = "FILE")]
    slurm_conf: Option<PathBuf>,
    /// Only this one
    #[arg(long, value_name = "NAME", conflicts_with = "dir")]
    file: Option<File>,
    /// Write them as files: mig-hook.conf for slurm.conf to include, the others by their names
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum File {
    #[value(name = "slurm.conf")]
    SlurmConf,
    #[value(name = "gres.conf")]
    GresConf,
    #[value(name = "oci.conf")]
    OciConf,
    #[value(name = "job_submit.lua")]
    JobSubmit,
    #[value(name = "cli_filter.lua")]
    CliFilter,
}

impl File {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// slurm.conf itself is the admin's.
    fn path(self, dir: &Path) -> PathBuf {
        dir.join(if self == File::SlurmConf { "mig-hook.conf".to_owned() } else { self.name() })
    }
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let conf = read(args.slurm_conf.as_deref())?;
    let node = this_node(settings, args, &conf)?;
    if json {
        crate::cli::print(&node, true, |_| String::new())?;
        return Ok(Exit::Ok);
    }
    let mut nodes = vec![node];
    for file in &args.nodes {
        add(&mut nodes, file)?;
    }
    let chosen = |file: &File| args.file.is_none_or(|only| only == *file);
    let files: Vec<File> = File::value_variants().iter().copied().filter(chosen).collect();
    let texts: Vec<(File, String)> =
        files.into_iter().map(|file| Ok((file, text(file, &nodes, &conf, settings)?))).collect::<Result<_>>()?;
    match &args.dir {
        Some(dir) => write_all(dir, &texts)?,
        None => {
            let titled = |(file, text): (File, String)| match args.file {
                Some(_) => text,
                None => format!("==> {} <==\n{text}", file.name()),
            };
            let texts: Vec<String> = texts.into_iter().map(titled).collect();
            crate::cli::write(texts.join("\n").as_bytes())?;
        }
    }
    Ok(Exit::Ok)
}

/// slurm.conf with what it includes, less what we have written; nothing where this machine has none: a node may get it from
/// the controller.
fn read(file: Option<&Path>) -> Result<Conf> {
    let named = file.map(Path::to_owned).or_else(|| std::env::var_os("SLURM_CONF").map(PathBuf::from));
    let path = named.as_deref().unwrap_or(Path::new(SLURM_CONF));
    let text_of = |path: &Path| {
        let text = fs::read_to_string(path).ok()?;
        Some(if counts::is_ours(&text) { String::new() } else { text })
    };
    match Conf::read(path, &text_of) {
        None if named.is_some() => bail!(Unusable(format!("cannot read {}", path.display()))),
        conf => Ok(conf.unwrap_or_default()),
    }
}

fn this_node(settings: &Settings, args: &Args, conf: &Conf) -> Result<Node> {
    let cluster = args.cluster.as_deref().or(conf.value("clustername")).ok_or_else(|| {
        Misused(
            "the cluster's name is in no slurm.conf here: pass --cluster NAME (scontrol show config tells ClusterName)"
                .into(),
        )
    })?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => host::name()?,
    };
    let devices = managed(settings, Nvml::at(&settings.nvml).devices()?)?;
    if devices.iter().any(|device| device.is_closed()) {
        bail!(Unusable("the driver shows placements to root only: run this as root".into()));
    }
    let gpus: Vec<Board> = devices.iter().filter_map(|d| Board::of(d, settings.profiles.as_deref())).collect();
    if gpus.is_empty() {
        bail!(Unusable("no GPU here has MIG on, and the driver tells profiles only then: migctl mode on GPU".into()));
    }
    // In lower case, as slurmctld and every job have it.
    Ok(Node { node: name, cluster: cluster.to_lowercase(), gpus })
}

/// Reads the facts of another node.
fn add(nodes: &mut Vec<Node>, file: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Facts {
        version: u32,
        #[serde(flatten)]
        node: Node,
    }
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let facts: Facts = serde_json::from_slice(&text).map_err(|error| {
        Unusable(format!("{} is not what migctl slurm config --json prints: {error}", file.display()))
    })?;
    if facts.version != crate::cli::JSON_VERSION {
        let (theirs, ours) = (facts.version, crate::cli::JSON_VERSION);
        bail!(Unusable(format!("{} has version {theirs}, this migctl reads {ours}", file.display())));
    }
    if let Some(known) = nodes.iter().find(|known| known.node == facts.node.node) {
        bail!(Unusable(format!("{} is of node {}, which is there already", file.display(), known.node)));
    }
    nodes.push(facts.node);
    Ok(())
}

fn text(file: File, nodes: &[Node], conf: &Conf, settings: &Settings) -> Result<String> {
    let cluster = Cluster::of(nodes);
    Ok(match file {
        File::SlurmConf => cluster.slurm_conf(conf, &scripts()),
        File::GresConf => cluster.gres_conf(),
        File::JobSubmit => cluster.job_submit_lua(),
        File::CliFilter => cluster.cli_filter_lua(),
        File::OciConf => {
            let shim = configure::shim()?;
            let container = Container {
                runtime: &configure::low_level(None, settings, &shim)?,
                shim: &shim,
                settings: settings.file.as_deref(),
                roots: &settings.state_dir.join("runtime"),
            };
            counts::oci_conf(&nodes[0].cluster, &container)
        }
    })
}

/// Where the scripts are that `make install` brought.
fn scripts() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let prefix = exe.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
    let here = prefix.join(SCRIPTS);
    if here.is_dir() { here } else { Path::new("/usr").join(SCRIPTS) }
}

/// Writes all files, or none where one of them is somebody else's.
fn write_all(dir: &Path, texts: &[(File, String)]) -> Result<()> {
    for (file, _) in texts {
        let path = file.path(dir);
        match fs::read_to_string(&path) {
            Ok(text) if !counts::is_ours(&text) => bail!(Unusable(format!(
                "{} is not of our making, and nothing was written; add to it what migctl slurm config --file {} prints",
                path.display(),
                file.name()
            ))),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
            _ => {}
        }
    }
    for (file, text) in texts {
        let path = file.path(dir);
        cdi_file::replace(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
