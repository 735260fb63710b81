//! The parts of the configuration that concern one request: limits, retries, breakers, balancing.

use std::collections::BTreeMap;

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::error::ControllerErrorCode;

/// Limits, retries and breakers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct RequestRoutingConfig {
    /// One buffered attempt, from sending to its response, in milliseconds.
    #[serde(alias = "timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub timeout_ms: u64,
    /// One streaming attempt, from sending to its first token, in milliseconds.
    #[serde(alias = "streaming_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub streaming_timeout_ms: u64,
    /// From sending to any sign of the worker, in milliseconds.
    #[serde(alias = "accept_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub accept_timeout_ms: u64,
    /// Between two tokens, in milliseconds.
    #[serde(alias = "stream_idle_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub stream_idle_timeout_ms: u64,
    /// The whole stream, in milliseconds.
    #[serde(alias = "stream_total_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub stream_total_timeout_ms: u64,
    /// Accept and first token while the worker loads the model, in milliseconds.
    #[serde(alias = "model_load_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub model_load_timeout_ms: u64,
    /// A session is forgotten when it was not used for so long, in milliseconds.
    #[serde(rename = "sessionTTL", alias = "session_ttl", alias = "sessionTtl")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub session_ttl: u64,
    /// The most sessions that are remembered.
    #[serde(alias = "max_sessions")]
    #[garde(range(min = 1))]
    pub max_sessions: usize,
    /// When a worker is left alone.
    #[serde(alias = "circuit_breaker")]
    #[garde(dive)]
    pub circuit_breaker: CircuitBreakerConfig,
    /// When another worker is tried.
    #[garde(dive)]
    pub retry: RetryConfig,
    /// Models to try in place of one that nobody can serve now.
    #[serde(alias = "fallback_models")]
    pub fallback_models: BTreeMap<String, Vec<String>>,
    /// What becomes of a stream whose worker dies.
    #[serde(alias = "stream_failover")]
    pub stream_failover: StreamFailover,
    /// How often a stream is continued at most.
    #[serde(alias = "max_continuations")]
    pub max_continuations: u32,
    /// What becomes of requests that find every worker busy.
    #[garde(dive)]
    pub admission: AdmissionConfig,
    /// Asking a second worker when the first is slow.
    pub hedging: HedgingConfig,
}

/// When a worker is left alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct CircuitBreakerConfig {
    /// Whether there are breakers at all.
    pub enabled: bool,
    /// Consecutive failures that open it.
    #[serde(alias = "failure_threshold")]
    #[garde(range(min = 1))]
    pub failure_threshold: u32,
    /// Consecutive successes in half-open that close it.
    #[serde(alias = "success_threshold")]
    #[garde(range(min = 1))]
    pub success_threshold: u32,
    /// How long it stays open the first time, in milliseconds.
    #[serde(alias = "timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub timeout_ms: u64,
    /// How long it stays open at most, in milliseconds.
    #[serde(alias = "max_timeout_ms")]
    #[garde(range(min = 1, max = rules::SPAN_MAX_MS))]
    pub max_timeout_ms: u64,
    /// Failures in a hundred that open it.
    #[serde(alias = "failure_rate_percent")]
    #[garde(range(min = 1.0, max = 100.0))]
    pub failure_rate_percent: f64,
    /// Requests in the window before the rate counts.
    #[serde(alias = "minimum_requests")]
    #[garde(range(min = 1))]
    pub minimum_requests: u32,
    /// The window of the rate, in milliseconds.
    #[serde(alias = "window_ms")]
    #[garde(range(min = 10, max = rules::SPAN_MAX_MS))]
    pub window_ms: u64,
    /// Probes at a time while half-open.
    #[serde(alias = "half_open_requests")]
    #[garde(range(min = 1))]
    pub half_open_requests: u32,
    /// Panic mode: at most so many in a hundred of a model's workers are kept out by the rate.
    #[serde(alias = "max_open_percent")]
    #[garde(range(min = 0.0, max = 100.0))]
    pub max_open_percent: f64,
    /// A first token later than this, in milliseconds, counts as slow; off where not given.
    #[serde(alias = "slow_first_token_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub slow_first_token_ms: Option<u64>,
}

