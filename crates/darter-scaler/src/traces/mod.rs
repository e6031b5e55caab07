//! Demand as it was recorded somewhere: who asked when, and how long serving it took.
//!
//! Text in, requests out; the format is told by the first line. Files and archives are opened elsewhere.

mod csv;
mod formats;
mod generate;

pub use generate::{Shape, generate};

/// Requests that a trace may have: ten times the largest public one.
pub const REQUESTS_MAX: usize = 5_000_000;
/// Workloads that it may name.
pub const WORKLOADS_MAX: usize = 10_000;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// When it came, in milliseconds since the trace began.
    pub at_ms: u64,
    /// Whose it is: an index into the trace's workloads.
    pub workload: u32,
    /// How long a replica works for it.
    pub service_ms: u64,
}

/// All requests, by time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// Names of the workloads.
    pub workloads: Vec<String>,
    /// In the order of their times.
    pub requests: Vec<Request>,
}

/// Why a text is no trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// Nothing that is known.
    #[error(
        "its first line is none that is known: `{0}`. Known are Azure's LLM traces (TIMESTAMP, ContextTokens, \
         GeneratedTokens), GenTD26 (requests, qps, queue size, GPU duty) and Mooncake's JSON lines"
    )]
    Unknown(String),
    /// Known, and of no use here.
    #[error("{0}")]
    NoDemand(&'static str),
    /// A line that cannot be read.
    #[error("line {line}: {what}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// More than can be played.
    #[error("more than {0} {1}")]
    TooMany(usize, &'static str),
    /// Nothing in it.
    #[error("no request in it")]
    Empty,
}

/// What a trace does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assumed {
    /// How long a request takes, where only their number is known.
    pub service_ms: u64,
    /// Tokens that a replica reads in a second.
    pub read_per_second: u64,
    /// Tokens that it writes in a second, for all requests that it serves at once.
    pub written_per_second: u64,
}

impl Default for Assumed {
    /// A request of ten seconds; a model of some ten billion parameters on one GPU.
    fn default() -> Self {
        Self { service_ms: 10_000, read_per_second: 10_000, written_per_second: 2_500 }
    }
}

impl Trace {
    /// Reads a trace.
    pub fn parse(text: &str, assumed: Assumed) -> Result<Self, TraceError> {
        formats::parse(text, assumed)
    }

    /// Milliseconds from its beginning to its last request.
    pub fn length_ms(&self) -> u64 {
        self.requests.last().map_or(0, |request| request.at_ms)
    }

    /// What replicas work for all of it.
    pub fn busy_ms(&self) -> u64 {
        self.requests.iter().map(|request| request.service_ms).fold(0, u64::saturating_add)
    }

    /// The requests of each workload, in the order of the workloads.
    pub fn by_workload(&self) -> Vec<Vec<Request>> {
        let mut all = vec![Vec::new(); self.workloads.len()];
        for request in &self.requests {
            all[request.workload as usize].push(*request);
        }
        all
    }
}
