//! The public traces that are known, each by its first line.

use std::collections::BTreeMap;

use super::csv::{fields, milli, moment};
use super::{Assumed, REQUESTS_MAX, Request, Trace, TraceError, WORKLOADS_MAX};

/// How often GenTD26 was sampled.
const GENTD26_STEP_MS: u64 = 57_000;

/// A request before the first one's time is known.
struct Raw {
    at_ms: u64,
    workload: u32,
    service_ms: u64,
}

/// What is gathered while lines are read.
#[derive(Default)]
struct Gathered {
    names: BTreeMap<String, u32>,
    workloads: Vec<String>,
    requests: Vec<Raw>,
}

impl Gathered {
    fn workload(&mut self, name: &str) -> Result<u32, TraceError> {
        if let Some(found) = self.names.get(name) {
            return Ok(*found);
        }
        let number = self.workloads.len();
        if number >= WORKLOADS_MAX {
            return Err(TraceError::TooMany(WORKLOADS_MAX, "workloads"));
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        self.names.insert(name.to_owned(), number);
        self.workloads.push(name.to_owned());
        Ok(number)
    }

    fn add(&mut self, at_ms: u64, workload: u32, service_ms: u64) -> Result<(), TraceError> {
        if self.requests.len() >= REQUESTS_MAX {
            return Err(TraceError::TooMany(REQUESTS_MAX, "requests"));
        }
        self.requests.push(Raw { at_ms, workload, service_ms });
        Ok(())
    }

    fn finish(mut self) -> Result<Trace, TraceError> {
        self.requests.sort_by_key(|request| request.at_ms);
        let first = self.requests.first().ok_or(TraceError::Empty)?.at_ms;
        let requests = self.requests.iter().map(|raw| Request {
            at_ms: raw.at_ms - first,
            workload: raw.workload,
            service_ms: raw.service_ms,
        });
        Ok(Trace { requests: requests.collect(), workloads: self.workloads })
    }
}

pub(super) fn parse(text: &str, assumed: Assumed) -> Result<Trace, TraceError> {
    let text = text.trim_start_matches('\u{feff}');
    let first = text.lines().next().unwrap_or_default();
    if first.starts_with('{') {
        return mooncake(text, assumed);
    }
    let header = fields(first);
    let column = |name: &str| header.iter().position(|found| found.trim() == name);
    if let (Some(at), Some(read), Some(written)) =
        (column("TIMESTAMP"), column("ContextTokens"), column("GeneratedTokens"))
    {
        return azure(text, [at, read, written], assumed);
    }
    if let (Some(at), Some(service), Some(model)) =
        (column("gmt_create"), column("exec_time_seconds"), column("checkpoint_model_version_id"))
    {
        return gentd26_requests(text, [at, service, model]);
    }
    if let (Some(at), Some(value), Some(pod)) = (column("timestamp_anon"), column("value"), column("container_ip")) {
        return samples(text, [at, value, pod], column("request_type").is_some(), assumed);
    }
    if column("exec_time_seconds").is_some() {
        return Err(TraceError::NoDemand("these requests have no times: nothing can be played from them"));
    }
    Err(TraceError::Unknown(first.chars().take(80).collect()))
}

/// The fields of each line after the first, with its number.
fn rows(text: &str) -> impl Iterator<Item = (usize, Vec<String>)> {
    let lines = text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(n, line)| (n + 1, fields(line)))
}

fn field(row: &[String], column: usize, line: usize) -> Result<&str, TraceError> {
    row.get(column)
        .map(String::as_str)
        .ok_or_else(|| TraceError::Line { line, what: format!("has {} fields only", row.len()) })
}

fn wrong(line: usize, what: &str, text: &str) -> TraceError {
    TraceError::Line { line, what: format!("{what}: `{}`", text.chars().take(40).collect::<String>()) }
}

fn number(row: &[String], column: usize, line: usize) -> Result<u64, TraceError> {
    let text = field(row, column, line)?;
    milli(text).ok_or_else(|| wrong(line, "not a number", text))
}

fn service(read: u64, written: u64, assumed: Assumed) -> u64 {
    let reading = read.saturating_mul(1000) / assumed.read_per_second.max(1);
    reading.saturating_add(written.saturating_mul(1000) / assumed.written_per_second.max(1)).max(1)
}

fn azure(text: &str, [at, read, written]: [usize; 3], assumed: Assumed) -> Result<Trace, TraceError> {
    let mut gathered = Gathered::default();
    let workload = gathered.workload("llm")?;
    for (line, row) in rows(text) {
        let time = field(&row, at, line)?;
        let at_ms = moment(time).ok_or_else(|| wrong(line, "not a time", time))?;
        let (read, written) = (number(&row, read, line)? / 1000, number(&row, written, line)? / 1000);
        gathered.add(at_ms, workload, service(read, written, assumed))?;
    }
    gathered.finish()
}

fn gentd26_requests(text: &str, [at, served, model]: [usize; 3]) -> Result<Trace, TraceError> {
    let mut gathered = Gathered::default();
    for (line, row) in rows(text) {
        let time = field(&row, at, line)?;
        let at_ms = moment(time).ok_or_else(|| wrong(line, "not a time", time))?;
        // A request that failed at once has no time.
        let taken = field(&row, served, line)?;
        let service_ms = if taken.trim().is_empty() { 0 } else { number(&row, served, line)? };
        let workload = gathered.workload(field(&row, model, line)?)?;
        gathered.add(at_ms, workload, service_ms)?;
    }
    gathered.finish()
}

