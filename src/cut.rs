//! What an administrator has cut: GPU instances, each whole or shared by several compute instances.
//!
//! Containers are given whole GPU instances only; `1c.3g.40gb` is for `migctl create` and layouts.

use std::fmt;

use crate::profile;
use crate::request::{self, RequestError, Want};

/// One GPU instance that is to exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Its profile, by name or by memory.
    pub want: Want,
    /// Compute slices of each of its compute instances; empty: one that has all of it.
    pub computes: Vec<u32>,
}

impl fmt::Display for Cut {
    /// `3g.40gb`, or `1c.3g.40gb,2c.3g.40gb` for one that is shared.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.computes.as_slice() {
            [] => write!(f, "{}", self.want),
            computes => {
                let names: Vec<String> = computes.iter().map(|slices| format!("{slices}c.{}", self.want)).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

/// The GPU instances of a text like `2x1g.10gb,3g.40gb`, `2x1c.3g.40gb` or `8GiB`: lists and counts as in a container's
/// request, without alternatives. Compute instances of one profile share a GPU instance as long as they fit into it.
pub fn parse(text: &str) -> Result<Vec<Cut>, RequestError> {
    request::list_of_cuts(text).map(|wants| packed(&wants))
}

/// The GPU instances for a list of names and amounts, in the order of their first compute instance.
pub fn packed(wants: &[Want]) -> Vec<Cut> {
    let mut cuts: Vec<Cut> = Vec::new();
    for want in wants {
        let name = match want {
            Want::Profile(name) => name.as_str(),
            Want::Memory { .. } | Want::Uuid(_) => "",
        };
        let Some((compute, whole)) = profile::split_compute(name) else {
            cuts.push(Cut { want: want.clone(), computes: Vec::new() });
            continue;
        };
        let room = profile::compute_slices(whole);
        let whole = Want::Profile(whole.to_owned());
        if compute == room {
            cuts.push(Cut { want: whole, computes: Vec::new() });
            continue;
        }
        let fits = |cut: &&mut Cut| {
            cut.want == whole && !cut.computes.is_empty() && cut.computes.iter().sum::<u32>() + compute <= room
        };
        match cuts.iter_mut().find(fits) {
            Some(cut) => cut.computes.push(compute),
            None => cuts.push(Cut { want: whole, computes: vec![compute] }),
        }
    }
    // The larger first: a 2c starts at compute slice 0 only.
    cuts.iter_mut().for_each(|cut| cut.computes.sort_unstable_by_key(|slices| std::cmp::Reverse(*slices)));
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        parse(text).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn lists_and_counts() {
        assert_eq!(shown("2x1g.10gb, 3g.40gb+me"), ["1g.10gb", "1g.10gb", "3g.40gb+me"]);
        assert_eq!(shown("8GiB"), ["8GiB"]);
    }

    #[test]
    fn compute_instances_share_a_gpu_instance_while_they_fit() {
        assert_eq!(shown("4x1c.3g.40gb"), ["1c.3g.40gb,1c.3g.40gb,1c.3g.40gb", "1c.3g.40gb"]);
        assert_eq!(shown("1c.3g.40gb,3g.40gb,2c.3g.40gb"), ["2c.3g.40gb,1c.3g.40gb", "3g.40gb"]);
        assert_eq!(shown("3c.3g.40gb"), ["3g.40gb"], "all of it is a plain slice");
        assert_eq!(shown("2c.3g.40gb,2c.4g.40gb"), ["2c.3g.40gb", "2c.4g.40gb"]);
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        for (text, why) in [
            ("1g.10gb|2g.20gb", "alternatives"),
            ("4c.3g.40gb", "has 3 compute slices"),
            ("MIG-aca87b1e-f22b-5b07-8b5e-6bd4e1e4a3a5", "names an existing slice"),
            ("1q.10gb", "not a profile name"),
            ("", "empty"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
