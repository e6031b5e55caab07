//! How a node is, for people: what is wrong and what to do first, then every part, then each GPU.

use darter_core::gpu::idle;
use darter_core::ready::State;
use darter_core::startup::Part;
use darter_core::status::{Check, Gpu, Gpus, Kubernetes, Problem, Registry, Report, StartupTaint, Status, Store};

/// For whom. The default is for programs: no colours, and nothing is cut.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Style {
    pub(super) is_coloured: bool,
    /// Columns of the terminal.
    pub(super) width: Option<usize>,
}

/// The whole screen. Its first line says whether the node is well, and if not, why.
pub(super) fn status(status: &Status, style: Style) -> String {
    let problems = status.problems();
    let mut text = String::new();
    for (index, problem) in problems.iter().enumerate() {
        text.push_str(&told(problem, index == 0, problems.len() - 1, style));
    }
    if problems.is_empty() {
        text = format!("{}: all {} checks pass\n", style.paint("ready", State::Ok), status.checks.len());
    }
    text.push('\n');
    let node = format!("darter {} on {}", status.version, status.node);
    text.push_str(&row("agent", "", &node));
    for check in &status.checks {
        text.push_str(&of_check(check, status, style));
    }
    if let Some(report) = &status.report {
        text.push_str(&of_report(report, style));
    }
    text.push_str(&of_errors(&status.gpus));
    if let Some(kubernetes) = &status.kubernetes {
        text.push_str(&row("kubernetes", "", &of_kubernetes(kubernetes)));
    }
    if !status.gpus.gpus.is_empty() {
        text.push('\n');
        text.push_str(&table(&status.gpus.gpus, style));
    }
    text
}

/// In the place of a status that could not be had.
pub(super) fn unanswered(error: &anyhow::Error) -> String {
    format!("no answer: {error:#}\n")
}

fn told(problem: &Problem, is_first: bool, others: usize, style: Style) -> String {
    let word = match problem.state {
        State::Failed => "not ready",
        // The worst comes first: nothing failed.
        _ if is_first => "ready, but degraded",
        _ => "degraded",
    };
    // A file's text may be in it.
    let mut lines = problem.reason.lines();
    let first = lines.next().unwrap_or_default();
    let more = if is_first && others > 0 { format!(" (and {others} more)") } else { String::new() };
    let mut text = format!("{}: {}: {first}{more}\n", style.paint(word, problem.state), problem.what);
    lines.for_each(|line| text.push_str(&format!("    {line}\n")));
    if let Some(advice) = &problem.advice {
        text.push_str(&format!("    do: {advice}\n"));
    }
    text
}

fn row(what: &str, state: &str, text: &str) -> String {
    // Colours have no width; what is painted comes with its own padding.
    let state = if state.is_empty() { " ".repeat(STATE) } else { state.to_owned() };
    format!("{what:<12}{state}{text}").trim_end().to_owned() + "\n"
}

/// Columns of the word for a state, with the gap after it.
const STATE: usize = 10;

fn of_check(check: &Check, status: &Status, style: Style) -> String {
    let state = style.paint(&format!("{:<STATE$}", word(check.state)), check.state);
    let is_well = check.state == State::Ok;
    // What is not well stands above already, with what to do.
    let reason = if is_well { check.reason.as_str() } else { "see above" };
    match check.check.as_str() {
        "mirror" => row("mirror", &state, &format!("{}, {reason}", status.mirror.address)),
        "store" if is_well => row("store", &state, &of_store(&status.store)),
        "store" => row("store", &state, &format!("{}; {reason}", of_store(&status.store))),
        "hosts_toml" if !status.registries.is_empty() => of_registries(&status.registries, style),
        "hosts_toml" => row("hosts.toml", &state, reason),
        "gpu" => row("gpu", &state, &of_gpus(&status.gpus, reason)),
        other => row(other, &state, reason),
    }
}

const fn word(state: State) -> &'static str {
    match state {
        State::Ok => "ok",
        State::Degraded => "degraded",
        State::Failed => "failed",
    }
}

fn of_store(store: &Store) -> String {
    let Store { bytes, limit_bytes, pinned_bytes, blobs, ingests } = store;
    let (used, of, pinned) = (size(*bytes), size(*limit_bytes), size(*pinned_bytes));
    format!("{used} of {of}, {blobs} blobs, {ingests} on their way, {pinned} pinned")
}

