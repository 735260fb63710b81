//! Why nobody was chosen.

use std::time::Duration;

use mlx_serving_router::routing::{Query, Refusal};

use super::{ANY, FAILURE, World, id, registration};

#[test]
fn case_7_nobody_is_online() {
    let world = World::new();
    assert_eq!(world.select().unwrap_err(), Refusal::NoWorkers);
    world.join(0, 0);
    assert!(world.router.drain("w0", world.now));
    assert_eq!(world.select().unwrap_err(), Refusal::NoWorkers);
}

#[test]
fn nobody_serves_the_model() {
    let world = World::of(1, 0);
    assert_eq!(world.query(&Query { model_id: "x", ..ANY }).unwrap_err(), Refusal::ModelNotFound);
    world.register(&registration("x0", "1", &["x"], 0));
    world.router.drain("x0", world.now);
    assert_eq!(world.query(&Query { model_id: "x", ..ANY }).unwrap_err(), Refusal::ModelNotFound);
}

#[test]
fn every_breaker_refuses() {
    let world = World::of(2, 1);
    world.finish("w0", FAILURE, 5);
    world.finish("w1", FAILURE, 5);
    let soonest = ["w0", "w1"].map(|worker| world.stats(worker).retry_after.unwrap()).into_iter().min().unwrap();
    assert_eq!(world.select().unwrap_err(), Refusal::NoHealthyWorkers { retry_after: soonest });
}

#[test]
fn everybody_who_could_is_full() {
    let world = World::of(2, 1);
    world.finish("w0", FAILURE, 5);
    let lease = world.select().unwrap();
    assert_eq!(world.select().unwrap_err(), Refusal::Full);
    drop(lease);
    assert!(world.select().is_ok());
}

#[test]
fn everybody_was_tried() {
    let world = World::of(3, 1);
    let tried = [id("w0"), id("w1")];
    let exclude = &tried[..];
    world.finish("w0", FAILURE, 5);
    let lease = world.query(&Query { exclude, ..ANY }).unwrap();
    assert_eq!(lease.worker_id().as_str(), "w2");
    assert_eq!(world.query(&Query { exclude, ..ANY }).unwrap_err(), Refusal::Full, "w2 is only busy");
    drop(lease);
    world.finish("w2", FAILURE, 5);
    let refusal = world.query(&Query { exclude, ..ANY }).unwrap_err();
    assert_eq!(refusal, Refusal::AllTried { total: 3, healthy: 1, excluded: 2 });
    ["w0", "w1", "w2"].into_iter().for_each(|worker| world.router.remove(&id(worker)));
    let refusal = world.query(&Query { exclude, ..ANY }).unwrap_err();
    assert_eq!(refusal, Refusal::AllTried { total: 0, healthy: 0, excluded: 2 });
}

#[test]
fn a_named_worker_is_taken_or_says_why_not() {
    let mut world = World::of(2, 1);
    let lease = world.named("w1").unwrap();
    assert_eq!((lease.worker_id().as_str(), lease.choice().as_str()), ("w1", "named"));
    assert_eq!(world.named("w1").unwrap_err(), Refusal::Full);
    drop(lease);
    assert_eq!(world.named("nobody").unwrap_err(), Refusal::WorkerOffline);
    let wrong = Query { model_id: "x", worker_id: Some("w1"), ..ANY };
    assert_eq!(world.query(&wrong).unwrap_err(), Refusal::ModelNotFound);
    world.finish("w1", FAILURE, 5);
    let retry_after = world.stats("w1").retry_after.unwrap();
    assert_eq!(world.named("w1").unwrap_err(), Refusal::CircuitOpen { retry_after });
    world.now += retry_after;
    let probe = world.named("w1").unwrap();
    assert_eq!(world.named("w1").unwrap_err(), Refusal::CircuitOpen { retry_after: Duration::ZERO });
    drop(probe);
    world.router.deregister(&id("w1"), world.now);
    assert_eq!(world.named("w1").unwrap_err(), Refusal::WorkerOffline);
    world.pass(15_000);
    world.router.expire(world.now);
    assert_eq!(world.named("w0").unwrap_err(), Refusal::WorkerOffline);
}

#[tokio::test]
async fn a_worker_that_cannot_be_had_frees_nothing() {
    let world = World::of(1, 1);
    world.router.freeze(world.now);
    world.router.thaw(world.now);
    let freed = world.router.capacity_freed().notified();
    tokio::pin!(freed);
    freed.as_mut().enable();
    assert_eq!(world.named("w0").unwrap_err(), Refusal::Full);
    assert!(futures_util::poll!(freed).is_pending(), "whoever waits for room would ask again at once, and again");
    assert_eq!(world.worker("w0").in_flight, 0);
}
