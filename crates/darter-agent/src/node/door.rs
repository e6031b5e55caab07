//! How the API server is asked to change something of this node: patiently, and said once when it does not work.

use std::path::Path;
use std::time::Duration;

use kube::Client;
use kube::runtime::watcher::DefaultBackoff;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tracing::info;

use crate::kubernetes::{Teller, connect, refusal};
use crate::metrics::ReasonLabels;

/// Where the pauses end that the backoff has: it never says so.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// One kind of question, asked again and again.
pub(super) struct Door<'a> {
    kubeconfig: Option<&'a Path>,
    client: Option<Client>,
    /// What is asked for, for people.
    what: &'static str,
    /// What the service account has to be allowed for it.
    rights: &'static str,
    teller: Teller<'a>,
    /// What the API server said when somebody else was quicker.
    conflict: String,
    fails: bool,
    pauses: DefaultBackoff,
}

/// Why it was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failed {
    /// What was asked of it is so no more: somebody else changed it meanwhile. Told by `lost`, if at all.
    Conflict,
    /// Something else, which has been told.
    Otherwise,
}

impl<'a> Door<'a> {
    pub(super) fn new(
        kubeconfig: Option<&'a Path>,
        what: &'static str,
        rights: &'static str,
        errors: &'a Family<ReasonLabels, Counter>,
    ) -> Self {
        let teller = Teller::new(format!("cannot {what}; it is tried again"), errors);
        Self {
            kubeconfig,
            client: None,
            what,
            rights,
            teller,
            conflict: String::new(),
            fails: false,
            pauses: DefaultBackoff::default(),
        }
    }

    /// Asks once. Whatever fails is told.
    pub(super) async fn ask<T, F>(&mut self, question: impl FnOnce(Client) -> F) -> Result<T, Failed>
    where
        F: Future<Output = kube::Result<T>>,
    {
        self.put(question, &[]).await
    }

    /// Asks once for a change that says what has to be there (`test` of a JSON patch). That it is not there is for
    /// who asked; the API server says so with the code of whatever it does not take.
    pub(super) async fn ask_if<T, F>(&mut self, question: impl FnOnce(Client) -> F) -> Result<T, Failed>
    where
        F: Future<Output = kube::Result<T>>,
    {
        self.put(question, &["conflict", "invalid"]).await
    }

    /// `conflicts`: the reasons that are for who asked.
    async fn put<T, F>(&mut self, question: impl FnOnce(Client) -> F, conflicts: &[&str]) -> Result<T, Failed>
    where
        F: Future<Output = kube::Result<T>>,
    {
        let client = match self.client.take() {
            Some(client) => client,
            None => match connect(self.kubeconfig).await {
                Ok(connected) => connected.client,
                Err(reason) => return Err(self.fail("credentials", &reason)),
            },
        };
        match question(client.clone()).await {
            Ok(answer) => {
                self.client = Some(client);
                self.teller.works();
                self.pauses = DefaultBackoff::default();
                if std::mem::take(&mut self.fails) {
                    info!("it works again: {}", self.what);
                }
                Ok(answer)
            }
            Err(error) => {
                let refused = refusal(&error, self.rights);
                let (reason, text) = refused.unwrap_or_else(|| ("answer", error.to_string()));
                // Others may be a token or an address that has changed: credentials are read anew.
                if matches!(reason, "conflict" | "invalid" | "forbidden" | "not_found" | "throttled") {
                    self.client = Some(client);
                }
                match reason {
                    reason if conflicts.contains(&reason) => {
                        self.conflict = text;
                        Err(Failed::Conflict)
                    }
                    "not_found" => {
                        let hint = "is kubernetes.node this node's name in Kubernetes (spec.nodeName)?";
                        Err(self.fail(reason, &format!("{text}; {hint}")))
                    }
                    reason => Err(self.fail(reason, &text)),
                }
            }
        }
    }

    /// What somebody else changes again and again is trouble too.
    pub(super) fn lost(&mut self) {
        let text = std::mem::take(&mut self.conflict);
        self.fail("conflict", &format!("somebody else changes it at the same time, again and again; the last: {text}"));
    }

    fn fail(&mut self, reason: &'static str, text: &str) -> Failed {
        self.fails = true;
        self.teller.fails(reason, text);
        Failed::Otherwise
    }

    /// Between two tries: longer each time, and not for all nodes at the same moment.
    pub(super) async fn pause(&mut self) {
        tokio::time::sleep(self.pauses.next().unwrap_or(PAUSE_MAX)).await;
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// In the place of an API server, which says most of this only when it has too much to do: one status for
    /// each connection. Gives the kubeconfig.
    async fn answers(dir: &Path, statuses: &'static [u16]) -> std::path::PathBuf {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for status in statuses {
                let (mut socket, _) = listener.accept().await.unwrap();
                let _ = socket.read(&mut [0; 4096]).await.unwrap();
                let body = format!(r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","code":{status}}}"#);
                let body = if *status == 200 { r#"{"metadata":{"name":"gpu-1"}}"#.to_owned() } else { body };
                let head = format!("HTTP/1.1 {status} Word\r\nContent-Length: {}\r\nConnection: close", body.len());
                socket.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await.unwrap();
            }
        });
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "t",
            "clusters": [{ "name": "t", "cluster": { "server": server } }],
            "users": [{ "name": "t", "user": {} }],
            "contexts": [{ "name": "t", "context": { "cluster": "t", "user": "t" } }],
        });
        let file = dir.join("kubeconfig");
        std::fs::write(&file, config.to_string()).unwrap();
        file
    }

    #[tokio::test]
    async fn each_refusal_is_counted_by_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = answers(dir.path(), &[429, 404, 403, 409, 422, 401, 500, 200]).await;
        let errors = Family::default();
        let mut door = Door::new(Some(&kubeconfig), "look", "a Role", &errors);
        let mut said = Vec::new();
        for _ in 0..9 {
            let asked = door.ask(|client| async move { Api::<Node>::all(client).get("gpu-1").await }).await;
            said.push(asked.map(|_| ()));
        }
        let other = Err(Failed::Otherwise);
        assert_eq!(said, [other, other, other, other, other, other, other, Ok(()), other], "the last: nobody");
        let count = |reason| errors.get_or_create(&ReasonLabels { reason }).get();
        let reasons =
            ["throttled", "not_found", "forbidden", "conflict", "invalid", "unauthorized", "answer", "unreachable"];
        assert_eq!(reasons.map(count), [1; 8]);
        assert!(door.fails && door.client.is_none(), "credentials are read anew");
    }

    #[tokio::test]
    async fn a_conflict_is_for_who_asks_whether_something_is_there_still_and_told_once_it_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let kubeconfig = answers(dir.path(), &[409, 422, 403]).await;
        let errors = Family::default();
        let mut door = Door::new(Some(&kubeconfig), "change", "a Role", &errors);
        let mut said = Vec::new();
        for _ in 0..3 {
            let asked = door.ask_if(|client| async move { Api::<Node>::all(client).get("gpu-1").await }).await;
            said.push(asked.map(|_| ()));
        }
        assert_eq!(said, [Err(Failed::Conflict), Err(Failed::Conflict), Err(Failed::Otherwise)]);
        let count = |reason| errors.get_or_create(&ReasonLabels { reason }).get();
        assert_eq!(["conflict", "invalid", "forbidden"].map(count), [0, 0, 1]);
        door.lost();
        assert_eq!(["conflict", "invalid", "forbidden"].map(count), [1, 0, 1]);
    }
}
