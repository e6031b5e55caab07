//! Spare GPUs of a pool, by whatever this cluster has for that: a CapacityBuffer, a Deployment of placeholders, or
//! the number of nodes of a pool that has a fixed one.
//!
//! They are made by whoever installs this scaler, in its namespace and with the label `darter.dev/pool`; here only a
//! number in them changes. The annotation `darter.dev/gpus` says how many GPUs one replica is, if not one.

use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::{Wrong, notes};
use crate::kubernetes::MANAGER;
use crate::kubernetes::events::{About, Said};
use crate::kubernetes::settings::Settings;
use crate::kubernetes::watch::served::Kind;

/// Whose it is.
pub(super) const POOL: &str = "darter.dev/pool";
/// GPUs of one replica.
const GPUS: &str = "darter.dev/gpus";
/// What a CapacityBuffer's number was before us.
pub(super) const BEFORE: &str = "darter.dev/replicas-before";
/// It had none.
const NONE: &str = "none";

const BUFFERS: Kind = Kind {
    group: "autoscaling.x-k8s.io",
    versions: &["v1beta1"],
    plural: "capacitybuffers",
    without: "spare GPUs are kept by placeholders",
};
const BUFFER_RIGHTS: &str =
    "a Role in its namespace that lets it list and patch capacitybuffers (autoscaling.x-k8s.io)";
const DEPLOYMENT_RIGHTS: &str =
    "a Role in its namespace that lets it list deployments, and get and patch deployments/scale (apps)";
const POOL_RIGHTS: &str = "a ClusterRole that lets it get nodepools, and get and patch nodepools/scale (karpenter.sh)";

/// What keeps the spare GPUs, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spare {
    about: About,
    pub(super) replicas: i64,
    /// What it was, if it was something else.
    was: Option<i64>,
}

impl Spare {
    pub(super) fn kind(&self) -> &str {
        &self.about.kind
    }

    /// None where nothing changed.
    pub(super) fn said(&self, reason: &str) -> Option<Said> {
        let was = self.was.filter(|was| *was != self.replicas)?;
        let note = format!("Spare replicas {was} -> {}: {reason}", self.replicas);
        Some(Said { about: self.about.clone(), is_warning: false, reason: "SpareChanged", action: "Keep", note })
    }
}

/// Keeps so many.
pub(super) async fn keep(client: &Client, settings: &Settings, pool: &str, gpus: u32) -> Result<Spare, Wrong> {
    if let Some(spare) = by_buffer(client, pool, gpus).await? {
        return Ok(spare);
    }
    if let Some(spare) = by_placeholders(client, pool, gpus).await? {
        return Ok(spare);
    }
    if settings.static_pools
        && let Some(spare) = by_nodes(client, settings, pool, gpus).await?
    {
        return Ok(spare);
    }
    let namespace = client.default_namespace();
    Err(Wrong::Failed(
        "not_found",
        format!(
            "nothing keeps spare GPUs of pool {pool}: namespace {namespace} has neither a CapacityBuffer nor a \
             Deployment with the label {POOL}={pool}"
        ),
    ))
}

/// CapacityBuffers of this namespace that are ours to set; none where there is no such kind.
pub(super) async fn buffers(
    client: &Client,
    selector: &str,
) -> Result<Option<(Api<DynamicObject>, Vec<DynamicObject>)>, Wrong> {
    let version = BUFFERS.version(client).await.map_err(|error| Wrong::of(&error, BUFFER_RIGHTS))?;
    let Some(version) = version else { return Ok(None) };
    let kind = GroupVersionKind::gvk(BUFFERS.group, version, "CapacityBuffer");
    let api = Api::default_namespaced_with(client.clone(), &ApiResource::from_gvk_with_plural(&kind, BUFFERS.plural));
    let params = ListParams::default().labels(selector);
    let list = api.list(&params).await.map_err(|error| Wrong::of(&error, BUFFER_RIGHTS))?;
    Ok(Some((api, list.items)))
}

async fn by_buffer(client: &Client, pool: &str, gpus: u32) -> Result<Option<Spare>, Wrong> {
    let Some((api, found)) = buffers(client, &format!("{POOL}={pool}")).await? else { return Ok(None) };
    let Some(buffer) = only(found, "CapacityBuffers", pool)? else { return Ok(None) };
    let replicas = replicas(&buffer, gpus);
    let was = buffer.data["spec"]["replicas"].as_i64();
    let before = was.map_or_else(|| NONE.to_owned(), |was| was.to_string());
    let noted = buffer.annotations().contains_key(BEFORE);
    if was != Some(replicas) || !noted {
        let mut patch = json!({ "spec": { "replicas": replicas } });
        if !noted {
            patch["metadata"] = json!({ "annotations": { BEFORE: before } });
        }
        set(&api, &buffer, &patch).await?;
    }
    let about = About {
        api_version: format!("{}/{}", BUFFERS.group, BUFFERS.versions[0]),
        kind: "CapacityBuffer".to_owned(),
        namespace: buffer.namespace(),
        name: buffer.name_any(),
        uid: buffer.uid(),
    };
    Ok(Some(Spare { about, replicas, was: Some(was.unwrap_or(0)) }))
}

