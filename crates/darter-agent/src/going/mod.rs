//! Whether this node is about to go, before anybody stops the agent: a spot interruption notice, the taint of
//! who is going to delete the node, or EC2's advice to leave it.
//!
//! Whoever says so is believed until it takes it back; who cannot be asked changes nothing. Not here:
//! what follows from it (`swarm::part`).

mod notice;
mod taint;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Aws, Config, SpotNotice};
use crate::imds;
use crate::metrics::{Metrics, ReasonLabels};
use crate::node::View;

/// Who says that this node is about to go. The most pressing first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// EC2 takes the spot instance back in two minutes.
    SpotNotice,
    /// Karpenter or the cluster autoscaler drains the node.
    Taint,
    /// EC2 is likelier than before to take the spot instance back, and may never do so. What only this node has
    /// goes to others while there is time; the node goes on with everything else.
    Rebalance,
    /// EC2 plans maintenance, days ahead. That is told, and no more: before it comes the node is drained.
    Scheduled,
}

impl Reason {
    const ALL: [Self; 4] = [Self::SpotNotice, Self::Taint, Self::Rebalance, Self::Scheduled];

    const fn label(self) -> &'static str {
        match self {
            Self::SpotNotice => "spot_notice",
            Self::Taint => "taint",
            Self::Rebalance => "rebalance_recommendation",
            Self::Scheduled => "scheduled_event",
        }
    }

    /// Whether what only this node has goes to others because of it.
    pub const fn hands_over(self) -> bool {
        !matches!(self, Self::Scheduled)
    }
}

/// Who says so now, in the order of `Reason::ALL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Told([bool; 4]);

impl Told {
    fn has(self, reason: Reason) -> bool {
        Reason::ALL.iter().zip(self.0).any(|(other, is_told)| is_told && *other == reason)
    }

    /// Whether that is news.
    fn set(&mut self, reason: Reason, is_told: bool) -> bool {
        let slots = Reason::ALL.iter().zip(&mut self.0).filter(|(other, _)| **other == reason);
        slots.fold(false, |is_news, (_, slot)| is_news | (std::mem::replace(slot, is_told) != is_told))
    }

    /// The most pressing one.
    fn pressing(self) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| self.has(*reason))
    }
}

/// Where notices come from.
pub struct Notices {
    /// Where EC2's are asked for, if anywhere.
    ec2: Option<Aws>,
    node: View,
    metrics: Arc<Metrics>,
}

impl Notices {
    /// As configured. Nobody is asked yet.
    pub fn new(config: &Config, node: View, metrics: Arc<Metrics>) -> Self {
        let asks = config.going.spot_notice == SpotNotice::Auto;
        let is_there = asks && (config.aws.imds_endpoint.is_some() || imds::is_ec2());
        Self { ec2: is_there.then(|| config.aws.clone()), node, metrics }
    }

    /// Keeps `going` up to date until `stop`: the most pressing reason, of those that there are.
    pub async fn run(self, going: watch::Sender<Option<Reason>>, stop: CancellationToken) {
        let (announced, told_by_ec2) = watch::channel(Told::default());
        let (taint, told_by_taint) = watch::channel(false);
        let ask = async {
            match &self.ec2 {
                Some(aws) => notice::poll(aws, &self.metrics, &announced).await,
                None => std::future::pending().await,
            }
        };
        let look = taint::heed(self.node.clone(), &taint);
        let all = async { tokio::join!(ask, look, self.sum_up(told_by_ec2, told_by_taint, &going)) };
        stop.run_until_cancelled(all).await;
    }

    async fn sum_up(
        &self,
        mut announced: watch::Receiver<Told>,
        mut taint: watch::Receiver<bool>,
        going: &watch::Sender<Option<Reason>>,
    ) {
        loop {
            let mut told = *announced.borrow_and_update();
            told.set(Reason::Taint, *taint.borrow_and_update());
            for reason in Reason::ALL {
                let labels = ReasonLabels { reason: reason.label() };
                self.metrics.node_going.get_or_create(&labels).set(told.has(reason).into());
            }
            let reason = told.pressing();
            going.send_if_modified(|going| std::mem::replace(going, reason) != reason);
            // Their senders live as long as this.
            tokio::select! {
                _ = announced.changed() => {}
                _ = taint.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_pressing_reason_counts_and_planned_maintenance_is_only_told() {
        let mut told = Told::default();
        assert!(told.set(Reason::Scheduled, true) && !told.set(Reason::Scheduled, true));
        assert_eq!(told.pressing().map(Reason::hands_over), Some(false));
        assert!(told.set(Reason::Rebalance, true));
        assert_eq!(told.pressing(), Some(Reason::Rebalance));
        told.set(Reason::SpotNotice, true);
        told.set(Reason::Taint, true);
        assert_eq!(told.pressing(), Some(Reason::SpotNotice));
        assert!(told.set(Reason::SpotNotice, false));
        assert_eq!(told.pressing(), Some(Reason::Taint));
        assert!(told.has(Reason::Scheduled) && !told.has(Reason::SpotNotice));
    }
}
