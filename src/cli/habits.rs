//! Command lines that people know from elsewhere: those of guides that circulate, which run as ours, and those of
//! `nvidia-smi`, for which the exact command is told. Pure.

use crate::gpu::Device;
use crate::request::GpuSelector;

/// A command line that is not ours.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Habit {
    /// Of a guide (`migctl --gpuid 0 create instance --type 1g.5gb`): the same as this command line of ours.
    Run(Vec<String>),
    /// Typed for `nvidia-smi`.
    Smi(Smi),
}

/// A call of `nvidia-smi`, as far as it is about MIG.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Smi {
    /// Of `-i`: none for every GPU.
    gpus: Vec<String>,
    action: Action,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    /// `-mig 1`
    Mode(bool),
    /// `-L`, `-lgi`, `-lci`
    List,
    /// `-lgip`, `-lgipp`, `-lcip`
    Profiles,
    /// `-cgi 19,3g.20gb`
    Create(Vec<String>),
    /// `-cci`
    CreateCompute,
    /// `-dgi`, `-dci`, with what `-gi` and `-ci` name
    Destroy { gis: Vec<u32>, cis: Vec<u32> },
}

/// What a command line without the program's name means, if it is one of those.
pub(super) fn translate(words: &[String]) -> Option<Habit> {
    guide(words).map(Habit::Run).or_else(|| smi(words).map(Habit::Smi))
}

/// `--gpuid 0 create instance --type 1g.5gb`, in any order. Options of ours stay.
fn guide(words: &[String]) -> Option<Vec<String>> {
    let (mut gpu, mut kind, mut id, mut verbs, mut ours) = (None, None, None, Vec::new(), Vec::new());
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| rest.next().cloned());
        match name {
            "--gpuid" => gpu = Some(value()?),
            "--type" => kind = Some(value()?),
            "--instanceid" => id = Some(value()?),
            "--config" => ours.extend(["--config".to_owned(), value()?]),
            "--json" => ours.push("--json".to_owned()),
            _ => verbs.push(word.as_str()),
        }
    }
    let verb = match (verbs.as_slice(), gpu) {
        (["create", "instance"], gpu) => {
            let gpu = gpu.map(|gpu| vec!["--gpu".into(), gpu]).unwrap_or_default();
            [vec!["create".into(), kind?], gpu].concat()
        }
        (["list", "instance"], gpu) => ["list".into()].into_iter().chain(gpu).collect(),
        (["list", "config"], gpu) => ["profiles".into()].into_iter().chain(gpu).collect(),
        (["destroy", "instance"], Some(gpu)) => vec!["destroy".into(), format!("{gpu}/{}", id?)],
        (["destroy", "instance"], None) => vec!["destroy".into(), id?],
        _ => return None,
    };
    Some([ours, verb].concat())
}

fn smi(words: &[String]) -> Option<Smi> {
    let (mut gpus, mut gis, mut cis, mut action) = (Vec::new(), Vec::new(), Vec::new(), None);
    let mut rest = words.iter().peekable();
    while let Some(word) = rest.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (word.as_str(), None),
        };
        // A value may follow, or not: `-cgi 19`, `-dgi -i 0`.
        let mut value = || value.clone().or_else(|| rest.next_if(|next| !next.starts_with('-')).cloned());
        let list = |text: Option<String>| -> Vec<String> {
            text.unwrap_or_default().split(',').map(|item| item.trim().to_owned()).filter(|i| !i.is_empty()).collect()
        };
        let numbers = |items: Vec<String>| items.iter().filter_map(|item| item.parse().ok()).collect::<Vec<u32>>();
        let found = match name {
            "mig" | "nvidia-smi" | "-C" | "--default-compute-instance" => continue,
            "--json" => continue,
            "--config" => {
                value();
                continue;
            }
            "-i" | "--id" => {
                gpus = list(value());
                continue;
            }
            "-gi" | "--gpu-instance-id" => {
                gis = numbers(list(value()));
                continue;
            }
            "-ci" | "--compute-instance-id" => {
                cis = numbers(list(value()));
                continue;
            }
            "-mig" | "--multi-instance-gpu" => match value().as_deref() {
                Some("1" | "ENABLED") => Action::Mode(true),
                Some("0" | "DISABLED") => Action::Mode(false),
                _ => return None,
            },
            "-L" | "--list-gpus" | "-lgi" | "--list-gpu-instances" | "-lci" | "--list-compute-instances" => {
                Action::List
            }
            "-lgip" | "--list-gpu-instance-profiles" | "-lgipp" | "--list-gpu-instance-possible-placements" => {
                Action::Profiles
            }
            "-lcip" | "--list-compute-instance-profiles" => Action::Profiles,
            "-lcipp" | "--list-compute-instance-possible-placements" => Action::Profiles,
            "-cgi" | "--create-gpu-instance" => Action::Create(list(value())),
            "-cci" | "--create-compute-instance" => {
                value();
                Action::CreateCompute
            }
            "-dgi" | "--destroy-gpu-instance" | "-dci" | "--destroy-compute-instance" => {
                Action::Destroy { gis: Vec::new(), cis: Vec::new() }
            }
            _ => return None,
        };
        action = Some(found);
    }
    let action = match action? {
        Action::Destroy { .. } => Action::Destroy { gis, cis },
        action => action,
    };
    Some(Smi { gpus, action })
}

