//! The real `darter scaler` process: agents that report or lie, demand, and KEDA at the other end.

mod access;
mod agents;
mod guests;
mod keda;
mod lies;
mod prometheus;
mod records;

use darter_tests::tools::{Need, can_run};

/// One pool, one workload that is answered.
const ONE: &str = r#"
[actuators]
keda = "on"
protect = "on"
copy = "on"

[[pools]]
name = "l4"
price_per_hour = "0.80"
gpus = 1
nodes_most = 20

[[workloads]]
name = "models/llm"
most = 10
target = "1"
lead = "84s"
"#;

/// Its workload.
const LLM: &str = "models/llm";

/// Whether the binary is there.
fn is_here(test: &str) -> bool {
    can_run(test, &[Need::Darter])
}
