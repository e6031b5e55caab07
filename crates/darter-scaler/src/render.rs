//! A reason as sentences for people.
//!
//! `node gpu-7 kept: last copy of sha256:4f…c2 (11.2 GB, used 3 min ago); released when 2 copies or at
//! 14:32:10`.

use std::fmt::Write as _;

use crate::reason::{Change, Fact, Input, Quantity, Rail, RailHit, Reason, Rule, Subject, Verdict, When};

/// The sentence; what it rests on follows, indented.
pub fn render(reason: &Reason) -> String {
    let mut text = String::new();
    line(reason, 0, &mut text);
    text
}

fn line(reason: &Reason, depth: usize, text: &mut String) {
    let _ = write!(
        text,
        "{:width$}{} {}: {}",
        "",
        subject(&reason.subject),
        verdict(reason),
        why(reason),
        width = depth * 2
    );
    for hit in &reason.rails {
        let _ = write!(text, "; rail: {}", rail(hit));
    }
    let changes: Vec<_> = reason.changes.iter().map(|change| change_of(reason, change)).collect();
    if !changes.is_empty() {
        let _ = write!(text, "; {} {}", consequence(reason), changes.join(" or "));
    }
    text.push('\n');
    for reason in &reason.because {
        line(reason, depth + 1, text);
    }
}

fn subject(subject: &Subject) -> String {
    let (kind, name) = match subject {
        Subject::Node(name) => ("node", name),
        Subject::Workload(name) => ("workload", name),
        Subject::Pool(name) => ("pool", name),
        Subject::Pod(name) => ("pod", name),
        Subject::Image(name) => ("image", name),
    };
    format!("{kind} {name}")
}

fn verdict(reason: &Reason) -> String {
    let numbers = reason
        .compared
        .iter()
        .find(|compared| matches!(compared.what, Quantity::Replicas | Quantity::SpareGpus | Quantity::Place));
    let of = numbers.map(|compared| match compared.what {
        Quantity::Replicas => (compared, "replica"),
        Quantity::SpareGpus => (compared, "spare GPU"),
        _ => (compared, ""),
    });
    match (reason.verdict, of) {
        (Verdict::Kept, _) => "kept".to_owned(),
        (Verdict::Free, _) => "may go".to_owned(),
        (Verdict::Removed, _) => "removed".to_owned(),
        (Verdict::Copied, _) => "copied".to_owned(),
        (Verdict::Held | Verdict::Unchanged, Some((compared, unit))) => {
            format!("stays at {}", many(compared.with, unit))
        }
        (Verdict::Held | Verdict::Unchanged, None) => "left as it is".to_owned(),
        (Verdict::Raised, Some((compared, unit))) => {
            format!("raised from {} to {}", compared.with, many(compared.is, unit))
        }
        (Verdict::Lowered, Some((compared, unit))) => {
            format!("lowered from {} to {}", compared.with, many(compared.is, unit))
        }
        (Verdict::Ranked, Some((compared, _))) => format!("moves from place {} to {}", compared.with, compared.is),
        (Verdict::Raised, None) => "raised".to_owned(),
        (Verdict::Lowered, None) => "lowered".to_owned(),
        (Verdict::Ranked, None) => "ranked".to_owned(),
    }
}

fn input(reason: &Reason, fact: Fact) -> Option<&Input> {
    reason.inputs.iter().find(|input| input.fact == fact)
}

fn age(reason: &Reason, fact: Fact) -> String {
    match input(reason, fact).and_then(|input| input.age_ms) {
        Some(ms) => format!("{} ago", duration(ms)),
        None => "at an unknown time".to_owned(),
    }
}

fn value(reason: &Reason, fact: Fact) -> u64 {
    input(reason, fact).and_then(|input| input.value).unwrap_or(0)
}

fn name(reason: &Reason, fact: Fact) -> &str {
    input(reason, fact).and_then(|input| input.name.as_deref()).unwrap_or("?")
}

fn compared(reason: &Reason, what: Quantity) -> (u64, u64) {
    reason.compared.iter().find(|compared| compared.what == what).map_or((0, 0), |found| (found.is, found.with))
}