impl Smi {
    /// Our commands for it, and what else is to be said, a line each. The driver of this machine resolves profile ids,
    /// which differ from board to board.
    pub(super) fn ours(&self, devices: &[Device]) -> Vec<String> {
        let meant = self.meant(devices);
        let each = |command: &str| -> Vec<String> {
            if self.gpus.is_empty() {
                return vec![format!("migctl {command}")];
            }
            self.gpus.iter().map(|gpu| format!("migctl {command} {gpu}")).collect()
        };
        match &self.action {
            Action::Mode(on) => {
                let gpus = if self.gpus.is_empty() { "all".into() } else { self.gpus.join(" ") };
                vec![format!("migctl mode {} {gpus}", if *on { "on" } else { "off" })]
            }
            Action::List => each("list"),
            Action::Profiles => each("profiles"),
            Action::Create(profiles) => meant.iter().map(|(gpu, device)| create(profiles, gpu, *device)).collect(),
            Action::CreateCompute => vec![
                "migctl create 2x1c.3g.40gb".into(),
                "(as an example: compute instances are cut together with the GPU instance that they share, and a plain \
                 3g.40gb has one that fills it; migctl profiles lists what there is)"
                    .into(),
            ],
            Action::Destroy { gis, .. } if gis.is_empty() && self.gpus.is_empty() => {
                vec!["migctl destroy --all".into()]
            }
            Action::Destroy { gis, .. } if gis.is_empty() => {
                self.gpus.iter().map(|gpu| format!("migctl destroy --all --gpu {gpu}")).collect()
            }
            Action::Destroy { gis, cis } => {
                let ours: Vec<String> =
                    meant.iter().filter_map(|(gpu, device)| destroy(gis, cis, gpu, *device)).collect();
                let ids: Vec<String> = gis.iter().map(u32::to_string).collect();
                match ours.is_empty() {
                    true => {
                        vec!["migctl list".into(), format!("(there is no GPU instance {} there)", ids.join(" or "))]
                    }
                    false => ours,
                }
            }
        }
    }

    /// The GPUs that it is about, each with what the driver says of it, where that is known.
    fn meant<'d>(&self, devices: &'d [Device]) -> Vec<(String, Option<&'d Device>)> {
        if self.gpus.is_empty() && !devices.is_empty() {
            return devices.iter().map(|device| (device.index.to_string(), Some(device))).collect();
        }
        let names = if self.gpus.is_empty() { vec!["GPU".to_owned()] } else { self.gpus.clone() };
        let device = |name: &str| devices.iter().find(|d| GpuSelector::parse(name).is_some_and(|s| s.matches(d)));
        names.into_iter().map(|name| (name.clone(), device(&name))).collect()
    }
}

/// `19,19,3g.20gb` on one GPU. A start may follow: `19:4`.
fn create(profiles: &[String], gpu: &str, device: Option<&Device>) -> String {
    let mut names = Vec::new();
    let mut start = String::new();
    for item in profiles {
        let (profile, at) = item.split_once(':').unwrap_or((item, ""));
        let profile = profile.strip_prefix("MIG ").unwrap_or(profile);
        let offered = |id: u32| device.and_then(|device| device.profiles.iter().find(|p| p.id.0 == id));
        match profile.parse::<u32>().map(|id| (id, offered(id))) {
            Err(_) => names.push(profile.to_owned()),
            Ok((_, Some(offered))) => names.push(offered.name.clone()),
            Ok((id, None)) => {
                let what = device.map_or_else(|| format!("GPU {gpu}"), Device::label);
                return format!(
                    "migctl profiles {gpu}\n({what} offers no profile {id}: ids differ from board to board)"
                );
            }
        }
        if !at.is_empty() {
            start = format!(" --start {at}");
        }
    }
    let several = if names.len() > 1 && !start.is_empty() { "\n(one after the other: a start is for one)" } else { "" };
    format!("migctl create {} --gpu {gpu}{start}{several}", names.join(","))
}

