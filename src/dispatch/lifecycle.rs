//! A controller's life: connect, register, start, drain, stop. Each state comes once, and every end is clean.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use super::controller::ControllerState;
use super::core::{Core, not_ready};
use super::{membership, probes};
use crate::config::{NatsConfig, NatsMode, ServerUrls};
use crate::error::ControllerError;
use crate::transport::nats::{NatsConnection, NatsTransport};

/// How often is looked at what is due by the clock.
const TICK: Duration = Duration::from_millis(100);
/// How long requests that were cut off may take to tell their callers.
const CUT_OFF_LIMIT: Duration = Duration::from_secs(1);

/// What runs while the controller lives.
pub(super) struct Lifecycle {
    core: Arc<Core>,
    /// Held while a start is on its way.
    starting: tokio::sync::Mutex<()>,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    tasks: Vec<AbortOnDropHandle<()>>,
    connection: Option<NatsConnection>,
}

/// Stops a start that did not come to its end.
struct Unfinished<'a>(Option<&'a Lifecycle>);

// === impl Lifecycle ===

impl Lifecycle {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core, starting: tokio::sync::Mutex::default(), running: Mutex::default() }
    }

    pub(super) async fn start(&self, nats_url: Option<String>) -> Result<(), ControllerError> {
        let _starting = self.starting.lock().await;
        if !self.core.advance(ControllerState::Connecting) {
            let error = not_ready(self.core.state());
            return Err(error.with("hint", "a controller starts once; make another one"));
        }
        let unfinished = Unfinished(Some(self));
        let config = &self.core.config;
        if config.nats.mode != NatsMode::None {
            self.join_fleet(&self.nats_config(nats_url)).await?;
        }
        self.go_on(ControllerState::Starting)?;
        self.spawn(tick(self.core.clone()));
        self.spawn(usher(self.core.clone()));
        for worker in &config.workers.r#static {
            self.spawn(probes::watch(self.core.clone(), worker.clone()));
        }
        self.go_on(ControllerState::Ready)?;
        unfinished.finish();
        let (nats, strategy) = (json!(config.nats.mode), json!(config.load_balancing.strategy));
        tracing::info!(
            controller_id = &*self.core.id,
            nats = nats.as_str(),
            strategy = strategy.as_str(),
            session_affinity = config.load_balancing.session_affinity,
            max_retries = config.request_routing.retry.max_retries,
            timeout_ms = config.request_routing.timeout_ms,
            circuit_breaker = config.request_routing.circuit_breaker.enabled,
            "controller started"
        );
        Ok(())
    }

    pub(super) async fn stop(&self, drain_timeout: Duration) {
        if self.core.advance(ControllerState::Draining) {
            tracing::info!(controller_id = &*self.core.id, active = self.core.requests.active(), "controller stopping");
        }
        // Late, or not at all: what is left is cut off.
        let _ = tokio::time::timeout(drain_timeout, self.idle()).await;
        self.core.advance(ControllerState::Stopping);
        self.core.cut.fire();
        let _ = tokio::time::timeout(CUT_OFF_LIMIT, self.idle()).await;
        let _starting = self.starting.lock().await;
        let Running { tasks, connection } = std::mem::take(&mut *self.running.lock());
        drop(tasks);
        self.core.hub.close();
        if let Some(connection) = connection {
            connection.close().await;
        }
        if self.core.advance(ControllerState::Stopped) {
            tracing::info!(controller_id = &*self.core.id, "controller stopped");
        }
        self.core.events.close();
    }

    /// Stops at once, without waiting for anybody.
    pub(super) fn abandon(&self) {
        self.core.advance(ControllerState::Stopped);
        self.core.cut.fire();
        let connection = std::mem::take(&mut *self.running.lock()).connection;
        // The inbox holds the connection too. Outside of a runtime, everything that could use it has gone already.
        if let (Some(connection), Ok(runtime)) = (connection, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move { connection.close().await });
        }
        self.core.hub.close();
        self.core.events.close();
    }

    async fn join_fleet(&self, config: &NatsConfig) -> Result<(), ControllerError> {
        let core = &self.core;
        let connection = NatsConnection::connect(config, &core.id).await?;
        self.running.lock().connection = Some(connection.clone());
        self.go_on(ControllerState::Registering)?;
        let grace = Duration::from_millis(config.reconnect_grace_ms);
        let transport = NatsTransport::open(connection.clone(), core.id.clone(), grace).await?;
        // Set once: a controller starts once.
        let _ = core.nats.set(Arc::new(transport));
        let ears = membership::subscribe(&connection).await?;
        membership::hello(core, &connection).await?;
        for ear in ears {
            self.spawn(membership::listen(core.clone(), connection.clone(), ear));
        }
        self.spawn(membership::announce(core.clone(), connection.clone()));
        self.spawn(membership::watch_link(core.clone(), connection));
        Ok(())
    }

    fn nats_config(&self, nats_url: Option<String>) -> NatsConfig {
        let config = self.core.config.nats.clone();
        let own = (config.mode == NatsMode::Embedded).then(|| format!("nats://127.0.0.1:{}", config.embedded.port));
        match nats_url.or(own) {
            Some(url) => NatsConfig { server_url: ServerUrls::One(url), ..config },
            None => config,
        }
    }

    /// Goes on, unless the controller was told to stop meanwhile.
    fn go_on(&self, state: ControllerState) -> Result<(), ControllerError> {
        if self.core.advance(state) { Ok(()) } else { Err(not_ready(self.core.state())) }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.running.lock().tasks.push(AbortOnDropHandle::new(tokio::spawn(task)));
    }

    /// Returns when no request is active.
    async fn idle(&self) {
        loop {
            let ended = self.core.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.core.requests.active() == 0 {
                return;
            }
            ended.await;
        }
    }
}

// === impl Unfinished ===

impl Unfinished<'_> {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(lifecycle) = self.0 {
            lifecycle.abandon();
        }
    }
}

/// Does what is due by the clock.
async fn tick(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        core.router.expire(Instant::now());
        core.admission.move_on(Instant::now());
    }
}

/// Tells those who wait for a place that one may be free. Where nobody waits, a freed place wakes nobody.
async fn usher(core: Arc<Core>) {
    loop {
        core.admission.somebody_waits().await;
        let freed = core.router.capacity_freed().notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        // For places that became free before this one was watched.
        core.admission.wake(Instant::now());
        freed.await;
    }
}
