//! A session stays on its worker while that can take it.

use mlx_serving_router::routing::{Choice, Outcome, Query, RouterEvent};

use super::{ANY, FAILURE, World, id, registration};

fn owner(world: &World, session: &str) -> String {
    world.select_for(session).worker_id().to_string()
}

fn other(worker: &str) -> &'static str {
    if worker == "w0" { "w1" } else { "w0" }
}

#[test]
fn controllers_agree_on_the_first_worker_without_talking() {
    let one = World::of(10, 0);
    let other = World::new();
    (0..10).rev().for_each(|number| other.join(number, 0));
    drop(other.select().unwrap());
    for session in (0..200).map(|number| format!("s-{number}")) {
        let lease = one.select_for(&session);
        assert_eq!(lease.choice(), Choice::Rendezvous);
        assert_eq!(lease.worker_id().as_str(), owner(&other, &session));
    }
}

#[test]
fn case_8_a_session_stays_where_it_is_when_the_fleet_grows() {
    let world = World::of(3, 0);
    let sessions: Vec<_> = (0..100).map(|number| format!("s-{number}")).collect();
    let before: Vec<_> = sessions.iter().map(|session| owner(&world, session)).collect();
    (3..30).for_each(|number| world.join(number, 0));
    for (session, before) in sessions.iter().zip(before) {
        let lease = world.select_for(session);
        assert_eq!((lease.choice(), lease.worker_id().as_str()), (Choice::Affinity, before.as_str()));
    }
}

#[test]
fn a_worker_that_is_full_or_open_keeps_its_session() {
    let mut world = World::of(2, 1);
    let home = owner(&world, "s");
    let busy = world.named(&home).unwrap();
    let diverted = world.select_for("s");
    assert_eq!((diverted.worker_id().as_str(), diverted.choice()), (other(&home), Choice::Rendezvous));
    diverted.end(Outcome::Success, world.now);
    drop(busy);
    assert_eq!(owner(&world, "s"), home);
    world.finish(&home, FAILURE, 5);
    world.select_for("s").end(Outcome::Success, world.now);
    world.now += world.stats(&home).retry_after.unwrap();
    assert_eq!(owner(&world, "s"), home);
    assert!(!world.take_events().iter().any(|event| matches!(event, RouterEvent::SessionMoved { .. })));
}

#[test]
fn a_session_moves_to_the_worker_that_answered_after_its_own_had_failed() {
    let world = World::of(2, 0);
    let first = world.select_for("s");
    let home = first.worker_id().clone();
    first.end(FAILURE, world.now);
    let exclude = [home.clone()];
    let retry = || world.query(&Query { session_id: Some("s"), exclude: &exclude, ..ANY }).unwrap();
    retry().end(FAILURE, world.now);
    drop(retry());
    assert_eq!(owner(&world, "s"), *home, "only an answer moves it");
    retry().end(Outcome::Success, world.now);
    let moved = world.select_for("s");
    assert_eq!((moved.worker_id().as_str(), moved.choice()), (other(&home), Choice::Affinity));
    let expected = RouterEvent::SessionMoved { worker_id: id(other(&home)), previous: home };
    assert_eq!(world.take_events().iter().filter(|event| **event == expected).count(), 1);
}

#[test]
fn a_new_incarnation_unpins_and_a_worker_that_is_gone_loses_its_sessions() {
    let mut world = World::of(2, 0);
    let home = owner(&world, "s");
    world.register(&registration(&home, "2", &["m"], 0));
    assert_eq!(world.select_for("s").choice(), Choice::Rendezvous);
    assert_eq!(world.select_for("s").choice(), Choice::Affinity);
    world.router.deregister(&id(&home), world.now);
    let moved = world.select_for("s");
    assert_eq!(moved.worker_id().as_str(), other(&home));
    world.pass(100);
    world.register(&registration(&home, "3", &["m"], 0));
    assert_eq!(owner(&world, "s"), other(&home));
}

#[test]
fn a_session_is_forgotten_when_it_was_not_used_for_long() {
    let mut world = World::of(5, 0);
    owner(&world, "s");
    world.pass(299_999);
    assert_eq!(world.select_for("s").choice(), Choice::Affinity);
    world.pass(300_000);
    assert_eq!(world.select_for("s").choice(), Choice::Rendezvous);
}

#[test]
fn case_39_of_too_many_sessions_the_oldest_are_forgotten() {
    let world = World::with(|settings| settings.max_sessions = 10);
    (0..3).for_each(|number| world.join(number, 0));
    for session in (0..1_000).map(|number| format!("s-{number}")) {
        owner(&world, &session);
    }
    let remembered = (990..1_000).filter(|number| world.select_for(&format!("s-{number}")).choice() == Choice::Affinity);
    assert_eq!(remembered.count(), 10);
    assert_eq!(world.select_for("s-989").choice(), Choice::Rendezvous);
}

#[test]
fn a_session_asks_for_a_model_that_its_worker_does_not_serve() {
    let world = World::of(1, 0);
    world.register(&registration("x0", "1", &["x"], 0));
    assert_eq!(owner(&world, "s"), "w0");
    let elsewhere = world.query(&Query { model_id: "x", session_id: Some("s"), ..ANY }).unwrap();
    assert_eq!(elsewhere.worker_id().as_str(), "x0");
    assert_eq!(world.select_for("s").choice(), Choice::Affinity);
}

#[test]
fn without_affinity_sessions_mean_nothing() {
    let world = World::with(|settings| settings.session_affinity = false);
    (0..2).for_each(|number| world.join(number, 0));
    let workers: Vec<_> = (0..4).map(|_| owner(&world, "s")).collect();
    assert_eq!(workers, ["w0", "w1", "w0", "w1"]);
}
