//! The subjects. `prefix` is `nats.subjectPrefix`, which carries its own trailing dot. No part of a subject ever comes
//! from a caller: worker ids are checked, everything else is ours.

use super::WorkerId;

/// Workers announce themselves here.
#[must_use]
pub fn register(prefix: &str) -> String {
    format!("{prefix}worker.register")
}

/// Workers give signs of life here.
#[must_use]
pub fn heartbeat(prefix: &str) -> String {
    format!("{prefix}worker.heartbeat")
}

/// Workers that drain say so here.
#[must_use]
pub fn deregister(prefix: &str) -> String {
    format!("{prefix}worker.deregister")
}

/// Controllers hear all three of these here.
#[must_use]
pub fn membership(prefix: &str) -> String {
    format!("{prefix}worker.*")
}

/// A controller asks one worker to register again here.
#[must_use]
pub fn reregister(prefix: &str, worker: &WorkerId) -> String {
    format!("{prefix}worker.{worker}.reregister")
}

/// A controller that is new, or back, asks every worker to register again here.
#[must_use]
pub fn controller_hello(prefix: &str) -> String {
    format!("{prefix}controller.hello")
}

/// Controllers give signs of life here.
#[must_use]
pub fn controller_heartbeat(prefix: &str) -> String {
    format!("{prefix}controller.heartbeat")
}

/// A worker takes requests here.
#[must_use]
pub fn inference(prefix: &str, worker: &WorkerId) -> String {
    [prefix, "inference.", worker.as_str()].concat()
}

/// A worker is told here to stop.
#[must_use]
pub fn cancel(prefix: &str, worker: &WorkerId) -> String {
    format!("{prefix}cancel.{worker}")
}
