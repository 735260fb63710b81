//! Whole controllers over the in-process transport, in paused time, with workers that do what a script says.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod admission;
mod failures;
mod faults;
mod faults_bounds;
mod faults_breakers;
mod faults_ends;
mod faults_found;
mod faults_load;
mod lifecycle;
mod older;
mod success;
mod timeouts;

use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{Answer, CallOptions, Controller, TokenStream};
use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::transport::{Delivery, LocalMessage, Postbox};
use mlx_serving_router::wire::{
    ANSWER_MOST, Capacity, Finish, FinishReason, InferenceRequest, Json, PROTOCOL, Registration, Reply, Skills, Token, Usage,
    WorkerId, WorkerStatus,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

/// What a worker does, one after the other.
#[derive(Clone, Debug)]
enum Act {
    Accept,
    /// The next token.
    Say(&'static str),
    Done,
    Respond(&'static str),
    Fail(&'static str),
    /// Refuses, and says when to come back.
    Refuse(i64),
    Wait(u64),
    /// Nothing more, ever.
    Stall,
    Post(Reply),
    NobodyListens,
    /// Leaves the process, with all its requests.
    Leave,
}

use Act::{Accept, Done, Fail, Leave, NobodyListens, Post, Refuse, Respond, Say, Stall, Wait};

/// A worker that does what its script says, and remembers what it was asked.
struct Scripted {
    id: WorkerId,
    asked: Arc<Mutex<Vec<Asked>>>,
    cancelled: watch::Receiver<usize>,
    script: Arc<Mutex<Vec<Act>>>,
}

#[derive(Clone, Debug)]
struct Asked {
    request: Arc<InferenceRequest>,
    attempt: u32,
    timeout: Duration,
}

impl Scripted {
    fn asked(&self) -> usize {
        self.asked.lock().len()
    }

    fn last(&self) -> Asked {
        self.asked.lock().last().unwrap().clone()
    }

    fn now_does(&self, script: &[Act]) {
        *self.script.lock() = script.to_vec();
    }

    /// Returns when so many cancellations have come.
    async fn cancelled(&self, count: usize) {
        self.cancelled.clone().wait_for(|cancelled| *cancelled >= count).await.unwrap();
    }

    fn cancellations(&self) -> usize {
        *self.cancelled.borrow()
    }
}

fn registration(id: &str, models: &[&str], max_concurrent: u32) -> Registration {
    Registration {
        protocol: Some(PROTOCOL),
        worker_id: WorkerId::new(id).unwrap(),
        incarnation: format!("{id}-1"),
        hostname: String::new(),
        ip: String::new(),
        port: 0,
        skills: Skills { available_models: models.iter().map(ToString::to_string).collect(), ..Skills::default() },
        capacity: Capacity { max_concurrent, ..Capacity::default() },
        features: Vec::new(),
        status: WorkerStatus::Online,
        timestamp: 0,
    }
}

/// A worker for the model `m`.
fn worker(controller: &Controller, id: &str, script: &[Act]) -> Scripted {
    worker_for(controller, &registration(id, &["m"], 0), script)
}

fn worker_for(controller: &Controller, registration: &Registration, script: &[Act]) -> Scripted {
    let mut port = controller.attach_local(registration).unwrap();
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let script = Arc::new(Mutex::new(script.to_vec()));
    let (cancellations, cancelled) = watch::channel(0);
    let (noted, acts) = (asked.clone(), script.clone());
    tokio::spawn(async move {
        let (leave, mut leaving) = tokio::sync::mpsc::channel::<()>(1);
        loop {
            let message = tokio::select! {
                message = port.recv() => message,
                _ = leaving.recv() => return,
            };
            match message {
                Some(LocalMessage::Request { request, attempt, timeout, postbox, .. }) => {
                    noted.lock().push(Asked { request, attempt, timeout });
                    tokio::spawn(perform(acts.lock().clone(), postbox, leave.clone()));
                }
                Some(LocalMessage::Cancel { .. }) => cancellations.send_modify(|count| *count += 1),
                None => return,
            }
        }
    });
    Scripted { id: registration.worker_id.clone(), asked, cancelled, script }
}

async fn perform(script: Vec<Act>, postbox: Postbox, leave: tokio::sync::mpsc::Sender<()>) {
    let mut index = 0;
    for act in script {
        let error =
            |code: &str, after| Reply::Error { message: "as told".into(), code: Some(code.into()), retry_after_ms: after };
        let reply = match act {
            Accept => Reply::Accepted { queue_position: 0 },
            Say(text) => {
                index += 1;
                Reply::Token(Token { text: text.into(), index: index - 1, token_ids: vec![7].into(), logprobs: None })
            }
            Done => Reply::Done(finish(index)),
            Respond(text) => Reply::Response { text: text.into(), finish: finish(3), logprobs: None },
            Fail(code) => error(code, None),
            Refuse(after) => error("WORKER_OVERLOADED", Some(after)),
            Wait(ms) => {
                sleep(Duration::from_millis(ms)).await;
                continue;
            }
            Post(reply) => reply,
            NobodyListens => {
                let error = ControllerError::new(Code::WorkerUnavailable, "nobody listens").with("noResponders", true);
                postbox.post(Delivery::Failed(error));
                continue;
            }
            Stall => std::future::pending().await,
            Leave => {
                let _ = leave.send(()).await;
                continue;
            }
        };
        postbox.post(Delivery::Reply(reply));
    }
}

fn finish(tokens: u64) -> Finish {
    Finish {
        reason: FinishReason::Stop,
        usage: Usage { prompt_tokens: 2, completion_tokens: tokens, cached_tokens: 0 },
        tool_calls: None,
        latency_ms: 1.0,
    }
}

/// A started controller without NATS.
async fn controller(routing: Value) -> Controller {
    let config = json!({"nats": {"mode": "none"}, "requestRouting": routing});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    controller
}

fn request() -> InferenceRequest {
    InferenceRequest { model_id: "m".into(), prompt: Some("Hello".into()), ..InferenceRequest::default() }
}

fn named(id: &str) -> InferenceRequest {
    InferenceRequest { request_id: id.into(), ..request() }
}

async fn buffered(controller: &Controller) -> Result<Answer, ControllerError> {
    controller.buffered(named("r"), CallOptions::default()).await
}

async fn streaming(controller: &Controller) -> Result<TokenStream, ControllerError> {
    controller.streaming(named("r"), CallOptions::default()).await
}

/// A stream to its end.
async fn read(stream: &mut TokenStream) -> Result<String, ControllerError> {
    let mut text = String::new();
    loop {
        let batch = stream.next_batch().await?;
        if batch.is_empty() {
            return Ok(text);
        }
        batch.iter().for_each(|token| text.push_str(&token.text));
    }
}

/// Nothing is held any more.
fn assert_at_rest(controller: &Controller) {
    let status = controller.cluster_status();
    assert_eq!((status.requests.active, status.requests.queued), (0, 0));
    for worker in controller.workers() {
        assert_eq!(worker.in_flight, 0, "{}", worker.worker_id);
    }
}

fn limit(error: &ControllerError) -> &str {
    error.context()["limit"].as_str().unwrap()
}
