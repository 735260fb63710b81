//! Models that are being loaded, and an engine that wants less, in paused time.

use std::time::Duration;

use mlx_serving_router::transport::Mailbox;
use mlx_serving_router::wire::{Phase, Priority, Reply};
use mlx_serving_router::worker::WorkerOptions;

use super::{Local, accepted, error, finish, options, reply, request, silent};

const MINUTE: Duration = Duration::from_secs(60);

/// A worker with two models, of which `big` is not loaded.
async fn two_models(max_concurrent: u32) -> Local {
    let models = vec!["tiny".into(), "big".into()];
    Local::with(WorkerOptions { models, ..options("w", max_concurrent, 64) }).await
}

async fn ask(local: &Local, id: &str, model: &str, priority: Priority) -> Mailbox {
    ask_for(local, id, model, priority, MINUTE).await
}

async fn ask_for(local: &Local, id: &str, model: &str, priority: Priority, timeout: Duration) -> Mailbox {
    let mut asked = request(id, true);
    asked.model_id = model.into();
    asked.priority = priority;
    local.ask(asked, 1, timeout).await
}

fn loading(local: &Local, models: &[&str]) {
    let loading = models.iter().map(ToString::to_string).collect();
    local.worker.jobs().report(Phase::Loading, vec!["tiny".into()], loading);
}

