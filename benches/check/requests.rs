//! Whole requests through a controller with everything on, over the in-process transport.
//!
//! One thread, and a clock that stands still for as long as somebody has something to do: what is due by the clock never
//! falls among the requests.

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{CallOptions, Controller};
use mlx_serving_router::transport::{Delivery, LocalMessage, LocalPort, Postbox};
use mlx_serving_router::wire::{InferenceRequest, Reply};

use crate::{Case, codec, fleet, sound};

/// Of a stream, each a message of its own.
const TOKENS: u64 = 64;
/// Ended requests that are remembered. As many run beforehand: then one is forgotten for each that ends.
const REMEMBERED: u64 = 256;

pub fn cases() -> Vec<Case> {
    let case = |name, times, run| Case { name, times, run };
    vec![
        case("request/buffered/3", 2_000, |times| whole(3, times)),
        case("request/buffered/1000", 500, |times| whole(1_000, times)),
        case("stream/token/burst", 200 * TOKENS, |times| streams(Pace::Burst, 1, times)),
        case("stream/token/1", 200 * TOKENS, |times| streams(Pace::Steps, 1, times)),
        case("stream/token/1000", 1_000 * TOKENS, |times| streams(Pace::Steps, 1_000, times)),
        case("metrics/text/10", 50, metrics),
    ]
}

/// How tokens come.
#[derive(Clone, Copy, PartialEq)]
enum Pace {
    /// All of a stream's before the first is read.
    Burst,
    /// One for each stream, then the readers have their turn.
    Steps,
}

fn whole(workers: usize, times: u64) {
    with(Pace::Burst, workers, async |controller| {
        for _ in 0..times {
            ask(&controller).await;
        }
    });
}

/// So many streams at a time. A token is the sixty-fourth part of a stream with its beginning and its end.
fn streams(pace: Pace, at_a_time: u64, times: u64) {
    with(pace, 3, async |controller| {
        for _ in 0..times / TOKENS / at_a_time {
            let readers: Vec<_> = (0..at_a_time).map(|_| tokio::spawn(read(controller.clone()))).collect();
            for reader in readers {
                assert_eq!(sound(reader.await), TOKENS);
            }
        }
    });
}

/// Reads a stream, and says how many tokens it had.
async fn read(controller: Controller) -> u64 {
    let mut stream = sound(controller.streaming(question(true), CallOptions::default()).await);
    let mut tokens = 0;
    loop {
        let batch = sound(stream.next_batch().await);
        if batch.is_empty() {
            return tokens;
        }
        tokens += batch.len() as u64;
    }
}

/// Of a fleet of ten whose workers have all had something to do.
fn metrics(times: u64) {
    with(Pace::Burst, 10, async |controller| {
        for _ in 0..times {
            assert!(!controller.metrics_text().is_empty());
        }
    });
}

/// Has something done with a controller of so many workers that has answered requests before.
fn with(pace: Pace, workers: usize, work: impl AsyncFnOnce(Controller)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    sound(runtime).block_on(async {
        let config = serde_json::json!({"nats": {"mode": "none"}, "requestMetrics": {"maxEntries": REMEMBERED}});
        let controller = sound(Controller::new(sound(ClusterConfig::from_value(config)), Some("check".into())));
        sound(controller.start(None).await);
        for number in 0..workers {
            let mut registration = fleet::registration(number);
            registration.capacity.max_concurrent = 4_096; // all streams are of one session
            tokio::spawn(serve(sound(controller.attach_local(&registration)), pace));
        }
        sound(controller.wait_for_workers(workers).await);
        for _ in 0..REMEMBERED {
            ask(&controller).await;
        }
        work(controller).await;
    });
}

async fn ask(controller: &Controller) {
    let answer = sound(controller.buffered(question(false), CallOptions::default()).await);
    assert_eq!(answer.text, codec::ANSWER);
}

/// One without a name: the controller makes one.
fn question(stream: bool) -> InferenceRequest {
    InferenceRequest { request_id: String::new(), ..codec::request(stream) }
}

/// A worker that computes nothing.
async fn serve(mut port: LocalPort, pace: Pace) {
    let mut running: Vec<(Postbox, u64)> = Vec::new();
    loop {
        tokio::select! {
            biased;
            message = port.recv() => {
                let Some(message) = message else { return };
                let LocalMessage::Request { request, postbox, .. } = message else { continue };
                post(&postbox, Reply::Accepted { queue_position: 0 });
                match (request.stream, pace) {
                    (false, _) => post(&postbox, codec::response()),
                    (true, Pace::Burst) => (0..=TOKENS).for_each(|index| piece(&postbox, index)),
                    (true, Pace::Steps) => running.push((postbox, 0)),
                }
            }
            () = std::future::ready(()), if !running.is_empty() => {
                running.retain_mut(|(postbox, index)| {
                    piece(postbox, *index);
                    *index += 1;
                    *index <= TOKENS
                });
                tokio::task::yield_now().await;
            }
        }
    }
}

/// A token, or the end that follows the last.
fn piece(postbox: &Postbox, index: u64) {
    post(postbox, if index < TOKENS { codec::token(index) } else { Reply::Done(codec::finish()) });
}

fn post(postbox: &Postbox, reply: Reply) {
    assert!(postbox.post(Delivery::Reply(reply)));
}
