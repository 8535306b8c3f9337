//! What docs/slurm.md, docs/cluster.md, docs/hpc.md and docs/quickstart.md show of Slurm: commands run, and lines of
//! slurm.conf are right.

use std::path::Path;

use crate::cluster::{Cluster, SOON};
use crate::common::{blocks, run, text};
use crate::containers::bundle;
use crate::submit::uuids;

const PAGE: &str = include_str!("../../docs/slurm.md");
const MORE_NODES: &str = include_str!("../../docs/cluster.md");
const CONTAINERS: &str = include_str!("../../docs/hpc.md");
const QUICK: &str = include_str!("../../docs/quickstart.md");

/// A node as the pages have it.
const NODE: &[&[&str]] = &[&["a100-sxm4-80gb", "a100-sxm4-80gb"]];

/// What the commands of the pages start, in the home of our user: programs that tell which slices they see.
fn home(cluster: &Cluster) {
    bundle(cluster, "");
    let script = "mkdir bin IMAGE && cd IMAGE && mkdir -p bin dev proc sys tmp etc home root run mnt usr/bin var &&
        touch etc/passwd etc/group etc/hosts etc/resolv.conf && cp \"$(command -v busybox)\" bin/sh && cd .. &&
        for program in bin/python3 bin/nvidia-smi IMAGE/bin/python3 task one two; do
            printf '#!/bin/sh\\necho $CUDA_VISIBLE_DEVICES\\n' >$program && chmod +x $program || exit 1
        done &&
        printf '#!/bin/sh\\n#SBATCH --wait\\n#SBATCH --output=job\\n#SBATCH --gres=mig:3g.40gb\\n./task\\n' >job.sh";
    let made = run(&mut cluster.user("sh", &["-ec", script]));
    assert!(made.status.success(), "{}", text(&made));
}

/// Runs a block as our user would: in a shell, or where it is of a job in a batch script.
fn types(cluster: &Cluster, block: &str) -> String {
    if block.contains("&") && block.contains("wait") {
        let job = cluster.batch(&["--ntasks=2", "--gres=mig:1g.10gb:2"], block);
        cluster.wait_state(&job, "COMPLETED", SOON);
        return cluster.output(&job);
    }
    let mut shell = cluster.user("bash", &["-ec", block]);
    let output = run(shell.env("PATH", format!("{}:/usr/bin:/bin", cluster.path("home/bin").display())));
    assert!(output.status.success(), "{block}\n{}\n{}", text(&output), cluster.logs());
    text(&output)
}

#[test]
fn commands_of_users_run() {
    let cluster = Cluster::new(NODE);
    home(&cluster);
    let of_slurm = |page: &str| -> Vec<String> {
        blocks(page, "sh").into_iter().filter(|block| block.contains("srun ") && !block.contains("apptainer")).collect()
    };
    let commands = [of_slurm(PAGE), of_slurm(CONTAINERS), of_slurm(QUICK)].concat();
    assert!(commands.len() >= 6, "the reader of the pages is broken: {commands:#?}");
    for block in commands {
        if block.contains("ch-run") && !Path::new("/usr/bin/ch-run").exists() {
            crate::common::skip(&block, "no Charliecloud");
            continue;
        }
        let said = types(&cluster, &block);
        assert!(!uuids(&said).is_empty(), "{block}\n{said}");
        cluster.assert_clean(&block);
    }
    let of_job = std::fs::read_to_string(cluster.path("home/job")).unwrap();
    assert_eq!(uuids(&of_job).len(), 1, "{of_job}");
}

#[test]
fn a_refusal_is_as_shown() {
    let cluster = Cluster::new(NODE);
    let shown = &blocks(PAGE, "console")[0];
    let (command, said) = shown.split_once('\n').unwrap();
    let output = run(&mut cluster.user("sh", &["-c", command.strip_prefix("$ ").unwrap()]));
    assert!(!output.status.success(), "{}", text(&output));
    assert!(text(&output).contains(said.strip_suffix('…').unwrap()), "{}", text(&output));
}

#[test]
fn lines_of_slurm_conf_are_those_of_such_a_node() {
    let cluster = Cluster::new(NODE);
    let conf = std::fs::read_to_string(cluster.path("etc/slurm.conf")).unwrap();
    let node = conf.lines().find(|line| line.starts_with("NodeName=")).unwrap();
    let gres = |line: &str| line.split(' ').find(|word| word.starts_with("Gres=")).map(str::to_owned);
    let shown = [blocks(PAGE, "slurm"), blocks(MORE_NODES, "slurm")].concat().join("\n");
    let mut nodes = 0;
    for line in shown.lines() {
        let tried = match line.split_once('=') {
            Some(("NodeName", _)) => {
                nodes += 1;
                gres(line).is_none_or(|shown| Some(shown) == gres(node))
            }
            // A path is this cluster's own.
            Some((key, path)) if path.starts_with('/') => conf
                .lines()
                .any(|line| line.starts_with(&format!("{key}=")) && line.contains("%n") == path.contains("%n")),
            _ => conf.lines().any(|tried| tried == line),
        };
        assert!(tried, "{line}\nis not what is tried:\n{conf}");
    }
    assert_eq!(nodes, 3, "{shown}");
}
