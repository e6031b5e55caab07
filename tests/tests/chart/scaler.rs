//! The scaler of the chart: what it is started with, where it may run, and what it may do at a real API server.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_agent::config::Layers;
use darter_tests::chart::{Helm, NAMESPACE, configuration, find, path, root};
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::process;
use darter_tests::scratch::Scratch;
use darter_tests::stage::eventually;
use darter_tests::tools::{self, Need, can_run};
use http::{Method, StatusCode};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use toml_edit::TableLike;

use crate::admission::Cluster;
use crate::render::{schema, schema_of};
use crate::{shapes, with_scaler};

const APPLY: &str = "application/apply-patch+yaml";
const JSON: &str = "application/json";

/// scaler.toml.
fn told(objects: &[Value]) -> Result<toml_edit::DocumentMut> {
    let text =
        find(objects, "ConfigMap", "darter-scaler")?["data"]["scaler.toml"].as_str().context("no scaler.toml")?;
    text.parse().with_context(|| text.to_owned())
}

#[tokio::test]
async fn the_scaler_is_told_what_the_values_say() -> Result<()> {
    if !can_run("the_scaler_is_told_what_the_values_say", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let plain = helm.render(&json!({ "scaler": { "enabled": true } })).await?;
    let toml = told(&plain)?;
    assert_eq!(toml["grpc"]["listen"].as_str(), Some("0.0.0.0:4010"));
    assert_eq!(toml["access"]["mode"].as_str(), Some("kubernetes"), "whoever reaches it could say what he likes");
    assert_eq!(toml["kubernetes"]["enabled"].as_bool(), Some(true));
    // What the agents' tokens are made for, by whom, and where KEDA finds it.
    assert_eq!(toml["kubernetes"]["audience"].as_str(), Some("darter-scaler"));
    let agents = toml["kubernetes"]["agents"].as_array().context("no agents")?;
    assert_eq!(agents.iter().map(|one| one.as_str()).collect::<Vec<_>>(), [Some("gpu-system/darter")]);
    assert_eq!(toml["kubernetes"]["service"].as_str(), Some("darter-scaler"));
    for actuator in ["keda", "protect", "copy", "deletion_cost", "buffer", "remove"] {
        assert_eq!(toml["actuators"][actuator].as_str(), Some("observe"), "{actuator}");
    }
    let others = json!({ "scaler": { "enabled": true }, "fullnameOverride": "mirror",
        "serviceAccount": { "name": "theirs" }, "report": { "audience": "scaler.example" },
        "config": { "kubernetes": { "startup_taint": "team.example/not-ready" } } });
    let objects = helm.render(&others).await?;
    let text = find(&objects, "ConfigMap", "mirror-scaler")?["data"]["scaler.toml"].as_str().context("no text")?;
    let toml: toml_edit::DocumentMut = text.parse()?;
    let agents = toml["kubernetes"]["agents"].as_array().context("no agents")?;
    assert_eq!(agents.iter().map(|one| one.as_str()).collect::<Vec<_>>(), [Some("gpu-system/theirs")]);
    for (key, value) in
        [("audience", "scaler.example"), ("service", "mirror-scaler"), ("startup_taint", "team.example/not-ready")]
    {
        assert_eq!(toml["kubernetes"][key].as_str(), Some(value), "{key}");
    }
    let toml = told(&helm.render(&with_scaler()).await?)?;
    assert_eq!(toml["grpc"]["listen"].as_str(), Some("0.0.0.0:5010"));
    assert_eq!(toml["actuators"]["deletion_cost"].as_str(), Some("on"));
    assert_eq!(toml["kubernetes"]["static_pools"].as_bool(), Some(true));
    let pools = toml["pools"].as_array_of_tables().context("no pools")?;
    assert_eq!(pools.get(0).and_then(|pool| pool["nodes_most"].as_integer()), Some(20), "whole numbers stay so");
    assert_eq!(toml["policy"]["rails"]["micros_per_hour_most"].as_integer(), Some(64_000_000_000));
    let workloads = toml["workloads"].as_array_of_tables().context("no workloads")?;
    let floor = workloads.get(0).and_then(|workload| workload["floors"].as_array()?.get(0)?.as_inline_table());
    assert_eq!(floor.and_then(|floor| floor.get("from")?.as_str()), Some("08:00"));
    Ok(())
}

#[tokio::test]
async fn the_scaler_takes_its_configuration_of_every_shape() -> Result<()> {
    if !can_run("the_scaler_takes_its_configuration_of_every_shape", &[Need::Helm, Need::LiveScaler]) {
        return Ok(());
    }
    let (helm, dir) = (Helm::new()?, Scratch::new()?);
    let mut checked = 0;
    for (name, values) in shapes().into_iter().filter(|(_, values)| values["scaler"]["enabled"] == true) {
        fs::write(dir.join("scaler.toml"), told(&helm.render(&values).await?)?.to_string())?;
        let mut command = process::command(tools::darter()?);
        command.args(["scaler", "config", "check", "--config"]).arg(dir.join("scaler.toml"));
        process::run_ok("darter scaler config check", command, Duration::from_secs(60)).await.context(name)?;
        checked += 1;
    }
    ensure!(checked >= 3, "only {checked}");
    Ok(())
}

/// What the schema should say of `scaler.config`: the sections and keys of scaler.toml, with the types that they have
/// there, and of pools and workloads, which are commented out, what is in their lines.
fn schema_of_config(text: &str) -> Result<Value> {
    let (tables, lists) = text.split_once("# [[pools]]\n").context("no [[pools]]")?;
    let (pools, workloads) = lists.split_once("# [[workloads]]\n").context("no [[workloads]]")?;
    let document: toml_edit::DocumentMut = tables.parse()?;
    let mut sections = table(document.as_table())?;
    for (name, lines) in [("pools", pools), ("workloads", workloads)] {
        let keys: String =
            lines.lines().filter_map(|line| line.strip_prefix("# ")).map(|line| format!("{line}\n")).collect();
        // Prose before the next list has no `=`.
        let keys = keys.lines().filter(|line| line.contains(" = ")).collect::<Vec<_>>().join("\n");
        let mut one = table(keys.parse::<toml_edit::DocumentMut>()?.as_table())?;
        one["required"] = json!(["name"]);
        sections["properties"][name] = json!({ "type": "array", "items": one });
    }
    Ok(sections)
}

fn table(keys: &dyn TableLike) -> Result<Value> {
    let mut properties = serde_json::Map::new();
    for (key, item) in keys.iter() {
        let tables = item.as_array().and_then(|array| array.get(0)?.as_inline_table());
        let schema = match (item.as_table_like(), tables) {
            (Some(keys), _) => table(keys)?,
            (None, Some(one)) => json!({ "type": "array", "items": table(one)? }),
            (None, None) => schema_of(item).with_context(|| key.to_owned())?,
        };
        properties.insert(key.to_owned(), schema);
    }
    Ok(json!({ "type": "object", "additionalProperties": false, "properties": properties }))
}

#[test]
fn every_key_of_scaler_toml_is_in_the_schema_and_no_other() -> Result<()> {
    let wanted = schema_of_config(&fs::read_to_string(root().join("deploy/scaler.toml"))?)?;
    let mut schema = schema()?;
    let found = &mut schema["properties"]["scaler"]["properties"]["config"];
    if std::env::var_os("DARTER_GENERATE").is_some() {
        *found = wanted.clone();
        fs::write(path().join("values.schema.json"), serde_json::to_string_pretty(&schema)? + "\n")?;
        return Ok(());
    }
    assert!(
        *found == wanted,
        "deploy/helm/darter/values.schema.json is not what deploy/scaler.toml says; run: DARTER_GENERATE=1 cargo test \
        -p darter-tests --test chart every_key_of_scaler"
    );
    Ok(())
}

#[tokio::test]
async fn pods_of_the_scaler_follow_their_configuration_and_none_is_held_back() -> Result<()> {
    if !can_run("pods_of_the_scaler_follow_their_configuration_and_none_is_held_back", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let rendered = async |config: Value| -> Result<(Vec<Value>, Value)> {
        let objects = helm.render(&json!({ "scaler": { "enabled": true, "config": config } })).await?;
        let deployment = find(&objects, "Deployment", "darter-scaler")?.clone();
        Ok((objects, deployment))
    };
    let (objects, plain) = rendered(json!({})).await?;
    // The certificate is another one in each rendering: that alone is no reason to start pods anew.
    assert_eq!(plain, rendered(json!({})).await?.1);
    assert_ne!(plain, rendered(json!({ "log": { "level": "debug" } })).await?.1);
    // One is ready, whatever their number: a budget that counts them would keep its node from being drained for ever,
    // and an update that waits for another to be ready would wait for ever too.
    ensure!(!objects.iter().any(|object| object["kind"] == "PodDisruptionBudget"));
    let update = json!({ "type": "RollingUpdate", "rollingUpdate": { "maxSurge": "100%", "maxUnavailable": "100%" } });
    assert_eq!(plain["spec"]["strategy"], update);
    assert_eq!(find(&objects, "Service", "darter-scaler")?["spec"]["clusterIP"], "None");
    ensure!(find(&objects, "Service", "darter-scaler")?["spec"]["publishNotReadyAddresses"].is_null());
    Ok(())
}

#[tokio::test]
async fn agents_report_to_the_scaler_of_the_chart_and_know_it_by_its_secret() -> Result<()> {
    if !can_run("agents_report_to_the_scaler_of_the_chart_and_know_it_by_its_secret", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let reported = async |values: &Value| -> Result<(String, Value)> {
        let objects = helm.render(values).await?;
        let config = Layers::text("darter.toml".as_ref(), configuration(&objects)?.to_owned())?.config()?;
        let volumes = find(&objects, "DaemonSet", "darter")?["spec"]["template"]["spec"]["volumes"].clone();
        let volume = volumes.as_array().into_iter().flatten().find(|volume| volume["name"] == "report").cloned();
        let scaler = config.report.scaler.map(|scaler| scaler.to_string()).unwrap_or_default();
        Ok((scaler.trim_end_matches('/').to_owned(), volume.unwrap_or_default()["projected"]["sources"].clone()))
    };
    let token =
        json!({ "serviceAccountToken": { "audience": "darter-scaler", "expirationSeconds": 3600, "path": "token" } });
    let ca = |secret: &str| json!({ "secret": { "name": secret, "items": [{ "key": "ca.crt", "path": "ca.pem" }] } });
    let own = "https://darter-scaler.gpu-system.svc:4010";
    let enabled = json!({ "scaler": { "enabled": true } });
    assert_eq!(reported(&enabled).await?, (own.to_owned(), json!([token, ca("darter-scaler-tls")])));
    let everything = reported(&with_scaler()).await?;
    assert_eq!(everything, (own.replace("4010", "5010"), json!([token, ca("from-cert-manager")])));
    // Whoever names another is not overruled.
    let other = json!({ "scaler": { "enabled": true },
        "report": { "scaler": "https://s.example:4010", "caSecret": "theirs" } });
    assert_eq!(reported(&other).await?, ("https://s.example:4010".to_owned(), json!([token, ca("theirs")])));
    // And the certificate that the chart makes is one for that name, of that authority.
    let objects = helm.render(&enabled).await?;
    let secret = &find(&objects, "Secret", "darter-scaler-tls")?["data"];
    let pem = |key: &str| -> Result<Vec<u8>> { Ok(STANDARD.decode(secret[key].as_str().context("no such key")?)?) };
    handshake(&pem("ca.crt")?, &pem("tls.crt")?, &pem("tls.key")?, "darter-scaler.gpu-system.svc").await?;
    let wrong = handshake(&pem("ca.crt")?, &pem("tls.crt")?, &pem("tls.key")?, "other.gpu-system.svc").await;
    ensure!(wrong.is_err(), "a certificate for any name");
    Ok(())
}

/// Connects to a server of this name, as agents do.
async fn handshake(authority: &[u8], certificate: &[u8], key: &[u8], name: &str) -> Result<()> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority)?)?;
    let client = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let client = Arc::new(client.with_root_certificates(roots).with_no_client_auth());
    let chain = vec![CertificateDer::from_pem_slice(certificate)?];
    let server = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let server = server.with_no_client_auth().with_single_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?;
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (accepted, connected) = tokio::join!(
        TlsAcceptor::from(Arc::new(server)).accept(theirs),
        TlsConnector::from(client).connect(ServerName::try_from(name.to_owned())?, ours)
    );
    connected?;
    accepted?;
    Ok(())
}

