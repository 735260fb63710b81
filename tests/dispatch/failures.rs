use super::*;

#[tokio::test(start_paused = true)]
async fn another_worker_is_tried_and_the_failed_one_is_not_asked_again() {
    let controller = controller(json!({})).await;
    let bad = worker(&controller, "w0", &[Accept, Fail("WORKER_UNAVAILABLE")]);
    let good = worker(&controller, "w1", &[Accept, Respond("ok")]);
    let mut events = controller.events();
    let retried = buffered(&controller).await.unwrap();
    assert_eq!((bad.asked(), good.asked(), retried.metadata.retry_count), (1, 1, 1));
    assert_eq!(retried.worker_id.as_str(), "w1");
    assert_eq!(retried.metadata.failed_workers, std::slice::from_ref(&bad.id));
    let attempts: Vec<_> = retried.metadata.attempts.iter().map(|attempt| (attempt.worker_id.as_str(), attempt.code)).collect();
    assert_eq!(attempts, [("w0", Some(Code::WorkerUnavailable)), ("w1", None)]);
    assert_eq!(retried.metadata.attempts[1].left_out[0].reason, "tried");
    assert_eq!(good.last().attempt, 2);
    let event = events.next().await.unwrap();
    assert_eq!((event.kind, event.details["previous"].as_str()), ("failover", Some("w0")));
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_retried_before_its_first_token() {
    let controller = controller(json!({})).await;
    worker(&controller, "w0", &[Accept, Wait(10), Fail("MODEL_LOAD_FAILED")]);
    worker(&controller, "w1", &[Accept, Say("ok"), Done]);
    for id in ["a", "b"] {
        let mut stream = controller.streaming(named(id), CallOptions::default()).await.unwrap();
        assert_eq!(read(&mut stream).await.unwrap(), "ok");
        assert_eq!(stream.worker_id().as_str(), "w1");
    }
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn all_retries_are_used_up() {
    let controller = controller(json!({"retry": {"maxRetries": 2}})).await;
    let workers: Vec<_> = (0..4).map(|n| worker(&controller, &format!("w{n}"), &[Fail("WORKER_UNAVAILABLE")])).collect();
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!(error.code(), Code::AllRetriesExhausted);
    assert_eq!(error.cause().unwrap().code(), Code::WorkerUnavailable);
    assert_eq!(error.context()["attempts"].as_array().unwrap().len(), 3);
    assert_eq!(error.context()["requestId"], "r");
    assert_eq!(workers.iter().map(Scripted::asked).sum::<usize>(), 3);
    let metadata = controller.request_metrics("r").unwrap();
    assert_eq!((metadata.retry_count, metadata.failed_workers.len()), (2, 3));
    assert_eq!(metadata.final_error.unwrap().code, Code::AllRetriesExhausted);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_left_to_try() {
    let controller = controller(json!({})).await;
    worker(&controller, "w0", &[Fail("WORKER_UNAVAILABLE")]);
    worker(&controller, "w1", &[Fail("WORKER_UNAVAILABLE")]);
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!(error.code(), Code::NoWorkersAvailable);
    let count = |key: &str| error.context()[key].as_u64();
    assert_eq!((count("totalWorkers"), count("healthyWorkers"), count("excludedWorkers")), (Some(2), Some(2), Some(2)));
    assert_eq!(error.cause().unwrap().code(), Code::WorkerUnavailable);
}

#[tokio::test(start_paused = true)]
async fn before_the_first_attempt_the_codes_tell_apart() {
    let controller = controller(json!({})).await;
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::NoWorkersAvailable);
    worker(&controller, "w", &[Respond("ok")]);
    let other = InferenceRequest { model_id: "other".into(), ..request() };
    let error = controller.buffered(other, CallOptions::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::ModelNotFound);
    assert!(error.message().contains("served are: m"));
    assert!(controller.force_open_breaker("w"));
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::NoHealthyWorkers);
    let bad = InferenceRequest { max_tokens: Some(-1), ..request() };
    let error = controller.buffered(bad, CallOptions::default()).await.unwrap_err();
    assert_eq!((error.code(), error.context()["field"].as_str()), (Code::RequestValidationFailed, Some("max_tokens")));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_to_be_retried_surfaces_itself() {
    for (routing, script, code) in [
        (json!({"retry": {"enabled": false}}), Fail("WORKER_UNAVAILABLE"), Code::WorkerUnavailable),
        (json!({"retry": {"maxRetries": 0}}), Fail("WORKER_UNAVAILABLE"), Code::WorkerUnavailable),
        (json!({"retry": {"retryOnErrors": ["WORKER_TIMEOUT"]}}), Fail("WORKER_UNAVAILABLE"), Code::WorkerUnavailable),
        (json!({}), Refuse(-1), Code::WorkerOverloaded),
        (json!({}), Fail("REQUEST_VALIDATION_FAILED"), Code::RequestValidationFailed),
        (json!({"retry": {"budgetPercent": 0, "budgetMinPerSecond": 0}}), Fail("WORKER_UNAVAILABLE"), Code::WorkerUnavailable),
    ] {
        let controller = controller(routing).await;
        let workers = [worker(&controller, "w0", std::slice::from_ref(&script)), worker(&controller, "w1", &[script])];
        let error = buffered(&controller).await.unwrap_err();
        assert_eq!(error.code(), code);
        assert_eq!(workers.iter().map(Scripted::asked).sum::<usize>(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_asks_for_a_pause_is_revisited_after_it() {
    let controller = controller(json!({"retry": {"revisitFailedWorkers": true}})).await;
    let worker = worker(&controller, "w", &[Refuse(2_000)]);
    let started = tokio::time::Instant::now();
    let call = async { buffered(&controller).await.unwrap() };
    let heals = async {
        sleep(Duration::from_millis(1_000)).await;
        worker.now_does(&[Respond("ok")]);
    };
    let (answer, ()) = tokio::join!(call, heals);
    assert_eq!((answer.text.as_str(), worker.asked()), ("ok", 2));
    assert!(started.elapsed() >= Duration::from_millis(2_000));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_asks_for_a_pause_gets_one_from_everybody() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Refuse(2_000)]);
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::NoWorkersAvailable);
    worker.now_does(&[Respond("ok")]);
    let started = tokio::time::Instant::now();
    assert_eq!(buffered(&controller).await.unwrap().text, "ok");
    assert!((1_900..2_200).contains(&started.elapsed().as_millis()));
    assert_eq!(worker.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn nobody_listening_costs_no_delay() {
    let controller = controller(json!({"retry": {"retryDelayMs": 60_000, "maxDelayMs": 60_000}})).await;
    worker(&controller, "w0", &[NobodyListens]);
    worker(&controller, "w1", &[Respond("ok")]);
    let started = tokio::time::Instant::now();
    assert_eq!(buffered(&controller).await.unwrap().worker_id.as_str(), "w1");
    assert!(started.elapsed() < Duration::from_millis(50));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_after_tokens_is_interrupted() {
    for script in [vec![Say("a"), Fail("WORKER_UNAVAILABLE")], vec![Say("a"), Wait(5), Leave, Stall]] {
        let controller = controller(json!({"streamFailover": "off"})).await;
        worker(&controller, "w0", &script);
        let mut stream = streaming(&controller).await.unwrap();
        let error = read(&mut stream).await.unwrap_err();
        assert_eq!(error.code(), Code::StreamInterrupted);
        assert_eq!((error.context()["workerId"].as_str(), error.cause().is_some()), (Some("w0"), true));
        assert_eq!(stream.next_batch().await.unwrap_err().code(), Code::StreamInterrupted);
        assert!(stream.response().is_none());
        let metadata = controller.request_metrics("r").unwrap();
        assert_eq!((metadata.retry_count, metadata.final_error.unwrap().code), (0, Code::StreamInterrupted));
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_has_so_many_bytes_at_most() {
    let longest = vec![Say("x".repeat(ANSWER_MOST / 8).leak()); 8];
    let with = |more: &[Act]| [longest.as_slice(), more].concat();
    let controller = controller(json!({"retry": {"maxRetries": 0}})).await;
    let worker = worker(&controller, "w", &with(&[Done]));
    assert_eq!(buffered(&controller).await.unwrap().text.len(), ANSWER_MOST);

    let logprobs = Json::from_value(&json!({"content": []})).ok();
    let token = Token { text: String::new(), index: 8, token_ids: vec![7].into(), logprobs };
    for (more, cancelled) in [(Say("x"), 1), (Post(Reply::Token(token)), 3)] {
        worker.now_does(&with(&[more, Stall]));
        let error = buffered(&controller).await.unwrap_err();
        assert_eq!((error.code(), error.context().contains_key("protocolError")), (Code::WorkerUnavailable, true));
        worker.cancelled(cancelled).await;
        let mut stream = streaming(&controller).await.unwrap();
        assert_eq!(read(&mut stream).await.unwrap_err().code(), Code::StreamInterrupted);
        worker.cancelled(cancelled + 1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn tokens_out_of_order_are_a_protocol_error() {
    let token = |index| Post(Reply::Token(Token { text: "x".into(), index, token_ids: vec![1].into(), logprobs: None }));
    for script in [vec![token(1)], vec![token(0), token(0)], vec![token(0), token(2)], vec![token(0), token(1), token(0)]] {
        let controller = controller(json!({"retry": {"enabled": false}})).await;
        let worker = worker(&controller, "w", &script);
        let error = buffered(&controller).await.unwrap_err();
        assert_eq!(error.code(), Code::WorkerUnavailable);
        assert!(error.context().contains_key("protocolError"));
        worker.cancelled(1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_the_end_changes_nothing() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Accept, Accept, Say("a"), Done, Say("b"), Fail("WORKER_UNAVAILABLE"), Done]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "a");
    assert_eq!(controller.worker("w").unwrap().in_flight, 0);
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
    assert!(controller.metrics_text().contains("mlx_router_dropped_replies_total 1\n"));
}

#[tokio::test(start_paused = true)]
async fn a_breaker_opens_and_recovers() {
    let controller =
        controller(json!({"retry": {"enabled": false}, "circuitBreaker": {"failureThreshold": 3, "timeoutMs": 1000}})).await;
    let worker = worker(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    for _ in 0..3 {
        assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::WorkerUnavailable);
    }
    assert_eq!(controller.request_metrics("r").unwrap().circuit_breaker_trips, 1);
    let refused = buffered(&controller).await.unwrap_err();
    assert_eq!((refused.code(), worker.asked()), (Code::NoHealthyWorkers, 3));
    assert!(refused.retry_after_ms().unwrap() > 0);
    worker.now_does(&[Respond("ok")]);
    sleep(Duration::from_millis(1_300)).await;
    for _ in 0..2 {
        buffered(&controller).await.unwrap();
    }
    assert_eq!(controller.breaker_stats()[0].1.state.as_str(), "CLOSED");
}

#[tokio::test(start_paused = true)]
async fn a_session_moves_when_another_worker_answered() {
    let controller = controller(json!({})).await;
    let workers = [worker(&controller, "w0", &[Respond("ok")]), worker(&controller, "w1", &[Respond("ok")])];
    let asks = || controller.buffered(InferenceRequest { session_id: Some("s".into()), ..request() }, CallOptions::default());
    let own = asks().await.unwrap().worker_id;
    let (first, second) = if own == workers[0].id { (&workers[0], &workers[1]) } else { (&workers[1], &workers[0]) };
    first.now_does(&[Fail("WORKER_UNAVAILABLE")]);
    assert_eq!(asks().await.unwrap().worker_id, second.id);
    first.now_does(&[Respond("ok")]);
    assert_eq!(asks().await.unwrap().worker_id, second.id);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_says_it_is_late_is_not_the_end_of_the_request() {
    let controller = controller(json!({})).await;
    worker(&controller, "w0", &[Accept, Fail("WORKER_TIMEOUT")]);
    worker(&controller, "w1", &[Accept, Say("ok"), Done]);
    let mut stream = controller.streaming(named("a"), CallOptions::default()).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "ok");
    let bounded = CallOptions { timeout: Some(Duration::from_secs(5)), ..CallOptions::default() };
    assert_eq!(controller.buffered(named("b"), bounded).await.unwrap().text, "ok");
    let failures = controller.breaker_stats().iter().map(|(_, stats)| stats.failure_count).sum::<u64>();
    let attempts = |id| controller.request_metrics(id).unwrap().attempts.len() as u64;
    assert_eq!(failures, attempts("a") + attempts("b") - 2);
    assert!(failures > 0);
}

#[tokio::test(start_paused = true)]
async fn that_nobody_is_left_is_told_without_a_delay() {
    let controller = controller(json!({"retry": {"retryDelayMs": 60_000, "maxDelayMs": 60_000}})).await;
    worker(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    let started = tokio::time::Instant::now();
    let bounded = CallOptions { timeout: Some(Duration::from_millis(100)), ..CallOptions::default() };
    let error = controller.buffered(request(), bounded).await.unwrap_err();
    assert_eq!(error.code(), Code::NoWorkersAvailable);
    assert!(started.elapsed() < Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn every_error_names_its_request() {
    let controller = controller(json!({})).await;
    let names = |error: &ControllerError| (error.context()["requestId"].clone(), error.context()["modelId"].clone());
    for bad in [
        InferenceRequest { max_tokens: Some(-1), ..named("r") },
        InferenceRequest { session_id: Some(String::new()), ..named("r") },
        InferenceRequest { model_id: "m".into(), ..named("r") },
    ] {
        let error = controller.buffered(bad, CallOptions::default()).await.unwrap_err();
        assert_eq!(names(&error), (json!("r"), json!("m")));
    }
    controller.stop(Duration::ZERO).await;
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!((error.code(), names(&error)), (Code::ControllerNotReady, (json!("r"), json!("m"))));
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_stream_tells_what_interrupted_it() {
    let controller = controller(json!({"streamFailover": "off"})).await;
    worker(&controller, "w", &[Accept, Say("a"), Stall]);
    let error = read(&mut streaming(&controller).await.unwrap()).await.unwrap_err();
    assert_eq!((error.code(), limit(&error)), (Code::StreamInterrupted, "idle"));
    assert_eq!(error.context()["workerId"], "w");
}

#[tokio::test(start_paused = true)]
async fn a_worker_has_not_failed_where_the_request_did() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[]);
    for (code, failed) in [("PAYLOAD_TOO_LARGE", 0), ("REQUEST_VALIDATION_FAILED", 0), ("MODEL_LOAD_FAILED", 1)] {
        worker.now_does(&[Fail(code)]);
        buffered(&controller).await.unwrap_err();
        let metadata = controller.request_metrics("r").unwrap();
        assert_eq!((metadata.attempts.len(), metadata.failed_workers.len()), (1, failed), "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn turning_to_a_fallback_model_is_a_retry_that_costs_the_budget() {
    let routing = json!({"fallbackModels": {"m": ["small"]}, "retry": {"budgetPercent": 0, "budgetMinPerSecond": 0}});
    let controller = controller(routing).await;
    worker(&controller, "w0", &[Fail("WORKER_UNAVAILABLE")]);
    let small = worker_for(&controller, &registration("w1", &["small"], 0), &[Respond("ok")]);
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!((error.code(), small.asked()), (Code::WorkerUnavailable, 0));
}

#[tokio::test(start_paused = true)]
async fn without_a_budget_the_attempts_own_error_surfaces_whoever_is_left() {
    for workers in 1..=4 {
        let controller = controller(json!({"retry": {"budgetPercent": 0, "budgetMinPerSecond": 0}})).await;
        for number in 0..workers {
            worker(&controller, &format!("w{number}"), &[Fail("WORKER_UNAVAILABLE")]);
        }
        let error = buffered(&controller).await.unwrap_err();
        assert_eq!((error.code(), &error.context()["retryBudgetExhausted"]), (Code::WorkerUnavailable, &json!(true)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_no_longer_serves_a_model_leads_to_the_fallback() {
    let controller = controller(json!({"fallbackModels": {"m": ["small"]}})).await;
    worker(&controller, "w0", &[Fail("MODEL_NOT_FOUND")]);
    worker_for(&controller, &registration("w1", &["small"], 0), &[Respond("ok")]);
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((&*answer.model_id, answer.metadata.retry_count), ("small", 1));
    assert_at_rest(&controller);
}
