//! How nodes look, as whole texts.

use darter_core::gpu::{idle, readiness};
use darter_core::ready::State;
use darter_core::startup::Part;
use darter_core::status::{
    Check, Condition, Gpu, Gpus, Hung, Kubernetes, Mirror, Reason, Registry, Report, StartupTaint, Status, Store,
    Swarm, Xid,
};

use super::authority;
use super::text::{self, Style};

fn check(check: &str, state: State, reason: &str, advice: Option<&str>) -> Check {
    Check { check: check.to_owned(), state, reason: reason.to_owned(), advice: advice.map(ToOwned::to_owned) }
}

fn registry(name: &str, hosts_toml: &str, state: State, reason: &str, advice: Option<&str>) -> Registry {
    Registry {
        registry: name.to_owned(),
        hosts_toml: hosts_toml.to_owned(),
        state,
        reason: reason.to_owned(),
        advice: advice.map(ToOwned::to_owned),
    }
}

fn gpu(index: u32, state: idle::State, idle_seconds: Option<u64>) -> Gpu {
    Gpu {
        index,
        uuid: format!("GPU-4a2b6f10-0000-4000-8000-00000000000{index}"),
        name: Some("NVIDIA H200".to_owned()),
        pci_bus_id: Some(format!("00000000:5{index}:00.0")),
        is_mig: false,
        is_lost: false,
        state: Some(state),
        idle_seconds,
        memory_used_bytes: Some(98_765_432_100),
        memory_total_bytes: Some(150_754_820_096),
        utilization_percent: Some(97),
        power_milliwatts: Some(611_700),
        power_limit_milliwatts: Some(700_000),
        temperature_celsius: Some(61),
    }
}

fn healthy() -> Status {
    Status {
        node: "node-7".to_owned(),
        version: "0.1.0".to_owned(),
        ready: true,
        checks: vec![
            check("mirror", State::Ok, "answers its self-test", None),
            check("store", State::Ok, "12 blobs, 3 of 4 bytes, 0 pinned", None),
            check("hosts_toml", State::Ok, "registry.example: in force", None),
            check("containerd", State::Ok, "asked 12 s ago", None),
            check("swarm", State::Ok, "3 other members, 4 addresses known", None),
            check("gpu", State::Ok, "2 ready", None),
        ],
        mirror: Mirror { address: "127.0.0.1:4001".to_owned(), containerd_seen_seconds: Some(12) },
        store: Store {
            bytes: 3_543_348_019,
            limit_bytes: 429_496_729_600,
            pinned_bytes: 734_003_200,
            blobs: 12,
            ingests: 1,
        },
        swarm: Some(Swarm { members: 3, connections: 3, addresses: 4 }),
        registries: vec![
            registry("registry.example", "written", State::Ok, "in force", None),
            registry("r.example", "closed", State::Ok, "closed: access = \"off\"", None),
        ],
        gpus: Gpus {
            state: Some(readiness::State::Ready),
            reasons: Vec::new(),
            xids: Vec::new(),
            driver_version: Some("590.48.01".to_owned()),
            cuda_version: Some("13.1".to_owned()),
            hung: None,
            gpus: vec![gpu(0, idle::State::Busy, None), gpu(1, idle::State::LoadedIdle, Some(7384))],
        },
        kubernetes: None,
        report: None,
    }
}

