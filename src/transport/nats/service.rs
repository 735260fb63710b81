//! A worker as a NATS service: where its requests arrive, and how it answers the discovery of standard NATS tools
//! (`$SRV.PING`, `$SRV.INFO`, `$SRV.STATS`).

use std::collections::HashMap;

use async_nats::service::endpoint::Endpoint;
use async_nats::service::{Request, Service, ServiceExt};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::Value;

use super::connection::{NatsConnection, lost};
use crate::error::ControllerError;

/// The name under which tools list workers.
const NAME: &str = "mlx-worker";
const ENDPOINT: &str = "inference";

/// The requests of one worker, and its face to the discovery of services.
pub struct WorkerService {
    connection: NatsConnection,
    service: Service,
    endpoint: Endpoint,
}

/// A request as it arrived, and the way back.
pub struct Asked {
    connection: NatsConnection,
    request: Request,
}

// === impl WorkerService ===

impl WorkerService {
    /// Subscribes to a subject and appears in the discovery of services. `stats` is what `$SRV.STATS` shows as `data`.
    ///
    /// `group` is a queue group. One that nobody else uses makes this an ordinary subscription: two workers of one name
    /// each receive everything until the older one gives way, so that a frozen one swallows nothing.
    ///
    /// # Errors
    /// NATS_ERROR: the connection is closed.
    pub async fn open(
        connection: &NatsConnection,
        subject: String,
        group: &str,
        metadata: HashMap<String, String>,
        mut stats: impl FnMut() -> Value + Send + Sync + 'static,
    ) -> Result<Self, ControllerError> {
        let service = connection
            .client()
            .service_builder()
            .description("inference on one worker of mlx_serving_router")
            .metadata(metadata)
            .stats_handler(move |_, _| stats())
            .start(NAME, env!("CARGO_PKG_VERSION"))
            .await
            .map_err(|error| lost(&error))?;
        match service.endpoint_builder().name(ENDPOINT).queue_group(group).add(subject).await {
            Ok(endpoint) => Ok(Self { connection: connection.clone(), service, endpoint }),
            Err(error) => {
                let error = lost(&error);
                let _ = service.stop().await;
                Err(error)
            }
        }
    }

    /// The next request; `None` when the connection is closed.
    pub async fn next(&mut self) -> Option<Asked> {
        let request = self.endpoint.next().await?;
        Some(Asked { connection: self.connection.clone(), request })
    }

    /// Unsubscribes and leaves the discovery.
    pub async fn close(mut self) {
        let _ = self.endpoint.stop().await;
        let _ = self.service.stop().await;
    }
}

// === impl Asked ===

impl Asked {
    /// A header's first value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.request.message.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str)
    }

    /// The body.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.request.message.payload
    }

    /// The subject of the answer.
    #[must_use]
    pub fn reply_to(&self) -> Option<&str> {
        self.request.message.reply.as_deref()
    }

    /// The largest message of an answer, in bytes.
    #[must_use]
    pub fn max_payload(&self) -> usize {
        self.connection.max_payload()
    }

    /// Sends one message of the answer.
    ///
    /// # Errors
    /// NATS_ERROR at once while disconnected, PAYLOAD_TOO_LARGE.
    pub async fn answer(&self, payload: Bytes) -> Result<(), ControllerError> {
        match &self.request.message.reply {
            Some(subject) => self.connection.publish(subject.to_string(), payload).await,
            None => Ok(()),
        }
    }

    /// Sends the last message of the answer. The service's own statistics count the request with it.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub async fn finish(&self, payload: Bytes) -> Result<(), ControllerError> {
        if self.reply_to().is_none() {
            return Ok(());
        }
        self.connection.ready_for(payload.len())?;
        self.request.respond(Ok(payload)).await.map_err(|error| lost(&error))
    }
}
