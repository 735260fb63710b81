//! The worker that all sides share: it answers at once, with as little work as the protocol allows.
//!
//! Streams advance as in an engine that works in batches: a step gives every running stream one token.

use std::borrow::Cow;
use std::error::Error;
use std::io::Read;
use std::time::Duration;

use async_nats::{Client, Message, Subject};
use bytes::Bytes;
use futures_util::StreamExt;
use mlx_serving_router::wire::{
    Capacity, Finish, FinishReason, Heartbeat, HeartbeatMetrics, PROTOCOL, Registration, Reply, Skills, Token, Usage, WorkerId,
    WorkerStatus, subject,
};
use serde::Deserialize;

use crate::load::say;
use crate::setup::Setup;

pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// Far more than any side has at a time, so that nobody is refused or queued.
const MAX_CONCURRENT: u32 = 4096;
const INCARNATION: &str = "bench";

/// What it reads of a request.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Question<'a> {
    #[serde(borrow)]
    request_id: Cow<'a, str>,
    #[serde(default)]
    stream: bool,
}

/// A message that was encoded beforehand, but for the request's id.
struct Template {
    before: Vec<u8>,
    after: Vec<u8>,
}

/// A stream on its way.
struct Running {
    request_id: String,
    reply: Subject,
    /// The message that comes next.
    next: usize,
}

struct Worker {
    client: Client,
    accepted: Template,
    response: Template,
    /// The tokens, then `done`.
    stream: Vec<Template>,
    running: Vec<Running>,
}

/// Serves until standard input ends.
pub async fn run(setup: Setup) -> Result<(), Box<dyn Error>> {
    let client = async_nats::ConnectOptions::new().subscription_capacity(65_536).connect(&setup.url).await?;
    let id = WorkerId::new(&setup.worker)?;
    let registration = serde_json::to_vec(&registration(&setup, id.clone())).map(Bytes::from)?;
    let mut requests = client.subscribe(subject::inference("", &id)).await?;
    let mut hello = client.subscribe(subject::controller_hello("")).await?;
    let mut again = client.subscribe(subject::reregister("", &id)).await?;
    client.publish(subject::register(""), registration.clone()).await?;
    client.flush().await?;
    let mut end = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let mut heartbeats = tokio::time::interval(HEARTBEAT_INTERVAL);
    let mut sequence = 0;
    let mut worker = Worker::new(&setup, client);
    say(&serde_json::json!({"ready": true}))?;
    loop {
        tokio::select! {
            biased;
            Some(message) = requests.next() => worker.take(&message).await?,
            Some(_) = hello.next() => worker.client.publish(subject::register(""), registration.clone()).await?,
            Some(_) = again.next() => worker.client.publish(subject::register(""), registration.clone()).await?,
            _ = heartbeats.tick() => {
                sequence += 1;
                let running = worker.running.iter().map(|stream| stream.request_id.clone()).collect();
                let beat = serde_json::to_vec(&heartbeat(&setup, id.clone(), sequence, running))?;
                worker.client.publish(subject::heartbeat(""), beat.into()).await?;
            }
            _ = &mut end => return Ok(()),
            () = std::future::ready(()), if !worker.running.is_empty() => worker.step().await?,
        }
    }
}

/// What says who the worker is.
pub fn registration(setup: &Setup, worker_id: WorkerId) -> Registration {
    Registration {
        protocol: Some(PROTOCOL),
        worker_id,
        incarnation: INCARNATION.to_owned(),
        hostname: "localhost".to_owned(),
        ip: "127.0.0.1".to_owned(),
        port: 0,
        skills: Skills { available_models: vec![setup.model.clone()], ..Skills::default() },
        capacity: Capacity { max_concurrent: MAX_CONCURRENT, max_queue: 0, memory_gb: 1.0 },
        features: Vec::new(),
        status: WorkerStatus::Online,
        timestamp: 0,
    }
}

/// A sign of life, with the names of the streams on their way.
pub fn heartbeat(setup: &Setup, worker_id: WorkerId, sequence: u64, running: Vec<String>) -> Heartbeat {
    Heartbeat {
        worker_id,
        incarnation: INCARNATION.to_owned(),
        sequence,
        status: WorkerStatus::Online,
        timestamp: 0,
        metrics: HeartbeatMetrics { models_loaded: vec![setup.model.clone()], ..HeartbeatMetrics::default() },
        queue_depth: 0,
        active_request_ids: Some(running),
        tokens_generated: 0,
        phase: mlx_serving_router::wire::Phase::Ready,
        loading_models: Vec::new(),
        cached_prefixes: Vec::new(),
    }
}

// === impl Worker ===

impl Worker {
    fn new(setup: &Setup, client: Client) -> Self {
        let finish = Finish {
            reason: FinishReason::Length,
            usage: Usage { prompt_tokens: 32, completion_tokens: setup.tokens, cached_tokens: 0 },
            tool_calls: None,
            latency_ms: 1.0,
        };
        let token = |index: u64| {
            let id = u32::try_from(index).unwrap_or(0) + 1000;
            Template::new(&Reply::Token(Token { text: " token".to_owned(), index, token_ids: vec![id].into(), logprobs: None }))
        };
        let done = Template::new(&Reply::Done(finish.clone()));
        Self {
            client,
            accepted: Template::new(&Reply::Accepted { queue_position: 0 }),
            response: Template::new(&Reply::Response { text: setup.answer.clone(), finish, logprobs: None }),
            stream: (0..setup.tokens).map(token).chain([done]).collect(),
            running: Vec::new(),
        }
    }

    async fn take(&mut self, message: &Message) -> Result<(), Box<dyn Error>> {
        let Some(reply) = message.reply.clone() else { return Ok(()) };
        let question: Question<'_> = serde_json::from_slice(&message.payload)?;
        let id = question.request_id;
        self.client.publish(reply.clone(), self.accepted.of(&id)).await?;
        if question.stream {
            self.running.push(Running { request_id: id.into_owned(), reply, next: 0 });
        } else {
            self.client.publish(reply, self.response.of(&id)).await?;
        }
        Ok(())
    }

    /// One message for every running stream; then the connection has its turn, so that each token goes out by itself.
    async fn step(&mut self) -> Result<(), Box<dyn Error>> {
        for stream in &mut self.running {
            if let Some(template) = self.stream.get(stream.next) {
                self.client.publish(stream.reply.clone(), template.of(&stream.request_id)).await?;
            }
            stream.next += 1;
        }
        self.running.retain(|stream| stream.next < self.stream.len());
        tokio::task::yield_now().await;
        Ok(())
    }
}

// === impl Template ===

impl Template {
    fn new(reply: &Reply) -> Self {
        const ID: &str = "\u{2022}";
        let encoded = reply.encode(ID);
        let at = encoded.windows(ID.len()).position(|window| window == ID.as_bytes()).unwrap_or(encoded.len());
        let after = encoded.get(at + ID.len()..).unwrap_or_default().to_vec();
        Self { before: encoded.get(..at).unwrap_or_default().to_vec(), after }
    }

    fn of(&self, request_id: &str) -> Bytes {
        [&self.before, request_id.as_bytes(), &self.after].concat().into()
    }
}
