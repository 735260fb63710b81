//! What of the configuration concerns the room, in its own units.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{CircuitBreakerConfig, ClusterConfig, Strategy};
use crate::error::ControllerError;

/// The settings of a [`Router`](super::Router).
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSettings {
    /// How one of the candidates is chosen.
    pub strategy: Strategy,
    /// Weights by worker id, for `weighted_random`; 1 where none is given.
    pub weights: BTreeMap<String, f64>,
    /// Priorities by worker id, 0 to 100; 0 where none is given.
    pub priorities: BTreeMap<String, u8>,
    /// Whether a session stays on its worker.
    pub session_affinity: bool,
    /// A session is forgotten when it was not used for so long.
    pub session_ttl: Duration,
    /// The most sessions that are remembered.
    pub max_sessions: usize,
    /// The breakers; `None` where there are none.
    pub breaker: Option<BreakerSettings>,
    /// A worker that was silent for so long is offline.
    pub worker_offline_timeout: Duration,
    /// How often workers give a sign of life; reports older than three of these are ignored.
    pub heartbeat_interval: Duration,
    /// The most workers that are known at a time.
    pub max_workers: usize,
    /// How long a new worker warms up.
    pub slow_start: Option<Duration>,
    /// The longest that a worker which comes and goes is held back.
    pub flap_hold_max: Duration,
}

/// The settings of the breakers; spec/reliability.md gives the defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerSettings {
    /// Consecutive failures that open it.
    pub failure_threshold: u32,
    /// Successes in half-open that close it.
    pub success_threshold: u32,
    /// How long it stays open the first time.
    pub open_for: Duration,
    /// How long it stays open at most, before jitter.
    pub open_for_max: Duration,
    /// The share of failures, 0 to 1, that opens it.
    pub failure_rate: f64,
    /// Requests in the window before a share counts.
    pub minimum_requests: u32,
    /// The window of the shares.
    pub window: Duration,
    /// Probes at a time while half-open.
    pub half_open_requests: u32,
    /// Panic mode: at most this share of a model's workers, 0 to 1, is kept out by the failure rate.
    pub max_open: f64,
    /// A first token later than this is slow; `None`: none is.
    pub slow_first_token: Option<Duration>,
}

// === impl RouterSettings ===

impl TryFrom<&ClusterConfig> for RouterSettings {
    type Error = ControllerError;

    /// # Errors
    /// REQUEST_VALIDATION_FAILED, with the key in `context.field`: a weight that is negative or no number.
    fn try_from(config: &ClusterConfig) -> Result<Self, ControllerError> {
        let balancing = &config.load_balancing;
        let routing = &config.request_routing;
        if let Some((id, weight)) = balancing.weights.iter().find(|(_, weight)| !weight.is_finite() || **weight < 0.0) {
            return Err(ControllerError::validation(
                &format!("loadBalancing.weights.{id}"),
                format!("is {weight}; it has to be a number of at least 0"),
            ));
        }
        Ok(Self {
            strategy: balancing.strategy,
            weights: balancing.weights.clone(),
            priorities: config.workers.r#static.iter().map(|worker| (worker.worker_id.clone(), worker.priority)).collect(),
            session_affinity: balancing.session_affinity,
            session_ttl: Duration::from_millis(routing.session_ttl),
            max_sessions: routing.max_sessions,
            breaker: routing.circuit_breaker.enabled.then(|| (&routing.circuit_breaker).into()),
            worker_offline_timeout: Duration::from_millis(config.controller.worker_offline_timeout_ms),
            heartbeat_interval: Duration::from_millis(config.discovery.heartbeat_interval_ms),
            max_workers: config.controller.max_workers,
            slow_start: balancing.slow_start_ms.map(Duration::from_millis),
            flap_hold_max: Duration::from_millis(config.controller.flap_hold_max_ms),
        })
    }
}

// === impl BreakerSettings ===

impl From<&CircuitBreakerConfig> for BreakerSettings {
    fn from(config: &CircuitBreakerConfig) -> Self {
        Self {
            failure_threshold: config.failure_threshold,
            success_threshold: config.success_threshold,
            open_for: Duration::from_millis(config.timeout_ms),
            open_for_max: Duration::from_millis(config.max_timeout_ms),
            failure_rate: config.failure_rate_percent / 100.0,
            minimum_requests: config.minimum_requests,
            window: Duration::from_millis(config.window_ms),
            half_open_requests: config.half_open_requests,
            max_open: config.max_open_percent / 100.0,
            slow_first_token: config.slow_first_token_ms.map(Duration::from_millis),
        }
    }
}

impl Default for BreakerSettings {
    fn default() -> Self {
        (&CircuitBreakerConfig::default()).into()
    }
}
