use super::*;

const ONE_TRY: &str = r#"{"retry": {"enabled": false}}"#;

async fn one_try() -> Controller {
    controller(serde_json::from_str(ONE_TRY).unwrap()).await
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_passes_the_accept_limit() {
    let controller = one_try().await;
    let worker = worker(&controller, "w", &[Stall]);
    let started = tokio::time::Instant::now();
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!((error.code(), limit(&error)), (Code::WorkerTimeout, "accept"));
    assert_eq!(started.elapsed(), Duration::from_millis(2_000));
    assert_eq!(error.context()["workerId"], "w");
    worker.cancelled(1).await;
    assert_eq!(controller.request_metrics("r").unwrap().timeouts, 1);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn each_of_the_others_has_its_name() {
    for (stream, script, name, after) in [
        (false, vec![Accept, Stall], "total", 30_000),
        (false, vec![Accept, Say("a"), Stall], "total", 30_000),
        (true, vec![Accept, Stall], "first_token", 60_000),
    ] {
        let controller = one_try().await;
        let worker = worker(&controller, "w", &script);
        let started = tokio::time::Instant::now();
        let error = if stream { streaming(&controller).await.err() } else { buffered(&controller).await.err() }.unwrap();
        assert_eq!((error.code(), limit(&error)), (Code::WorkerTimeout, name));
        assert_eq!(started.elapsed(), Duration::from_millis(after));
        worker.cancelled(1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_stalls_or_never_ends_is_interrupted() {
    for (routing, script, name) in [
        (json!({}), vec![Say("a"), Stall], "idle"),
        (json!({"streamTotalTimeoutMs": 100}), vec![Say("a"), Wait(60), Say("b"), Wait(60), Say("c"), Done], "total"),
    ] {
        let controller = controller(routing).await;
        let worker = worker(&controller, "w", &script);
        let mut stream = streaming(&controller).await.unwrap();
        let error = read(&mut stream).await.unwrap_err();
        assert_eq!(error.code(), Code::StreamInterrupted);
        let cause = error.cause().unwrap();
        assert_eq!((cause.code(), limit(cause), limit(&error)), (Code::WorkerTimeout, name, name));
        worker.cancelled(1).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_worker_is_left_and_another_answers() {
    let controller = controller(json!({"timeoutMs": 500})).await;
    let late = worker(&controller, "w0", &[Accept, Wait(700), Respond("late")]);
    worker(&controller, "w1", &[Accept, Wait(100), Respond("ok")]);
    assert_eq!(buffered(&controller).await.unwrap().text, "ok");
    late.cancelled(1).await;
    assert_eq!(late.asked(), 1);
    assert_eq!(controller.worker("w0").unwrap().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn the_callers_limit_bounds_the_call_and_blames_nobody() {
    let controller = controller(json!({})).await;
    let workers: Vec<_> = (0..3).map(|n| worker(&controller, &format!("w{n}"), &[Accept, Stall])).collect();
    for _ in 0..10 {
        let started = tokio::time::Instant::now();
        let options = CallOptions { timeout: Some(Duration::from_millis(300)), ..CallOptions::default() };
        let error = controller.buffered(request(), options).await.unwrap_err();
        assert_eq!((error.code(), limit(&error)), (Code::WorkerTimeout, "total"));
        assert_eq!(error.context()["timeoutMs"], 300);
        assert_eq!(started.elapsed(), Duration::from_millis(300));
    }
    assert_eq!(workers[0].last().timeout, Duration::from_millis(300));
    assert!(controller.breaker_stats().iter().all(|(_, stats)| stats.failure_count == 0));
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_cannot_finish_is_not_begun() {
    let controller = controller(json!({"retry": {"retryDelayMs": 60_000, "maxDelayMs": 60_000}})).await;
    let workers =
        [worker(&controller, "w0", &[Fail("WORKER_UNAVAILABLE")]), worker(&controller, "w1", &[Fail("WORKER_UNAVAILABLE")])];
    let options = CallOptions { timeout: Some(Duration::from_millis(1)), ..CallOptions::default() };
    let error = controller.buffered(request(), options).await.unwrap_err();
    assert_eq!((error.code(), limit(&error)), (Code::WorkerTimeout, "total"));
    assert_eq!(error.cause().unwrap().code(), Code::WorkerUnavailable);
    assert_eq!(workers.iter().map(Scripted::asked).sum::<usize>(), 1);
}

#[tokio::test(start_paused = true)]
async fn attempts_that_all_run_out_of_time_use_the_retries_up() {
    // The delays between them take time that the last one then lacks: it ends with its request.
    let controller = controller(json!({"timeoutMs": 200, "retry": {"maxRetries": 2, "retryDelayMs": 10}})).await;
    let workers: Vec<_> = (0..4).map(|n| worker(&controller, &format!("w{n}"), &[Accept, Stall])).collect();
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!((error.code(), error.http_status()), (Code::AllRetriesExhausted, 504));
    assert_eq!(error.cause().unwrap().code(), Code::WorkerTimeout);
    assert_eq!(workers.iter().map(Scripted::asked).sum::<usize>(), 3);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_never_idle_ends_at_its_limit_all_the_same() {
    let controller = controller(json!({"streamTotalTimeoutMs": 100})).await;
    let script: Vec<Act> = (0..200).flat_map(|_| [Say("a"), Wait(1)]).chain([Done]).collect();
    worker(&controller, "w", &script);
    let mut stream = streaming(&controller).await.unwrap();
    // A reader that is always a little behind.
    let error = loop {
        sleep(Duration::from_millis(5)).await;
        match stream.next_batch().await {
            Ok(batch) => assert!(!batch.is_empty()),
            Err(error) => break error,
        }
    };
    assert_eq!((error.code(), limit(&error)), (Code::StreamInterrupted, "total"));
    assert_at_rest(&controller);
}