fn of_registries(registries: &[Registry], style: Style) -> String {
    let width = registries.iter().map(|registry| registry.registry.chars().count()).max().unwrap_or(0);
    let line = |(index, registry): (usize, &Registry)| {
        let state = style.paint(&format!("{:<STATE$}", word(registry.state)), registry.state);
        let what = if index == 0 { "hosts.toml" } else { "" };
        let is_well = registry.state == State::Ok;
        let reason = if is_well { registry.reason.clone() } else { format!("{}, see above", registry.hosts_toml) };
        row(what, &state, &format!("{:<width$}  {reason}", registry.registry))
    };
    registries.iter().enumerate().map(line).collect()
}

fn of_gpus(gpus: &Gpus, reason: &str) -> String {
    let mut text = match gpus.state {
        Some(state) if reason == "see above" => format!("{}, {reason}", state.as_str()),
        _ => reason.to_owned(),
    };
    if let Some(version) = &gpus.driver_version {
        text.push_str(&format!("; driver {version}"));
    }
    if let Some(version) = &gpus.cuda_version {
        text.push_str(&format!(", CUDA {version}"));
    }
    if let Some(hung) = &gpus.hung {
        text.push_str(&format!("; NVML has hung in {} for {}", hung.call, time(hung.seconds)));
    }
    text
}

/// Nothing on the node waits for a scaler, so this is no check of its own.
fn of_report(report: &Report, style: Style) -> String {
    let Report { scaler, connected_seconds, accepted_seconds, error } = report;
    let taken = accepted_seconds.map_or_else(
        || "it took no report yet".to_owned(),
        |seconds| format!("it took the last report {} ago", time(seconds)),
    );
    let (state, mut text) = match connected_seconds {
        Some(_) => (State::Ok, format!("{scaler}, {taken}")),
        None => (State::Degraded, format!("{scaler} does not hear this node; {taken}")),
    };
    if let Some(error) = error {
        text.push_str(&format!("; {error}"));
    }
    row("report", &style.paint(&format!("{:<STATE$}", word(state)), state), &text)
}

/// Errors that stand, and what is worth a word and no more.
fn of_errors(gpus: &Gpus) -> String {
    let mut text = String::new();
    for xid in &gpus.xids {
        let kind = if xid.is_fatal { "fatal" } else { "not fatal" };
        text.push_str(&row("xid", "", &format!("{} ({kind}) stands against {}", xid.xid, gpus.called(&xid.gpus))));
    }
    for note in gpus.reasons.iter().filter(|reason| reason.state == darter_core::gpu::readiness::State::Ready) {
        text.push_str(&row("note", "", &format!("{}: {}: {}", gpus.called(&note.gpus), note.reason, note.advice)));
    }
    text
}

/// The node as the API server has it.
fn of_kubernetes(kubernetes: &Kubernetes) -> String {
    if !kubernetes.is_known {
        return "the API server was not heard, or has no such node: the agent's log says why".to_owned();
    }
    let condition = kubernetes.gpu_ready.as_ref();
    let condition = condition.map_or_else(
        || "no condition GpuReady".to_owned(),
        |condition| format!("GpuReady {} ({})", condition.status, condition.reason),
    );
    let parts = |parts: &[Part]| parts.iter().map(|part| part.as_str()).collect::<Vec<_>>().join(", ");
    let taint = match &kubernetes.startup_taint {
        StartupTaint::Unknown => return condition,
        StartupTaint::Absent => "no startup taint".to_owned(),
        StartupTaint::Stays { waits_for, is_late: false, age_seconds, deadline_seconds } => {
            let (age, deadline) = (time(*age_seconds), time(*deadline_seconds));
            format!("startup taint stays for {} ({age} of {deadline})", parts(waits_for))
        }
        StartupTaint::Stays { waits_for, deadline_seconds, .. } => {
            format!("STARTUP TAINT STAYS past its deadline of {} for {}", time(*deadline_seconds), parts(waits_for))
        }
        StartupTaint::Removed { after_seconds, failed_open } if failed_open.is_empty() => {
            format!("startup taint removed after {}", time(*after_seconds))
        }
        StartupTaint::Removed { after_seconds, failed_open } => {
            format!("startup taint removed after {}, without {}", time(*after_seconds), parts(failed_open))
        }
    };
    format!("{condition}; {taint}")
}

