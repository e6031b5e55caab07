//! Whose token is this, on which node does its pod run, and what may it do here: asked of the API server, and
//! remembered for a while.
//!
//! A token is never kept or logged, only its hash. While the API server does not answer nobody new gets in, and
//! those whose review is not too old stay.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_base::kubernetes::refusal;
use darter_base::metrics::ReasonLabels;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use super::metrics::Metrics;
use super::moment::Moment;
use super::table::{Age, Table};

/// A review is asked for again after this.
const FRESH: Duration = Duration::from_secs(120);
/// And without an answer it counts for so long: an agent's token lives for an hour or so, and one that was
/// revoked is out within this at the latest.
const LASTS: Duration = Duration::from_secs(600);
/// One that is not accepted is not asked about again so soon, however often it comes.
const REFUSED: Duration = Duration::from_secs(10);
/// Twice the nodes of the largest cluster: each has a token, and a newer one before the older is over.
const TOKENS_MAX: usize = 20_000;
/// Whoever knocks with made-up tokens does not get more of our memory than this.
const REFUSED_MAX: usize = 1024;
/// Pairs of a token and what it may do.
const RIGHTS_MAX: usize = 10_000;
/// All agents come back at once after a restart, and the API server has others to serve.
const ASKS_MAX: usize = 16;
/// For a place among those and for the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A token of a service account has one or two KiB.
const TOKEN_MAX: usize = 16 * 1024;
/// What the rights for this scaler's own API are named in.
const GROUP: &str = "darter.dev";

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Why somebody does not get in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The API server does not know the token, or it is for somebody else.
    #[error("the token is not accepted: {0}")]
    Unauthenticated(String),
    /// It is known, and may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// Nobody can be asked.
    #[error("nobody can be asked about the token just now: {0}")]
    Unavailable(String),
}

impl Denied {
    const fn word(&self) -> &'static str {
        match self {
            Self::Unauthenticated(_) => "unauthenticated",
            Self::Forbidden(_) => "forbidden",
            Self::Unavailable(_) => "unavailable",
        }
    }
}

/// Who somebody is, by the API server's word.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// As RBAC names it: `system:serviceaccount:<namespace>:<name>`.
    pub user: String,
    /// The node on which the pod runs that the token was made for; none of a token without a pod.
    pub node: Option<String>,
    /// The node's UID, where the API server says it.
    pub node_uid: Option<String>,
    /// Namespace and name of that pod.
    pub pod: Option<(String, String)>,
    groups: Vec<String>,
    uid: Option<String>,
    extra: BTreeMap<String, Vec<String>>,
}

/// Something that one may do at this scaler's API, as a Role says it: apiGroups `darter.dev`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `update`.
    pub verb: &'static str,
    /// `demands`, `freezes`.
    pub resource: &'static str,
    /// Where it is in one.
    pub namespace: Option<String>,
    /// Of which one.
    pub name: Option<String>,
}

type Hash = [u8; 32];

/// Asks about tokens, and remembers.
pub struct Reviews {
    client: Client,
    audience: String,
    /// The service accounts of agents, as RBAC names them.
    agents: Vec<String>,
    asks: Semaphore,
    known: Mutex<Known>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Known {
    accepted: Table<Hash, Arc<Who>>,
    refused: Table<Hash, String>,
    rights: Table<(Hash, Right), bool>,
}

impl Reviews {
    /// For tokens of this audience; `agents` are the service accounts of agents, `<namespace>/<name>`.
    pub fn new(client: Client, audience: &str, agents: &[String], metrics: Arc<Metrics>) -> Self {
        let agents = agents.iter().map(|agent| format!("system:serviceaccount:{}", agent.replacen('/', ":", 1)));
        Self {
            client,
            audience: audience.to_owned(),
            agents: agents.collect(),
            asks: Semaphore::new(ASKS_MAX),
            known: Mutex::new(Known {
                accepted: Table::new(TOKENS_MAX, FRESH, LASTS),
                refused: Table::new(REFUSED_MAX, REFUSED, REFUSED),
                rights: Table::new(RIGHTS_MAX, FRESH, LASTS),
            }),
            metrics,
        }
    }

    /// Whose token this is. Asked again and again of a stream that is open, it costs little.
    pub async fn who(&self, token: &str) -> Result<Arc<Who>, Denied> {
        let came = self.look(token).await;
        let outcome = came.as_ref().map_or_else(Denied::word, |_| "accepted");
        self.metrics.reviews.get_or_create(&ReasonLabels { reason: outcome }).inc();
        came
    }

