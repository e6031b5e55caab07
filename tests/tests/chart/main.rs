//! The Helm chart: what it makes of its values, by the real helm; what a real API server takes of that; and what
//! an agent with the rights that it grants may do to nodes and pods, and what not.

mod admission;
mod alerts;
mod cluster;
mod live;
mod render;
mod scaler;
mod writes;

use serde_json::{Value, json};

/// The shapes in which the chart is checked, by name: together they render every line of every template.
fn shapes() -> Vec<(&'static str, Value)> {
    let registry = json!({ "name": "registry.example.com", "access": "node", "username": "reader",
        "password_file": "/etc/darter-secrets/login/password", "origins": ["https://harbor.example.com"], "connections": 8 });
    let everything = json!({
        "image": { "repository": "registry.example.com/darter", "digest": format!("sha256:{}", "a".repeat(64)) },
        "imagePullSecrets": [{ "name": "pull" }],
        "config": { "store": { "limit": "200GiB", "verify_one_in": 4 }, "log": { "format": "json" },
            "gpu": { "xid_fatal": [74], "device_plugin": false }, "swarm": { "tls": false, "max_members": 2000 },
            "registry": [registry, { "name": "docker.io", "access": "public" }] },
        "drainSeconds": 30, "ports": { "mirror": 5001 }, "secrets": ["login"],
        "swarm": { "zone": "us-east-1a", "handoverSeconds": 60 },
        "gpu": { "dcgmNames": "legacy" },
        "report": { "scaler": "https://darter-scaler.gpu-system.svc:4010", "audience": "scaler.example",
            "caConfigMap": "scaler-ca", "caKey": "root.pem" },
        "host": { "laterCertsDirs": ["/etc/docker/certs.d"], "containerdSocket": "/run/containerd/containerd.sock",
            "containerdContent": "/var/lib/containerd/io.containerd.content.v1.content" },
        "nodeSelector": { "darter": "yes" }, "affinity": { "podAntiAffinity": {} },
        "seLinuxOptions": { "type": "spc_t" }, "podAnnotations": { "a": "b" }, "podLabels": { "c": "d" },
        "serviceAccount": { "annotations": { "eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/darter" } },
    });
    vec![
        ("defaults", json!({})),
        ("everything", everything),
        ("no GPUs", json!({ "gpu": { "mode": "off" } })),
        ("processes", json!({ "gpu": { "processes": true } })),
        ("MIG devices", json!({ "gpu": { "migMonitor": true } })),
        ("kernel log", json!({ "gpu": { "kmsg": true } })),
        ("driver root", json!({ "gpu": { "driverRoot": "/run/nvidia/driver", "dcgmNames": "v49" } })),
        ("runtime class", json!({ "gpu": { "runtimeClass": "nvidia" } })),
        ("a Secret of others", json!({ "swarm": { "existingSecret": "from-vault", "existingSecretKey": "psk" } })),
        ("alone", json!({ "swarm": { "enabled": false } })),
        ("locked host", json!({ "config": { "certs_d": { "write": false } } })),
        ("a closed admin endpoint", json!({ "admin": { "address": "127.0.0.1" } })),
        ("replaced by hand", json!({ "updateStrategy": { "type": "OnDelete" } })),
        ("many at once", json!({ "updateStrategy": { "maxUnavailable": "10%" } })),
        (
            "an account of others",
            json!({ "serviceAccount": { "create": false, "name": "theirs" }, "rbac": { "create": false },
            "admissionPolicy": { "enabled": false }, "fullnameOverride": "mirror" }),
        ),
        (
            "a scaler known by a Secret",
            json!({ "report": { "scaler": "https://s.example:4010", "caSecret": "scaler-tls" } }),
        ),
        (
            "a scaler that asks for no token",
            json!({ "report": { "scaler": "http://s.example:4010", "audience": "" }, "config": { "report": { "insecure": true } } }),
        ),
        ("a scaler of its own", json!({ "scaler": { "enabled": true } })),
        ("a scaler with everything", with_scaler()),
        (
            "IPv6",
            json!({ "swarm": { "address": "[::]" }, "admin": { "address": "[::]" },
            "scaler": { "enabled": true, "address": "[::]", "networkPolicy": { "enabled": false } } }),
        ),
        (
            "Prometheus Operator",
            json!({ "podMonitor": { "enabled": true, "labels": { "release": "prometheus" } },
            "prometheusRule": { "enabled": true }, "scaler": { "enabled": true } }),
        ),
    ]
}

/// A scaler that may do all that it can, with everything set.
fn with_scaler() -> Value {
    let on: serde_json::Map<_, _> = ["keda", "protect", "copy", "deletionCost", "buffer", "remove"]
        .into_iter()
        .map(|actuator| (actuator.to_owned(), json!("on")))
        .collect();
    let pool = json!({ "name": "l4", "nodes": ["gpu-l4-"], "price_per_hour": "0.80", "gpus": 1, "nodes_most": 20 });
    let floor = json!({ "days": "mon-fri", "from": "08:00", "to": "18:00", "replicas": 2 });
    let workload = json!({ "name": "models/llm", "pool": "l4", "most": 10, "floors": [floor] });
    let config = json!({ "log": { "format": "json" }, "pools": [pool], "workloads": [workload],
        "policy": { "report_period_ms": 2000, "rails": { "micros_per_hour_most": 64_000_000_000_u64 } } });
    let policy = json!({ "agents": ["10.0.0.0/16"], "keda": "keda-system", "http": ["monitoring"],
        "egress": [{ "ports": [{ "port": 9090, "protocol": "TCP" }] }] });
    let scaler = json!({ "enabled": true, "config": config, "replicas": 3, "ports": { "grpc": 5010, "http": 5011 },
        "tls": { "existingSecret": "from-cert-manager" },
        "keda": { "caSecret": "keda-ca", "names": ["keda-operator.keda.svc"] }, "actuators": on, "staticPools": true,
        "record": { "size": "1Gi" }, "networkPolicy": policy, "nodeSelector": { "pool": "system" }, "onGpuNodes": true,
        "tolerations": [{ "operator": "Exists" }], "podAnnotations": { "a": "b" }, "podLabels": { "c": "d" },
        "serviceAccount": { "name": "theirs", "annotations": { "e": "f" } } });
    json!({ "imagePullSecrets": [{ "name": "pull" }], "scaler": scaler })
}
