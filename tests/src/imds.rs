//! A fake of EC2's instance metadata service, version 2: region, account and role credentials of a
//! node that does not exist, and what is about to happen to it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use http::Method;
use serde_json::{Value, json};

use crate::net::Place;
use crate::wire::{Reply, Request, Server, Service};

const TOKEN: &str = "imds-token";
const ROLE: &str = "node-role";

/// A running metadata service.
pub struct Imds {
    service: Arc<Metadata>,
    server: Server<Metadata>,
}

struct Metadata {
    account: String,
    region: String,
    credentials: AtomicU64,
    is_taken_back: AtomicBool,
    is_recommended: AtomicBool,
    /// The events of `events/maintenance/scheduled`.
    scheduled: Mutex<Value>,
}

impl Imds {
    /// Starts one at the address of a place, for a node of this account and region.
    pub fn start(place: &Place, account: &str, region: &str) -> Result<Self> {
        let service = Arc::new(Metadata {
            account: account.to_owned(),
            region: region.to_owned(),
            credentials: AtomicU64::new(0),
            is_taken_back: AtomicBool::new(false),
            is_recommended: AtomicBool::new(false),
            scheduled: Mutex::new(json!([])),
        });
        Ok(Self { server: Server::start(place, None, service.clone())?, service })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Where it is, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// How often the role's credentials were asked for.
    pub fn credential_requests(&self) -> u64 {
        self.service.credentials.load(Ordering::Relaxed)
    }

    /// The node is a spot instance, and EC2 takes it back, or does not.
    pub fn take_back(&self, is_taken_back: bool) {
        self.service.is_taken_back.store(is_taken_back, Ordering::Relaxed);
    }

    /// EC2 recommends to leave the spot instance, or does not.
    pub fn recommend(&self, is_recommended: bool) {
        self.service.is_recommended.store(is_recommended, Ordering::Relaxed);
    }

    /// EC2 plans a stop of the instance, which is in this state: `active`, `completed`, `canceled`.
    pub fn plan(&self, state: &str) {
        let event = json!({
            "NotBefore": "21 Jan 2026 09:00:43 GMT", "NotAfter": "21 Jan 2026 09:17:23 GMT", "Code": "instance-stop",
            "Description": "a test", "EventId": "instance-event-0d59937288b749b32", "State": state,
        });
        *self.service.scheduled.lock().unwrap_or_else(PoisonError::into_inner) = json!([event]);
    }

    /// Refuses connections, as it looks from a pod when the hop limit is 1.
    pub async fn down(&mut self) {
        self.server.down().await;
    }

    /// Answers again, where it did.
    pub fn up(&mut self) -> Result<()> {
        self.server.up()
    }
}

impl Service for Metadata {
    async fn answer(&self, request: Request) -> Reply {
        if request.path() == "/latest/api/token" {
            return token(&request);
        }
        if request.method != Method::GET || request.header("x-aws-ec2-metadata-token") != TOKEN {
            return Reply::text(401, "text/plain", "Unauthorized");
        }
        let roles = "/latest/meta-data/iam/security-credentials";
        match request.path().trim_end_matches('/') {
            "/latest/dynamic/instance-identity/document" => self.document(),
            "/latest/meta-data/placement/region" => Reply::text(200, "text/plain", self.region.clone()),
            "/latest/meta-data/spot/instance-action" if self.is_taken_back.load(Ordering::Relaxed) => {
                let notice = json!({ "action": "terminate", "time": "2026-01-01T00:02:00Z" });
                Reply::text(200, "application/json", notice.to_string())
            }
            "/latest/meta-data/events/recommendations/rebalance" if self.is_recommended.load(Ordering::Relaxed) => {
                Reply::text(200, "application/json", json!({ "noticeTime": "2026-01-01T00:00:00Z" }).to_string())
            }
            "/latest/meta-data/events/maintenance/scheduled" => {
                let events = self.scheduled.lock().unwrap_or_else(PoisonError::into_inner).to_string();
                Reply::text(200, "application/json", events)
            }
            path if path == roles => Reply::text(200, "text/plain", ROLE),
            path if path == format!("{roles}/{ROLE}") => self.credentials(),
            _ => Reply::text(404, "text/plain", "Not Found"),
        }
    }
}

impl Metadata {
    fn document(&self) -> Reply {
        let document = json!({
            "accountId": self.account,
            "region": self.region,
            "availabilityZone": format!("{}a", self.region),
            "instanceId": "i-0123456789abcdef0",
            "instanceType": "g5.xlarge",
            "architecture": "x86_64",
            "version": "2017-09-30",
        });
        Reply::text(200, "text/plain", document.to_string())
    }

    fn credentials(&self) -> Reply {
        self.credentials.fetch_add(1, Ordering::Relaxed);
        let credentials = json!({
            "Code": "Success",
            "Type": "AWS-HMAC",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "AccessKeyId": "ASIAEXAMPLE",
            "SecretAccessKey": "secret",
            "Token": "session",
            "Expiration": "2099-01-01T00:00:00Z",
        });
        Reply::text(200, "application/json", credentials.to_string())
    }
}

fn token(request: &Request) -> Reply {
    let lifetime = request.header("x-aws-ec2-metadata-token-ttl-seconds");
    if request.method != Method::PUT || lifetime.parse::<u32>().is_err() {
        return Reply::text(400, "text/plain", "Bad Request");
    }
    Reply::text(200, "text/plain", TOKEN).header("x-aws-ec2-metadata-token-ttl-seconds", lifetime)
}
