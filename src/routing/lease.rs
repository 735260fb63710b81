//! A request's hold on a worker: its place among the requests in flight and the breaker's permit.
//!
//! Both come back on any end, once: [`Lease::end`] reports how the attempt ended; a lease that is dropped says nothing
//! about the worker.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::breaker::{CircuitState, Permit, Verdict};
use super::router::Router;
use super::selection::{LeftOut, Query};
use super::sessions::Binding;
use super::worker::{Carrier, Worker};
use crate::error::{BreakerEffect, ControllerErrorCode};
use crate::sync::Mutex;
use crate::wire::{Feature, PrefixHashes, WorkerId};

/// How an attempt ended, as far as the worker is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer came, to its end.
    Success,
    /// It failed; what the breaker makes of it is [`ControllerErrorCode::breaker_effect`].
    Failure(ControllerErrorCode),
    /// It says nothing about the worker.
    Ignored,
}

/// Why a worker was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Choice {
    /// By the strategy.
    Strategy,
    /// By `prefix_aware`: it most likely holds most of the prompt in its cache.
    Prefix,
    /// The session belongs to it.
    Affinity,
    /// By rendezvous hashing: the session is new, or its worker cannot take the request.
    Rendezvous,
    /// The caller named it.
    Named,
}

/// A worker's promise to take one request. Send it, tell the first token, and [`end`](Self::end) it.
#[derive(Debug)]
pub struct Lease {
    router: Arc<Router>,
    worker: Arc<Worker>,
    gone: CancellationToken,
    choice: Choice,
    since: Instant,
    progress: Mutex<Progress>,
    /// The session that moves here with a success, and from whom.
    moves: Option<Box<(Box<str>, Binding)>>,
    /// What the worker holds in its cache once it has begun to answer.
    prompt: Option<PrefixHashes>,
}

#[derive(Debug)]
struct Progress {
    permit: Option<Permit>,
    first_token: bool,
}

// === impl Lease ===

impl Lease {
    /// The caller has taken a place in the worker's load.
    pub(super) fn new(router: Arc<Router>, worker: Arc<Worker>, gone: CancellationToken, choice: Choice, now: Instant) -> Self {
        let progress = Mutex::new(Progress { permit: None, first_token: false });
        Self { router, worker, gone, choice, since: now, progress, moves: None, prompt: None }
    }

    /// The breaker let the request through.
    pub(super) fn hold(&mut self, permit: Permit) {
        self.progress.get_mut().permit = Some(permit);
    }

    /// A success moves this session here.
    pub(super) fn moves_with_success(&mut self, session: &str, from: Binding) {
        self.moves = Some(Box::new((session.into(), from)));
    }

    /// The worker will hold this prompt in its cache.
    pub(super) fn teaches(&mut self, prompt: &PrefixHashes) {
        self.prompt = Some(prompt.clone());
    }

    pub(super) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// Who takes the request.
    #[must_use]
    pub fn worker_id(&self) -> &WorkerId {
        &self.worker.id
    }

    /// Which life of it; empty for workers of the older dialect.
    #[must_use]
    pub fn incarnation(&self) -> &str {
        &self.worker.incarnation
    }

    /// Who carries the request there.
    #[must_use]
    pub fn carrier(&self) -> Carrier {
        self.worker.carrier
    }

    /// Whether the worker speaks the older dialect.
    #[must_use]
    pub fn is_legacy(&self) -> bool {
        self.worker.legacy
    }

    /// Whether the worker can do this.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.worker.has(feature)
    }

    /// Whether the worker said that it is loading this model.
    #[must_use]
    pub fn is_loading(&self, model: &str) -> bool {
        self.worker.live().loading.iter().any(|loading| loading == model)
    }

    /// Fires when the worker goes offline, is removed, or is replaced; deregistering does not fire it.
    #[must_use]
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Why this worker was chosen.
    #[must_use]
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Who was no candidate for this query beside the chosen worker, and why. It looks at all who serve the model, and
    /// allocates nothing where all were candidates.
    #[must_use]
    pub fn left_out(&self, query: &Query<'_>, now: Instant) -> Vec<(WorkerId, LeftOut)> {
        self.router.left_out(query, &self.worker, now)
    }

    /// The first token came, so long after the request was sent. For a probe of a half-open breaker this is its success.
    pub fn first_token(&self, ttft: Duration, now: Instant) {
        let transition = {
            let mut progress = self.progress.lock();
            if std::mem::replace(&mut progress.first_token, true) {
                return;
            }
            self.worker.load.observe(ttft, now);
            match (&self.worker.breaker, &self.router.settings().breaker, &mut progress.permit) {
                (Some(breaker), Some(settings), Some(permit)) => breaker.first_token(settings, permit, ttft, now),
                _ => None,
            }
        };
        self.router.tell_breaker(&self.worker, transition);
        self.teach(now);
    }

    fn teach(&self, now: Instant) {
        if let Some(prompt) = &self.prompt {
            self.router.learn(prompt.hashes().iter().copied(), self.worker.serial, now);
        }
    }

    /// The worker asked to be left alone for so long: until then it has no room for anybody.
    pub fn hold_back(&self, span: Duration, now: Instant) {
        self.worker.load.hold_back(span, now);
    }

    /// The attempt ended. Gives back everything that the lease holds before it returns; true when this end opened the
    /// breaker.
    pub fn end(mut self, outcome: Outcome, now: Instant) -> bool {
        let Progress { permit, first_token } = self.progress.get_mut();
        let (permit, first_token) = (permit.take(), *first_token);
        let verdict = match outcome {
            Outcome::Success => Verdict::Success,
            Outcome::Failure(code) => Verdict::Effect(code.breaker_effect()),
            Outcome::Ignored => Verdict::Effect(BreakerEffect::Ignored),
        };
        match verdict {
            Verdict::Success if !first_token => {
                self.worker.load.observe(now.saturating_duration_since(self.since), now);
                self.teach(now);
            }
            Verdict::Effect(BreakerEffect::Failure | BreakerEffect::RateOnly) => self.worker.load.observe_failure(now),
            _ => {}
        }
        let transition = match (&self.worker.breaker, &self.router.settings().breaker, permit) {
            (Some(breaker), Some(settings), Some(permit)) => breaker.report(settings, permit, verdict, self.router.dice(), now),
            _ => None,
        };
        if let Some(moves) = self.moves.take().filter(|_| verdict == Verdict::Success) {
            let (session, from) = *moves;
            self.router.move_session(&session, &from, &self.worker, now);
        }
        let (router, worker) = (self.router.clone(), self.worker.clone());
        drop(self);
        router.tell_breaker(&worker, transition) && transition.is_some_and(|transition| transition.to == CircuitState::Open)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let (Some(breaker), Some(permit)) = (&self.worker.breaker, &mut self.progress.get_mut().permit) {
            breaker.release(permit);
        }
        self.worker.load.leave();
        self.router.capacity_freed().notify_waiters();
    }
}

// === impl Choice ===

impl Choice {
    /// The choice as it is written in metadata and logs: `affinity`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Strategy => "strategy",
            Self::Prefix => "prefix",
            Self::Affinity => "affinity",
            Self::Rendezvous => "rendezvous",
            Self::Named => "named",
        }
    }
}
