use mlx_serving_router::dispatch::ControllerState;

use super::*;

#[tokio::test(start_paused = true)]
async fn states_come_in_order_and_once() {
    let config = ClusterConfig::from_value(json!({"nats": {"mode": "none"}})).unwrap();
    let controller = Controller::new(config, None).unwrap();
    assert_eq!(controller.state(), ControllerState::Idle);
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::ControllerNotReady);
    controller.start(None).await.unwrap();
    assert_eq!(controller.state(), ControllerState::Ready);
    assert_eq!(controller.start(None).await.unwrap_err().code(), Code::ControllerNotReady);
    assert_eq!(controller.state(), ControllerState::Ready);
    controller.stop(Duration::ZERO).await;
    controller.stop(Duration::ZERO).await;
    assert_eq!(controller.state(), ControllerState::Stopped);
    assert_eq!(buffered(&controller).await.unwrap_err().code(), Code::ControllerNotReady);
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_nats_is_said_and_leaves_it_stopped() {
    let config = json!({"nats": {"mode": "external", "serverUrl": "nats://me:hush@127.0.0.1:1", "connectTimeoutMs": 300}});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), None).unwrap();
    let error = controller.start(None).await.unwrap_err();
    assert_eq!(error.code(), Code::NatsError);
    assert!(error.message().contains("nats://***@127.0.0.1:1"));
    assert!(!error.message().contains("hush"));
    assert_eq!(controller.state(), ControllerState::Stopped);
}

#[tokio::test(start_paused = true)]
async fn running_requests_finish_while_it_drains() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Accept, Wait(500), Respond("ok")]);
    let running = buffered(&controller);
    let stops = async {
        sleep(Duration::from_millis(100)).await;
        controller.stop(Duration::from_secs(30)).await;
    };
    let late = async {
        sleep(Duration::from_millis(200)).await;
        controller.buffered(named("late"), CallOptions::default()).await
    };
    let (answer, (), late) = tokio::join!(running, stops, late);
    assert_eq!(answer.unwrap().text, "ok");
    assert_eq!(late.unwrap_err().code(), Code::ControllerNotReady);
}

#[tokio::test(start_paused = true)]
async fn what_is_left_is_cut_off() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Accept, Stall]);
    let started = tokio::time::Instant::now();
    let (answer, ()) = tokio::join!(buffered(&controller), async {
        sleep(Duration::from_millis(10)).await;
        controller.stop(Duration::from_millis(300)).await;
    });
    assert_eq!(answer.unwrap_err().code(), Code::ControllerNotReady);
    assert_eq!(started.elapsed(), Duration::from_millis(310));
    worker.cancelled(1).await;
    assert_eq!(controller.cluster_status().requests.active, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_cut_off_with_the_controllers_own_error() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Say("a"), Stall]);
    let mut stream = streaming(&controller).await.unwrap();
    let (read, ()) = tokio::join!(read(&mut stream), controller.stop(Duration::ZERO));
    assert_eq!(read.unwrap_err().code(), Code::ControllerNotReady);
    assert_eq!(controller.request_metrics("r").unwrap().final_error.unwrap().code, Code::ControllerNotReady);
    worker.cancelled(1).await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_gives_everything_back() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Accept, Stall]);
    let gone = tokio::time::timeout(Duration::from_millis(50), buffered(&controller)).await;
    assert!(gone.is_err());
    worker.cancelled(1).await;
    assert_at_rest(&controller);
    let metadata = controller.request_metrics("r").unwrap();
    assert_eq!(metadata.final_error.unwrap().code, Code::Cancelled);

    worker.now_does(&[Say("a"), Stall]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(stream.next_batch().await.unwrap().len(), 1);
    drop(stream);
    worker.cancelled(2).await;
    assert_at_rest(&controller);
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_its_reader_cannot_follow_blames_no_worker() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Say("a"), Stall]);
    let mut stream = streaming(&controller).await.unwrap();
    stream.abandon(ControllerError::new(Code::StreamInterrupted, "nobody reads"));
    assert_eq!(stream.next_batch().await.unwrap_err().message(), "nobody reads");
    worker.cancelled(1).await;
    assert_eq!(controller.request_metrics("r").unwrap().final_error.unwrap().code, Code::StreamInterrupted);
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_its_reader_lets_pile_up_blames_no_worker() {
    let controller = controller(json!({})).await;
    let script: Vec<_> = std::iter::repeat_n(Say("x"), 1_500).chain([Done]).collect();
    let worker = worker(&controller, "w", &script);
    let mut stream = streaming(&controller).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    let error = read(&mut stream).await.unwrap_err();
    assert_eq!((error.code(), limit(&error)), (Code::StreamInterrupted, "reader"));
    worker.cancelled(1).await;
    assert!(controller.request_metrics("r").unwrap().failed_workers.is_empty());
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn an_active_id_is_taken_and_an_ended_one_is_replaced() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Wait(100), Respond("ok")]);
    let (first, second) = tokio::join!(buffered(&controller), buffered(&controller));
    assert!(first.is_ok());
    assert_eq!(second.unwrap_err().code(), Code::RequestValidationFailed);
    assert!(buffered(&controller).await.is_ok());
    assert_eq!(controller.all_request_metrics().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_local_worker_that_leaves_takes_its_requests_along() {
    let controller = controller(json!({})).await;
    let mut events = controller.events();
    worker(&controller, "w0", &[Accept, Wait(20), Leave, Stall]);
    let again = controller.attach_local(&registration("w0", &["m"], 0)).unwrap_err();
    assert_eq!(again.code(), Code::RequestValidationFailed);
    worker(&controller, "w1", &[Accept, Wait(30), Respond("ok")]);
    let started = tokio::time::Instant::now();
    for id in ["a", "b"] {
        assert_eq!(controller.buffered(named(id), CallOptions::default()).await.unwrap().text, "ok");
    }
    assert!(started.elapsed() < Duration::from_millis(500));
    assert_eq!(controller.workers().len(), 1);
    controller.stop(Duration::ZERO).await;
    let mut kinds = Vec::new();
    while let Some(event) = events.next().await {
        kinds.push(event.kind);
    }
    assert_eq!(kinds, ["worker_registered", "worker_registered", "worker_removed", "failover"]);
}

#[tokio::test(start_paused = true)]
async fn waiting_for_workers_ends_with_them_or_with_the_controller() {
    let controller = controller(json!({})).await;
    let (waited, _worker) = tokio::join!(controller.wait_for_workers(1), async { worker(&controller, "w", &[]) });
    waited.unwrap();
    let (waited, ()) = tokio::join!(controller.wait_for_workers(2), controller.stop(Duration::ZERO));
    assert_eq!(waited.unwrap_err().code(), Code::ControllerNotReady);
}
