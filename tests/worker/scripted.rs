//! Workers that do what a script says, before a whole controller: in this process in paused time, and over a real
//! nats-server.

use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{CallOptions, Controller, TokenStream};
use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::transport::LocalHub;
use mlx_serving_router::wire::{InferenceRequest, Phase, WorkerId};
use mlx_serving_router::worker::scripted::{Babble, Script, ScriptedOptions, ScriptedState, ScriptedWorker, Step};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::PATIENCE;
use super::server::Server;

fn scripted(id: &str, script: Script) -> ScriptedWorker {
    ScriptedWorker::new(ScriptedOptions {
        worker_id: WorkerId::new(id).ok(),
        models: vec!["tiny".into()],
        max_concurrent: 0,
        features: Vec::new(),
        heartbeat_interval: Duration::from_millis(100),
        loading: Duration::ZERO,
        script,
    })
    .unwrap()
}

async fn controller(nats: Value, routing: Value) -> Controller {
    let config = json!({"nats": nats, "requestRouting": routing, "discovery": {"heartbeatIntervalMs": 100}});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    controller
}

/// A controller of this process.
async fn alone(routing: Value) -> Controller {
    controller(json!({"mode": "none"}), routing).await
}

/// One attempt, so that each test meets the error of its worker itself.
fn once() -> Value {
    json!({"retry": {"enabled": false}, "circuitBreaker": {"enabled": false}})
}

async fn join(controller: &Controller, worker: &ScriptedWorker) {
    let port = controller.attach_local(&worker.registration()).unwrap();
    worker.start_local(port).await.unwrap();
}

async fn joined(controller: &Controller, id: &str, script: Script) -> ScriptedWorker {
    let worker = scripted(id, script);
    join(controller, &worker).await;
    worker
}

fn request() -> InferenceRequest {
    InferenceRequest { model_id: "tiny".into(), prompt: Some("Hello".into()), ..InferenceRequest::default() }
}

async fn ask(controller: &Controller) -> Result<String, ControllerError> {
    let id = format!("r-{}", fastrand::u64(..));
    let request = InferenceRequest { request_id: id, ..request() };
    controller.buffered(request, CallOptions::default()).await.map(|answer| answer.text)
}

async fn open(controller: &Controller) -> Result<TokenStream, ControllerError> {
    let request = InferenceRequest { request_id: "s".into(), ..request() };
    controller.streaming(request, CallOptions::default()).await
}

/// What a stream gave, and how it ended.
async fn read(controller: &Controller) -> (String, Result<(), ControllerError>) {
    let mut text = String::new();
    let mut stream = match open(controller).await {
        Ok(stream) => stream,
        Err(error) => return (text, Err(error)),
    };
    loop {
        match stream.next_batch().await {
            Ok(batch) if batch.is_empty() => return (text, Ok(())),
            Ok(batch) => batch.iter().for_each(|token| text.push_str(&token.text)),
            Err(error) => return (text, Err(error)),
        }
    }
}

fn limit(error: &ControllerError) -> &str {
    error.context()["limit"].as_str().unwrap()
}

async fn idle(worker: &ScriptedWorker) {
    tokio::time::timeout(PATIENCE, worker.wait_until(|counts| counts.in_flight == 0)).await.expect("its work ends");
}

// === in this process ===

#[tokio::test(start_paused = true)]
async fn an_answer_is_remembered_with_what_was_asked() {
    let controller = alone(once()).await;
    let worker = joined(&controller, "w", Script::default()).await;
    assert_eq!(ask(&controller).await.unwrap(), "Hello, world");
    let (text, end) = read(&controller).await;
    assert_eq!(text, "Hello, world");
    end.unwrap();
    let [buffered, streamed] = &worker.requests()[..] else { panic!("{:?}", worker.requests()) };
    assert_eq!((buffered.request.stream, streamed.request.stream), (false, true));
    assert_eq!((buffered.attempt, &*buffered.controller_id), (1, "c"));
    assert_eq!(buffered.request.prompt.as_deref(), Some("Hello"));
    assert!(buffered.timeout > Duration::from_secs(20) && streamed.timeout > buffered.timeout);
    assert_eq!((worker.counts().requests, worker.counts().cancels), (2, 0));
    idle(&worker).await;
}

