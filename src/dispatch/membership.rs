//! Who comes and goes: messages of workers reach the registry, and the controller gives signs of itself.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, MissedTickBehavior};

use super::controller::ControllerState;
use super::core::{Core, not_ready};
use crate::error::{ControllerError, epoch_ms};
use crate::routing::{Carrier, HeartbeatVerdict, IgnoredBecause, Registered};
use crate::transport::nats::{Incoming, Link, NatsConnection, Subscription};
use crate::transport::{LocalNews, LocalPort};
use crate::wire::{ControllerNotice, Deregistration, Heartbeat, Registration, WorkerStatus, subject};

/// Workers without a place in the fleet go on asking for one: the log is told when the first of them comes, and after so long
/// without any.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Everything that workers say of themselves on the subjects of one prefix: one subscription, so that it arrives in order.
pub(super) struct Ear {
    messages: Subscription,
    prefix: String,
    /// These are not the fleet's own subjects: only workers of the older dialect, which know no prefix, are heard.
    older_alone: bool,
}

/// Subscribes to everything that workers say of themselves.
pub(super) async fn subscribe(connection: &NatsConnection) -> Result<Vec<Ear>, ControllerError> {
    let prefix = connection.prefix();
    let mut ears = vec![Ear::open(connection, prefix, false).await?];
    if !prefix.is_empty() {
        ears.push(Ear::open(connection, "", true).await?);
    }
    // Known to the server before anybody is asked to register.
    connection.flush().await?;
    Ok(ears)
}

/// Hands every message to the registry, until the connection is closed.
pub(super) async fn listen(core: Arc<Core>, connection: NatsConnection, ear: Ear) {
    let Ear { mut messages, prefix, older_alone } = ear;
    let register = subject::register(&prefix);
    let heartbeat = subject::heartbeat(&prefix);
    let deregister = subject::deregister(&prefix);
    while let Some(message) = messages.next().await {
        let now = Instant::now();
        if message.subject == heartbeat {
            if let Some(beat) = read::<Heartbeat>(&message).filter(|beat| !older_alone || beat.is_older()) {
                heard(&core, &connection, beat, now).await;
            }
        } else if message.subject == register {
            if let Some(registration) = read::<Registration>(&message).filter(|worker| !older_alone || worker.is_older()) {
                registered(&core, &registration, now);
            }
        } else if message.subject == deregister
            && let Some(gone) = read::<Deregistration>(&message)
            && (!older_alone || core.router.worker(&gone.worker_id, now).is_some_and(|worker| worker.legacy))
        {
            core.router.deregister(&gone.worker_id, now);
        }
    }
}

/// Gives a sign of life every so often, so that workers go on with this controller's requests.
pub(super) async fn announce(core: Arc<Core>, connection: NatsConnection) {
    let to = subject::controller_heartbeat(connection.prefix());
    let mut beats = tokio::time::interval(interval(&core));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        // While the connection is down nobody can be told.
        let _ = connection.publish(to.clone(), notice(&core)).await;
    }
}

/// Asks every worker to register.
pub(super) async fn hello(core: &Core, connection: &NatsConnection) -> Result<(), ControllerError> {
    connection.publish(subject::controller_hello(connection.prefix()), notice(core)).await
}

/// While our own connection is down silence says nothing; when it is back everybody is asked to register again.
pub(super) async fn watch_link(core: Arc<Core>, connection: NatsConnection) {
    let mut link = connection.link();
    let mut connects = 1;
    loop {
        // The news of the first connection may still be on its way; one that was down and is up again counts as down.
        let is_news = |link: &Link| link.connects > connects || (link.connects > 0 && !link.connected);
        if link.wait_for(is_news).await.is_err() {
            return;
        }
        tracing::warn!(controller_id = &*core.id, "the connection to NATS is down");
        core.router.freeze(Instant::now());
        if link.wait_for(|link| link.connected).await.is_err() {
            return;
        }
        connects = link.borrow_and_update().connects;
        tracing::info!(controller_id = &*core.id, "the connection to NATS is back");
        core.router.thaw(Instant::now());
        let _ = hello(&core, &connection).await;
    }
}

