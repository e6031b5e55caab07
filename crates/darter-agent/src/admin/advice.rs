//! What to do about a check that does not pass, for whoever is woken by it. For GPUs the core says it.

use crate::certs_d::HostsState;
use crate::store::State;
use crate::swarm::control::Standing;

/// While the mirror fails its self-test.
pub(super) const MIRROR: &str = "nothing at once: hosts.toml is withdrawn and containerd pulls from the registries \
    itself. A self-test follows every few seconds (certs_d.check_every); if this stays, look at the agent's log, \
    and at the disk of its data directory (`df`, `dmesg`)";

/// Of the store, where it takes no new blobs.
pub(super) const fn store(state: &State) -> Option<&'static str> {
    match state {
        State::Ok => None,
        State::Full { .. } => Some(
            "free space on the disk of the data directory, or lower store.min_free; until then containerd pulls from \
             the registries itself",
        ),
        State::ReadOnly { .. } => Some(
            "read `dmesg` for why the disk went read-only, and mount it again; until then containerd pulls from the \
             registries itself",
        ),
        State::Unavailable { .. } => Some(
            "see that agent.data_dir is there, is the agent's and that its disk is well; it is tried again by itself",
        ),
    }
}

/// Of one registry's hosts.toml.
pub(super) const fn hosts(state: &HostsState) -> Option<&'static str> {
    match state {
        HostsState::Written | HostsState::Closed => None,
        HostsState::Absent { .. } => Some(
            "put right what the reason names; it is tried again by itself (certs_d.check_every), and until then \
             containerd pulls from the registry itself",
        ),
        HostsState::Uninstalled => Some("start the agent again where it should mirror; else nothing"),
        HostsState::Drifted => Some("find out who else writes this file and stop that; darter puts it right each time"),
        HostsState::NotWritten { .. } => Some(
            "put that text there (on Bottlerocket: settings.container-registry.mirrors), or set certs_d.write = true",
        ),
        HostsState::Failed { .. } => Some(
            "see that the agent may write in certs_d.path, and that its disk has room; it is tried again by itself",
        ),
        HostsState::Foreign { .. } => Some(
            "take the other program off this node, then start the agent with certs_d.adopt = true (it keeps a backup)",
        ),
    }
}

/// Before the registries' files were looked at for the first time.
pub(super) const NOT_LOOKED_AT: &str =
    "wait: the first look comes with the start; if this stays, look at the agent's log";

/// While the metadata service has not told this node's own registry.
pub(super) const AWAITED: &str = "nothing where the node has just booted: it is asked until it answers, and containerd \
    pulls from the registry itself. If this stays: in a pod without the host's network the service needs a hop limit \
    of 2; or set aws.account and aws.region, or aws.discover = \"off\" where nothing of ECR is to be mirrored";

/// Where members are missing.
pub(super) const fn swarm(standing: &Standing) -> &'static str {
    match standing {
        Standing { apart: 1.., .. } => {
            "set the same swarm.tls on all nodes; while an update goes through them this is as it should be"
        }
        Standing { strangers: 1.., .. } => "give all nodes the same swarm key (swarm.key_file)",
        _ => "see that agents run there, and that ports 4002 and 4003 are open between the nodes",
    }
}
