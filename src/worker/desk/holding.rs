//! Attempts whose model is on its way into memory: they wait where they are, and have the time for loading instead of their own.
//!
//! A worker that loads a model is busy, not late. The controllers know from its heartbeats and allow for it, up to
//! `modelLoadTimeoutMs`; so does the desk. Once the model is there, an attempt has the time that it came with.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::{Attempt, Desk, Floor};

// === impl Desk ===

impl Desk {
    /// Which models are being loaded, all of them: attempts for these are not handed out.
    pub(in crate::worker) fn hold_for(&self, loading: &[String]) {
        let now = Instant::now();
        let mut floor = self.floor.lock();
        if floor.loading == loading {
            return;
        }
        let before = std::mem::replace(&mut floor.loading, loading.to_vec());
        let live: Vec<_> = floor.live.values().cloned().collect();
        for taken in live {
            let model = &taken.request.model_id;
            match (before.contains(model), loading.contains(model)) {
                (false, true) => floor.start_clock(&taken, now, self.limits.loading),
                (true, false) => floor.start_clock(&taken, now, taken.timeout),
                _ => {}
            }
        }
        let released = floor.waiting.len();
        drop(floor);
        self.timing.notify_one();
        for _ in 0..released {
            self.offer_work();
        }
    }

    /// Takes an attempt back that was handed out and not begun: it waits where it waited before.
    pub(in crate::worker) fn put_back(&self, taken: &Arc<Attempt>) {
        let mut floor = self.floor.lock();
        let live = floor.live.get(&taken.key).is_some_and(|live| Arc::ptr_eq(live, taken));
        taken.runs_on.store(false, Ordering::Relaxed);
        floor.free(taken);
        *taken.begun.lock() = None;
        if live {
            floor.waiting.insert(taken.place, taken.clone());
        }
        drop(floor);
        self.offer_work();
    }

    /// The models that waiting attempts ask for.
    pub(in crate::worker) fn waiting_models(&self) -> BTreeSet<String> {
        self.floor.lock().waiting.values().map(|taken| taken.request.model_id.clone()).collect()
    }
}

// === impl Floor ===

impl Floor {
    pub(super) fn is_loading(&self, model: &str) -> bool {
        self.loading.iter().any(|loading| loading == model)
    }
}
