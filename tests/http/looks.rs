//! Looking at servers: who is there, what it serves, and what follows when it is away.

use std::time::Duration;

use mlx_serving_router::config::ClusterConfig;
use mlx_serving_router::dispatch::Controller;
use mlx_serving_router::wire::WorkerStatus;
use serde_json::{Value, json};

use crate::server::{Act, Server, finish, good, head, token, write};
use crate::{buffered, controller, event, read, streaming};

/// Looks often; whoever is silent for longer than `offline` ms is away.
fn often(offline: u64) -> Value {
    json!({"discovery": {"heartbeatIntervalMs": 20}, "controller": {"workerOfflineTimeoutMs": offline}})
}

fn models(names: &[&str]) -> Option<(u16, String)> {
    let data: Vec<Value> = names.iter().map(|name| json!({"id": name})).collect();
    Some((200, json!({"object": "list", "data": data}).to_string()))
}

#[tokio::test]
async fn a_server_is_asked_what_it_serves() {
    let server = Server::start(&good(&["x"])).await;
    server.now_looks(|looks| looks.models = models(&["m", "mlx/n"]));
    let controller = controller(&[("a", &server, json!({"models": null}))], json!({})).await;
    assert_eq!(controller.cluster_status().models, ["m", "mlx/n"]);
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    assert!(controller.worker("a").unwrap().loaded_models.is_empty());
}

#[tokio::test]
async fn a_server_without_a_list_needs_its_models_in_the_configuration() {
    let server = Server::start(&good(&["x"])).await;
    // As mlx_lm.server does where no model was ever downloaded: a head, and then nothing.
    server.now_looks(|looks| looks.models = Some((200, String::new())));
    let config = json!({"nats": {"mode": "none"}, "discovery": {"heartbeatIntervalMs": 20},
        "workers": {"static": [{"workerId": "a", "url": format!("http://{}", server.address)}]}});
    let unknown = Controller::new(ClusterConfig::from_value(config).unwrap(), None).unwrap();
    unknown.start(None).await.unwrap();
    let known = controller(&[("a", &server, json!({}))], json!({})).await;
    assert_eq!(buffered(&known).await.unwrap().text, "x");
    assert!(unknown.workers().is_empty());
    server.now_looks(|looks| looks.models = models(&["m"]));
    unknown.wait_for_workers(1).await.unwrap();
}

#[tokio::test]
async fn a_list_of_models_stands_in_for_health() {
    for health in [404, 405, 501] {
        let server = Server::start(&good(&["x"])).await;
        server.now_looks(|looks| looks.health = Some((health, "Not Found".into())));
        let controller = controller(&[("a", &server, json!({}))], json!({})).await;
        assert_eq!(buffered(&controller).await.unwrap().text, "x");
    }
}

#[tokio::test]
async fn a_server_that_is_unwell_or_silent_goes_offline_and_comes_back_as_what_it_was() {
    for unwell in [Some((503, "{}".to_owned())), None] {
        let server = Server::start(&good(&["x"])).await;
        let controller = controller(&[("a", &server, json!({}))], often(200)).await;
        let mut events = controller.events();
        let first = controller.worker("a").unwrap().incarnation;
        server.now_looks(|looks| looks.health = unwell.clone());
        event(&mut events, "worker_offline").await;
        assert!(buffered(&controller).await.is_err());
        server.now_looks(|looks| looks.health = Some((200, String::new())));
        controller.wait_for_workers(1).await.unwrap();
        assert_eq!(controller.worker("a").unwrap().incarnation, first);
        assert_eq!(controller.worker("a").unwrap().status, WorkerStatus::Online);
        assert_eq!(buffered(&controller).await.unwrap().text, "x");
    }
}

#[tokio::test]
async fn a_server_that_nobody_listens_for_gets_nothing_new_at_once() {
    let mut server = Server::start(&[head(), token("x"), Act::Stall]).await;
    let other = Server::start(&good(&["y"])).await;
    let workers = [("a", &server, json!({"priority": 1})), ("b", &other, json!({}))];
    let offline_never = json!({"discovery": {"heartbeatIntervalMs": 20}, "controller": {"workerOfflineTimeoutMs": 600_000}});
    let controller = controller(&workers, offline_never).await;
    let mut events = controller.events();
    let mut stream = streaming(&controller).await.unwrap();
    let address = server.address;
    server.stop().await;
    event(&mut events, "worker_offline").await;
    assert!(read(&mut stream).await.is_err());
    assert_eq!(buffered(&controller).await.unwrap().worker_id.as_str(), "b");
    let again = Server::start_at(address, &good(&["z"])).await;
    event(&mut events, "worker_replaced").await;
    assert_eq!(buffered(&controller).await.unwrap().text, "z");
    drop(again);
}

#[tokio::test]
async fn a_server_that_comes_later_is_found() {
    let mut server = Server::start(&good(&["x"])).await;
    let address = server.address;
    server.stop().await;
    let config = json!({"nats": {"mode": "none"}, "discovery": {"heartbeatIntervalMs": 20},
        "workers": {"static": [{"workerId": "a", "url": format!("http://{address}")}]}});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), None).unwrap();
    controller.start(None).await.unwrap();
    assert!(buffered(&controller).await.is_err());
    let server = Server::start_at(address, &good(&["x"])).await;
    controller.wait_for_workers(1).await.unwrap();
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
    drop(server);
}

#[tokio::test]
async fn a_server_that_works_for_us_is_there_even_if_it_answers_nothing_else() {
    // Signs of life for three times as long as silence may last.
    let mut script = vec![head()];
    for _ in 0..30 {
        script.extend([write(": keepalive\n\n"), Act::Pause(Duration::from_millis(20))]);
    }
    script.extend([token("x"), write(&finish())]);
    let server = Server::start(&script).await;
    let controller = controller(&[("a", &server, json!({}))], often(200)).await;
    server.now_looks(|looks| looks.health = None);
    assert_eq!(buffered(&controller).await.unwrap().text, "x");
}

#[tokio::test]
async fn a_server_that_has_work_of_ours_is_there_even_if_it_says_nothing() {
    // As one that reads a long prompt before it sends so much as a head.
    let server = Server::start(&[Act::Wait, head(), token("x"), write(&finish())]).await;
    let controller = controller(&[("a", &server, json!({}))], often(200)).await;
    let mut events = controller.events();
    server.now_looks(|looks| looks.health = None);
    let answer = buffered(&controller);
    let silence = async {
        server.was_asked(1).await;
        tokio::time::sleep(Duration::from_millis(800)).await;
        assert_eq!(controller.worker("a").unwrap().status, WorkerStatus::Online);
        server.go_on();
    };
    assert_eq!(tokio::join!(answer, silence).0.unwrap().text, "x");
    event(&mut events, "worker_offline").await;
}
