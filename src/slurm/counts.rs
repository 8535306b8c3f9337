//! Slurm's share of it: what nodes have, as counts that Slurm can schedule by, and the texts that make it do so. Pure.
//!
//! Slurm cuts no slices, it counts. A node has compute slices (`migc`) and memory slices (`migm`), a job takes what its
//! slices cover of both, and Slurm starts what fits. Two GPUs have 14 compute slices, though, and room for two of `4g`, not
//! three; `1g.10gb+me` exists once on a GPU; and not every node offers every profile. A profile that the two counts would
//! let in too often is therefore counted by itself as well (`mig4g40gb`): the node has as many as fit, and other slices
//! take those whose place they fill. So no job waits for room that is there. The other way round it may still be that
//! the counts fit and the places don't: then the node's prolog waits, or refuses that job.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::conf::Conf;
use crate::gpu::{Device, Placement};

/// Compute slices of a node, as generic resource.
const COMPUTE: &str = "migc";
/// Memory slices of a node, as generic resource.
const MEMORY: &str = "migm";
/// What users ask for: no node has any, job_submit.lua makes counts of it.
pub const ASKED: &str = "mig";

/// What a node has: the document of `migctl slurm config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Node {
    /// Slurm's name of it.
    pub node: String,
    /// Slurm's name of the cluster, in lower case as its jobs have it.
    pub cluster: String,
    /// GPUs with MIG on that mig-hook manages.
    pub gpus: Vec<Board>,
}

/// A GPU of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Board {
    /// NVML index.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Compute slices that it has.
    pub compute_slices: u32,
    /// Memory slices that it has.
    pub memory_slices: u32,
    /// What may be asked for.
    pub profiles: Vec<Offer>,
}

/// A profile that a GPU offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Offer {
    /// As jobs ask for it.
    pub name: String,
    /// Compute slices that it takes.
    pub compute_slices: u32,
    /// Memory slices that it takes.
    pub memory_slices: u32,
    /// How many there may be on an empty GPU.
    pub total: u32,
    /// Where it may be, in memory slices.
    pub placements: Vec<Placement>,
}

impl Node {
    /// What it has of everything that it may be counted by, by name: also of profiles that only other nodes' GPUs make count
    /// by themselves.
    pub fn counts(&self) -> BTreeMap<String, u32> {
        let profiles = self.gpus.iter().flat_map(|board| &board.profiles);
        let rooms = profiles.map(|offer| (kind(&offer.name), room(self, &offer.name)));
        rooms.chain([COMPUTE, MEMORY].map(|kind| (kind.to_owned(), total(self, kind)))).collect()
    }
}

impl Board {
    /// A GPU and what of its profiles may be asked for; `None` where the driver tells no profiles (MIG is off) or no
    /// placements (we are not root).
    pub fn of(device: &Device, allowed: Option<&[String]>) -> Option<Board> {
        let offers: Vec<Offer> = device
            .profiles
            .iter()
            .map(|profile| Offer {
                name: profile.name.clone(),
                compute_slices: profile.slices,
                memory_slices: profile.placements.iter().map(|at| at.size).max().unwrap_or(0),
                total: profile.max_instances,
                placements: profile.placements.clone(),
            })
            .filter(|offer| !offer.placements.is_empty())
            .collect();
        let ends = offers.iter().flat_map(|offer| &offer.placements).map(|at| at.start + at.size);
        Some(Board {
            index: device.index,
            uuid: device.uuid.clone(),
            name: device.name.clone(),
            compute_slices: offers.iter().map(|offer| offer.compute_slices).max()?,
            memory_slices: ends.max()?,
            profiles: offers.into_iter().filter(|o| allowed.is_none_or(|names| names.contains(&o.name))).collect(),
        })
    }

    fn offer(&self, profile: &str) -> Option<&Offer> {
        self.profiles.iter().find(|offer| offer.name == profile)
    }
}

impl Offer {
    /// How many of the places for a profile a slice of this one fills entirely, at its best place: 2 of the 3 of `2g` for a
    /// `4g`. What it fills in part does not count: another slice may have the rest of it.
    fn share_of(&self, wanted: &Offer) -> u32 {
        if wanted.name == self.name {
            return 1;
        }
        let places = wanted.side_by_side();
        let filled = |at: &Placement| places.iter().filter(|place| *place & !at.mask() == 0).count() as u32;
        let spare = (places.len() as u32).saturating_sub(wanted.total);
        self.placements.iter().map(filled).min().unwrap_or(0).saturating_sub(spare)
    }

