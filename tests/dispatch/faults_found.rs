//! What the simulation of whole fleets (`tests/simulation`) has found, each as the smallest case that shows it.

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