/// When another worker is tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct RetryConfig {
    /// Whether there are retries at all.
    pub enabled: bool,
    /// Attempts after the first.
    #[serde(alias = "max_retries")]
    #[garde(range(max = 100))]
    pub max_retries: u32,
    /// The first wait, in milliseconds; doubles from one to the next.
    #[serde(alias = "retry_delay_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub retry_delay_ms: u64,
    /// The longest wait, in milliseconds.
    #[serde(alias = "max_delay_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub max_delay_ms: u64,
    /// The codes after which another worker is tried.
    #[serde(alias = "retry_on_errors")]
    pub retry_on_errors: Vec<ControllerErrorCode>,
    /// With nobody else left, whether a worker that failed without a timeout may be tried again.
    #[serde(alias = "revisit_failed_workers")]
    pub revisit_failed_workers: bool,
    /// Retries in a hundred requests, over a second.
    #[serde(alias = "budget_percent")]
    #[garde(range(min = 0.0, max = 1000.0))]
    pub budget_percent: f64,
    /// Retries a second that are always allowed.
    #[serde(alias = "budget_min_per_second")]
    #[garde(range(min = 0.0, max = 1_000_000.0))]
    pub budget_min_per_second: f64,
}

/// What becomes of a stream whose worker dies after tokens were delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StreamFailover {
    /// A worker with feature `resume` continues it.
    #[default]
    Resume,
    /// It is made again from its beginning, where decoding is deterministic.
    Replay,
    /// It ends with STREAM_INTERRUPTED.
    Off,
}

/// What becomes of requests that find every worker busy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct AdmissionConfig {
    /// How many wait, for each model.
    #[serde(alias = "max_queue")]
    pub max_queue: usize,
    /// How long one waits, in milliseconds.
    #[serde(alias = "max_wait_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub max_wait_ms: u64,
}

/// Asking a second worker when the first is slow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HedgingConfig {
    /// Whether it is done.
    pub enabled: bool,
}

/// Who gets a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct LoadBalancingConfig {
    /// How one of the candidates is chosen.
    pub strategy: Strategy,
    /// Weights by worker id, for `weighted_random`; 1 where none is given.
    #[garde(custom(rules::weights))]
    pub weights: BTreeMap<String, f64>,
    /// Whether a session stays on its worker.
    #[serde(alias = "session_affinity")]
    pub session_affinity: bool,
    /// How long a new worker warms up, in milliseconds; off where not given.
    #[serde(alias = "slow_start_ms")]
    #[garde(range(max = rules::SPAN_MAX_MS))]
    pub slow_start_ms: Option<u64>,
}

/// How one of the candidates is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// In turn.
    RoundRobin,
    /// Fewest requests in flight.
    #[default]
    #[serde(alias = "least_loaded")]
    LeastRequests,
    /// In proportion to weights.
    WeightedRandom,
    /// Model in memory first, then most free memory.
    #[serde(alias = "smart")]
    SkillsBased,
    /// Lowest expected time to first token.
    PeakEwma,
    /// Most of the prompt in its cache.
    PrefixAware,
}

// === impl RequestRoutingConfig ===

impl Default for RequestRoutingConfig {
    fn default() -> Self {
        Self {
            timeout_ms: 30_000,
            streaming_timeout_ms: 60_000,
            accept_timeout_ms: 2_000,
            stream_idle_timeout_ms: 30_000,
            stream_total_timeout_ms: 600_000,
            model_load_timeout_ms: 120_000,
            session_ttl: 300_000,
            max_sessions: 100_000,
            circuit_breaker: CircuitBreakerConfig::default(),
            retry: RetryConfig::default(),
            fallback_models: BTreeMap::new(),
            stream_failover: StreamFailover::default(),
            max_continuations: 3,
            admission: AdmissionConfig::default(),
            hedging: HedgingConfig::default(),
        }
    }
}

// === impl CircuitBreakerConfig ===

impl Default for CircuitBreakerConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            failure_threshold: 5,
            success_threshold: 2,
            timeout_ms: 30_000,
            max_timeout_ms: 300_000,
            failure_rate_percent: 50.0,
            minimum_requests: 10,
            window_ms: 60_000,
            half_open_requests: 1,
            max_open_percent: 50.0,
            slow_first_token_ms: None,
        }
    }
}

// === impl RetryConfig ===

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            max_retries: 2,
            retry_delay_ms: 100,
            max_delay_ms: 1_000,
            retry_on_errors: vec![
                ControllerErrorCode::WorkerTimeout,
                ControllerErrorCode::WorkerUnavailable,
                ControllerErrorCode::WorkerOverloaded,
                ControllerErrorCode::WorkerOffline,
                ControllerErrorCode::ModelLoadFailed,
            ],
            revisit_failed_workers: false,
            budget_percent: 20.0,
            budget_min_per_second: 10.0,
        }
    }
}

// === impl AdmissionConfig ===

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self { max_queue: 1_024, max_wait_ms: 10_000 }
    }
}

// === impl LoadBalancingConfig ===

impl Default for LoadBalancingConfig {
    fn default() -> Self {
        Self { strategy: Strategy::default(), weights: BTreeMap::new(), session_affinity: true, slow_start_ms: None }
    }
}
