//! `prefix_aware`: prompts go where their beginnings lie in a cache, as far as load allows it.

use std::time::Duration;

use mlx_serving_router::config::Strategy;
use mlx_serving_router::routing::{Choice, HeartbeatVerdict, Registered};
use mlx_serving_router::wire::PrefixHashes;

use super::{ANY, FAILURE, Lease, Outcome, Query, World, heartbeat, id, registration};

/// With so many workers, `w0`, `w1` …, that take any number of requests.
fn fleet(workers: usize) -> World {
    let world = World::with(|settings| {
        settings.strategy = Strategy::PrefixAware;
        settings.worker_offline_timeout = Duration::from_secs(3_600);
    });
    (0..workers).for_each(|number| world.join(number, 0));
    world
}

fn prompt(text: &str) -> PrefixHashes {
    PrefixHashes::of_prompt("m", text)
}

/// A long text that begins with what makes it another than those of other names.
fn conversation(name: &str) -> String {
    format!("{name}: {}", "and so they went on talking. ".repeat(50))
}

impl World {
    fn ask(&self, text: &str) -> Lease {
        self.query(&Query { prompt: Some(&prompt(text)), ..ANY }).unwrap()
    }

    /// Who is chosen for a prompt, and why; the request comes to nothing.
    fn chosen(&self, text: &str) -> (String, Choice) {
        let lease = self.ask(text);
        (lease.worker_id().to_string(), lease.choice())
    }

    /// A worker answers a prompt.
    fn answer(&self, worker: &str, text: &str) {
        let query = Query { worker_id: Some(worker), prompt: Some(&prompt(text)), ..ANY };
        self.query(&query).unwrap().end(Outcome::Success, self.now);
    }

    /// A worker names the longest prefix of each of these prompts in a heartbeat.
    fn names(&self, worker: &str, sequence: u64, prompts: &[&str]) {
        let longest = |text: &&str| format!("{:016x}", prompt(text).hashes().last().unwrap());
        let mut report = heartbeat(worker, "1", sequence);
        report.cached_prefixes = prompts.iter().map(longest).collect();
        assert_eq!(self.beat(&report), HeartbeatVerdict::Taken);
    }
}

#[test]
fn a_conversation_returns_to_who_holds_its_beginning() {
    let world = fleet(3);
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        let lease = world.ask(&conversation(name));
        assert_eq!((lease.worker_id().as_str(), lease.choice()), (format!("w{number}").as_str(), Choice::Strategy));
        lease.end(Outcome::Success, world.now);
    }
    for (number, name) in [(2, "c"), (0, "a"), (1, "b"), (0, "a")] {
        let next = conversation(name) + "And then?";
        assert_eq!(world.chosen(&next), (format!("w{number}"), Choice::Prefix));
    }
}

#[test]
fn of_two_holders_the_one_that_holds_more_is_taken_then_the_one_with_less_to_do() {
    let world = fleet(3);
    let (short, long) = (conversation("a"), conversation("a") + &conversation("more"));
    world.answer("w1", &short);
    world.answer("w2", &long);
    assert_eq!(world.chosen(&long).0, "w2");
    world.answer("w1", &long);
    let _busy = world.named("w2").unwrap();
    assert_eq!((world.chosen(&long).0, world.chosen(&short).0), ("w1".into(), "w1".into()));
}

#[test]
fn a_prompt_that_nobody_knows_goes_to_who_has_least_to_do() {
    let world = fleet(3);
    world.answer("w1", &conversation("a"));
    let _busy = [world.named("w0").unwrap(), world.named("w1").unwrap()];
    let unknown = ("w2".to_owned(), Choice::Strategy);
    assert_eq!(world.chosen(&conversation("b")), unknown);
    assert_eq!(world.chosen("Hello"), unknown);
    assert_eq!(world.select().unwrap().worker_id().as_str(), "w2");
    let other_model = PrefixHashes::of_prompt("x", &conversation("a"));
    let lease = world.query(&Query { prompt: Some(&other_model), ..ANY }).unwrap();
    assert_eq!((lease.worker_id().as_str(), lease.choice()), ("w2", Choice::Strategy));
}

#[test]
fn what_all_prompts_begin_with_brings_nobody_together() {
    let world = fleet(2);
    let system = "You are a helpful assistant. ".repeat(20);
    let with_system = |name: &str| system.clone() + &conversation(name) + &conversation(name);
    world.answer("w1", &with_system("a"));
    assert_eq!(world.chosen(&with_system("b")).1, Choice::Strategy);
    assert_eq!(world.chosen(&(system.clone() + "Hello")), ("w1".into(), Choice::Prefix));
}

#[test]
fn the_holder_yields_to_load() {
    let world = fleet(2);
    world.answer("w1", &conversation("a"));
    let mut busy: Vec<_> = (0..4).map(|_| world.named("w1").unwrap()).collect();
    assert_eq!(world.chosen(&conversation("a")).0, "w1");
    busy.push(world.named("w1").unwrap());
    assert_eq!(world.chosen(&conversation("a")), ("w0".into(), Choice::Strategy));
    world.answer("w0", &conversation("a"));
    assert_eq!(world.chosen(&conversation("a")), ("w0".into(), Choice::Prefix));
    busy.extend((0..10).map(|_| world.named("w0").unwrap()));
    assert_eq!(world.chosen(&conversation("a")), ("w1".into(), Choice::Prefix));
}

