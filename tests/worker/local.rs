//! A worker of the controller's own process: what the controller knows of it.

use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::{CallOptions, Controller};
use mlx_serving_router::routing::WorkerSnapshot;
use mlx_serving_router::wire::{Phase, WorkerStatus};
use mlx_serving_router::worker::Worker;
use serde_json::json;

use super::options;

async fn joined() -> (Controller, Worker) {
    let config = ClusterConfig::from_value(json!({"nats": {"mode": "none"}})).unwrap();
    let controller = Controller::new(config.clone(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    let worker = Worker::new(options("w", 1, 4), &config).unwrap();
    worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
    let port = controller.attach_local(&worker.registration()).unwrap();
    worker.start_local(port).await.unwrap();
    (controller, worker)
}

/// What the controller knows, once the news have reached it.
async fn seen(controller: &Controller) -> Option<WorkerSnapshot> {
    tokio::time::sleep(Duration::from_millis(1)).await;
    controller.worker("w")
}

#[tokio::test(start_paused = true)]
async fn its_phases_and_models_are_known_at_once_and_its_load_with_the_next_heartbeat() {
    let (controller, worker) = joined().await;
    let info = seen(&controller).await.unwrap();
    assert_eq!((info.phase, info.loaded_models), (Phase::Ready, vec!["tiny".to_owned()]));
    worker.jobs().report(Phase::Loading, Vec::new(), vec!["tiny".into()]);
    let info = seen(&controller).await.unwrap();
    assert_eq!((info.phase, info.loading_models), (Phase::Loading, vec!["tiny".to_owned()]));
    assert_eq!(info.status, WorkerStatus::Online);
    worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
    let info = seen(&controller).await.unwrap();
    assert_eq!((info.phase, info.loading_models), (Phase::Ready, Vec::new()));
    tokio::time::sleep(Duration::from_secs(59)).await;
    let silence = seen(&controller).await.unwrap().last_seen;
    assert!(silence < Duration::from_secs(5), "the last heartbeat was {silence:?} ago");
}

#[tokio::test(start_paused = true)]
async fn one_that_stops_wants_nothing_new_and_is_gone_when_it_has() {
    let (controller, worker) = joined().await;
    let asked = {
        let controller = controller.clone();
        tokio::spawn(async move { controller.buffered(super::request("a", false), CallOptions::default()).await })
    };
    let jobs = worker.jobs();
    let job = jobs.next().await.unwrap();
    worker.begin_stop(Duration::from_secs(30));
    assert_eq!(seen(&controller).await.unwrap().status, WorkerStatus::Draining);
    job.done(super::finish(), None);
    asked.await.unwrap().unwrap();
    worker.wait().await.unwrap();
    assert!(seen(&controller).await.is_none());
}
