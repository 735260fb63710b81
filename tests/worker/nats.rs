//! Over a real nats-server.

use std::time::Duration;

use mlx_serving_router::config::{NatsMode, ServerUrls};
use mlx_serving_router::transport::mailbox;
use mlx_serving_router::wire::{Phase, Reply, WorkerId};
use mlx_serving_router::worker::WorkerState;
use serde_json::{Value, json};

use super::fleet::{Fleet, message};
use super::server::Server;
use super::{PATIENCE, accepted, error, finish, reply, request, silent};

/// A server of its own, or the end of the test where none can be had.
macro_rules! server {
    () => {
        match Server::start().await {
            Some(server) => server,
            None => return,
        }
    };
}

#[tokio::test]
async fn a_worker_appears_serves_and_goes() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.worker("w", 2, 4);
    let starting = tokio::spawn({
        let worker = worker.clone();
        async move { worker.start(None).await }
    });
    assert!(tokio::time::timeout(Duration::from_millis(100), fleet.registrations.next()).await.is_err(), "not ready yet");
    worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
    starting.await.unwrap().unwrap();
    let registration = message(&mut fleet.registrations).await;
    for (key, value) in [
        ("protocol", json!(1)),
        ("workerId", json!("w")),
        ("incarnation", json!(worker.incarnation())),
        ("status", json!("online")),
        ("features", json!(["cancel"])),
        ("ip", json!("127.0.0.1")),
    ] {
        assert_eq!(registration[key], value, "{key}");
    }
    assert_eq!(registration["skills"]["availableModels"], json!(["tiny"]));
    assert_eq!((&registration["capacity"]["maxConcurrent"], &registration["capacity"]["maxQueue"]), (&json!(2), &json!(4)));
    let heartbeat = message(&mut fleet.heartbeats).await;
    assert_eq!((&heartbeat["sequence"], &heartbeat["phase"], &heartbeat["queueDepth"]), (&json!(1), &json!("ready"), &json!(0)));
    assert_eq!(heartbeat["metrics"]["modelsLoaded"], json!(["tiny"]));
    assert!(heartbeat["metrics"]["memoryUsedGB"].as_f64().unwrap() > 0.0);

    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    assert_eq!(accepted(&mut mailbox).await, 0);
    let job = tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap();
    job.token("Hel", &[1], None);
    assert!(matches!(reply(&mut mailbox).await, Reply::Token(token) if token.index == 0 && token.text == "Hel"));
    worker.jobs().hold(vec!["00000000000000ff".into()]);
    assert!(tokio::time::timeout(Duration::from_millis(50), fleet.heartbeats.next()).await.is_err(), "it can wait");
    worker.jobs().report(Phase::Loading, vec!["tiny".into()], vec!["tiny".into()]);
    let heartbeat = message(&mut fleet.heartbeats).await;
    assert_eq!(heartbeat["cachedPrefixes"], json!(["00000000000000ff"]));
    assert_eq!((&heartbeat["sequence"], &heartbeat["phase"]), (&json!(2), &json!("loading")));
    assert_eq!((&heartbeat["activeRequestIds"], &heartbeat["loadingModels"]), (&json!(["r"]), &json!(["tiny"])));

    let stopping = tokio::spawn({
        let worker = worker.clone();
        async move { worker.stop(Duration::from_secs(30)).await }
    });
    assert_eq!(message(&mut fleet.deregistrations).await["workerId"], "w");
    let heartbeat = message(&mut fleet.heartbeats).await;
    assert_eq!((&heartbeat["status"], &heartbeat["phase"]), (&json!("draining"), &json!("draining")));
    assert_eq!(error(&mut fleet.ask(&worker, request("late", true)).await).await.0, "WORKER_OVERLOADED");
    job.done(finish(), None);
    assert!(matches!(reply(&mut mailbox).await, Reply::Done(done) if done.usage.completion_tokens == 1));
    stopping.await.unwrap();
    let last = message(&mut fleet.heartbeats).await;
    assert_eq!((&last["status"], &last["activeRequestIds"]), (&json!("draining"), &json!([])));
    let mut nobody = fleet.ask(&worker, request("later", true)).await;
    assert!(matches!(nobody.recv().await, Some(mlx_serving_router::transport::Delivery::Failed(_))), "nobody listens");
}

