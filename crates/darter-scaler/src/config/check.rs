//! Combinations of keys that cannot work, each with the key to change.

use std::collections::BTreeSet;
use std::time::Duration;

use darter_base::layers::{Fault, require};
use darter_core::units::Seconds;
use rustls_pki_types::ServerName;

use super::{AccessMode, Config, Grpc, Mode, Pool, Workload, given, ms};
use crate::fleet::Actuator;
use crate::state::WORKLOADS_MAX;

/// Less holds not even one decision of a large cluster.
const RECORD_MIN: u64 = 1 << 20;
/// Longer than anybody plans for.
const LEAD_MAX: Duration = Duration::from_secs(24 * 3600);

pub(super) fn check(config: &Config) -> Result<(), Fault> {
    let Config { log, grpc, http, access, record, demand, .. } = config;
    require(darter_base::log::is_filter(&log.level), "log.level", || {
        format!("`{}` is not a filter such as info or info,darter_scaler=debug", log.level)
    })?;
    let (cert, key) = (given(&grpc.cert), given(&grpc.key));
    require(cert.is_some() == key.is_some(), if cert.is_some() { "grpc.key" } else { "grpc.cert" }, || {
        "a certificate and its key go together".to_owned()
    })?;
    for (key, path) in [
        ("grpc.cert", &grpc.cert),
        ("grpc.key", &grpc.key),
        ("grpc.keda_ca", &grpc.keda_ca),
        ("access.token_file", &access.token_file),
        ("record.dir", &record.dir),
        ("kubernetes.kubeconfig", &config.kubernetes.kubeconfig),
    ] {
        require(given(path).is_none_or(|path| path.is_absolute()), key, || {
            format!("`{}` is not an absolute path", path.display())
        })?;
    }
    require(cert.is_some() || grpc.listen.ip().is_loopback() || grpc.insecure, "grpc.listen", || {
        format!(
            "{} is plaintext and not a loopback address: whoever is on the way reads the tokens of agents; set grpc.cert and \
             grpc.key, or say grpc.insecure = true if that is meant",
            grpc.listen
        )
    })?;
    check_keda_names(grpc)?;
    require(grpc.max_connections > 0, "grpc.max_connections", || "must be at least 1".to_owned())?;
    require(http.listen.port() == 0 || http.listen != grpc.listen, "http.listen", || {
        format!("{} is grpc.listen already", http.listen)
    })?;
    let is_local = grpc.listen.ip().is_loopback();
    require(access.mode != AccessMode::Loopback || is_local, "access.mode", || {
        format!(
            "loopback lets nobody report to {} from another machine: take tokens (access.token_file) or kubernetes",
            grpc.listen
        )
    })?;
    let has_file = given(&access.token_file).is_some();
    require(has_file == (access.mode == AccessMode::Tokens), "access.token_file", || match has_file {
        true => "has no meaning unless access.mode is tokens".to_owned(),
        false => "must be set where access.mode is tokens".to_owned(),
    })?;
    require(access.mode != AccessMode::Kubernetes || config.kubernetes.enabled, "access.mode", || {
        "kubernetes needs kubernetes.enabled = true".to_owned()
    })?;
    require(record.max_size.0 >= RECORD_MIN, "record.max_size", || "must be at least 1MiB".to_owned())?;
    let ttl = ms(demand.ttl);
    require((1..=config.policy.demand_lifetime_ms).contains(&ttl), "demand.ttl", || {
        format!(
            "must be more than nothing and at most policy.demand_lifetime_ms ({})",
            config.policy.demand_lifetime_ms
        )
    })?;
    let (every, has_server) = (demand.every, !demand.prometheus.is_empty());
    require((Duration::from_secs(1)..=demand.ttl.0).contains(&every.0), "demand.every", || {
        format!("must be from 1s to demand.ttl ({}): else each sample is over before the next comes", demand.ttl)
    })?;
    require(!has_server || crate::demand::Prometheus::new(&demand.prometheus).is_ok(), "demand.prometheus", || {
        format!("`{}` is not http://<host>:<port>, such as http://prometheus.monitoring.svc:9090", demand.prometheus)
    })?;
    let asks = config.workloads.iter().position(|workload| workload.prometheus.is_some());
    require(has_server || asks.is_none(), &format!("workloads[{}].prometheus", asks.unwrap_or(0)), || {
        "has no meaning without demand.prometheus".to_owned()
    })?;
    check_actuators(config)?;
    check_policy(config)?;
    check_pools(&config.pools)?;
    check_workloads(config)
}

/// Whom KEDA's questions are taken from.
fn check_keda_names(grpc: &Grpc) -> Result<(), Fault> {
    let is_held = given(&grpc.keda_ca).is_some();
    require(!is_held || given(&grpc.cert).is_some(), "grpc.keda_ca", || {
        "KEDA can show a certificate over TLS alone: set grpc.cert and grpc.key too, or leave this out".to_owned()
    })?;
    require(is_held || grpc.keda_names.is_empty(), "grpc.keda_names", || {
        "has no meaning without grpc.keda_ca, which says whose certificates are looked at".to_owned()
    })?;
    for name in &grpc.keda_names {
        require(ServerName::try_from(name.as_str()).is_ok(), "grpc.keda_names", || {
            format!("`{name}` is no DNS name or address, such as keda-operator.keda.svc")
        })?;
    }
    Ok(())
}