fn why(reason: &Reason) -> String {
    match reason.rule {
        Rule::Unknown | Rule::GpuAtWork | Rule::GpuUnread | Rule::Job | Rule::Pull | Rule::WarmUp => held(reason),
        Rule::Serving | Rule::LastCopy | Rule::ProtectedTooLong => held(reason),
        Rule::NothingHoldsIt | Rule::Leaving | Rule::Doomed | Rule::Stuck | Rule::Sick => going(reason),
        Rule::HeadroomByIncrements => format!(
            "demand rose by no more than that often enough, of {} times; about to go: {}",
            value(reason, Fact::Increments),
            many(value(reason, Fact::Notice), "node")
        ),
        Rule::HeadroomConfigured => format!(
            "as configured, as demand was seen {} times only; about to go: {}",
            value(reason, Fact::Increments),
            many(value(reason, Fact::Notice), "node")
        ),
        Rule::Rank => "what it would cost to make it again changed".to_owned(),
        _ => demand(reason),
    }
}

/// Why a node stays.
fn held(reason: &Reason) -> String {
    match reason.rule {
        Rule::GpuAtWork => format!("a GPU worked {} ago", duration(compared(reason, Quantity::IdleMs).0)),
        Rule::GpuUnread => "a GPU gives no reading, which is not idleness".to_owned(),
        Rule::Job => format!("job {} asked not to be disturbed", name(reason, Fact::Job)),
        Rule::Pull => format!("an image is coming, {} of it are missing", bytes(value(reason, Fact::Pull))),
        Rule::WarmUp if input(reason, Fact::Untainted).is_some() => {
            format!("it became ready {} and waits for its first pod", age(reason, Fact::Untainted))
        }
        Rule::WarmUp => format!("it warms up, made {}", age(reason, Fact::Node)),
        Rule::Serving => format!("it gave a peer something {}", age(reason, Fact::Serving)),
        Rule::LastCopy if reason.verdict == Verdict::Copied => format!(
            "to {}, which stays, so that no node is held for its {}",
            name(reason, Fact::Image),
            bytes(value(reason, Fact::Image))
        ),
        Rule::LastCopy => {
            let which = match compared(reason, Quantity::Copies).1 {
                1 => "last copy".to_owned(),
                copies => format!("one of the last {copies} copies"),
            };
            format!(
                "{which} of {} ({}, used {})",
                name(reason, Fact::Image),
                bytes(value(reason, Fact::Image)),
                age(reason, Fact::Image)
            )
        }
        _ => match input(reason, Fact::Report) {
            Some(_) => format!("nothing is known of it: it reported {}", age(reason, Fact::Report)),
            None => format!("nothing is known of it: no report, made {}", age(reason, Fact::Node)),
        },
    }
}

/// Why a node may go, or goes.
fn going(reason: &Reason) -> String {
    let since = duration(value(reason, Fact::Node));
    match reason.rule {
        Rule::Leaving => "it is on its way out".to_owned(),
        Rule::Doomed if reason.verdict == Verdict::Free => "its cloud takes it back".to_owned(),
        Rule::Doomed => format!("its cloud takes it back in {since}"),
        Rule::Stuck => format!("its warm-up does not end, after {since}"),
        Rule::Sick => format!("a GPU cannot be given work since {since}"),
        _ => match compared(reason, Quantity::IdleMs) {
            (0, 0) => "nothing holds it".to_owned(),
            (idle, _) => format!("nothing holds it, no GPU has worked for {}", duration(idle)),
        },
    }
}

fn demand(reason: &Reason) -> String {
    let waits = format!("{} wait or run, seen {}", milli(value(reason, Fact::Demand)), age(reason, Fact::Demand));
    let (idle, kept) = compared(reason, Quantity::GapMs);
    let quiet = format!("no work for {}, kept for {}", duration(idle), duration(kept));
    let (cost, usual) = compared(reason, Quantity::KeepCostMs);
    let gaps = value(reason, Fact::Gaps);
    match reason.rule {
        Rule::Backlog => waits,
        Rule::Forecast => format!("{waits}, and rising: that many will be needed after a lead time"),
        Rule::Schedule => "the schedule or the least number asks for them".to_owned(),
        Rule::AtWork => "as many are at work, or not known to be idle".to_owned(),
        Rule::DemandUnknown if input(reason, Fact::Demand).is_some() => {
            format!("the newest sample of demand came {}, and silence is not idleness", age(reason, Fact::Demand))
        }
        Rule::DemandUnknown => "no sample of demand came yet, and silence is not idleness".to_owned(),
        Rule::KeepByGaps => format!(
            "{quiet}: over the last {gaps} gaps that would have cost {}, the usual time {}",
            duration(cost),
            duration(usual)
        ),
        Rule::KeepUsual => format!(
            "{quiet}, as usual: over the last {gaps} gaps that cost {}, and what was learnt {}",
            duration(usual),
            duration(cost)
        ),
        Rule::KeepByFleet => format!("{quiet}: as the gaps of all workloads make it pay, its own say no more yet"),
        Rule::Coming => {
            format!("asked for {} ago, ahead of demand, and kept for {} from then", duration(idle), duration(kept))
        }
        _ => format!("{quiet}: too little is known to tell more than what a cold start costs"),
    }
}

