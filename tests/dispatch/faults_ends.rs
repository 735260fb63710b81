//! Cases of the fault catalogue about how answers and workers end: 5, 7, 10, 32, 33, 35, 36.

use std::sync::atomic::{AtomicUsize, Ordering};

use mlx_serving_router::routing::{Carrier, Registered};
use tokio::time::Instant;

use super::*;

fn registers(controller: &Controller, incarnation: &str) -> Registered {
    let registration = Registration { incarnation: incarnation.into(), ..registration("w", &["m"], 0) };
    controller.router().register(&registration, Carrier::Nats, Instant::now())
}

/// What was told until the controller has stopped.
async fn told(controller: &Controller, mut events: mlx_serving_router::dispatch::Events) -> Vec<(&'static str, Value)> {
    controller.stop(Duration::ZERO).await;
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        told.push((event.kind, Value::Object(event.details)));
    }
    told
}

#[tokio::test(start_paused = true)]
async fn case_05_what_a_worker_says_after_the_retry_reaches_nobody() {
    let controller = controller(json!({"streamingTimeoutMs": 100})).await;
    let late = worker(&controller, "w0", &[Accept, Wait(150), Say("late"), Say("later"), Done]);
    worker(&controller, "w1", &[Accept, Wait(40), Say("in "), Wait(40), Say("time"), Done]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "in time");
    late.cancelled(1).await;
    let answer = stream.response().unwrap();
    assert_eq!((answer.worker_id.as_str(), answer.metadata.tokens, late.asked()), ("w1", 2, 1));
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_07_what_comes_before_the_caller_looks_is_not_lost() {
    let controller = controller(json!({})).await;
    let script: Vec<_> = [Accept].into_iter().chain((0..500).map(|_| Say("x"))).chain([Done]).collect();
    worker(&controller, "w", &script);
    let mut stream = streaming(&controller).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    assert_eq!(read(&mut stream).await.unwrap().len(), 500);
    assert_eq!(buffered(&controller).await.unwrap().text.len(), 500);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_10_what_cannot_be_read_fails_its_request_alone() {
    let controller = controller(json!({"retry": {"enabled": false}})).await;
    let mut port = controller.attach_local(&registration("w", &["m"], 0)).unwrap();
    let cancelled = Arc::<AtomicUsize>::default();
    let count = cancelled.clone();
    tokio::spawn(async move {
        let (leave, _leaving) = tokio::sync::mpsc::channel(1);
        while let Some(message) = port.recv().await {
            match message {
                LocalMessage::Request { request, postbox, .. } if request.request_id == "bad" => {
                    let error = ControllerError::new(Code::WorkerUnavailable, "no reply").with("protocolError", "no JSON");
                    postbox.post(Delivery::Failed(error));
                }
                LocalMessage::Request { postbox, .. } => {
                    tokio::spawn(perform(vec![Say("a"), Wait(100), Say("b"), Done], postbox, leave.clone()));
                }
                LocalMessage::Cancel { request_id, .. } => {
                    assert_eq!(request_id, "bad");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    let mut stream = streaming(&controller).await.unwrap();
    let error = controller.buffered(named("bad"), CallOptions::default()).await.unwrap_err();
    assert_eq!((error.code(), error.context()["protocolError"].as_str()), (Code::WorkerUnavailable, Some("no JSON")));
    assert_eq!(read(&mut stream).await.unwrap(), "ab");
    assert_eq!(cancelled.load(Ordering::Relaxed), 1);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn cases_32_and_33_of_two_lives_of_one_name_the_newer_one_wins_and_an_event_tells() {
    let controller = controller(json!({"retry": {"enabled": false}})).await;
    let events = controller.events();
    let worker = worker(&controller, "w", &[Accept, Wait(1_000), Respond("old")]);
    let renewed = async {
        sleep(Duration::from_millis(100)).await;
        worker.now_does(&[Respond("new")]);
        assert_eq!(registers(&controller, "w-2"), Registered::Replaced);
    };
    let started = Instant::now();
    let (old, ()) = tokio::join!(buffered(&controller), renewed);
    // What ran on the former life is over at once, and its breaker with it.
    assert_eq!((old.unwrap_err().code(), started.elapsed()), (Code::WorkerOffline, Duration::from_millis(100)));
    worker.cancelled(1).await;
    assert_eq!(buffered(&controller).await.unwrap().text, "new");
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
    // Two hosts with one name: the former one registers again, and is not heard.
    assert!(matches!(registers(&controller, "w-1"), Registered::Ignored(_)));
    assert_eq!(controller.worker("w").unwrap().incarnation, "w-2");
    let told = told(&controller, events).await;
    assert_eq!(told.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), ["worker_registered", "worker_replaced"]);
    assert_eq!(told[1].1, json!({"incarnation": "w-2", "previous": "w-1"}));
}

#[tokio::test(start_paused = true)]
async fn case_35_a_drained_worker_finishes_a_hundred_streams_and_gets_nothing_new() {
    let controller = controller(json!({})).await;
    let draining = worker(&controller, "w0", &[Accept, Say("a"), Wait(20_000), Say("b"), Done]);
    let mut streams = Vec::new();
    for number in 0..100 {
        streams.push(controller.streaming(named(&format!("r{number}")), CallOptions::default()).await.unwrap());
    }
    let other = worker(&controller, "w1", &[Respond("new")]);
    assert!(controller.drain_worker("w0"));
    assert_eq!(controller.worker("w0").unwrap().status, WorkerStatus::Draining);
    for _ in 0..20 {
        assert_eq!(buffered(&controller).await.unwrap().worker_id, other.id);
    }
    let options = CallOptions { worker_id: Some("w0".into()), ..CallOptions::default() };
    assert_eq!(controller.buffered(request(), options).await.unwrap_err().code(), Code::WorkerOffline);
    let texts = futures_util::future::join_all(streams.iter_mut().map(read)).await;
    assert!(texts.iter().all(|text| text.as_ref().unwrap() == "ab"));
    assert_eq!((draining.asked(), draining.cancellations()), (100, 0));
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_36_a_stream_of_a_worker_that_deregisters_comes_to_its_end() {
    let controller = controller(json!({})).await;
    let events = controller.events();
    let worker = worker(&controller, "w", &[Accept, Say("a"), Wait(5_000), Say("b"), Done]);
    let mut stream = streaming(&controller).await.unwrap();
    controller.router().deregister(&worker.id, Instant::now());
    assert_eq!(buffered_other(&controller).await, Code::NoWorkersAvailable);
    assert_eq!(read(&mut stream).await.unwrap(), "ab");
    sleep(Duration::from_millis(200)).await;
    assert_eq!((controller.workers().len(), worker.cancellations()), (0, 0));
    let told = told(&controller, events).await;
    let kinds: Vec<_> = told.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, ["worker_registered", "worker_draining", "worker_removed"]);
}

async fn buffered_other(controller: &Controller) -> Code {
    controller.buffered(named("other"), CallOptions::default()).await.unwrap_err().code()
}
