//! The parts of the configuration that concern the process: NATS, addresses, discovery, logs.

use std::fmt;

use garde::Validate;
use schemars::JsonSchema;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::pre_warming::PreWarmingConfig;
use super::routing::{LoadBalancingConfig, RequestRoutingConfig};
use super::{redact, rules};

/// The whole configuration. `ClusterConfig::default()` is a complete one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct ClusterConfig {
    /// What this process is.
    pub mode: Mode,
    /// How it reaches NATS.
    #[garde(dive)]
    pub nats: NatsConfig,
    /// The controller and its web front-end.
    #[garde(dive)]
    pub controller: ControllerConfig,
    /// How workers and controllers find each other.
    #[garde(dive)]
    pub discovery: DiscoveryConfig,
    /// Workers that do not announce themselves, and what those do that do.
    #[garde(dive)]
    pub workers: WorkersConfig,
    /// Limits, retries and breakers.
    #[serde(alias = "request_routing")]
    #[garde(dive)]
    pub request_routing: RequestRoutingConfig,
    /// Who gets a request.
    #[serde(alias = "load_balancing")]
    #[garde(dive)]
    pub load_balancing: LoadBalancingConfig,
    /// What is remembered of ended requests.
    #[serde(alias = "request_metrics")]
    #[garde(dive)]
    pub request_metrics: RequestMetricsConfig,
    /// What is logged, and how.
    pub logging: LoggingConfig,
}

/// What a process is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A controller alone.
    Controller,
    /// A worker alone.
    Worker,
    /// Both.
    #[default]
    Both,
}

/// How NATS is reached.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct NatsConfig {
    /// Whether a server is started, expected, or not needed.
    pub mode: NatsMode,
    /// One URL or a list of them (a NATS cluster): `nats://`, `tls://`, `ws://` or `wss://`.
    #[serde(alias = "server_url")]
    #[garde(custom(rules::server_urls))]
    pub server_url: ServerUrls,
    /// User name.
    pub user: Option<String>,
    /// Password. Never shown.
    #[garde(custom(rules::with_user(self.user.as_deref())))]
    pub password: Option<String>,
    /// A `.creds` file, in place of user and password.
    #[serde(alias = "credentials_file")]
    #[garde(custom(rules::one_identity(self.user.as_deref(), self.password.as_deref())))]
    pub credentials_file: Option<String>,
    /// Certificates.
    #[garde(dive)]
    pub tls: TlsConfig,
    /// Put in front of every subject; many fleets on one NATS. Empty, or with its own trailing dot.
    #[serde(alias = "subject_prefix")]
    #[garde(custom(rules::subject_prefix))]
    pub subject_prefix: String,
    /// The server that `mode: embedded` starts.
    pub embedded: EmbeddedNats,
    /// How often the connection is probed, in milliseconds.
    #[serde(alias = "ping_interval_ms")]
    #[garde(range(min = 10, max = rules::SPAN_MAX_MS))]
    pub ping_interval_ms: u64,
    /// With several servers, how long calls wait for the next one, in milliseconds.
    #[serde(alias = "reconnect_grace_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub reconnect_grace_ms: u64,
    /// How long a first connection may take, in milliseconds.
    #[serde(alias = "connect_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub connect_timeout_ms: u64,
}

/// Whether a NATS server is started, expected, or not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NatsMode {
    /// One is started with the controller, unless one answers on its port already.
    #[default]
    Embedded,
    /// One is reached at `serverUrl`.
    External,
    /// None: local and HTTP workers only.
    None,
}

/// One URL of a NATS server, or those of a cluster.
#[derive(Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ServerUrls {
    /// One server.
    One(String),
    /// The servers of a cluster.
    Many(Vec<String>),
}

/// Certificates for NATS over TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct TlsConfig {
    /// The authority that signed the server's certificate.
    #[serde(alias = "ca_file")]
    pub ca_file: Option<String>,
    /// Our certificate; needs `keyFile`.
    #[serde(alias = "cert_file")]
    #[garde(custom(rules::together("keyFile", self.key_file.is_some())))]
    pub cert_file: Option<String>,
    /// Its key; needs `certFile`.
    #[serde(alias = "key_file")]
    #[garde(custom(rules::together("certFile", self.cert_file.is_some())))]
    pub key_file: Option<String>,
}

