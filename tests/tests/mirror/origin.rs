//! The agent's client of registries against the fake ECR: as on EC2, with TLS, and when it fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use darter_agent::config::{Config, RegistryConfig};
use darter_agent::metrics::Metrics;
use darter_agent::origin::{Credential, Origin, OriginError, Shared};
use darter_core::range::Span;
use darter_core::units::Seconds;
use darter_core::{Reference, Repository};
use darter_tests::fake_ecr::{Auth, FakeEcr, Fault, Kind, Options, Rule};
use darter_tests::image::{Format, Image};
use darter_tests::imds::Imds;
use darter_tests::net::Place;
use tempfile::TempDir;

const KIB: u64 = 1024;

/// A registry with one image, and a client that is configured for it.
struct Setting {
    ecr: FakeEcr,
    image: Image,
    imds: Imds,
    origin: Origin,
    metrics: Arc<Metrics>,
    _files: TempDir,
}

impl Setting {
    async fn new(options: Options, change: impl FnOnce(&mut Config, &mut RegistryConfig)) -> Result<Self> {
        let ecr = FakeEcr::start(&Place::Host, options)?;
        let image = Image::index(Format::Oci, 1, &[300 * KIB])?;
        ecr.push(&image, "team/app", "v1");
        let imds = Imds::start(&Place::Host, "123456789012", "us-east-1")?;
        let files = TempDir::new()?;
        let mut config = Config::embedded();
        config.aws.ecr_endpoint = Some(ecr.api_url());
        config.aws.imds_endpoint = Some(imds.url());
        config.origin.stall = Seconds(Duration::from_millis(500));
        config.origin.allow_local = vec![Place::Host.second_address().to_string()];
        let mut registry = RegistryConfig::named(ecr.name().parse()?);
        registry.endpoint = Some(ecr.url());
        registry.plain_http = ecr.authority().is_none();
        if let Some(authority) = ecr.authority() {
            let path = files.path().join("ca.pem");
            std::fs::write(&path, authority.pem())?;
            registry.ca = Some(path);
        }
        change(&mut config, &mut registry);
        let shared = Shared::new(&config).await?;
        let metrics = Arc::new(Metrics::new("0", "0"));
        let origin = Origin::new(&config, &registry, &[], &shared, metrics.clone())?;
        Ok(Self { ecr, image, imds, origin, metrics, _files: files })
    }

    /// The layer, in four ranges at once.
    async fn layer(&self, who: &Credential) -> Result<Vec<u8>, OriginError> {
        let (digest, size) = (self.image.layers[0].digest(), self.image.layers[0].size());
        let quarter = size / 4;
        let spans = (0..4).map(|n| Span { start: n * quarter, end: if n == 3 { size } else { (n + 1) * quarter } });
        let parts = spans.map(|span| async move {
            let mut stream = self.origin.blob(&repository(), &digest, Some(span), who).await?;
            assert_eq!((stream.start, stream.size), (span.start, Some(size)));
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.next().await {
                bytes.extend_from_slice(&chunk?);
            }
            Ok(bytes)
        });
        Ok(futures_util::future::try_join_all(parts).await?.concat())
    }

    async fn pull(&self, who: &Credential) -> Result<()> {
        let tag: Reference = "v1".parse()?;
        let head = self.origin.head_manifest(&repository(), &tag, who).await?;
        ensure!(head.digest == Some(self.image.root.digest()));
        let digest = Reference::Digest(head.digest.context("no digest")?);
        let fetched = self.origin.manifest(&repository(), &digest, who).await?;
        ensure!(fetched.content == self.image.root.content.to_bytes());
        ensure!(fetched.media_type == self.image.root.descriptor.media_type);
        ensure!(self.layer(who).await? == self.image.layers[0].content.to_bytes());
        Ok(())
    }
}

fn repository() -> Repository {
    "team/app".parse().expect("a repository")
}