    /// Places that do not overlap, as many as there are, as bit masks.
    fn side_by_side(&self) -> Vec<u32> {
        let mut all: Vec<&Placement> = self.placements.iter().collect();
        all.sort_by_key(|at| at.start + at.size);
        let mut taken = 0;
        let mut places = Vec::new();
        for mask in all.into_iter().map(|at| at.mask()) {
            if mask & taken == 0 {
                taken |= mask;
                places.push(mask);
            }
        }
        places
    }
}

/// A configuration for some nodes.
#[derive(Debug)]
pub struct Cluster<'a> {
    nodes: &'a [Node],
    /// Generic resources that are counted, in the order in which they are written.
    kinds: Vec<String>,
    /// What a slice takes of each, by profile; small ones first.
    costs: Vec<(String, BTreeMap<String, u32>)>,
    /// Profiles that take different shares of different GPUs: the greatest is counted.
    uneven: Vec<String>,
}

impl<'a> Cluster<'a> {
    /// Nodes that one controller has.
    pub fn of(nodes: &'a [Node]) -> Cluster<'a> {
        let boards = || nodes.iter().flat_map(|node| &node.gpus);
        let mut shares: BTreeMap<&str, BTreeSet<(u32, u32)>> = BTreeMap::new();
        for offer in boards().flat_map(|board| &board.profiles) {
            shares.entry(&offer.name).or_default().insert((offer.compute_slices, offer.memory_slices));
        }
        let most = |shares: &BTreeSet<(u32, u32)>| {
            let of = |part: fn(&(u32, u32)) -> u32| shares.iter().map(part).max().unwrap_or(0);
            (of(|share| share.0), of(|share| share.1))
        };
        let mut profiles: Vec<(u32, u32, &str)> =
            shares.iter().map(|(name, s)| (most(s).0, most(s).1, *name)).collect();
        profiles.sort_unstable();

        let limited = profiles.iter().filter(|(compute, memory, name)| {
            nodes.iter().any(|node| {
                let by_compute = total(node, COMPUTE) / (*compute).max(1);
                let by_memory = total(node, MEMORY) / (*memory).max(1);
                by_compute.min(by_memory) > room(node, name)
            })
        });
        let limited: Vec<&str> = limited.map(|(_, _, name)| *name).collect();
        let cost = |(compute, memory, name): &(u32, u32, &str)| {
            let mut cost = BTreeMap::from([(COMPUTE.to_owned(), *compute), (MEMORY.to_owned(), *memory)]);
            for other in &limited {
                let taken = boards().filter_map(|board| Some(board.offer(name)?.share_of(board.offer(other)?)));
                cost.insert(kind(other), taken.max().unwrap_or(0));
            }
            cost.retain(|_, number| *number > 0);
            ((*name).to_owned(), cost)
        };
        Cluster {
            nodes,
            kinds: [COMPUTE, MEMORY].map(str::to_owned).into_iter().chain(limited.iter().map(|p| kind(p))).collect(),
            costs: profiles.iter().map(cost).collect(),
            uneven: shares.iter().filter(|(_, shares)| shares.len() > 1).map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    /// The generic resources that are counted; none is called [`ASKED`].
    pub fn kinds(&self) -> &[String] {
        &self.kinds
    }

    /// What a node has of each kind: `migc:14,migm:16`.
    fn gres(&self, node: &Node) -> String {
        let counts = self.counts(node).map(|(kind, number)| format!("{kind}:{number}"));
        counts.collect::<Vec<_>>().join(",")
    }

    fn counts<'b>(&'b self, node: &'b Node) -> impl Iterator<Item = (&'b str, u32)> {
        let of = |kind: &'b String| match kind.as_str() {
            COMPUTE | MEMORY => (kind.as_str(), total(node, kind)),
            own => (own, self.costs.iter().find(|(name, _)| self::kind(name) == own).map_or(0, |p| room(node, &p.0))),
        };
        self.kinds.iter().map(of).filter(|(_, number)| *number > 0)
    }

    /// Lines for slurm.conf, to be included there, as far as it does not say them already.
    pub fn slurm_conf(&self, conf: &Conf, scripts: &Path) -> String {
        let mut text =
            head("#", "Included at the end of slurm.conf. Each node's Gres (below) belongs on its own NodeName line.");
        for (key, script) in [("Prolog", "prolog"), ("Epilog", "epilog"), ("TaskProlog", "task-prolog")] {
            let ours = scripts.join(script);
            let (ours, comment) = match conf.value(&key.to_ascii_lowercase()).filter(|other| Path::new(other) != ours) {
                Some(other) => {
                    text += &format!("# slurm.conf has {key}={other}: call ours from it.\n");
                    (ours, "#")
                }
                None => (ours, ""),
            };
            text += &format!("{comment}{key}={}\n", ours.display());
        }
        let gres: Vec<&str> = [ASKED].into_iter().chain(self.kinds.iter().map(String::as_str)).collect();
        for (key, ours) in [
            ("PrologFlags", &["Contain"][..]),
            ("GresTypes", &gres),
            ("JobSubmitPlugins", &["lua"]),
            ("CliFilterPlugins", &["lua"]),
        ] {
            let value = with(conf, key, ours);
            if conf.value(&key.to_ascii_lowercase()) != Some(&value) {
                text += &format!("{key}={value}\n");
            }
        }
        if conf.words("proctracktype") != ["cgroup"] {
            text += "ProctrackType=proctrack/cgroup\n";
        }
        text += "#\n";
        for node in self.nodes {
            text += &format!("# NodeName={} Gres={}\n", node.node, self.gres(node));
        }
        for name in &self.uneven {
            text += &format!("# {name} takes different shares of these GPUs; the greatest is counted everywhere.\n");
        }
        text
    }

    /// gres.conf of all nodes.
    pub fn gres_conf(&self) -> String {
        let mut text = head("#", "What is only counted. Lines of your own for other resources may stay beside these.");
        for node in self.nodes {
            for (kind, number) in self.counts(node) {
                text += &format!("NodeName={} Name={kind} Count={number}\n", node.node);
            }
        }
        text
    }

    /// job_submit.lua: makes counts of the slices that a job asks for, and writes these into its comment.
    pub fn job_submit_lua(&self) -> String {
        self.lua(include_str!("job_submit.lua"))
    }

    /// cli_filter.lua: the same for `srun`, which asks with the same words for a step as well.
    pub fn cli_filter_lua(&self) -> String {
        self.lua(include_str!("cli_filter.lua"))
    }

    fn lua(&self, program: &str) -> String {
        let mut text = head("--", "Beside slurm.conf, on the controller and where users submit jobs.");
        text += "\n-- What a slice counts as, by its profile.\nlocal costs = {\n";
        for (name, cost) in &self.costs {
            let counts = self.kinds.iter().filter_map(|kind| Some(format!("{kind} = {}", cost.get(kind)?)));
            // Writing to a String can't fail.
            let _ = writeln!(text, "    [{name:?}] = {{{}}},", counts.collect::<Vec<_>>().join(", "));
        }
        let quoted: Vec<String> = self.kinds.iter().map(|kind| format!("{kind:?}")).collect();
        let known: Vec<String> = self.kinds.iter().map(|kind| format!("{kind} = true")).collect();
        let names: Vec<&str> = self.costs.iter().map(|(name, _)| name.as_str()).collect();
        let _ = write!(
            text,
            "}}\nlocal order = {{{}}}\nlocal kinds = {{{}}}\nlocal profiles = {:?}\n\n",
            quoted.join(", "),
            known.join(", "),
            names.join(", ")
        );
        text + include_str!("requests.lua") + program
    }
}

/// The programs that `srun --container` starts.
#[derive(Debug)]
pub struct Container<'a> {
    /// mig-runtime.
    pub shim: &'a Path,
    /// The low-level runtime below it.
    pub runtime: &'a Path,
    /// Settings other than the default ones.
    pub settings: Option<&'a Path>,
    /// Directory with one directory for each user's containers.
    pub roots: &'a Path,
}