#[tokio::test(start_paused = true)]
async fn a_stall_meets_the_limit_of_its_place_and_is_cancelled() {
    let controller = alone(once()).await;
    let worker = joined(&controller, "w", Script::stall(0).then(Script::stall(3)).then(Script::steps([Step::Stall]))).await;
    let (text, end) = read(&controller).await;
    let error = end.unwrap_err();
    assert_eq!((&*text, error.code(), limit(&error)), ("", Code::WorkerTimeout, "first_token"));
    let (text, end) = read(&controller).await;
    let error = end.unwrap_err();
    assert_eq!((&*text, error.code()), ("Hello, wor", Code::StreamInterrupted));
    let (_, end) = read(&controller).await;
    assert_eq!(limit(&end.unwrap_err()), "accept");
    worker.wait_until(|counts| counts.cancels == 3).await;
    idle(&worker).await;
    assert_eq!(worker.cancels()[0].request_id, "s");
}

#[tokio::test(start_paused = true)]
async fn one_that_ignores_cancels_works_until_its_time_is_over() {
    let controller = alone(json!({"streamTotalTimeoutMs": 90_000, "retry": {"enabled": false}})).await;
    let worker = joined(&controller, "w", Script::stall(0)).await;
    worker.set_obeys_cancels(false);
    read(&controller).await.1.unwrap_err();
    worker.wait_until(|counts| counts.cancels == 1).await;
    assert_eq!(worker.counts().in_flight, 1);
    let asked = Instant::now();
    worker.wait_until(|counts| counts.in_flight == 0).await;
    assert_eq!(asked.elapsed().as_secs(), 31);
}

#[tokio::test(start_paused = true)]
async fn failures_come_as_the_script_says() {
    let controller = alone(once()).await;
    let fails = Script::fail(Code::ModelLoadFailed, 0);
    let worker = joined(&controller, "w", fails.every(3, Script::default())).await;
    for number in 1..=6 {
        let answer = ask(&controller).await.map_err(|error| error.code());
        assert_eq!(answer.err(), (number % 3 == 0).then_some(Code::ModelLoadFailed), "request {number}");
    }
    worker.now_does(&Script::refuse(Some(700)));
    let error = ask(&controller).await.unwrap_err();
    assert_eq!((error.code(), error.retry_after_ms()), (Code::WorkerOverloaded, Some(700)));
    worker.now_does(&Script::fail(Code::WorkerUnavailable, 2));
    let (text, end) = read(&controller).await;
    assert_eq!((&*text, end.unwrap_err().code()), ("Hello", Code::StreamInterrupted));
}

