//! The fake ECR behaves as ECR is known to, each fault is what it says on the wire, and the
//! emulator sends what containerd sends.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use darter_core::manifest::ACCEPT;
use darter_tests::emulator::{Emulator, End, Exchange, Host, raw};
use darter_tests::fake_ecr::{Auth, FakeEcr, Fault, Kind, Options, Rule};
use darter_tests::http::{Answer, Client};
use darter_tests::image::{Format, Image};
use darter_tests::imds::Imds;
use darter_tests::net::Place;
use http::{Method, Request};
use tokio::time::Instant;

const KIB: u64 = 1024;

fn public(layers: &[u64]) -> Result<(FakeEcr, Image)> {
    let ecr = FakeEcr::start(&Place::Host, Options { auth: Auth::Public, ..Options::default() })?;
    let image = Image::index(Format::Oci, 1, layers)?;
    ecr.push(&image, "team/app", "v1");
    Ok((ecr, image))
}

/// Where the object storage serves the first layer, for a short while.
async fn signed(ecr: &FakeEcr, image: &Image) -> Result<String> {
    let url = format!("{}/v2/team/app/blobs/{}", ecr.url(), image.layers[0].digest());
    let answer = Client::new(Place::Host).get(&url).await?;
    ensure!(answer.status == 307, "{}", answer.status);
    Ok(answer.header("location").to_owned())
}

async fn token(ecr: &FakeEcr, region: &str) -> Result<Answer> {
    let authorization =
        format!("AWS4-HMAC-SHA256 Credential=AK/20260101/{region}/ecr/aws4_request, SignedHeaders=host");
    let request = Request::post(format!("{}/", ecr.api_url()))
        .header("x-amz-target", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken")
        .header("x-amz-date", "20260101T000000Z")
        .header("authorization", authorization)
        .body(http_body_util::Full::new(bytes::Bytes::from_static(b"{}")))?;
    Client::new(Place::Host).whole(request).await
}

#[tokio::test]
async fn the_api_gives_a_token_that_the_registry_takes() -> Result<()> {
    let ecr = FakeEcr::start(&Place::Host, Options::default())?;
    let image = Image::new(Format::Docker, 1, &[KIB])?;
    ecr.push(&image, "team/app", "v1");
    let url = format!("{}/v2/team/app/manifests/v1", ecr.url());

    let refused = Client::new(Place::Host).get(&url).await?;
    ensure!(refused.status == 401);
    let challenge =
        r#"Basic realm="https://123456789012.dkr.ecr.us-east-1.amazonaws.com/",service="ecr.amazonaws.com""#;
    ensure!(refused.header("www-authenticate") == challenge);

    ensure!(token(&ecr, "eu-west-1").await?.status == 400);
    let given = token(&ecr, "us-east-1").await?;
    ensure!(given.status == 200, "{}", given.text());
    let given: serde_json::Value = serde_json::from_slice(&given.body)?;
    let given = given["authorizationData"][0]["authorizationToken"].as_str().context("no token")?;
    let pair = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(given)?)?;
    let (user, password) = pair.split_once(':').context("no password")?;
    let client = Client::new(Place::Host).basic(user, password);
    ensure!(client.get(&url).await?.status == 200);
    ensure!(ecr.count(Kind::Token).requests == 2 && ecr.count(Kind::Token).granted == 1);

    ecr.revoke_tokens();
    ensure!(client.get(&url).await?.status == 401);
    Ok(())
}

