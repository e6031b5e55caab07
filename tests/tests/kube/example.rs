//! The example that users begin with, as KEDA's own kinds have it.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use darter_tests::api::{define, path};
use darter_tests::chart;
use darter_tests::kubernetes::ControlPlane;
use darter_tests::net::Place;
use darter_tests::tools::{self, Need, can_run};
use http::Method;
use serde_json::json;

#[tokio::test]
#[ignore = "make test-kube"]
async fn a_real_api_server_takes_the_example_as_kedas_kinds_have_it() -> Result<()> {
    let needs = [Need::Kubernetes, Need::KedaKinds];
    if !can_run("a_real_api_server_takes_the_example_as_kedas_kinds_have_it", &needs) {
        return Ok(());
    }
    let plane = ControlPlane::start(&Place::Host).await?;
    define(&plane.api(), &tools::keda_kinds().context("no kinds of KEDA")?).await?;
    plane.namespace("models").await?;
    let text = fs::read_to_string(chart::root().join("deploy/examples/scaledobject.yaml"))?;
    let objects = chart::objects(&text)?;
    assert_eq!(objects.len(), 2);
    let apply = async |object: &serde_json::Value| {
        let path = format!("{}?fieldManager=tests&fieldValidation=Strict", path(object)?);
        plane.call(Method::PATCH, &path, Some(("application/apply-patch+yaml", object))).await
    };
    for object in &objects {
        apply(object).await?;
    }
    // What is unknown is refused, so that what was taken is known.
    let mut wrong = objects[1].clone();
    wrong["spec"]["pollingIntervall"] = json!(30);
    let error = apply(&wrong).await.err().context("an unknown field was taken")?;
    ensure!(format!("{error:#}").contains("pollingIntervall"), "{error:#}");
    Ok(())
}