#[tokio::test]
async fn keda_is_held_to_a_certificate_by_a_secret_of_the_values() -> Result<()> {
    if !can_run("keda_is_held_to_a_certificate_by_a_secret_of_the_values", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let volume = |objects: &[Value]| -> Result<Value> {
        let volumes = &find(objects, "Deployment", "darter-scaler")?["spec"]["template"]["spec"]["volumes"];
        Ok(volumes.as_array().into_iter().flatten().find(|one| one["name"] == "keda").cloned().unwrap_or_default())
    };
    let plain = helm.render(&json!({ "scaler": { "enabled": true } })).await?;
    assert!(
        volume(&plain)?.is_null() && told(&plain)?["grpc"].get("keda_ca").is_none(),
        "nothing is asked for unasked"
    );
    let objects = helm.render(&with_scaler()).await?;
    let toml = told(&objects)?;
    assert_eq!(toml["grpc"]["keda_ca"].as_str(), Some("/etc/darter-keda/ca.crt"));
    let names = toml["grpc"]["keda_names"].as_array().context("no names")?;
    assert_eq!(names.iter().map(|name| name.as_str()).collect::<Vec<_>>(), [Some("keda-operator.keda.svc")]);
    // The authority alone: a key beside it in that Secret is none of the scaler's business.
    let items = json!([{ "key": "ca.crt", "path": "ca.crt" }]);
    assert_eq!(volume(&objects)?["secret"], json!({ "secretName": "keda-ca", "defaultMode": 288, "items": items }));
    let container = &find(&objects, "Deployment", "darter-scaler")?["spec"]["template"]["spec"]["containers"][0];
    let mount = json!({ "name": "keda", "mountPath": "/etc/darter-keda", "readOnly": true });
    ensure!(container["volumeMounts"].as_array().is_some_and(|mounts| mounts.contains(&mount)), "{container:#}");
    let nameless = helm.template(&json!({ "scaler": { "enabled": true, "keda": { "names": ["x"] } } })).await?;
    ensure!(!nameless.status.success() && nameless.stderr.contains("scaler.keda.caSecret"), "{}", nameless.stderr);
    // The example has KEDA's side of it, to be taken out of the comments.
    let example = fs::read_to_string(root().join("deploy/examples/scaledobject.yaml"))?;
    let example = example.replace("    # - parameter", "    - parameter").replace("    #   ", "      ");
    let objects = darter_tests::chart::objects(&example)?;
    let parameters = objects[0]["spec"]["secretTargetRef"].as_array().context("no secretTargetRef")?;
    let parameters: Vec<_> = parameters.iter().map(|one| (one["parameter"].as_str(), one["key"].as_str())).collect();
    assert_eq!(
        parameters,
        [("caCert", "ca.crt"), ("tlsClientCert", "tls.crt"), ("tlsClientKey", "tls.key")]
            .map(|(parameter, key)| (Some(parameter), Some(key)))
    );
    Ok(())
}

/// A pod as the controllers make it of a template.
fn pod(template: &Value, name: &str) -> Value {
    let mut pod =
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"] });
    pod["metadata"]["namespace"] = json!(NAMESPACE);
    pod["metadata"]["name"] = json!(name);
    pod
}

#[tokio::test]
async fn the_scaler_runs_where_pods_are_restricted() -> Result<()> {
    if !can_run("the_scaler_runs_where_pods_are_restricted", &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let (helm, plane) = (Helm::new()?, ControlPlane::start(&Place::Host).await?);
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE,
        "labels": { "pod-security.kubernetes.io/enforce": "restricted" } } });
    plane.apply(&namespace).await?;
    for values in [json!({ "scaler": { "enabled": true } }), with_scaler()] {
        let objects = helm.render(&values).await?;
        for account in objects.iter().filter(|object| object["kind"] == "ServiceAccount") {
            plane.apply(account).await?;
        }
        let template = &find(&objects, "Deployment", "darter-scaler")?["spec"]["template"];
        let path =
            format!("/api/v1/namespaces/{NAMESPACE}/pods/a?fieldManager=tests&fieldValidation=Strict&dryRun=All");
        plane.call(Method::PATCH, &path, Some((APPLY, &pod(template, "a")))).await?;
        // It is enforced: an agent, which has of its host what the host's owner has, may not run there.
        let agent = pod(&find(&objects, "DaemonSet", "darter")?["spec"]["template"], "a");
        let refused = plane.call(Method::PATCH, &path, Some((APPLY, &agent))).await.err().context("it was taken")?;
        ensure!(format!("{refused:#}").contains("violates PodSecurity"), "{refused:#}");
    }
    Ok(())
}