/// oci.conf. `%u` is the user's name: releases before 23.02 know no `%U`. KILL, since a container's first process is deaf to
/// TERM.
pub fn oci_conf(cluster: &str, container: &Container) -> String {
    let mut options = format!("--mig-job slurm:{cluster}:%j --mig-runtime {}", container.runtime.display());
    if let Some(file) = container.settings {
        options += &format!(" --mig-config {}", file.display());
    }
    if container.runtime.file_name().is_some_and(|name| name == "runc") {
        options += " --rootless=true";
    }
    let line = |key: &str, verb: &str| {
        let roots = container.roots.display();
        format!("RunTime{key}=\"{} {options} --root={roots}/%u {verb}\"\n", container.shim.display())
    };
    let id = "%n.%u.%j.%s.%t";
    head("#", "srun --container through mig-runtime; read anew for every step.")
        + &line("Query", &format!("state {id}"))
        + &line("Kill", &format!("kill {id} KILL"))
        + &line("Delete", &format!("delete --force {id}"))
        + &line("Run", &format!("run --bundle %b {id}"))
        + "# From Slurm 23.02 on:\n# EnvExclude=\"^(SLURM_CONF|SLURM_CONF_SERVER)=\"\n# RunTimeEnvExclude=\"^(SLURM_CONF|SLURM_CONF_SERVER)=\"\n"
}

