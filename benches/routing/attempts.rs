//! What belongs to an attempt: its four timers, and what it costs that one before it failed.

use std::error::Error;
use std::future::Future;
use std::hint::black_box;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use criterion::Criterion;
use mlx_serving_router::config::{ClusterConfig, RequestRoutingConfig};
use mlx_serving_router::dispatch::{CallOptions, Controller};
use mlx_serving_router::transport::{Delivery, LocalMessage, LocalPort};
use mlx_serving_router::wire::{Finish, FinishReason, InferenceRequest, Reply, Usage};
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::fleet;
use crate::limits::{Limits, Mode};

/// Set at the start, moved on at the first sign of the worker and at two tokens, cleared by being dropped: as an attempt
/// does, with its one sleep for the next of the four.
pub fn timers(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.unwrap_or_else(|error| panic!("{error}"));
    let _entered = runtime.enter();
    let limits = Limits::new(&RequestRoutingConfig::default(), 3);
    let mut context = Context::from_waker(Waker::noop());
    criterion.benchmark_group("attempt").bench_function("timers", |bencher| {
        bencher.iter(|| {
            let now = Instant::now();
            let mut timers = limits.timers(Mode::Streaming, false, limits.deadline(Mode::Streaming, None, now), now);
            let mut sleep = Box::pin(tokio::time::sleep_until(timers.next().0));
            let mut wait = |sleep: &mut Pin<Box<Sleep>>| assert!(sleep.as_mut().poll(&mut context).is_pending());
            wait(&mut sleep);
            timers.heard();
            sleep.as_mut().reset(timers.next().0);
            wait(&mut sleep);
            for _ in 0..2 {
                timers.token(Instant::now());
                sleep.as_mut().reset(timers.next().0);
                wait(&mut sleep);
            }
            black_box(&sleep);
        });
    });
}

/// Seconds, by round.
#[derive(Debug, Serialize)]
pub struct Retries {
    /// A request that one worker answers.
    at_once: Vec<f64>,
    /// A request that one worker fails and the next one answers, without backoff.
    after_a_failure: Vec<f64>,
}

/// A request with and one without a retry, in turn, so many of each.
pub fn retries(rounds: usize) -> Result<Retries, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let good = cluster(1).await?;
        let mixed = cluster(2).await?;
        let mut found = Retries { at_once: Vec::new(), after_a_failure: Vec::new() };
        for round in 0..rounds + 20 {
            let (at_once, _) = timed(&good).await?;
            let (after_a_failure, attempts) = timed(&mixed).await?;
            assert_eq!(attempts, 2);
            if round >= 20 {
                found.at_once.push(at_once);
                found.after_a_failure.push(after_a_failure);
            }
        }
        good.stop(Duration::ZERO).await;
        mixed.stop(Duration::ZERO).await;
        Ok(found)
    })
}

/// A controller with so many workers, each of which fails all first attempts where there is another one.
async fn cluster(workers: usize) -> Result<Controller, Box<dyn Error>> {
    let config = serde_json::json!({
        "nats": {"mode": "none"},
        "requestRouting": {
            "retry": {"retryDelayMs": 0, "budgetMinPerSecond": 1_000_000},
            // Failures are what is measured here: nobody is to be left alone for them.
            "circuitBreaker": {"failureThreshold": 1_000_000, "minimumRequests": 1_000_000},
        },
    });
    let controller = Controller::new(ClusterConfig::from_value(config)?, None)?;
    controller.start(None).await?;
    for number in 0..workers {
        let port = controller.attach_local(&fleet::registration(number))?;
        tokio::spawn(answer(port, workers > 1));
    }
    Ok(controller)
}

async fn answer(mut port: LocalPort, fails_first: bool) {
    while let Some(message) = port.recv().await {
        let LocalMessage::Request { attempt, postbox, .. } = message else { continue };
        let reply = if fails_first && attempt == 1 {
            Reply::Error { message: "as told".into(), code: Some("WORKER_UNAVAILABLE".into()), retry_after_ms: None }
        } else {
            Reply::Response {
                text: "Hello".into(),
                finish: Finish {
                    reason: FinishReason::Stop,
                    usage: Usage { prompt_tokens: 2, completion_tokens: 1, cached_tokens: 0 },
                    tool_calls: None,
                    latency_ms: 1.0,
                },
                logprobs: None,
            }
        };
        postbox.post(Delivery::Reply(reply));
    }
}

/// How long a request took, in seconds, and in how many attempts.
async fn timed(controller: &Controller) -> Result<(f64, usize), Box<dyn Error>> {
    let request =
        InferenceRequest { model_id: fleet::MODELS[0].to_owned(), prompt: Some("Hello".into()), ..InferenceRequest::default() };
    let began = Instant::now();
    let answer = controller.buffered(request, CallOptions::default()).await?;
    let seconds = began.elapsed().as_secs_f64();
    let metadata = controller.request_metrics(&answer.request_id).ok_or("the request is not known")?;
    Ok((seconds, metadata.attempts.len()))
}
