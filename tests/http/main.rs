//! Controllers before servers that speak the OpenAI API over HTTP, and that do what servers should not do.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod answers;
mod failures;
mod looks;
mod relayed;
mod server;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{Answer, CallOptions, Controller, Events, TokenStream};
use mlx_serving_router::error::ControllerError;
use mlx_serving_router::wire::{InferenceRequest, Json};
use serde_json::{Value, json};

use server::Server;

/// A started controller of these workers, each a server and what else its entry says. Nobody is looked at more than once
/// unless `more` says so.
async fn controller(workers: &[(&str, &Server, Value)], more: Value) -> Controller {
    let controller = started(workers, more).await;
    controller.wait_for_workers(workers.len()).await.unwrap();
    controller
}

/// The same, whoever is there.
async fn started(workers: &[(&str, &Server, Value)], more: Value) -> Controller {
    let entries: Vec<Value> = workers
        .iter()
        .map(|(id, server, entry)| {
            merged(json!({"workerId": id, "url": format!("http://{}", server.address), "models": ["m"]}), entry)
        })
        .collect();
    let config = json!({
        "nats": {"mode": "none"},
        "discovery": {"heartbeatIntervalMs": 60_000},
        "controller": {"workerOfflineTimeoutMs": 600_000},
        "workers": {"static": entries},
    });
    let config = ClusterConfig::from_value(merged(config, &more)).unwrap();
    let controller = Controller::new(config, Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    controller
}

/// With the entries of the second in place of those of the first; `null` takes one away.
fn merged(mut one: Value, other: &Value) -> Value {
    for (key, value) in other.as_object().into_iter().flatten() {
        if value.is_null() {
            one.as_object_mut().unwrap().remove(key);
        } else {
            one[key] = value.clone();
        }
    }
    one
}

/// A controller of one server.
async fn alone(server: &Server, routing: Value) -> Controller {
    controller(&[("a", server, json!({}))], json!({"requestRouting": merged(json!({"retry": {"maxRetries": 0}}), &routing)}))
        .await
}

fn chat() -> InferenceRequest {
    let messages = Json::from_value(&json!([{"role": "user", "content": "Hello"}])).unwrap();
    InferenceRequest { request_id: "r".into(), model_id: "m".into(), messages: Some(messages), ..InferenceRequest::default() }
}

async fn buffered(controller: &Controller) -> Result<Answer, ControllerError> {
    controller.buffered(chat(), CallOptions::default()).await
}

async fn streaming(controller: &Controller) -> Result<TokenStream, ControllerError> {
    controller.streaming(chat(), CallOptions::default()).await
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

/// The next event of this kind.
async fn event(events: &mut Events, kind: &str) -> Value {
    loop {
        let event = events.next().await.unwrap();
        if event.kind == kind {
            return Value::Object(event.details);
        }
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
