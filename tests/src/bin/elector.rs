//! One of several that want to lead, as a process of its own: a test stops it, cuts it off and kills it.
//!
//! It acts all the time, which is to write down the moment and the term, and looks right before each act whether it
//! leads, as an actuator does. The moments of all processes of a machine are of one clock.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use darter_base::kubernetes::connect;
use darter_scaler::kubernetes::{Election, Metrics, Moment, Times};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Between two acts.
const PAUSE: Duration = Duration::from_millis(2);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kubeconfig, identity, lease, renew_within, retry] = arguments.as_slice() else {
        anyhow::bail!("elector KUBECONFIG IDENTITY LEASE_MS RENEW_WITHIN_MS RETRY_MS");
    };
    let milliseconds = |text: &str| text.parse().map(Duration::from_millis).context("no milliseconds");
    let times =
        Times { lease: milliseconds(lease)?, renew_within: milliseconds(renew_within)?, retry: milliseconds(retry)? };
    times.check()?;
    let connected = connect(Some(kubeconfig.as_ref())).await.map_err(anyhow::Error::msg)?;
    let election = Election::new(connected.client, "darter-scaler", identity, times);
    let (lead, stop, metrics) = (election.lead(), CancellationToken::new(), Arc::new(Metrics::default()));
    let elected = tokio::spawn({
        let stop = stop.clone();
        async move { election.run(&metrics, stop).await }
    });
    let mut terminate = signal(SignalKind::terminate())?;
    // A file whose every write is whole: the test reads it meanwhile.
    let mut out = std::io::stdout();
    let act = async {
        loop {
            let now = Moment::now();
            if let Some(term) = lead.term(now) {
                out.write_all(format!("{} {term} {identity}\n", now.0.as_nanos()).as_bytes())?;
                out.flush()?;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::select! {
        ended = act => ended,
        _ = terminate.recv() => {
            // Acts have ended; only then what was held is given back.
            stop.cancel();
            elected.await.context("the election broke")
        }
    }
}
