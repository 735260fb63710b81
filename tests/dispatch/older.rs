//! Attempts to workers of the older dialect: no accept limit, no cancel, and otherwise as to any other.

use super::*;

/// A worker for the model `m` that speaks the older dialect.
fn older(controller: &Controller, id: &str, script: &[Act]) -> Scripted {
    let older = Registration { protocol: None, incarnation: String::new(), ..registration(id, &["m"], 0) };
    worker_for(controller, &older, script)
}

/// Returns when everything has been done that could be, and says that nobody was told to stop.
async fn assert_never_cancelled(worker: &Scripted) {
    sleep(Duration::from_millis(1)).await;
    assert_eq!(worker.cancellations(), 0);
}

#[tokio::test(start_paused = true)]
async fn it_may_be_silent_past_the_accept_limit() {
    let controller = controller(json!({"acceptTimeoutMs": 100})).await;
    let worker = older(&controller, "w", &[Wait(10_000), Say("a"), Wait(10_000), Say("b"), Done]);
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.metadata.tokens, answer.metadata.retry_count), ("ab", 2, 0));
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "ab");
    assert_never_cancelled(&worker).await;
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_whole_response_is_understood_too() {
    let controller = controller(json!({})).await;
    older(&controller, "w", &[Respond("ok")]);
    assert_eq!(buffered(&controller).await.unwrap().text, "ok");
    assert_eq!(read(&mut streaming(&controller).await.unwrap()).await.unwrap(), "ok");
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn the_other_limits_hold_and_nobody_is_told_to_stop() {
    for (stream, script, name, after) in [
        (false, vec![Stall], "total", 30_000),
        (false, vec![Say("a"), Stall], "total", 30_000),
        (true, vec![Stall], "first_token", 60_000),
        (true, vec![Say("a"), Stall], "idle", 30_000),
    ] {
        let controller = controller(json!({"retry": {"enabled": false}})).await;
        let worker = older(&controller, "w", &script);
        let started = tokio::time::Instant::now();
        let error = if stream {
            match streaming(&controller).await {
                Ok(mut stream) => read(&mut stream).await.unwrap_err(),
                Err(error) => error,
            }
        } else {
            buffered(&controller).await.unwrap_err()
        };
        assert_eq!((limit(&error), started.elapsed()), (name, Duration::from_millis(after)));
        assert_eq!(controller.request_metrics("r").unwrap().timeouts, 1);
        assert_never_cancelled(&worker).await;
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_is_let_go_in_silence() {
    let controller = controller(json!({})).await;
    let worker = older(&controller, "w", &[Say("a"), Stall]);
    let stream = streaming(&controller).await.unwrap();
    drop(stream);
    assert_at_rest(&controller);
    assert!(tokio::time::timeout(Duration::from_secs(1), buffered(&controller)).await.is_err());
    assert_at_rest(&controller);
    assert_never_cancelled(&worker).await;
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
}

#[tokio::test(start_paused = true)]
async fn older_and_newer_workers_stand_in_for_each_other() {
    for older_fails in [true, false] {
        let controller = controller(json!({})).await;
        let (failing, sound) = ([Fail("QUEUE_FULL")], [Say("ok"), Done]);
        let (first, second) = if older_fails {
            (older(&controller, "w0", &failing), worker(&controller, "w1", &sound))
        } else {
            (worker(&controller, "w0", &failing), older(&controller, "w1", &sound))
        };
        let answer = buffered(&controller).await.unwrap();
        assert_eq!((answer.text.as_str(), answer.worker_id.as_str(), answer.metadata.retry_count), ("ok", "w1", 1));
        assert_eq!(answer.metadata.attempts[0].code, Some(Code::WorkerOverloaded));
        assert_eq!((first.asked(), second.asked()), (1, 1));
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn its_breaker_opens_like_any_others() {
    let controller = controller(json!({"retry": {"enabled": false}, "circuitBreaker": {"failureThreshold": 2}})).await;
    older(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    for _ in 0..2 {
        assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::WorkerUnavailable);
    }
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::NoHealthyWorkers);
}