#[tokio::test(start_paused = true)]
async fn babble_breaks_the_protocol_before_or_after_the_first_token() {
    let controller = alone(once()).await;
    let worker = joined(&controller, "w", Script::default()).await;
    for how in [Babble::Malformed, Babble::Missing, Babble::Reordered] {
        worker.now_does(&Script::babble(how, 0));
        let (text, end) = read(&controller).await;
        let error = end.unwrap_err();
        assert_eq!((&*text, error.code()), ("", Code::WorkerUnavailable), "{how:?}");
        assert!(error.context().contains_key("protocolError"), "{how:?}");
    }
    for how in [Babble::Malformed, Babble::Missing, Babble::Reordered, Babble::Duplicate] {
        worker.now_does(&Script::babble(how, 2));
        let (text, end) = read(&controller).await;
        assert_eq!((&*text, end.unwrap_err().code()), ("Hello", Code::StreamInterrupted), "{how:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_dies_leaves_its_requests_to_others_and_comes_back_as_another() {
    let controller = alone(json!({"retry": {"retryDelayMs": 10}})).await;
    let dies = joined(&controller, "a", Script::die(0).then(Script::default())).await;
    let first = dies.registration().incarnation;
    assert_eq!(controller.workers().len(), 1);
    let other = joined(&controller, "b", Script::default()).await;
    for _ in 0..2 {
        assert_eq!(ask(&controller).await.unwrap(), "Hello, world");
    }
    assert_eq!((dies.counts().requests, other.counts().requests), (1, 2));
    assert_eq!((dies.state(), dies.counts().in_flight), (ScriptedState::Dead, 0));
    assert!(controller.worker("a").is_none());
    join(&controller, &dies).await;
    assert_eq!(dies.state(), ScriptedState::Running);
    assert_ne!(controller.worker("a").unwrap().incarnation, first);
}

#[tokio::test(start_paused = true)]
async fn what_is_frozen_is_silent_and_goes_on_where_it_stopped() {
    let controller = alone(once()).await;
    let wait = Step::Wait(Duration::from_millis(100));
    let steps = [Step::Accept, Step::token("a"), wait.clone(), wait, Step::token("b"), Step::finish()];
    let worker = joined(&controller, "w", Script::steps(steps)).await;
    let mut stream = open(&controller).await.unwrap();
    worker.freeze();
    assert_eq!(worker.state(), ScriptedState::Frozen);
    assert_eq!(limit(&ask(&controller).await.unwrap_err()), "accept");
    let [first] = &stream.next_batch().await.unwrap()[..] else { panic!("one token came before") };
    assert_eq!(first.text, "a");
    assert!(tokio::time::timeout(Duration::from_secs(5), stream.next_batch()).await.is_err(), "it is silent");
    worker.thaw();
    let [second] = &stream.next_batch().await.unwrap()[..] else { panic!("one token comes afterwards") };
    assert_eq!(second.text, "b");
    assert!(stream.next_batch().await.unwrap().is_empty());
    // What was asked meanwhile reaches it now, together with the word that nobody waits any more.
    worker.wait_until(|counts| counts.requests == 2 && counts.cancels == 1).await;
    idle(&worker).await;
}

#[tokio::test(start_paused = true)]
async fn a_model_that_loads_gets_its_longer_limits() {
    let controller = alone(json!({"retry": {"enabled": false}, "timeoutMs": 2000, "modelLoadTimeoutMs": 60_000})).await;
    let worker = scripted("w", Script::default());
    worker.set_loading(Duration::from_secs(20));
    let begun = Instant::now();
    join(&controller, &worker).await;
    let info = controller.worker("w").unwrap();
    assert_eq!((info.phase, info.loading_models), (Phase::Loading, vec!["tiny".to_owned()]));
    assert_eq!(ask(&controller).await.unwrap(), "Hello, world");
    assert_eq!(begun.elapsed().as_secs(), 20);
    let info = controller.worker("w").unwrap();
    assert_eq!((info.phase, info.loaded_models), (Phase::Ready, vec!["tiny".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn who_drains_finishes_and_takes_nothing_new() {
    let controller = alone(once()).await;
    let worker =
        joined(&controller, "w", Script::steps([Step::Accept, Step::Wait(Duration::from_secs(5)), Step::finish()])).await;
    let asked = {
        let controller = controller.clone();
        tokio::spawn(async move { ask(&controller).await })
    };
    worker.wait_until(|counts| counts.in_flight == 1).await;
    worker.drain().await;
    assert_eq!(worker.state(), ScriptedState::Draining);
    assert_eq!(ask(&controller).await.unwrap_err().code(), Code::NoWorkersAvailable);
    assert_eq!(asked.await.unwrap().unwrap(), "");
}

#[tokio::test(start_paused = true)]
async fn where_nobody_listens_the_next_worker_is_asked_at_once() {
    let controller = alone(json!({"retry": {"retryDelayMs": 5000, "maxDelayMs": 5000}})).await;
    let deaf = joined(&controller, "a", Script::default()).await;
    let _other = joined(&controller, "b", Script::default()).await;
    deaf.listen(false).await;
    let begun = Instant::now();
    for _ in 0..2 {
        assert_eq!(ask(&controller).await.unwrap(), "Hello, world");
    }
    assert!(begun.elapsed() < Duration::from_millis(10));
    assert_eq!(deaf.counts().requests, 0);
    deaf.listen(true).await;
    for _ in 0..2 {
        ask(&controller).await.unwrap();
    }
    assert_eq!(deaf.counts().requests, 1);
}

#[tokio::test(start_paused = true)]
async fn its_capacity_is_never_exceeded() {
    let worker = ScriptedWorker::new(ScriptedOptions {
        worker_id: None,
        models: vec!["tiny".into()],
        max_concurrent: 1,
        features: Vec::new(),
        heartbeat_interval: Duration::from_secs(1),
        loading: Duration::ZERO,
        script: Script::stall(0),
    })
    .unwrap();
    let controller = alone(once()).await;
    // A controller that is not told of the capacity, as another one of the fleet would not know of this one's requests.
    let mut registration = worker.registration();
    registration.capacity.max_concurrent = 0;
    worker.start_local(controller.attach_local(&registration).unwrap()).await.unwrap();
    let stalled = tokio::spawn({
        let controller = controller.clone();
        async move { ask(&controller).await }
    });
    worker.wait_until(|counts| counts.in_flight == 1).await;
    assert_eq!(ask(&controller).await.unwrap_err().code(), Code::WorkerOverloaded);
    stalled.abort();
}

#[tokio::test(start_paused = true)]
async fn a_long_answer_reaches_a_reader_that_is_slow() {
    let controller = alone(once()).await;
    let pieces = vec!["x"; 5000];
    let _worker = joined(&controller, "w", Script::answer(&pieces)).await;
    let mut stream = open(&controller).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut count = 0;
    loop {
        match stream.next_batch().await.unwrap().len() {
            0 => break,
            more => count += more,
        }
    }
    assert_eq!(count, 5000);
}

#[tokio::test(start_paused = true)]
async fn what_is_stopped_or_dropped_is_gone() {
    let controller = alone(once()).await;
    let worker = joined(&controller, "w", Script::stall(0)).await;
    let asked = tokio::spawn({
        let controller = controller.clone();
        async move { ask(&controller).await }
    });
    worker.wait_until(|counts| counts.in_flight == 1).await;
    let error = join_twice(&controller, &worker).await;
    assert_eq!(error.code(), Code::ControllerNotReady);
    worker.stop().await;
    assert_eq!(worker.state(), ScriptedState::Stopped);
    assert_eq!(asked.await.unwrap().unwrap_err().code(), Code::WorkerUnavailable);
    worker.stop().await;
    worker.die().await;
    join(&controller, &worker).await;
    drop(worker);
    let gone = async {
        while controller.worker("w").is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("it leaves the fleet");
}

async fn join_twice(controller: &Controller, worker: &ScriptedWorker) -> ControllerError {
    let mut registration = worker.registration();
    registration.worker_id = WorkerId::new("another").unwrap();
    let port = controller.attach_local(&registration).unwrap();
    worker.start_local(port).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_meets_the_end_of_a_life_returns() {
    let stopping = async {
        for _ in 0..20_000 {
            let hub = LocalHub::new("c".into());
            let worker = scripted("w", Script::default());
            worker.start_local(hub.attach(&worker.id()).unwrap()).await.unwrap();
            // Its life ends because there is nobody left to serve, in this very moment.
            hub.close();
            for _ in 0..fastrand::u32(..2000) {
                std::hint::spin_loop();
            }
            worker.stop().await;
        }
    };
    tokio::time::timeout(3 * PATIENCE, stopping).await.expect("each order returns");
}

// === over NATS ===

/// A controller and its workers on a server of their own, or the end of the test where none can be had.
macro_rules! fleet {
    ($routing:expr, $($worker:ident),+) => {{
        let Some(server) = Server::start().await else { return };
        let nats = json!({"mode": "external", "serverUrl": server.url(), "subjectPrefix": "p."});
        let controller = controller(nats, $routing).await;
        let config = controller.config().nats.clone();
        let workers = ($({
            let worker = scripted(stringify!($worker), Script::default());
            worker.start(&config).await.unwrap();
            worker
        }),+,);
        let count = [$(stringify!($worker)),+].len();
        tokio::time::timeout(PATIENCE, controller.wait_for_workers(count)).await.expect("they come").unwrap();
        (server, controller, workers)
    }};
}

#[tokio::test]
async fn over_nats_it_answers_stalls_and_is_cancelled() {
    let mut routing = once();
    routing["streamIdleTimeoutMs"] = json!(500);
    let (_server, controller, (w,)) = fleet!(routing, w);
    let (text, end) = read(&controller).await;
    end.unwrap();
    assert_eq!(text, "Hello, world");
    assert_eq!(w.requests()[0].controller_id.as_ref(), "c");
    w.now_does(&Script::stall(3));
    let (text, end) = read(&controller).await;
    assert_eq!((&*text, end.unwrap_err().code()), ("Hello, wor", Code::StreamInterrupted));
    tokio::time::timeout(PATIENCE, w.wait_until(|counts| counts.cancels == 1)).await.expect("a cancel comes");
    idle(&w).await;
    for (how, cancels) in [(Babble::Malformed, 2), (Babble::Missing, 3), (Babble::Reordered, 4)] {
        w.now_does(&Script::babble(how, 0));
        let error = read(&controller).await.1.unwrap_err();
        assert_eq!(error.code(), Code::WorkerUnavailable, "{how:?}");
        assert!(error.context().contains_key("protocolError"), "{how:?}: {error:?}");
        // The next request has the same name: a cancel that is late would strike it.
        tokio::time::timeout(PATIENCE, w.wait_until(|counts| counts.cancels == cancels)).await.expect("a cancel comes");
        idle(&w).await;
    }
}

#[tokio::test]
async fn over_nats_nobody_listens_once_it_is_dead() {
    let (_server, controller, (w,)) = fleet!(once(), w);
    for _ in 0..10 {
        w.die().await;
        assert_eq!(w.state(), ScriptedState::Dead);
        let begun = Instant::now();
        let error = ask(&controller).await.unwrap_err();
        assert!(error.context().contains_key("noResponders"), "{error}");
        assert!(begun.elapsed() < Duration::from_millis(1500));
        let before = controller.worker("w").unwrap().incarnation;
        w.start(&controller.config().nats).await.unwrap();
        let is_back = async {
            while controller.worker("w").unwrap().incarnation == before {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, is_back).await.expect("it registers");
        assert_eq!(ask(&controller).await.unwrap(), "Hello, world");
    }
}

#[tokio::test]
async fn over_nats_its_silence_takes_it_offline_and_its_life_brings_it_back() {
    let Some(server) = Server::start().await else { return };
    let config = json!({
        "nats": {"mode": "external", "serverUrl": server.url()},
        "discovery": {"heartbeatIntervalMs": 100}, "controller": {"workerOfflineTimeoutMs": 500},
    });
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), None).unwrap();
    controller.start(None).await.unwrap();
    let w = scripted("w", Script::default());
    w.start(&controller.config().nats).await.unwrap();
    let online = async |count| {
        let there = async {
            while controller.cluster_status().workers.online != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, there).await.expect("workers come and go");
    };
    online(1).await;
    w.freeze();
    online(0).await;
    w.thaw();
    online(1).await;
    w.set_heartbeats(false);
    online(0).await;
    w.set_heartbeats(true);
    online(1).await;
    w.drain().await;
    online(0).await;
    w.stop().await;
}

#[tokio::test]
async fn over_nats_it_may_leave_its_subject_and_come_back_to_it() {
    let (_server, controller, (a, b)) = fleet!(json!({"retry": {"retryDelayMs": 5000, "maxDelayMs": 5000}}), a, b);
    a.listen(false).await;
    for _ in 0..4 {
        let asked = tokio::time::timeout(Duration::from_secs(2), ask(&controller)).await.expect("no delay");
        assert_eq!(asked.unwrap(), "Hello, world");
    }
    assert_eq!((a.counts().requests, b.counts().requests), (0, 4));
    a.listen(true).await;
    for _ in 0..4 {
        ask(&controller).await.unwrap();
    }
    assert!(a.counts().requests > 0);
}

#[tokio::test]
async fn without_a_server_it_does_not_start() {
    let worker = scripted("w", Script::default());
    let config = json!({"nats": {"mode": "external", "serverUrl": "nats://127.0.0.1:1", "connectTimeoutMs": 500}});
    let error = worker.start(&ClusterConfig::from_value(config).unwrap().nats).await.unwrap_err();
    assert_eq!((error.code(), worker.state()), (Code::NatsError, ScriptedState::Stopped));
}