#[tokio::test]
async fn a_node_pulls_from_ecr_with_its_role_with_and_without_tls() -> Result<()> {
    for tls in [false, true] {
        let setting = Setting::new(Options { tls, ..Options::default() }, |_, _| {}).await?;
        setting.pull(&Credential::Node).await?;
        ensure!(setting.imds.credential_requests() == 1);
        ensure!(setting.ecr.count(Kind::Token).granted == 1);
        ensure!(setting.ecr.count(Kind::Blob).requests == 1, "four ranges, one signed URL");
        ensure!(setting.ecr.count(Kind::Object).granted == 4);
        ensure!(setting.ecr.count(Kind::BlobHead).requests == 0);
        ensure!(setting.ecr.log().iter().all(|seen| seen.kind != Kind::Object || seen.authorization.is_empty()));

        // Passwords and signatures end, and nobody who pulls notices.
        setting.ecr.revoke_tokens();
        setting.ecr.expire_signatures();
        setting.pull(&Credential::Node).await?;
        ensure!(setting.ecr.count(Kind::Token).granted == 2);
        ensure!(setting.ecr.count(Kind::Blob).granted == 2, "exactly one new signed URL");

        let denied = setting.origin.head_manifest(&repository(), &"v1".parse()?, &Credential::Anonymous).await;
        ensure!(matches!(denied, Err(OriginError::Denied { status: 401 })));
    }
    Ok(())
}

#[tokio::test]
async fn a_pods_own_password_is_taken() -> Result<()> {
    let setting = Setting::new(Options::default(), |_, _| {}).await?;
    let encode = |text: String| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, text);
    let header = format!("Basic {}", encode(format!("AWS:{}", setting.ecr.password())));
    setting.pull(&Credential::from_header(&header).context("no credential")?).await?;
    ensure!(setting.ecr.count(Kind::Token).requests == 0);
    let wrong = Credential::from_header(&format!("Basic {}", encode("AWS:guess".into()))).context("no credential")?;
    let error = setting.layer(&wrong).await.expect_err("a guess");
    ensure!(matches!(error, OriginError::Denied { status: 401 }), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn a_bearer_registry_gives_tokens_for_the_pull_over_tls() -> Result<()> {
    let account = Some(("ann".to_owned(), "secret".to_owned()));
    let options = Options { auth: Auth::Bearer(account), tls: true, redirect: false, ..Options::default() };
    let files = TempDir::new()?;
    let docker = files.path().join("config.json");
    let setting = Setting::new(options, |_, registry| {
        registry.name = "reg.example".parse().expect("a registry");
        registry.docker_config = Some(docker.clone());
    })
    .await?;
    std::fs::write(&docker, r#"{"auths":{"reg.example":{"username":"ann","password":"secret"}}}"#)?;
    setting.pull(&Credential::Node).await?;
    ensure!(setting.ecr.count(Kind::Token).granted == 1);
    setting.ecr.revoke_tokens();
    setting.pull(&Credential::Node).await?;
    ensure!(setting.ecr.count(Kind::Token).granted == 2);
    Ok(())
}

#[tokio::test]
async fn what_fails_is_asked_again_and_what_breaks_is_told() -> Result<()> {
    let setting = Setting::new(Options { auth: Auth::Public, ..Options::default() }, |_, _| {}).await?;
    let digest = setting.image.layers[0].digest();
    setting.ecr.inject(Rule::on(Kind::Manifest), Fault::Status(429, Some(1)));
    setting.ecr.inject(Rule::on(Kind::Object).times(2), Fault::Status(503, None));
    setting.ecr.inject(Rule::on(Kind::Token), Fault::Status(500, None));
    setting.pull(&Credential::Anonymous).await?;
    let text = setting.metrics.render();
    ensure!(text.contains(r#"darter_origin_retries_total{reason="throttled"} 1"#), "{text}");

    for (fault, wanted) in [
        (Fault::Truncate(1000), "ended at offset"),
        (Fault::Reset(1000), "broke off"),
        (Fault::StallThenFin(1000, Duration::from_secs(5)), "sent nothing"),
    ] {
        setting.ecr.inject(Rule::on(Kind::Object).digest(digest), fault.clone());
        let error = setting.layer(&Credential::Anonymous).await.expect_err("a fault");
        ensure!(error.to_string().contains(wanted) && error.is_retryable(), "{fault:?}: {error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn without_the_ca_there_is_no_connection() -> Result<()> {
    let setting = Setting::new(Options { tls: true, ..Options::default() }, |config, registry| {
        registry.ca = None;
        config.origin.attempts = 1;
    })
    .await?;
    let error = setting.layer(&Credential::Anonymous).await.expect_err("an unknown authority");
    ensure!(matches!(error, OriginError::Unreachable { .. }) && error.is_away(), "{error:?}");
    Ok(())
}
