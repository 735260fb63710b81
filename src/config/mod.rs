//! The configuration: one tree of structs with its defaults, read from YAML or JSON, overridden by the environment,
//! checked before anything starts.
//!
//! Every key of the file is a field here, and the JSON Schema comes from the same structs. Keys are camelCase or
//! snake_case; unknown ones are refused. This module knows what may be configured, and nothing of what it does.

mod cluster;
mod environment;
mod error;
mod load;
mod pre_warming;
mod read;
mod redact;
mod routing;
mod rules;
mod schema;
mod tree;

pub use cluster::{
    ClusterConfig, ControllerConfig, DiscoveryConfig, EmbeddedNats, LogFormat, LogLevel, LoggingConfig, Mode, NatsConfig,
    NatsMode, RequestMetricsConfig, ServerUrls, StaticWorker, TlsConfig, WorkersConfig,
};
pub use error::ConfigError;
pub use pre_warming::{PreWarmingConfig, RegisterWhen};
pub use routing::{
    AdmissionConfig, CircuitBreakerConfig, HedgingConfig, LoadBalancingConfig, RequestRoutingConfig, RetryConfig, Strategy,
    StreamFailover,
};