fn next_id(local: &Local) -> Option<String> {
    let job = local.worker.jobs().get(Some(Duration::ZERO))?;
    job.done(finish(), None);
    Some(job.request().request_id.clone())
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_put_back_waits_for_its_model_and_holds_no_place() {
    let local = two_models(1).await;
    let mut first = ask(&local, "b1", "big", Priority::Normal).await;
    let mut second = ask(&local, "b2", "big", Priority::Normal).await;
    let mut other = ask(&local, "t", "tiny", Priority::Low).await;
    for (mailbox, place) in [(&mut first, 0), (&mut second, 1), (&mut other, 2)] {
        assert_eq!(accepted(mailbox).await, place);
    }
    let job = local.job().await;
    assert_eq!(job.request().request_id, "b1");
    loading(&local, &["big"]);
    job.put_back();
    job.error("WORKER_UNAVAILABLE", "it is not this one's any more", None);
    drop(job);
    assert!(silent(&mut first).await, "what is put back is neither ended nor lost");
    assert_eq!(local.worker.jobs().waiting_models(), ["big", "tiny"]);
    assert_eq!(next_id(&local).as_deref(), Some("t"));
    assert_eq!(next_id(&local), None);
    loading(&local, &[]);
    assert_eq!((next_id(&local), next_id(&local)), (Some("b1".into()), Some("b2".into())), "in the order in which they came");
    assert!(local.worker.jobs().waiting_models().is_empty());
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_job_gets_it_when_its_model_is_loaded() {
    let local = two_models(1).await;
    loading(&local, &["big"]);
    let mut mailbox = ask(&local, "b", "big", Priority::Normal).await;
    accepted(&mut mailbox).await;
    let jobs = local.worker.jobs();
    let waiting = tokio::spawn(async move { jobs.next().await.unwrap().request().request_id.clone() });
    tokio::time::sleep(MINUTE / 2).await;
    assert!(!waiting.is_finished());
    loading(&local, &[]);
    assert_eq!(waiting.await.unwrap(), "b");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_has_the_time_that_it_came_with_once_its_model_is_loaded() {
    let local = two_models(1).await;
    let limit = Duration::from_secs(4);
    let mut before = ask_for(&local, "before", "big", Priority::Normal, limit).await;
    accepted(&mut before).await;
    tokio::time::sleep(limit / 2).await;
    loading(&local, &["big"]);
    let mut meanwhile = ask_for(&local, "meanwhile", "big", Priority::Normal, limit).await;
    accepted(&mut meanwhile).await;
    tokio::time::sleep(MINUTE).await;
    assert!(silent(&mut before).await && silent(&mut meanwhile).await);
    let start = tokio::time::Instant::now();
    loading(&local, &[]);
    for mailbox in [&mut before, &mut meanwhile] {
        assert_eq!(error(mailbox).await.0, "WORKER_TIMEOUT");
        assert_eq!(start.elapsed().as_secs(), 4, "each has the time that it came with");
    }
}

#[tokio::test(start_paused = true)]
async fn a_model_that_does_not_come_holds_nobody_longer_than_loading_may_take() {
    let local = two_models(1).await; // modelLoadTimeoutMs: 120 s
    let mut before = ask_for(&local, "before", "big", Priority::Normal, MINUTE).await;
    accepted(&mut before).await;
    let job = local.job().await;
    loading(&local, &["big"]);
    job.put_back();
    let start = tokio::time::Instant::now();
    tokio::time::sleep(MINUTE).await;
    let mut meanwhile = ask_for(&local, "meanwhile", "big", Priority::Normal, Duration::from_secs(1)).await;
    accepted(&mut meanwhile).await;
    for (mailbox, after) in [(&mut before, 120), (&mut meanwhile, 180)] {
        tokio::time::sleep_until(start + Duration::from_secs(after - 1)).await;
        assert!(silent(mailbox).await);
        let Reply::Error { message, code, .. } = reply(mailbox).await else { panic!("it was to end badly") };
        assert_eq!((code.as_deref(), start.elapsed().as_secs()), (Some("WORKER_TIMEOUT"), after));
        assert!(message.contains("modelLoadTimeoutMs: 120000"), "{message}");
    }
    assert!(local.worker.jobs().waiting_models().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_model_can_be_cancelled_and_ends_with_the_worker() {
    let local = two_models(2).await;
    loading(&local, &["big"]);
    let mut left = ask(&local, "left", "big", Priority::Normal).await;
    let mut cut = ask(&local, "cut", "big", Priority::Normal).await;
    accepted(&mut left).await;
    accepted(&mut cut).await;
    local.cancel("left", 1);
    assert_eq!(error(&mut left).await.0, "CANCELLED");
    local.worker.stop(Duration::ZERO).await;
    assert_eq!(error(&mut cut).await.0, "WORKER_UNAVAILABLE");
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ended_cannot_be_put_back() {
    let local = two_models(1).await;
    let mut mailbox = ask(&local, "b", "big", Priority::Normal).await;
    accepted(&mut mailbox).await;
    let job = local.job().await;
    local.cancel("b", 1);
    assert_eq!(error(&mut mailbox).await.0, "CANCELLED");
    job.put_back();
    drop(job);
    assert!(local.worker.jobs().waiting_models().is_empty());
    let mut next = ask(&local, "c", "tiny", Priority::Normal).await;
    accepted(&mut next).await;
    assert_eq!(next_id(&local).as_deref(), Some("c"), "its place is free");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_is_short_of_memory_refuses_by_priority_those_that_wait_too() {
    let local = two_models(1).await;
    let mut running = ask(&local, "running", "tiny", Priority::Low).await;
    accepted(&mut running).await;
    let job = local.job().await;
    let mut low = ask(&local, "low", "tiny", Priority::Low).await;
    let mut normal = ask(&local, "normal", "tiny", Priority::Normal).await;
    accepted(&mut low).await;
    accepted(&mut normal).await;

    local.worker.jobs().refuse(Some(Priority::Low), "short of memory", None);
    assert_eq!(error(&mut low).await, ("WORKER_OVERLOADED".into(), Some(500)), "nothing is known of how long they take");
    assert_eq!(error(&mut ask(&local, "l2", "tiny", Priority::Low).await).await.0, "WORKER_OVERLOADED");
    assert_eq!(accepted(&mut ask(&local, "h", "tiny", Priority::High).await).await, 0);

    tokio::time::sleep(Duration::from_secs(3)).await;
    job.done(finish(), None);
    local.worker.jobs().refuse(Some(Priority::High), "out of memory", None);
    assert_eq!(error(&mut normal).await, ("WORKER_OVERLOADED".into(), Some(3000)), "as long as the last one took");
    local.worker.jobs().refuse(Some(Priority::High), "out of memory", Some(70));
    assert_eq!(error(&mut ask(&local, "h2", "tiny", Priority::High).await).await.1, Some(70));

    local.worker.jobs().refuse(None, "", None);
    assert_eq!(accepted(&mut ask(&local, "l3", "tiny", Priority::Low).await).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_worker_counts_how_long_requests_are_worked_on_and_not_how_long_they_wait() {
    let local = Local::start(1, 1).await;
    let mut mailboxes = Vec::new();
    for id in ["a", "b", "c"] {
        let mut mailbox = local.ask_stream(id).await;
        accepted(&mut mailbox).await;
        mailboxes.push(mailbox);
        if mailboxes.len() > 1 {
            let job = local.worker.jobs().get(Some(Duration::ZERO)).unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
            job.done(finish(), None);
        }
    }
    let mut last = local.ask_stream("d").await;
    accepted(&mut last).await;
    assert_eq!(error(&mut local.ask_stream("e").await).await.1, Some(2000));
}