/// What the scaler may do, as verbs of kinds in namespaces; "*" is everywhere.
type Rights = Vec<(&'static str, &'static str, &'static [&'static str])>;

const WATCH: &[&str] = &["list", "watch"];
const KINDS: [&str; 22] = [
    "nodes",
    "nodes/status",
    "pods",
    "pods/status",
    "pods/exec",
    "pods/eviction",
    "secrets",
    "configmaps",
    "serviceaccounts/token",
    "apps:deployments",
    "apps:deployments/scale",
    "karpenter.sh:nodeclaims",
    "karpenter.sh:nodepools",
    "karpenter.sh:nodepools/scale",
    "keda.sh:scaledobjects",
    "policy:poddisruptionbudgets",
    "autoscaling.x-k8s.io:capacitybuffers",
    "coordination.k8s.io:leases",
    "authentication.k8s.io:tokenreviews",
    "authorization.k8s.io:subjectaccessreviews",
    "events.k8s.io:events",
    "rbac.authorization.k8s.io:roles",
];

fn observing() -> Rights {
    vec![
        ("*", "nodes", WATCH),
        ("*", "pods", &["get", "list", "watch"]),
        ("*", "apps:deployments", WATCH),
        ("*", "karpenter.sh:nodeclaims", WATCH),
        ("*", "karpenter.sh:nodepools", WATCH),
        ("*", "keda.sh:scaledobjects", WATCH),
        ("*", "authentication.k8s.io:tokenreviews", &["create"]),
        ("*", "authorization.k8s.io:subjectaccessreviews", &["create"]),
        ("*", "events.k8s.io:events", &["create"]),
        (NAMESPACE, "coordination.k8s.io:leases", &["create"]),
    ]
}

