//! The example that users begin with: KEDA's own kinds have it, and KEDA does what it says.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use darter_tests::api::Objects;
use darter_tests::chart;
use darter_tests::external_scaler::{ExternalScaler, Says};
use darter_tests::kube_cluster::KubeCluster;
use darter_tests::kubernetes::path;
use darter_tests::tls::Authority;
use darter_tests::tools::can_run;
use http::Method;
use serde_json::{Value, json};

use crate::activation::NEEDS;

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/models/deployments";
const HPAS: &str = "/apis/autoscaling/v2/namespaces/models/horizontalpodautoscalers";

#[tokio::test]
#[ignore = "make test-kube"]
async fn the_example_has_keda_ask_a_scaler_that_it_knows_by_its_certificate() -> Result<()> {
    if !can_run("the_example_has_keda_ask_a_scaler_that_it_knows_by_its_certificate", &NEEDS) {
        return Ok(());
    }
    let cluster = KubeCluster::start().await?.with_keda().await?;
    let api = cluster.api();
    cluster.plane().namespace("models").await?;
    let authority = Authority::new()?;
    let identity = authority.issue(&[&cluster.place().address().to_string()])?;
    let scaler = ExternalScaler::start(cluster.place(), Some(&identity))?;
    scaler.say(Some(Says { active: false, replicas: 0.0 }));
    let secret = json!({ "apiVersion": "v1", "kind": "Secret",
        "metadata": { "namespace": "models", "name": "darter-scaler-ca" },
        "data": { "ca.crt": STANDARD.encode(authority.pem()) } });
    api.apply(&secret).await?;
    let labels = json!({ "app": "llm" });
    let pod = json!({ "containers": [{ "name": "llm", "image": "registry.example.com/llm:v1" }] });
    let deployment = json!({ "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "namespace": "models", "name": "llm" }, "spec": { "replicas": 0,
            "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": pod } } });
    api.apply(&deployment).await?;
    let mut objects = chart::objects(&fs::read_to_string(chart::root().join("deploy/examples/scaledobject.yaml"))?)?;
    assert_eq!(objects.len(), 2);
    // There is no DNS here.
    let address = &mut objects[1]["spec"]["triggers"][0]["metadata"]["scalerAddress"];
    assert_eq!(*address, "darter-scaler.darter.svc:4010");
    *address = json!(scaler.address().to_string());
    let apply = async |object: &Value| {
        let path = format!("{}?fieldManager=tests&fieldValidation=Strict", path(object)?);
        api.call(Method::PATCH, &path, Some(("application/apply-patch+yaml", object))).await
    };
    for object in &objects {
        apply(object).await?;
    }
    // What is unknown is refused, so that what was taken is known.
    let mut wrong = objects[1].clone();
    wrong["spec"]["pollingIntervall"] = json!(30);
    let error = apply(&wrong).await.err().context("an unknown field was taken")?;
    ensure!(format!("{error:#}").contains("pollingIntervall"), "{error:#}");
    // KEDA makes an HPA of it that follows each word at once, and is told by the scaler when to begin.
    let hpa = api.until(HPAS, "KEDA makes an HPA", |all: &Objects| all.values().next().cloned()).await;
    let behavior = hpa.with_context(|| cluster.log())?["spec"]["behavior"].clone();
    assert_eq!(
        (&behavior["scaleDown"]["stabilizationWindowSeconds"], &behavior["scaleUp"]["tolerance"]),
        (&json!(0), &json!("0"))
    );
    scaler.say(Some(Says { active: true, replicas: 1.0 }));
    let scaled = |all: &Objects| all.get("models/llm").is_some_and(|one| one["spec"]["replicas"] == 1).then_some(());
    api.until(DEPLOYMENTS, "it is scaled", scaled).await.with_context(|| cluster.log())?;
    // And when to end: nothing is waited for after its word but the next poll.
    scaler.say(Some(Says { active: false, replicas: 0.0 }));
    let ended = |all: &Objects| all.get("models/llm").is_some_and(|one| one["spec"]["replicas"] == 0).then_some(());
    api.until(DEPLOYMENTS, "it is scaled to none", ended).await.with_context(|| cluster.log())?;
    let calls = scaler.calls();
    let has_pool = calls.iter().all(|call| call.metadata.get("pool").is_some_and(|pool| pool == "l4"));
    ensure!(has_pool, "{calls:?}");
    Ok(())
}
