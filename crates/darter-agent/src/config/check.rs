//! Combinations of keys that cannot work, each with the key to change.

use std::net::IpAddr;
use std::time::Duration;

pub(super) use darter_base::layers::{Fault, require};
use darter_core::units::{Seconds, Share};

use super::gpu::check_gpu;
use super::kubernetes::check_kubernetes;
use super::prewarm::check_prewarm;
use super::registries::check_registries;
use super::report::check_report;
use super::{Aws, Config, Mirror, Origin, Scope, Space, Swarm};
use crate::origin::is_url;
use crate::store::PIN_MAX;
use crate::swarm::discovery::has_port;

/// A stop waits for bodies no longer than this, whatever was typed: those that are left go on at the registry.
const DRAIN_MAX: Duration = Duration::from_secs(600);

/// Checks what the types cannot.
pub(super) fn check(config: &Config) -> Result<(), Fault> {
    let Config { agent, log, mirror, store, admin, origin, certs_d, aws, .. } = config;
    require(crate::log::is_filter(&log.level), "log.level", || {
        format!("`{}` is not a filter such as info or info,darter_agent::mirror=debug", log.level)
    })?;
    // Relative to what an agent is started in, which differs from one way to start it to the next.
    for (key, path) in [("agent.data_dir", agent.data_dir.as_deref()), ("certs_d.path", Some(&*certs_d.path))] {
        let Some(path) = path else { continue };
        require(path.is_absolute(), key, || format!("`{}` is not an absolute path", path.display()))?;
    }
    require(mirror.listen.port() == 0 || mirror.listen != admin.listen, "admin.listen", || {
        format!("{} is the mirror's address already (mirror.listen)", admin.listen)
    })?;
    require(mirror.listen.ip().is_loopback() || mirror.allow_remote, "mirror.listen", || {
        format!(
            "{} is not loopback: whoever reaches it reads what this node may read; say mirror.allow_remote = true if that is meant",
            mirror.listen
        )
    })?;
    for (key, wait) in [
        ("mirror.answer_within", mirror.answer_within),
        ("mirror.stall", mirror.stall),
        // What was cut short has to be 404 for a while, or containerd resumes it here for ever.
        ("mirror.handover", mirror.handover),
        ("mirror.client_timeout", mirror.client_timeout),
        ("certs_d.check_every", certs_d.check_every),
        ("certs_d.dial_timeout", certs_d.dial_timeout),
        ("origin.connect_timeout", origin.connect_timeout),
        ("origin.header_timeout", origin.header_timeout),
        ("origin.stall", origin.stall),
        ("swarm.lookup_every", config.swarm.lookup_every),
        ("swarm.handover", config.swarm.handover),
    ] {
        require(!wait.0.is_zero(), key, || "must be longer than nothing".to_owned())?;
    }
    for (key, count) in [
        ("mirror.max_connections", mirror.max_connections),
        ("mirror.prefetch_layers", mirror.prefetch_layers),
        ("origin.connections", origin.connections),
        ("origin.ranges", origin.ranges),
        ("origin.attempts", origin.attempts as usize),
    ] {
        require(count > 0, key, || "must be at least 1".to_owned())?;
    }
    require(origin.ranges <= 64, "origin.ranges", || {
        "must be at most 64: a registry takes more for an attack".to_owned()
    })?;
    require(agent.drain.0 <= DRAIN_MAX, "agent.drain", || {
        format!("must be at most {}: a stop waits for it", Seconds(DRAIN_MAX))
    })?;
    check_mirror(mirror)?;
    require(store.min_free != Space::Share(Share(100)), "store.min_free", || {
        "must be less than 100%: nothing could be kept".to_owned()
    })?;
    require(store.pin_for.0 <= PIN_MAX, "store.pin_for", || format!("must be at most {}", Seconds(PIN_MAX)))?;
    require(store.pin_share.0 <= 90, "store.pin_share", || {
        "must be at most 90%: what is not pinned needs room too".to_owned()
    })?;
    check_outside(origin, aws)?;
    check_swarm(config)?;
    check_gpu(&config.gpu)?;
    check_kubernetes(config)?;
    check_prewarm(&config.prewarm)?;
    check_report(&config.report)?;
    check_registries(config)?;
    if let Some(default) = &mirror.default_registry {
        let known = config.registries.iter().any(|registry| &registry.name == default);
        require(known, "mirror.default_registry", || {
            format!("{default} is not configured: add a [[registry]] with this name")
        })?;
    }
    Ok(())
}

