//! A simulated caller: it asks, reads or waits, perhaps goes away, and notes what it met and how things stood at that moment.

use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::dispatch::{Answer, CallOptions, TokenStream};
use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::routing::CircuitState;
use mlx_serving_router::telemetry::RequestMetadata;
use mlx_serving_router::transport::Postbox;
use mlx_serving_router::wire::{InferenceRequest, Token};
use tokio::time::sleep;

use crate::plan::{CallPlan, Leaves};
use crate::world::World;

/// What a caller met.
#[derive(Debug)]
pub struct Met {
    pub call: CallPlan,
    pub began: u64,
    pub ended: u64,
    pub tokens: Vec<Token>,
    pub end: End,
    /// What was known of the request when it ended.
    pub metadata: Option<RequestMetadata>,
    /// How the fleet stood at that moment.
    pub fleet: Fleet,
}

#[derive(Debug)]
pub enum End {
    Answer(Answer),
    Error(ControllerError),
    /// It went away.
    Left,
    /// It ended its stream itself.
    GaveUp(ControllerError),
}

#[derive(Debug)]
pub struct Fleet {
    pub online: usize,
    /// Online workers that serve the model, and those of them that are admitted.
    pub serving: usize,
    pub closed: usize,
}

/// What a reader says that ends its stream.
const GAVE_UP: &str = "its reader gave up";

pub async fn call(world: Arc<World>, call: CallPlan) {
    tokio::time::sleep_until(world.at(call.at)).await;
    let began = world.now();
    world.note(|| format!("{} begins: {call:?}", call.request_id));
    world.log.lock().under_way += 1;
    let mut tokens = Vec::new();
    let end = match call.leaves {
        Leaves::After(span) => {
            let asking = ask(&world, &call, &mut tokens);
            tokio::select! {
                biased;
                end = asking => end,
                () = sleep(Duration::from_millis(span)) => End::Left,
            }
        }
        _ => ask(&world, &call, &mut tokens).await,
    };
    // Nothing else has run since the caller saw the end: what it held has to be free by now.
    world.log.lock().under_way -= 1;
    let met = look(&world, call, began, tokens, end);
    world.note(|| format!("{} ends: {}", met.call.request_id, met.end.in_short()));
    world.log.lock().met.push(met);
}

async fn ask(world: &World, call: &CallPlan, tokens: &mut Vec<Token>) -> End {
    let request = InferenceRequest {
        request_id: call.request_id.clone(),
        model_id: call.model.into(),
        prompt: Some(call.prompt.clone()),
        max_tokens: call.max_tokens,
        session_id: call.session.clone(),
        priority: call.priority,
        ..InferenceRequest::default()
    };
    let options =
        CallOptions { timeout: call.timeout.map(Duration::from_millis), worker_id: call.worker.clone(), traceparent: None };
    if !call.streaming {
        return match world.controller.buffered(request, options).await {
            Ok(answer) => End::Answer(answer),
            Err(error) => End::Error(error),
        };
    }
    match world.controller.streaming(request, options).await {
        Ok(stream) => read(stream, call, tokens).await,
        Err(error) => End::Error(error),
    }
}

async fn read(mut stream: TokenStream, call: &CallPlan, tokens: &mut Vec<Token>) -> End {
    loop {
        match call.leaves {
            Leaves::AfterTokens(count) if tokens.len() >= count => return End::Left,
            Leaves::GivesUpAfterTokens(count) if tokens.len() >= count => {
                stream.abandon(ControllerError::new(Code::StreamInterrupted, GAVE_UP));
            }
            _ => {}
        }
        match stream.next_batch().await {
            Ok(batch) if batch.is_empty() => return stream.response().cloned().map_or(End::Left, End::Answer),
            Ok(batch) => tokens.extend(batch),
            Err(error) if error.message() == GAVE_UP => return End::GaveUp(error),
            Err(error) => return End::Error(error),
        }
        if call.reads > 0 {
            sleep(Duration::from_millis(call.reads)).await;
        }
    }
}

/// How things stand at the moment that a caller sees its end.
fn look(world: &World, call: CallPlan, began: u64, tokens: Vec<Token>, end: End) -> Met {
    let metadata = world.controller.request_metrics(&call.request_id);
    let status = world.controller.cluster_status().requests;
    let workers = world.controller.workers();
    let model = match &end {
        End::Error(error) => error.context().get("modelId").and_then(|model| model.as_str()).unwrap_or(call.model),
        _ => call.model,
    };
    let online = |worker: &&mlx_serving_router::routing::WorkerSnapshot| {
        matches!(worker.status.as_str(), "online" | "degraded") && worker.models.iter().any(|served| served == model)
    };
    let closed = |worker: &&mlx_serving_router::routing::WorkerSnapshot| {
        matches!(worker.breaker, CircuitState::Closed | CircuitState::Disabled)
    };
    let fleet = Fleet {
        online: world.controller.router().online(),
        serving: world.controller.router().serving(model),
        closed: workers.iter().filter(online).filter(closed).count(),
    };
    let mut log = world.log.lock();
    let in_flight: usize = workers.iter().map(|worker| worker.in_flight as usize).sum();
    let (under_way, now) = (log.under_way, world.now());
    if status.active > under_way || in_flight > under_way || status.queued > status.active {
        let what = format!("at {now}: {status:?} and {in_flight} in flight, with {under_way} calls under way");
        log.complaints.push(what);
    }
    let held = |postbox: &Option<Postbox>| postbox.as_ref().is_some_and(|postbox| !postbox.is_closed());
    let held = log.served.iter().filter(|served| served.prompt == call.prompt && held(&served.postbox)).count();
    if held > 0 {
        log.complaints.push(format!("{} ended at {now} and still holds {held} mailboxes", call.request_id));
    }
    drop(log);
    Met { call, began, ended: now, tokens, end, metadata, fleet }
}

// === impl Met ===

impl Met {
    /// The code that it ended with.
    pub fn code(&self) -> Option<Code> {
        match &self.end {
            End::Answer(_) => None,
            End::Error(error) | End::GaveUp(error) => Some(error.code()),
            End::Left => Some(Code::Cancelled),
        }
    }
}

// === impl End ===

impl End {
    pub fn in_short(&self) -> String {
        match self {
            Self::Answer(answer) => format!("{:?} of {}", answer.text, answer.worker_id),
            Self::Error(error) => format!("{error} {:?}", error.context()),
            Self::Left => "it left".into(),
            Self::GaveUp(error) => format!("it gave up: {error}"),
        }
    }

    pub fn error(&self) -> Option<&ControllerError> {
        match self {
            Self::Error(error) | Self::GaveUp(error) => Some(error),
            Self::Answer(_) | Self::Left => None,
        }
    }
}