/// The embedded NATS server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EmbeddedNats {
    /// Its port; 0: any free one.
    pub port: u16,
}

/// The controller and its web front-end.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct ControllerConfig {
    /// Where the front-end listens.
    #[serde(alias = "bind_address")]
    #[garde(custom(rules::not_empty))]
    pub bind_address: String,
    /// Its port; 0: any free one.
    pub port: u16,
    /// Without a heartbeat for so long, in milliseconds, a worker is offline.
    #[serde(alias = "worker_offline_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub worker_offline_timeout_ms: u64,
    /// The most workers that are kept.
    #[serde(alias = "max_workers")]
    #[garde(range(min = 1))]
    pub max_workers: usize,
    /// How long `stop` waits for running requests, in milliseconds.
    #[serde(alias = "drain_timeout_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub drain_timeout_ms: u64,
    /// The longest that a flapping worker is held back, in milliseconds.
    #[serde(alias = "flap_hold_max_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub flap_hold_max_ms: u64,
    /// Non-empty: one of these is required as bearer token on `/v1` and `/api`. Never shown.
    #[serde(alias = "api_keys")]
    #[garde(custom(rules::keys_not_empty))]
    pub api_keys: Vec<String>,
}

/// How workers and controllers find each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct DiscoveryConfig {
    /// How often each gives a sign of life, in milliseconds.
    #[serde(alias = "heartbeat_interval_ms")]
    #[garde(range(min = 10, max = rules::SPAN_MAX_MS))]
    pub heartbeat_interval_ms: u64,
}

/// Workers that do not announce themselves, and what those do that do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct WorkersConfig {
    /// Servers that speak the OpenAI API.
    #[garde(dive, custom(rules::distinct_workers))]
    pub r#static: Vec<StaticWorker>,
    /// What a worker process loads at its start.
    #[serde(alias = "pre_warming")]
    #[garde(dive)]
    pub pre_warming: PreWarmingConfig,
}

/// A server that speaks the OpenAI API.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct StaticWorker {
    /// Its name here.
    #[serde(alias = "worker_id")]
    #[garde(custom(rules::worker_id))]
    pub worker_id: String,
    /// Its address: `http://host:port`.
    #[garde(custom(rules::http_url))]
    pub url: String,
    /// What it serves; asked of the server where left out. `name=server's name` where the server calls it otherwise.
    #[serde(default)]
    #[garde(inner(custom(rules::served_models)))]
    pub models: Option<Vec<String>>,
    /// How much it is preferred, 0 to 100: workers of a lower priority are chosen when none of a higher one is free. Workers that
    /// announce themselves have 0.
    #[serde(default)]
    #[garde(range(max = 100))]
    pub priority: u8,
    /// The most requests that it is given at a time; no limit where left out.
    #[serde(default, alias = "max_concurrent")]
    #[garde(range(min = 1))]
    pub max_concurrent: Option<u32>,
    /// Its bearer token. Never shown.
    #[serde(default, alias = "api_key")]
    #[garde(inner(custom(rules::not_empty)))]
    pub api_key: Option<String>,
}

/// What is remembered of ended requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct RequestMetricsConfig {
    /// For how long, in milliseconds.
    #[serde(alias = "retention_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub retention_ms: u64,
    /// How many at most.
    #[serde(alias = "max_entries")]
    #[garde(range(min = 1))]
    pub max_entries: usize,
}

/// What is logged, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoggingConfig {
    /// The least important that is still logged.
    pub level: LogLevel,
    /// For people or for programs.
    pub format: LogFormat,
}

/// How important a record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failed requests.
    Error,
    /// Retries, breakers that open.
    Warning,
    /// Requests, starts and stops.
    #[default]
    Info,
    /// Every selection.
    Debug,
}

/// How records are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