/// The number that it had before us.
pub(super) async fn restore(api: &Api<DynamicObject>, buffer: &DynamicObject) -> Result<bool, Wrong> {
    let Some(before) = buffer.annotations().get(BEFORE) else { return Ok(false) };
    let replicas = before.parse::<i64>().map_or(Value::Null, Value::from);
    let patch = json!({ "metadata": { "annotations": { BEFORE: null } }, "spec": { "replicas": replicas } });
    set(api, buffer, &patch).await.map(|()| true)
}

async fn set(api: &Api<DynamicObject>, buffer: &DynamicObject, patch: &Value) -> Result<(), Wrong> {
    let mut patch = patch.clone();
    // Another one of the same name is not this one.
    patch["metadata"]["uid"] = json!(buffer.uid());
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let written = api.patch(&buffer.name_any(), &params, &Patch::Merge(&patch)).await;
    written.map(drop).map_err(|error| Wrong::of(&error, BUFFER_RIGHTS))
}

/// Placeholders of this namespace that are ours to set.
pub(super) async fn placeholders(client: &Client, selector: &str) -> Result<Vec<Deployment>, Wrong> {
    let api = Api::<Deployment>::default_namespaced(client.clone());
    let list = api.list(&ListParams::default().labels(selector)).await;
    list.map(|list| list.items).map_err(|error| Wrong::of(&error, DEPLOYMENT_RIGHTS))
}

async fn by_placeholders(client: &Client, pool: &str, gpus: u32) -> Result<Option<Spare>, Wrong> {
    let found = placeholders(client, &format!("{POOL}={pool}")).await?;
    let Some(deployment) = only(found, "Deployments", pool)? else { return Ok(None) };
    let replicas = replicas(&deployment, gpus);
    let was = deployment.spec.as_ref().and_then(|spec| spec.replicas).map_or(1, i64::from);
    if was != replicas {
        scale_placeholders(client, &deployment.name_any(), replicas).await?;
    }
    let about = About {
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        namespace: deployment.namespace(),
        name: deployment.name_any(),
        uid: deployment.uid(),
    };
    Ok(Some(Spare { about, replicas, was: Some(was) }))
}

/// By /scale: whoever may patch a Deployment may run anything in it.
pub(super) async fn scale_placeholders(client: &Client, name: &str, replicas: i64) -> Result<(), Wrong> {
    let api = Api::<Deployment>::default_namespaced(client.clone());
    scale(&api, name, replicas, DEPLOYMENT_RIGHTS).await
}

async fn by_nodes(client: &Client, settings: &Settings, pool: &str, gpus: u32) -> Result<Option<Spare>, Wrong> {
    let api = pools(client);
    let found = api.get_opt(pool).await.map_err(|error| Wrong::of(&error, POOL_RIGHTS))?;
    let Some(found) = found else { return Ok(None) };
    // One without a number grows and shrinks with its pods.
    let Some(was) = found.data["spec"]["replicas"].as_i64() else { return Ok(None) };
    // Noted before anything changes: without a note nobody knows what was ours.
    let before = notes::before(client, settings, pool, was).await?;
    let replicas = before.saturating_add(replicas(&found, gpus));
    if was != replicas {
        scale(&api, pool, replicas, POOL_RIGHTS).await?;
    }
    let about = About {
        api_version: "karpenter.sh/v1".to_owned(),
        kind: "NodePool".to_owned(),
        namespace: None,
        name: pool.to_owned(),
        uid: found.uid(),
    };
    Ok(Some(Spare { about, replicas, was: Some(was) }))
}

fn pools(client: &Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("karpenter.sh", "v1", "NodePool");
    Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&kind, "nodepools"))
}

/// Sets the number of nodes of a pool that has a fixed one.
pub(super) async fn scale_pool(client: &Client, pool: &str, replicas: i64) -> Result<(), Wrong> {
    scale(&pools(client), pool, replicas, POOL_RIGHTS).await
}

async fn scale<K>(api: &Api<K>, name: &str, replicas: i64, rights: &str) -> Result<(), Wrong>
where
    K: Clone + serde::de::DeserializeOwned,
{
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let patch = json!({ "spec": { "replicas": replicas } });
    let scaled = api.patch_scale(name, &params, &Patch::Merge(&patch)).await;
    scaled.map(drop).map_err(|error| Wrong::of(&error, rights))
}

fn only<T>(mut found: Vec<T>, what: &str, pool: &str) -> Result<Option<T>, Wrong> {
    match found.len() {
        0 | 1 => Ok(found.pop()),
        count => {
            let text = format!("{count} {what} have the label {POOL}={pool}: which one keeps the spare GPUs?");
            Err(Wrong::Failed("invalid", text))
        }
    }
}

fn replicas(object: &impl kube::ResourceExt, gpus: u32) -> i64 {
    let each = object.annotations().get(GPUS).and_then(|gpus| gpus.parse::<u32>().ok()).unwrap_or(1);
    gpus.div_ceil(each.max(1)).into()
}
