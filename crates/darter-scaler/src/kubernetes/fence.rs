//! Writes go out only while this scaler leads: looked at where a request leaves, so that no caller can forget it.
//!
//! And none takes longer than what is left of the lease when its holder stops: whatever was sent is over before
//! another scaler acts.

use std::time::Duration;

use http::{Method, Request};
use kube::Client;
use kube::client::Body;
use tower::BoxError;

use super::leader::Lead;

/// This scaler does not lead, and nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another scaler leads, or nobody: nothing was sent")]
pub struct NotLeading;

/// A write took too long: whether it arrived is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no answer within {} ms", .0.as_millis())]
pub struct Late(pub Duration);

/// The client, behind the fence. Reading is free.
pub fn fenced(client: &Client, lead: &Lead, within: Duration) -> Client {
    let namespace = client.default_namespace().to_owned();
    let (client, lead) = (client.clone(), lead.clone());
    let send = move |request: Request<Body>| {
        let (client, lead) = (client.clone(), lead.clone());
        async move {
            let reads = matches!(*request.method(), Method::GET | Method::HEAD);
            if !reads && !lead.holds_now() {
                return Err(BoxError::from(NotLeading));
            }
            let answer = tokio::time::timeout(within, client.send(request)).await;
            answer.map_err(|_| Late(within))?.map_err(BoxError::from)
        }
    };
    Client::new(tower::service_fn(send), namespace)
}

/// Whether an error says that nothing was sent as this scaler does not lead.
pub(super) fn is_not_leading(error: &kube::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<NotLeading>() {
            return true;
        }
        cause = error.source();
    }
    false
}
