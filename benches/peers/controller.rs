//! Our controller, called from Rust, with everything on: routing, affinity, breaker, limits, metadata, metrics.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{CallOptions, Controller};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::load::{self, Side};
use crate::setup::Setup;

#[derive(Clone)]
struct Ours {
    controller: Controller,
    setup: Arc<Setup>,
}

/// Starts a controller and takes rounds.
pub async fn run(setup: Setup) -> Result<(), Box<dyn Error>> {
    let config = ClusterConfig::from_value(config(&setup))?;
    let controller = Controller::new(config, None)?;
    controller.start(None).await?;
    tokio::time::timeout(Duration::from_secs(10), controller.wait_for_workers(1)).await??;
    load::serve(Ours { controller: controller.clone(), setup: Arc::new(setup) }).await?;
    controller.stop(Duration::ZERO).await;
    Ok(())
}

fn config(setup: &Setup) -> Value {
    if setup.workers.is_empty() {
        return json!({"nats": {"mode": "external", "serverUrl": setup.url}});
    }
    let workers = setup.workers.iter().enumerate();
    let workers = workers.map(|(n, url)| json!({"workerId": format!("http-{n}"), "url": url, "models": [setup.model]}));
    json!({"nats": {"mode": "none"}, "workers": {"static": workers.collect::<Vec<_>>()}})
}

// === impl Ours ===

impl Side for Ours {
    async fn buffered(&self, number: u64) -> Result<(), String> {
        let request = self.setup.request(number).map_err(|error| error.to_string())?;
        let answer = self.controller.buffered(request, CallOptions::default()).await.map_err(|error| error.to_string())?;
        if answer.text == self.setup.answer { Ok(()) } else { Err("another text than the worker's".to_owned()) }
    }

    async fn streaming(&self, number: u64) -> Result<(Instant, u64), String> {
        let request = self.setup.request(number).map_err(|error| error.to_string())?;
        let mut stream = self.controller.streaming(request, CallOptions::default()).await.map_err(|error| error.to_string())?;
        let (mut first, mut tokens) = (None, 0);
        loop {
            let batch = stream.next_batch().await.map_err(|error| error.to_string())?;
            if batch.is_empty() {
                break;
            }
            first.get_or_insert_with(Instant::now);
            tokens += batch.len() as u64;
        }
        match first {
            Some(first) if tokens == self.setup.tokens => Ok((first, tokens)),
            _ => Err(format!("{tokens} tokens instead of {}", self.setup.tokens)),
        }
    }
}
