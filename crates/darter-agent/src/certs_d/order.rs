//! The order to give hosts.toml up while the agent runs: `darter uninstall`, by the admin socket.
//!
//! Carried out by the loop that keeps the files, so that no round of it is under way meanwhile.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::{CertsDError, Undone};

/// Orders that wait. One is enough for everybody; a second person's finds nothing left to do.
const ORDERS_MAX: usize = 4;

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Somewhere under certs.d. What could be put back was, and the agent writes nothing any more.
    #[error("hosts.toml was not put back everywhere")]
    Files(#[from] CertsDError),
    /// The loop has ended.
    #[error("the agent is stopping, which puts hosts.toml back unless certs_d.remove_on_exit is false")]
    Stopping,
}

/// What an order did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uninstalled {
    /// Where: the agent may have been configured otherwise than whoever asks.
    pub certs_d: PathBuf,
    /// What was put back. Nothing if an order before this one did it.
    pub undone: Vec<Undone>,
}

/// An order on its way to the loop.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) done: oneshot::Sender<Result<Uninstalled, CertsDError>>,
}

/// Takes orders. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Uninstaller(mpsc::Sender<Order>);

pub(super) fn channel() -> (Uninstaller, mpsc::Receiver<Order>) {
    let (sender, receiver) = mpsc::channel(ORDERS_MAX);
    (Uninstaller(sender), receiver)
}

impl Uninstaller {
    /// Puts back what was there before darter, and has the agent write no hosts.toml until it is started
    /// again. As often as wanted.
    pub async fn uninstall(&self) -> Result<Uninstalled, OrderError> {
        let (done, outcome) = oneshot::channel();
        self.0.send(Order { done }).await.map_err(|_| OrderError::Stopping)?;
        Ok(outcome.await.map_err(|_| OrderError::Stopping)??)
    }
}
