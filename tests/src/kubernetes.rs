//! A Kubernetes control plane without nodes: kube-apiserver and etcd, the real ones, as processes.
//!
//! Objects are applied, read and deleted as JSON over the wire, by an administrator; service accounts
//! get real tokens, and RBAC decides what these may. There is no controller: nothing makes
//! EndpointSlices out of Services, or pods out of DaemonSets, but the test.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use http::Method;
use rcgen::KeyPair;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api::Api;
pub use crate::api::path;
use crate::http::{Answer, Client};
use crate::net::{Place, Port};
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::tls::Authority;
use crate::tools;

/// It takes 4 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The administrator's token. Whoever reaches the server could read it in the command line's file
/// anyway, and there is nothing to steal.
const ADMIN: &str = "administrator-of-a-test";

/// A running control plane.
pub struct ControlPlane {
    api: Process,
    place: Place,
    address: SocketAddr,
    etcd_url: String,
    client: Client,
    _etcd: Process,
    _ports: [Port; 3],
    // Last: the directory goes when the processes are gone.
    dir: Scratch,
}

impl ControlPlane {
    /// Starts one and waits until it is ready.
    pub async fn start(place: &Place) -> Result<Self> {
        let (_, etcd) = tools::kubernetes().context("no kube-apiserver: scripts/install-tools kubernetes")?;
        let dir = Scratch::new()?;
        let ports = [place.port()?, place.port()?, place.port()?];
        let [etcd_url, peer_url] =
            [&ports[0], &ports[1]].map(|port| format!("http://{}", SocketAddr::new(place.address(), port.number())));
        let mut command = place.command(etcd);
        command.arg(format!("--data-dir={}", dir.join("etcd").display()));
        command.args(["--log-level=warn", "--unsafe-no-fsync"]);
        for (flag, url) in [
            ("listen-client-urls", &etcd_url),
            ("advertise-client-urls", &etcd_url),
            ("listen-peer-urls", &peer_url),
            ("initial-advertise-peer-urls", &peer_url),
        ] {
            command.arg(format!("--{flag}={url}"));
        }
        command.arg(format!("--initial-cluster=default={peer_url}"));
        let etcd = Process::start("etcd", command, &dir.join("etcd.log"))?;
        let address = SocketAddr::new(place.address(), ports[2].number());
        let authority = Authority::new()?;
        authority.issue(&[&address.ip().to_string()])?.write(dir.path())?;
        fs::write(dir.join("ca.pem"), authority.pem())?;
        fs::write(dir.join("tokens.csv"), format!("{ADMIN},administrator,administrator,system:masters\n"))?;
        // It signs the tokens of service accounts.
        let accounts = KeyPair::generate()?;
        fs::write(dir.join("accounts.key"), accounts.serialize_pem())?;
        fs::write(dir.join("accounts.pem"), accounts.public_key_pem())?;
        let client = Client::new(place.clone()).trusting(authority.client_config()?);
        let api = launch(place, address, &etcd_url, &dir)?;
        let mut plane = Self { api, place: place.clone(), address, etcd_url, client, _etcd: etcd, _ports: ports, dir };
        plane.ready().await?;
        Ok(plane)
    }

    /// Kills the API server, without a word to its clients. etcd stays.
    pub async fn kill_api(&mut self) -> Result<()> {
        self.api.signal(Signal::KILL)?;
        self.api.exit(PATIENCE).await?;
        Ok(())
    }

    /// Starts the API server again, at the same address with the same objects.
    pub async fn start_api(&mut self) -> Result<()> {
        self.api = launch(&self.place, self.address, &self.etcd_url, &self.dir)?;
        self.ready().await
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = match self.call(Method::GET, "/readyz", None).await {
                Ok(_) => return Ok(()),
                Err(error) => format!("{error:#}"),
            };
            if let Some(status) = self.api.exited()? {
                bail!("kube-apiserver: {status}\n{}", process::tail(&self.api.log()));
            }
            ensure!(Instant::now() < deadline, "kube-apiserver: {state}\n{}", process::tail(&self.api.log()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Makes what these files define, kinds of others, and waits until objects of them can be made.
    pub async fn define(&self, dir: &Path, names: &[&str]) -> Result<()> {
        for name in names {
            let text = fs::read_to_string(dir.join(name)).with_context(|| format!("no {name} in {}", dir.display()))?;
            for definition in crate::chart::objects(&text)? {
                let made = self.apply(&definition).await?;
                let spec = &made["spec"];
                let of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (group, plural) = (of(&spec["group"]), of(&spec["names"]["plural"]));
                let version = of(&spec["versions"][0]["name"]);
                let path = format!("/apis/{group}/{version}/{plural}");
                let is_served = async || Ok(self.call(Method::GET, &path, None).await.is_ok());
                crate::stage::eventually(&path, is_served).await?;
            }
        }
        Ok(())
    }

    /// Makes an object, or makes it what is said here, by server-side apply.
    pub async fn apply(&self, object: &Value) -> Result<Value> {
        let path = format!("{}?fieldManager=tests&force=true", path(object)?);
        let body = Some(("application/apply-patch+yaml", object));
        self.call(Method::PATCH, &path, body).await.with_context(|| format!("cannot apply {object}"))
    }

    /// Deletes an object.
    pub async fn delete(&self, object: &Value) -> Result<()> {
        self.call(Method::DELETE, &path(object)?, None).await.map(|_| ())
    }

    /// Makes a namespace.
    pub async fn namespace(&self, name: &str) -> Result<()> {
        self.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })).await?;
        Ok(())
    }

