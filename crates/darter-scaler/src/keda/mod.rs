//! What KEDA asks: whether a workload is to have replicas, how many, and a push when that changes.
//!
//! The metric is the number of replicas and its target is one: KEDA's arithmetic then gives that number. Nothing is
//! said out of ignorance: no demand, no answer, and KEDA keeps what there is.

mod wait;

use std::pin::Pin;
use std::sync::Arc;

use darter_api::externalscaler::external_scaler_server::{ExternalScaler, ExternalScalerServer};
use darter_api::externalscaler::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};
use futures_util::Stream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use crate::bell::SOON;
use crate::config::Mode;
use crate::fleet::known::WorkloadConfig;
use crate::fleet::{Actuator, NoAnswer};
use crate::hub::Hub;
use crate::metrics::RpcLabels;

/// What the metric is called.
pub const METRIC: &str = "darter-replicas";
/// Streams of KEDA's: one of each workload, of each operator that runs.
const STREAMS_MAX: usize = 20_000;
/// A request of KEDA's has some lines.
const REQUEST_MAX: usize = 64 * 1024;
/// Values of a trigger's metadata.
const METADATA_MAX: usize = 64;

/// The server of the service `externalscaler.ExternalScaler`.
pub fn server(hub: Arc<Hub>, stop: CancellationToken) -> ExternalScalerServer<Keda> {
    let streams = Arc::new(Semaphore::new(STREAMS_MAX));
    ExternalScalerServer::new(Keda { hub, streams, stop }).max_decoding_message_size(REQUEST_MAX)
}

/// Answers KEDA.
#[derive(Debug, Clone)]
pub struct Keda {
    hub: Arc<Hub>,
    streams: Arc<Semaphore>,
    stop: CancellationToken,
}

/// Pushes.
type Active = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;

#[tonic::async_trait]
impl ExternalScaler for Keda {
    type StreamIsActiveStream = Active;

    async fn is_active(&self, request: Request<ScaledObjectRef>) -> Result<Response<IsActiveResponse>, Status> {
        let answer = self.answer(request.get_ref());
        let answer = answer.map(|replicas| Response::new(IsActiveResponse { result: replicas > 0 }));
        self.counted("IsActive", answer)
    }

    async fn get_metrics(&self, request: Request<GetMetricsRequest>) -> Result<Response<GetMetricsResponse>, Status> {
        let GetMetricsRequest { scaled_object_ref, metric_name } = request.into_inner();
        let answer = match (metric_name.as_str(), scaled_object_ref) {
            (_, None) => Err(Status::invalid_argument("no ScaledObject is named")),
            ("" | METRIC, Some(of)) => self.answer(&of),
            _ => Err(Status::invalid_argument(format!("`{metric_name}` is not known: there is {METRIC} alone"))),
        };
        let metric = |replicas: u32| GetMetricsResponse {
            metric_values: vec![MetricValue {
                metric_name: METRIC.to_owned(),
                metric_value: replicas.into(),
                metric_value_float: replicas.into(),
            }],
        };
        self.counted("GetMetrics", answer.map(|replicas| Response::new(metric(replicas))))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        // It is what it is, whether there is an answer or not: without one KEDA has no HPA.
        let described = self.describe(request.get_ref());
        let spec = MetricSpec { metric_name: METRIC.to_owned(), target_size: 1, target_size_float: 1.0 };
        let answer = described.map(|_| Response::new(GetMetricSpecResponse { metric_specs: vec![spec] }));
        self.counted("GetMetricSpec", answer)
    }

    async fn stream_is_active(&self, request: Request<ScaledObjectRef>) -> Result<Response<Active>, Status> {
        let opened = self.describe(request.get_ref()).and_then(|name| {
            let full = |_| Status::resource_exhausted("too many streams");
            let place = self.streams.clone().try_acquire_owned().map_err(full)?;
            let keda = self.clone();
            Ok(Response::new(wait::active(keda, name, place)))
        });
        self.counted("StreamIsActive", opened)
    }
}

impl Keda {
    /// The workload that KEDA means, once what its trigger says of it is known.
    fn describe(&self, of: &ScaledObjectRef) -> Result<String, Status> {
        if of.scaler_metadata.len() > METADATA_MAX || of.name.is_empty() || of.namespace.is_empty() {
            return Err(Status::invalid_argument("no ScaledObject is named, or its metadata has no end"));
        }
        let metadata = of.scaler_metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let words = WorkloadConfig::of_metadata(&metadata).map_err(Status::invalid_argument)?;
        let named = metadata.get("workload").filter(|name| !name.is_empty()).unwrap_or(&of.name);
        // In its own namespace, whatever it says: a ScaledObject speaks for no other.
        let name = format!("{}/{named}", of.namespace);
        if named.contains('/') || name.len() > 512 {
            return Err(Status::invalid_argument(format!(
                "metadata workload: `{named}` is not the name of a Deployment"
            )));
        }
        self.hub.fleet().described(&name, words, self.hub.clock.now());
        Ok(name)
    }

    fn answer(&self, of: &ScaledObjectRef) -> Result<u32, Status> {
        let name = self.describe(of)?;
        self.replicas(&name)
    }

    /// What KEDA is told of a workload.
    fn replicas(&self, name: &str) -> Result<u32, Status> {
        if !self.hub.lead.holds() {
            return Err(Status::unavailable("another scaler leads"));
        }
        if self.hub.mode(Actuator::Keda) != Mode::On {
            return Err(Status::failed_precondition(
                "this scaler only observes (actuators.keda): KEDA is told nothing, and what it would be told is in /v1/explain",
            ));
        }
        let answer = self.hub.fleet().answer(name, self.hub.clock.now());
        answer.map_err(|why| {
            if why == NoAnswer::NotYet {
                self.hub.bell.ring(SOON);
            }
            let text = format!("{name}: {why}");
            match why {
                NoAnswer::Unknown => Status::not_found(text),
                NoAnswer::NoPool | NoAnswer::NoMost => Status::failed_precondition(text),
                NoAnswer::NoDemand | NoAnswer::Stale { .. } | NoAnswer::NotYet => Status::unavailable(text),
            }
        })
    }

    fn counted<T>(&self, rpc: &'static str, answer: Result<T, Status>) -> Result<T, Status> {
        let code = match &answer {
            Ok(_) => "ok",
            Err(status) => match status.code() {
                Code::Unavailable => "unavailable",
                Code::NotFound => "not_found",
                Code::FailedPrecondition => "failed_precondition",
                Code::InvalidArgument => "invalid_argument",
                _ => "other",
            },
        };
        self.hub.metrics.keda_requests.get_or_create(&RpcLabels { rpc, code }).inc();
        answer
    }
}
