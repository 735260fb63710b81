//! What the tests of the fault catalogue share. `tests/FAULTS.md` says where each case is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::*;

/// What requests ended with, in the order of their beginnings.
pub(crate) type Ends = Vec<Result<Answer, ControllerError>>;

/// A worker that decides by the number of a request, from 1, what it does about it; gives how many there were.
pub(crate) fn deciding(
    controller: &Controller,
    registration: &Registration,
    mut decides: impl FnMut(u64) -> Vec<Act> + Send + 'static,
) -> Arc<AtomicU64> {
    let mut port = controller.attach_local(registration).unwrap();
    let asked = Arc::<AtomicU64>::default();
    let count = asked.clone();
    tokio::spawn(async move {
        let (leave, _leaving) = tokio::sync::mpsc::channel(1);
        while let Some(message) = port.recv().await {
            if let LocalMessage::Request { postbox, .. } = message {
                let number = count.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::spawn(perform(decides(number), postbox, leave.clone()));
            }
        }
    });
    asked
}

/// So many workers of this room; they fail like this while the switch is on, and answer after `busy` ms otherwise.
pub(crate) fn fleet(
    controller: &Controller,
    count: usize,
    room: u32,
    fault: &[Act],
    busy: u64,
) -> (Arc<AtomicBool>, Vec<Arc<AtomicU64>>) {
    let faulty = Arc::new(AtomicBool::new(true));
    let workers = (0..count).map(|number| {
        let (faulty, fault) = (faulty.clone(), fault.to_vec());
        let registration = registration(&format!("w{number}"), &["m"], room);
        deciding(controller, &registration, move |_| match faulty.load(Ordering::Relaxed) {
            true => fault.clone(),
            false => vec![Accept, Wait(busy), Respond("ok")],
        })
    });
    let workers = workers.collect();
    (faulty, workers)
}

/// Asks so many times a second for so long, whatever becomes of it, and returns when the last one has ended.
pub(crate) async fn load(controller: &Controller, per_second: u64, span: Duration, asks: fn(u64) -> InferenceRequest) -> Ends {
    let start = Instant::now();
    let count = per_second * span.as_millis() as u64 / 1_000;
    let mut calls = JoinSet::new();
    for number in 0..count {
        tokio::time::sleep_until(start + Duration::from_micros(1_000_000 / per_second) * u32::try_from(number).unwrap()).await;
        let controller = controller.clone();
        calls.spawn(async move { (number, controller.buffered(asks(number), CallOptions::default()).await) });
    }
    let mut ends = calls.join_all().await;
    ends.sort_by_key(|(number, _)| *number);
    ends.into_iter().map(|(_, end)| end).collect()
}

/// Any request; the controller names it.
pub(crate) fn any(_: u64) -> InferenceRequest {
    request()
}

pub(crate) fn total(workers: &[Arc<AtomicU64>]) -> u64 {
    workers.iter().map(|asked| asked.load(Ordering::Relaxed)).sum()
}

pub(crate) fn succeeded(ends: &Ends) -> usize {
    ends.iter().filter(|end| end.is_ok()).count()
}

pub(crate) fn ended_with(ends: &Ends, code: Code) -> usize {
    ends.iter().filter(|end| end.as_ref().is_err_and(|error| error.code() == code)).count()
}

/// The states of all breakers, by worker.
pub(crate) fn breakers(controller: &Controller) -> Vec<&'static str> {
    controller.workers().iter().map(|worker| worker.breaker.as_str()).collect()
}

/// Why breakers opened, once the controller has stopped.
pub(crate) async fn reasons(controller: &Controller, mut events: mlx_serving_router::dispatch::Events) -> Vec<String> {
    controller.stop(Duration::ZERO).await;
    let mut reasons = Vec::new();
    while let Some(event) = events.next().await {
        if event.kind == "breaker_changed" && event.details["to"] == "OPEN" {
            reasons.push(event.details["reason"].as_str().unwrap().to_owned());
        }
    }
    reasons
}

/// A started controller with this of `loadBalancing` too.
pub(crate) async fn balancing(routing: Value, balancing: Value) -> Controller {
    let config = json!({"nats": {"mode": "none"}, "requestRouting": routing, "loadBalancing": balancing});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    controller
}

/// The text of every test under a folder.
fn sources(folder: &std::path::Path) -> String {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let text = entries.map(|path| match path.extension().and_then(|end| end.to_str()) {
        _ if path.is_dir() => sources(&path),
        Some("rs" | "py") => std::fs::read_to_string(&path).unwrap(),
        _ => String::new(),
    });
    text.collect()
}

#[test]
fn the_table_of_the_catalogue_is_whole_and_names_tests_that_exist() {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let table = std::fs::read_to_string(tests.join("FAULTS.md")).unwrap();
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| case")).collect();
    let numbers: Vec<u32> = rows.iter().map(|row| row[2..].split(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (1..=40).collect::<Vec<_>>());
    let sources = sources(&tests);
    let mut named = 0;
    for name in rows.iter().flat_map(|row| row.split('`').skip(1).step_by(2)).filter(|name| name.matches('_').count() > 1) {
        let exists = ["fn", "def"].iter().any(|word| sources.contains(&format!("{word} {name}(")));
        assert!(exists, "there is no test {name}");
        named += 1;
    }
    assert!(named > 60);
}
