//! The worker's runtime through its public surface: over a port of this process in paused time, and over a real
//! nats-server.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod desk;
mod fleet;
mod holding;
mod local;
mod nats;
mod outages;
mod scripted;
mod server;

use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::transport::{Delivery, LocalHub, Mailbox, Outgoing, Transport, mailbox};
use mlx_serving_router::wire::{Finish, InferenceRequest, Phase, Reply, WorkerId};
use mlx_serving_router::worker::{Job, ModelFiles, Worker, WorkerOptions};

/// Within which anything here must have happened.
const PATIENCE: Duration = Duration::from_secs(10);

fn options(id: &str, max_concurrent: u32, max_queue: u32) -> WorkerOptions {
    WorkerOptions {
        worker_id: WorkerId::new(id).ok(),
        models: vec!["tiny".into()],
        max_concurrent,
        max_queue,
        features: Vec::new(),
        files: ModelFiles::default(),
    }
}

fn request(id: &str, stream: bool) -> InferenceRequest {
    InferenceRequest {
        request_id: id.into(),
        model_id: "tiny".into(),
        prompt: Some("Hello".into()),
        stream,
        ..InferenceRequest::default()
    }
}

fn outgoing(worker: &WorkerId, request: InferenceRequest, attempt: u32, timeout: Duration) -> Outgoing {
    Outgoing { worker: worker.clone(), request: Arc::new(request), attempt, timeout, traceparent: None, older: false }
}

/// A worker of this process and the controller's end of its port.
struct Local {
    worker: Worker,
    hub: LocalHub,
}

impl Local {
    async fn start(max_concurrent: u32, max_queue: u32) -> Self {
        Self::with(options("w", max_concurrent, max_queue)).await
    }

    async fn with(options: WorkerOptions) -> Self {
        let worker = Worker::new(options, &ClusterConfig::default()).unwrap();
        let hub = LocalHub::new("c".into());
        worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
        worker.start_local(hub.attach(worker.id()).unwrap()).await.unwrap();
        Self { worker, hub }
    }

    async fn ask(&self, request: InferenceRequest, attempt: u32, timeout: Duration) -> Mailbox {
        self.hub.send(&outgoing(self.worker.id(), request, attempt, timeout)).await.unwrap()
    }

    fn cancel(&self, id: &str, attempt: u32) {
        self.hub.cancel(&outgoing(self.worker.id(), request(id, true), attempt, Duration::ZERO), &mailbox().1);
    }

    async fn ask_stream(&self, id: &str) -> Mailbox {
        self.ask(request(id, true), 1, Duration::from_secs(600)).await
    }

    async fn job(&self) -> Job {
        tokio::time::timeout(PATIENCE, self.worker.jobs().next()).await.expect("a job comes").expect("the queue is open")
    }
}

async fn reply(mailbox: &mut Mailbox) -> Reply {
    match tokio::time::timeout(PATIENCE, mailbox.recv()).await.expect("a reply comes") {
        Some(Delivery::Reply(reply)) => reply,
        other => panic!("no reply: {other:?}"),
    }
}

/// The code of an error, and when to come back.
async fn error(mailbox: &mut Mailbox) -> (String, Option<i64>) {
    match reply(mailbox).await {
        Reply::Error { code, retry_after_ms, .. } => (code.unwrap(), retry_after_ms),
        other => panic!("no error: {other:?}"),
    }
}

async fn accepted(mailbox: &mut Mailbox) -> u32 {
    match reply(mailbox).await {
        Reply::Accepted { queue_position } => queue_position,
        other => panic!("not accepted: {other:?}"),
    }
}

async fn silent(mailbox: &mut Mailbox) -> bool {
    tokio::time::timeout(Duration::from_millis(50), mailbox.recv()).await.is_err()
}

fn finish() -> Finish {
    Finish::default()
}
