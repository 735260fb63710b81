//! A worker whose streams are paced: the first token at once, each further one an interval later, by a clock that does not
//! drift. A token's text is when it was sent, in nanoseconds since the epoch.

use std::collections::VecDeque;
use std::error::Error;
use std::io::Read;
use std::time::{Duration, SystemTime};

use async_nats::{Client, Message, Subject};
use futures_util::StreamExt;
use mlx_serving_router::wire::{Cancel, Finish, FinishReason, InferenceRequest, Reply, Token, Usage, WorkerId, subject};
use tokio::time::{Instant, MissedTickBehavior};

use crate::load::say;
use crate::setup::Setup;
use crate::worker;

/// How often is looked at whose token is due.
const TICK: Duration = Duration::from_millis(1);

/// A stream on its way.
struct Running {
    request_id: String,
    reply: Subject,
    index: u64,
    due: Instant,
}

struct Worker {
    client: Client,
    interval: Duration,
    tokens: u64,
    /// In the order in which they are due: all have the same interval.
    running: VecDeque<Running>,
}

/// Serves until standard input ends.
pub async fn run(setup: Setup) -> Result<(), Box<dyn Error>> {
    let client = async_nats::ConnectOptions::new().subscription_capacity(65_536).connect(&setup.url).await?;
    let id = WorkerId::new(&setup.worker)?;
    let registration = serde_json::to_vec(&worker::registration(&setup, id.clone()))?;
    let mut requests = client.subscribe(subject::inference("", &id)).await?;
    let mut cancels = client.subscribe(subject::cancel("", &id)).await?;
    let mut hello = client.subscribe(subject::controller_hello("")).await?;
    let mut end = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let mut heartbeats = tokio::time::interval(worker::HEARTBEAT_INTERVAL);
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut sequence = 0;
    client.publish(subject::register(""), registration.clone().into()).await?;
    client.flush().await?;
    let interval = Duration::from_millis(setup.interval);
    let mut worker = Worker { client, interval, tokens: setup.tokens, running: VecDeque::new() };
    say(&serde_json::json!({"ready": true}))?;
    loop {
        tokio::select! {
            Some(message) = requests.next() => worker.take(&message).await?,
            Some(message) = cancels.next() => {
                let cancel: Cancel = serde_json::from_slice(&message.payload)?;
                worker.running.retain(|stream| stream.request_id != cancel.request_id);
            }
            Some(_) = hello.next() => worker.client.publish(subject::register(""), registration.clone().into()).await?,
            _ = heartbeats.tick() => {
                sequence += 1;
                let running = worker.running.iter().map(|stream| stream.request_id.clone()).collect();
                let beat = serde_json::to_vec(&worker::heartbeat(&setup, id.clone(), sequence, running))?;
                worker.client.publish(subject::heartbeat(""), beat.into()).await?;
            }
            _ = ticks.tick(), if !worker.running.is_empty() => worker.send_what_is_due().await?,
            _ = &mut end => return Ok(()),
        }
    }
}

// === impl Worker ===

impl Worker {
    async fn take(&mut self, message: &Message) -> Result<(), Box<dyn Error>> {
        let Some(reply) = message.reply.clone() else { return Ok(()) };
        let request: InferenceRequest = serde_json::from_slice(&message.payload)?;
        let accepted = Reply::Accepted { queue_position: 0 }.encode(&request.request_id);
        self.client.publish(reply.clone(), accepted.into()).await?;
        let stream = Running { request_id: request.request_id, reply, index: 0, due: Instant::now() };
        // Before those that wait: it is due now.
        self.running.push_front(stream);
        self.send_what_is_due().await
    }

    async fn send_what_is_due(&mut self) -> Result<(), Box<dyn Error>> {
        let now = Instant::now();
        while self.running.front().is_some_and(|stream| stream.due <= now) {
            let Some(mut stream) = self.running.pop_front() else { break };
            let text = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos().to_string();
            let token = Reply::Token(Token { text, index: stream.index, token_ids: vec![1_000].into(), logprobs: None });
            self.client.publish(stream.reply.clone(), token.encode(&stream.request_id).into()).await?;
            stream.index += 1;
            stream.due += self.interval;
            if stream.index < self.tokens {
                self.running.push_back(stream);
            } else {
                let usage = Usage { prompt_tokens: 32, completion_tokens: stream.index, cached_tokens: 0 };
                let finish = Finish { reason: FinishReason::Length, usage, ..Finish::default() };
                self.client.publish(stream.reply, Reply::Done(finish).encode(&stream.request_id).into()).await?;
            }
        }
        Ok(())
    }
}
