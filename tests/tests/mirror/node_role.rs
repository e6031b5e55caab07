//! Where the node's own AWS credentials come from, when they are no instance profile: the environment, IAM
//! Roles for Service Accounts, EKS Pod Identity. Each is the real agent, started as such a pod is.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use darter_core::Digest;
use darter_tests::agent::Agent;
use darter_tests::fake_ecr::{self, Auth, FakeEcr, Kind};
use darter_tests::image::{Format, Image};
use darter_tests::net::Place;
use darter_tests::scratch::Scratch;
use darter_tests::stage::{REPOSITORY, TAG, pair_options};
use darter_tests::tools::{Need, can_run};
use darter_tests::wire::{Reply, Request, Server, Service};
use http::Method;
use serde_json::json;

/// What is never to be seen in a log.
const SECRET: &str = "secret-of-the-node";
const ROLE: &str = "arn:aws:iam::123456789012:role/darter";

/// A fake of the Pod Identity agent and of STS: each gives a role's credentials for the pod's token, and for
/// no other.
struct Giver {
    /// What the kubelet wrote; it writes another from time to time.
    token: Mutex<&'static str>,
}

impl Giver {
    fn token(&self) -> &'static str {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the Pod Identity agent does (EKS; the container credential provider of the AWS SDKs).
    fn pod_identity(&self, request: &Request) -> Reply {
        if request.header("authorization") != self.token() {
            return Reply::text(401, "text/plain", "Unauthorized");
        }
        let credentials = json!({
            "AccessKeyId": "ASIAPODIDENTITY", "SecretAccessKey": SECRET, "Token": "session",
            "Expiration": "2099-01-01T00:00:00Z",
        });
        Reply::text(200, "application/json", credentials.to_string())
    }

    /// As STS answers `AssumeRoleWithWebIdentity`.
    fn web_identity(&self, request: &Request) -> Reply {
        let form = String::from_utf8_lossy(&request.body);
        let fields = ["Action=AssumeRoleWithWebIdentity", &format!("WebIdentityToken={}", self.token())];
        if !fields.iter().all(|field| form.split('&').any(|have| have == *field)) {
            let error = "<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>";
            return Reply::text(400, "text/xml", error);
        }
        let answer = format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><AssumedRoleUser><Arn>{ROLE}</Arn><AssumedRoleId>A:darter</AssumedRoleId>\
             </AssumedRoleUser><Credentials><AccessKeyId>ASIAWEBIDENTITY</AccessKeyId>\
             <SecretAccessKey>{SECRET}</SecretAccessKey><SessionToken>session</SessionToken>\
             <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
             </AssumeRoleWithWebIdentityResponse>"
        );
        Reply::text(200, "text/xml", answer)
    }
}

impl Service for Giver {
    async fn answer(&self, request: Request) -> Reply {
        match (&request.method, request.path()) {
            (&Method::GET, "/v1/credentials") => self.pod_identity(&request),
            (&Method::POST, "/") => self.web_identity(&request),
            _ => Reply::text(404, "text/plain", "Not Found"),
        }
    }
}

/// A private ECR with an image, an agent that may read it as its environment says, and where its role comes from.
struct Scene {
    ecr: FakeEcr,
    image: Image,
    giver: Arc<Giver>,
    server: Server<Giver>,
    files: Scratch,
}

impl Scene {
    fn new() -> Result<Self> {
        let options = fake_ecr::Options { auth: Auth::Ecr, redirect: false, ..fake_ecr::Options::default() };
        let ecr = FakeEcr::start(&Place::Host, options)?;
        let image = Image::index(Format::Oci, 7, &[4096])?;
        ecr.push(&image, REPOSITORY, TAG);
        let giver = Arc::new(Giver { token: Mutex::new("pod-token") });
        let server = Server::start(&Place::Host, None, giver.clone())?;
        let files = Scratch::new()?;
        std::fs::write(files.join("token"), "pod-token")?;
        Ok(Self { ecr, image, giver, server, files })
    }

    /// Where the credentials come from; a loopback address, as the SDK asks no other over plain http but two.
    fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    fn token_file(&self) -> String {
        self.files.join("token").display().to_string()
    }

    /// What EKS puts into the environment of a pod with an association.
    fn pod_identity(&self) -> [(&'static str, String); 2] {
        [
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("{}/v1/credentials", self.url())),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", self.token_file()),
        ]
    }

