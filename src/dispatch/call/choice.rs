//! Whom a request is given to: a choice now, a wait for a place, or another model where nobody is left for the first.

use std::borrow::Cow;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::{Call, Failed};
use crate::dispatch::core::not_ready;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::routing::{Carrier, Lease, Query, Refusal, Wanted};
use crate::wire::{InferenceRequest, PrefixHashes, RelayedTo, WorkerId};

/// Who is not asked.
pub(super) struct LeftAside {
    /// They failed this request.
    tried: Vec<WorkerId>,
    /// They have not what is asked for.
    unable: Vec<WorkerId>,
}

impl Call {
    /// Chooses a worker, waiting for a place where all are full.
    pub(super) async fn lease(&mut self) -> Result<Lease, ControllerError> {
        match self.lease_at_once(true, Instant::now()) {
            Ok(lease) => Ok(lease),
            // In a box, as other rare ways are, so that the usual one stays small.
            Err(refusal) => self.lease_later(refusal).boxed().await,
        }
    }

    /// Chooses a worker, if one has a place and, for those who are `polite`, nobody waits for it.
    fn lease_at_once(&self, polite: bool, now: Instant) -> Result<Lease, Refusal> {
        let line = self.line();
        let rivals = |other: &str| self.core.router.is_shared(wanted(&line), wanted(other));
        if polite && self.core.admission.is_waiting(&line, rivals) && self.may_wait(now) {
            return Err(Refusal::Full);
        }
        self.select(now)
    }

    async fn lease_later(&mut self, mut refusal: Refusal) -> Result<Lease, ControllerError> {
        let mut ticket = None;
        loop {
            let now = Instant::now();
            if refusal == Refusal::Full {
                let waiting = match &ticket {
                    Some(ticket) => ticket,
                    None => {
                        let choosy = !self.failed.is_empty();
                        let line = self.line();
                        let joined = self.core.admission.join(&line, self.request.priority, choosy, self.deadline.at, now)?;
                        joined.nudge(now);
                        ticket.insert(joined)
                    }
                };
                tokio::select! {
                    biased;
                    turn = waiting.turn() => turn?,
                    () = self.core.cut.fired() => return Err(not_ready(self.core.state())),
                }
            } else {
                // Whoever waits for a worker to be asked again waits for no place.
                ticket = None;
                if matches!(refusal, Refusal::NoHealthyWorkers { .. } | Refusal::AllTried { .. }) {
                    let left_out = self.core.router.left_out(&self.query(&self.left_aside()), now);
                    self.core.left_out.tell(&self.request.request_id, &self.request.model_id, &left_out, now);
                }
                if !self.revisit(&refusal, now).await? {
                    return Err(self.refused(refusal));
                }
            }
            match self.lease_at_once(ticket.is_none(), Instant::now()) {
                Ok(lease) => return Ok(lease),
                Err(next) => refusal = next,
            }
        }
    }

