//! What has to hold for each request: its metadata, its attempts, whom it asked, what it was told, and when.

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::telemetry::{Attempt, RequestMetadata, RequestStatus};
use serde_json::Value;

use crate::attempts::{self, Ending, Limits};
use crate::caller::{End, Met};
use crate::machine::Served;
use crate::plan::{Act, Leaves};
use crate::script::Post;
use crate::world::{Log, World};

/// A request, and all that is known of it.
pub struct Judged<'a> {
    world: &'a World,
    log: &'a Log,
    met: &'a Met,
    served: Vec<&'a Served>,
}

/// The metadata of what was taken on; nothing for what was refused at the door.
pub fn record(met: &Met) -> Option<&RequestMetadata> {
    let at_the_door = match &met.end {
        End::Error(error) => error.context().contains_key("field") && error.context().get("attempts").is_none(),
        _ => false,
    };
    let not_ready = |error: &ControllerError| error.code() == Code::ControllerNotReady && error.context().contains_key("state");
    let late = met.end.error().is_some_and(not_ready) && met.began == met.ended;
    met.metadata.as_ref().filter(|_| !at_the_door && !late)
}

// === impl Judged ===

impl<'a> Judged<'a> {
    pub fn new(world: &'a World, log: &'a Log, met: &'a Met) -> Self {
        let served = log.served.iter().filter(|served| served.prompt == met.call.prompt).collect();
        Self { world, log, met, served }
    }