    /// An agent with these variables and nothing else of AWS: no profile, and no metadata service.
    async fn agent(&self, variables: &[(&str, String)]) -> Result<Agent> {
        let nothing = self.files.join("none").display().to_string();
        let options = pair_options(&self.ecr, &[("access", "node".into())])
            .set("aws.ecr_endpoint", self.ecr.api_url())
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_CONFIG_FILE", &nothing)
            .env("AWS_SHARED_CREDENTIALS_FILE", &nothing);
        let options = variables.iter().fold(options, |options, (name, value)| options.env(name, value));
        Agent::start(options).await
    }

    async fn read(&self, agent: &Agent) -> Result<u16> {
        let url = format!("{}/v2/{REPOSITORY}/manifests/{TAG}?ns={}", agent.mirror_url(), self.ecr.name());
        let answer = agent.client().get(&url).await?;
        ensure!(answer.status != 200 || Digest::of(&answer.body) == self.image.root.digest(), "{}", answer.text());
        Ok(answer.status.as_u16())
    }

    /// Who asked ECR for its password, by access key.
    fn asked_as(&self, key: &str) -> Result<()> {
        let asked: Vec<_> = self.ecr.log().into_iter().filter(|seen| seen.kind == Kind::Token).collect();
        let scope = format!("Credential={key}/");
        ensure!(
            !asked.is_empty() && asked.iter().all(|seen| seen.status == 200 && seen.authorization.contains(&scope)),
            "not asked as {key}: {asked:?}"
        );
        Ok(())
    }

    async fn reads_as(&self, key: &str, variables: &[(&str, String)]) -> Result<()> {
        let agent = self.agent(variables).await?;
        let status = self.read(&agent).await?;
        ensure!(status == 200, "{status}\n{}", agent.log());
        self.asked_as(key)?;
        for word in [SECRET, self.giver.token()] {
            ensure!(!agent.log().contains(word), "{word} is in the log");
        }
        Ok(())
    }
}

#[tokio::test]
async fn keys_in_the_environment_open_the_nodes_registry() -> Result<()> {
    if !can_run("keys_in_the_environment_open_the_nodes_registry", &[Need::Darter]) {
        return Ok(());
    }
    let variables = [("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT".to_owned()), ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned())];
    Scene::new()?.reads_as("AKIAENVIRONMENT", &variables).await
}

#[tokio::test]
async fn pod_identity_opens_the_nodes_registry() -> Result<()> {
    if !can_run("pod_identity_opens_the_nodes_registry", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new()?;
    scene.reads_as("ASIAPODIDENTITY", &scene.pod_identity()).await
}

#[tokio::test]
async fn a_role_of_the_service_account_opens_the_nodes_registry() -> Result<()> {
    if !can_run("a_role_of_the_service_account_opens_the_nodes_registry", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new()?;
    let variables = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", scene.token_file()),
        ("AWS_ROLE_ARN", ROLE.to_owned()),
        ("AWS_ENDPOINT_URL_STS", scene.url()),
    ];
    scene.reads_as("ASIAWEBIDENTITY", &variables).await
}

#[tokio::test]
async fn a_role_that_is_refused_is_said_and_asked_for_again() -> Result<()> {
    if !can_run("a_role_that_is_refused_is_said_and_asked_for_again", &[Need::Darter]) {
        return Ok(());
    }
    let scene = Scene::new()?;
    *scene.giver.token.lock().unwrap_or_else(PoisonError::into_inner) = "another-token";
    let agent = scene.agent(&scene.pod_identity()).await?;
    // containerd goes on at the registry itself.
    ensure!(scene.read(&agent).await? == 404, "opened with a token that is not the pod's");
    let log = agent.log();
    ensure!(log.contains("no AWS credentials"), "{log}");
    ensure!(!log.contains("pod-token"), "the token is in the log");
    // The kubelet writes the file anew, and nobody restarts the agent.
    std::fs::write(scene.files.join("token"), "another-token")?;
    let read = async || Ok(scene.read(&agent).await? == 200);
    darter_tests::stage::eventually("it is read", read).await.with_context(|| agent.log())?;
    scene.asked_as("ASIAPODIDENTITY")
}
