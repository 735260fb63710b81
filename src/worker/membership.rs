//! The worker's place in the fleet: registrations, heartbeats, and what controllers say about themselves.
//!
//! Subscribed before the first registration, so that no controller's word is missed. All of it runs on the runtime's own
//! threads: an engine that holds its interpreter for long does not silence it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::desk::Desk;
use super::pulse::Pulse;
use super::rivals::{Rivals, Verdict};
use crate::error::{ControllerError, ControllerErrorCode, epoch_ms};
use crate::transport::nats::{Incoming, NatsConnection, Subscription};
use crate::wire::{ControllerNotice, Deregistration, Registration, WorkerId, WorkerStatus, subject};

/// Workers that are asked all at once answer within this time, each when it likes.
const JITTER: Duration = Duration::from_millis(250);

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// It takes requests.
    Serving,
    /// It takes no new ones.
    Draining,
    /// It has none left and goes.
    Leaving,
}

/// A worker's place in the fleet.
pub(super) struct Membership {
    connection: NatsConnection,
    desk: Arc<Desk>,
    registration: Registration,
    heartbeat_interval: Duration,
    rivals: Rivals,
    pulse: Pulse,
    hello: Subscription,
    controllers: Subscription,
    reregister: Subscription,
    registrations: Subscription,
}

/// A registration as it is published: with the age of the sender, which tells two workers of one name apart.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Announcement<'a> {
    #[serde(flatten)]
    registration: &'a Registration,
    age_ms: u64,
}

/// What matters of somebody else's.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Announced {
    worker_id: WorkerId,
    #[serde(default)]
    incarnation: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    age_ms: Option<u64>,
}

// === impl Membership ===

impl Membership {
    /// Subscribes.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is closed.
    pub(super) async fn open(
        connection: NatsConnection,
        desk: Arc<Desk>,
        registration: Registration,
        heartbeat_interval: Duration,
    ) -> Result<Self, ControllerError> {
        let prefix = connection.prefix().to_owned();
        Ok(Self {
            hello: connection.subscribe(subject::controller_hello(&prefix)).await?,
            controllers: connection.subscribe(subject::controller_heartbeat(&prefix)).await?,
            reregister: connection.subscribe(subject::reregister(&prefix, &registration.worker_id)).await?,
            registrations: connection.subscribe(subject::register(&prefix)).await?,
            rivals: Rivals::new(registration.incarnation.clone()),
            pulse: Pulse::new(desk.clone(), &registration),
            connection,
            desk,
            registration,
            heartbeat_interval,
        })
    }

    /// What the discovery of services shows of the worker.
    pub(super) fn metadata(&self) -> HashMap<String, String> {
        HashMap::from([
            ("workerId".to_owned(), self.registration.worker_id.to_string()),
            ("incarnation".to_owned(), self.registration.incarnation.clone()),
            ("hostname".to_owned(), self.registration.hostname.clone()),
            ("models".to_owned(), self.registration.skills.available_models.join(" ")),
        ])
    }

    /// Registers, with a first heartbeat.
    ///
    /// # Errors
    /// NATS_ERROR, PAYLOAD_TOO_LARGE.
    pub(super) async fn register(&mut self) -> Result<(), ControllerError> {
        self.registration.timestamp = epoch_ms();
        let age_ms = u64::try_from(self.rivals.age().as_millis()).unwrap_or(u64::MAX);
        let announcement = Announcement { registration: &self.registration, age_ms };
        publish(&self.connection, subject::register(self.connection.prefix()), &announcement).await?;
        self.heartbeat(WorkerStatus::Online).await
    }