fn rail(hit: &RailHit) -> String {
    let RailHit { limit, found, .. } = hit;
    match hit.rail {
        Rail::Freeze => format!("frozen {} ago", duration(*found)),
        Rail::Partition => format!("the API server is silent for {}, more than {}", duration(*found), duration(*limit)),
        Rail::Unknown => format!("{found} % of the pool's nodes are unknown, more than {limit} %"),
        Rail::Settle => format!("the pool grew {} ago, less than {}", duration(*found), duration(*limit)),
        Rail::Gpus => format!("{found} GPUs in all, at most {limit}"),
        Rail::Price => format!("{} an hour in all, at most {}", dollars(*found), dollars(*limit)),
        Rail::NodesMost => format!("{found} GPUs of the pool, whose nodes have at most {limit}"),
        Rail::NodesLeast => format!("{found} nodes would be left, at least {limit}"),
        Rail::Removals => format!("{found} removals in this zone lately, at most {limit}"),
        Rail::Victims => format!("{found} nodes of the pool lately, at most {limit}"),
        Rail::ReplicasMost => format!("{found} replicas, at most {limit}"),
        Rail::ReplicasLeast => format!("{found} replicas, at least {limit}"),
        Rail::Protection => format!("protected for {}, at most {}", duration(*found), duration(*limit)),
        Rail::Growth => format!("a forecast of {found} replicas, at most {limit} at once"),
        Rail::Spare => format!("{found} spare GPUs, at most {limit}"),
        Rail::Off => "removing such nodes is off".to_owned(),
        Rail::Ranks => "pods are ranked seldom".to_owned(),
    }
}

/// What a change would bring.
fn consequence(reason: &Reason) -> &'static str {
    match (reason.verdict, &reason.subject) {
        (Verdict::Kept, _) => "released",
        (Verdict::Free, _) => "this changes",
        (_, Subject::Node(_)) => "decided again",
        _ => "changes",
    }
}

fn change_of(reason: &Reason, change: &Change) -> String {
    let Change { when, value, at } = change;
    let value = value.unwrap_or(0);
    let by = at.map(|at| format!("at {at}"));
    let what = match when {
        When::Report if value > 0 => format!("when {value} nodes report"),
        When::Report => "when it reports".to_owned(),
        When::Time => match (&reason.subject, reason.verdict, &by) {
            (Subject::Node(_), Verdict::Free, Some(at)) => return format!("{at}, when its lease or notice ends"),
            (Subject::Workload(_), _, Some(at)) => return format!("to {value} {at}"),
            (_, _, Some(at)) => return at.clone(),
            (_, _, None) => "with time".to_owned(),
        },
        When::Copies => format!("when {value} copies"),
        When::Pulled => "when it is there".to_owned(),
        When::JobEnds => "when the job ends".to_owned(),
        When::GpuRead => "when the GPU is read".to_owned(),
        When::Demand => "when a sample comes".to_owned(),
        When::BacklogAbove => format!("when more than {} wait or run", milli(value)),
        When::Rail => "when that rail allows it".to_owned(),
        When::Thaw => "when the freeze ends".to_owned(),
        When::Allowed => "when the policy allows it".to_owned(),
        When::Work => "when work comes".to_owned(),
    };
    match by {
        Some(at) => format!("{what} or {at}"),
        None => what,
    }
}

/// As people say it: the largest unit that leaves a number with two digits, or the one below.
pub fn duration(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds => format!("{}.{} h", seconds / 3600, seconds % 3600 / 360),
    }
}

fn many(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} B"),
        1_000_000..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{}.{} GB", bytes / 1_000_000_000, bytes / 100_000_000 % 10),
    }
}

fn milli(thousandths: u64) -> String {
    match thousandths % 1000 {
        0 => (thousandths / 1000).to_string(),
        rest => format!("{}.{}", thousandths / 1000, format!("{rest:03}").trim_end_matches('0')),
    }
}

fn dollars(micros: u64) -> String {
    format!("${}.{:02}", micros / 1_000_000, micros / 10_000 % 100)
}
