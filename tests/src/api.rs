//! What an administrator asks of a Kubernetes API server, as JSON over the wire, and what changes there.
//!
//! A test that waits for something hears of it from a watch: nothing is asked again and again, so what a test measures
//! is not how often it looked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use serde_json::Value;

use crate::http::{Answer, Client};

/// Longer than anything takes that a test waits for, on a machine that does much besides.
const PATIENCE: Duration = Duration::from_secs(240);

/// Objects of one kind by name, with `namespace/` before it where they have one.
pub type Objects = BTreeMap<String, Value>;

/// A way to an API server, with the administrator's token.
#[derive(Debug, Clone)]
pub struct Api {
    client: Client,
    address: SocketAddr,
    token: String,
}

impl Api {
    /// One that asks there.
    pub const fn new(client: Client, address: SocketAddr, token: String) -> Self {
        Self { client, address, token }
    }

    /// A request; an answer that is no success is an error.
    pub async fn call(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let answer = self.call_as(&self.token, method, path, body).await?;
        ensure!(answer.status.is_success(), "{path}: {}: {}", answer.status, answer.text());
        // /readyz and its like say "ok".
        Ok(serde_json::from_slice(&answer.body).unwrap_or_else(|_| Value::String(answer.text())))
    }

    /// A request of whoever has this token, and whatever is answered.
    pub async fn call_as(
        &self,
        token: &str,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<Answer> {
        self.client.whole(self.request(token, method, path, body)?).await
    }

    fn request(
        &self,
        token: &str,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<Request<Full<Bytes>>> {
        let request = Request::builder().method(method).uri(format!("https://{}{path}", self.address));
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let (media_type, body) = body.map_or(("application/json", Bytes::new()), |(media_type, body)| {
            (media_type, Bytes::from(body.to_string()))
        });
        Ok(request.header(header::CONTENT_TYPE, media_type).body(Full::new(body))?)
    }

    /// Makes an object, or makes it what is said here, by server-side apply.
    pub async fn apply(&self, object: &Value) -> Result<Value> {
        let path = format!("{}?fieldManager=tests&force=true", path(object)?);
        let body = Some(("application/apply-patch+yaml", object));
        self.call(Method::PATCH, &path, body).await.with_context(|| format!("cannot apply {object}"))
    }

    /// Changes what is named here of what is there, as a strategic merge patch or, for custom resources, a plain one.
    pub async fn patch(&self, path: &str, change: &Value) -> Result<Value> {
        let is_custom = path.starts_with("/apis/") && path.split('/').nth(2).is_some_and(is_custom);
        let kind = if is_custom { "merge-patch" } else { "strategic-merge-patch" };
        self.call(Method::PATCH, path, Some((&format!("application/{kind}+json"), change))).await
    }

    /// Deletes an object.
    pub async fn delete(&self, object: &Value) -> Result<()> {
        self.call(Method::DELETE, &path(object)?, None).await.map(|_| ())
    }

    /// What is at a path, or none.
    pub async fn find(&self, path: &str) -> Result<Option<Value>> {
        let answer = self.call_as(&self.token, Method::GET, path, None).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        ensure!(answer.status.is_success(), "{path}: {}: {}", answer.status, answer.text());
        Ok(Some(serde_json::from_slice(&answer.body)?))
    }

    /// All of a kind, such as `/api/v1/nodes`.
    pub async fn list(&self, path: &str) -> Result<Objects> {
        Ok(named(&self.call(Method::GET, path, None).await?))
    }

    /// What changes at a path, such as `/api/v1/pods`, and what is there now.
    pub fn watch(&self, path: &str) -> Watch {
        let path = path.to_owned();
        Watch { api: self.clone(), path, stream: None, unread: Vec::new(), objects: Objects::new() }
    }

    /// Waits until a kind is so that something is found in it.
    pub async fn until<T>(&self, path: &str, what: &str, mut found: impl FnMut(&Objects) -> Option<T>) -> Result<T> {
        let mut watch = self.watch(path);
        let wait = async {
            loop {
                watch.changed().await?;
                if let Some(found) = found(&watch.objects) {
                    return Ok::<T, anyhow::Error>(found);
                }
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found.with_context(|| format!("{what}: {path}")),
            Err(_) => bail!("not so after {PATIENCE:?}: {what}; {path}: {:#?}", self.list(path).await?),
        }
    }
}

/// Whether a group is of custom resources, which know of no strategic merge.
fn is_custom(group: &str) -> bool {
    group.contains('.') && !group.ends_with(".k8s.io")
}

/// A kind as it is now, kept so.
pub struct Watch {
    api: Api,
    path: String,
    stream: Option<Incoming>,
    unread: Vec<u8>,
    objects: Objects,
}

impl Watch {
    /// What is there.
    pub const fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Waits until something changed; the first time, until it is known what is there. May be dropped half way.
    pub async fn changed(&mut self) -> Result<()> {
        loop {
            let Some(stream) = &mut self.stream else { return self.begin().await };
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.unread.drain(..=end).collect();
                if self.take(&serde_json::from_slice(&line)?) {
                    return Ok(());
                }
                continue;
            }
            match stream.frame().await {
                Some(Ok(frame)) => self.unread.extend(frame.into_data().unwrap_or_default()),
                // The server ends each after a while, and all when it stops.
                Some(Err(_)) | None => self.stream = None,
            }
        }
    }

    async fn begin(&mut self) -> Result<()> {
        let list = self.api.call(Method::GET, &self.path, None).await?;
        let version = list["metadata"]["resourceVersion"].as_str().context("a list without a version")?;
        let mark = if self.path.contains('?') { '&' } else { '?' };
        let path = format!("{}{mark}watch=true&resourceVersion={version}", self.path);
        let answer = self.api.client.send(self.api.request(&self.api.token, Method::GET, &path, None)?).await?;
        ensure!(answer.status().is_success(), "{path}: {}", answer.status());
        self.objects = named(&list);
        self.unread.clear();
        self.stream = Some(answer.into_body());
        Ok(())
    }

    /// Whether it was news of an object.
    fn take(&mut self, event: &Value) -> bool {
        let object = &event["object"];
        match event["type"].as_str() {
            Some("ADDED" | "MODIFIED") => self.objects.insert(name(object), object.clone()),
            Some("DELETED") => self.objects.remove(&name(object)),
            // What is told next is not what follows: all begins anew.
            _ => {
                self.stream = None;
                return false;
            }
        };
        true
    }
}

fn named(list: &Value) -> Objects {
    let items = list["items"].as_array().into_iter().flatten();
    items.map(|object| (name(object), object.clone())).collect()
}

fn name(object: &Value) -> String {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    object["metadata"]["namespace"].as_str().map_or_else(|| name.to_owned(), |space| format!("{space}/{name}"))
}

/// Where the API has an object of one of the kinds that tests use.
pub fn path(object: &Value) -> Result<String> {
    let text = |value: &Value, key: &str| value[key].as_str().map(ToOwned::to_owned);
    let version = text(object, "apiVersion").context("an object has no apiVersion")?;
    let kind = text(object, "kind").context("an object has no kind")?;
    let name = text(&object["metadata"], "name").context("an object has no name")?;
    let root = if version.contains('/') { "apis" } else { "api" };
    let kind = kind.to_lowercase();
    let kinds = match kind.strip_suffix('y') {
        // Never after a vowel, in kinds that tests use.
        Some(kind) => format!("{kind}ies"),
        None if kind.ends_with("ss") => format!("{kind}es"),
        None => format!("{kind}s"),
    };
    Ok(match text(&object["metadata"], "namespace") {
        Some(namespace) => format!("/{root}/{version}/namespaces/{namespace}/{kinds}/{name}"),
        None => format!("/{root}/{version}/{kinds}/{name}"),
    })
}

/// Whether a condition of an object, such as `Ready`, is true.
pub fn is_true(object: &Value, condition: &str) -> bool {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|one| one["type"] == condition && one["status"] == "True")
}

/// Makes the kinds that a directory defines, and waits until they are served.
pub async fn define(api: &Api, dir: &std::path::Path) -> Result<()> {
    let (mut names, mut lists) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let text = std::fs::read_to_string(entry?.path())?;
        for definition in crate::chart::objects(&text)? {
            let spec = &api.apply(&definition).await?["spec"];
            names.push(name(&definition));
            let versions = spec["versions"].as_array().into_iter().flatten();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (group, kinds) = (text(&spec["group"]), text(&spec["names"]["plural"]));
            lists.extend(versions.map(|version| format!("/apis/{group}/{}/{kinds}", text(&version["name"]))));
        }
    }
    ensure!(!names.is_empty(), "{} defines no kinds", dir.display());
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let are_served =
        |all: &Objects| names.iter().all(|name| all.get(name).is_some_and(|one| is_true(one, "Established")));
    api.until(definitions, "the kinds are served", |all| are_served(all).then_some(())).await?;
    // And then their storage is made, until when the server says that it has too much to do.
    for list in lists {
        crate::stage::eventually(&list, async || Ok(api.list(&list).await.is_ok())).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_are_where_the_api_has_them() {
        let slice = json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": { "namespace": "gpu", "name": "a" } });
        assert_eq!(path(&slice).unwrap(), "/apis/discovery.k8s.io/v1/namespaces/gpu/endpointslices/a");
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "gpu" } });
        assert_eq!(path(&namespace).unwrap(), "/api/v1/namespaces/gpu");
        let policy = json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": { "name": "a" } });
        assert_eq!(path(&policy).unwrap(), "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/a");
        let class = json!({ "apiVersion": "karpenter.kwok.sh/v1alpha1", "kind": "KWOKNodeClass",
            "metadata": { "name": "a" } });
        assert_eq!(path(&class).unwrap(), "/apis/karpenter.kwok.sh/v1alpha1/kwoknodeclasses/a");
    }
}
