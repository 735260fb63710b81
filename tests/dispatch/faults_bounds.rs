//! Case 39 of the fault catalogue: a million distinct session and request ids, and everything at its cap.

use super::faults::*;
use super::*;

/// What a caller can make up, made up anew by each request.
fn made_up(number: u64) -> InferenceRequest {
    let model = if number.is_multiple_of(10) { format!("model-{number}") } else { "m".into() };
    InferenceRequest {
        request_id: format!("request-{number}"),
        model_id: model,
        prompt: Some(format!("{number} {:0>1000}", "")),
        session_id: Some(format!("session-{number}")),
        ..InferenceRequest::default()
    }
}

/// Asks from one number to another, sixteen at a time; every sixteenth names a worker that nobody knows, and every
/// sixteenth goes away before its answer.
async fn ask(controller: &Controller, from: u64, to: u64) {
    for first in (from..to).step_by(16) {
        let calls = (first..first + 16).map(|number| async move {
            let worker_id = number.is_multiple_of(16).then(|| format!("worker-{number}"));
            let options = CallOptions { worker_id, ..CallOptions::default() };
            let leaves = Duration::from_millis(if number % 16 == 1 { 1 } else { 1_000 });
            tokio::time::timeout(leaves, controller.buffered(made_up(number), options)).await.is_ok_and(|end| end.is_ok())
        });
        let answered = futures_util::future::join_all(calls).await;
        assert!(answered.iter().filter(|answered| **answered).count() >= 12, "{first}: {answered:?}");
    }
}

async fn controller_with_caps() -> Controller {
    let config = json!({
        "nats": {"mode": "none"},
        "requestRouting": {"maxSessions": 1_000},
        "requestMetrics": {"maxEntries": 1_000},
        "loadBalancing": {"strategy": "prefix_aware"},
    });
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    for id in ["w0", "w1"] {
        deciding(&controller, &registration(id, &["m"], 0), |_| vec![Accept, Wait(2), Respond("ok")]);
    }
    controller
}

/// Everything is at its cap, and nothing is named after what callers made up.
fn assert_bounded(controller: &Controller) {
    assert_at_rest(controller);
    let text = controller.metrics_text();
    let entries = |store: &str| {
        let series = format!("mlx_router_store_entries{{store=\"{store}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse::<usize>().unwrap()
    };
    assert_eq!(["admission", "inbox", "request_metadata", "sessions"].map(entries), [0, 0, 1_000, 1_000]);
    assert!((1_000..=65_536).contains(&entries("prefixes")));
    assert_eq!(controller.all_request_metrics().len(), 1_000);
    assert!(!["model-", "session-", "request-", "worker-"].iter().any(|made_up| text.contains(made_up)));
    assert!(text.lines().count() < 400, "{} lines", text.lines().count());
}

#[tokio::test(start_paused = true)]
async fn case_39_what_callers_make_up_stays_within_bounds() {
    let controller = controller_with_caps().await;
    ask(&controller, 0, 20_000).await;
    assert_bounded(&controller);
}

/// Run by `cargo test --release --test dispatch case_39 -- --ignored`.
#[tokio::test(start_paused = true)]
#[ignore = "takes a minute where the program is not optimized"]
async fn case_39_a_million_of_them_take_no_more_memory_than_the_first() {
    let controller = controller_with_caps().await;
    // Until every cap is reached, that of prefixes last.
    ask(&controller, 0, 200_000).await;
    let before = resident_mb();
    ask(&controller, 200_000, 1_000_000).await;
    assert_bounded(&controller);
    let after = resident_mb();
    assert!(after < before + 8, "{before} MB before, {after} MB after");
}

/// Memory of this process that is in use, in megabytes.
fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) / 1_024
}
