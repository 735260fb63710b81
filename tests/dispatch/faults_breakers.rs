//! Cases of the fault catalogue that breakers and the budget of retries have to hold: 4, 13, 14, 15, 17 to 20.

use std::sync::atomic::Ordering;

use super::faults::*;
use super::*;

#[tokio::test(start_paused = true)]
async fn case_04_a_worker_that_stands_still_is_left_alone_in_the_end() {
    let controller = controller(json!({"streamingTimeoutMs": 300, "retry": {"enabled": false}})).await;
    let worker = worker(&controller, "w", &[Accept, Stall]);
    for _ in 0..5 {
        let error = streaming(&controller).await.err().unwrap();
        assert_eq!((error.code(), limit(&error)), (Code::WorkerTimeout, "first_token"));
    }
    worker.cancelled(5).await;
    assert_eq!(breakers(&controller), ["OPEN"]);
    assert_eq!(streaming(&controller).await.err().unwrap().code(), Code::NoHealthyWorkers);
    assert_eq!(worker.asked(), 5);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_13_a_worker_that_fails_at_once_gets_hardly_anything_after_its_trip() {
    let strategies = ["round_robin", "least_requests", "weighted_random", "skills_based", "peak_ewma", "prefix_aware"];
    for strategy in strategies {
        // Open for a second at first, so that many probes come and fail.
        let controller = balancing(json!({"circuitBreaker": {"timeoutMs": 1_000}}), json!({"strategy": strategy})).await;
        let bad = deciding(&controller, &registration("bad", &["m"], 0), |_| vec![Wait(1), Fail("WORKER_UNAVAILABLE")]);
        let good = ["g0", "g1", "g2"]
            .map(|id| deciding(&controller, &registration(id, &["m"], 0), |_| vec![Accept, Wait(20), Respond("ok")]));
        // `peak_ewma` turns away from it before its breaker has to.
        for _ in 0..200 {
            if breakers(&controller)[0] == "OPEN" {
                break;
            }
            controller.buffered(request(), CallOptions::default()).await.unwrap();
        }
        let before = bad.load(Ordering::Relaxed);
        let ends = load(&controller, 100, Duration::from_secs(10), any).await;
        assert_eq!(succeeded(&ends), 1_000, "{strategy}");
        let after = bad.load(Ordering::Relaxed) - before;
        assert!(after * 20 < total(&good), "{strategy}: {after} of {}", total(&good));
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn case_14_a_worker_that_fails_every_second_time_is_tripped_by_its_rate() {
    let controller = controller(json!({})).await;
    let events = controller.events();
    let half = deciding(&controller, &registration("half", &["m"], 0), |number| match number % 2 {
        0 => vec![Accept, Wait(5), Fail("WORKER_UNAVAILABLE")],
        _ => vec![Accept, Wait(5), Respond("ok")],
    });
    deciding(&controller, &registration("good", &["m"], 0), |_| vec![Accept, Wait(5), Respond("ok")]);
    let ends = load(&controller, 50, Duration::from_secs(5), any).await;
    assert_eq!(succeeded(&ends), 250);
    assert_eq!(breakers(&controller), ["CLOSED", "OPEN"]);
    assert_eq!(half.load(Ordering::Relaxed), 10, "it was left alone as soon as there were enough to judge it by");
    assert_at_rest(&controller);
    assert_eq!(reasons(&controller, events).await, ["failure_rate"]);
}

#[tokio::test(start_paused = true)]
async fn case_15_ten_thousand_client_errors_open_nothing() {
    let controller = controller(json!({})).await;
    let codes = ["REQUEST_VALIDATION_FAILED", "PAYLOAD_TOO_LARGE"];
    for number in 0..3 {
        deciding(&controller, &registration(&format!("w{number}"), &["m"], 0), move |number| match number % 4 {
            0 => vec![Fail(codes[0])],
            1 => vec![Accept, Wait(1), Fail(codes[1])],
            2 => vec![Accept, Wait(3), Fail(codes[0])],
            // The caller is gone by then.
            _ => vec![Accept, Wait(50), Respond("late")],
        });
    }
    for _ in 0..100 {
        let calls = (0..100).map(|number| {
            let request = match number % 10 {
                0 => InferenceRequest { max_tokens: Some(-1), ..request() },
                1 => InferenceRequest { session_id: Some(String::new()), ..request() },
                _ => request(),
            };
            let timeout = Some(Duration::from_millis(20));
            controller.buffered(request, CallOptions { timeout, ..CallOptions::default() })
        });
        for end in futures_util::future::join_all(calls).await {
            let code = end.unwrap_err().code();
            let clients = [Code::RequestValidationFailed, Code::PayloadTooLarge, Code::InvalidSessionId, Code::WorkerTimeout];
            assert!(clients.contains(&code), "{code}");
        }
    }
    for (worker, stats) in controller.breaker_stats() {
        assert_eq!((stats.state.as_str(), stats.failure_count, stats.window_failures), ("CLOSED", 0, 0), "{worker}");
    }
    assert_at_rest(&controller);
}

/// One worker, `w`, whose breaker has just become half-open.
async fn half_open() -> (Controller, Scripted) {
    let breaker = json!({"failureThreshold": 1, "timeoutMs": 1_000});
    let controller = controller(json!({"retry": {"enabled": false}, "circuitBreaker": breaker})).await;
    let worker = worker(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    buffered(&controller).await.unwrap_err();
    sleep(Duration::from_millis(1_300)).await;
    assert_eq!((breakers(&controller), worker.asked()), (vec!["HALF_OPEN"], 1));
    (controller, worker)
}

#[tokio::test(start_paused = true)]
async fn case_17_a_cancelled_probe_makes_way_for_the_next() {
    let (controller, worker) = half_open().await;
    worker.now_does(&[Accept, Stall]);
    assert!(tokio::time::timeout(Duration::from_millis(50), buffered(&controller)).await.is_err());
    worker.cancelled(1).await;
    worker.now_does(&[Respond("ok")]);
    for _ in 0..2 {
        buffered(&controller).await.unwrap();
    }
    assert_eq!(breakers(&controller), ["CLOSED"]);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_18_of_a_thousand_callers_at_half_open_one_reaches_the_worker() {
    let (controller, worker) = half_open().await;
    worker.now_does(&[Accept, Wait(100), Fail("WORKER_UNAVAILABLE")]);
    let calls = (0..1_000).map(|_| controller.buffered(request(), CallOptions::default()));
    let ends: Ends = futures_util::future::join_all(calls).await;
    assert_eq!(worker.asked(), 2);
    assert_eq!((ended_with(&ends, Code::WorkerUnavailable), ended_with(&ends, Code::NoHealthyWorkers)), (1, 999));
    assert_eq!(breakers(&controller), ["OPEN"]);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_19_a_result_from_before_the_trip_changes_nothing() {
    for late in [Respond("late"), Fail("WORKER_UNAVAILABLE")] {
        let breaker = json!({"failureThreshold": 2, "successThreshold": 1, "timeoutMs": 1_000});
        let controller = controller(json!({"retry": {"enabled": false}, "circuitBreaker": breaker})).await;
        let worker = worker(&controller, "w", &[Accept, Wait(1_500), late]);
        let early = (0..10).map(|_| controller.buffered(request(), CallOptions::default()));
        let trip = async {
            sleep(Duration::from_millis(10)).await;
            worker.now_does(&[Fail("WORKER_UNAVAILABLE")]);
            for _ in 0..2 {
                buffered(&controller).await.unwrap_err();
            }
            assert_eq!(breakers(&controller), ["OPEN"]);
        };
        futures_util::future::join(futures_util::future::join_all(early), trip).await;
        let stats = &controller.breaker_stats()[0].1;
        assert_eq!((stats.state.as_str(), stats.failure_count, stats.success_count), ("HALF_OPEN", 2, 0));
        assert_eq!(stats.opened_count, 1);
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn case_20_when_all_fail_the_fleet_sees_little_more_than_the_requests() {
    for (enabled, fault) in [
        (false, vec![Accept, Wait(2), Fail("WORKER_UNAVAILABLE")]),
        (true, vec![Accept, Wait(2), Fail("WORKER_UNAVAILABLE")]),
        (false, vec![NobodyListens]),
        (false, vec![Stall]),
    ] {
        let controller = controller(json!({"acceptTimeoutMs": 100, "circuitBreaker": {"enabled": enabled}})).await;
        let (_, workers) = fleet(&controller, 5, 0, &fault, 0);
        let ends = load(&controller, 200, Duration::from_secs(10), any).await;
        assert_eq!(succeeded(&ends), 0);
        let (asked, dispatched) = (total(&workers), ends.iter().filter(|end| attempts(end) > 0).count() as u64);
        // 20 %, and 10 in each of the 10 seconds and the one after them.
        assert!(asked * 10 <= dispatched * 12 + 10 * 110, "{asked} dispatches for {dispatched} requests");
        let refused = |end: &&Result<Answer, ControllerError>| {
            end.as_ref().is_err_and(|error| error.context().contains_key("retryBudgetExhausted"))
        };
        assert!(enabled || ends.iter().filter(refused).count() > 1_000, "the others are told why");
        assert_at_rest(&controller);
    }
}

fn attempts(end: &Result<Answer, ControllerError>) -> usize {
    match end {
        Ok(answer) => answer.metadata.attempts.len(),
        Err(error) => error.context().get("attempts").and_then(Value::as_array).map_or(0, Vec::len),
    }
}
