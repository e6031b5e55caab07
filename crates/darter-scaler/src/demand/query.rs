//! One question to Prometheus, and what is made of the answer: one number that is one, or why there is none.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use crate::fleet::known::thousandths;

/// A query that takes longer is too dear to be asked again and again.
const PATIENCE: Duration = Duration::from_secs(5);
/// One number has some lines.
const ANSWER_MAX: usize = 256 * 1024;

/// Where it is not.
#[derive(Debug, thiserror::Error)]
#[error("demand.prometheus: `{0}` is not http://<host>:<port>, such as http://prometheus.monitoring.svc:9090")]
pub struct UrlError(String);

/// Why there is no number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// It cannot be asked.
    #[error("it cannot be asked: {0}")]
    Away(String),
    /// It does not take the query.
    #[error("it does not take the query: {0}")]
    Query(String),
    /// No series, which is not zero.
    #[error("no series: a source that is lost is not one that is empty; `… or vector(0)` where it is")]
    Empty,
    /// More than one.
    #[error("{0} series: sum them, so that there is one number")]
    Many(usize),
    /// One that is none.
    #[error("`{0}` is not a number from 0")]
    Number(String),
}

impl Unanswered {
    /// As in `darter_scaler_demand_refusals_total{reason}`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Away(_) => "prometheus_away",
            Self::Query(_) => "prometheus_query",
            Self::Empty => "prometheus_empty",
            Self::Many(_) => "prometheus_many",
            Self::Number(_) => "prometheus_number",
        }
    }
}

/// A server.
#[derive(Debug)]
pub struct Prometheus {
    client: Client<HttpConnector, Empty<Bytes>>,
    base: String,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    error: String,
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(default, rename = "resultType")]
    kind: String,
    #[serde(default)]
    result: Value,
}

impl Prometheus {
    /// At this URL; its path, if any, comes before `/api/v1`.
    pub fn new(url: &str) -> Result<Self, UrlError> {
        let wrong = || UrlError(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let is_ours = uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty());
        if !is_ours || uri.query().is_some() {
            return Err(wrong());
        }
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(PATIENCE));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { client, base: url.trim_end_matches('/').to_owned() })
    }

    /// Thousandths of the one number that a query gives.
    pub async fn ask(&self, query: &str) -> Result<u64, Unanswered> {
        let away = |error: &dyn std::error::Error| Unanswered::Away(error.to_string());
        let url = format!("{}/api/v1/query?query={}", self.base, encoded(query));
        let request = Request::get(url).body(Empty::new()).map_err(|error| away(&error))?;
        let asked = async {
            let answer = self.client.request(request).await.map_err(|error| away(&error))?;
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            let body = body.map_err(|error| Unanswered::Away(error.to_string()))?;
            serde_json::from_slice::<Answer>(&body.to_bytes()).map_err(|error| away(&error))
        };
        let late = |_| Unanswered::Away(format!("no answer within {} s", PATIENCE.as_secs()));
        number(timeout(PATIENCE, asked).await.map_err(late)??)
    }
}

fn number(answer: Answer) -> Result<u64, Unanswered> {
    if answer.status != "success" {
        return Err(Unanswered::Query(answer.error));
    }
    // [time, "value"], of a scalar itself, of a vector in each of its series.
    let Data { kind, result } = answer.data;
    let value = match (kind.as_str(), &result) {
        ("scalar", value) => value,
        ("vector", Value::Array(series)) => match series.as_slice() {
            [] => return Err(Unanswered::Empty),
            [one] => &one["value"],
            many => return Err(Unanswered::Many(many.len())),
        },
        _ => return Err(Unanswered::Query(format!("it gives a {kind}, and not one number"))),
    };
    let text = value[1].as_str().unwrap_or_default();
    thousandths(text).ok_or_else(|| Unanswered::Number(text.to_owned()))
}

/// As it is in a URL.
fn encoded(query: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    query.bytes().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<u64, Unanswered> {
        number(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn one_number_is_read_and_no_series_is_not_zero() {
        let vector =
            |series: &str| format!(r#"{{"status":"success","data":{{"resultType":"vector","result":[{series}]}}}}"#);
        let one = |value: &str| vector(&format!(r#"{{"metric":{{}},"value":[1700000000.1,"{value}"]}}"#));
        assert_eq!(read(&one("2.5")), Ok(2500));
        assert_eq!(read(&one("0")), Ok(0));
        assert_eq!(read(r#"{"status":"success","data":{"resultType":"scalar","result":[1,"7"]}}"#), Ok(7000));
        assert_eq!(read(&vector("")), Err(Unanswered::Empty));
        assert_eq!(read(&vector("{},{}")), Err(Unanswered::Many(2)));
        for value in ["NaN", "+Inf", "-1", ""] {
            assert_eq!(read(&one(value)), Err(Unanswered::Number(value.to_owned())), "{value}");
        }
        assert_eq!(
            read(r#"{"status":"error","errorType":"bad_data","error":"parse error"}"#),
            Err(Unanswered::Query("parse error".to_owned()))
        );
        assert!(matches!(
            read(r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#),
            Err(Unanswered::Query(_))
        ));
    }

    #[test]
    fn a_query_is_encoded_and_what_is_no_address_is_refused() {
        assert_eq!(encoded(r#"sum(a{b="c d"})"#), "sum%28a%7Bb%3D%22c%20d%22%7D%29");
        for url in ["https://p:9090", "p:9090", "http://", "http://p:9090/?x=1", "/x"] {
            assert!(Prometheus::new(url).is_err(), "{url}");
        }
        assert!(Prometheus::new("http://p:9090/prometheus/").is_ok());
    }
}