fn check_actuators(config: &Config) -> Result<(), Fault> {
    for actuator in [Actuator::DeletionCost, Actuator::Buffer, Actuator::Remove] {
        let is_on = config.actuators.mode(actuator) == Mode::On;
        require(!is_on || config.kubernetes.enabled, &format!("actuators.{}", actuator.as_str()), || {
            "on needs kubernetes.enabled = true: it writes there".to_owned()
        })?;
    }
    Ok(())
}

fn check_policy(config: &Config) -> Result<(), Fault> {
    let policy = &config.policy;
    for (key, ms) in [
        ("policy.report_period_ms", policy.report_period_ms),
        ("policy.report_lifetime_ms", policy.report_lifetime_ms),
        ("policy.demand_lifetime_ms", policy.demand_lifetime_ms),
        ("policy.protect.lease_ms", policy.protect.lease_ms),
        ("policy.warm.deadline_ms", policy.warm.deadline_ms),
    ] {
        require(ms > 0, key, || "must be more than nothing".to_owned())?;
    }
    require(policy.protect.renew_ms < policy.protect.lease_ms, "policy.protect.renew_ms", || {
        "must be less than policy.protect.lease_ms: a lease is renewed before it ends".to_owned()
    })?;
    require(policy.keep.least_ms <= policy.keep.most_ms, "policy.keep.least_ms", || {
        "must be at most policy.keep.most_ms".to_owned()
    })?;
    for (key, percent) in [
        ("policy.rails.unknown_percent", policy.rails.unknown_percent),
        ("policy.rails.victims_percent", policy.rails.victims_percent),
    ] {
        require(percent <= 100, key, || "must be at most 100".to_owned())?;
    }
    Ok(())
}

fn check_pools(pools: &[Pool]) -> Result<(), Fault> {
    let mut names = BTreeSet::new();
    for (n, pool) in pools.iter().enumerate() {
        let key = |name: &str| format!("pools[{n}].{name}");
        require(!pool.name.is_empty(), &key("name"), || "must not be empty".to_owned())?;
        require(names.insert(&pool.name), &key("name"), || format!("{} is there twice", pool.name))?;
        require(pool.gpus != Some(0), &key("gpus"), || "must be at least 1: this is about GPUs".to_owned())?;
        require(pool.nodes_most.is_none_or(|most| pool.nodes_least <= most), &key("nodes_least"), || {
            "must be at most nodes_most".to_owned()
        })?;
        require(pool.nodes.iter().all(|prefix| !prefix.is_empty()), &key("nodes"), || {
            "an empty text begins every name: leave it out where there is one pool".to_owned()
        })?;
    }
    Ok(())
}

fn check_workloads(config: &Config) -> Result<(), Fault> {
    require(config.workloads.len() <= WORKLOADS_MAX, "workloads", || format!("at most {WORKLOADS_MAX}"))?;
    let mut names = BTreeSet::new();
    for (n, Workload { name, pool, gpus, least, most, cold_start, lead, floors, .. }) in
        config.workloads.iter().enumerate()
    {
        let key = |name: &str| format!("workloads[{n}].{name}");
        let is_name = name
            .split_once('/')
            .is_some_and(|(namespace, name)| !namespace.is_empty() && !name.is_empty() && !name.contains('/'));
        require(is_name, &key("name"), || format!("`{name}` is not namespace/name of a Deployment"))?;
        require(names.insert(name), &key("name"), || format!("{name} is there twice"))?;
        let is_known = pool.as_ref().is_none_or(|pool| config.pools.iter().any(|known| &known.name == pool));
        require(is_known || config.kubernetes.enabled, &key("pool"), || {
            format!("{} is none of [[pools]]", pool.as_deref().unwrap_or_default())
        })?;
        require(*gpus != Some(0), &key("gpus"), || "must be at least 1: this is about GPUs".to_owned())?;
        require(most.is_none_or(|most| most > 0 && least.unwrap_or(0) <= most), &key("most"), || {
            "must be at least 1, and not less than least".to_owned()
        })?;
        for (name, length) in [("cold_start", cold_start), ("lead", lead)] {
            let fits = length.is_none_or(|length| !length.0.is_zero() && length.0 <= LEAD_MAX);
            require(fits, &key(name), || format!("must be more than nothing and at most {}", Seconds(LEAD_MAX)))?;
        }
        require(floors.iter().all(|floor| floor.from < floor.to), &key("floors"), || {
            "each must end after it begins; one over midnight is two of them".to_owned()
        })?;
    }
    Ok(())
}