    /// Which agent this is. It has a node: that of its pod.
    pub async fn agent(&self, token: &str) -> Result<Arc<Who>, Denied> {
        let who = self.who(token).await?;
        if !self.agents.contains(&who.user) {
            let agents = self.agents.join(", ");
            return Err(Denied::Forbidden(format!("{} is no agent; agents are {agents}", who.user)));
        }
        match who.node {
            Some(_) => Ok(who),
            None => Err(Denied::Forbidden("a token that is bound to no pod may not report as a node".to_owned())),
        }
    }

    /// Whether this is the agent of that node.
    pub async fn agent_of(&self, token: &str, node: &str) -> Result<Arc<Who>, Denied> {
        let who = self.agent(token).await?;
        match who.node.as_deref() {
            Some(own) if own == node => Ok(who),
            own => {
                let own = own.unwrap_or_default();
                Err(Denied::Forbidden(format!("the agent of node {own} may not report as node {node}")))
            }
        }
    }

    /// Whether whoever has this token may do that.
    pub async fn may(&self, token: &str, right: &Right) -> Result<Arc<Who>, Denied> {
        let who = self.who(token).await?;
        let key = (hash(token), right.clone());
        let known = self.known(|known| known.rights.get(&key, Moment::now()));
        let allowed = match known {
            Some((allowed, Age::Fresh)) => allowed,
            stale => match (self.ask_right(&who, right).await, stale) {
                (Ok(allowed), _) => {
                    self.known(|known| known.rights.put(key, allowed, Moment::now()));
                    allowed
                }
                (Err(Denied::Unavailable(_)), Some((allowed, _))) => allowed,
                (Err(denied), _) => return Err(denied),
            },
        };
        let Right { verb, resource, namespace, name } = right;
        match allowed {
            true => Ok(who),
            false => Err(Denied::Forbidden(format!(
                "{} may not {verb} {resource}{}{}; a Role or ClusterRole has to name apiGroups {GROUP}, resources \
                 {resource}, verbs {verb}",
                who.user,
                name.as_ref().map(|name| format!(" {name}")).unwrap_or_default(),
                namespace.as_ref().map(|namespace| format!(" in namespace {namespace}")).unwrap_or_default(),
            ))),
        }
    }

    async fn look(&self, token: &str) -> Result<Arc<Who>, Denied> {
        if token.is_empty() || token.len() > TOKEN_MAX {
            return Err(Denied::Unauthenticated(format!("{} bytes are no token", token.len())));
        }
        let (key, now) = (hash(token), Moment::now());
        if let Some((why, _)) = self.known(|known| known.refused.get(&key, now)) {
            return Err(Denied::Unauthenticated(why));
        }
        let known = self.known(|known| known.accepted.get(&key, now));
        let stale = match known {
            Some((who, Age::Fresh)) => return Ok(who),
            Some((who, Age::Stale)) => Some(who),
            None => None,
        };
        match (self.review(token).await, stale) {
            (Ok(who), _) => {
                let who = Arc::new(who);
                self.known(|known| known.accepted.put(key, who.clone(), Moment::now()));
                Ok(who)
            }
            (Err(Denied::Unavailable(_)), Some(who)) => Ok(who),
            (Err(denied), _) => {
                if let Denied::Unauthenticated(why) = &denied {
                    self.known(|known| {
                        known.accepted.remove(&key);
                        known.refused.put(key, why.clone(), Moment::now());
                    });
                }
                Err(denied)
            }
        }
    }

    async fn review(&self, token: &str) -> Result<Who, Denied> {
        let spec = TokenReviewSpec { audiences: Some(vec![self.audience.clone()]), token: Some(token.to_owned()) };
        let review = TokenReview { metadata: ObjectMeta::default(), spec, status: None };
        let rights = "a ClusterRole that lets it create tokenreviews (authentication.k8s.io)";
        let api = Api::<TokenReview>::all(self.client.clone());
        let answer = self.ask(rights, async { api.create(&PostParams::default(), &review).await }).await?;
        let status = answer.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            let why = status.error.filter(|why| !why.is_empty());
            let why = why.unwrap_or_else(|| format!("is it for the audience {}?", self.audience));
            return Err(Denied::Unauthenticated(why));
        }
        // A server that knows no audiences leaves them out, and accepts what is meant for others.
        if !status.audiences.iter().flatten().any(|audience| *audience == self.audience) {
            let why = format!("the API server does not say that it is for the audience {}", self.audience);
            return Err(Denied::Unauthenticated(why));
        }
        let mut who = who(status.user.unwrap_or_default());
        if let (None, Some((namespace, name))) = (&who.node, who.pod.clone()) {
            who.node = self.node_of(&namespace, &name, who.extra(POD_UID)).await?;
        }
        Ok(who)
    }