    /// Makes a service account, and gives back a token of it. Without a role it may next to nothing.
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<String> {
        let metadata = json!({ "namespace": namespace, "name": name });
        let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata });
        self.apply(&account).await?;
        let request = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {} });
        let path = format!("{}/token", path(&account)?);
        let answer = self.call(Method::POST, &path, Some(("application/json", &request))).await?;
        Ok(answer["status"]["token"].as_str().context("no token")?.to_owned())
    }

    /// Lets a service account do what `rules` say, in its namespace.
    pub async fn allow(&self, namespace: &str, account: &str, rules: &Value) -> Result<()> {
        let metadata = json!({ "namespace": namespace, "name": account });
        let group = "rbac.authorization.k8s.io";
        let api = format!("{group}/v1");
        self.apply(&json!({ "apiVersion": api, "kind": "Role", "metadata": metadata, "rules": rules })).await?;
        let subjects = json!([{ "kind": "ServiceAccount", "name": account, "namespace": namespace }]);
        let role = json!({ "apiGroup": group, "kind": "Role", "name": account });
        let binding = json!({ "apiVersion": api, "kind": "RoleBinding", "metadata": metadata, "subjects": subjects,
            "roleRef": role });
        self.apply(&binding).await?;
        Ok(())
    }

    /// Lets a service account do what `rules` say, in all namespaces and with what is in none.
    pub async fn allow_everywhere(&self, namespace: &str, account: &str, rules: &Value) -> Result<()> {
        let metadata = json!({ "name": account });
        let group = "rbac.authorization.k8s.io";
        let api = format!("{group}/v1");
        self.apply(&json!({ "apiVersion": api, "kind": "ClusterRole", "metadata": metadata, "rules": rules })).await?;
        let subjects = json!([{ "kind": "ServiceAccount", "name": account, "namespace": namespace }]);
        let role = json!({ "apiGroup": group, "kind": "ClusterRole", "name": account });
        let binding = json!({ "apiVersion": api, "kind": "ClusterRoleBinding", "metadata": metadata,
            "subjects": subjects, "roleRef": role });
        self.apply(&binding).await?;
        Ok(())
    }

    /// A kubeconfig for a token, in whose context `namespace` is. It lives as long as the control plane.
    pub fn kubeconfig(&self, namespace: &str, token: &str) -> Result<PathBuf> {
        self.kubeconfig_by(&format!("https://{}", self.address), namespace, token)
    }

    /// The same by way of somebody who stands before the API server.
    pub fn kubeconfig_by(&self, server: &str, namespace: &str, token: &str) -> Result<PathBuf> {
        let ca = self.dir.join("ca.pem").display().to_string();
        let cluster = json!({ "server": server, "certificate-authority": ca });
        let context = json!({ "cluster": "tests", "user": "tests", "namespace": namespace });
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{ "name": "tests", "cluster": cluster }],
            "users": [{ "name": "tests", "user": { "token": token } }],
            "contexts": [{ "name": "tests", "context": context }],
        });
        let path = self.dir.join(crate::scratch::unique());
        // JSON is YAML.
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// The directory that a pod of this namespace finds its service account in.
    pub fn mounted(&self, namespace: &str, token: &str) -> Result<PathBuf> {
        let dir = self.dir.dir(crate::scratch::unique())?;
        fs::copy(self.dir.join("ca.pem"), dir.join("ca.crt"))?;
        fs::write(dir.join("namespace"), namespace)?;
        fs::write(dir.join("token"), token)?;
        Ok(dir)
    }

    /// A kubeconfig for the administrator.
    pub fn admin_kubeconfig(&self, namespace: &str) -> Result<PathBuf> {
        self.kubeconfig(namespace, ADMIN)
    }

    /// A client that trusts the API server, and that nobody is.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Where the API server listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The administrator's way to it, for whoever outlives a borrow.
    pub fn api(&self) -> Api {
        Api::new(self.client.clone(), self.address, ADMIN.to_owned())
    }

    /// A request of the administrator; an answer that is no success is an error.
    pub async fn call(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        self.api().call(method, path, body).await
    }

    /// A request of whoever has this token, and whatever is answered.
    pub async fn call_as(
        &self,
        token: &str,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
    ) -> Result<Answer> {
        self.api().call_as(token, method, path, body).await
    }
}

fn launch(place: &Place, address: SocketAddr, etcd: &str, dir: &Scratch) -> Result<Process> {
    let (api, _) = tools::kubernetes().context("no kube-apiserver: scripts/install-tools kubernetes")?;
    let at = |name: &str| dir.join(name).display().to_string();
    let mut command = place.command(api);
    for (flag, value) in BTreeMap::from([
        ("allow-privileged", "true".to_owned()),
        ("authorization-mode", "RBAC".to_owned()),
        ("bind-address", address.ip().to_string()),
        ("cert-dir", at("certificates")),
        ("client-ca-file", at("ca.pem")),
        // There is no network to say an address of it in, and nobody reaches it as a Service.
        ("advertise-address", "192.0.2.1".to_owned()),
        ("endpoint-reconciler-type", "none".to_owned()),
        ("etcd-servers", etcd.to_owned()),
        ("secure-port", address.port().to_string()),
        ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
        ("service-account-key-file", at("accounts.pem")),
        ("service-account-signing-key-file", at("accounts.key")),
        ("service-cluster-ip-range", "10.0.0.0/24".to_owned()),
        ("tls-cert-file", at("cert.pem")),
        ("tls-private-key-file", at("key.pem")),
        ("token-auth-file", at("tokens.csv")),
    ]) {
        command.arg(format!("--{flag}={value}"));
    }
    Process::start("kube-apiserver", command, &dir.join("apiserver.log"))
}