/// The mirror fails, one registry's file is not there, one GPU is lost with its error, and a call hangs.
fn broken() -> Status {
    let mut status = healthy();
    status.ready = false;
    status.checks[0] = check("mirror", State::Failed, "the disk does not answer", Some("look at the disk"));
    status.checks[2] = check("hosts_toml", State::Failed, "joined", Some("whatever"));
    status.checks[5] = check("gpu", State::Degraded, "NotReady: GpuLost", Some("whatever"));
    status.registries = vec![
        registry("registry.example", "written", State::Ok, "in force", None),
        registry(
            "r.example",
            "not_written",
            State::Degraded,
            "not written; it should be:\nserver = \"https://r.example\"\n",
            Some("put that text there"),
        ),
    ];
    let lost = &mut status.gpus.gpus[1];
    *lost = Gpu {
        is_lost: true,
        memory_used_bytes: None,
        memory_total_bytes: None,
        utilization_percent: None,
        power_milliwatts: None,
        power_limit_milliwatts: None,
        temperature_celsius: None,
        ..gpu(1, idle::State::Unknown, None)
    };
    let gpus = vec![lost.uuid.clone()];
    let reason = |reason: &str, state, advice: &str| Reason {
        reason: reason.to_owned(),
        state,
        gpus: gpus.clone(),
        detail: String::new(),
        advice: advice.to_owned(),
    };
    status.gpus.reasons = vec![
        reason("GpuLost", readiness::State::NotReady, "drain and reboot"),
        reason("FatalXid(79)", readiness::State::NotReady, "reboot the machine"),
        reason("GfdLabelsMissing", readiness::State::Ready, "nothing"),
    ];
    status.gpus.state = Some(readiness::State::NotReady);
    status.gpus.xids = vec![Xid { xid: 79, is_fatal: true, gpus: gpus.clone() }];
    status.gpus.hung = Some(Hung { call: "power_usage".to_owned(), seconds: 130 });
    status
}

const HEALTHY: &str = "\
ready: all 6 checks pass

agent                 darter 0.1.0 on node-7
mirror      ok        127.0.0.1:4001, answers its self-test
store       ok        3.3 GiB of 400.0 GiB, 12 blobs, 1 on their way, 700.0 MiB pinned
hosts.toml  ok        registry.example  in force
            ok        r.example         closed: access = \"off\"
containerd  ok        asked 12 s ago
swarm       ok        3 other members, 4 addresses known
gpu         ok        2 ready; driver 590.48.01, CUDA 13.1

gpu  name            memory GiB  util     power W  temp  state           uuid
0    NVIDIA H200  92.0 of 140.4  97 %  612 of 700  61 C  Busy            GPU-4a2b6f10-0000-4000-8000-000000000000
1    NVIDIA H200  92.0 of 140.4  97 %  612 of 700  61 C  LoadedIdle 2 h  GPU-4a2b6f10-0000-4000-8000-000000000001
";

const BROKEN: &str = "\
not ready: mirror: the disk does not answer (and 3 more)
    do: look at the disk
degraded: GPU 1: NotReady: GpuLost
    do: drain and reboot
degraded: GPU 1: NotReady: FatalXid(79)
    do: reboot the machine
degraded: hosts.toml of r.example: not written; it should be:
    server = \"https://r.example\"
    do: put that text there

agent                 darter 0.1.0 on node-7
mirror      failed    127.0.0.1:4001, see above
store       ok        3.3 GiB of 400.0 GiB, 12 blobs, 1 on their way, 700.0 MiB pinned
hosts.toml  ok        registry.example  in force
            degraded  r.example         not_written, see above
containerd  ok        asked 12 s ago
swarm       ok        3 other members, 4 addresses known
gpu         degraded  NotReady, see above; driver 590.48.01, CUDA 13.1; NVML has hung in power_usage for 2 min
xid                   79 (fatal) stands against GPU 1
note                  GPU 1: GfdLabelsMissing: nothing

gpu  name            memory GiB  util     power W  temp  state  uuid
0    NVIDIA H200  92.0 of 140.4  97 %  612 of 700  61 C  Busy   GPU-4a2b6f10-0000-4000-8000-000000000000
1    NVIDIA H200              -     -           -     -  LOST   GPU-4a2b6f10-0000-4000-8000-000000000001
";

#[test]
fn a_node_that_is_well_says_so_first() {
    assert_eq!(text::status(&healthy(), Style::default()), HEALTHY);
}

#[test]
fn what_is_wrong_comes_first_with_what_to_do() {
    assert_eq!(text::status(&broken(), Style::default()), BROKEN);
}

