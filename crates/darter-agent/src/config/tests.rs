//! Every wrong configuration names the layer, the key and in a file the line.

use std::path::Path;

use super::*;

fn file(text: &str) -> Result<Config, String> {
    Layers::text(Path::new("darter.toml"), text.to_owned())
        .and_then(|layers| layers.config())
        .map_err(|error| error.to_string())
}

fn refused(text: &str) -> String {
    file(text).expect_err(text)
}

#[test]
fn the_embedded_default_is_right_and_prints_as_itself() {
    let config = Config::embedded();
    assert_eq!(config.mirror.listen.to_string(), "127.0.0.1:4001");
    assert!(config.registries.is_empty() && config.containerd.socket.is_none());
    assert!(config.swarm.tls, "plaintext is for those who ask for it");
    let printed = Layers::embedded().print().unwrap();
    assert_eq!(Layers::text(Path::new("printed"), printed.clone()).unwrap().print().unwrap(), printed);
}

#[test]
fn an_empty_file_is_the_default() {
    assert!(file("").is_ok());
    assert!(file("[mirror]\n").is_ok());
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let error = refused("[mirror]\nlisten = \"127.0.0.1:1\"\nlissten = \"x\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("lissten"), "{error}");
    let error = refused("[miror]\nlisten = \"127.0.0.1:1\"\n");
    assert!(error.starts_with("darter.toml:1: ") && error.contains("miror"), "{error}");
    let error = refused("\n[[registry]]\nname = \"a.example\"\nacces = \"node\"\n");
    assert!(error.starts_with("darter.toml:4: ") && error.contains("acces"), "{error}");
}

#[test]
fn a_fault_is_blamed_on_its_own_line_whatever_section_stands_before_it() {
    let sections: Vec<_> = DEFAULT.lines().filter(|line| line.starts_with('[')).collect();
    assert!(sections.len() > 10, "only {sections:?}");
    for section in sections {
        let error = refused(&format!("{section}\n[miror]\n"));
        assert!(error.starts_with("darter.toml:2: ") && error.contains("miror"), "after {section}: {error}");
    }
}

#[test]
fn pins_that_would_take_the_store_or_never_end_are_refused() {
    let error = refused("[store]\npin_share = \"91%\"\n");
    assert!(error.starts_with("darter.toml:2: ") && error.contains("store.pin_share"), "{error}");
    let error = refused("[store]\nlimit = \"1GiB\"\npin_for = \"31d\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("store.pin_for: must be at most 30d"), "{error}");
    assert!(file("[store]\npin_for = \"0\"\npin_share = \"0%\"\n").unwrap().store.pin_for.0.is_zero());
}

#[test]
fn what_a_new_node_waits_for_has_a_key_a_bound_and_names() {
    let error = refused("[kubernetes]\nstartup_taint = \"darter.dev/not-ready:NoSchedule\"\n");
    assert!(error.starts_with("darter.toml:2: kubernetes.startup_taint: must be the key"), "{error}");
    for key in ["/a", "a/", "-a", "a b", "a/b/c"] {
        let error = refused(&format!("[kubernetes]\nstartup_taint = \"{key}\"\n"));
        assert!(error.starts_with("darter.toml:2: kubernetes.startup_taint"), "{error}");
    }
    assert!(file("[kubernetes]\nstartup_taint = \"\"\n").unwrap().kubernetes.startup_taint.is_none());
    assert!(file("[kubernetes]\nstartup_taint = \"not-ready_2.x\"\n").is_ok());
    let error = refused("[kubernetes]\nstartup_deadline = \"0s\"\n");
    assert!(error.contains("kubernetes.startup_deadline: must be from 1s to 1h"), "{error}");
    let error = refused("[prewarm]\nimages = [\"registry.example/a:b\", \"no registry\"]\n");
    assert!(error.starts_with("darter.toml:2: prewarm.images") && error.contains("no registry"), "{error}");
    let many: Vec<_> = (0..65).map(|number| format!("\"registry.example/a:v{number}\"")).collect();
    let error = refused(&format!("[prewarm]\nimages = [{}]\n", many.join(", ")));
    assert!(error.contains("prewarm.images: must be at most 64"), "{error}");
}

#[test]
fn a_wrong_unit_or_type_is_named_with_its_line() {
    let error = refused("[mirror]\nprefetch_layers = 2\nstall = \"8\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("stall") && error.contains("unit"), "{error}");
    let error = refused("[store]\nlimit = \"110%\"\n");
    assert!(error.starts_with("darter.toml:2: ") && error.contains("limit"), "{error}");
    let error = refused("[store]\nlimit = 5\n");
    assert!(error.starts_with("darter.toml:2: ") && error.contains("limit"), "{error}");
    let error = refused("[mirror\n");
    assert!(error.starts_with("darter.toml:1: "), "{error}");
}

#[test]
fn an_impossible_combination_is_named_with_its_line() {
    let error = refused("[log]\nlevel = \"info\"\n[admin]\nlisten = \"127.0.0.1:4001\"\n");
    assert!(error.starts_with("darter.toml:4: admin.listen"), "{error}");
    let error = refused("[mirror]\ndefault_registry = \"a.example\"\n");
    assert!(error.starts_with("darter.toml:2: mirror.default_registry"), "{error}");
    let error =
        refused("[[registry]]\nname = \"a.example\"\n[[registry]]\nname = \"b.example\"\nendpoint = \"http://x\"\n");
    assert!(error.starts_with("darter.toml:5: registry[1].endpoint") && error.contains("plain_http"), "{error}");
    let error = refused("[[registry]]\nname = \"a.example\"\n[[registry]]\nname = \"a.example\"\n");
    assert!(error.starts_with("darter.toml:4: registry[1].name"), "{error}");
    let error = refused("[mirror]\nlisten = \"0.0.0.0:4001\"\n");
    assert!(error.starts_with("darter.toml:2: mirror.listen") && error.contains("allow_remote"), "{error}");
    assert!(file("[mirror]\nlisten = \"0.0.0.0:4001\"\nallow_remote = true\n").is_ok());
    let error = refused("[mirror]\nanswer_within = \"31s\"\n");
    assert!(error.starts_with("darter.toml:2: mirror.answer_within"), "{error}");
    let error = refused("[mirror]\nlinger = \"11m\"\n");
    assert!(error.starts_with("darter.toml:2: mirror.linger") && error.contains("10m"), "{error}");
    assert!(file("[mirror]\nlinger = \"0s\"\n").is_ok(), "nobody has to be waited for");
}

#[test]
fn a_swarm_that_cannot_work_is_named_with_its_line() {
    let error = refused("[swarm]\nkey_file = \"/k\"\nlisten = \"0.0.0.0:4001\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.listen") && error.contains("mirror.listen"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nexchange_listen = \"0.0.0.0:4002\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.exchange_listen"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\npeers = [\"10.0.0.1\"]\n");
    assert!(error.starts_with("darter.toml:3: swarm.peers") && error.contains("10.0.0.1:4002"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\ndns = \"http://x\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.dns"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nscope = \"zone\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.scope") && error.contains("needs swarm.zone"), "{error}");
    assert!(file("[swarm]\nkey_file = \"/k\"\nscope = \"zone\"\nzone = \"a\"\n").is_ok());
    let error = refused("[swarm]\nkey_file = \"/k\"\nscope = \"region\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("cluster"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nmax_members = 1\n");
    assert!(error.starts_with("darter.toml:3: swarm.max_members"), "{error}");
    for (handover, wanted) in [("11m", "must be at most 10m"), ("0s", "must be longer than nothing")] {
        let error = refused(&format!("[swarm]\nkey_file = \"/k\"\nhandover = \"{handover}\"\n"));
        assert!(error.starts_with("darter.toml:3: swarm.handover: ") && error.contains(wanted), "{error}");
    }
    let error = refused("[seed]\nenabled = true\n");
    assert!(error.starts_with("darter.toml:2: seed.enabled") && error.contains("swarm.key_file"), "{error}");
    let error = refused("[swarm]\ndns = \"darter.gpu.svc\"\n");
    assert!(error.contains("swarm.key_file") && error.contains("without a key"), "{error}");
    assert!(file("[swarm]\nkey_file = \"/k\"\ndns = \"darter.gpu.svc\"\npeers = [\"[::1]:4002\"]\n").is_ok());
}

#[test]
fn a_scaler_that_cannot_be_trusted_is_named_with_its_line() {
    let error = refused("[report]\ninterval = \"5s\"\nscaler = \"http://10.0.0.1:4010\"\n");
    assert!(error.starts_with("darter.toml:3: report.scaler: ") && error.contains("report.insecure = true"), "{error}");
    assert!(file("[report]\nscaler = \"http://10.0.0.1:4010\"\ninsecure = true\n").is_ok());
    assert!(file("[report]\nscaler = \"http://[::1]:4010\"\n").is_ok(), "loopback");
    // A name may mean whatever somebody says it means.
    let error = refused("[report]\nscaler = \"http://localhost:4010\"\n");
    assert!(error.starts_with("darter.toml:2: report.scaler: "), "{error}");
    let error = refused("[report]\nscaler = \"https://s.example:4010\"\n");
    assert!(error.contains("report.ca: must name the certificates"), "{error}");
    let ours = file("[report]\nscaler = \"https://s.example:4010\"\nca = \"/ca.pem\"\n").unwrap().report;
    let scaler = ours.scaler.unwrap();
    assert_eq!((scaler.to_string().as_str(), scaler.host()), ("https://s.example:4010", "s.example"));
    for url in
        ["s.example:4010", "https://s.example", "https://s.example:4010/x", "https://u@s.example:4010", "ftp://s:1"]
    {
        let error = refused(&format!("[report]\nscaler = \"{url}\"\n"));
        assert!(error.starts_with("darter.toml:2: ") && error.contains("https://<host>:<port>"), "{error}");
    }
    for (line, wanted) in [
        ("ca = \"/ca.pem\"", "report.scaler: must be set"),
        ("insecure = true", "report.scaler: must be set"),
        ("interval = \"500ms\"", "report.interval: must be from 1s to 1m"),
        ("interval = \"61s\"", "report.interval: must be from 1s to 1m"),
        ("protect_max = \"0s\"", "report.protect_max: must be from 1m"),
        ("token_file = \"token\"", "report.token_file: must be an absolute path"),
        ("scaler = \"http://127.0.0.1:1\"\nca = \"/ca.pem\"", "report.ca: has no meaning"),
        ("scaler = \"http://127.0.0.1:1\"\nserver_name = \"x\"", "report.server_name: has no meaning"),
    ] {
        let error = refused(&format!("[report]\n{line}\n"));
        assert!(error.contains(wanted), "{line}: {error}");
    }
}

#[test]
fn credentials_for_an_api_server_that_nobody_asks_are_a_mistake() {
    let error = refused("[swarm]\nkey_file = \"/k\"\n[kubernetes]\nkubeconfig = \"/c\"\n");
    assert!(error.starts_with("darter.toml:4: kubernetes.kubeconfig") && error.contains("swarm.service"), "{error}");
    assert!(file("[kubernetes]\nnode = \"gpu-1\"\nkubeconfig = \"/c\"\n").is_ok());
}

#[test]
fn gpus_are_asked_neither_all_the_time_nor_hardly_ever() {
    for (text, key, wanted) in [
        ("interval = \"900ms\"", "gpu.interval", "from 1s to 10m"),
        ("slow_interval = \"11m\"", "gpu.slow_interval", "from 1s to 10m"),
        ("slow_interval = \"4s\"", "gpu.slow_interval", "shorter than gpu.interval (5s)"),
        ("driver_grace = \"61m\"", "gpu.driver_grace", "at most 1h"),
        ("idle_window = \"59s\"", "gpu.idle_window", "12 times gpu.interval (5s)"),
        ("driver_root = \"/run/nvidia/driver\"\nlibrary = \"/nvml.so\"", "gpu.driver_root", "either"),
    ] {
        let error = refused(&format!("[gpu]\n{text}\n"));
        assert!(error.starts_with(&format!("darter.toml:2: {key}: ")) && error.contains(wanted), "{error}");
    }
    assert!(file("[gpu]\nmode = \"off\"\n").is_ok());
}

#[test]
fn old_tags_by_the_word_of_a_swarm_take_a_swarm() {
    let registry = "[[registry]]\nname = \"a.example\"\nserve_stale = \"cluster\"\n";
    let error = refused(registry);
    assert!(error.starts_with("darter.toml:3: registry[0].serve_stale") && error.contains("swarm.key_file"), "{error}");
    let swarm = "[swarm]\nkey_file = \"/k\"\n";
    let config = file(&format!("{swarm}{registry}")).unwrap();
    assert_eq!(config.registries[0].serve_stale, ServeStale::Cluster);
    let error = refused(&format!("{swarm}{registry}resolve = false\n"));
    assert!(error.contains("registry[0].serve_stale") && error.contains("resolve = true"), "{error}");
    let error = refused(&format!("{swarm}{registry}access = \"off\"\n"));
    assert!(error.contains("registry[0].serve_stale") && error.contains("no meaning"), "{error}");
    let error = refused("[[registry]]\nname = \"a.example\"\nserve_stale = \"all\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("cluster"), "{error}");
    assert!(file(&registry.replace("cluster", "node")).is_ok(), "this node's own memory takes no swarm");
}

#[test]
fn a_service_that_cannot_be_watched_is_named_with_its_line() {
    let error = refused("[swarm]\nkey_file = \"/k\"\nservice = \"darter.gpu.svc\"\n");
    assert!(error.starts_with("darter.toml:3: ") && error.contains("namespace/name"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nservice = \"darter\"\nendpoint_port = \"0\"\n");
    assert!(error.starts_with("darter.toml:4: ") && error.contains("`0` is not a port"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nendpoint_port = \"control\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.endpoint_port"), "{error}");
    let error = refused("[swarm]\nservice = \"darter\"\n");
    assert!(error.contains("swarm.key_file") && error.contains("without a key"), "{error}");
    let error = refused("[swarm]\nkey_file = \"/k\"\nlisten = \"0.0.0.0:0\"\nservice = \"darter\"\n");
    assert!(error.starts_with("darter.toml:3: swarm.listen") && error.contains("swarm.endpoint_port"), "{error}");
    let all = "[swarm]\nkey_file = \"/k\"\nservice = \"gpu/darter\"\nendpoint_port = \"control\"\n";
    let rest = "[kubernetes]\nkubeconfig = \"/c\"\n";
    let swarm = file(&format!("{all}dns = \"darter.gpu.svc\"\npeers = [\"10.0.0.1:4002\"]\n{rest}")).unwrap().swarm;
    assert_eq!(swarm.service.unwrap().to_string(), "gpu/darter", "several ways at once are no contradiction");
}

#[test]
fn what_the_agent_could_not_work_with_is_named_with_its_line() {
    let registry = "[[registry]]\nname = \"a.example\"\n";
    for (text, wanted) in [
        ("[log]\nlevel = \"blah==\"\n".to_owned(), "darter.toml:2: log.level: `blah==` is not a filter"),
        ("[mirror]\nhandover = \"0s\"\n".to_owned(), "darter.toml:2: mirror.handover: must be longer than nothing"),
        ("[agent]\ndrain = \"601s\"\n".to_owned(), "darter.toml:2: agent.drain: must be at most 10m"),
        ("[store]\nmin_free = \"100%\"\n".to_owned(), "darter.toml:2: store.min_free: must be less than 100%"),
        (
            "[mirror]\nproof_stale = \"1h\"\nproof_ttl = \"61m\"\n".to_owned(),
            "darter.toml:3: mirror.proof_ttl: must be at most mirror.proof_stale (1h)",
        ),
        (
            "[certs_d]\npath = \"certs.d\"\n".to_owned(),
            "darter.toml:2: certs_d.path: `certs.d` is not an absolute path",
        ),
        ("[agent]\ndata_dir = \"./d\"\n".to_owned(), "darter.toml:2: agent.data_dir: `./d` is not an absolute path"),
        (
            "[origin]\nallow_local = [\"::1\", \"http://x\"]\n".to_owned(),
            "darter.toml:2: origin.allow_local: `http://x` is not a host or host:port",
        ),
        ("[aws]\necr_endpoint = \"ecr\"\n".to_owned(), "darter.toml:2: aws.ecr_endpoint: `ecr` is not a URL"),
        (
            format!("{registry}endpoint = \"https://x y\"\n"),
            "darter.toml:3: registry[0].endpoint: `https://x y` is not a URL",
        ),
        (
            format!("{registry}origins = [\"https://x\", \"https://\"]\n"),
            "darter.toml:3: registry[0].origins: `https://` is not a URL",
        ),
        (
            format!("{registry}[[registry]]\nname = \"A.Example\"\n"),
            "darter.toml:4: registry[1].name: A.Example is a.example in other letters",
        ),
    ] {
        let error = refused(&text);
        assert!(error.starts_with(wanted), "{error}");
    }
    let error = refused(&format!("{registry}endpoint = \"https://me:hunter2@x y\"\n"));
    assert!(error.contains("registry[0].endpoint") && !error.contains("hunter2"), "{error}");
    let local = ["::1", "[::1]", "[::1]:5000", "127.0.0.1", "127.0.0.1:5000", "minio", "minio.example:9000"];
    assert!(file(&format!("[origin]\nallow_local = {local:?}\n")).is_ok());
    assert!(file("[mirror]\nproof_stale = \"15m\"\n[store]\nmin_free = \"99%\"\n").is_ok());
    assert!(file("[log]\nlevel = \"info,darter_agent::mirror=debug\"\n").is_ok());
}

#[test]
fn files_that_are_missing_are_warned_of_and_keep_no_agent_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("password"), "hunter2").unwrap();
    std::fs::write(at("empty"), "").unwrap();
    let text = format!(
        "[[registry]]\nname = \"a.example\"\nca = {:?}\n\n[[registry]]\nname = \"b.example\"\nca = {:?}\n\
         access = \"node\"\nusername = \"me\"\npassword_file = {:?}\n",
        at("ca.pem"),
        at("empty"),
        at("password"),
    );
    let warned = |text: &str| {
        let layers = Layers::text(Path::new("darter.toml"), text.to_owned()).unwrap();
        let layers = layers.set("log.level=debug").unwrap();
        warnings(&layers).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let [missing, empty] = &warned(&text)[..] else { panic!("{:?}", warned(&text)) };
    assert!(missing.starts_with("darter.toml:3: registry[0].ca: ") && missing.contains("ca.pem"), "{missing}");
    assert!(empty.starts_with("darter.toml:7: registry[1].ca: ") && empty.contains("no certificate"), "{empty}");
    std::fs::remove_file(at("password")).unwrap();
    let last = warned(&text).pop().unwrap();
    assert!(last.starts_with("darter.toml:10: registry[1].password_file: cannot read "), "{last}");
    assert!(warned("[[registry]]\nname = \"a.example\"\n").is_empty());
}

#[test]
fn a_wildcard_is_no_registry() {
    let error = refused("[[registry]]\nname = \"*.example.com\"\n");
    assert!(error.starts_with("darter.toml:2: ") && error.contains("wildcard"), "{error}");
}

#[test]
fn later_layers_win_and_are_blamed_for_their_own_faults() {
    let environment =
        |value: &str| vec![("DARTER_MIRROR_LISTEN".to_owned(), value.to_owned()), ("PATH".into(), "/".into())];
    let layers = Layers::text(Path::new("f"), "[mirror]\nlisten = \"127.0.0.1:1\"\n".to_owned()).unwrap();
    let layers = layers.environment(environment("127.0.0.1:2")).unwrap();
    assert_eq!(layers.config().unwrap().mirror.listen.port(), 2);
    let layers = layers.set("mirror.listen=127.0.0.1:3").unwrap();
    assert_eq!(layers.config().unwrap().mirror.listen.port(), 3);

    let error = Layers::embedded().environment(environment("nowhere")).unwrap_err().to_string();
    assert!(error.starts_with("environment variable DARTER_MIRROR_LISTEN: "), "{error}");
    let error = Layers::embedded().set("mirror.lissten=1").unwrap_err().to_string();
    assert!(error.contains("mirror.lissten") && error.contains("darter config default"), "{error}");
    let error = Layers::embedded().set("mirror.stall=8").unwrap_err().to_string();
    assert!(error.starts_with("--set mirror.stall=8: "), "{error}");
    let links = [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SCALER_SERVICE_HOST",
        "SCALER_SERVICE_PORT_GRPC",
        "PORT",
        "SCALER_PORT",
        "SCALER_PORT_4010_TCP",
        "SCALER_PORT_4010_TCP_ADDR",
        "PORT_4004_TCP_PROTO",
    ];
    let links = links.map(|name| (format!("DARTER_{name}"), "tcp://10.0.0.1:4010".to_owned()));
    assert!(Layers::embedded().environment(links).is_ok(), "Kubernetes' own variables keep no agent from starting");
    for (name, value) in [("DARTER_MIROR_LISTEN", "x"), ("DARTER_MIRROR_PORT", "4001"), ("DARTER_PORT", "4001")] {
        let typo = vec![(name.to_owned(), value.to_owned())];
        assert!(Layers::embedded().environment(typo).is_err(), "{name}={value}: a misspelt variable is not ignored");
    }
}

#[test]
fn keys_that_need_each_other_may_be_set_in_any_order() {
    let set = |list: &[(&str, &str)]| {
        let variables = list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Layers::embedded().environment(variables.collect::<Vec<_>>()).and_then(|layers| layers.config())
    };
    // In the order of their names, in which they are read, the second is of no use without the last.
    let all = [
        ("DARTER_SWARM_ENDPOINT_PORT", "control"),
        ("DARTER_SWARM_KEY_FILE", "/k"),
        ("DARTER_KUBERNETES_KUBECONFIG", "/c"),
        ("DARTER_SWARM_SERVICE", "darter"),
        // Of a Service called darter-swarm.
        ("DARTER_SWARM_SERVICE_HOST", "10.0.0.7"),
        ("DARTER_SWARM_SERVICE_PORT", "4002"),
    ];
    let swarm = set(&all).unwrap().swarm;
    assert_eq!((swarm.endpoint_port, swarm.dns), (Some(ServicePort::Named("control".to_owned())), None));
    let error =
        set(&[("DARTER_MIRROR_LINGER", "1s"), ("DARTER_KUBERNETES_KUBECONFIG", "/c"), ("DARTER_SWARM_ZONE", "a")]);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("environment variable DARTER_KUBERNETES_KUBECONFIG: kubernetes.kubeconfig: "), "{error}");
}

#[test]
fn a_registry_can_be_set_by_its_name() {
    let layers = Layers::embedded().set("registry.\"a.example:5000\".access=public").unwrap();
    let config = layers.set("registry.\"a.example:5000\".resolve=false").unwrap().config().unwrap();
    assert_eq!(config.registries.len(), 1);
    assert_eq!((config.registries[0].access, config.registries[0].resolve), (Some(Access::Public), false));
}

#[test]
fn numbers_and_booleans_need_no_quotes_and_texts_none_either() {
    let layers = Layers::embedded().set("mirror.prefetch_layers=7").unwrap().set("certs_d.write=false").unwrap();
    let config = layers.set("origin.allow_local=[\"127.0.0.1:5000\"]").unwrap().config().unwrap();
    assert_eq!((config.mirror.prefetch_layers, config.certs_d.write), (7, false));
    assert_eq!(config.origin.allow_local, ["127.0.0.1:5000"]);
}