/// A list of slurm.conf with ours at its end, as far as they are not in it.
fn with(conf: &Conf, key: &str, ours: &[&str]) -> String {
    let known = conf.words(&key.to_ascii_lowercase());
    let theirs = conf.value(&key.to_ascii_lowercase()).unwrap_or_default().split(',').map(str::trim);
    let new = ours.iter().copied().filter(|word| !known.contains(&word.to_ascii_lowercase()));
    theirs.filter(|word| !word.is_empty()).chain(new).collect::<Vec<_>>().join(",")
}

/// Whether a text is of our making, so that we may write it anew.
pub fn is_ours(text: &str) -> bool {
    text.lines().next().is_some_and(|line| line.contains(MARK))
}

const MARK: &str = "Made by migctl slurm config";

fn head(comment: &str, what: &str) -> String {
    format!(
        "{comment} {MARK} (mig-hook {}); run it again when GPUs change.\n{comment} {what}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The name under which a profile is counted by itself: `mig1g10gbme` of `1g.10gb+me`. Dots and signs break tools that read
/// generic resources.
fn kind(profile: &str) -> String {
    let plain: String = profile.replace('-', "no").chars().filter(char::is_ascii_alphanumeric).collect();
    format!("{ASKED}{plain}")
}

/// Slices of a node.
fn total(node: &Node, kind: &str) -> u32 {
    node.gpus.iter().map(|board| if kind == COMPUTE { board.compute_slices } else { board.memory_slices }).sum()
}

/// How many slices of a profile a node has room for when it is empty.
fn room(node: &Node, profile: &str) -> u32 {
    node.gpus.iter().filter_map(|board| board.offer(profile)).map(|offer| offer.total).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A profile: name, compute slices, memory slices, how many at once, starts.
    type Row = (&'static str, u32, u32, u32, &'static [u32]);

    const A100: &[Row] = &[
        ("1g.10gb", 1, 1, 7, &[0, 1, 2, 3, 4, 5, 6]),
        ("1g.10gb+me", 1, 1, 1, &[0, 1, 2, 3, 4, 5, 6]),
        ("1g.20gb", 1, 2, 4, &[0, 2, 4, 6]),
        ("2g.20gb", 2, 2, 3, &[0, 2, 4]),
        ("3g.40gb", 3, 4, 2, &[0, 4]),
        ("4g.40gb", 4, 4, 1, &[0]),
        ("7g.80gb", 7, 8, 1, &[0]),
    ];
    const A30: &[Row] = &[
        ("1g.6gb", 1, 1, 4, &[0, 1, 2, 3]),
        ("1g.6gb+me", 1, 1, 1, &[0, 1, 2, 3]),
        ("2g.12gb", 2, 2, 2, &[0, 2]),
        ("2g.12gb+me", 2, 2, 1, &[0, 2]),
        ("4g.24gb", 4, 4, 1, &[0]),
    ];
    const RTX_PRO_6000: &[Row] = &[
        ("1g.24gb", 1, 3, 4, &[0, 3, 6, 9]),
        ("1g.24gb+me.all", 1, 3, 1, &[0, 3, 6, 9]),
        ("1g.24gb-me", 1, 3, 4, &[0, 3, 6, 9]),
        ("2g.48gb", 2, 6, 2, &[0, 6]),
        ("4g.96gb", 4, 12, 1, &[0]),
    ];

    fn board(index: u32, rows: &[Row]) -> Board {
        let offer = |(name, compute_slices, memory_slices, total, starts): &Row| Offer {
            name: (*name).into(),
            compute_slices: *compute_slices,
            memory_slices: *memory_slices,
            total: *total,
            placements: starts.iter().map(|start| Placement { start: *start, size: *memory_slices }).collect(),
        };
        Board {
            index,
            uuid: format!("GPU-{index}"),
            name: "NVIDIA".into(),
            compute_slices: rows.iter().map(|row| row.1).max().unwrap(),
            memory_slices: rows.iter().map(|row| row.2).max().unwrap(),
            profiles: rows.iter().map(offer).collect(),
        }
    }

    fn node(name: &str, boards: &[&[Row]]) -> Node {
        let gpus = boards.iter().zip(0..).map(|(rows, index)| board(index, rows)).collect();
        Node { node: name.into(), cluster: "c".into(), gpus }
    }

    fn conf(text: &str) -> Conf {
        Conf::read(Path::new("/slurm.conf"), &|_| Some(text.to_owned())).unwrap()
    }

    fn cost<'a>(cluster: &'a Cluster, profile: &str) -> &'a BTreeMap<String, u32> {
        &cluster.costs.iter().find(|(name, _)| name == profile).unwrap().1
    }

    /// How many jobs of one profile Slurm starts on a node.
    fn started(cluster: &Cluster, node: &Node, profile: &str) -> u32 {
        let has: BTreeMap<&str, u32> = cluster.counts(node).collect();
        let cost = cost(cluster, profile).iter();
        cost.map(|(kind, number)| has.get(kind.as_str()).unwrap_or(&0) / number).min().unwrap()
    }

    /// Calls `check` with every set of slices that fits on a GPU.
    fn packings<'a>(
        board: &'a Board,
        from: usize,
        taken: u32,
        compute: u32,
        set: &mut Vec<&'a Offer>,
        check: &mut impl FnMut(&[&Offer]),
    ) {
        check(set);
        for (n, offer) in board.profiles.iter().enumerate().skip(from) {
            let number = set.iter().filter(|other| other.name == offer.name).count();
            if number as u32 >= offer.total || compute < offer.compute_slices {
                continue;
            }
            for at in offer.placements.iter().filter(|at| at.mask() & taken == 0) {
                set.push(offer);
                packings(board, n, taken | at.mask(), compute - offer.compute_slices, set, check);
                set.pop();
            }
        }
    }

    #[test]
    fn one_gpu_needs_counts_of_its_own_only_where_the_two_say_too_much() {
        let nodes = [node("n", &[A100])];
        let cluster = Cluster::of(&nodes);
        assert_eq!(cluster.gres(&nodes[0]), "migc:7,migm:8,mig1g10gbme:1");
        let nodes = [node("n", &[A100, A100])];
        assert_eq!(Cluster::of(&nodes).gres(&nodes[0]), "migc:14,migm:16,mig1g10gbme:2,mig2g20gb:6,mig4g40gb:2");
    }

    #[test]
    fn as_many_jobs_of_a_profile_start_as_there_is_room_for() {
        for boards in [
            &[A100][..],
            &[A100; 2],
            &[A100; 8],
            &[A30; 4],
            &[RTX_PRO_6000; 3],
            &[A100, A30],
            &[A30, A30, RTX_PRO_6000],
        ] {
            let nodes = [node("n", boards)];
            let cluster = Cluster::of(&nodes);
            for (profile, _) in &cluster.costs {
                assert_eq!(started(&cluster, &nodes[0], profile), room(&nodes[0], profile), "{profile} of {boards:?}");
            }
        }
    }

    #[test]
    fn counts_never_keep_out_what_a_gpu_has_room_for() {
        for (rows, others) in [(A100, A100), (A30, A30), (RTX_PRO_6000, RTX_PRO_6000), (A100, A30), (A30, A100)] {
            let nodes = [node("n", &[rows, rows]), node("others", &[others])];
            let cluster = Cluster::of(&nodes);
            let has: BTreeMap<&str, u32> = cluster.counts(&nodes[0]).collect();
            let mut seen = 0;
            packings(&nodes[0].gpus[0], 0, 0, nodes[0].gpus[0].compute_slices, &mut vec![], &mut |set| {
                seen += 1;
                for (kind, number) in &has {
                    let taken: u32 = set.iter().map(|offer| cost(&cluster, &offer.name).get(*kind).unwrap_or(&0)).sum();
                    let names: Vec<&str> = set.iter().map(|offer| offer.name.as_str()).collect();
                    assert!(taken <= number / 2, "{names:?} fit on a GPU and take {taken} of {} {kind}", number / 2);
                }
            });
            assert!(seen > 20, "{seen}");
        }
    }

    #[test]
    fn a_profile_starts_only_where_it_is_offered() {
        let nodes = [node("big", &[A100, A100]), node("small", &[A30])];
        let cluster = Cluster::of(&nodes);
        for (profile, on) in [("1g.10gb", [14, 0]), ("3g.40gb", [4, 0]), ("1g.6gb", [0, 4]), ("2g.12gb+me", [0, 1])] {
            assert_eq!([0, 1].map(|n: usize| started(&cluster, &nodes[n], profile)), on, "{profile}");
        }
        assert!(cluster.gres_conf().contains("NodeName=small Name=mig1g6gb Count=4\n"), "{}", cluster.gres_conf());
        assert!(!cluster.gres_conf().contains("NodeName=small Name=mig1g10gb "), "{}", cluster.gres_conf());
    }

    #[test]
    fn the_greater_share_counts_where_boards_differ_and_that_is_told() {
        const A100_40: &[Row] = &[("1g.10gb", 1, 2, 4, &[0, 2, 4, 6]), ("7g.40gb", 7, 8, 1, &[0])];
        let nodes = [node("a", &[A100]), node("b", &[A100_40])];
        let cluster = Cluster::of(&nodes);
        assert_eq!((cost(&cluster, "1g.10gb")["migc"], cost(&cluster, "1g.10gb")["migm"]), (1, 2));
        let text = cluster.slurm_conf(&Conf::default(), Path::new("/s"));
        assert!(
            text.contains("# 1g.10gb takes different shares of these GPUs; the greatest is counted everywhere.\n"),
            "{text}"
        );
    }

    #[test]
    fn what_slurm_conf_says_already_is_kept() {
        let conf = conf(
            "clustername=mini # ours\nGresTypes=gpu,mig\nPrologFlags = X11,\\\nNoHold\nProlog=/site/prolog\nEpilog=/s/epilog\n\
             JobSubmitPlugins=job_submit/lua,throttle\n#CliFilterPlugins=syslog\nNodeName=n CPUs=2\n",
        );
        let nodes = [node("n", &[A30])];
        let text = Cluster::of(&nodes).slurm_conf(&conf, Path::new("/s"));
        for line in [
            "# slurm.conf has Prolog=/site/prolog: call ours from it.",
            "#Prolog=/s/prolog",
            "Epilog=/s/epilog",
            "TaskProlog=/s/task-prolog",
            "PrologFlags=X11,NoHold,Contain",
            "GresTypes=gpu,mig,migc,migm,mig1g6gbme,mig2g12gbme",
            "CliFilterPlugins=lua",
            "# NodeName=n Gres=migc:4,migm:4,mig1g6gbme:1,mig2g12gbme:1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("JobSubmitPlugins"), "it is as it should be: {text}");
    }

    /// job_submit.lua and cli_filter.lua of two nodes, in the Lua that Slurm has, with as much of Slurm as they need.
    struct Plugin(mlua::Lua);

    impl Plugin {
        fn new(text: fn(&Cluster) -> String) -> Plugin {
            let lua = mlua::Lua::new();
            lua.load(
                "said = {}\nlocal function say(form, ...) table.insert(said, string.format(form, ...)) end\n\
                 slurm = {SUCCESS = 0, ERROR = -1, log_user = say, log_error = say}",
            )
            .exec()
            .unwrap();
            let nodes = [node("n", &[A100, A100])];
            lua.load(text(&Cluster::of(&nodes))).exec().unwrap();
            Plugin(lua)
        }

        /// Calls a function with tables; the first one as it is afterwards, or what was said against it.
        fn call(&self, function: &str, tables: &[&[(&str, &str)]]) -> Result<BTreeMap<String, String>, String> {
            let tables = tables.iter().map(|fields| self.0.create_table_from(fields.iter().copied()).unwrap());
            let tables: Vec<mlua::Table> = tables.collect();
            let function: mlua::Function = self.0.globals().get(function).unwrap();
            let code: i64 =
                function.call(mlua::MultiValue::from_iter(tables.iter().cloned().map(mlua::Value::Table))).unwrap();
            if code == 0 {
                return Ok(tables[0].pairs::<String, String>().map(Result::unwrap).collect());
            }
            let said: Vec<String> = self.0.globals().get("said").unwrap();
            self.0.globals().set("said", self.0.create_table().unwrap()).unwrap();
            Err(said.join("\n"))
        }
    }

    fn submitted(gres: &str, comment: &str) -> Result<(String, String), String> {
        let fields: Vec<(&str, &str)> = [("tres_per_node", gres), ("comment", comment)]
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .collect();
        let mut done = Plugin::new(|c| c.job_submit_lua()).call("slurm_job_submit", &[&fields])?;
        Ok((done.remove("tres_per_node").unwrap_or_default(), done.remove("comment").unwrap_or_default()))
    }

    #[test]
    fn job_submit_makes_counts_and_a_comment_of_slices() {
        for (gres, comment, counts, request) in [
            ("gres:mig:1g.10gb", "", "gres:migc:1,gres:migm:1", "mig=1g.10gb"),
            ("gres/mig:1g.10gb=2", "hello; you", "gres/migc:2,gres/migm:2", "mig=2x1g.10gb hello; you"),
            ("mig:4g.40gb", "", "migc:4,migm:4,mig2g20gb:2,mig4g40gb:1", "mig=4g.40gb"),
            (
                "gres:mig:1g.10gb:2,gres:shard:1,gres:mig:3g.40gb",
                "",
                "gres:shard:1,gres:migc:5,gres:migm:6,gres:mig2g20gb:1",
                "mig=2x1g.10gb,3g.40gb",
            ),
            ("gres:gpu:h100:2", "", "gres:gpu:h100:2", ""),
            ("", "no mig here", "", "no mig here"),
            // srun's own, already counted by cli_filter.lua.
            ("gres:migc:2,gres:migm:2", "mig=2x1g.10gb mine", "gres:migc:2,gres:migm:2", "mig=2x1g.10gb mine"),
        ] {
            assert_eq!(submitted(gres, comment), Ok((counts.to_owned(), request.to_owned())), "{gres} {comment}");
        }
    }

    #[test]
    fn job_submit_refuses_in_one_readable_line() {
        let all = "profiles are 1g.10gb, 1g.10gb+me, 1g.20gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb";
        for (gres, comment, why) in [
            ("gres:mig:9g.10gb", "", format!("mig: no profile 9g.10gb in this cluster; {all}")),
            ("gres:mig:1G.10GB", "", format!("mig: no profile 1G.10GB in this cluster; {all}")),
            ("gres:mig:2", "", format!("mig: say which slice, as in --gres=mig:PROFILE or mig:PROFILE:2; {all}")),
            ("gres:mig", "", format!("mig: say which slice, as in --gres=mig:PROFILE or mig:PROFILE:2; {all}")),
            ("gres:mig:1g.10gb:0", "", "mig: a job gets 1 to 64 slices of a profile, not 0".into()),
            ("gres:mig:1g.10gb:65", "", "mig: a job gets 1 to 64 slices of a profile, not 65".into()),
            ("gres:migc:1,gres:migm:1", "", format!("mig: ask for slices with --gres=mig:PROFILE; {all}")),
            ("gres:migc:1,gres:migm:1", "mig=7g.80gb", format!("mig: ask for slices with --gres=mig:PROFILE; {all}")),
            ("gres:migc:1", "mig=x", format!("mig: ask for slices with --gres=mig:PROFILE; {all}")),
            (
                "gres:mig:1g.10gb,gres:migc:1",
                "",
                "mig: migc, migm, mig1g10gbme, mig2g20gb, mig4g40gb follow from mig:PROFILE; leave them out".into(),
            ),
        ] {
            assert_eq!(submitted(gres, comment), Err(why), "{gres} {comment}");
        }
        let reserved = "mig: a comment has no word mig=… of your own: slices are asked for with --gres=mig:PROFILE";
        for (gres, comment) in [("", "mig=7g.80gb"), ("", "a;mig=1g.10gb"), ("gres:mig:1g.10gb", "mig=7g.80gb")] {
            assert_eq!(submitted(gres, comment), Err(reserved.into()), "{gres} {comment}");
        }
        let plugin = Plugin::new(|c| c.job_submit_lua());
        for field in ["tres_per_task", "tres_per_job", "tres_per_socket"] {
            let said = plugin.call("slurm_job_submit", &[&[(field, "gres/mig:1g.10gb")]]).unwrap_err();
            assert!(said.starts_with("mig: slices are asked for by the node: --gres=mig:PROFILE"), "{said}");
        }
    }

    #[test]
    fn slices_of_a_job_stay_what_they_are() {
        let plugin = Plugin::new(|c| c.job_submit_lua());
        let job: &[(&str, &str)] = &[("tres_per_node", "gres:migc:1,gres:migm:1"), ("comment", "mig=1g.10gb mine")];
        let none: &[(&str, &str)] = &[];
        for (change, of, why) in [
            (&[("comment", "mig=1g.10gb other")][..], job, None),
            (&[("name", "x")], job, None),
            (&[("comment", "x")], none, None),
            (&[("tres_per_node", "gres:migc:1,gres:migm:1,gres:shard:1")], job, None),
            (&[("comment", "mine")], job, Some("word mig=…")),
            (&[("comment", "mig=7g.80gb mine")], job, Some("word mig=…")),
            (&[("comment", "mig=1g.10gb")], none, Some("word mig=…")),
            (&[("tres_per_node", "gres:migc:2,gres:migm:1")], job, Some("can't be changed")),
            (&[("tres_per_node", "")], job, Some("can't be changed")),
            (&[("tres_per_node", "gres:mig:1g.10gb")], none, Some("can't be changed")),
            (&[("tres_per_task", "gres:migc:1")], none, Some("can't be changed")),
        ] {
            let said = plugin.call("slurm_job_modify", &[change, of]);
            match why {
                None => assert!(said.is_ok(), "{change:?} {said:?}"),
                Some(why) => assert!(said.as_ref().is_err_and(|s| s.contains(why)), "{change:?} {said:?}"),
            }
        }
    }

    #[test]
    fn cli_filter_counts_for_srun_what_job_submit_takes() {
        let plugin = Plugin::new(|c| c.cli_filter_lua());
        let call = |fields: &[(&str, &str)]| plugin.call("slurm_cli_pre_submit", &[fields]);
        let srun = call(&[("type", "srun"), ("gres", "gres:mig:1g.10gb:2,gres:shard:1"), ("comment", "mine")]).unwrap();
        assert_eq!(
            (srun["gres"].as_str(), srun["comment"].as_str()),
            ("gres:shard:1,gres:migc:2,gres:migm:2", "mig=2x1g.10gb mine")
        );
        assert_eq!(
            submitted(&srun["gres"], &srun["comment"]),
            Ok((srun["gres"].clone(), srun["comment"].clone())),
            "the controller takes it as it is"
        );
        let batch = [("type", "sbatch"), ("gres", "gres:mig:1g.10gb")];
        assert_eq!(call(&batch).unwrap()["gres"], "gres:mig:1g.10gb", "job_submit.lua does that");
        let said = call(&[("type", "srun"), ("gres", "gres:mig:8g.10gb")]).unwrap_err();
        assert!(said.starts_with("mig: no profile 8g.10gb in this cluster; profiles are 1g.10gb"), "{said}");
        let said = call(&[("type", "srun"), ("gres", "gres:mig:1g.10gb"), ("comment", "mig=1g.10gb")]).unwrap_err();
        assert!(said.starts_with("mig: a comment has no word mig=…"), "{said}");
    }
}
