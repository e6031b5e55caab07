//! Whether this node is about to go, before anybody stops the agent: a spot interruption notice, or the
//! taint of who is going to delete the node.
//!
//! Whoever says so is believed until it takes it back; who cannot be asked changes nothing. Not here:
//! what follows from it (`swarm::part`).

mod spot;
mod taint;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::taint::NodeWatch;
use crate::config::{Aws, Config, SpotNotice};
use crate::imds;
use crate::metrics::{Metrics, ReasonLabels};

/// Who says that this node is about to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// EC2 takes the spot instance back in two minutes.
    SpotNotice,
    /// Karpenter or the cluster autoscaler drains the node.
    Taint,
}

impl Reason {
    const fn label(self) -> &'static str {
        match self {
            Self::SpotNotice => "spot_notice",
            Self::Taint => "taint",
        }
    }
}

/// Where notices come from.
pub struct Notices {
    /// Where spot notices are asked for, if anywhere.
    spot: Option<Aws>,
    node: Option<NodeWatch>,
    metrics: Arc<Metrics>,
}

impl Notices {
    /// As configured. Nobody is asked yet.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Self {
        // Who takes over what this node has, and who counts on it.
        let is_of_use = config.swarm.key_file.is_some() || config.report.scaler.is_some();
        let asks = is_of_use && config.going.spot_notice == SpotNotice::Auto;
        let spot = asks && (config.aws.imds_endpoint.is_some() || imds::is_ec2());
        let node = config.kubernetes.node.clone().filter(|_| is_of_use).map(|name| NodeWatch {
            name,
            kubeconfig: config.kubernetes.kubeconfig.clone(),
            metrics: metrics.clone(),
        });
        Self { spot: spot.then(|| config.aws.clone()), node, metrics }
    }

    /// Keeps `going` up to date until `stop`.
    pub async fn run(self, going: watch::Sender<Option<Reason>>, stop: CancellationToken) {
        let (spot, told_spot) = watch::channel(false);
        let (taint, told_taint) = watch::channel(false);
        let ask = async {
            match &self.spot {
                Some(aws) => spot::poll(aws, &self.metrics, &spot).await,
                None => std::future::pending().await,
            }
        };
        let look = async {
            match &self.node {
                Some(node) => node.run(&taint).await,
                None => std::future::pending().await,
            }
        };
        let both = async { tokio::join!(ask, look, self.sum_up(told_spot, told_taint, &going)) };
        stop.run_until_cancelled(both).await;
    }

    async fn sum_up(
        &self,
        mut spot: watch::Receiver<bool>,
        mut taint: watch::Receiver<bool>,
        going: &watch::Sender<Option<Reason>>,
    ) {
        loop {
            let told = [(Reason::SpotNotice, *spot.borrow_and_update()), (Reason::Taint, *taint.borrow_and_update())];
            for (reason, is_told) in told {
                let labels = ReasonLabels { reason: reason.label() };
                self.metrics.node_going.get_or_create(&labels).set(i64::from(is_told));
            }
            let reason = told.iter().find(|(_, is_told)| *is_told).map(|(reason, _)| *reason);
            going.send_if_modified(|going| std::mem::replace(going, reason) != reason);
            // Their senders live as long as this.
            tokio::select! {
                _ = spot.changed() => {}
                _ = taint.changed() => {}
            }
        }
    }
}