    /// The line that this request stands in where it has to wait.
    fn line(&self) -> Cow<'_, str> {
        match (&self.options.worker_id, &self.request.relayed) {
            (Some(id), _) => Cow::Owned(format!("\n{id}")),
            // Not every worker of the model will do: those who want any go past.
            (None, Some(relayed)) => Cow::Owned(format!("{}\n{}", relayed.to.path(), self.request.model_id)),
            (None, None) => Cow::Borrowed(self.request.model_id.as_str()),
        }
    }

    fn select(&self, now: Instant) -> Result<Lease, Refusal> {
        self.core.router.select(&self.query(&self.left_aside()), now)
    }

    /// Whether another attempt would find nobody, not even for a fallback model.
    pub(super) fn is_nobody_left(&self, now: Instant) -> bool {
        !self.core.retry.revisit && !self.has_untried(now) && self.next_fallback().is_none()
    }

    /// Whether waiting can help: a request that everybody has failed is told so at once.
    fn may_wait(&self, now: Instant) -> bool {
        self.failed.is_empty() || self.has_untried(now)
    }

    fn has_untried(&self, now: Instant) -> bool {
        self.core.router.has_untried(&self.query(&self.left_aside()), now)
    }

    pub(super) fn left_aside(&self) -> LeftAside {
        let tried = self.failed.iter().map(|failed| failed.worker.clone()).collect();
        let unable = match &self.request.relayed {
            Some(relayed) => {
                let known = self.core.http.lacking(relayed.to, &self.request.model_id);
                self.lacking.iter().chain(known).cloned().collect()
            }
            None => Vec::new(),
        };
        LeftAside { tried, unable }
    }

    pub(super) fn query<'a>(&'a self, aside: &'a LeftAside) -> Query<'a> {
        Query {
            model_id: &self.request.model_id,
            session_id: self.session.as_deref().or(self.request.session_id.as_deref()),
            exclude: &aside.tried,
            // Workers on NATS and those of this process have no words for it.
            carrier: self.request.relayed.as_ref().map(|_| Carrier::Http),
            unable: &aside.unable,
            worker_id: self.options.worker_id.as_deref(),
            prompt: self.prompt.as_ref(),
        }
    }

    /// With nobody else left and `revisitFailedWorkers`, lets those who failed without a timeout be asked again; waits for
    /// the first of them that wants to be left alone for a while.
    async fn revisit(&mut self, refusal: &Refusal, now: Instant) -> Result<bool, ControllerError> {
        let forgivable = |failed: &Failed| failed.code != ControllerErrorCode::WorkerTimeout;
        if !self.core.retry.revisit || !matches!(refusal, Refusal::AllTried { .. }) || !self.failed.iter().any(forgivable) {
            return Ok(false);
        }
        let soonest = self.failed.iter().filter(|failed| forgivable(failed)).map(|failed| failed.hold.unwrap_or(now)).min();
        let soonest = soonest.unwrap_or(now);
        if soonest >= self.deadline.at {
            return Ok(false);
        }
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(soonest) => {}
            () = self.core.cut.fired() => return Err(not_ready(self.core.state())),
        }
        self.failed.retain(|failed| !forgivable(failed) || failed.hold.is_some_and(|hold| hold > soonest));
        Ok(true)
    }

    fn next_fallback(&self) -> Option<&String> {
        // Vectors of another model are of no use beside those of the first.
        if self.request.relayed.as_ref().is_some_and(|relayed| relayed.to == RelayedTo::Embeddings) {
            return None;
        }
        self.core.config.request_routing.fallback_models.get(&self.asked.model_id)?.get(self.fallbacks)
    }

    /// Whether somebody may be asked for the next fallback model.
    pub(super) fn can_turn_to_fallback(&self, now: Instant) -> bool {
        let aside = self.left_aside();
        let asks = |model_id| self.core.router.has_untried(&Query { model_id, ..self.query(&aside) }, now);
        self.next_fallback().is_some_and(|next| asks(next))
    }

    /// Goes on with the next fallback model, where there is one and an attempt is left.
    pub(super) fn turn_to_fallback(&mut self, code: ControllerErrorCode) -> bool {
        let turns = matches!(
            code,
            ControllerErrorCode::ModelNotFound | ControllerErrorCode::NoWorkersAvailable | ControllerErrorCode::NoHealthyWorkers
        );
        if !turns || self.options.worker_id.is_some() || self.attempts >= self.core.retry.attempts() {
            return false;
        }
        let Some(next) = self.next_fallback().cloned() else { return false };
        self.fallbacks += 1;
        let request = InferenceRequest { model_id: next, ..(*self.request).clone() };
        self.prompt = self.prompt.take().map(|_| PrefixHashes::of(&request));
        self.request = Arc::new(request);
        self.lacking.clear();
        // That one model could not be loaded says nothing about another.
        self.failed.retain(|failed| failed.code != ControllerErrorCode::ModelLoadFailed);
        true
    }
}

/// The session of a relayed request: its server keeps what went before, and may be another one than that of the chats.
pub(super) fn session(request: &InferenceRequest) -> Option<String> {
    let (relayed, session) = (request.relayed.as_ref()?, request.session_id.as_ref()?);
    Some(format!("{}\n{session}", relayed.to.path()))
}

/// What those who stand in a line want. No name of a model or worker has a line feed in it.
fn wanted(line: &str) -> Wanted<'_> {
    match line.split_once('\n') {
        Some(("", worker)) => Wanted::Worker(worker),
        Some((_, model)) => Wanted::Model(model),
        None => Wanted::Model(line),
    }
}
