//! Every wrong configuration names the layer, the key and in a file the line.

use std::path::Path;

use super::*;

fn file(text: &str) -> Result<Config, String> {
    let layers = Layers::text(Path::new("scaler.toml"), text.to_owned());
    layers.and_then(|layers| layers.config()).map_err(|error| error.to_string())
}

#[test]
fn the_embedded_default_is_right_prints_as_itself_and_acts_on_nothing() {
    let config = Config::embedded();
    assert_eq!(config.policy, Policy::default(), "scaler.toml says what the code does without it");
    for actuator in Actuator::ALL {
        assert_eq!(config.actuators.mode(actuator), Mode::Observe, "{}", actuator.as_str());
    }
    let printed = Layers::embedded().print().unwrap();
    assert_eq!(Layers::text(Path::new("printed"), printed.clone()).unwrap().print().unwrap(), printed);
}

#[test]
fn pools_and_workloads_are_read_and_the_environment_and_the_command_line_stand_over_a_file() {
    let text = "[[pools]]\nname = 'l4'\nprice_per_hour = '0.80'\nnodes = ['gpu-']\n\
                [[workloads]]\nname = 'models/llm'\npool = 'l4'\nmost = 4\ntarget = '2.5'\ncold_start = '84s'\n\
                floors = [{ days = 'mon-fri', from = '08:00', to = '18:00', replicas = 2 }]\n[policy.keep]\nusual_ms = 1\n";
    let layers = Layers::text(Path::new("scaler.toml"), text.to_owned()).unwrap();
    let variables =
        [("DARTER_SCALER_POLICY_KEEP_DOUBT", "7"), ("DARTER_SCALER_GRPC_LISTEN", "127.0.0.1:1"), ("OTHER", "x")];
    let layers = layers.environment(variables.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap();
    let config = layers.set("policy.rails.gpus_most=5").unwrap().config().unwrap();
    assert_eq!((config.policy.keep.usual_ms, config.policy.keep.doubt, config.policy.rails.gpus_most), (1, 7, 5));
    assert_eq!(config.policy.keep.most_ms, 3_600_000, "what a file leaves out is the default");
    let fleet = config.fleet();
    let workload = &fleet.workloads["models/llm"];
    assert_eq!((workload.target_milli, workload.cold_start_ms), (Some(2500), Some(84_000)));
    assert_eq!(workload.floors[0], Floor { days: 0x1f, from_minute: 480, to_minute: 1080, replicas: 2 });
    assert_eq!(fleet.pools["l4"].micros_per_hour, Some(800_000));
}

#[test]
fn what_cannot_work_is_named_with_its_line() {
    for (text, line, said) in [
        ("[grpc]\nlissten = 'x'\n", 2, "lissten"),
        ("[policy.keep]\nusual = 5\n", 2, "usual"),
        ("\n[grpc]\nlisten = '0.0.0.0:4010'\n", 3, "grpc.listen: 0.0.0.0:4010 is plaintext"),
        ("[grpc]\ncert = '/c'\n", 1, "grpc.key"),
        ("[grpc]\nkeda_ca = '/ca'\n", 2, "grpc.keda_ca: KEDA can show a certificate over TLS alone"),
        ("[grpc]\ncert = '/c'\nkey = '/k'\nkeda_ca = 'ca'\n", 4, "`ca` is not an absolute path"),
        ("[grpc]\nkeda_names = ['keda']\n", 2, "without grpc.keda_ca"),
        (
            "[grpc]\ncert = '/c'\nkey = '/k'\nkeda_ca = '/ca'\nkeda_names = ['ke da']\n",
            5,
            "grpc.keda_names: `ke da` is no DNS name",
        ),
        ("[grpc]\nlisten = '0.0.0.0:4010'\ninsecure = true\n", 1, "access.mode: loopback"),
        ("[access]\nmode = 'tokens'\n", 1, "access.token_file"),
        ("[access]\nmode = 'kubernetes'\n", 2, "kubernetes.enabled"),
        ("[actuators]\nbuffer = 'on'\n", 2, "actuators.buffer: on needs kubernetes.enabled"),
        ("[actuators]\nbuffer = 'maybe'\n", 2, "maybe"),
        ("[demand]\nttl = '2m'\n", 2, "demand.ttl"),
        ("[demand]\nevery = '2m'\n", 2, "demand.every"),
        ("[demand]\nprometheus = 'https://p:9090'\n", 2, "demand.prometheus"),
        ("[[workloads]]\nname = 'a/b'\nprometheus = 'up'\n", 3, "demand.prometheus"),
        ("[record]\nmax_size = '1kB'\n", 2, "record.max_size"),
        ("[policy.protect]\nrenew_ms = 600000\n", 2, "policy.protect.renew_ms"),
        ("[[workloads]]\nname = 'llm'\n", 2, "namespace/name"),
        ("[[workloads]]\nname = 'a/b'\npool = 'x'\n", 3, "x is none of [[pools]]"),
        ("[[workloads]]\nname = 'a/b'\n[[workloads]]\nname = 'a/b'\n", 4, "twice"),
        ("[[workloads]]\nname = 'a/b'\nmost = 0\n", 3, "most"),
        ("[[workloads]]\nname = 'a/b'\ntarget = '0'\n", 3, "above nothing"),
        ("[[pools]]\nname = 'a'\nprice_per_hour = '-1'\n", 3, "price"),
    ] {
        let error = file(text).expect_err(text);
        assert!(error.starts_with(&format!("scaler.toml:{line}: ")) && error.contains(said), "{text}: {error}");
    }
    let error = Layers::embedded().set("policy.keep.usuall_ms=1").unwrap_err().to_string();
    assert!(
        error.contains("--set policy.keep.usuall_ms=1: unknown key") && error.contains("darter scaler config"),
        "{error}"
    );
    let links = [("DARTER_SCALER_SERVICE_HOST", "10.0.0.1"), ("DARTER_SCALER_PORT_4010_TCP", "tcp://10.0.0.1:4010")];
    let links = links.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert!(Layers::embedded().environment(links).is_ok(), "Kubernetes' own variables keep no scaler from starting");
}