#[tokio::test]
async fn a_cancellation_and_a_body_that_is_none_are_answered() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.started("w").await;
    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut mailbox).await;
    let job = tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap();
    fleet.say("cancel.w", json!({"requestId": "r", "attempt": 2})).await;
    assert!(silent(&mut mailbox).await);
    fleet.cancel(worker.id(), "r", &mailbox);
    assert_eq!(error(&mut mailbox).await.0, "CANCELLED");
    assert!(job.cancelled().is_cancelled());

    let mut unknown = request("a", true);
    unknown.model_id = "huge".into();
    assert_eq!(error(&mut fleet.ask(&worker, unknown).await).await.0, "MODEL_NOT_FOUND");
    let raw = async_nats::connect(server.url()).await.unwrap();
    for body in ["", "nonsense", "[]", r#"{"requestId": "r", "prompt": "x"}"#, r#"{"modelId": "tiny", "requestId": "r"}"#] {
        let answer = raw.request("p.inference.w", body.into()).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!("REQUEST_VALIDATION_FAILED")), "{body}");
    }
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn an_answer_too_long_for_one_message_comes_in_pieces() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.started("w").await;
    let mut mailbox = fleet.ask(&worker, request("r", false)).await;
    accepted(&mut mailbox).await;
    let job = tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap();
    let text = "ä\u{1}".repeat(700_000);
    job.token(&text, &[1, 2, 3], None);
    job.done(finish(), None);
    let (mut received, mut next) = (String::new(), 0);
    loop {
        match reply(&mut mailbox).await {
            Reply::Token(token) => {
                assert_eq!(token.index, next);
                next += 1;
                received.push_str(&token.text);
            }
            Reply::Done(done) => break assert_eq!(done.usage.completion_tokens, 3),
            other => panic!("{other:?}"),
        }
    }
    assert!(received == text, "{} bytes of {}", received.len(), text.len());
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn hello_and_reregister_are_answered_with_a_registration() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 60_000).await;
    let worker = fleet.started("w").await;
    let hello = json!({"controllerId": "c2", "heartbeatIntervalMs": 5000, "timestamp": 1});
    for (subject, body) in [("controller.hello", hello), ("worker.w.reregister", Value::Null)] {
        fleet.say(subject, body).await;
        let registration = message(&mut fleet.registrations).await;
        assert_eq!(registration["incarnation"], worker.incarnation(), "{subject}");
    }
    assert_eq!(worker.state(), WorkerState::Ready, "its own registrations do not supersede it");
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn the_requests_of_a_controller_that_fell_silent_are_cancelled() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.started("w").await;
    let beat = json!({"controllerId": "c", "heartbeatIntervalMs": 100, "timestamp": 1});
    fleet.say("controller.heartbeat", beat).await;
    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut mailbox).await;
    assert_eq!(error(&mut mailbox).await.0, "CANCELLED");
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn of_two_workers_of_one_name_the_newer_stays() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let old = fleet.started("w").await;
    let mut mailbox = fleet.ask(&old, request("r", true)).await;
    accepted(&mut mailbox).await;
    let _job = tokio::time::timeout(PATIENCE, old.jobs().next()).await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await; // beyond the time in which two may have crossed
    let new = fleet.started("w").await;
    let why = tokio::time::timeout(PATIENCE, old.wait()).await.expect("the old one gives way").unwrap_err();
    assert_eq!(why.context()["supersededBy"], new.incarnation());
    assert!(why.message().contains("worker_id"), "{why}");
    assert_eq!(error(&mut mailbox).await.0, "WORKER_UNAVAILABLE");
    let deregistered = tokio::time::timeout(Duration::from_millis(100), fleet.deregistrations.next()).await;
    assert!(deregistered.is_err(), "a deregistration would take the new one out");
    let mut mailbox = fleet.ask(&new, request("r2", true)).await;
    accepted(&mut mailbox).await;
    assert!(silent(&mut mailbox).await);
    new.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_worker_outlives_its_server_and_its_answer_goes_out_afterwards() {
    let Some((staying, leaving)) = Server::start_two().await else { return };
    let mut fleet = Fleet::of(&staying, 60_000).await;
    // Until the two servers know of each other's clients.
    let probe = async_nats::connect(leaving.url()).await.unwrap();
    let mut probed = fleet.connection.subscribe("probe".into()).await.unwrap();
    while tokio::time::timeout(Duration::from_millis(20), probed.next()).await.is_err() {
        probe.publish("probe", "".into()).await.unwrap();
    }
    fleet.config.nats.server_url = ServerUrls::One(leaving.url());
    let worker = fleet.started("w").await;
    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut mailbox).await;
    let job = tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap();
    job.token("x", &[0], None);
    assert!(matches!(reply(&mut mailbox).await, Reply::Token(token) if token.index == 0));
    drop(leaving);
    let again = message(&mut fleet.registrations).await;
    assert_eq!(again["incarnation"], worker.incarnation(), "it registers again by itself");
    for number in 1..100 {
        job.token("x", &[number], None);
    }
    job.done(finish(), None);
    let mut next = 1;
    loop {
        match reply(&mut mailbox).await {
            Reply::Token(token) => {
                assert_eq!(token.index, next);
                next += token.width();
            }
            Reply::Done(done) => break assert_eq!((next, done.usage.completion_tokens), (100, 100)),
            other => panic!("{other:?}"),
        }
    }
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_cancellation_while_the_connection_is_down_is_told_afterwards() {
    let Some((staying, leaving)) = Server::start_two().await else { return };
    let mut fleet = Fleet::of(&leaving, 60_000).await;
    // Until the two servers know of each other's clients.
    let probe = async_nats::connect(staying.url()).await.unwrap();
    let mut probed = fleet.connection.subscribe("probe".into()).await.unwrap();
    while tokio::time::timeout(Duration::from_millis(20), probed.next()).await.is_err() {
        probe.publish("probe", "".into()).await.unwrap();
    }
    fleet.config.nats.server_url = ServerUrls::One(staying.url());
    let worker = fleet.started("w").await;
    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut mailbox).await;
    let job = tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap();
    let mut link = fleet.connection.link();
    drop(leaving);
    link.wait_for(|link| !link.connected).await.unwrap();
    fleet.cancel(worker.id(), "r", &mailbox);
    tokio::time::timeout(PATIENCE, job.cancelled().cancelled()).await.expect("the worker hears of it");
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_cancellation_that_nobody_heard_is_sent_again_and_one_that_was_heard_is_not() {
    let server = server!();
    let fleet = Fleet::of(&server, 60_000).await;
    let id = WorkerId::new("w").unwrap();
    fleet.cancel(&id, "r", &mailbox().1);
    // A round trip later the server has dropped it.
    fleet.connection.flush().await.unwrap();
    let mut cancels = fleet.connection.subscribe("p.cancel.w".into()).await.unwrap();
    assert_eq!(message(&mut cancels).await, json!({"requestId": "r", "attempt": 1}));
    assert!(tokio::time::timeout(Duration::from_millis(200), cancels.next()).await.is_err());
}

