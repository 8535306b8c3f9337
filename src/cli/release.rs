//! `migctl release`: gives back by hand what a container that has ended still holds.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::config::Settings;
use crate::engine::{Engine, Failure, Released};
use crate::gpu::nvml::Nvml;
use crate::lease::{Lease, State};
use crate::report::Exit;

/// Arguments of `migctl release`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Lease token, container id or key of a job; a beginning that fits only one will do
    #[arg(value_name = "TOKEN|CONTAINER|JOB")]
    name: String,
}

/// The document of `migctl release`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Answer {
    /// The lease.
    token: String,
    #[serde(flatten)]
    released: Released,
}

pub(super) fn run(settings: &Settings, args: &Args, json: bool) -> Result<Exit> {
    let nvml = Nvml::at(&settings.nvml);
    let engine = Engine::open(settings, &nvml)?;
    let lease = find(&engine.leases()?, &args.name)?;
    if lease.state == State::Static {
        let why = format!("{} keeps a slice until migctl destroy ends it; see migctl list", lease.token);
        return Err(Failure::BadRequest(why).into());
    }
    if lease.state != State::Idle && engine.is_alive(&lease) {
        let who = lease.held_by();
        return Err(Failure::NotAllowed(format!(
            "{who} is alive and keeps its slice; stop it first, then nothing is left to release"
        ))
        .into());
    }
    let answer = Answer { released: engine.release(&lease.token, None, "released by migctl")?, token: lease.token };
    super::print(&answer, json, text)?;
    Ok(if matches!(answer.released, Released::Done | Released::Unknown) { Exit::Ok } else { Exit::NoRoom })
}

/// The lease with that token or container id, or with the only one that begins so.
pub(super) fn find(leases: &[Lease], name: &str) -> Result<Lease> {
    let names = |l: &Lease| {
        [Some(l.token.clone()), l.holder.container.clone(), l.holder.job.clone()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
    };
    if let Some(lease) = leases.iter().find(|l| names(l).iter().any(|n| n == name)) {
        return Ok(lease.clone());
    }
    let mut fits = leases.iter().filter(|l| !name.is_empty() && names(l).iter().any(|n| n.starts_with(name)));
    match (fits.next(), fits.next()) {
        (Some(lease), None) => Ok(lease.clone()),
        (Some(_), Some(_)) => {
            bail!(Failure::BadRequest(format!("{name:?} fits more than one lease; give more of it, see migctl leases")))
        }
        (None, _) => bail!(Failure::BadRequest(format!("there is no lease or container {name:?}; see migctl leases"))),
    }
}

fn text(answer: &Answer) -> String {
    let token = &answer.token;
    match &answer.released {
        Released::Done | Released::Unknown => format!("lease {token} is released"),
        Released::Busy { reason } => {
            format!(
                "lease {token} is marked for release and not free yet ({reason}); run migctl gc when that has ended"
            )
        }
        Released::Announced => format!("lease {token} is marked for release, but the lock was not free; run migctl gc"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{State, Way, tests::lease};

    #[test]
    fn by_token_container_or_an_unambiguous_beginning() {
        let named = |token: &str, container: &str| {
            let mut lease = lease(State::Active, Way::Shim);
            lease.token = token.into();
            lease.holder.container = Some(container.into());
            lease
        };
        let unbound = Lease { token: "bb3".into(), ..lease(State::Active, Way::Precreate) };
        let leases = [named("aa1", "web"), named("aa2", "web2"), unbound];
        assert_eq!(find(&leases, "web").unwrap().token, "aa1");
        assert_eq!(find(&leases, "aa2").unwrap().token, "aa2");
        assert_eq!(find(&leases, "web2").unwrap().token, "aa2");
        assert!(find(&leases, "aa").unwrap_err().to_string().contains("more than one"));
        assert!(find(&leases, "").unwrap_err().to_string().contains("no lease"));
    }
}