/// Samples of GenTD26: requests a second of each pod (`rates`), or how busy its GPU was, or a queue.
///
/// The two others share their columns. A GPU's duty is a percentage of each pod; the queue is of all
/// pods together, and only it leaves out whose it is.
fn samples(text: &str, [at, value, pod]: [usize; 3], rates: bool, assumed: Assumed) -> Result<Trace, TraceError> {
    let mut gathered = Gathered::default();
    let mut rest = BTreeMap::<u32, u64>::new();
    let queue = !rates && rows(text).take(50).all(|(_, row)| row.get(pod).is_none_or(|pod| pod.trim().is_empty()));
    let mut most = 0;
    for (line, row) in rows(text) {
        let at_ms = number(&row, at, line)?;
        // A sample that is missing says nothing.
        let text = field(&row, value, line)?;
        let Some(value) = milli(text).filter(|value| *value > 0) else { continue };
        most = most.max(value);
        let name = field(&row, pod, line)?;
        if queue {
            let workload = gathered.workload("queue")?;
            for _ in 0..value / 1000 {
                gathered.add(at_ms, workload, assumed.service_ms)?;
            }
            continue;
        }
        // Of all pods together; each pod's own come as well.
        if name.trim().is_empty() {
            continue;
        }
        let workload = gathered.workload(name)?;
        if rates {
            // What is no whole request yet is kept for the next sample.
            let due = rest.get(&workload).copied().unwrap_or(0) + value * (GENTD26_STEP_MS / 1000);
            rest.insert(workload, due % 1000);
            let count = due / 1000;
            for n in 0..count {
                gathered.add(at_ms + GENTD26_STEP_MS * n / count, workload, assumed.service_ms)?;
            }
        } else {
            gathered.add(at_ms, workload, GENTD26_STEP_MS * value.min(100_000) / 100_000)?;
        }
    }
    if !rates && most > 1_000_000 {
        return Err(TraceError::NoDemand("these are no percentages of a GPU's time, and nothing else of demand"));
    }
    gathered.finish()
}

#[derive(serde::Deserialize)]
struct Mooncake {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
}

fn mooncake(text: &str, assumed: Assumed) -> Result<Trace, TraceError> {
    let mut gathered = Gathered::default();
    let workload = gathered.workload("llm")?;
    for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let request: Mooncake =
            serde_json::from_str(line).map_err(|error| TraceError::Line { line: n + 1, what: error.to_string() })?;
        let service_ms = service(request.input_length, request.output_length, assumed);
        gathered.add(request.timestamp, workload, service_ms)?;
    }
    gathered.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(text: &str) -> Vec<(u64, u32, u64)> {
        let trace = parse(text, Assumed::default()).unwrap();
        trace.requests.iter().map(|request| (request.at_ms, request.workload, request.service_ms)).collect()
    }

    #[test]
    fn each_public_format_is_told_by_its_first_line() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n\
                     2023-11-16 18:17:04.0319600,3180,8\n";
        assert_eq!(requests(azure), [(0, 0, 484), (52, 0, 321)]);
        let gentd26 = "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,checkpoint_model_version_id\n\
                       2024-11-15 18:16:14,T,FAILED,,G1,M1\n2024-11-15 16:57:50,T,SUCCEED,32.0,G0,M0\n";
        assert_eq!(requests(gentd26), [(0, 1, 32_000), (4_704_000, 0, 0)]);
        let duty = "value,timestamp_anon,container_ip\n0.0,1662858720.0,a\n50.0,1662858777.0,a\n";
        assert_eq!(requests(duty), [(0, 0, 28_500)]);
        let queue = "value,container_ip,timestamp_anon\n0.0,,1662858720.0\n2.0,,1662858777.0\n";
        assert_eq!(requests(queue), [(0, 0, 10_000), (0, 0, 10_000)]);
        let mooncake = "{\"timestamp\": 0, \"input_length\": 6755, \"output_length\": 500, \"hash_ids\": [0]}\n";
        assert_eq!(requests(mooncake), [(0, 0, 875)]);
    }

    #[test]
    fn a_rate_becomes_requests_and_what_is_left_over_is_not_lost() {
        // 0.09 a second for 57 s are 5.13 requests: every eighth sample has one more.
        let rows: String = (0..8).map(|n| format!("{}.0,0.09000000000000001,a,Generative\n", 57 * n)).collect();
        let text = format!("timestamp_anon,value,container_ip,request_type\n{rows}0.0,9.0,,API Requests\n");
        let found = requests(&text);
        assert_eq!(found.len(), 41);
        assert_eq!(found[1].0, 11_400);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let error = |text| parse(text, Assumed::default()).unwrap_err().to_string();
        let bad = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,NaN,10\n";
        assert_eq!(error(bad), "line 2: not a number: `NaN`");
        assert_eq!(error("TIMESTAMP,ContextTokens,GeneratedTokens\n"), "no request in it");
        assert!(error("predict_type,exec_time_seconds\n").contains("have no times"));
        assert!(error("a,b,c\n").starts_with("its first line is none that is known: `a,b,c`"));
        let latencies = "timestamp_anon,value,container_ip\n1662859290.0,2639.0,a\n";
        assert!(error(latencies).contains("no percentages"));
    }
}
