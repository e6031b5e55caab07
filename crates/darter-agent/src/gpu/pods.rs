//! Which pod has which GPU: asked of the kubelet's PodResources, over its unix socket.
//!
//! Its answer has names and device ids, no pod that is over on kubelets from 1.34 on, and none of those that
//! take a GPU past the device plugin. So "no pod has it" is one witness of several. The last answer stays,
//! with its age, while the kubelet restarts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use darter_core::gpu::{Device, DeviceId};
use http::uri::PathAndQuery;
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;
use tracing::{debug, info, warn};

use super::lock;
use super::sample::{Gpu, Identity};
use crate::containerd::connect;
use crate::log::chain;

/// The kubelet answers at once or not at all.
const PATIENCE: Duration = Duration::from_secs(5);
/// Devices of all pods of a node: 110 pods with 16 replicas each would be an absurd node.
const ALLOCATIONS_MAX: usize = 2048;
/// Whose resources these are; extended resources of others are none of ours.
const RESOURCES: &str = "nvidia.com/";

/// One device that a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// Which.
    pub id: DeviceId,
    /// Such as `nvidia.com/gpu`.
    pub resource: String,
    /// Whose it is.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's.
    pub container: String,
}

/// One answer of the kubelet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pods {
    /// What containers have.
    pub allocations: Vec<Allocation>,
    /// Devices that the plugin says are healthy, each once, however many share it; nothing where the kubelet
    /// does not tell.
    pub devices: Option<u32>,
    /// There are more than `allocations` has: too many, or ids that nobody can read.
    pub has_more: bool,
}

impl Pods {
    /// Who has a GPU, or a part of it.
    pub fn of<'a>(&'a self, gpu: &'a Gpu) -> impl Iterator<Item = &'a Allocation> {
        let Identity { uuid, minor, .. } = &gpu.identity;
        self.allocations.iter().filter(move |allocation| match &allocation.id.device {
            Device::Gpu(gpu) | Device::MigOf(gpu) => gpu == uuid,
            Device::Node(node) => *minor == Some(*node),
            Device::Mig(mig) => gpu.mig_devices().iter().any(|device| device.uuid == *mig),
        })
    }

    /// Whether any pod has it, or a part of it. `gpus` are all of this node: nothing where a MIG device is given
    /// out that is of none of them, as long as this one is cut into some; and where not all that was given out is
    /// known.
    pub fn has(&self, gpu: &Gpu, gpus: &[Gpu]) -> Option<bool> {
        let is_given = self.of(gpu).next().is_some();
        let is_known = |uuid: &String| gpus.iter().any(|gpu| gpu.mig_devices().iter().any(|mig| mig.uuid == *uuid));
        let is_open = |one: &Allocation| matches!(&one.id.device, Device::Mig(uuid) if !is_known(uuid));
        let is_unsure = self.has_more || gpu.is_mig() && self.allocations.iter().any(is_open);
        (is_given || !is_unsure).then_some(is_given)
    }
}

/// What the kubelet said last, and when.
#[derive(Debug, Default)]
pub(super) struct Kubelet {
    said: Mutex<Option<(Instant, Arc<Pods>)>>,
}

impl Kubelet {
    /// What it said, if that is not older than this.
    pub(super) fn pods(&self, most: Duration) -> Option<Arc<Pods>> {
        lock(&self.said).as_ref().filter(|(at, _)| at.elapsed() <= most).map(|(_, pods)| pods.clone())
    }

    /// Asks again and again until `stop`, as long as somebody wants to know.
    pub(super) async fn follow(
        &self,
        socket: PathBuf,
        every: Duration,
        is_wanted: impl Fn() -> bool,
        stop: CancellationToken,
    ) {
        let mut channel = None;
        let mut fails = None;
        let mut had_more = false;
        while !stop.is_cancelled() {
            if !is_wanted() {
                let _ = tokio::time::timeout(every, stop.cancelled()).await;
                continue;
            }
            let asked = tokio::time::timeout(PATIENCE, ask(&socket, &mut channel)).await;
            match asked.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("no answer in time"))) {
                Ok(pods) => {
                    if fails.take().is_some() {
                        info!("the kubelet tells again who has which GPU");
                    }
                    if pods.has_more && !had_more {
                        warn!(
                            known = pods.allocations.len(),
                            most = ALLOCATIONS_MAX,
                            "the kubelet gave out devices of NVIDIA's that are too many or have ids of an unknown form: \
                             no GPU is taken for free by its word"
                        );
                    }
                    had_more = pods.has_more;
                    *lock(&self.said) = Some((Instant::now(), Arc::new(pods)));
                }
                // The socket is made anew when the kubelet restarts; and there is none where there is no kubelet.
                Err(error) => {
                    channel = None;
                    match fails.replace(error.code()) {
                        None if socket.exists() => {
                            warn!(socket = %socket.display(), error = %chain(&error), "the kubelet does not tell who has which GPU");
                        }
                        _ => debug!(error = %chain(&error), "no word of the kubelet"),
                    }
                }
            }
            let _ = tokio::time::timeout(every, stop.cancelled()).await;
        }
    }
}

async fn ask(socket: &Path, channel: &mut Option<Channel>) -> Result<Pods, tonic::Status> {
    let connected = match channel.take() {
        Some(connected) => connected,
        None => connect(socket).await.map_err(|error| tonic::Status::unavailable(chain(&error).to_string()))?,
    };
    let list: wire::List = call(connected.clone(), "/v1.PodResourcesLister/List").await?;
    // A kubelet that is older or may not: then nobody says which devices are healthy.
    let allocatable: Option<wire::Allocatable> =
        call(connected.clone(), "/v1.PodResourcesLister/GetAllocatableResources").await.ok();
    *channel = Some(connected);
    let of_plugin = |devices: wire::Allocatable| {
        let ours = devices.devices.iter().filter(|device| device.resource_name.starts_with(RESOURCES));
        let ids = ours.flat_map(|device| &device.device_ids);
        let devices: BTreeSet<&str> = ids.map(|id| DeviceId::shared(id)).collect();
        u32::try_from(devices.len()).unwrap_or(u32::MAX)
    };
    let (allocations, has_more) = allocations(list);
    Ok(Pods { allocations, devices: allocatable.map(of_plugin), has_more })
}