/// Adds a worker of this process.
pub(super) fn attach_local(core: &Arc<Core>, registration: &Registration) -> Result<LocalPort, ControllerError> {
    if core.state() >= ControllerState::Draining {
        return Err(not_ready(core.state()));
    }
    let id = &registration.worker_id;
    let taken = || {
        ControllerError::validation("worker_id", format!("{id} is the name of a worker that is here already; give each its own"))
    };
    let now = Instant::now();
    if core.router.worker(id, now).is_some_and(|worker| worker.status != WorkerStatus::Offline) {
        return Err(taken());
    }
    let port = core.hub.attach(id).ok_or_else(taken)?;
    if let Registered::Ignored(why) = core.router.register(registration, Carrier::Local, now) {
        return Err(match why {
            IgnoredBecause::FleetFull => ControllerError::validation(
                "worker_id",
                format!("the fleet has controller.maxWorkers ({}) workers already", core.config.controller.max_workers),
            ),
            IgnoredBecause::Superseded | IgnoredBecause::Deregistered => taken(),
        });
    }
    let (core, id, incarnation) = (Arc::downgrade(core), id.clone(), registration.incarnation.clone());
    let port = port.on_news({
        let (core, id) = (core.clone(), id.clone());
        move |news| {
            let Some(core) = core.upgrade() else { return };
            let now = Instant::now();
            match news {
                LocalNews::Heartbeat(beat) => {
                    core.router.heartbeat(&beat, &|id| core.requests.is_active(id), now);
                }
                LocalNews::Deregister => core.router.deregister(&id, now),
            }
        }
    });
    Ok(port.on_detach(move || {
        let Some(core) = core.upgrade() else { return };
        // Not another one of the same name that has come since.
        if core.router.worker(&id, Instant::now()).is_some_and(|worker| worker.incarnation == incarnation) {
            core.router.remove(&id);
        }
    }))
}

// === impl Ear ===

impl Ear {
    async fn open(connection: &NatsConnection, prefix: &str, older_alone: bool) -> Result<Self, ControllerError> {
        let messages = connection.subscribe(subject::membership(prefix)).await?;
        Ok(Self { messages, prefix: prefix.to_owned(), older_alone })
    }
}

async fn heard(core: &Core, connection: &NatsConnection, mut beat: Heartbeat, now: Instant) {
    if beat.is_older() {
        // It knows our requests by other names.
        beat.active_request_ids = None;
    }
    let is_ours = |id: &str| core.requests.is_active(id);
    // One of the older dialect is never unknown: it is registered with what its heartbeat says.
    if core.router.heartbeat(&beat, &is_ours, now) == HeartbeatVerdict::Unknown {
        let _ = connection.publish(subject::reregister(connection.prefix(), &beat.worker_id), Bytes::new()).await;
    }
}

fn registered(core: &Core, registration: &Registration, now: Instant) {
    let worker_id = registration.worker_id.as_str();
    if !registration.is_older() && registration.incarnation.is_empty() {
        tracing::warn!(worker_id, "a worker without incarnation registered, and is left out: each start has to have its own");
        return;
    }
    if let Registered::Ignored(IgnoredBecause::FleetFull) = core.router.register(registration, Carrier::Nats, now)
        && core.fleet_full_told.lock().replace(now).is_none_or(|told| now.saturating_duration_since(told) >= AGAIN_AFTER)
    {
        tracing::warn!(
            worker_id,
            max_workers = core.config.controller.max_workers,
            "no room for another worker: controller.maxWorkers"
        );
    }
}

/// A message; nothing where it cannot be read, or names a worker that could be no part of a subject.
fn read<T: DeserializeOwned>(message: &Incoming) -> Option<T> {
    serde_json::from_slice(&message.payload)
        .inspect_err(|error| tracing::debug!(subject = message.subject, %error, "a membership message was dropped"))
        .ok()
}

fn notice(core: &Core) -> Bytes {
    let notice = ControllerNotice {
        controller_id: core.id.to_string(),
        heartbeat_interval_ms: core.config.discovery.heartbeat_interval_ms,
        timestamp: epoch_ms(),
    };
    // Texts and numbers: it cannot fail to be written.
    serde_json::to_vec(&notice).unwrap_or_default().into()
}

fn interval(core: &Core) -> Duration {
    Duration::from_millis(core.config.discovery.heartbeat_interval_ms)
}