/// Columns of the table; the last is what a narrow terminal cuts.
const COLUMNS: [&str; 8] = ["gpu", "name", "memory GiB", "util", "power W", "temp", "state", "uuid"];

fn table(gpus: &[Gpu], style: Style) -> String {
    let rows: Vec<_> = gpus.iter().map(cells).collect();
    let head = COLUMNS.map(ToOwned::to_owned);
    let all = || std::iter::once(&head).chain(&rows);
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS.len()] = std::array::from_fn(width);
    let before: usize = widths[..COLUMNS.len() - 1].iter().map(|width| width + 2).sum();
    let room = style.width.map_or(usize::MAX, |columns| columns.saturating_sub(before));
    let line = |(index, row): (usize, &[String; COLUMNS.len()])| {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let cell = match column {
                // Numbers end where others end.
                2..=5 => format!("{cell:>width$}"),
                7 => cut(cell, room),
                _ => format!("{cell:<width$}"),
            };
            let is_lost = index > 0 && column == 6 && gpus[index - 1].is_lost;
            line.push_str(&if is_lost { style.paint(&cell, State::Failed) } else { cell });
            line.push_str("  ");
        }
        line.trim_end().to_owned() + "\n"
    };
    all().enumerate().map(line).collect()
}

fn cells(gpu: &Gpu) -> [String; COLUMNS.len()] {
    let unknown = || "-".to_owned();
    let memory = gpu.memory_used_bytes.zip(gpu.memory_total_bytes);
    let power = |limit: Option<u32>, watts: u32| match limit {
        Some(limit) => format!("{watts} of {}", limit.saturating_add(500) / 1000),
        None => watts.to_string(),
    };
    let watts = gpu.power_milliwatts.map(|power| power.saturating_add(500) / 1000);
    let mig = if gpu.is_mig { " (MIG)" } else { "" };
    let name = gpu.name.as_ref().map(|name| format!("{name}{mig}"));
    [
        gpu.index.to_string(),
        name.unwrap_or_else(unknown),
        memory.map_or_else(unknown, |(used, total)| format!("{} of {}", gib(used), gib(total))),
        gpu.utilization_percent.map_or_else(unknown, |percent| format!("{percent} %")),
        watts.map_or_else(unknown, |watts| power(gpu.power_limit_milliwatts, watts)),
        gpu.temperature_celsius.map_or_else(unknown, |celsius| format!("{celsius} C")),
        doing(gpu),
        if gpu.uuid.is_empty() { unknown() } else { gpu.uuid.clone() },
    ]
}

fn doing(gpu: &Gpu) -> String {
    let state = match gpu.state {
        _ if gpu.is_lost => return "LOST".to_owned(),
        Some(idle::State::Empty) => "Empty",
        Some(idle::State::LoadedIdle) => "LoadedIdle",
        Some(idle::State::Busy) => "Busy",
        Some(idle::State::Unknown) | None => "Unknown",
    };
    gpu.idle_seconds.map_or_else(|| state.to_owned(), |seconds| format!("{state} {}", time(seconds)))
}

/// As much of a name as there is room for: its beginning is enough to tell one from another.
fn cut(name: &str, room: usize) -> String {
    match room {
        room if name.chars().count() <= room => name.to_owned(),
        0..9 => String::new(),
        room => name.chars().take(room - 1).chain(['…']).collect(),
    }
}

/// With one digit after the point.
fn tenths(bytes: u64, unit: u64) -> String {
    let tenths = (u128::from(bytes) * 10 + u128::from(unit) / 2) / u128::from(unit);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn gib(bytes: u64) -> String {
    tenths(bytes, 1 << 30)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} B"),
        0x10_0000..0x4000_0000 => format!("{} MiB", tenths(bytes, 1 << 20)),
        _ => format!("{} GiB", gib(bytes)),
    }
}

/// As exact as people need it.
fn time(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

impl Style {
    fn paint(self, text: &str, state: State) -> String {
        let colour = match state {
            State::Ok => 32,
            State::Degraded => 33,
            State::Failed => 31,
        };
        if self.is_coloured { format!("\x1b[1;{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
