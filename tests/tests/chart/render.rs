//! What helm makes of values, without a cluster.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use darter_agent::config::{DEFAULT, Layers};
use darter_tests::chart::{self, Helm, configuration, find};
use darter_tests::tools::{Need, can_run};
use serde_json::{Map, Value, json};

use super::shapes;

#[tokio::test]
async fn every_shape_is_clean_for_helm_and_its_configuration_for_darter() -> Result<()> {
    if !can_run("every_shape_is_clean_for_helm_and_its_configuration_for_darter", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let path = chart::path().display().to_string();
    for (name, values) in shapes() {
        let operator = name == "Prometheus Operator";
        if !operator {
            let lint = helm.run(&["lint", "--strict", &path], &values).await?;
            ensure!(lint.status.success(), "{name}: helm lint: {}{}", lint.stdout, lint.stderr);
        }
        let objects = helm.render(&values).await.context(name)?;
        let text = match name {
            "an account of others" => {
                find(&objects, "ConfigMap", "mirror")?["data"]["darter.toml"].as_str().context(name)?
            }
            _ => configuration(&objects).context(name)?,
        };
        let layers =
            Layers::text("darter.toml".as_ref(), text.to_owned()).with_context(|| format!("{name}: {text}"))?;
        let set = Layers::environment(layers, environment(&objects)?)?;
        set.config().with_context(|| format!("{name}: {text}"))?;
    }
    Ok(())
}

/// What the pods' containers have in their environment, with something for what the kubelet fills in.
fn environment(objects: &[Value]) -> Result<Vec<(String, String)>> {
    let sets: Vec<_> = objects.iter().filter(|object| object["kind"] == "DaemonSet").collect();
    let container = &sets.first().context("no DaemonSet")?["spec"]["template"]["spec"]["containers"][0];
    let variables = container["env"].as_array().context("no environment")?;
    let text = |value: &Value| value.as_str().unwrap_or("from-the-kubelet").to_owned();
    Ok(variables.iter().map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect())
}

#[tokio::test]
async fn a_value_below_config_reaches_darter_as_it_is() -> Result<()> {
    if !can_run("a_value_below_config_reaches_darter_as_it_is", &[Need::Helm]) {
        return Ok(());
    }
    let (_, values) = shapes().swap_remove(1);
    let objects = Helm::new()?.render(&values).await?;
    let config = Layers::text("darter.toml".as_ref(), configuration(&objects)?.to_owned())?.config()?;
    let registry = &config.registries[0];
    assert_eq!(config.registries.len(), 2);
    assert_eq!((registry.name.as_str(), registry.connections), ("registry.example.com", Some(8)));
    assert_eq!((config.store.verify_one_in, config.swarm.tls, config.swarm.max_members), (4, false, 2000));
    assert_eq!(config.mirror.listen.to_string(), "127.0.0.1:5001");
    assert_eq!((config.swarm.handover.0.as_secs(), config.agent.drain.0.as_secs()), (60, 30));
    let pod = &find(&objects, "DaemonSet", "darter")?["spec"]["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 70, "10 s more than the hand-over");
    Ok(())
}

#[tokio::test]
async fn pods_follow_their_configuration() -> Result<()> {
    if !can_run("pods_follow_their_configuration", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let template = async |values: Value| -> Result<Value> {
        Ok(find(&helm.render(&values).await?, "DaemonSet", "darter")?["spec"]["template"].clone())
    };
    let plain = template(json!({})).await?;
    // The key of the swarm is another one in each rendering: that alone is no reason to start pods anew.
    assert_eq!(plain, template(json!({})).await?);
    assert_ne!(plain, template(json!({ "config": { "log": { "level": "debug" } } })).await?);
    Ok(())
}

#[tokio::test]
async fn a_wrong_value_is_refused_and_named() -> Result<()> {
    if !can_run("a_wrong_value_is_refused_and_named", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    // What the user writes, and what the answer has to name.
    let wrong = [
        (json!({ "gpu": { "kmesg": true } }), "kmesg"),
        (json!({ "tolerate": [] }), "tolerate"),
        (json!({ "gpu": { "kmsg": "yes" } }), "/gpu/kmsg"),
        (json!({ "gpu": { "dcgmNames": false } }), "/gpu/dcgmNames"),
        (json!({ "ports": { "mirror": 70000 } }), "/ports/mirror"),
        (json!({ "image": { "digest": "sha256:abc" } }), "/image/digest"),
        (json!({ "report": { "scaler": "darter-scaler:4010" } }), "/report/scaler"),
        (json!({ "report": { "scaler": "https://s.example:4010" } }), "report.caSecret or report.caConfigMap"),
        (
            json!({ "report": { "scaler": "https://s.example:4010", "caSecret": "a", "caConfigMap": "b" } }),
            "only one of the two",
        ),
        (json!({ "report": { "caSecret": "a" } }), "without a meaning where report.scaler"),
        (json!({ "host": { "dataDir": "darter" } }), "/host/dataDir"),
        (json!({ "updateStrategy": { "maxUnavailable": 0 } }), "/updateStrategy/maxUnavailable"),
        (json!({ "config": { "miror": {} } }), "miror"),
        (json!({ "config": { "mirror": { "stal": "8s" } } }), "stal"),
        (json!({ "config": { "mirror": { "stall": 8 } } }), "/config/mirror/stall"),
        (json!({ "config": { "registry": [{ "access": "node" }] } }), "name"),
        (json!({ "config": { "registry": [{ "name": "a", "acces": "node" }] } }), "acces"),
        (json!({ "config": { "gpu": { "kmsg": true } } }), "config.gpu.kmsg: not to be set here: set gpu.kmsg"),
        (json!({ "config": { "kubernetes": { "node": "a" } } }), "config.kubernetes.node: not to be set here"),
        (json!({ "serviceAccount": { "create": false } }), "serviceAccount.name"),
        (json!({ "admin": { "address": "::" } }), "/admin/address"),
        (json!({ "scaler": { "actuators": { "remove": "yes" } } }), "/scaler/actuators/remove"),
        (json!({ "scaler": { "enabled": true, "replica": 2 } }), "replica"),
        (json!({ "scaler": { "replicas": 0 } }), "/scaler/replicas"),
        (json!({ "scaler": { "config": { "polcy": {} } } }), "polcy"),
        (json!({ "scaler": { "config": { "policy": { "rails": { "gpus_mst": 64 } } } } }), "gpus_mst"),
        (json!({ "scaler": { "config": { "pools": [{ "gpus": 1 }] } } }), "name"),
        (json!({ "scaler": { "config": { "workloads": [{ "name": "a/b", "least": "1" }] } } }), "least"),
        (
            json!({ "scaler": { "enabled": true, "config": { "actuators": { "remove": "on" } } } }),
            "scaler.config.actuators.remove: not to be set here: set scaler.actuators.remove",
        ),
        (
            json!({ "scaler": { "enabled": true, "config": { "grpc": { "insecure": true } } } }),
            "scaler.config.grpc.insecure: not to be set here: set scaler.tls",
        ),
        (json!({ "scaler": { "enabled": true, "serviceAccount": { "create": false } } }), "scaler.serviceAccount.name"),
        (json!({ "scaler": { "enabled": true }, "report": { "audience": "" } }), "report.audience: needed"),
        (
            json!({ "podMonitor": { "enabled": true }, "admin": { "address": "127.0.0.1" } }),
            "podMonitor.enabled: nobody can scrape admin.address 127.0.0.1",
        ),
    ];
    for (values, named) in wrong {
        let output = helm.template(&values).await?;
        ensure!(!output.status.success(), "{values} was taken");
        ensure!(output.stderr.contains(named), "{values}: the answer does not name {named}: {}", output.stderr);
    }
    let path = chart::path().display().to_string();
    for kind in ["podMonitor", "prometheusRule"] {
        let output = helm.run(&["template", "darter", &path], &json!({ kind: { "enabled": true } })).await?;
        let told = output.stderr.contains(&format!("{kind}.enabled: this cluster has no monitoring.coreos.com/v1"));
        ensure!(!output.status.success() && told, "{kind}: {}", output.stderr);
    }
    Ok(())
}

#[tokio::test]
async fn what_more_hangs_on_than_a_line_of_darter_toml_is_a_value_and_no_line() -> Result<()> {
    if !can_run("what_more_hangs_on_than_a_line_of_darter_toml_is_a_value_and_no_line", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    // What the chart itself writes into darter.toml, and what it sets in the environment.
    let objects = helm.render(&json!({})).await?;
    let own: toml_edit::DocumentMut = configuration(&objects)?.parse()?;
    let tables = own.iter().filter_map(|(section, keys)| Some((section, keys.as_table()?)));
    let written =
        tables.flat_map(|(section, keys)| keys.iter().map(move |(key, _)| (section.to_owned(), key.to_owned())));
    let named = [
        ("kubernetes", "node"),
        ("kubernetes", "kubeconfig"),
        ("swarm", "zone"),
        ("report", "scaler"),
        ("report", "token_file"),
        ("report", "ca"),
    ];
    let keys = written.chain(named.map(|(section, key)| (section.to_owned(), key.to_owned())));
    let defaults: toml_edit::DocumentMut = DEFAULT.parse()?;
    let mut refused = 0;
    for (section, key) in keys {
        let default = defaults[&section][&key].as_value().with_context(|| format!("no key {section}.{key}"))?;
        let value = default.as_bool().map_or_else(|| json!(default.as_str()), Value::from);
        let output = helm.template(&json!({ "config": { &section: { &key: value } } })).await?;
        // Four are defaults of the chart, which users may have otherwise.
        if matches!(
            (section.as_str(), key.as_str()),
            ("containerd", "content_store") | ("swarm", "service" | "endpoint_port") | ("gpu", "driver_grace")
        ) {
            ensure!(output.status.success(), "{section}.{key}: {}", output.stderr);
            continue;
        }
        let told = output.stderr.contains(&format!("config.{section}.{key}: not to be set here"));
        ensure!(!output.status.success() && told, "{section}.{key}: {}", output.stderr);
        refused += 1;
    }
    assert!(refused > 15, "only {refused}");
    Ok(())
}

/// The keys that have a value, and no comment right before them.
fn undocumented(text: &str) -> Vec<String> {
    let (mut missing, mut told) = (Vec::new(), false);
    for line in text.lines().map(str::trim_start) {
        match line.split_once(':').filter(|_| !line.starts_with(['#', '-'])) {
            // A group is described by its keys.
            Some((key, value)) if !told && !value.trim().is_empty() => missing.push(key.to_owned()),
            _ => {}
        }
        told = line.starts_with('#');
    }
    missing
}

/// Keys of values.yaml that the schema does not know, or the other way round.
fn apart(values: &Value, schema: &Value, at: &str, found: &mut Vec<String>) {
    let (Some(values), Some(known)) = (values.as_object(), schema["properties"].as_object()) else { return };
    if schema["additionalProperties"] != false {
        found.push(format!("{at}: additionalProperties is not false"));
    }
    for key in values.keys().filter(|key| !known.contains_key(*key)) {
        found.push(format!("{at}.{key}: not in the schema"));
    }
    for (key, schema) in known.iter().filter(|(key, _)| *key != "global" && at != ".config") {
        match values.get(key) {
            Some(value) => apart(value, schema, &format!("{at}.{key}"), found),
            // What is empty by default: what may be in it is the schema's to say.
            None if values.is_empty() => {}
            None => found.push(format!("{at}.{key}: not in values.yaml")),
        }
    }
}

#[test]
fn every_value_is_described_and_the_schema_knows_the_same() -> Result<()> {
    let text = fs::read_to_string(chart::path().join("values.yaml"))?;
    assert_eq!(undocumented(&text), [""; 0], "values.yaml: keys without a comment before them");
    assert_eq!(undocumented("# A group.\na:\n  b: 1\n  # Told.\n  c: 2\n  d: 3\n"), ["b", "d"]);
    let [values] = &chart::objects(&text)?[..] else { panic!("values.yaml is one document") };
    let schema = schema()?;
    let mut found = Vec::new();
    apart(values, &schema, "", &mut found);
    // Empty by default, and of Kubernetes' own making.
    found.retain(|line| !line.starts_with(".config:"));
    assert_eq!(found, [""; 0]);
    Ok(())
}

pub(crate) fn schema() -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(chart::path().join("values.schema.json"))?)?)
}

/// What the schema should say of `config`: the sections and keys of `darter config default`, with the types that
/// they have there.
fn schema_of_config() -> Result<Value> {
    let object =
        |keys: Map<String, Value>| json!({ "type": "object", "additionalProperties": false, "properties": keys });
    let mut sections = Map::new();
    for (section, keys) in DEFAULT.parse::<toml_edit::DocumentMut>()?.iter() {
        let keys = keys.as_table().context("a section")?.iter();
        let keys: Result<_> = keys.map(|(key, item)| Ok((key.to_owned(), schema_of(item)?))).collect();
        sections.insert(section.to_owned(), object(keys?));
    }
    // Commented out there, since there is no registry by default.
    let (_, lines) = DEFAULT.split_once("# [[registry]]\n").context("no [[registry]]")?;
    let keys: String = lines.lines().map(|line| line.trim_start_matches("# ").to_owned() + "\n").collect();
    let keys = keys.parse::<toml_edit::DocumentMut>()?;
    let keys: Result<_> = keys.iter().map(|(key, item)| Ok((key.to_owned(), schema_of(item)?))).collect();
    let mut registry = object(keys?);
    registry["required"] = json!(["name"]);
    sections.insert("registry".to_owned(), json!({ "type": "array", "items": registry }));
    Ok(object(sections))
}

pub(crate) fn schema_of(item: &toml_edit::Item) -> Result<Value> {
    Ok(match item.as_value().context("a key has a value")? {
        toml_edit::Value::String(_) => json!({ "type": "string" }),
        toml_edit::Value::Integer(_) => json!({ "type": "integer" }),
        toml_edit::Value::Boolean(_) => json!({ "type": "boolean" }),
        toml_edit::Value::Array(_) => json!({ "type": "array", "items": { "type": ["string", "integer"] } }),
        other => anyhow::bail!("the chart's schema has no type for {other}"),
    })
}

#[test]
fn the_schema_knows_every_key_of_darters_configuration() -> Result<()> {
    let (mut schema, wanted) = (schema()?, schema_of_config()?);
    if std::env::var_os("DARTER_GENERATE").is_some() {
        schema["properties"]["config"] = wanted.clone();
        fs::write(chart::path().join("values.schema.json"), serde_json::to_string_pretty(&schema)? + "\n")?;
    }
    assert!(
        schema["properties"]["config"] == wanted,
        "deploy/helm/darter/values.schema.json is not what \
        default.toml says; run: DARTER_GENERATE=1 cargo test -p darter-tests --test chart schema_knows"
    );
    Ok(())
}

#[test]
fn the_chart_is_of_this_version() -> Result<()> {
    let text = fs::read_to_string(chart::path().join("Chart.yaml"))?;
    let [chart] = &chart::objects(&text)?[..] else { panic!("Chart.yaml is one document") };
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    Ok(())
}

#[test]
fn the_chart_has_the_alerts_of_deploy() -> Result<()> {
    // Helm reads nothing outside of a chart.
    let (own, copy) = (chart::root().join("deploy/alerts"), chart::path().join("files/alerts"));
    let names = |dir: &std::path::Path| -> Result<BTreeSet<_>> {
        Ok(fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
    };
    assert_eq!(names(&own)?, names(&copy)?);
    for name in names(&own)? {
        let same = fs::read(own.join(&name))? == fs::read(copy.join(&name))?;
        assert!(same, "cp deploy/alerts/{0} deploy/helm/darter/files/alerts/{0}", name.display());
    }
    Ok(())
}

#[tokio::test]
async fn the_alerts_reach_prometheus_as_they_are() -> Result<()> {
    if !can_run("the_alerts_reach_prometheus_as_they_are", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let groups_of = async |scaler: bool| -> Result<Value> {
        let values = json!({ "prometheusRule": { "enabled": true }, "scaler": { "enabled": scaler } });
        Ok(find(&helm.render(&values).await?, "PrometheusRule", "darter")?["spec"]["groups"].clone())
    };
    let mut files: Vec<_> =
        fs::read_dir(chart::root().join("deploy/alerts"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    let mut groups = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file)?;
        let [alerts] = &chart::objects(&text)?[..] else { panic!("{} is one document", file.display()) };
        groups.extend(alerts["groups"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!(groups_of(true).await?, json!(groups));
    // That no scaler is seen is no trouble where there is none.
    groups.retain(|group| group["name"] != "darter-scaler");
    assert_eq!(groups_of(false).await?, json!(groups));
    Ok(())
}

/// The pod of a shape.
async fn pod(helm: &Helm, values: Value) -> Result<Value> {
    Ok(find(&helm.render(&values).await?, "DaemonSet", "darter")?["spec"]["template"]["spec"].clone())
}

/// What it mounts of the host, and whether it may write there.
fn mounts(pod: &Value) -> Result<Vec<(String, bool)>> {
    let named = |list: &Value, name: &Value| list.as_array()?.iter().find(|entry| entry["name"] == *name).cloned();
    let mounts = pod["containers"][0]["volumeMounts"].as_array().context("no mounts")?;
    let mut found = Vec::new();
    for mount in mounts {
        let volume = named(&pod["volumes"], &mount["name"]).with_context(|| format!("{mount} has no volume"))?;
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            ensure!(mount["mountPath"] == path, "{path} is elsewhere in the container");
            found.push((path.to_owned(), mount["readOnly"] != true));
        }
    }
    Ok(found)
}

#[tokio::test]
async fn a_pod_has_of_its_host_what_its_values_need_and_no_more() -> Result<()> {
    if !can_run("a_pod_has_of_its_host_what_its_values_need_and_no_more", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let plain = pod(&helm, json!({})).await?;
    let context = json!({ "runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true,
        "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    assert_eq!(plain["containers"][0]["securityContext"], context);
    assert_eq!(plain["securityContext"], json!({ "seccompProfile": { "type": "RuntimeDefault" } }));
    assert_eq!(plain["hostNetwork"], true);
    assert_eq!((&plain["hostPID"], &plain["hostIPC"]), (&Value::Null, &Value::Null));
    assert_eq!(plain["tolerations"], json!([{ "operator": "Exists" }]), "every taint");
    assert_eq!(plain["priorityClassName"], "system-node-critical");
    assert_eq!(plain["dnsPolicy"], "ClusterFirstWithHostNet");
    assert_eq!(plain["terminationGracePeriodSeconds"], 30);
    let owned =
        |list: &[(&str, bool)]| list.iter().map(|(path, write)| ((*path).to_owned(), *write)).collect::<Vec<_>>();
    let always = [
        ("/var/lib/darter", true),
        ("/run/darter", true),
        ("/etc/containerd", false),
        ("/etc/containerd/certs.d", true),
    ];
    let pods = ("/var/lib/kubelet/pod-resources", false);
    assert_eq!(mounts(&plain)?, owned(&[&always[..], &[pods]].concat()));
    assert_eq!(mounts(&pod(&helm, json!({ "gpu": { "mode": "off" } })).await?)?, owned(&always));
    let locked = mounts(&pod(&helm, json!({ "config": { "certs_d": { "write": false } } })).await?)?;
    assert!(locked.contains(&("/etc/containerd/certs.d".to_owned(), false)), "{locked:?}");
    // Each of these values opens what it says, and nothing else does.
    let privileged = json!({ "runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true, "privileged": true });
    let kmsg = pod(&helm, json!({ "gpu": { "kmsg": true } })).await?;
    assert_eq!(kmsg["containers"][0]["securityContext"], privileged);
    assert!(mounts(&kmsg)?.contains(&("/dev/kmsg".to_owned(), false)));
    let driver = pod(&helm, json!({ "gpu": { "driverRoot": "/run/nvidia/driver" } })).await?;
    assert_eq!(driver["containers"][0]["securityContext"], privileged);
    // What NVIDIA's runtime hands in for MIG devices it gives to whoever has this capability, and refuses to others.
    let parts = pod(&helm, json!({ "gpu": { "migMonitor": true } })).await?;
    let asks = |pod: &Value| {
        let variables = pod["containers"][0]["env"].as_array().into_iter().flatten();
        variables.filter(|variable| variable["name"] == "NVIDIA_MIG_MONITOR_DEVICES").count() == 1
    };
    let administers = json!({ "runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"], "add": ["SYS_ADMIN"] } });
    assert_eq!((&parts["containers"][0]["securityContext"], asks(&parts), asks(&plain)), (&administers, true, false));
    let both = pod(&helm, json!({ "gpu": { "migMonitor": true, "kmsg": true } })).await?;
    assert_eq!((&both["containers"][0]["securityContext"], asks(&both)), (&privileged, true));
    let off = pod(&helm, json!({ "gpu": { "migMonitor": true, "mode": "off" } })).await?;
    assert_eq!((&off["containers"][0]["securityContext"], asks(&off)), (&context, false));
    let processes = pod(&helm, json!({ "gpu": { "processes": true } })).await?;
    assert_eq!((&processes["hostPID"], &processes["containers"][0]["securityContext"]), (&json!(true), &context));
    Ok(())
}

#[tokio::test]
async fn the_scaler_is_shown_a_token_that_is_good_for_nothing_else() -> Result<()> {
    if !can_run("the_scaler_is_shown_a_token_that_is_good_for_nothing_else", &[Need::Helm]) {
        return Ok(());
    }
    let helm = Helm::new()?;
    let reported = async |report: Value| -> Result<(darter_agent::config::Report, Value, Value)> {
        let objects = helm.render(&json!({ "report": report })).await?;
        let config = Layers::text("darter.toml".as_ref(), configuration(&objects)?.to_owned())?.config()?;
        let pod = &find(&objects, "DaemonSet", "darter")?["spec"]["template"]["spec"];
        let named = |list: &Value| {
            let found = list.as_array().into_iter().flatten().find(|entry| entry["name"] == "report");
            found.cloned().unwrap_or_default()
        };
        Ok((config.report, named(&pod["containers"][0]["volumeMounts"]), named(&pod["volumes"])))
    };
    let https = json!({ "scaler": "https://s.example:4010", "caSecret": "scaler-tls" });
    let (config, mount, volume) = reported(https).await?;
    let at = |path: Option<std::path::PathBuf>| path.map(|path| path.display().to_string()).unwrap_or_default();
    let dir = mount["mountPath"].as_str().context("no mount")?;
    assert_eq!((at(config.token_file), at(config.ca)), (format!("{dir}/token"), format!("{dir}/ca.pem")));
    let token =
        json!({ "serviceAccountToken": { "audience": "darter-scaler", "expirationSeconds": 3600, "path": "token" } });
    let ca = json!({ "secret": { "name": "scaler-tls", "items": [{ "key": "ca.crt", "path": "ca.pem" }] } });
    assert_eq!(volume["projected"], json!({ "defaultMode": 256, "sources": [token, ca] }));
    // Nobody is sent the API server's, whatever is not set.
    for report in [json!({}), json!({ "scaler": "http://127.0.0.1:4010", "audience": "" })] {
        let (config, mount, volume) = reported(report).await?;
        assert_eq!((at(config.token_file), mount, volume), (String::new(), Value::Null, Value::Null));
    }
    Ok(())
}

#[tokio::test]
async fn with_a_runtime_class_nodes_without_gpus_keep_the_ordinary_runtime() -> Result<()> {
    if !can_run("with_a_runtime_class_nodes_without_gpus_keep_the_ordinary_runtime", &[Need::Helm]) {
        return Ok(());
    }
    let objects = Helm::new()?.render(&json!({ "gpu": { "runtimeClass": "nvidia" } })).await?;
    let told = |end: &str| -> Result<(Value, Value, Value)> {
        let set = &find(&objects, "DaemonSet", end)?["spec"];
        let required = "requiredDuringSchedulingIgnoredDuringExecution";
        let pod = &set["template"]["spec"];
        let term = &pod["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"][0]["matchExpressions"][0];
        Ok((pod["runtimeClassName"].clone(), term.clone(), set["selector"]["matchLabels"]["darter.dev/set"].clone()))
    };
    let term = |operator: &str| json!({ "key": "nvidia.com/gpu.present", "operator": operator });
    assert_eq!(told("darter")?, (Value::Null, term("DoesNotExist"), json!("all")));
    assert_eq!(told("darter-gpu")?, (json!("nvidia"), term("Exists"), json!("gpu")));
    Ok(())
}