fn destroy(gis: &[u32], cis: &[u32], gpu: &str, device: Option<&Device>) -> Option<String> {
    let there = |gi: &&u32| device.is_none_or(|device| device.instances.iter().any(|i| i.id == **gi));
    let several =
        |gi: u32| device.is_some_and(|device| device.instances.iter().any(|i| i.id == gi && i.compute.len() > 1));
    let name = |gi: &u32| match cis {
        [ci] if several(*gi) => format!("{gpu}/{gi}/{ci}"),
        _ => format!("{gpu}/{gi}"),
    };
    let names: Vec<String> = gis.iter().filter(there).map(name).collect();
    (!names.is_empty()).then(|| format!("migctl destroy {}", names.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{ComputeInstance, Instance, Placement, Profile, ProfileId};

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn guides_run_as_ours() {
        for (theirs, ours) in [
            ("--gpuid 0 create instance --type 1g.5gb", "create 1g.5gb --gpu 0"),
            ("--gpuid=1 create instance --type=1g.5gb", "create 1g.5gb --gpu 1"),
            ("create instance --type 1g.5gb", "create 1g.5gb"),
            ("--gpuid 0 list instance", "list 0"),
            ("list instance", "list"),
            ("--json --gpuid 0 list config", "--json profiles 0"),
            ("--config /x.toml --gpuid 0 destroy instance --instanceid 7", "--config /x.toml destroy 0/7"),
        ] {
            assert_eq!(translate(&words(theirs)), Some(Habit::Run(words(ours))), "{theirs}");
        }
    }

    #[test]
    fn what_is_ours_is_left_alone() {
        for line in [
            "list",
            "list 0",
            "create 1g.10gb --gpu 0",
            "destroy 0/7",
            "--json list",
            "gc",
            "--help",
            "mode on 0",
            "create instance",
            "destroy instance --instanceid",
            "mig",
            "mig --nonsense",
            "-mig 2",
        ] {
            assert_eq!(translate(&words(line)), None, "{line}");
        }
    }

    /// An A100-80 with a slice, and a shared GPU instance, and an A100-40: profile 19 has another name on each.
    fn devices() -> Vec<Device> {
        let profile = |id, name: &str| Profile {
            id: ProfileId(id),
            name: name.into(),
            slices: 1,
            memory_mib: 0,
            sms: 0,
            engines: crate::gpu::Engines::default(),
            p2p: false,
            max_instances: 7,
            placements: vec![],
        };
        let compute = |id| ComputeInstance { id, slices: 1, sms: 14, uuid: format!("MIG-{id}") };
        let instance = |id, cis: &[u32]| Instance {
            id,
            profile: ProfileId(9),
            placement: Placement { start: 0, size: 4 },
            compute: cis.iter().map(|ci| compute(*ci)).collect(),
        };
        let device = |index, profiles, instances| Device { profiles, instances, ..crate::gpu::tests::device(index) };
        vec![
            device(
                0,
                vec![profile(19, "1g.10gb"), profile(9, "3g.40gb")],
                vec![instance(1, &[0]), instance(2, &[0, 1])],
            ),
            device(1, vec![profile(19, "1g.5gb"), profile(14, "2g.10gb")], vec![]),
        ]
    }

    #[test]
    fn nvidia_smis_users_are_told() {
        for (theirs, ours) in [
            ("-L", &["list"][..]),
            ("mig -lgi -i 0", &["list 0"]),
            ("nvidia-smi mig -lci", &["list"]),
            ("mig -i 0,1 -lgip", &["profiles 0", "profiles 1"]),
            ("mig -lgipp", &["profiles"]),
            ("mig -lcip", &["profiles"]),
            ("-i 0 -mig 1", &["mode on 0"]),
            ("-mig 0", &["mode off all"]),
            ("mig -cgi 19,3g.40gb -C -i 0", &["create 1g.10gb,3g.40gb --gpu 0"]),
            ("mig -cgi 19 -C", &["create 1g.10gb --gpu 0", "create 1g.5gb --gpu 1"]),
            ("mig --create-gpu-instance=9:4 -i 0", &["create 3g.40gb --gpu 0 --start 4"]),
            ("mig -dci", &["destroy --all"]),
            ("mig -dgi -i 1", &["destroy --all --gpu 1"]),
            ("mig -dgi -gi 1,2", &["destroy 0/1 0/2"]),
            ("mig -dci -gi 1 -ci 0 -i 0", &["destroy 0/1"]),
            ("mig -dci -gi 2 -ci 1 -i 0", &["destroy 0/2/1"]),
            ("--config /x --json mig -dgi -i 0 -gi 1", &["destroy 0/1"]),
        ] {
            let Some(Habit::Smi(smi)) = translate(&words(theirs)) else { panic!("{theirs}") };
            let ours: Vec<String> = ours.iter().map(|ours| format!("migctl {ours}")).collect();
            assert_eq!(smi.ours(&devices()), ours, "{theirs}");
        }
        let Some(Habit::Smi(gone)) = translate(&words("mig -dgi -gi 13")) else { panic!("not told") };
        assert_eq!(gone.ours(&devices()), ["migctl list", "(there is no GPU instance 13 there)"]);
    }

    #[test]
    fn an_id_that_the_board_has_not_is_said_to_be_none() {
        let Some(Habit::Smi(smi)) = translate(&words("mig -cgi 14 -C -i 0")) else { panic!() };
        let said = smi.ours(&devices()).join(" ");
        assert!(said.contains("offers no profile 14") && said.contains("differ from board to board"), "{said}");
        // Without a driver the names are kept, and ids can't be resolved.
        let Some(Habit::Smi(smi)) = translate(&words("mig -cgi 1g.10gb -C")) else { panic!() };
        assert_eq!(smi.ours(&[]), ["migctl create 1g.10gb --gpu GPU"]);
    }
}
