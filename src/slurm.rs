//! Slurm, as far as a node's Prolog and Epilog have to know it, and what its own files have to say. Pure.

pub mod conf;
pub mod counts;

/// The word of a job's comment that asks for slices: `mig=1g.10gb`. job_submit.lua writes it.
const WORD: &str = "mig=";

/// What a job's comment asks for: the value of the first word `mig=…`, words being separated by blanks or semicolons.
pub fn request_in(comment: &str) -> Option<&str> {
    let separates = |c: char| c.is_whitespace() || c == ';';
    comment.split(separates).find_map(|word| word.strip_prefix(WORD))
}

/// The cgroup of a job on a node, by its path in the hierarchy of the device rules; `None` where slurmd has none.
/// `is_cgroup` tells whether there is such a cgroup.
///
/// cgroup v1: `slurm_NODE/uid_UID/job_ID`, without the node where Slurm was built without multiple-slurmd; v2: `job_ID` in the
/// scope of slurmstepd (src/plugins/cgroup/v1/cgroup_v1.c, xcgroup_ns_create and task/cgroup; v2/cgroup_v2.c, _set_int_cg_ns;
/// seen with 22.05).
pub fn cgroup_of_job(node: &str, uid: u32, id: u32, is_cgroup: impl Fn(&str) -> bool) -> Option<String> {
    let plain = !node.is_empty() && node.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let v1 = [format!("/slurm_{node}"), "/slurm".into()].map(|dir| (format!("{dir}/uid_{uid}/job_{id}"), dir));
    let scopes = [format!("/system.slice/{node}_slurmstepd.scope"), "/system.slice/slurmstepd.scope".into()];
    let v2 = scopes.map(|dir| (format!("{dir}/job_{id}"), dir));
    let found = v1.into_iter().chain(v2).find(|(_, dir)| plain && is_cgroup(dir));
    found.map(|(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_that_asks_counts() {
        assert_eq!(request_in("mig=1g.10gb"), Some("1g.10gb"));
        assert_eq!(request_in("mig=1g.10gb,2x2g.20gb; for the paper mig=7g.80gb"), Some("1g.10gb,2x2g.20gb"));
        assert_eq!(request_in("for the paper"), None);
        assert_eq!(request_in("amig=1g.10gb"), None);
        assert_eq!(request_in(""), None);
    }

    #[test]
    fn a_jobs_cgroup_lies_where_slurmd_has_its_own() {
        let found = |there: &str| cgroup_of_job("n1", 1001, 15, |dir| dir == there);
        assert_eq!(found("/slurm_n1").as_deref(), Some("/slurm_n1/uid_1001/job_15"));
        assert_eq!(found("/slurm").as_deref(), Some("/slurm/uid_1001/job_15"));
        let scope = "/system.slice/n1_slurmstepd.scope";
        assert_eq!(found(scope), Some(format!("{scope}/job_15")));
        assert_eq!(found("/elsewhere"), None);
        assert_eq!(cgroup_of_job("../x", 1, 2, |_| true), None);
    }
}