#[tokio::test]
async fn a_manifest_says_its_digest_only_to_head_and_a_blob_has_no_head() -> Result<()> {
    let (ecr, image) = public(&[KIB])?;
    let client = Client::new(Place::Host);
    let url = format!("{}/v2/team/app/manifests/v1", ecr.url());
    let head = client.head(&url).await?;
    ensure!(head.status == 200 && head.header("docker-content-digest") == image.root.digest().to_string());
    ensure!(head.header("content-length") == image.root.size().to_string());
    let get = client.call(Method::GET, &url, &[("accept", ACCEPT)]).await?;
    ensure!(get.status == 200 && get.header("docker-content-digest").is_empty());
    ensure!(
        get.body == image.root.content.to_bytes() && get.header("content-type") == image.root.descriptor.media_type
    );
    ensure!(client.call(Method::GET, &url, &[("accept", "application/json")]).await?.status == 404);
    let blob = format!("{}/v2/team/app/blobs/{}", ecr.url(), image.layers[0].digest());
    ensure!(client.head(&blob).await?.status == 403);
    let missing = client.get(&format!("{}/v2/team/app/manifests/v2", ecr.url())).await?;
    ensure!(missing.status == 404 && missing.text().contains("MANIFEST_UNKNOWN"));
    let missing = client.get(&format!("{}/v2/nobody/app/manifests/v1", ecr.url())).await?;
    ensure!(missing.status == 404 && missing.text().contains("NAME_UNKNOWN"));
    let tags = client.get(&format!("{}/v2/team/app/tags/list", ecr.url())).await?;
    ensure!(tags.text() == r#"{"name":"team/app","tags":["v1"]}"#);
    Ok(())
}

#[tokio::test]
async fn a_blob_is_redirected_to_a_storage_that_is_picky() -> Result<()> {
    let (ecr, image) = public(&[100 * KIB])?;
    let client = Client::new(Place::Host);
    let layer = image.layers[0].content.to_bytes();
    let url = signed(&ecr, &image).await?;
    ensure!(url.starts_with(&ecr.storage_url()));
    ensure!(client.get(&url).await?.body == layer);

    let part = client.call(Method::GET, &url, &[("range", "bytes=1000-")]).await?;
    ensure!(part.status == 206 && part.body == layer.slice(1000..));
    ensure!(part.header("content-range") == format!("bytes 1000-{}/{}", layer.len() - 1, layer.len()));
    ensure!(client.call(Method::GET, &url, &[("range", "bytes=999999999-")]).await?.status == 416);

    ensure!(client.clone().basic("AWS", "x").get(&url).await?.status == 400);
    ensure!(client.head(&url).await?.status == 403);
    let digest = image.layers[0].digest();
    ensure!(ecr.count_of(Kind::Object, digest).bytes >= 2 * layer.len() as u64 - 1000);
    ensure!(ecr.count_of(Kind::Blob, digest).granted == 1);

    ecr.expire_signatures();
    ensure!(client.get(&url).await?.status == 403);
    ecr.set_signature_lifetime(Duration::ZERO);
    ensure!(client.get(&signed(&ecr, &image).await?).await?.status == 403);
    Ok(())
}

#[tokio::test]
async fn a_bearer_registry_sends_to_its_token_server() -> Result<()> {
    let account = ("ann".to_owned(), "secret".to_owned());
    for (wanted, tls) in [(None, false), (Some(account), true)] {
        let auth = Auth::Bearer(wanted.clone());
        let ecr = FakeEcr::start(&Place::Host, Options { auth, tls, ..Options::default() })?;
        ecr.push(&Image::new(Format::Oci, 1, &[1])?, "team/app", "v1");
        let mut client = Client::new(Place::Host);
        if let Some(authority) = ecr.authority() {
            client = client.trusting(authority.client_config()?);
        }
        let url = format!("{}/v2/team/app/manifests/v1", ecr.url());
        let refused = client.get(&url).await?;
        let realm = format!("{}/token", ecr.url());
        let challenge = format!(r#"Bearer realm="{realm}",service="fake",scope="repository:team/app:pull""#);
        ensure!(refused.status == 401 && refused.header("www-authenticate") == challenge);
        let token_url = format!("{realm}?service=fake&scope=repository:team/app:pull");
        let given = match &wanted {
            None => client.get(&token_url).await?,
            Some((user, password)) => {
                ensure!(client.get(&token_url).await?.status == 401);
                client.clone().basic(user, password).get(&token_url).await?
            }
        };
        let given: serde_json::Value = serde_json::from_slice(&given.body)?;
        let bearer = format!("Bearer {}", given["token"].as_str().context("no token")?);
        ensure!(client.call(Method::GET, &url, &[("authorization", &bearer)]).await?.status == 200);
    }
    Ok(())
}

/// One GET of the first layer at the object storage, watched.
async fn watched(ecr: &FakeEcr, image: &Image) -> Result<(Exchange, Vec<u8>)> {
    let url = signed(ecr, image).await?;
    let rest = url.strip_prefix("http://").context("scheme")?;
    let (address, target) = rest.split_once('/').context("path")?;
    let address: SocketAddr = address.parse()?;
    let patience = Duration::from_millis(400);
    let mut answer = raw::send(&Place::Host, address, &format!("GET /{target}"), &[], patience).await?;
    let mut body = Vec::new();
    if answer.exchange.end == End::Open {
        answer.read(None, |bytes| body.extend_from_slice(bytes)).await?;
    }
    Ok((answer.exchange, body))
}

#[tokio::test]
async fn each_fault_is_on_the_wire_what_it_says() -> Result<()> {
    let (ecr, image) = public(&[200 * KIB])?;
    let layer = image.layers[0].content.to_bytes();
    let size = layer.len() as u64;
    let on = || Rule::on(Kind::Object).digest(image.layers[0].digest());

    for (status, retry_after) in [(403, None), (404, None), (429, Some(1)), (500, None), (503, Some(2))] {
        ecr.inject(on().times(2), Fault::Status(status, retry_after));
        for _ in 0..2 {
            let (seen, _) = watched(&ecr, &image).await?;
            ensure!(seen.status == Some(status) && seen.end == End::Complete, "{seen:?}");
            ensure!(seen.header("retry-after").parse().ok() == retry_after);
        }
        ensure!(watched(&ecr, &image).await?.1 == layer, "the fault outlived its two requests");
    }

    // The client waits 400 ms.
    let start = Instant::now();
    ecr.inject(on(), Fault::Delay(Duration::from_millis(150)));
    ensure!(watched(&ecr, &image).await?.1 == layer && start.elapsed() >= Duration::from_millis(150));
    ecr.inject(on(), Fault::Delay(Duration::MAX));
    let (seen, _) = watched(&ecr, &image).await?;
    ensure!(seen.status.is_none() && seen.end == End::Silent, "{seen:?}");

    for (fault, end, bytes) in [
        (Fault::Stall(1000, Duration::MAX), End::Silent, 1000),
        (Fault::Stall(70_001, Duration::from_millis(100)), End::Complete, size),
        (Fault::StallThenFin(70_001, Duration::from_millis(100)), End::Fin, 70_001),
        (Fault::Truncate(0), End::Fin, 0),
        (Fault::Truncate(100_000), End::Fin, 100_000),
        (Fault::Reset(100_000), End::Reset, 100_000),
        (Fault::WrongLength(-10), End::Complete, size - 10),
        (Fault::WrongLength(10), End::Complete, size + 10),
    ] {
        ecr.inject(on(), fault.clone());
        let (seen, body) = watched(&ecr, &image).await?;
        ensure!(seen.status == Some(200) && seen.end == end && seen.bytes == bytes, "{fault:?}: {seen:?}");
        let same = body.len().min(layer.len());
        ensure!(body[..same] == layer[..same], "{fault:?}");
    }

    ecr.inject(on(), Fault::WrongByte(100_000));
    let (seen, body) = watched(&ecr, &image).await?;
    let wrong: Vec<usize> = (0..layer.len()).filter(|at| body[*at] != layer[*at]).collect();
    ensure!(seen.end == End::Complete && wrong == [100_000], "{wrong:?}");

    let start = Instant::now();
    ecr.inject(on(), Fault::Slow(400 * KIB));
    ensure!(watched(&ecr, &image).await?.1 == layer);
    let took = start.elapsed().as_secs_f64();
    ensure!((0.4..1.0).contains(&took), "200 KiB at 400 KiB/s took {took} s");
    Ok(())
}

#[tokio::test]
async fn bytes_and_requests_at_once_are_counted_and_rates_are_shared() -> Result<()> {
    let (ecr, image) = public(&[200 * KIB])?;
    ecr.set_rate(Some(1000 * KIB), None);
    let start = Instant::now();
    tokio::try_join!(watched(&ecr, &image), watched(&ecr, &image), watched(&ecr, &image))?;
    let took = start.elapsed().as_secs_f64();
    ensure!((0.5..1.2).contains(&took), "600 KiB at 1000 KiB/s took {took} s");
    let count = ecr.count_of(Kind::Object, image.layers[0].digest());
    ensure!(count.requests == 3 && count.at_once == 3 && count.bytes == 3 * image.layers[0].size(), "{count:?}");

    // What was sent before the end counts, and no more.
    ecr.reset_counts();
    ecr.set_rate(None, None);
    ecr.inject(Rule::on(Kind::Object), Fault::Truncate(5000));
    watched(&ecr, &image).await?;
    ensure!(ecr.blob_bytes() == 5000);
    let log = ecr.log();
    ensure!(log.last().is_some_and(|seen| seen.kind == Kind::Object && seen.status == 200 && seen.bytes() == 5000));
    Ok(())
}

#[tokio::test]
async fn a_registry_that_is_down_refuses_and_comes_back_at_its_address() -> Result<()> {
    let (mut ecr, image) = public(&[KIB])?;
    let address = ecr.address();
    ecr.down().await;
    let refused = raw::send(&Place::Host, address, "GET /v2/", &[], Duration::from_secs(1)).await?;
    ensure!(refused.exchange.end == End::Refused, "{refused:?}");
    ecr.up()?;
    ensure!(ecr.address() == address && watched(&ecr, &image).await?.0.end == End::Complete);
    Ok(())
}

#[tokio::test]
async fn the_metadata_service_wants_its_token() -> Result<()> {
    let imds = Imds::start(&Place::Host, "123456789012", "eu-west-1")?;
    let client = Client::new(Place::Host);
    let document = format!("{}/latest/dynamic/instance-identity/document", imds.url());
    ensure!(client.get(&document).await?.status == 401);
    let ttl = [("x-aws-ec2-metadata-token-ttl-seconds", "21600")];
    let token = client.call(Method::PUT, &format!("{}/latest/api/token", imds.url()), &ttl).await?.text();
    let with = [("x-aws-ec2-metadata-token", token.as_str())];
    let document: serde_json::Value = serde_json::from_slice(&client.call(Method::GET, &document, &with).await?.body)?;
    ensure!(document["accountId"] == "123456789012" && document["region"] == "eu-west-1");
    let role = format!("{}/latest/meta-data/iam/security-credentials/node-role", imds.url());
    ensure!(client.call(Method::GET, &role, &with).await?.text().contains("ASIAEXAMPLE"));
    ensure!(imds.credential_requests() == 1);
    Ok(())
}

/// A client of a mirror (a second registry stands for it) and of the registry itself.
async fn mirror_and_origin() -> Result<(FakeEcr, FakeEcr, Image, Emulator)> {
    let (origin, image) = public(&[300 * KIB, 5000])?;
    // A mirror answers blobs itself.
    let mirror = FakeEcr::start(&Place::Host, Options { auth: Auth::Public, redirect: false, ..Options::default() })?;
    mirror.push(&image, "team/app", "v1");
    let hosts = [Host::new(mirror.address()), Host::new(origin.address())];
    let emulator = Emulator::new(&Place::Host, &origin.name(), &hosts).patience(Duration::from_millis(500));
    Ok((mirror, origin, image, emulator))
}

#[tokio::test]
async fn the_emulator_asks_in_containerds_order() -> Result<()> {
    let (mirror, origin, image, emulator) = mirror_and_origin().await?;
    emulator.pull("team/app", "v1").await?;
    let lines: Vec<String> = mirror.log().into_iter().map(|seen| seen.line).collect();
    let ns = format!("ns={}", origin.name());
    let (root, amd64) = (image.root.digest(), image.manifests[0].digest());
    let expected = [
        format!("HEAD /v2/team/app/manifests/v1?{ns}"),
        format!("GET /v2/team/app/manifests/{root}?{ns}"),
        format!("GET /v2/team/app/manifests/{amd64}?{ns}"),
        format!("GET /v2/team/app/blobs/{}?{ns}", image.config.digest()),
        format!("GET /v2/team/app/blobs/{}?{ns}", image.layers[0].digest()),
        format!("GET /v2/team/app/blobs/{}?{ns}", image.layers[1].digest()),
    ];
    ensure!(lines[..3] == expected[..3], "{lines:#?}");
    let mut blobs = lines[3..].to_vec();
    blobs.sort();
    let mut expected = expected[3..].to_vec();
    expected.sort();
    ensure!(blobs == expected, "{lines:#?}");
    ensure!(origin.log().is_empty());
    Ok(())
}

#[tokio::test]
async fn the_emulator_resumes_a_short_body_over_the_host_list_and_no_other() -> Result<()> {
    let (mirror, origin, image, emulator) = mirror_and_origin().await?;
    let layer = &image.layers[0];
    let on = || Rule::on(Kind::Blob).digest(layer.digest());

    mirror.inject(on(), Fault::Truncate(100_000));
    mirror.inject(on(), Fault::Status(404, None));
    emulator.blob("team/app", &layer.descriptor).await?;
    let seen: Vec<_> = mirror.log().iter().map(|seen| (seen.range.clone(), seen.status)).collect();
    ensure!(seen == [(String::new(), 200), ("bytes=100000-".to_owned(), 404)], "{seen:?}");
    ensure!(origin.count_of(Kind::Object, layer.digest()).bytes == layer.size() - 100_000);
    ensure!(emulator.seen()[0].end == End::Fin);

    mirror.inject(on(), Fault::Reset(100_000));
    ensure!(emulator.blob("team/app", &layer.descriptor).await.is_err());
    mirror.inject(on(), Fault::WrongByte(7));
    ensure!(emulator.blob("team/app", &layer.descriptor).await.is_err());
    ensure!(origin.count_of(Kind::Object, layer.digest()).requests == 1);

    // 429 is repeated at once, 6 requests in all, and then the next host is asked.
    mirror.reset_counts();
    mirror.inject(on().always(), Fault::Status(429, None));
    emulator.blob("team/app", &layer.descriptor).await?;
    ensure!(mirror.count_of(Kind::Blob, layer.digest()).requests == 6);
    Ok(())
}

#[tokio::test]
async fn the_emulator_fetches_in_open_ended_chunks() -> Result<()> {
    let (mirror, _origin, image, emulator) = mirror_and_origin().await?;
    let layer = &image.layers[0];
    emulator.chunks("team/app", &layer.descriptor, 100_000).await?;
    let mut ranges: Vec<String> = mirror.log().into_iter().map(|seen| seen.range).collect();
    ranges.sort();
    ensure!(ranges == ["bytes=0-", "bytes=100000-", "bytes=200000-", "bytes=300000-"], "{ranges:?}");
    for seen in emulator.seen() {
        let last = seen.range == "bytes=300000-";
        ensure!(seen.end == if last { End::Complete } else { End::Left }, "{seen:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_emulator_gives_its_credential_to_whoever_asks() -> Result<()> {
    let ecr = FakeEcr::start(&Place::Host, Options::default())?;
    let image = Image::new(Format::Docker, 1, &[KIB])?;
    ecr.push(&image, "team/app", "v1");
    let emulator = Emulator::new(&Place::Host, &ecr.name(), &[Host::new(ecr.address())]);
    ensure!(emulator.pull("team/app", "v1").await.is_err());
    ecr.reset_counts();
    emulator.credential("AWS", &ecr.password()).pull("team/app", "v1").await?;
    let refused: Vec<_> = ecr.log().into_iter().filter(|seen| seen.status == 401).collect();
    ensure!(refused.len() == 1 && refused[0].authorization.is_empty(), "{refused:#?}");
    Ok(())
}
