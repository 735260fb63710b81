use mlx_serving_router::wire::Priority;

use super::*;

async fn one_place(routing: Value) -> (Controller, Scripted) {
    let controller = controller(routing).await;
    let worker = worker_for(&controller, &registration("w", &["m"], 1), &[Wait(100), Respond("ok")]);
    (controller, worker)
}

fn with(priority: Priority, id: &str) -> InferenceRequest {
    InferenceRequest { priority, ..named(id) }
}

#[tokio::test(start_paused = true)]
async fn a_full_fleet_makes_requests_wait_in_their_order() {
    let (controller, worker) = one_place(json!({})).await;
    let calls = ["a", "b", "c", "d"].map(|id| controller.buffered(named(id), CallOptions::default()));
    let started = tokio::time::Instant::now();
    futures_util::future::try_join_all(calls).await.unwrap();
    assert_eq!(started.elapsed(), Duration::from_millis(400));
    let order: Vec<_> = worker.asked.lock().iter().map(|asked| asked.request.request_id.clone()).collect();
    assert_eq!(order, ["a", "b", "c", "d"]);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_higher_priority_goes_first() {
    let (controller, worker) = one_place(json!({})).await;
    let calls = [
        with(Priority::Normal, "first"),
        with(Priority::Low, "low"),
        with(Priority::Normal, "normal"),
        with(Priority::High, "high"),
    ]
    .map(|request| controller.buffered(request, CallOptions::default()));
    futures_util::future::try_join_all(calls).await.unwrap();
    let order: Vec<_> = worker.asked.lock().iter().map(|asked| asked.request.request_id.clone()).collect();
    assert_eq!(order, ["first", "high", "normal", "low"]);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_and_sheds_low_priority_first() {
    let (controller, _worker) = one_place(json!({"admission": {"maxQueue": 1}})).await;
    let calls = [
        with(Priority::Normal, "runs"),
        with(Priority::Low, "shed"),
        with(Priority::Low, "refused"),
        with(Priority::High, "waits"),
    ]
    .map(|request| controller.buffered(request, CallOptions::default()));
    let answers = futures_util::future::join_all(calls).await;
    let codes: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(ControllerError::code)).collect();
    assert_eq!(codes, [None, Some(Code::QueueFull), Some(Code::QueueFull), None]);
    assert!(answers[2].as_ref().unwrap_err().retry_after_ms().is_some());
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_never_dispatched() {
    let (controller, worker) = one_place(json!({"admission": {"maxWaitMs": 50}})).await;
    let calls = ["a", "b"].map(|id| controller.buffered(named(id), CallOptions::default()));
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers[0].is_ok());
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::QueueFull);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(worker.asked(), 1);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_the_queue_holds_up_nobody() {
    let (controller, worker) = one_place(json!({})).await;
    let running = controller.buffered(named("a"), CallOptions::default());
    let leaves = tokio::time::timeout(Duration::from_millis(50), controller.buffered(named("b"), CallOptions::default()));
    let waits = controller.buffered(named("c"), CallOptions::default());
    let (a, b, c) = tokio::join!(running, leaves, waits);
    assert!(a.is_ok() && b.is_err() && c.is_ok());
    assert_eq!(worker.asked(), 2);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_waits_for_another_worker_holds_up_nobody_who_takes_any() {
    let controller = controller(json!({})).await;
    let bad = worker_for(&controller, &registration("w0", &["m"], 1), &[Fail("WORKER_UNAVAILABLE")]);
    let _busy = worker_for(&controller, &registration("w1", &["m"], 1), &[Accept, Wait(5_000), Respond("ok")]);
    let options = CallOptions { worker_id: Some("w1".into()), ..CallOptions::default() };
    let running = controller.buffered(named("long"), options);
    let retried = async {
        sleep(Duration::from_millis(10)).await;
        controller.buffered(named("retried"), CallOptions::default()).await
    };
    let fresh = async {
        sleep(Duration::from_millis(1_000)).await;
        bad.now_does(&[Respond("ok")]);
        let started = tokio::time::Instant::now();
        let answer = controller.buffered(named("fresh"), CallOptions::default()).await;
        (answer, started.elapsed())
    };
    let (running, retried, (fresh, waited)) = tokio::join!(running, retried, fresh);
    assert_eq!(running.unwrap().worker_id.as_str(), "w1");
    assert_eq!(retried.unwrap().worker_id.as_str(), "w1");
    assert_eq!(fresh.unwrap().worker_id.as_str(), "w0");
    assert_eq!(waited, Duration::ZERO, "w0 was idle");
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_finds_no_place_names_what_failed_before() {
    let controller = controller(json!({"admission": {"maxWaitMs": 50}})).await;
    worker_for(&controller, &registration("w0", &["m"], 1), &[Fail("WORKER_UNAVAILABLE")]);
    worker_for(&controller, &registration("w1", &["m"], 1), &[Accept, Stall]);
    let options = CallOptions { worker_id: Some("w1".into()), ..CallOptions::default() };
    let retried = async {
        sleep(Duration::from_millis(1)).await;
        buffered(&controller).await.unwrap_err()
    };
    let (_, error) = tokio::join!(controller.buffered(named("long"), options), retried);
    assert_eq!(error.code(), Code::QueueFull);
    assert_eq!(error.cause().map(ControllerError::code), Some(Code::WorkerUnavailable));
}

#[tokio::test(start_paused = true)]
async fn a_turn_that_comes_too_late_is_not_taken() {
    let (controller, worker) = one_place(json!({"admission": {"maxWaitMs": 150}})).await;
    let running = controller.buffered(named("a"), CallOptions::default());
    let mut waits = Box::pin(controller.buffered(named("b"), CallOptions::default()));
    let (running, ()) = tokio::join!(running, async { assert!(futures_util::poll!(&mut waits).is_pending()) });
    assert!(running.is_ok());
    // Nobody comes round to the waiting one before its time is over.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(waits.await.unwrap_err().code(), Code::QueueFull);
    assert_eq!(worker.asked(), 1);
}

fn of(model: &str, id: &str) -> InferenceRequest {
    InferenceRequest { model_id: model.into(), ..named(id) }
}

/// Callers that ask for a model again and again.
fn keep_busy(controller: &Controller, model: &'static str, callers: usize) {
    for caller in 0..callers {
        let controller = controller.clone();
        tokio::spawn(async move {
            for number in 0.. {
                let request = of(model, &format!("{model}-{caller}-{number}"));
                let end = controller.buffered(request, CallOptions::default()).await;
                if end.is_err_and(|error| error.code() == Code::ControllerNotReady) {
                    return;
                }
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn lines_that_want_the_same_worker_get_their_turns() {
    for (busy, other) in [("a", "b"), ("b", "a")] {
        for callers in [1, 3] {
            let controller = controller(json!({})).await;
            worker_for(&controller, &registration("w", &["a", "b"], 1), &[Wait(100), Respond("ok")]);
            keep_busy(&controller, busy, callers);
            sleep(Duration::from_millis(250)).await;
            let started = tokio::time::Instant::now();
            controller.buffered(of(other, "other"), CallOptions::default()).await.unwrap();
            // Behind those who were there before it, and nobody else.
            assert!(started.elapsed() <= Duration::from_millis(100 * (callers as u64 + 1)), "{:?}", started.elapsed());
            controller.stop(Duration::ZERO).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_line_for_a_worker_by_name_gets_its_turn_too() {
    let controller = controller(json!({})).await;
    worker_for(&controller, &registration("w", &["a"], 1), &[Wait(100), Respond("ok")]);
    keep_busy(&controller, "a", 3);
    sleep(Duration::from_millis(250)).await;
    let started = tokio::time::Instant::now();
    let options = CallOptions { worker_id: Some("w".into()), ..CallOptions::default() };
    controller.buffered(of("a", "by-name"), options).await.unwrap();
    assert!(started.elapsed() <= Duration::from_millis(400), "{:?}", started.elapsed());
    controller.stop(Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_does_not_come_round_to_look_holds_up_nobody_for_long() {
    let controller = controller(json!({})).await;
    worker_for(&controller, &registration("w", &["a", "b"], 1), &[Wait(100), Respond("ok")]);
    let first = tokio::spawn({
        let controller = controller.clone();
        async move { controller.buffered(of("a", "first"), CallOptions::default()).await }
    });
    tokio::task::yield_now().await;
    // It stands in the queue, and nobody drives it any more.
    let mut idle = Box::pin(controller.buffered(of("a", "idle"), CallOptions::default()));
    assert!(futures_util::poll!(&mut idle).is_pending());
    let started = tokio::time::Instant::now();
    controller.buffered(of("b", "second"), CallOptions::default()).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    first.await.unwrap().unwrap();
    idle.await.unwrap();
    assert_at_rest(&controller);
}
