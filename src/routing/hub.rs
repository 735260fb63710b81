//! What the workers of a router, and leases on them, share: all of it but membership.
//!
//! Workers hold the hub and the hub, in its picture of the fleet, workers: the router lets go of that picture when it goes.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::breaker::{BreakerReason, Transition};
use super::dice::Dice;
use super::event::{Observer, RouterEvent};
use super::fleet::Fleet;
use super::ledger::Ledger;
use super::prefixes::{FORGOTTEN_AFTER, MOST_PREFIXES, PrefixIndex};
use super::sessions::{Binding, Sessions};
use super::settings::RouterSettings;
use super::worker::Worker;
use crate::config::Strategy;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::WorkerId;

pub(super) struct Hub {
    pub(super) settings: RouterSettings,
    pub(super) observer: Observer,
    pub(super) dice: Dice,
    pub(super) ledger: Arc<Ledger>,
    pub(super) fleet: ArcSwap<Fleet>,
    pub(super) sessions: Mutex<Sessions>,
    /// Empty under every strategy but `prefix_aware`.
    pub(super) prefixes: Mutex<PrefixIndex>,
    pub(super) capacity_freed: Notify,
    /// How often a failure rate opened a breaker, and how often that had been when none was open by it any more. Equal:
    /// none is.
    rate_openings: AtomicU64,
    rate_settled: AtomicU64,
}

// === impl Hub ===

impl Hub {
    pub(super) fn new(settings: RouterSettings, seed: u64, observer: Observer) -> Self {
        Self {
            observer,
            dice: Dice::new(seed),
            // By two random picks nobody looks at all of them.
            ledger: Arc::new(Ledger::new(settings.strategy != Strategy::PeakEwma)),
            fleet: ArcSwap::default(),
            sessions: Mutex::new(Sessions::new(settings.session_ttl, settings.max_sessions)),
            prefixes: Mutex::new(PrefixIndex::new(MOST_PREFIXES, FORGOTTEN_AFTER)),
            capacity_freed: Notify::new(),
            rate_openings: AtomicU64::new(0),
            rate_settled: AtomicU64::new(0),
            settings,
        }
    }

    /// Sets right in everybody's account what the clock alone has changed until now.
    pub(super) fn settle(&self, now: Instant) {
        if self.ledger.is_due(now) {
            self.ledger.settle();
            // Whoever was due before that is in the picture that is there now.
            self.fleet.load().workers.values().for_each(|worker| worker.settle(now));
        }
    }

    /// A worker holds the prefixes with these hashes.
    pub(super) fn learn(&self, hashes: impl IntoIterator<Item = u64>, worker: &Worker, now: Instant) {
        self.prefixes.lock().learn(hashes, worker.life, now);
    }

    /// How often a failure rate opened a breaker.
    pub(super) fn rate_openings(&self) -> u64 {
        self.rate_openings.load(Ordering::SeqCst)
    }

    /// After so many openings by failure rate no breaker was open by it any more.
    pub(super) fn rates_settled(&self, openings: u64) {
        self.rate_settled.store(openings, Ordering::SeqCst);
    }

    /// Whether a breaker may be open by its failure rate.
    pub(super) fn may_panic(&self) -> bool {
        self.rate_openings() != self.rate_settled.load(Ordering::SeqCst)
    }

    /// Tells the observer of a transition; true where there was one to tell. What becomes of the breaker of a life that is
    /// over is nobody's business: it would be taken for that of the life after it. Never called under a lock.
    pub(super) fn tell_breaker(&self, worker: &Worker, transition: Option<Transition>) -> bool {
        let transition = transition.filter(|_| !worker.is_over());
        if let Some(Transition { from, to, reason }) = transition {
            if reason == BreakerReason::FailureRate {
                self.rate_openings.fetch_add(1, Ordering::SeqCst);
            }
            (self.observer)(RouterEvent::BreakerChanged { worker_id: worker.id.clone(), from, to, reason });
            // An opened one, too, is news to those who wait: that may have been the last to wait for.
            self.capacity_freed.notify_waiters();
        }
        transition.is_some()
    }

    /// Gives a session to the worker that answered after its own had failed.
    pub(super) fn move_session(&self, session: &str, from: &Binding, to: &Worker, now: Instant) {
        {
            let mut sessions = self.sessions.lock();
            if sessions.find(session, now).is_some_and(|bound| bound != *from) {
                return;
            }
            sessions.bind(session, to.binding(), now);
        }
        self.tell_session(&from.worker, to);
    }

    pub(super) fn tell_session(&self, from: &WorkerId, to: &Worker) {
        if *from != to.id {
            (self.observer)(RouterEvent::SessionMoved { worker_id: to.id.clone(), previous: from.clone() });
        }
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("settings", &self.settings).finish_non_exhaustive()
    }
}