/// All that it can be allowed, besides.
fn acting() -> Rights {
    let more: Rights = vec![
        ("*", "pods", &["patch"]),
        ("*", "nodes", &["get"]),
        ("*", "karpenter.sh:nodeclaims", &["get", "delete"]),
        ("*", "policy:poddisruptionbudgets", &["list"]),
        ("*", "karpenter.sh:nodepools", &["get"]),
        ("*", "karpenter.sh:nodepools/scale", &["patch"]),
        (NAMESPACE, "autoscaling.x-k8s.io:capacitybuffers", &["list", "patch"]),
        (NAMESPACE, "apps:deployments/scale", &["patch"]),
        (NAMESPACE, "configmaps", &["create"]),
    ];
    [observing(), more].concat()
}

#[tokio::test]
async fn the_scaler_may_do_what_is_on_and_no_more() -> Result<()> {
    if !can_run("the_scaler_may_do_what_is_on_and_no_more", &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let observes = (json!({ "scaler": { "enabled": true } }), "darter-scaler", observing());
    for (values, account, rights) in [observes, (with_scaler(), "theirs", acting())] {
        let cluster = Cluster::with("darter.dev/not-ready", &values).await?;
        let token = cluster.plane.service_account(NAMESPACE, account).await?;
        eventually("the rights are there", async || {
            cluster.may(&token, NAMESPACE, "create", "coordination.k8s.io:leases").await
        })
        .await?;
        for namespace in ["", NAMESPACE, "elsewhere"] {
            for kind in KINDS {
                for verb in ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"] {
                    let should = rights.iter().any(|(at, of, verbs)| {
                        (*at == namespace || *at == "*") && *of == kind && verbs.contains(&verb)
                    });
                    let may = cluster.may(&token, namespace, verb, kind).await?;
                    assert_eq!(may, should, "{account}: {verb} {kind} in `{namespace}`");
                }
            }
        }
        // Of these only its own.
        for (name, should) in [("darter-scaler", true), ("another", false)] {
            let path = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{name}");
            let answer = cluster.plane.call_as(&token, Method::GET, &path, None).await?;
            assert_eq!(answer.status != StatusCode::FORBIDDEN, should, "{name}: {}", answer.text());
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_scaler_changes_one_annotation_of_pods_and_nothing_else() -> Result<()> {
    if !can_run("the_scaler_changes_one_annotation_of_pods_and_nothing_else", &[Need::Helm, Need::Kubernetes]) {
        return Ok(());
    }
    let values = json!({ "scaler": { "enabled": true, "actuators": { "deletionCost": "on" } } });
    let cluster = Cluster::with("darter.dev/not-ready", &values).await?;
    let plane = &cluster.plane;
    // RBAC lets it do everything to pods: what is refused below is refused by the policy.
    let all = json!([{ "apiGroups": [""], "resources": ["pods", "pods/status", "pods/eviction"], "verbs": ["*"] }]);
    plane.allow_everywhere(NAMESPACE, "darter-scaler", &all).await?;
    let token = plane.service_account(NAMESPACE, "darter-scaler").await?;
    let pod = "/api/v1/namespaces/elsewhere/pods/agent-a";
    let annotation = |key: &str, value: Value| json!({ "metadata": { "annotations": { key: value } } });
    let cost = |value: &str| annotation("controller.kubernetes.io/pod-deletion-cost", json!(value));
    let merge = "application/merge-patch+json";
    let send = async |method: &Method, path: &str, body: &Value| {
        let media_type = if *method == Method::PATCH { merge } else { JSON };
        plane.call_as(&token, method.clone(), path, Some((media_type, body))).await
    };
    let is_refused = |status: StatusCode, text: &str, why: &str| {
        status == StatusCode::FORBIDDEN && text.contains("'gpu-system-darter-scaler'") && text.contains(why)
    };
    let mut last = String::new();
    let holds = eventually("the policy holds", async || {
        let answer = send(&Method::PATCH, &format!("{pod}?dryRun=All"), &annotation("a", json!("b"))).await?;
        last = answer.text();
        Ok(is_refused(answer.status, &last, "no annotation but"))
    });
    holds.await.with_context(|| last.clone())?;
    for value in ["-1000000", "0", "1000000"] {
        let answer = send(&Method::PATCH, pod, &cost(value)).await?;
        ensure!(answer.status.is_success(), "{value}: {}", answer.text());
    }
    let none = annotation("controller.kubernetes.io/pod-deletion-cost", Value::Null);
    let answer = send(&Method::PATCH, pod, &none).await?;
    ensure!(answer.status.is_success(), "none: {}", answer.text());
    // What ends a pod that runs.
    let deadline = json!({ "spec": { "activeDeadlineSeconds": 1 } });
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": { "name": "agent-a", "namespace": "elsewhere" } });
    let refused = [
        (Method::PATCH, pod.to_owned(), cost("-134217728"), "at most seven digits"),
        (Method::PATCH, pod.to_owned(), annotation("karpenter.sh/do-not-disrupt", json!("true")), "no annotation but"),
        (Method::PATCH, pod.to_owned(), json!({ "metadata": { "labels": { "a": "b" } } }), "metadata but annotations"),
        (Method::PATCH, pod.to_owned(), deadline, "spec or status"),
        (Method::PATCH, format!("{pod}/status"), json!({ "status": { "podIP": "10.0.0.9" } }), "runs nothing in them"),
        (Method::POST, format!("{pod}/eviction"), eviction, "makes, deletes and evicts no pods"),
        (Method::DELETE, pod.to_owned(), json!({}), "makes, deletes and evicts no pods"),
    ];
    for (method, path, body, why) in refused {
        let answer = send(&method, &path, &body).await?;
        ensure!(is_refused(answer.status, &answer.text(), why), "{body}: {} {}", answer.status, answer.text());
    }
    Ok(())
}