#[test]
fn a_full_or_excluded_holder_or_one_whose_breaker_is_open_is_passed_over() {
    let world = fleet(1);
    world.join(1, 1);
    world.answer("w1", &conversation("a"));
    let full = world.named("w1").unwrap();
    assert_eq!(world.chosen(&conversation("a")).0, "w0");
    drop(full);
    let exclude = [id("w1")];
    let lease = world.query(&Query { prompt: Some(&prompt(&conversation("a"))), exclude: &exclude, ..ANY }).unwrap();
    assert_eq!(lease.worker_id().as_str(), "w0");
    drop(lease);
    assert_eq!(world.chosen(&conversation("a")).0, "w1");
    world.finish("w1", FAILURE, 5);
    assert_eq!(world.chosen(&conversation("a")), ("w0".into(), Choice::Strategy));
}

#[test]
fn only_an_answer_teaches() {
    let world = fleet(2);
    let text = conversation("a");
    let choice = || world.chosen(&text).1;
    world.ask(&text).end(FAILURE, world.now);
    world.ask(&text).end(Outcome::Ignored, world.now);
    drop(world.ask(&text));
    assert_eq!(choice(), Choice::Strategy);
    let running = world.ask(&text);
    assert_eq!(choice(), Choice::Strategy);
    running.first_token(Duration::from_millis(10), world.now);
    assert_eq!(world.chosen(&text), (running.worker_id().to_string(), Choice::Prefix));
}

#[test]
fn a_session_stands_above_the_prompt_and_teaches_it() {
    let world = fleet(5);
    let text = conversation("a");
    let known = prompt(&text);
    let ask = || world.query(&Query { session_id: Some("s"), prompt: Some(&known), ..ANY }).unwrap();
    let own = ask().worker_id().to_string();
    let other = if own == "w0" { "w1" } else { "w0" };
    world.answer(other, &text);
    let lease = ask();
    assert_eq!((lease.worker_id().as_str(), lease.choice()), (own.as_str(), Choice::Affinity));
    lease.end(Outcome::Success, world.now);
    let _busy = world.named(other).unwrap();
    assert_eq!(world.chosen(&text), (own, Choice::Prefix));
}

#[test]
fn what_a_heartbeat_names_counts() {
    let world = fleet(3);
    world.names("w2", 1, &[&conversation("a"), &conversation("b")]);
    assert_eq!(world.chosen(&(conversation("b") + "And then?")), ("w2".into(), Choice::Prefix));
    let mut report = heartbeat("w1", "1", 1);
    report.cached_prefixes = vec!["5f3a".into(), String::new(), "not a hash at all".into()];
    assert_eq!(world.beat(&report), HeartbeatVerdict::Taken);
    world.names("w2", 2, &[]);
    assert_eq!(world.chosen(&conversation("a")), ("w2".into(), Choice::Prefix));
}

#[test]
fn a_heartbeat_names_so_many_prompts_and_no_more() {
    let world = fleet(2);
    let prompts: Vec<_> = (0..300).map(|number| conversation(&number.to_string())).collect();
    world.names("w1", 1, &prompts.iter().map(String::as_str).collect::<Vec<_>>());
    let known = prompts.iter().filter(|text| world.chosen(text).1 == Choice::Prefix).count();
    assert_eq!(known, 256);
}

#[test]
fn a_worker_that_is_gone_or_begins_anew_holds_nothing() {
    let world = fleet(3);
    world.answer("w1", &conversation("a"));
    world.answer("w2", &conversation("b"));
    world.router.remove(&id("w1"));
    assert_eq!(world.chosen(&conversation("a")).1, Choice::Strategy);
    world.join(1, 0);
    assert_eq!(world.chosen(&conversation("a")).1, Choice::Strategy);
    assert_eq!(world.register(&registration("w2", "2", &["m"], 0)), Registered::Replaced);
    assert_eq!(world.chosen(&conversation("b")).1, Choice::Strategy);
    world.answer("w2", &conversation("b"));
    assert_eq!(world.chosen(&conversation("b")), ("w2".into(), Choice::Prefix));
}

#[test]
fn what_was_not_used_for_long_is_forgotten() {
    let mut world = fleet(2);
    world.answer("w1", &conversation("a"));
    world.answer("w1", &conversation("b"));
    world.pass(599_000);
    world.answer("w1", &conversation("b"));
    world.pass(1_000);
    assert_eq!(world.chosen(&conversation("a")).1, Choice::Strategy);
    assert_eq!(world.chosen(&conversation("b")), ("w1".into(), Choice::Prefix));
}

#[test]
fn no_other_strategy_looks_at_prompts() {
    let world = World::of(2, 0);
    assert!(!world.router.wants_prefixes());
    world.answer("w1", &conversation("a"));
    assert_eq!(world.chosen(&conversation("a")), ("w0".into(), Choice::Strategy));
}