fn check_mirror(mirror: &Mirror) -> Result<(), Fault> {
    // containerd 2.3 gives up after 30 s without headers, SOCI after 3 s.
    let longest = Seconds(Duration::from_secs(29));
    require(mirror.answer_within <= longest, "mirror.answer_within", || {
        format!("must be at most {longest}: containerd itself gives up at 30s")
    })?;
    require(mirror.stall.0 <= Duration::from_secs(240), "mirror.stall", || {
        "must be at most 4m: containerd gives up the whole pull at 5m without a byte".to_owned()
    })?;
    require(mirror.linger.0 <= Duration::from_secs(600), "mirror.linger", || {
        "must be at most 10m: what nobody reads takes the registry's bandwidth from what somebody does".to_owned()
    })?;
    require(mirror.proof_ttl <= mirror.proof_stale, "mirror.proof_ttl", || {
        format!(
            "must be at most mirror.proof_stale ({}): a proof holds longer while the registry is away, not shorter",
            mirror.proof_stale
        )
    })
}

fn check_outside(origin: &Origin, aws: &Aws) -> Result<(), Fault> {
    for entry in &origin.allow_local {
        require(is_host(entry), "origin.allow_local", || {
            format!("`{entry}` is not a host or host:port, such as 127.0.0.1:5000")
        })?;
    }
    if let Some(endpoint) = &aws.ecr_endpoint {
        require(is_url(endpoint), "aws.ecr_endpoint", || format!("`{endpoint}` is not a URL: expected https://host"))?;
    }
    require(
        aws.account.as_ref().is_none_or(|a| a.len() == 12 && a.bytes().all(|b| b.is_ascii_digit())),
        "aws.account",
        || "must be the 12 digits of an AWS account".to_owned(),
    )?;
    require(aws.account.is_none() || aws.region.is_some(), "aws.region", || {
        "must be set where aws.account is".to_owned()
    })
}

/// A full mesh of more would hold more connections than it is worth.
const MEMBERS_MAX: usize = 10_000;
/// Nobody gives a pod longer.
const HANDOVER_MAX: Duration = Duration::from_secs(600);

fn check_swarm(config: &Config) -> Result<(), Fault> {
    let Config { mirror, admin, swarm, .. } = config;
    let Swarm { listen, exchange_listen, dns, service, peers, max_members, .. } = swarm;
    require(service.is_some() || swarm.endpoint_port.is_none(), "swarm.endpoint_port", || {
        "has no meaning without swarm.service".to_owned()
    })?;
    if swarm.key_file.is_none() {
        require(!config.seed.enabled, "seed.enabled", || {
            "has no meaning without swarm.key_file: a seed keeps what other nodes pull".to_owned()
        })?;
        return require(dns.is_none() && service.is_none() && peers.is_empty(), "swarm.key_file", || {
            "must be set where swarm.dns, swarm.service or swarm.peers are: without a key there is no swarm".to_owned()
        });
    }
    require(listen.port() != 0 || service.is_none() || swarm.endpoint_port.is_some(), "swarm.listen", || {
        "needs a port, or swarm.endpoint_port has to say at which port of the Service agents are".to_owned()
    })?;
    // Whichever address: a wildcard takes the port of all of them.
    let taken = [
        ("swarm.listen", listen, "mirror.listen", &mirror.listen),
        ("swarm.listen", listen, "admin.listen", &admin.listen),
        ("swarm.exchange_listen", exchange_listen, "mirror.listen", &mirror.listen),
        ("swarm.exchange_listen", exchange_listen, "admin.listen", &admin.listen),
        ("swarm.exchange_listen", exchange_listen, "swarm.listen", listen),
    ];
    for (key, address, other, theirs) in taken {
        require(address.port() == 0 || address.port() != theirs.port(), key, || {
            format!("port {} is that of {other}", address.port())
        })?;
    }
    require(exchange_listen.port() != 0, "swarm.exchange_listen", || {
        "needs a port: the other agents are told".to_owned()
    })?;
    for peer in peers {
        require(has_port(peer), "swarm.peers", || format!("`{peer}` is not host:port, such as 10.0.0.1:4002"))?;
    }
    require(swarm.handover.0 <= HANDOVER_MAX, "swarm.handover", || {
        format!("must be at most {}: a stop waits for it", Seconds(HANDOVER_MAX))
    })?;
    require(swarm.scope == Scope::Cluster || swarm.zone.is_some(), "swarm.scope", || {
        "needs swarm.zone: nodes whose zone is not known would be a zone of their own, wherever they are".to_owned()
    })?;
    let is_name = |name: &String| !name.contains(['/', ' ']) && (!name.contains(':') || has_port(name));
    require(dns.as_ref().is_none_or(is_name), "swarm.dns", || {
        "must be a name, with or without a port, such as darter.kube-system.svc".to_owned()
    })?;
    require((2..=MEMBERS_MAX).contains(max_members), "swarm.max_members", || {
        format!("must be between 2 and {MEMBERS_MAX}")
    })
}

/// A name or an address, IPv6 in brackets or without a port.
fn is_host(entry: &str) -> bool {
    let bare = entry.strip_prefix('[').and_then(|entry| entry.strip_suffix(']')).unwrap_or(entry);
    let is_one = !entry.is_empty() && !entry.contains(|c: char| c == '/' || c == '@' || c.is_whitespace());
    is_one && (bare.parse::<IpAddr>().is_ok() || !entry.contains(':') || has_port(entry))
}
