//! What numbers were before us, where no annotation can say it: a right to annotate a NodePool is one to change
//! what it launches.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use super::Wrong;
use crate::kubernetes::MANAGER;
use crate::kubernetes::settings::Settings;

const RIGHTS: &str = "a Role in its namespace that lets it create configmaps, and get and patch its own";

fn name(settings: &Settings) -> String {
    format!("{}-before", settings.lease)
}

/// The number that is noted; if none is, `now` is noted.
pub(super) async fn before(client: &Client, settings: &Settings, pool: &str, now: i64) -> Result<i64, Wrong> {
    if let Some(before) = all(client, settings).await?.into_iter().find(|(name, _)| name == pool) {
        return Ok(before.1);
    }
    write(client, settings, pool, Some(now)).await.map(|()| now)
}

/// All that is noted: pools, and the number of their nodes.
pub(super) async fn all(client: &Client, settings: &Settings) -> Result<Vec<(String, i64)>, Wrong> {
    let api = Api::<ConfigMap>::default_namespaced(client.clone());
    let found = api.get_opt(&name(settings)).await.map_err(|error| Wrong::of(&error, RIGHTS))?;
    let data = found.and_then(|map| map.data).unwrap_or_default();
    Ok(data.into_iter().filter_map(|(pool, before)| Some((pool, before.parse().ok()?))).collect())
}

/// Notes it, or takes the note away.
pub(super) async fn write(client: &Client, settings: &Settings, pool: &str, before: Option<i64>) -> Result<(), Wrong> {
    let api = Api::<ConfigMap>::default_namespaced(client.clone());
    let name = name(settings);
    let wrong = |error: kube::Error| Wrong::of(&error, RIGHTS);
    if api.get_opt(&name).await.map_err(wrong)?.is_none() {
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let empty = ConfigMap { metadata, ..ConfigMap::default() };
        match api.create(&PostParams::default(), &empty).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(wrong(error)),
        }
    }
    let before = before.map(|before| before.to_string());
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    let patch = Patch::Merge(json!({ "data": { pool: before } }));
    api.patch(&name, &params, &patch).await.map(drop).map_err(wrong)
}
