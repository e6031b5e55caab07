//! KEDA, as far as an external scaler sees it: what its operator and its metrics server ask, in that order, how it
//! reads the answers, and how it comes back.
//!
//! A double: KEDA itself needs a cluster. It does what KEDA 2.20's external_scaler.go does, no more.

use std::collections::HashMap;
use std::time::Duration;

use darter_api::externalscaler::external_scaler_client::ExternalScalerClient;
use darter_api::externalscaler::{GetMetricsRequest, ScaledObjectRef};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::tls::Identity;

/// Between two tries to open the stream: doubled each time, and back to this after a clean end.
const AGAIN_MIN: Duration = Duration::from_secs(2);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// One trigger of one ScaledObject.
#[derive(Debug, Clone)]
pub struct Keda {
    client: ExternalScalerClient<Channel>,
    of: ScaledObjectRef,
}

/// What one turn of the scale loop gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Polled {
    /// The metric over its target, rounded up: what the HPA makes of it.
    pub replicas: u32,
    /// Whether there is to be any.
    pub is_active: bool,
}

impl Keda {
    /// Connects when it first asks, as gRPC does.
    pub fn new(url: &str, namespace: &str, name: &str, metadata: &[(&str, &str)]) -> anyhow::Result<Self> {
        Ok(Self::over(url.parse::<Endpoint>()?, namespace, name, metadata))
    }

    /// The same over TLS: `caCert`, and `tlsClientCert` with `tlsClientKey` where it shows one, of a
    /// TriggerAuthentication.
    pub fn over_tls(url: &str, authority: &str, shows: Option<&Identity>, of: (&str, &str)) -> anyhow::Result<Self> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name("127.0.0.1");
        if let Some((certificate, key)) = shows.map(Identity::pem) {
            tls = tls.identity(tonic::transport::Identity::from_pem(certificate, key));
        }
        Ok(Self::over(url.parse::<Endpoint>()?.tls_config(tls)?, of.0, of.1, &[]))
    }

    fn over(endpoint: Endpoint, namespace: &str, name: &str, metadata: &[(&str, &str)]) -> Self {
        let scaler_metadata: HashMap<_, _> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let of = ScaledObjectRef { name: name.to_owned(), namespace: namespace.to_owned(), scaler_metadata };
        Self { client: ExternalScalerClient::new(endpoint.connect_lazy()), of }
    }

    /// One turn: what the metric is called and its target, its value, whether it is active.
    pub async fn poll(&mut self) -> Result<Polled, Status> {
        let specs = self.client.get_metric_spec(self.of.clone()).await?.into_inner().metric_specs;
        // KEDA takes an empty list for an error.
        let spec = specs.into_iter().next().ok_or_else(|| Status::internal("no metric"))?;
        let target = number(spec.target_size_float, spec.target_size);
        let request = GetMetricsRequest { scaled_object_ref: Some(self.of.clone()), metric_name: spec.metric_name };
        let values = self.client.get_metrics(request).await?.into_inner().metric_values;
        let value = values.into_iter().next().ok_or_else(|| Status::internal("no value"))?;
        // Whichever of the two KEDA takes, it has to be the same.
        let agree = value.metric_value_float.round() == number(0.0, value.metric_value);
        if !agree || target <= 0.0 {
            return Err(Status::internal(format!("{value:?} of {target} does not agree")));
        }
        let replicas = (number(value.metric_value_float, value.metric_value) / target).ceil();
        let is_active = self.client.is_active(self.of.clone()).await?.into_inner().result;
        let replicas = format!("{replicas}").parse().map_err(|_| Status::internal("not a number of replicas"))?;
        Ok(Polled { replicas, is_active })
    }

    /// Waits for pushes, and comes back when the stream ends, until it is dropped.
    pub fn listen(&self) -> Pushes {
        let (sender, pushes) = mpsc::channel(64);
        let (mut client, of) = (self.client.clone(), self.of.clone());
        let task = tokio::spawn(async move {
            let mut wait = AGAIN_MIN;
            loop {
                if let Ok(stream) = client.stream_is_active(of.clone()).await {
                    let mut stream = stream.into_inner();
                    if sender.send(Push::Opened).await.is_err() {
                        return;
                    }
                    loop {
                        match stream.message().await {
                            // Only this is acted on.
                            Ok(Some(push)) if push.result => {
                                if sender.send(Push::Active(Instant::now())).await.is_err() {
                                    return;
                                }
                            }
                            Ok(Some(_)) => {}
                            Ok(None) => {
                                wait = AGAIN_MIN;
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(AGAIN_MAX);
            }
        });
        Pushes { pushes, task }
    }
}

/// KEDA's rule: the float where it is above nothing, else the integer.
#[allow(clippy::cast_precision_loss, reason = "as KEDA does")]
fn number(float: f64, integer: i64) -> f64 {
    if float > 0.0 { float } else { integer as f64 }
}

/// What comes of a stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Push {
    /// It is open.
    Opened,
    /// `true` came.
    Active(Instant),
}

/// A stream on which KEDA waits.
pub struct Pushes {
    pushes: mpsc::Receiver<Push>,
    task: JoinHandle<()>,
}

impl Pushes {
    /// The next thing that comes of it; none within a minute and a half is none.
    pub async fn next(&mut self) -> anyhow::Result<Push> {
        let next = tokio::time::timeout(Duration::from_secs(90), self.pushes.recv()).await?;
        next.ok_or_else(|| anyhow::anyhow!("nobody listens"))
    }

    /// When `true` comes next.
    pub async fn active(&mut self) -> anyhow::Result<Instant> {
        loop {
            if let Push::Active(at) = self.next().await? {
                return Ok(at);
            }
        }
    }
}

impl Drop for Pushes {
    fn drop(&mut self) {
        self.task.abort();
    }
}