#[test]
fn colours_and_the_width_of_a_terminal_change_no_word() {
    let coloured = text::status(&broken(), Style { is_coloured: true, width: None });
    assert_ne!(coloured, BROKEN);
    assert_eq!(console::strip_ansi_codes(&coloured), BROKEN);
    let narrow = text::status(&healthy(), Style { is_coloured: false, width: Some(90) });
    let table: Vec<_> = narrow.lines().skip_while(|line| !line.starts_with("gpu  name")).collect();
    let wanted = "0    NVIDIA H200  92.0 of 140.4  97 %  612 of 700  61 C  Busy            GPU-4a2b6f10-000…";
    assert_eq!((table[1], table[1].chars().count()), (wanted, 90));
}

#[test]
fn an_address_is_taken_as_people_write_it() {
    for (url, wanted) in [
        ("http://10.0.0.1:4004", "10.0.0.1:4004"),
        ("http://node-7:5004/", "node-7:5004"),
        ("node-7", "node-7:4004"),
        ("http://[fd00::1]", "[fd00::1]:4004"),
        ("[fd00::1]:5004", "[fd00::1]:5004"),
    ] {
        assert_eq!(authority(url).unwrap(), wanted);
    }
    for url in ["", "http://", "https://node", "http://node:4004/readyz", "http://me@node"] {
        let error = authority(url).unwrap_err().to_string();
        assert!(error.contains(&format!("--admin `{url}` is not http://<host>:<port>")), "{error}");
    }
}

#[test]
fn what_kubernetes_has_of_the_node_is_one_line() {
    let line = |is_known: bool, condition: Option<(&str, &str)>, startup_taint: StartupTaint| {
        let condition = condition.map(|(status, reason)| Condition { status: status.into(), reason: reason.into() });
        let kubernetes = Some(Kubernetes { is_known, gpu_ready: condition, startup_taint });
        let text = text::status(&Status { kubernetes, ..healthy() }, Style::default());
        let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("kubernetes")).collect();
        assert_eq!(lines.len(), 1, "{text}");
        lines[0].trim().to_owned()
    };
    let stays = |is_late, waits_for| StartupTaint::Stays { waits_for, is_late, age_seconds: 42, deadline_seconds: 300 };
    let removed = |failed_open| StartupTaint::Removed { after_seconds: 42, failed_open };
    let ready = Some(("True", "GpusReady"));
    let unheard = "the API server was not heard, or has no such node: the agent's log says why";
    assert_eq!(line(false, None, StartupTaint::Unknown), unheard);
    assert_eq!(line(true, None, StartupTaint::Absent), "no condition GpuReady; no startup taint");
    assert_eq!(line(true, ready, StartupTaint::Unknown), "GpuReady True (GpusReady)");
    let waits = "GpuReady True (GpusReady); startup taint stays for hosts_toml, images (42 s of 5 min)";
    assert_eq!(line(true, ready, stays(false, vec![Part::HostsToml, Part::Images])), waits);
    let late = "GpuReady False (GpuLost); STARTUP TAINT STAYS past its deadline of 5 min for gpu";
    assert_eq!(line(true, Some(("False", "GpuLost")), stays(true, vec![Part::Gpu])), late);
    let open = "no condition GpuReady; startup taint removed after 42 s, without images";
    assert_eq!(line(true, None, removed(vec![Part::Images])), open);
    assert_eq!(line(true, ready, removed(vec![])), "GpuReady True (GpusReady); startup taint removed after 42 s");
}

#[test]
fn whether_the_scaler_hears_the_node_has_a_line_of_its_own() {
    let line = |report: Report| {
        let text = text::status(&Status { report: Some(report), ..healthy() }, Style::default());
        assert!(text.starts_with("ready: all 6 checks pass"), "nothing on the node waits for a scaler: {text}");
        text.lines().find(|line| line.starts_with("report")).unwrap().to_owned()
    };
    let scaler = || "https://s.example:4010".to_owned();
    let hears = Report { scaler: scaler(), connected_seconds: Some(90), accepted_seconds: Some(3), error: None };
    assert_eq!(line(hears), "report      ok        https://s.example:4010, it took the last report 3 s ago");
    let error = Some("connection refused".to_owned());
    let away = Report { scaler: scaler(), connected_seconds: None, accepted_seconds: None, error };
    let told = "https://s.example:4010 does not hear this node; it took no report yet; connection refused";
    assert_eq!(line(away), format!("report      degraded  {told}"));
}
