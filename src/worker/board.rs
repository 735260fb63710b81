//! What the engine says of itself.

use std::sync::Arc;

use crate::wire::Phase;

/// The engine's last report.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Board {
    /// What it is doing.
    pub(super) phase: Phase,
    /// Models that can answer at once.
    pub(super) loaded: Vec<String>,
    /// Models on their way into memory.
    pub(super) loading: Vec<String>,
    /// Hashes of the prompts in its caches.
    pub(super) cached: Arc<[String]>,
    /// It has said anything at all.
    pub(super) has_spoken: bool,
    /// It has said that it can take work.
    pub(super) was_ready: bool,
    /// It has ended, with an error where there is one.
    pub(super) ended: Option<Option<String>>,
}
