//! What changes something: demand, freeze. Each needs leave.

use std::net::SocketAddr;

use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use super::{Answer, Page, page, text};
use crate::access::{Denied, Wish, bearer};
use crate::bell::SOON;
use crate::fleet::known::thousandths;
use crate::fleet::{Demand, NotTaken};
use crate::metrics::ReasonLabels;
use crate::state::Freeze;

/// An order has some lines.
const ORDER_MAX: usize = 64 * 1024;
/// Bytes of a reason for people.
const WHY_MAX: usize = 1024;
/// More than this waits nowhere.
const BACKLOG_MAX_MILLI: u64 = 1_000_000_000_000;

/// Demand as it is said.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    /// What waits or runs.
    backlog: serde_json::Number,
    /// How old that is.
    #[serde(default)]
    age_ms: u64,
    /// For how long it says something.
    #[serde(default)]
    ttl_ms: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Why {
    why: String,
}

impl Page {
    pub(super) async fn demand(&self, request: Request<Incoming>, from: SocketAddr, workload: &str) -> Answer {
        let is_name = workload
            .split_once('/')
            .is_some_and(|(namespace, name)| !namespace.is_empty() && !name.is_empty() && !name.contains('/'));
        if !is_name {
            return text(StatusCode::NOT_FOUND, "PUT /v1/demand/{namespace}/{workload}\n");
        }
        if let Err(denied) = self.allowed(from, request.headers(), Wish::Demand(workload.to_owned())).await {
            return *denied;
        }
        let refused = |reason: &'static str, status, why: &str| {
            self.hub.metrics.demand_refusals.get_or_create(&ReasonLabels { reason }).inc();
            text(status, &format!("{workload}: {why}\n"))
        };
        let said: Said = match read(request).await {
            Ok(said) => said,
            Err(why) => return refused("nonsense", StatusCode::BAD_REQUEST, &why),
        };
        // Without a fraction anywhere: 0.5 is five hundred thousandths.
        let backlog_milli = thousandths(&said.backlog.to_string()).filter(|milli| *milli <= BACKLOG_MAX_MILLI);
        let Some(backlog_milli) = backlog_milli else {
            let why = format!("backlog {} is not a number from 0 to 1000000000", said.backlog);
            return refused("nonsense", StatusCode::BAD_REQUEST, &why);
        };
        let most_ms = self.hub.policy.demand_lifetime_ms;
        let ttl_ms = said.ttl_ms.unwrap_or(self.ttl_ms);
        if ttl_ms == 0 || ttl_ms > most_ms {
            let why = format!("ttl_ms {ttl_ms} is not from 1 to {most_ms} (policy.demand_lifetime_ms)");
            return refused("nonsense", StatusCode::BAD_REQUEST, &why);
        }
        let demand = Demand { backlog_milli, age_ms: said.age_ms, ttl_ms };
        let taken = self.hub.fleet().demand(workload, demand, self.hub.clock.now());
        match taken {
            Ok(()) => {
                self.hub.bell.ring(SOON);
                page(StatusCode::OK, &serde_json::json!({ "taken": true }))
            }
            Err(why @ NotTaken::Unknown) => refused("unknown", StatusCode::NOT_FOUND, &why.to_string()),
            Err(why @ NotTaken::Old { .. }) => refused("old", StatusCode::CONFLICT, &why.to_string()),
            Err(why @ NotTaken::Overtaken) => refused("overtaken", StatusCode::CONFLICT, &why.to_string()),
        }
    }

    pub(super) async fn freeze(&self, request: Request<Incoming>, from: SocketAddr) -> Answer {
        if let Err(denied) = self.allowed(from, request.headers(), Wish::Freeze).await {
            return *denied;
        }
        let why = match read::<Why>(request).await {
            Ok(Why { why }) if !why.trim().is_empty() && why.len() <= WHY_MAX => why,
            Ok(_) => return text(StatusCode::BAD_REQUEST, "`why` is for those who find it frozen: 1 to 1024 bytes\n"),
            Err(why) => return text(StatusCode::BAD_REQUEST, &format!("{why}; expected {{\"why\": \"…\"}}\n")),
        };
        warn!(%from, why, "frozen: nothing is changed until DELETE /v1/freeze");
        let since = self.hub.clock.now();
        self.hub.fleet().freeze(Some(Freeze { since, why }));
        self.hub.bell.ring(SOON);
        page(StatusCode::OK, &serde_json::json!({ "frozen": true }))
    }

    pub(super) async fn thaw(&self, request: &Request<Incoming>, from: SocketAddr) -> Answer {
        if let Err(denied) = self.allowed(from, request.headers(), Wish::Freeze).await {
            return *denied;
        }
        info!(%from, "no longer frozen");
        self.hub.fleet().freeze(None);
        self.hub.bell.ring(SOON);
        page(StatusCode::OK, &serde_json::json!({ "frozen": false }))
    }

    async fn allowed(&self, from: SocketAddr, headers: &HeaderMap, wish: Wish) -> Result<(), Box<Answer>> {
        let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let denied = match self.access.may(from, bearer(token), wish).await {
            Ok(_) if self.hub.lead.holds() => return Ok(()),
            Ok(_) => return Err(Box::new(text(StatusCode::SERVICE_UNAVAILABLE, "another scaler leads\n"))),
            Err(denied) => denied,
        };
        self.hub.metrics.access_refusals.get_or_create(&ReasonLabels { reason: denied.word() }).inc();
        let status = match denied {
            Denied::NoToken | Denied::BadToken => StatusCode::UNAUTHORIZED,
            Denied::Forbidden(_) => StatusCode::FORBIDDEN,
            Denied::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Err(Box::new(text(status, &format!("{denied}\n"))))
    }
}

/// What an order says, or what is wrong with it.
async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, String> {
    let order = Limited::new(request.into_body(), ORDER_MAX).collect().await;
    let body = order.map_err(|error| error.to_string())?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| error.to_string())
}