    /// What does not hold.
    pub fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let Some(metadata) = record(self.met) else {
            if !self.served.is_empty() {
                complaints.push("it was refused at the door, and asked a worker".into());
            }
            if let Some(why) = self.door() {
                complaints.push(why);
            }
            return complaints;
        };
        complaints.extend(self.metadata(metadata));
        complaints.extend(self.attempts(metadata));
        complaints.extend(self.workers(metadata));
        complaints.extend(self.tokens());
        complaints.extend(self.end(metadata));
        complaints.extend(self.time(metadata));
        complaints
    }

    /// Whether there was a reason to refuse it at once.
    fn door(&self) -> Option<String> {
        let call = &self.met.call;
        let Some(error) = self.met.end.error() else { return Some("it has no metadata".into()) };
        let right = match error.code() {
            Code::InvalidSessionId => call.session.as_deref() == Some("\n"),
            Code::RequestValidationFailed if error.context()["field"] == "request_id" => {
                let twin = |other: &&Met| {
                    other.call.request_id == call.request_id && other.call.prompt != call.prompt && other.ended >= self.met.began
                };
                self.log.met.iter().any(|other| twin(&other))
            }
            Code::RequestValidationFailed => call.max_tokens == Some(-1),
            Code::ControllerNotReady => self.log.stopped.is_some_and(|at| at <= self.met.began),
            _ => false,
        };
        (!right).then(|| format!("it was refused at the door with {error}"))
    }

    /// What is remembered of it agrees with itself.
    fn metadata(&self, metadata: &RequestMetadata) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut check = |holds: bool, what: &str| {
            if !holds {
                complaints.push(format!("{what}: {metadata:?}"));
            }
        };
        let attempts = &metadata.attempts;
        let code = metadata.final_error.as_ref().map(|error| error.code);
        let status = match code {
            None => RequestStatus::Succeeded,
            Some(Code::Cancelled) => RequestStatus::Cancelled,
            Some(_) => RequestStatus::Failed,
        };
        check(metadata.status == status, "its status is another");
        check(metadata.retry_count as usize == attempts.len().saturating_sub(1), "its retries are miscounted");
        check(metadata.selected_worker.as_ref() == attempts.last().map(|last| &last.worker_id), "its worker is another");
        let mut failed = Vec::new();
        for attempt in attempts {
            if attempt.code.is_some_and(Code::is_workers_failure) && !failed.contains(&attempt.worker_id) {
                failed.push(attempt.worker_id.clone());
            }
        }
        check(metadata.failed_workers == failed, "its failed workers are others");
        let timeouts = attempts.iter().filter(|attempt| attempt.code == Some(Code::WorkerTimeout)).count();
        let last = attempts.last().and_then(|attempt| attempt.code);
        let own = usize::from(code == Some(Code::WorkerTimeout) && last != code);
        check(metadata.timeouts as usize == timeouts + own, "its timeouts are miscounted");
        check(metadata.circuit_breaker_trips as usize <= attempts.len(), "it opened more breakers than it made attempts");

        let duration = (self.met.ended - self.met.began) as f64;
        check(metadata.duration_ms.is_some_and(|took| took <= duration), "it took longer than it did");
        // A stream may have ended before its reader came round to it.
        let prompt = !self.met.call.streaming || self.met.call.reads == 0;
        check(!prompt || metadata.duration_ms == Some(duration), "its duration is another");
        let end_time = metadata.duration_ms.map(|took| metadata.start_time + took as u64);
        check(metadata.end_time == end_time, "its end is another");
        let first = metadata.time_to_first_token_ms;
        check(first.is_none_or(|first| Some(first) <= metadata.duration_ms), "its first token came after its end");
        let mut at = metadata.start_time as f64;
        for attempt in attempts {
            check(attempt.started_ms as f64 >= at, "its attempts overlap");
            let took = attempt.duration_ms.unwrap_or(-1.0);
            check(took >= 0.0, "one of its attempts never ended");
            at = attempt.started_ms as f64 + took;
        }
        check(metadata.end_time.is_some_and(|end| at <= end as f64), "its last attempt ended after it");
        complaints
    }

    /// Every attempt ended as what its worker said makes it end.
    fn attempts(&self, metadata: &RequestMetadata) -> Vec<String> {
        let mut complaints = Vec::new();
        let attempts = &metadata.attempts;
        for (number, attempt) in (1..).zip(attempts) {
            let started = self.met.began + (attempt.started_ms - metadata.start_time);
            let ended = started + attempt.duration_ms.unwrap_or(0.0) as u64;
            let served = self.served.iter().find(|served| served.attempt == number);
            if let Some(served) = served {
                let is_its = served.worker == attempt.worker_id.as_str() && served.streaming == self.met.call.streaming;
                let left = Limits::new(&self.world.plan.config, self.met, started).left(started);
                let knows = served.timeout.as_millis() == u128::from(left) || self.loads(&served.worker);
                if !is_its || !knows || served.at < started {
                    complaints
                        .push(format!("attempt {number}, with {left} ms left, was meant for another: {attempt:?} {served:?}"));
                }
            }
            let is_last = number as usize == attempts.len();
            let why = self.ending(attempt, (attempt.code, ended), started, served.copied(), is_last);
            complaints.extend(why.map(|why| format!("attempt {number}: {why}: {attempt:?} of {served:?}")));
            if !is_last && !self.may_be_retried(attempt.code, served.copied()) {
                complaints.push(format!("attempt {number} was retried: {attempt:?}"));
            }
        }
        let unknown = self.served.iter().filter(|served| served.attempt as usize > attempts.len());
        complaints.extend(unknown.map(|served| format!("an attempt that nobody knows: {served:?}")));
        complaints
    }

    fn ending(&self, attempt: &Attempt, ending: Ending, started: u64, served: Option<&Served>, is_last: bool) -> Option<String> {
        let config = &self.world.plan.config;
        let mut limits = Limits::new(config, self.met, started);
        let loads = self.loads(attempt.worker_id.as_str());
        if loads {
            limits = limits.prolonged(config.request_routing.model_load_timeout_ms);
        }
        let posts = served.map_or(&[][..], |served| &served.posts);
        let posts = if served.is_some_and(|served| served.stale) { &[] } else { posts };
        let mut allowed = attempts::endings(&limits, posts);
        if served.is_none() {
            // Nobody was there, or left before it was read.
            allowed.push((Some(Code::WorkerUnavailable), started));
            if self.went(attempt.worker_id.as_str(), ending.1) {
                allowed.push((Some(Code::WorkerUnavailable), ending.1));
            }
        }
        let is_slow = self.met.call.streaming && self.met.call.reads > 0 && !self.met.tokens.is_empty();
        if is_slow {
            // What has come by the time that the reader comes round to it counts before any limit.
            allowed.extend(attempts::endings(&Limits::none(), posts));
        }
        let latest = allowed.iter().map(|(_, at)| *at).max().unwrap_or(started);
        let (code, at) = ending;
        let right = match code {
            Some(Code::WorkerOffline) => self.went(attempt.worker_id.as_str(), at) && (at <= latest || is_slow),
            Some(Code::ControllerNotReady) => {
                self.log.stopped.is_some_and(|stopped| stopped <= at) && (at <= latest || is_slow) && is_last
            }
            Some(Code::Cancelled) => is_last && matches!(self.met.end, End::Left | End::GaveUp(_)) && at == self.met.ended,
            Some(Code::WorkerTimeout) if loads || is_slow => true,
            code if is_slow => allowed.iter().any(|(allowed, since)| *allowed == code && at >= *since),
            _ => allowed.contains(&ending),
        };
        (!right).then(|| format!("it may end as {allowed:?}"))
    }

    fn loads(&self, worker: &str) -> bool {
        let machine = self.world.plan.machines.iter().find(|machine| machine.id == worker);
        machine.is_some_and(|machine| machine.acts.iter().any(|(_, act)| matches!(act, Act::Load(_))))
    }

    /// Whether a worker went away at that moment.
    fn went(&self, worker: &str, at: u64) -> bool {
        let goes = ["worker_offline", "worker_removed", "worker_replaced"];
        let slow = if self.met.call.reads > 0 { u64::MAX } else { 0 };
        self.log.events.iter().any(|(when, event)| {
            goes.contains(&event.kind) && event.worker_id.as_deref() == Some(worker) && *when <= at && at - *when <= slow
        })
    }

    fn may_be_retried(&self, code: Option<Code>, served: Option<&Served>) -> bool {
        let retry = &self.world.plan.config.request_routing.retry;
        let forbidden = served.is_some_and(attempts::forbids_retry) || self.met.call.worker.is_some();
        // A worker that does not serve the model any more leads to another model.
        let falls_back = !self.world.plan.config.request_routing.fallback_models.is_empty();
        let turns = code == Some(Code::ModelNotFound) && falls_back;
        retry.enabled && code.is_some_and(|code| retry.retry_on_errors.contains(&code) || turns) && !forbidden
    }

    /// Nobody is asked twice, and no more are asked than allowed.
    fn workers(&self, metadata: &RequestMetadata) -> Vec<String> {
        let mut complaints = Vec::new();
        let routing = &self.world.plan.config.request_routing;
        let most = if routing.retry.enabled { 1 + routing.retry.max_retries } else { 1 };
        if metadata.attempts.len() > most as usize {
            complaints.push(format!("{} attempts, and {most} allowed", metadata.attempts.len()));
        }
        for (place, attempt) in metadata.attempts.iter().enumerate() {
            let before = metadata.attempts[..place].iter().rev().find(|before| before.worker_id == attempt.worker_id);
            let Some(before) = before else { continue };
            let revisits = routing.retry.revisit_failed_workers && before.code != Some(Code::WorkerTimeout);
            let falls_back = !routing.fallback_models.is_empty() && before.code == Some(Code::ModelLoadFailed);
            if !revisits && !falls_back {
                complaints.push(format!("{} was asked again: {metadata:?}", attempt.worker_id));
            }
        }
        if let Some(worker) = &self.met.call.worker
            && metadata.attempts.iter().any(|attempt| attempt.worker_id.as_str() != worker)
        {
            complaints.push(format!("another than {worker} was asked"));
        }
        // Whoever was left while it still worked was told so.
        for served in &self.served {
            let attempt = metadata.attempts.get(served.attempt as usize - 1);
            let succeeded = attempt.is_some_and(|attempt| attempt.code.is_none());
            let ended =
                |post: &Post| matches!(post, Post::Done(_) | Post::Response(_) | Post::Error { .. } | Post::NobodyListens);
            let over = served.posts.iter().any(|posted| posted.taken && ended(&posted.post));
            if succeeded && served.cancelled.is_some() {
                complaints.push(format!("a worker that had answered was told to stop: {served:?}"));
            }
            if !over && served.cancelled.is_none() && self.hears(served) {
                complaints.push(format!("a worker that was left was not told to stop: {served:?}"));
            }
        }
        complaints
    }

    /// Whether its worker was there to be told something until the end.
    fn hears(&self, served: &Served) -> bool {
        let machine = self.world.plan.machines.iter().find(|machine| machine.id == served.worker);
        machine.is_some_and(|machine| {
            let leaves = machine.acts.iter().any(|(_, act)| matches!(act, Act::Leave { .. }));
            let mut until_now = machine.acts.iter().rev().filter(|(at, _)| *at <= self.world.now());
            let sleeps = until_now.find(|(_, act)| matches!(act, Act::Freeze | Act::Wake));
            let sleeps = sleeps.is_some_and(|(_, act)| *act == Act::Freeze);
            !sleeps && (machine.distant || !leaves) && self.log.stopped.is_none()
        })
    }

    /// What was delivered is without gaps, and what one worker said.
    fn tokens(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let tokens = &self.met.tokens;
        let mut expected = 0;
        for token in tokens {
            if token.index != expected {
                complaints.push(format!("token {} came in place of {expected}", token.index));
            }
            expected = token.index + token.width();
        }
        let last = self.served.iter().max_by_key(|served| served.attempt);
        let (said, places, count) = last.map_or_else(Default::default, |served| attempts::said(served));
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        if !said.starts_with(&text) {
            complaints.push(format!("it was told {text:?}, and {last:?} said {said:?}"));
        }
        if let End::Answer(answer) = &self.met.end {
            let whole = answer.text == said && *answer.model_id == *last.map_or("", |served| &served.model);
            if !whole || last.is_none_or(|served| served.worker != answer.worker_id.as_str()) {
                complaints.push(format!("its answer is {:?} by {}, and {last:?} said {said:?}", answer.text, answer.worker_id));
            }
            if self.met.call.streaming && (text != answer.text || expected != places) {
                complaints.push(format!("its stream said {text:?}, and its answer {:?}", answer.text));
            }
            if self.met.metadata.as_ref() != Some(&*answer.metadata) {
                complaints.push(format!("its metadata changed after its end: {:?}", answer.metadata));
            }
            if self.met.call.streaming && answer.metadata.tokens != count {
                complaints.push(format!("{count} tokens were counted as {}", answer.metadata.tokens));
            }
        }
        complaints
    }

    /// It ended as the contract says, given its attempts.
    fn end(&self, metadata: &RequestMetadata) -> Vec<String> {
        let mut complaints = Vec::new();
        let last = metadata.attempts.last();
        let told = metadata.final_error.as_ref().map(|error| error.code);
        match &self.met.end {
            End::Answer(_) => {
                if last.is_none_or(|last| last.code.is_some()) || told.is_some() {
                    complaints.push(format!("it succeeded without an attempt that did: {metadata:?}"));
                }
            }
            End::Left => {
                let leaves = !matches!(self.met.call.leaves, Leaves::Never);
                // A stream may have come to its end before its reader left.
                if !leaves || !self.met.call.streaming && told != Some(Code::Cancelled) {
                    complaints.push(format!("it left, and is remembered otherwise: {metadata:?}"));
                }
            }
            End::GaveUp(error) | End::Error(error) => {
                if told != Some(error.code()) {
                    complaints.push(format!("it met {error}, and something else is remembered: {metadata:?}"));
                }
                complaints.extend(self.context(metadata, error));
                if matches!(self.met.end, End::Error(_))
                    && let Some(why) = self.reason(metadata, error)
                {
                    complaints.push(format!("{why}: {error} {:?} {metadata:?}", error.context()));
                }
            }
        }
        complaints
    }

    /// Errors carry what the contract says.
    fn context(&self, metadata: &RequestMetadata, error: &ControllerError) -> Vec<String> {
        let context = error.context();
        let mut complaints = Vec::new();
        let mut check = |holds: bool, what: &str| {
            if !holds {
                complaints.push(format!("{what}: {error} {context:?}"));
            }
        };
        check(context.get("requestId").and_then(Value::as_str) == Some(&self.met.call.request_id), "its error names another");
        check(context.contains_key("modelId"), "its error names no model");
        let failed = metadata.attempts.iter().filter(|attempt| attempt.code.is_some_and(|code| code != Code::Cancelled));
        let told = context.get("attempts").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let told = told.iter().map(|attempt| (attempt["workerId"].as_str(), attempt["code"].as_str()));
        check(
            told.eq(failed.map(|attempt| (Some(attempt.worker_id.as_str()), attempt.code.map(Code::as_str)))),
            "its attempts are others",
        );
        let has = |keys: &[&str]| keys.iter().all(|key| context.contains_key(*key));
        match error.code() {
            Code::WorkerTimeout => check(has(&["limit"]), "a timeout without a limit"),
            Code::QueueFull => check(has(&["retryAfterMs", "waiting", "maxQueue"]), "a full queue without numbers"),
            Code::NoHealthyWorkers | Code::CircuitBreakerOpen => {
                check(error.retry_after_ms() >= Some(1), "an open breaker without a time");
            }
            Code::NoWorkersAvailable => {
                check(has(&["totalWorkers", "healthyWorkers", "excludedWorkers"]), "nobody there without numbers");
            }
            Code::StreamInterrupted if matches!(self.met.end, End::Error(_)) => check(has(&["cause", "workerId"]), "no cause"),
            _ => {}
        }
        complaints
    }

    /// Why an error is not the one that the contract asks for.
    fn reason(&self, metadata: &RequestMetadata, error: &ControllerError) -> Option<&'static str> {
        let routing = &self.world.plan.config.request_routing;
        let retry = &routing.retry;
        let (code, named) = (error.code(), self.met.call.worker.is_some());
        let cause = error.cause().map(ControllerError::code);
        let fleet = &self.met.fleet;
        if code == Code::ControllerNotReady {
            let stopped = self.log.stopped.is_some_and(|at| at <= self.met.ended);
            return (!stopped).then_some("the controller was not told to stop");
        }
        let delivered = !self.met.tokens.is_empty();
        if (code == Code::StreamInterrupted) != delivered {
            return Some("whether it broke after tokens is told wrongly");
        }
        let falls_back = !routing.fallback_models.is_empty();
        let Some(last) = metadata.attempts.last() else {
            let right = match code {
                Code::NoWorkersAvailable => fleet.online == 0 && !named,
                Code::ModelNotFound => named || fleet.online > 0 && fleet.serving == 0,
                Code::NoHealthyWorkers => fleet.serving > 0 && fleet.closed == 0 && !named,
                Code::QueueFull => true,
                Code::WorkerOffline | Code::CircuitBreakerOpen => named,
                _ => false,
            };
            return (!right).then_some("nobody was asked");
        };
        let Some(met) = last.code else { return Some("its last attempt succeeded") };
        let served = self.served.iter().find(|served| served.attempt as usize == metadata.attempts.len()).copied();
        let retryable = self.may_be_retried(Some(met), served);
        let most = if retry.enabled { 1 + retry.max_retries } else { 1 };
        // A worker may notice a little before the controller does.
        let (made, over) = (metadata.attempts.len(), self.met.ended + 5 >= attempts::deadline(&self.world.plan.config, self.met));
        let count = |key: &str| error.context().get(key).and_then(Value::as_u64).unwrap_or(u64::MAX);
        let right = match code {
            Code::StreamInterrupted => cause == Some(met),
            Code::AllRetriesExhausted => retryable && made == most as usize && most > 1 && cause == Some(met),
            Code::NoWorkersAvailable => {
                let excluded = count("excludedWorkers");
                let counted = count("healthyWorkers") <= count("totalWorkers") && excluded <= made as u64 && excluded > 0;
                retryable && made < most as usize && cause == Some(met) && (counted || falls_back)
            }
            Code::QueueFull => retryable && made < most as usize && cause == Some(met),
            // No time for another attempt, or none left for this one.
            Code::WorkerTimeout if cause.is_some() => retryable && cause == Some(met),
            code if code == met => {
                let budget = error.context().contains_key("retryBudgetExhausted");
                !retryable || met == Code::ModelNotFound || most == 1 || budget || over
            }
            _ => false,
        };
        (!right).then_some("its attempts do not lead to this")
    }

    /// Nobody waits past the deadline.
    fn time(&self, metadata: &RequestMetadata) -> Option<String> {
        let routing = &self.world.plan.config.request_routing;
        let loads = self.world.plan.machines.iter().any(|machine| self.loads(&machine.id));
        let extra = if loads { routing.model_load_timeout_ms * (1 + metadata.attempts.len() as u64) } else { 0 };
        let latest = attempts::deadline(&self.world.plan.config, self.met) + extra;
        let is_late = self.met.ended > latest && !(self.met.call.streaming && self.met.call.reads > 0);
        is_late.then(|| format!("it ended at {}, and had until {latest}: {metadata:?}", self.met.ended))
    }
}
