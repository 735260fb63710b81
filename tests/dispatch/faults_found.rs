//! What the simulation of whole fleets (`tests/simulation`) has found, each as the smallest case that shows it.

use mlx_serving_router::routing::Carrier;
use tokio::time::Instant;

use super::*;

fn kinds(controller: &Controller) -> Vec<&'static str> {
    controller.workers().iter().map(|worker| worker.breaker.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_success_that_completes_a_bad_rate_is_the_request_that_opened_the_breaker() {
    let breaker = json!({"failureThreshold": 100, "minimumRequests": 4, "failureRatePercent": 50});
    let controller = controller(json!({"retry": {"enabled": false}, "circuitBreaker": breaker})).await;
    let worker = worker(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    for _ in 0..3 {
        buffered(&controller).await.unwrap_err();
    }
    worker.now_does(&[Respond("ok")]);
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((kinds(&controller), answer.metadata.circuit_breaker_trips), (vec!["OPEN"], 1));
}

#[tokio::test(start_paused = true)]
async fn after_an_attempt_nobody_is_there_any_more_whatever_the_breakers_say() {
    let retry = json!({"revisitFailedWorkers": true, "retryDelayMs": 0});
    let controller = controller(json!({"retry": retry, "circuitBreaker": {"failureThreshold": 1}})).await;
    let worker = worker(&controller, "w", &[Fail("WORKER_UNAVAILABLE")]);
    let error = buffered(&controller).await.unwrap_err();
    assert_eq!((error.code(), worker.asked()), (Code::NoWorkersAvailable, 1));
    let count = |key: &str| error.context()[key].as_u64();
    assert_eq!((count("totalWorkers"), count("healthyWorkers"), count("excludedWorkers")), (Some(1), Some(0), Some(1)));
    assert_eq!(error.cause().map(ControllerError::code), Some(Code::WorkerUnavailable));
}

#[tokio::test(start_paused = true)]
async fn of_the_breaker_of_a_life_that_is_over_nothing_is_told() {
    let controller = controller(json!({"retry": {"enabled": false}, "circuitBreaker": {"failureThreshold": 1}})).await;
    let mut events = controller.events();
    worker(&controller, "w", &[Accept, Stall]);
    let replaced = async {
        sleep(Duration::from_millis(10)).await;
        let newer = Registration { incarnation: "newer".into(), ..registration("w", &["m"], 0) };
        controller.router().register(&newer, Carrier::Nats, Instant::now());
    };
    let (answer, ()) = tokio::join!(buffered(&controller), replaced);
    assert_eq!(answer.unwrap_err().code(), Code::WorkerOffline);
    assert_eq!(kinds(&controller), ["CLOSED"]);
    assert_eq!(controller.request_metrics("r").unwrap().circuit_breaker_trips, 0);
    controller.stop(Duration::ZERO).await;
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        told.push(event.kind);
    }
    assert_eq!(told, ["worker_registered", "worker_replaced"]);
}

#[tokio::test(start_paused = true)]
async fn a_request_with_nobody_left_to_try_does_not_join_those_who_wait() {
    let controller = controller(json!({})).await;
    let worker = worker_for(&controller, &registration("w", &["m"], 1), &[Accept, Wait(100), Fail("WORKER_UNAVAILABLE")]);
    let waits = async {
        sleep(Duration::from_millis(10)).await;
        worker.now_does(&[Accept, Wait(1_000), Respond("ok")]);
        let calls = ["a", "b"].map(|id| controller.buffered(named(id), CallOptions::default()));
        futures_util::future::try_join_all(calls).await
    };
    let started = Instant::now();
    let fails = async { (buffered(&controller).await.unwrap_err(), started.elapsed()) };
    let (waits, (error, took)) = tokio::join!(waits, fails);
    assert!(waits.is_ok());
    assert_eq!((error.code(), took), (Code::NoWorkersAvailable, Duration::from_millis(100)));
    assert_eq!(error.cause().map(ControllerError::code), Some(Code::WorkerUnavailable));
}
