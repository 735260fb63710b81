//! The messages between controllers and workers: the only schema of them.
//!
//! JSON in UTF-8 with camelCase keys; times in milliseconds; unknown fields are ignored. This module knows what a message
//! looks like and on which subject it travels, and nothing of connections, workers or routing.

mod json;
mod membership;
pub mod older;
mod prefix;
mod relayed;
mod reply;
mod request;
pub mod subject;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

pub use json::Json;
pub use membership::{
    Capacity, ControllerNotice, Deregistration, Feature, Heartbeat, HeartbeatMetrics, Phase, Registration, Skills, WorkerStatus,
};
pub use prefix::{MOST_CACHED_PREFIXES, PrefixHashes, prefix_bytes};
pub use relayed::{Relayed, RelayedTo};
pub use reply::{ANSWER_MOST, Finish, FinishReason, Reply, Token, TokenIds, Undecodable, Usage};
pub use request::{Cancel, InferenceRequest, Priority, Resume, check_session_id, header, valid_session_id};

/// The protocol that this crate speaks, as a registration's `protocol` says it.
pub const PROTOCOL: u32 = 1;

/// The name of a worker: `[A-Za-z0-9_-]{1,64}`, so that it can be part of a subject.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct WorkerId(Arc<str>);

/// A text that is no [`WorkerId`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no worker id: 1 to 64 letters, digits, '-' and '_' are allowed")]
pub struct InvalidWorkerId(String);

// === impl WorkerId ===

impl WorkerId {
    /// Checks a name.
    ///
    /// # Errors
    /// The name is empty, too long, or has a character that does not belong into a subject.
    pub fn new(name: &str) -> Result<Self, InvalidWorkerId> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if (1..=64).contains(&name.len()) && name.bytes().all(allowed) {
            Ok(Self(name.into()))
        } else {
            Err(InvalidWorkerId(name.chars().take(80).collect()))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::ops::Deref for WorkerId {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for WorkerId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl From<&WorkerId> for serde_json::Value {
    fn from(id: &WorkerId) -> Self {
        Self::from(id.as_str())
    }
}

impl<'de> Deserialize<'de> for WorkerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Self::new(&name).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_id_can_be_part_of_a_subject() {
        assert!(WorkerId::new("mac-studio_1").is_ok());
        assert!(WorkerId::new(&"a".repeat(64)).is_ok());
        for bad in ["", "a.b", "a b", "*", ">", "ä", &"a".repeat(65)] {
            assert!(WorkerId::new(bad).is_err(), "{bad:?}");
        }
    }
}
