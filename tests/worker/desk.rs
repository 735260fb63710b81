//! Order, places, deadlines and ends, in paused time.

use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::wire::{Json, Phase, Priority, Reply, Usage};
use mlx_serving_router::worker::{Worker, WorkerState};

use super::{Local, accepted, error, finish, options, reply, request, silent};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn a_stream_is_accepted_then_counted_then_done() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    assert_eq!(accepted(&mut mailbox).await, 0);
    let job = local.job().await;
    assert_eq!((job.attempt(), job.request().request_id.as_str()), (1, "r"));
    job.token("Hel", &[1], None);
    job.token("", &[2, 3], None);
    job.token("lo", &[4], None);
    job.done(finish(), None);
    let mut indexes = Vec::new();
    let done = loop {
        match reply(&mut mailbox).await {
            Reply::Token(token) => indexes.push((token.index, token.text, token.token_ids.len())),
            Reply::Done(done) => break done,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(indexes, [(0, "Hel".into(), 1), (1, String::new(), 2), (3, "lo".into(), 1)]);
    assert_eq!(done.usage, Usage { completion_tokens: 4, ..Usage::default() });
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_one_piece_is_gathered_with_its_log_probabilities() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask(request("r", false), 1, MINUTE).await;
    accepted(&mut mailbox).await;
    let job = local.job().await;
    let logprobs = |token: &str| Json::from_text(format!(r#"{{"content":[{{"token":"{token}"}}],"refusal":null}}"#)).ok();
    job.token("Hel", &[1], logprobs("Hel"));
    job.token("lo", &[2], logprobs("lo"));
    job.done(finish(), None);
    match reply(&mut mailbox).await {
        Reply::Response { text, finish, logprobs } => {
            assert_eq!((text.as_str(), finish.usage.completion_tokens), ("Hello", 2));
            let both = Json::from_text(r#"{"content":[{"token":"Hel"},{"token":"lo"}],"refusal":null}"#.into()).ok();
            assert_eq!(logprobs, both);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn priority_goes_first_then_arrival_and_no_more_than_allowed_are_out() {
    let local = Local::start(2, 8).await;
    let mut mailboxes = Vec::new();
    for (id, priority) in
        [("a", Priority::Low), ("b", Priority::Low), ("c", Priority::Normal), ("d", Priority::High), ("e", Priority::Normal)]
    {
        let mut request = request(id, true);
        request.priority = priority;
        mailboxes.push(local.ask(request, 1, MINUTE).await);
        accepted(mailboxes.last_mut().unwrap()).await;
    }
    let mut out = Vec::new();
    let mut order = Vec::new();
    for _ in 0..5 {
        if out.len() == 2 {
            let next = tokio::time::timeout(Duration::from_secs(1), local.worker.jobs().next()).await;
            assert!(next.is_err(), "a third one was handed out");
            out.clear();
        }
        let job = local.job().await;
        order.push(job.request().request_id.clone());
        out.push(job);
    }
    assert_eq!(order, ["d", "c", "e", "a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_full_worker_refuses_and_says_when_to_come_back() {
    let local = Local::start(1, 1).await;
    let mut first = local.ask_stream("a").await;
    let mut second = local.ask_stream("b").await;
    assert_eq!((accepted(&mut first).await, accepted(&mut second).await), (0, 1));
    let job = local.job().await;
    let (code, retry) = error(&mut local.ask_stream("c").await).await;
    assert_eq!((code.as_str(), retry), ("WORKER_OVERLOADED", Some(500)));
    tokio::time::advance(Duration::from_secs(4)).await;
    job.done(finish(), None);
    let mut third = local.ask_stream("c").await;
    assert_eq!(accepted(&mut third).await, 1);
    let (_, retry) = error(&mut local.ask_stream("d").await).await;
    assert_eq!(retry, Some(4000), "as long as the last one took");
}

#[tokio::test(start_paused = true)]
async fn the_same_attempt_twice_is_answered_once() {
    let local = Local::start(2, 4).await;
    let mut first = local.ask_stream("r").await;
    let mut again = local.ask_stream("r").await;
    let mut next_attempt = local.ask(request("r", true), 2, MINUTE).await;
    accepted(&mut first).await;
    accepted(&mut next_attempt).await;
    assert!(again.recv().await.is_none(), "the repeated one has no answer");
    let job = local.job().await;
    job.token("x", &[1], None);
    assert!(matches!(reply(&mut first).await, Reply::Token(_)));
}

#[tokio::test(start_paused = true)]
async fn bad_requests_are_refused_with_the_code_that_says_why() {
    let local = Local::start(1, 4).await;
    let mut unknown = request("a", true);
    unknown.model_id = "huge".into();
    assert_eq!(error(&mut local.ask(unknown, 1, MINUTE).await).await.0, "MODEL_NOT_FOUND");
    let mut empty = request("b", true);
    empty.prompt = None;
    assert_eq!(error(&mut local.ask(empty, 1, MINUTE).await).await.0, "REQUEST_VALIDATION_FAILED");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_queued_and_the_running_and_frees_their_places() {
    let local = Local::start(1, 1).await;
    let mut running = local.ask(request("a", true), 1, Duration::from_secs(2)).await;
    let mut queued = local.ask(request("b", true), 1, Duration::from_secs(1)).await;
    accepted(&mut running).await;
    accepted(&mut queued).await;
    let engine = local.worker.jobs();
    let job = engine.get(Some(Duration::ZERO)).unwrap();
    let start = tokio::time::Instant::now();
    assert_eq!(error(&mut queued).await.0, "WORKER_TIMEOUT");
    assert_eq!(start.elapsed().as_secs(), 1);
    assert!(!job.cancelled().is_cancelled());
    assert_eq!(error(&mut running).await.0, "WORKER_TIMEOUT");
    assert_eq!(start.elapsed().as_secs(), 2);
    assert!(job.cancelled().is_cancelled());
    let mut next = local.ask_stream("c").await;
    accepted(&mut next).await;
    let next = engine.get(Some(Duration::ZERO)).unwrap();
    assert_eq!(next.request().request_id, "c", "the place is free although the engine holds on");
    job.token("late", &[1], None);
    job.done(finish(), None);
    drop(job);
    assert!(running.recv().await.is_none(), "nothing follows the end");
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_ends_it_at_once_and_the_engine_is_told() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    accepted(&mut mailbox).await;
    let job = local.job().await;
    local.cancel("r", 2);
    assert!(silent(&mut mailbox).await, "another attempt was meant");
    local.cancel("r", 1);
    assert_eq!(error(&mut mailbox).await.0, "CANCELLED");
    assert!(job.cancelled().is_cancelled());
    job.error("WORKER_UNAVAILABLE", "late", None);
    drop(job);
    assert!(mailbox.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_to_a_task_keeps_its_place_until_the_task_lets_go() {
    let local = Local::start(1, 4).await;
    let _mailboxes = [local.ask_stream("a").await, local.ask_stream("b").await, local.ask_stream("c").await];
    let jobs = local.worker.jobs();
    let a = local.job().await;
    local.cancel("a", 1);
    a.cancelled().cancelled().await;
    assert!(tokio::time::timeout(Duration::from_secs(1), jobs.next()).await.is_err(), "it is still being worked on");
    a.let_go();
    let b = local.job().await;
    drop(a);
    assert!(jobs.get(Some(Duration::ZERO)).is_none(), "a place was given back twice");
    drop(b);
    assert_eq!(jobs.get(Some(Duration::ZERO)).unwrap().request().request_id, "c");
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_that_overtook_its_request_strikes_it() {
    let local = Local::start(1, 4).await;
    local.ask_stream("other").await;
    local.cancel("r", 1);
    assert_eq!(error(&mut local.ask_stream("r").await).await.0, "CANCELLED");
    let mut again = local.ask_stream("r").await;
    accepted(&mut again).await;
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_dropped_is_answered() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    accepted(&mut mailbox).await;
    drop(local.job().await);
    assert_eq!(error(&mut mailbox).await.0, "WORKER_UNAVAILABLE");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_loses_nothing_and_the_engine_can_wait_for_it() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    let job = local.job().await;
    let mut sent = 0_u64;
    while job.has_room() {
        job.token("x", &[], None);
        sent += 1;
    }
    assert!(sent > 1024, "more than its mailbox holds");
    accepted(&mut mailbox).await;
    let mut next = 0;
    while next < 1500 {
        if let Reply::Token(token) = reply(&mut mailbox).await {
            assert_eq!(token.index, next);
            next += 1;
        }
    }
    tokio::time::timeout(Duration::from_secs(1), job.room()).await.expect("there is room again");
    job.done(finish(), None);
    loop {
        match reply(&mut mailbox).await {
            Reply::Token(token) => {
                assert_eq!(token.index, next);
                next += 1;
            }
            Reply::Done(done) => break assert_eq!((next, done.usage.completion_tokens), (sent, sent)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn pieces_with_token_ids_grow_together_while_their_reader_is_slow() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    let job = local.job().await;
    for number in 0..5000 {
        assert!(job.has_room());
        job.token("x", &[number], None);
    }
    job.done(finish(), None);
    accepted(&mut mailbox).await;
    let (mut messages, mut ids, mut text) = (0, Vec::new(), String::new());
    loop {
        match reply(&mut mailbox).await {
            Reply::Token(token) => {
                assert_eq!(token.index, ids.len() as u64);
                messages += 1;
                text.push_str(&token.text);
                ids.extend(token.token_ids);
            }
            Reply::Done(done) => break assert_eq!(done.usage.completion_tokens, 5000),
            other => panic!("{other:?}"),
        }
    }
    assert!(messages < 1100, "{messages} messages");
    assert_eq!((text.len(), ids), (5000, (0..5000).collect()));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_never_waits_for_a_reader_that_never_reads_loses_the_job_alone() {
    let local = Local::start(2, 4).await;
    let mut mailbox = local.ask_stream("r").await;
    let mut other = local.ask_stream("other").await;
    let (job, second) = (local.job().await, local.job().await);
    for _ in 0..100_000 {
        job.token("x", &[], None);
    }
    assert!(job.cancelled().is_cancelled());
    second.done(finish(), None);
    accepted(&mut other).await;
    assert!(matches!(reply(&mut other).await, Reply::Done(_)));
    let end = loop {
        match reply(&mut mailbox).await {
            Reply::Error { code, .. } => break code,
            Reply::Done(_) => panic!("a truncated answer that looks complete"),
            _ => {}
        }
    };
    assert_eq!(end.as_deref(), Some("WORKER_UNAVAILABLE"));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_went_away_is_noticed_at_the_next_token() {
    let local = Local::start(1, 4).await;
    let mailbox = local.ask_stream("r").await;
    let job = local.job().await;
    drop(mailbox);
    job.token("x", &[1], None);
    assert!(job.cancelled().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_it_can_refuses_the_new_and_ends_the_rest() {
    let local = Local::start(1, 4).await;
    let (mut done, mut cut) = (local.ask_stream("a").await, local.ask_stream("b").await);
    accepted(&mut done).await;
    accepted(&mut cut).await;
    let job = local.job().await;
    let worker = local.worker.clone();
    let stopping = tokio::spawn(async move { worker.stop(Duration::from_secs(5)).await });
    while local.worker.state() != WorkerState::Draining {
        tokio::task::yield_now().await;
    }
    let (code, retry) = error(&mut local.ask_stream("late").await).await;
    assert_eq!((code.as_str(), retry), ("WORKER_OVERLOADED", Some(5000)));
    job.done(finish(), None);
    assert!(matches!(reply(&mut done).await, Reply::Done(_)));
    let second = local.job().await;
    assert!(!local.worker.jobs().closed());
    assert_eq!(error(&mut cut).await.0, "WORKER_UNAVAILABLE");
    assert!(second.cancelled().is_cancelled());
    stopping.await.unwrap();
    assert_eq!(local.worker.state(), WorkerState::Stopped);
    assert!(local.worker.jobs().closed() && local.worker.jobs().next().await.is_none());
    assert!(local.worker.wait().await.is_ok());
    local.worker.stop(Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn a_second_stop_shortens_the_first() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("a").await;
    let _job = local.job().await;
    let worker = local.worker.clone();
    let slow = tokio::spawn(async move { worker.stop(Duration::from_secs(3600)).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let start = tokio::time::Instant::now();
    local.worker.stop(Duration::ZERO).await;
    slow.await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    accepted(&mut mailbox).await;
    assert_eq!(error(&mut mailbox).await.0, "WORKER_UNAVAILABLE");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_ends_takes_its_worker_with_it() {
    let local = Local::start(1, 4).await;
    let mut mailbox = local.ask_stream("a").await;
    accepted(&mut mailbox).await;
    local.worker.jobs().engine_ended(Some("out of memory".into()));
    assert_eq!(error(&mut mailbox).await.0, "WORKER_UNAVAILABLE");
    let why = local.worker.wait().await.unwrap_err();
    assert_eq!(why.code().as_str(), "WORKER_UNAVAILABLE");
    assert!(why.message().contains("out of memory"));
}

#[tokio::test(start_paused = true)]
async fn a_controller_that_goes_ends_its_local_worker() {
    let local = Local::start(1, 4).await;
    let _mailbox = local.ask_stream("a").await;
    let job = local.job().await;
    local.hub.close();
    assert!(local.worker.wait().await.is_ok());
    assert!(job.cancelled().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_start_waits_for_the_engine_and_a_stop_ends_it() {
    let worker = Worker::new(options("w", 1, 1), &ClusterConfig::default()).unwrap();
    let hub = mlx_serving_router::transport::LocalHub::new("c".into());
    let start = worker.start_local(hub.attach(worker.id()).unwrap());
    let (started, ()) = tokio::join!(start, async {
        tokio::time::sleep(MINUTE).await;
        assert_eq!(worker.state(), WorkerState::Starting);
        worker.jobs().report(Phase::Loading, Vec::new(), vec!["tiny".into()]);
        worker.stop(Duration::ZERO).await;
    });
    assert_eq!(started.unwrap_err().code().as_str(), "CONTROLLER_NOT_READY");
    assert_eq!(worker.state(), WorkerState::Stopped);
    assert!(hub.attach(worker.id()).is_some(), "the port is free again");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_cannot_load_fails_the_start_in_its_own_words() {
    let worker = Worker::new(options("w", 1, 1), &ClusterConfig::default()).unwrap();
    let hub = mlx_serving_router::transport::LocalHub::new("c".into());
    worker.jobs().engine_ended(Some("no such model".into()));
    let error = worker.start_local(hub.attach(worker.id()).unwrap()).await.unwrap_err();
    assert_eq!(error.code().as_str(), "MODEL_LOAD_FAILED");
    assert!(error.message().contains("no such model"));
    let again = worker.start_local(hub.attach(worker.id()).unwrap()).await.unwrap_err();
    assert_eq!(again.code().as_str(), "CONTROLLER_NOT_READY");
    assert_eq!(worker.wait().await.unwrap_err().code().as_str(), "MODEL_LOAD_FAILED");
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_dropped_leaves_nothing() {
    let worker = Worker::new(options("w", 1, 1), &ClusterConfig::default()).unwrap();
    let hub = mlx_serving_router::transport::LocalHub::new("c".into());
    let start = worker.start_local(hub.attach(worker.id()).unwrap());
    assert!(tokio::time::timeout(Duration::from_secs(1), start).await.is_err());
    assert_eq!(worker.state(), WorkerState::Stopped);
    assert!(hub.attach(worker.id()).is_some());
}

#[test]
fn a_worker_has_models_a_name_and_an_incarnation_of_its_own() {
    let config = ClusterConfig::default();
    let mut nothing = options("w", 1, 1);
    nothing.models.clear();
    assert_eq!(Worker::new(nothing, &config).unwrap_err().context()["field"], "models");
    let mut unnamed = options("w", 1, 1);
    unnamed.worker_id = None;
    let (one, two) = (Worker::new(unnamed.clone(), &config).unwrap(), Worker::new(unnamed, &config).unwrap());
    assert_ne!(one.id(), two.id());
    assert_ne!(one.incarnation(), two.incarnation());
    assert_eq!(one.registration().protocol, Some(1));
}

#[test]
fn a_thread_waits_for_jobs_with_and_without_a_limit() {
    let worker = Worker::new(options("w", 1, 1), &ClusterConfig::default()).unwrap();
    let jobs = worker.jobs();
    assert!(jobs.get(Some(Duration::ZERO)).is_none());
    assert!(jobs.get(Some(Duration::from_millis(5))).is_none());
    let engine = std::thread::spawn({
        let jobs = jobs.clone();
        move || jobs.get(None).is_none()
    });
    worker.begin_stop(Duration::ZERO);
    assert!(engine.join().unwrap(), "a queue that closes wakes its engine");
    assert!(jobs.closed());
}