// === impl NatsConfig ===

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            mode: NatsMode::default(),
            server_url: ServerUrls::One("nats://127.0.0.1:4222".into()),
            user: None,
            password: None,
            credentials_file: None,
            tls: TlsConfig::default(),
            subject_prefix: String::new(),
            embedded: EmbeddedNats::default(),
            ping_interval_ms: 4_000,
            reconnect_grace_ms: 1_000,
            connect_timeout_ms: 5_000,
        }
    }
}

/// Shows everything but secrets.
impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsConfig")
            .field("mode", &self.mode)
            .field("server_url", &self.server_url)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| redact::HIDDEN))
            .field("credentials_file", &self.credentials_file)
            .field("tls", &self.tls)
            .field("subject_prefix", &self.subject_prefix)
            .field("embedded", &self.embedded)
            .field("ping_interval_ms", &self.ping_interval_ms)
            .field("reconnect_grace_ms", &self.reconnect_grace_ms)
            .field("connect_timeout_ms", &self.connect_timeout_ms)
            .finish()
    }
}

// === impl ServerUrls ===

impl ServerUrls {
    /// The URLs as a list.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(url) => std::slice::from_ref(url),
            Self::Many(urls) => urls,
        }
    }

    /// The URLs for people, without credentials.
    #[must_use]
    pub fn shown(&self) -> String {
        self.as_slice().iter().map(|url| redact::url(url)).collect::<Vec<_>>().join(", ")
    }
}

/// Shows everything but credentials.
impl fmt::Debug for ServerUrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice().iter().map(|url| redact::url(url))).finish()
    }
}

impl<'de> Deserialize<'de> for ServerUrls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UrlsVisitor;

        impl<'de> Visitor<'de> for UrlsVisitor {
            type Value = ServerUrls;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URL or a list of URLs")
            }

            fn visit_str<E: de::Error>(self, url: &str) -> Result<ServerUrls, E> {
                Ok(ServerUrls::One(url.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<ServerUrls, A::Error> {
                let mut urls = Vec::new();
                while let Some(url) = items.next_element()? {
                    urls.push(url);
                }
                Ok(ServerUrls::Many(urls))
            }
        }

        deserializer.deserialize_any(UrlsVisitor)
    }
}

// === impl EmbeddedNats ===

impl Default for EmbeddedNats {
    fn default() -> Self {
        Self { port: 4222 }
    }
}

// === impl ControllerConfig ===

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            bind_address: "127.0.0.1".into(),
            port: 8080,
            worker_offline_timeout_ms: 15_000,
            max_workers: 10_000,
            drain_timeout_ms: 30_000,
            flap_hold_max_ms: 60_000,
            api_keys: Vec::new(),
        }
    }
}

/// Shows everything but secrets.
impl fmt::Debug for ControllerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerConfig")
            .field("bind_address", &self.bind_address)
            .field("port", &self.port)
            .field("worker_offline_timeout_ms", &self.worker_offline_timeout_ms)
            .field("max_workers", &self.max_workers)
            .field("drain_timeout_ms", &self.drain_timeout_ms)
            .field("flap_hold_max_ms", &self.flap_hold_max_ms)
            .field("api_keys", &self.api_keys.iter().map(|_| redact::HIDDEN).collect::<Vec<_>>())
            .finish()
    }
}

// === impl StaticWorker ===

impl StaticWorker {
    /// The models of the configuration, each with the server's own name for it.
    #[must_use]
    pub fn served(&self) -> Option<Vec<(&str, &str)>> {
        let models = self.models.as_ref()?;
        Some(models.iter().map(|model| model.split_once('=').unwrap_or((model, model))).collect())
    }
}

/// Shows everything but secrets.
impl fmt::Debug for StaticWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticWorker")
            .field("worker_id", &self.worker_id)
            .field("url", &redact::url(&self.url))
            .field("models", &self.models)
            .field("priority", &self.priority)
            .field("max_concurrent", &self.max_concurrent)
            .field("api_key", &self.api_key.as_ref().map(|_| redact::HIDDEN))
            .finish()
    }
}

// === impl DiscoveryConfig ===

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self { heartbeat_interval_ms: 5_000 }
    }
}

// === impl RequestMetricsConfig ===

impl Default for RequestMetricsConfig {
    fn default() -> Self {
        Self { retention_ms: 300_000, max_entries: 10_000 }
    }
}
