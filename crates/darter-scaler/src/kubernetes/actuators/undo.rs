//! Takes back all that was written: it is found by our field manager, our annotation and our notes, so that it does
//! not matter which scaler wrote it, or when.
//!
//! A claim that was deleted does not come back, and Events are history.

use k8s_openapi::api::core::v1;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use super::{Wrong, buffer, cost, notes};
use crate::kubernetes::MANAGER;
use crate::kubernetes::settings::Settings;

/// Pods of one answer.
const PAGE: u32 = 500;
const LIST_RIGHTS: &str = "a ClusterRole that lets it list pods";

/// What was taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Undone {
    /// Deletion costs of pods.
    pub costs: usize,
    /// CapacityBuffers that have the number of before.
    pub buffers: usize,
    /// Deployments of placeholders that are empty.
    pub placeholders: usize,
    /// Pools that have the number of nodes of before.
    pub pools: usize,
    /// What could not be taken back, and why: run it again.
    pub failed: Vec<String>,
}

/// Takes everything back, as far as that can be done; the rest is said. No scaler should act meanwhile.
pub async fn undo(client: &Client, settings: &Settings) -> Undone {
    let mut undone = Undone::default();
    costs(client, settings, &mut undone).await;
    match buffer::buffers(client, buffer::POOL).await {
        Ok(None) => {}
        Ok(Some((api, found))) => {
            for buffer in &found {
                let restored = buffer::restore(&api, buffer).await;
                undone.note(&format!("CapacityBuffer {}", buffer.name_any()), restored, |undone| &mut undone.buffers);
            }
        }
        Err(wrong) => undone.fail("CapacityBuffers", &wrong),
    }
    match buffer::placeholders(client, buffer::POOL).await {
        Ok(found) => {
            for deployment in found {
                let name = deployment.name_any();
                // Whoever made it made it for us: without us there is nothing that it stands for.
                let is_empty = deployment.spec.as_ref().and_then(|spec| spec.replicas) == Some(0);
                let scaled = match is_ours(&deployment) && !is_empty {
                    true => buffer::scale_placeholders(client, &name, 0).await.map(|()| true),
                    false => Ok(false),
                };
                undone.note(&format!("Deployment {name}"), scaled, |undone| &mut undone.placeholders);
            }
        }
        Err(wrong) => undone.fail("Deployments", &wrong),
    }
    match notes::all(client, settings).await {
        Ok(noted) => {
            for (pool, before) in noted {
                let restored = async {
                    buffer::scale_pool(client, &pool, before).await?;
                    notes::write(client, settings, &pool, None).await.map(|()| true)
                };
                let restored = restored.await;
                undone.note(&format!("NodePool {pool}"), restored, |undone| &mut undone.pools);
            }
        }
        Err(wrong) => undone.fail("the notes of NodePools", &wrong),
    }
    undone
}

async fn costs(client: &Client, settings: &Settings, undone: &mut Undone) {
    let api = Api::<v1::Pod>::all(client.clone());
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list_metadata(&params).await {
            Ok(page) => page,
            Err(error) => return undone.fail("pods", &Wrong::of(&error, LIST_RIGHTS)),
        };
        for pod in page.items.iter().filter(|pod| is_ours(*pod)) {
            let (uid, namespace, name) =
                (pod.uid().unwrap_or_default(), pod.namespace().unwrap_or_default(), pod.name_any());
            let pod = cost::Pod { uid: &uid, namespace: &namespace, name: &name };
            let taken = match cost::write(client, settings, &pod, None).await {
                // It is gone, and with it what we wrote.
                Err(Wrong::Conflict(_)) => Ok(false),
                other => other.map(|()| true),
            };
            undone.note(&format!("pod {name} in namespace {namespace}"), taken, |undone| &mut undone.costs);
        }
        match page.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => params = params.continue_token(&more),
            None => return,
        }
    }
}

/// Whether we are among those who wrote it.
fn is_ours(object: &impl kube::ResourceExt) -> bool {
    object.managed_fields().iter().any(|fields| fields.manager.as_deref() == Some(MANAGER))
}

impl Undone {
    fn note(&mut self, what: &str, came: Result<bool, Wrong>, count: impl Fn(&mut Self) -> &mut usize) {
        match came {
            Ok(true) => *count(self) += 1,
            Ok(false) => {}
            Err(wrong) => self.fail(what, &wrong),
        }
    }

    fn fail(&mut self, what: &str, wrong: &Wrong) {
        let why = match wrong {
            Wrong::NotLeading => "another scaler leads",
            Wrong::Conflict(text) | Wrong::Failed(_, text) => text,
        };
        self.failed.push(format!("{what}: {why}"));
    }
}