#[tokio::test]
async fn a_cancellation_strikes_no_other_request_of_its_name() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.started("w").await;
    let mut first = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut first).await;
    let mut second = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut second).await;
    fleet.cancel(worker.id(), "r", &first);
    assert_eq!(error(&mut first).await.0, "CANCELLED");
    assert!(silent(&mut second).await);
    // The same once more, where the one that it means is over.
    fleet.cancel(worker.id(), "r", &first);
    assert!(silent(&mut second).await);
    let mut third = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut third).await;
    fleet.cancel(worker.id(), "r", &third);
    assert_eq!(error(&mut third).await.0, "CANCELLED");
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn standard_tools_find_it() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.started("w").await;
    let mut mailbox = fleet.ask(&worker, request("r", true)).await;
    accepted(&mut mailbox).await;
    tokio::time::timeout(PATIENCE, worker.jobs().next()).await.unwrap().unwrap().done(finish(), None);
    assert!(matches!(reply(&mut mailbox).await, Reply::Done(_)));
    let raw = async_nats::connect(server.url()).await.unwrap();
    let ask = async |subject: &str| -> Value {
        serde_json::from_slice(&raw.request(subject.to_owned(), "".into()).await.unwrap().payload).unwrap()
    };
    assert_eq!(ask("$SRV.PING").await["name"], "mlx-worker");
    let info = ask("$SRV.INFO.mlx-worker").await;
    assert_eq!((&info["metadata"]["workerId"], &info["endpoints"][0]["subject"]), (&json!("w"), &json!("p.inference.w")));
    let stats = ask("$SRV.STATS.mlx-worker").await;
    assert_eq!(stats["endpoints"][0]["num_requests"], 1);
    assert_eq!(stats["endpoints"][0]["data"]["totalRequestsHandled"], 1);
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_start_that_fails_says_what_to_do_and_leaves_nothing() {
    let server = server!();
    let mut fleet = Fleet::of(&server, 5000).await;
    let worker = fleet.worker("w", 1, 1);
    worker.jobs().engine_ended(Some("no such model".into()));
    assert_eq!(worker.start(None).await.unwrap_err().code().as_str(), "MODEL_LOAD_FAILED");
    assert_eq!(worker.state(), WorkerState::Stopped);
    fleet.config.nats.mode = NatsMode::None;
    let error = fleet.worker("w", 1, 1).start(None).await.unwrap_err();
    assert!(error.message().contains("nats.mode"), "{error}");
    fleet.config.nats.mode = NatsMode::Embedded;
    fleet.config.nats.embedded.port = 0;
    let error = fleet.worker("w", 1, 1).start(None).await.unwrap_err();
    assert!(error.message().contains("nats.embedded.port"), "{error}");
    assert!(tokio::time::timeout(Duration::from_millis(50), fleet.registrations.next()).await.is_err());
}
