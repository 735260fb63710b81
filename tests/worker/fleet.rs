//! A controller's view over NATS: what a worker says, word for word.

use std::time::Duration;

use mlx_serving_router::config::{ClusterConfig, NatsMode, ServerUrls};
use mlx_serving_router::transport::nats::{NatsConnection, NatsTransport, Subscription};
use mlx_serving_router::transport::{Mailbox, Transport};
use mlx_serving_router::wire::{InferenceRequest, Phase, WorkerId};
use mlx_serving_router::worker::Worker;
use serde_json::Value;

use super::server::Server;
use super::{PATIENCE, options, outgoing, request};

/// A fleet's controller, played by the test.
pub struct Fleet {
    pub config: ClusterConfig,
    pub connection: NatsConnection,
    pub transport: NatsTransport,
    pub registrations: Subscription,
    pub heartbeats: Subscription,
    pub deregistrations: Subscription,
}

impl Fleet {
    pub async fn of(server: &Server, heartbeat_interval_ms: u64) -> Self {
        let mut config = ClusterConfig::default();
        config.nats.mode = NatsMode::External;
        config.nats.server_url = ServerUrls::One(server.url());
        config.nats.subject_prefix = "p.".into();
        config.discovery.heartbeat_interval_ms = heartbeat_interval_ms;
        let connection = NatsConnection::connect(&config.nats, "test").await.unwrap();
        let transport = NatsTransport::open(connection.clone(), "c".into(), Duration::ZERO).await.unwrap();
        let subscribe = |subject: &str| connection.subscribe(format!("p.worker.{subject}"));
        let fleet = Self {
            config,
            registrations: subscribe("register").await.unwrap(),
            heartbeats: subscribe("heartbeat").await.unwrap(),
            deregistrations: subscribe("deregister").await.unwrap(),
            transport,
            connection: connection.clone(),
        };
        connection.flush().await.unwrap();
        fleet
    }

    pub fn worker(&self, id: &str, max_concurrent: u32, max_queue: u32) -> Worker {
        Worker::new(options(id, max_concurrent, max_queue), &self.config).unwrap()
    }

    /// A worker whose engine is ready, in the fleet.
    pub async fn started(&mut self, id: &str) -> Worker {
        let worker = self.worker(id, 2, 4);
        worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
        worker.start(None).await.unwrap();
        let registration = message(&mut self.registrations).await;
        assert_eq!(registration["workerId"], id);
        worker
    }

    pub async fn ask(&self, worker: &Worker, request: InferenceRequest) -> Mailbox {
        self.transport.send(&outgoing(worker.id(), request, 1, Duration::from_secs(60))).await.unwrap()
    }

    /// The end of interest in the request of this name whose replies come to the mailbox.
    pub fn cancel(&self, worker: &WorkerId, id: &str, mailbox: &Mailbox) {
        self.transport.cancel(&outgoing(worker, request(id, true), 1, Duration::ZERO), mailbox);
    }

    pub async fn say(&self, subject: &str, body: Value) {
        let payload = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        self.connection.publish(format!("p.{subject}"), payload.into()).await.unwrap();
        self.connection.flush().await.unwrap();
    }
}

pub async fn message(subscription: &mut Subscription) -> Value {
    let message = tokio::time::timeout(PATIENCE, subscription.next()).await.expect("a message comes").expect("connected");
    serde_json::from_slice(&message.payload).unwrap()
}