    /// Keeps the worker in the fleet until it is to leave. An error: another worker has taken its name.
    pub(super) async fn run(mut self, mut stage: watch::Receiver<Stage>) -> Result<(), ControllerError> {
        let mut board = self.desk.board.subscribe();
        board.mark_unchanged();
        let mut link = self.connection.link();
        let mut connects = link.borrow_and_update().connects;
        let mut tick = tokio::time::interval_at(Instant::now() + self.heartbeat_interval, self.heartbeat_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut register_at: Option<Instant> = None;
        let mut status = WorkerStatus::Online;
        loop {
            let due = async {
                match register_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = stage.changed() => {
                    let now = if changed.is_ok() { *stage.borrow_and_update() } else { Stage::Leaving };
                    status = WorkerStatus::Draining;
                    register_at = None;
                    if now == Stage::Draining {
                        self.deregister().await;
                    }
                    self.beat(status).await;
                    if now == Stage::Leaving {
                        return Ok(());
                    }
                }
                changed = link.changed() => {
                    let now = *link.borrow_and_update();
                    self.desk.connected(now.connected);
                    if now.connected && now.connects > connects {
                        connects = now.connects;
                        register_at = Some(Instant::now());
                    }
                    if changed.is_err() {
                        return Err(closed());
                    }
                }
                message = self.registrations.next() => {
                    let Some(message) = message else { return Err(closed()) };
                    match self.judge(&message) {
                        (Verdict::Ignore, _) => {}
                        (Verdict::Assert, _) => register_at = Some(sooner(register_at)),
                        (Verdict::GiveWay, rival) => return Err(superseded(&self.registration, rival)),
                    }
                }
                message = self.reregister.next() => {
                    if message.is_none() {
                        return Err(closed());
                    }
                    register_at = Some(Instant::now());
                }
                message = self.hello.next() => {
                    let Some(message) = message else { return Err(closed()) };
                    self.heard(&message);
                    register_at = Some(sooner(register_at));
                }
                message = self.controllers.next() => {
                    let Some(message) = message else { return Err(closed()) };
                    self.heard(&message);
                }
                () = due => {
                    register_at = None;
                    if status == WorkerStatus::Online && let Err(error) = self.register().await {
                        tracing::debug!(%error, "not registered; the next connection will");
                    }
                }
                Ok(()) = board.changed() => self.beat(status).await,
                _ = tick.tick() => self.beat(status).await,
            }
        }
    }

    fn heard(&self, message: &Incoming) {
        match serde_json::from_slice::<ControllerNotice>(&message.payload) {
            Ok(notice) => self.desk.controller_heard(&notice.controller_id, notice.heartbeat_interval_ms),
            Err(_) => tracing::debug!(subject = message.subject, "a message that cannot be read is dropped"),
        }
    }

    fn judge(&mut self, message: &Incoming) -> (Verdict, Option<Announced>) {
        // Most are of other workers: their name is all that is looked at.
        match serde_json::from_slice::<Announced>(&message.payload) {
            Ok(other) if other.worker_id == self.registration.worker_id => {
                (self.rivals.judge(&other.incarnation, other.age_ms.map(Duration::from_millis)), Some(other))
            }
            _ => (Verdict::Ignore, None),
        }
    }

    /// A heartbeat; one that does not go out is left to the next.
    async fn beat(&mut self, status: WorkerStatus) {
        if let Err(error) = self.heartbeat(status).await {
            tracing::debug!(%error, "no heartbeat went out");
        }
    }

    async fn heartbeat(&mut self, status: WorkerStatus) -> Result<(), ControllerError> {
        let heartbeat = self.pulse.beat(status);
        publish(&self.connection, subject::heartbeat(self.connection.prefix()), &heartbeat).await
    }

    async fn deregister(&self) {
        let message = Deregistration { worker_id: self.registration.worker_id.clone(), timestamp: epoch_ms() };
        if let Err(error) = publish(&self.connection, subject::deregister(self.connection.prefix()), &message).await {
            tracing::debug!(%error, "not deregistered; controllers will notice the silence");
        }
    }
}

/// Publishes a message of membership.
///
/// # Errors
/// NATS_ERROR, PAYLOAD_TOO_LARGE.
pub(super) async fn publish(
    connection: &NatsConnection,
    subject: String,
    message: &impl Serialize,
) -> Result<(), ControllerError> {
    let payload = serde_json::to_vec(message).map_err(|error| {
        ControllerError::new(ControllerErrorCode::InternalError, format!("cannot encode a message for {subject}: {error}"))
    })?;
    connection.publish(subject, payload.into()).await
}

/// A moment within the jitter, or the one that is planned already.
fn sooner(planned: Option<Instant>) -> Instant {
    let at = Instant::now() + JITTER.mul_f64(fastrand::f64());
    planned.map_or(at, |planned| planned.min(at))
}

fn closed() -> ControllerError {
    ControllerError::new(ControllerErrorCode::NatsError, "the connection to NATS was closed under the worker")
}

fn superseded(ours: &Registration, rival: Option<Announced>) -> ControllerError {
    let host = rival.as_ref().map_or("", |rival| rival.hostname.as_str());
    let place = if host.is_empty() { String::new() } else { format!(" on {host:?}") };
    ControllerError::new(
        ControllerErrorCode::WorkerOffline,
        format!(
            "another worker{place} has registered as {}, so this one has stopped: two cannot share a name; give each \
             worker its own worker_id, or leave it out",
            ours.worker_id
        ),
    )
    .with("workerId", &ours.worker_id)
    .with("incarnation", ours.incarnation.as_str())
    .with("supersededBy", rival.map(|rival| rival.incarnation).unwrap_or_default())
}
