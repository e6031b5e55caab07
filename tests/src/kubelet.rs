//! A double of the kubelet's PodResources API: gRPC on a unix socket, and no kubelet behind it.
//!
//! A node is what cannot exist here. The messages are written from the kubelet's `api.proto` a second time, so
//! that a number that the agent has wrong is found.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::scratch::Scratch;

/// A device that a container has: namespace, pod, container, resource, ids.
pub type Given<'a> = (&'a str, &'a str, &'a str, &'a str, &'a [&'a str]);

/// A kubelet that tells who has which device.
pub struct Kubelet {
    says: Arc<Mutex<Says>>,
    task: Option<JoinHandle<()>>,
    dir: Scratch,
}

#[derive(Debug, Default)]
struct Says {
    pods: Vec<PodResources>,
    devices: Vec<ContainerDevices>,
}

impl Kubelet {
    /// One of which the plugin has given out nothing yet.
    pub fn start() -> Result<Self> {
        let mut kubelet = Self { says: Arc::default(), task: None, dir: Scratch::new()? };
        kubelet.start_again()?;
        Ok(kubelet)
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("kubelet.sock")
    }

    /// As a restart does: with a new socket at the same place.
    pub fn start_again(&mut self) -> Result<()> {
        self.stop();
        let listener = UnixListener::bind(self.socket())?;
        self.task = Some(tokio::spawn(serve(listener, self.says.clone())));
        Ok(())
    }

    /// Its socket is gone, and so are its connections.
    pub fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let _ = std::fs::remove_file(Path::new(&self.socket()));
    }

    /// Who has what from now on, and what the plugins say is healthy.
    pub fn set(&self, given: &[Given<'_>], healthy: &[(&str, &[&str])]) {
        let devices = |resource: &str, ids: &[&str]| ContainerDevices {
            resource_name: resource.to_owned(),
            device_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        };
        let pods = given.iter().map(|(namespace, pod, container, resource, ids)| PodResources {
            name: (*pod).to_owned(),
            namespace: (*namespace).to_owned(),
            containers: vec![ContainerResources {
                name: (*container).to_owned(),
                devices: vec![devices(resource, ids)],
                cpu_ids: vec![0, 1],
            }],
        });
        let says = Says { pods: pods.collect(), devices: healthy.iter().map(|(r, ids)| devices(r, ids)).collect() };
        *self.says.lock().unwrap_or_else(PoisonError::into_inner) = says;
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: UnixListener, says: Arc<Mutex<Says>>) {
    // Connections end with this task: they are its own.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let says = says.clone();
        connections.spawn(async move {
            let answer = service_fn(move |request| {
                let says = says.clone();
                async move { Ok::<_, std::convert::Infallible>(answer(&says, request).await) }
            });
            let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

async fn answer(
    says: &Arc<Mutex<Says>>,
    request: http::Request<hyper::body::Incoming>,
) -> http::Response<tonic::body::Body> {
    let (pods, devices) = {
        let says = says.lock().unwrap_or_else(PoisonError::into_inner);
        (says.pods.clone(), says.devices.clone())
    };
    match request.uri().path() {
        "/v1.PodResourcesLister/List" => told(ListPodResourcesResponse { pod_resources: pods }, request).await,
        "/v1.PodResourcesLister/GetAllocatableResources" => {
            told(AllocatableResourcesResponse { devices, cpu_ids: vec![0, 1, 2, 3] }, request).await
        }
        _ => Status::unimplemented("no such method").into_http(),
    }
}

async fn told<T: Message + Default + Clone + 'static>(
    answer: T,
    request: http::Request<hyper::body::Incoming>,
) -> http::Response<tonic::body::Body> {
    struct Says<T>(T);
    impl<T: Message + Clone + 'static> UnaryService<ListPodResourcesRequest> for Says<T> {
        type Response = T;
        type Future = std::future::Ready<Result<Response<T>, Status>>;

        fn call(&mut self, _: Request<ListPodResourcesRequest>) -> Self::Future {
            std::future::ready(Ok(Response::new(self.0.clone())))
        }
    }
    Grpc::new(ProstCodec::<T, ListPodResourcesRequest>::default()).unary(Says(answer), request).await
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ListPodResourcesRequest {}

#[derive(Clone, PartialEq, Message)]
struct ListPodResourcesResponse {
    #[prost(message, repeated, tag = "1")]
    pod_resources: Vec<PodResources>,
}

#[derive(Clone, PartialEq, Message)]
struct PodResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    devices: Vec<ContainerDevices>,
    #[prost(int64, repeated, tag = "3")]
    cpu_ids: Vec<i64>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource_name: String,
    #[prost(string, repeated, tag = "2")]
    device_ids: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct AllocatableResourcesResponse {
    #[prost(message, repeated, tag = "1")]
    devices: Vec<ContainerDevices>,
    #[prost(int64, repeated, tag = "2")]
    cpu_ids: Vec<i64>,
}