    /// Where a pod runs, at an API server whose tokens do not say it (before 1.32).
    async fn node_of(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<Option<String>, Denied> {
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let rights = format!("a Role that lets it get pods in namespace {namespace}");
        let pod = self.ask(&rights, async { api.get_opt(name).await }).await?;
        // Another pod of the same name is somebody else.
        let pod = pod.filter(|pod| pod.metadata.uid.as_deref() == uid);
        Ok(pod.and_then(|pod| pod.spec?.node_name))
    }

    async fn ask_right(&self, who: &Who, right: &Right) -> Result<bool, Denied> {
        let attributes = ResourceAttributes {
            group: Some(GROUP.to_owned()),
            resource: Some(right.resource.to_owned()),
            verb: Some(right.verb.to_owned()),
            namespace: right.namespace.clone(),
            name: right.name.clone(),
            ..ResourceAttributes::default()
        };
        let spec = SubjectAccessReviewSpec {
            user: Some(who.user.clone()),
            groups: Some(who.groups.clone()),
            uid: who.uid.clone(),
            extra: Some(who.extra.clone()),
            resource_attributes: Some(attributes),
            non_resource_attributes: None,
        };
        let review = SubjectAccessReview { metadata: ObjectMeta::default(), spec, status: None };
        let rights = "a ClusterRole that lets it create subjectaccessreviews (authorization.k8s.io)";
        let api = Api::<SubjectAccessReview>::all(self.client.clone());
        let answer = self.ask(rights, async { api.create(&PostParams::default(), &review).await }).await?;
        Ok(answer.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }

    async fn ask<T>(&self, rights: &str, ask: impl Future<Output = kube::Result<T>>) -> Result<T, Denied> {
        let asked = async {
            // Never closed.
            let _place = self.asks.acquire().await;
            ask.await
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                let text = refusal(&error, rights).map_or_else(|| error.to_string(), |(_, text)| text);
                Err(Denied::Unavailable(text))
            }
            Err(_) => Err(Denied::Unavailable(format!("no answer within {} s", PATIENCE.as_secs()))),
        }
    }

    fn known<T>(&self, look: impl FnOnce(&mut Known) -> T) -> T {
        look(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Who {
    fn extra(&self, key: &str) -> Option<&str> {
        self.extra.get(key)?.first().map(String::as_str)
    }
}

fn who(user: UserInfo) -> Who {
    let mut who = Who {
        user: user.username.unwrap_or_default(),
        groups: user.groups.unwrap_or_default(),
        uid: user.uid,
        extra: user.extra.unwrap_or_default(),
        ..Who::default()
    };
    let namespace = who.user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    who.pod = match (namespace, who.extra(POD_NAME)) {
        (Some((namespace, _)), Some(pod)) => Some((namespace.to_owned(), pod.to_owned())),
        _ => None,
    };
    // A node's name counts with a pod only: it says where that runs.
    if who.pod.is_some() {
        who.node = who.extra(NODE_NAME).map(ToOwned::to_owned);
        who.node_uid = who.extra(NODE_UID).map(ToOwned::to_owned);
    }
    who
}

fn hash(token: &str) -> Hash {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, extra: &[(&str, &str)]) -> UserInfo {
        let extra = extra.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]));
        UserInfo { username: Some(name.to_owned()), extra: Some(extra.collect()), ..UserInfo::default() }
    }

    #[test]
    fn a_node_is_that_of_the_tokens_pod_and_of_nobody_else() {
        let agent = "system:serviceaccount:gpu:darter";
        let bound = [(POD_NAME, "darter-a"), (POD_UID, "p"), (NODE_NAME, "gpu-1"), (NODE_UID, "n")];
        let found = who(user(agent, &bound));
        assert_eq!((found.node.as_deref(), found.node_uid.as_deref()), (Some("gpu-1"), Some("n")));
        assert_eq!(found.pod, Some(("gpu".to_owned(), "darter-a".to_owned())));
        assert_eq!(who(user(agent, &[(NODE_NAME, "gpu-1")])).node, None, "no pod");
        assert_eq!(who(user("system:node:gpu-1", &bound)).node, None, "no service account");
    }
}
