//! A look at a fleet from outside: what the server is like, and which workers answer. For tools that check a set-up; no
//! controller is made and no worker is asked to do anything but to say who it is.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::connection::NatsConnection;
use crate::config::NatsConfig;
use crate::error::{ControllerError, epoch_ms};
use crate::wire::{ControllerNotice, Heartbeat, Registration, WorkerId, subject};

/// The most workers that are listed.
const MOST: usize = 10_000;

/// What was seen.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Survey {
    /// The server.
    pub server: ServerFacts,
    /// The workers that spoke, by name.
    pub workers: Vec<Sighting>,
}

/// What a server says of itself, and how far away it is.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerFacts {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The largest message that it takes, in bytes.
    pub max_payload: usize,
    /// How long a message takes there and back, in milliseconds.
    pub round_trip_ms: f64,
}

/// A worker that spoke.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sighting {
    /// Its name.
    pub worker_id: WorkerId,
    /// The machine's name, where it says one.
    pub hostname: String,
    /// What it serves, as far as it has said.
    pub models: Vec<String>,
    /// It speaks the older dialect.
    pub older: bool,
    /// By how much its clock is ahead of ours, in milliseconds, less what the message took on its way. None: it says no time.
    pub clock_ahead_ms: Option<i64>,
    /// How many lives of this name spoke: two workers must not share one.
    pub incarnations: usize,
}

#[derive(Default)]
struct Seen {
    sighting: Option<Sighting>,
    incarnations: Vec<String>,
}

/// Connects, asks who is there, and listens for `span`.
///
/// # Errors
/// NATS_ERROR: no server answers, or it refuses us.
pub async fn survey(config: &NatsConfig, name: &str, interval: Duration, span: Duration) -> Result<Survey, ControllerError> {
    let connection = NatsConnection::connect(config, name).await?;
    let mut membership = connection.subscribe(subject::membership(connection.prefix())).await?;
    connection.flush().await?;
    let asked = Instant::now();
    connection.flush().await?;
    let info = connection.client().server_info();
    let server = ServerFacts {
        name: info.server_name,
        version: info.version,
        max_payload: info.max_payload,
        round_trip_ms: asked.elapsed().as_secs_f64() * 1_000.0,
    };
    let notice = ControllerNotice {
        controller_id: name.to_owned(),
        heartbeat_interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
        timestamp: epoch_ms(),
    };
    let notice = serde_json::to_vec(&notice).unwrap_or_default();
    connection.publish(subject::controller_hello(connection.prefix()), notice.into()).await?;
    let (registrations, heartbeats) = (subject::register(connection.prefix()), subject::heartbeat(connection.prefix()));
    let mut seen = BTreeMap::<WorkerId, Seen>::new();
    let listening = async {
        while let Some(message) = membership.next().await {
            if message.subject == registrations {
                if let Ok(registration) = serde_json::from_slice::<Registration>(&message.payload) {
                    note(&mut seen, Sighting::of_registration(&registration), registration.incarnation);
                }
            } else if message.subject == heartbeats
                && let Ok(heartbeat) = serde_json::from_slice::<Heartbeat>(&message.payload)
            {
                note(&mut seen, Sighting::of_heartbeat(&heartbeat), heartbeat.incarnation);
            }
        }
    };
    let _ = tokio::time::timeout(span, listening).await;
    connection.close().await;
    let workers = seen.into_values().filter_map(|seen| {
        let incarnations = seen.incarnations.len();
        seen.sighting.map(|sighting| Sighting { incarnations, ..sighting })
    });
    Ok(Survey { server, workers: workers.collect() })
}

/// The first word of a worker counts, unless a registration follows, which says more.
fn note(seen: &mut BTreeMap<WorkerId, Seen>, sighting: Sighting, incarnation: String) {
    if seen.len() >= MOST && !seen.contains_key(&sighting.worker_id) {
        return;
    }
    let seen = seen.entry(sighting.worker_id.clone()).or_default();
    if !seen.incarnations.contains(&incarnation) && seen.incarnations.len() < MOST {
        seen.incarnations.push(incarnation);
    }
    if seen.sighting.as_ref().is_none_or(|known| known.hostname.is_empty()) {
        seen.sighting = Some(sighting);
    }
}

// === impl Sighting ===

impl Sighting {
    fn of_registration(registration: &Registration) -> Self {
        Self {
            worker_id: registration.worker_id.clone(),
            hostname: registration.hostname.clone(),
            models: registration.skills.available_models.clone(),
            older: registration.is_older(),
            clock_ahead_ms: ahead(registration.timestamp),
            incarnations: 1,
        }
    }

    fn of_heartbeat(heartbeat: &Heartbeat) -> Self {
        Self {
            worker_id: heartbeat.worker_id.clone(),
            hostname: String::new(),
            models: heartbeat.metrics.models_loaded.clone(),
            older: heartbeat.is_older(),
            clock_ahead_ms: ahead(heartbeat.timestamp),
            incarnations: 1,
        }
    }
}

fn ahead(timestamp: u64) -> Option<i64> {
    let (theirs, ours) = (i64::try_from(timestamp).ok()?, i64::try_from(epoch_ms()).ok()?);
    (theirs > 0).then(|| theirs - ours)
}