async fn call<T: Message + Default + 'static>(channel: Channel, path: &'static str) -> Result<T, tonic::Status> {
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<wire::Nothing, T>::default();
    let request = tonic::Request::new(wire::Nothing {});
    Ok(client.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
}

/// What containers have, as far as it can be told, and whether that is not all.
fn allocations(list: wire::List) -> (Vec<Allocation>, bool) {
    let mut found = Vec::new();
    let mut has_more = false;
    for pod in list.pods {
        for container in pod.containers {
            let ours = container.devices.into_iter().filter(|devices| devices.resource_name.starts_with(RESOURCES));
            for devices in ours {
                for id in &devices.device_ids {
                    let Some(id) = DeviceId::parse(id).filter(|_| found.len() < ALLOCATIONS_MAX) else {
                        has_more = true;
                        continue;
                    };
                    found.push(Allocation {
                        id,
                        resource: devices.resource_name.clone(),
                        namespace: pod.namespace.clone(),
                        pod: pod.name.clone(),
                        container: container.name.clone(),
                    });
                }
            }
        }
    }
    (found, has_more)
}

/// The messages of the kubelet's API `v1.PodResourcesLister`, as far as they are read.
mod wire {
    #[derive(Clone, PartialEq, Eq, prost::Message)]
    pub(super) struct Nothing {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct List {
        #[prost(message, repeated, tag = "1")]
        pub(super) pods: Vec<Pod>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Pod {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "2")]
        pub(super) namespace: String,
        #[prost(message, repeated, tag = "3")]
        pub(super) containers: Vec<Container>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Container {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(super) devices: Vec<Devices>,
    }

    #[derive(Clone, PartialEq, Eq, prost::Message)]
    pub(super) struct Devices {
        #[prost(string, tag = "1")]
        pub(super) resource_name: String,
        #[prost(string, repeated, tag = "2")]
        pub(super) device_ids: Vec<String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Allocatable {
        #[prost(message, repeated, tag = "1")]
        pub(super) devices: Vec<Devices>,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::sample::{MigDevice, Slow};
    use super::*;

    fn gpu(uuid: &str, mig: &[&str]) -> Gpu {
        let devices = mig.iter().map(|uuid| MigDevice { uuid: (*uuid).to_owned(), ..MigDevice::default() });
        let slow = Slow { mig: (!mig.is_empty()).then(|| devices.collect()), ..Slow::default() };
        let identity = Identity { uuid: uuid.to_owned(), ..Identity::default() };
        Gpu { identity, is_lost: false, fast: None, slow: Some((Instant::now(), slow)) }
    }

    #[test]
    fn who_has_a_mig_device_has_its_gpu_and_one_of_an_unknown_gpu_leaves_it_open() {
        let gpus = [gpu("GPU-a", &["MIG-1", "MIG-2"]), gpu("GPU-b", &["MIG-3"]), gpu("GPU-c", &[])];
        let has = |ids: &[&str]| {
            let allocation = |id: &&str| Allocation {
                id: DeviceId::parse(id).unwrap(),
                resource: "nvidia.com/mig-1g.18gb".to_owned(),
                namespace: String::new(),
                pod: String::new(),
                container: String::new(),
            };
            let allocations = ids.iter().map(allocation).collect();
            let pods = Pods { allocations, ..Pods::default() };
            gpus.each_ref().map(|gpu| pods.has(gpu, &gpus))
        };
        assert_eq!(has(&[]), [Some(false); 3]);
        assert_eq!(has(&["MIG-2"]), [Some(true), Some(false), Some(false)]);
        assert_eq!(has(&["MIG-9"]), [None, None, Some(false)], "cut after the last reading");
        assert_eq!(has(&["MIG-9", "MIG-3"]), [None, Some(true), Some(false)]);
    }

    #[test]
    fn where_not_all_that_was_given_out_is_known_no_gpu_is_free() {
        let given = |ids: Vec<String>| {
            let devices = vec![wire::Devices { resource_name: "nvidia.com/gpu".to_owned(), device_ids: ids }];
            let containers = vec![wire::Container { name: "main".to_owned(), devices }];
            let pod = wire::Pod { name: "train-0".to_owned(), namespace: "team".to_owned(), containers };
            let (allocations, has_more) = allocations(wire::List { pods: vec![pod] });
            Pods { allocations, has_more, ..Pods::default() }
        };
        let (a, b) = (gpu("GPU-a", &[]), gpu("GPU-b", &[]));
        let has = |pods: &Pods| (pods.has(&a, &[]), pods.has(&b, &[]));
        let most: Vec<_> = (0..ALLOCATIONS_MAX).map(|replica| format!("GPU-a::{replica}")).collect();
        let all = given(most.clone());
        assert_eq!((all.allocations.len(), has(&all)), (ALLOCATIONS_MAX, (Some(true), Some(false))));
        let more = given([most, vec!["GPU-b".to_owned()]].concat());
        assert_eq!((more.allocations.len(), has(&more)), (ALLOCATIONS_MAX, (Some(true), None)));
        let odd = given(vec!["GPU-a".to_owned(), "gpu/of/tomorrow".to_owned()]);
        assert_eq!(has(&odd), (Some(true), None));
    }
}
