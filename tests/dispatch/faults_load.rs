//! Cases of the fault catalogue that are about load: 16, 21 to 24, 29, 34, 38.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use mlx_serving_router::routing::Carrier;
use mlx_serving_router::wire::Priority;
use tokio::time::Instant;

use super::faults::*;
use super::*;

#[tokio::test(start_paused = true)]
async fn case_16_ten_thousand_cancellations_leave_nothing_and_blame_nobody() {
    let retry = json!({"budgetMinPerSecond": 1_000_000, "maxRetries": 4});
    let controller = controller(json!({"retry": retry})).await;
    // One of them fails in a way that breakers do not count, so that some callers leave while they wait for another.
    let unable = deciding(&controller, &registration("w0", &["m"], 4), |_| vec![Accept, Wait(2), Fail("MODEL_LOAD_FAILED")]);
    let workers = ["w1", "w2"].map(|id| {
        worker_for(&controller, &registration(id, &["m"], 4), &[Accept, Wait(5), Say("a"), Wait(5), Say("b"), Wait(5), Done])
    });
    let mut dice = fastrand::Rng::with_seed(16);
    let (mut left, mut answered) = (0, 0);
    for _ in 0..200 {
        let calls = (0..50).map(|_| {
            let (controller, stream) = (controller.clone(), dice.bool());
            let leaves = Duration::from_micros(dice.u64(..60_000));
            tokio::time::timeout(leaves, async move {
                if !stream {
                    return controller.buffered(request(), CallOptions::default()).await.map(|answer| answer.text);
                }
                read(&mut controller.streaming(request(), CallOptions::default()).await?).await
            })
        });
        for end in futures_util::future::join_all(calls).await {
            match end {
                Err(_) => left += 1,
                Ok(text) => {
                    assert_eq!(text.unwrap(), "ab");
                    answered += 1;
                }
            }
        }
        assert_at_rest(&controller);
    }
    assert!(left > 7_000 && answered > 500 && unable.load(Ordering::Relaxed) > 500, "{left} left, {answered} answered");
    for (worker, stats) in controller.breaker_stats() {
        assert_eq!((stats.state.as_str(), stats.failure_count, stats.probes), ("CLOSED", 0, 0), "{worker}");
    }
    sleep(Duration::from_secs(1)).await;
    assert!(workers.iter().map(Scripted::cancellations).sum::<usize>() > 1_000);
    let text = controller.metrics_text();
    assert!(text.contains("mlx_router_store_entries{store=\"admission\"} 0\n"));
}

#[tokio::test(start_paused = true)]
async fn case_21_the_fleet_is_itself_again_soon_after_a_fault_under_full_load() {
    for fault in [vec![Accept, Wait(1), Fail("WORKER_UNAVAILABLE")], vec![Stall], vec![NobodyListens]] {
        let controller = controller(json!({})).await;
        // Room for 8 at a time, of 100 ms each: 80 a second.
        let (faulty, _) = fleet(&controller, 4, 2, &fault, 100);
        let outage = load(&controller, 76, Duration::from_secs(15), any).await;
        assert!(succeeded(&outage) == 0, "{fault:?}");
        faulty.store(false, Ordering::Relaxed);
        let recovering = load(&controller, 76, Duration::from_secs(30), any).await;
        assert!(succeeded(&recovering) > 0);
        let after = load(&controller, 76, Duration::from_secs(10), any).await;
        assert!(succeeded(&after) * 100 >= after.len() * 95, "{fault:?}: {} of {}", succeeded(&after), after.len());
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn case_22_when_most_workers_fail_half_of_the_time_they_are_used_all_the_same() {
    let controller = controller(json!({})).await;
    let workers: Vec<_> = (0..10)
        .map(|worker| {
            deciding(&controller, &registration(&format!("w{worker}"), &["m"], 0), move |number| match number % 2 {
                0 if worker > 0 => vec![Accept, Wait(10), Fail("WORKER_UNAVAILABLE")],
                _ => vec![Accept, Wait(10), Respond("ok")],
            })
        })
        .collect();
    load(&controller, 100, Duration::from_secs(10), any).await;
    assert!(breakers(&controller).iter().filter(|state| **state == "OPEN").count() > 5, "their rates trip them");
    let before = workers[0].load(Ordering::Relaxed);
    let ends = load(&controller, 100, Duration::from_secs(10), any).await;
    let good = workers[0].load(Ordering::Relaxed) - before;
    assert!(good < 400, "the good one is not left with everything: {good} of {}", ends.len());
    assert_eq!(ended_with(&ends, Code::NoHealthyWorkers) + ended_with(&ends, Code::QueueFull), 0);
    assert!(succeeded(&ends) * 100 > ends.len() * 70, "{} of {}", succeeded(&ends), ends.len());
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_22_when_most_workers_die_the_survivor_gets_no_more_than_it_can_take() {
    let controller = controller(json!({"admission": {"maxQueue": 20}})).await;
    let dead: Vec<_> = (0..9)
        .map(|number| deciding(&controller, &registration(&format!("dead{number}"), &["m"], 2), |_| vec![NobodyListens]))
        .collect();
    // 20 a second.
    let survivor = worker_for(&controller, &registration("w", &["m"], 2), &[Accept, Wait(100), Respond("ok")]);
    load(&controller, 100, Duration::from_secs(5), any).await;
    let before = (total(&dead), survivor.asked());
    let mut most = 0;
    let watch = async {
        loop {
            most = most.max(controller.worker("w").unwrap().in_flight);
            sleep(Duration::from_millis(3)).await;
        }
    };
    let ends = tokio::select! {
        ends = load(&controller, 100, Duration::from_secs(10), any) => ends,
        () = watch => Vec::new(),
    };
    assert_eq!((most, total(&dead)), (2, before.0), "the dead are left alone");
    assert_eq!(succeeded(&ends), survivor.asked() - before.1);
    assert!((190..=230).contains(&succeeded(&ends)), "{}", succeeded(&ends));
    assert_eq!(succeeded(&ends) + ended_with(&ends, Code::QueueFull), ends.len());
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_23_under_twice_the_load_the_fleet_does_what_it_can_and_the_important_first() {
    let asks = |number: u64| {
        let priority = match number % 10 {
            0 => Priority::High,
            1..=5 => Priority::Normal,
            _ => Priority::Low,
        };
        InferenceRequest { priority, ..request() }
    };
    // As it is, and with a queue that has no room for the low.
    for admission in [json!({}), json!({"maxQueue": 20})] {
        let controller = controller(json!({"admission": admission})).await;
        // 8 at a time, of 50 ms each: 160 a second.
        let (faulty, _) = fleet(&controller, 4, 2, &[], 50);
        faulty.store(false, Ordering::Relaxed);
        let started = Instant::now();
        let ends = load(&controller, 320, Duration::from_secs(12), asks).await;
        let goodput = succeeded(&ends) as f64 / started.elapsed().as_secs_f64();
        assert!(goodput >= 0.9 * 160.0, "{goodput} a second");
        let share = |wanted: Priority| {
            let of: Vec<_> = (0..).zip(&ends).filter(|(number, _)| asks(*number).priority == wanted).collect();
            of.iter().filter(|(_, end)| end.is_ok()).count() as f64 / of.len() as f64
        };
        let [high, normal, low] = [Priority::High, Priority::Normal, Priority::Low].map(share);
        assert!(high == 1.0, "{high} of the high");
        assert!(normal > low, "{normal} of the normal, {low} of the low");
        assert_eq!(succeeded(&ends) + ended_with(&ends, Code::QueueFull), ends.len());
        assert_at_rest(&controller);
    }
}

#[tokio::test(start_paused = true)]
async fn case_24_a_request_whose_time_passes_in_the_queue_is_never_sent() {
    let controller = controller(json!({})).await;
    let worker = worker_for(&controller, &registration("w", &["m"], 1), &[Wait(500), Respond("ok")]);
    let options = CallOptions { timeout: Some(Duration::from_millis(200)), ..CallOptions::default() };
    let started = Instant::now();
    let late = async {
        let error = controller.buffered(named("late"), options).await.unwrap_err();
        (error, started.elapsed())
    };
    let (running, (error, waited)) = tokio::join!(buffered(&controller), late);
    assert!(running.is_ok());
    assert_eq!((error.code(), waited), (Code::QueueFull, Duration::from_millis(200)));
    assert!(error.retry_after_ms().is_some());
    sleep(Duration::from_secs(2)).await;
    assert_eq!(worker.asked(), 1);
    assert!(controller.request_metrics("late").unwrap().attempts.is_empty());
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_29_a_reader_that_stands_still_holds_up_its_own_stream_alone() {
    let controller = controller(json!({})).await;
    let script: Vec<_> = (0..5_000).flat_map(|_| [Say("x"), Wait(1)]).chain([Done]).collect();
    let worker = worker(&controller, "w", &script);
    let mut stalled = controller.streaming(named("stalled"), CallOptions::default()).await.unwrap();
    let others = (0..3).map(|_| async {
        let mut stream = controller.streaming(request(), CallOptions::default()).await.unwrap();
        read(&mut stream).await.unwrap().len()
    });
    let started = Instant::now();
    assert_eq!(futures_util::future::join_all(others).await, [5_000; 3]);
    assert!(started.elapsed() < Duration::from_secs(11));
    // What was kept for it is bounded; the rest is lost, and it hears so.
    let mut kept = Vec::new();
    let error = loop {
        match stalled.next_batch().await {
            Ok(batch) => kept.extend(batch),
            Err(error) => break error,
        }
    };
    assert!((1..=1_025).contains(&kept.len()), "{} tokens", kept.len());
    assert!(kept.iter().enumerate().all(|(place, token)| token.index == place as u64));
    assert_eq!((error.code(), limit(&error)), (Code::StreamInterrupted, "reader"));
    worker.cancelled(1).await;
    assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_34_the_share_of_a_worker_that_comes_and_goes_falls() {
    let controller = controller(json!({})).await;
    let answers = |_| vec![Accept, Wait(10), Respond("ok")];
    deciding(&controller, &registration("steady", &["m"], 0), answers);
    let flapping = deciding(&controller, &registration("flapping", &["m"], 0), answers);
    let flap = async {
        for life in 0_u32.. {
            sleep(Duration::from_secs(2)).await;
            let again = Registration { incarnation: format!("life-{life}"), ..registration("flapping", &["m"], 0) };
            controller.router().register(&again, Carrier::Nats, Instant::now());
        }
    };
    let measure = async {
        let mut shares = Vec::new();
        for _ in 0..6 {
            let before = flapping.load(Ordering::Relaxed);
            let ends = load(&controller, 50, Duration::from_secs(10), any).await;
            assert_eq!(succeeded(&ends), 500, "requests that a restart cut off were answered by the other");
            shares.push((flapping.load(Ordering::Relaxed) - before) as f64 / 500.0);
        }
        shares
    };
    let shares = tokio::select! {
        shares = measure => shares,
        () = flap => Vec::new(),
    };
    assert!(shares[0] > 0.2, "{shares:?}");
    assert!(shares[1..].windows(2).all(|pair| pair[1] <= pair[0]), "{shares:?}");
    assert!(shares[5] < 0.05, "{shares:?}");
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn case_38_three_controllers_never_exceed_the_worker_that_they_share() {
    const ROOM: u32 = 4;
    let (running, most, refused) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default(), Arc::<AtomicUsize>::default());
    let mut controllers = Vec::new();
    for _ in 0..3 {
        let retry = json!({"revisitFailedWorkers": true, "maxRetries": 20, "budgetPercent": 1000, "budgetMinPerSecond": 1000});
        let controller = controller(json!({"retry": retry, "circuitBreaker": {"minimumRequests": 10_000}})).await;
        let events = controller.events();
        let mut port = controller.attach_local(&registration("shared", &["m"], ROOM)).unwrap();
        let (running, most, refused) = (running.clone(), most.clone(), refused.clone());
        tokio::spawn(async move {
            let (leave, _leaving) = tokio::sync::mpsc::channel(1);
            while let Some(message) = port.recv().await {
                let LocalMessage::Request { postbox, .. } = message else { continue };
                // The worker is the authority on its room.
                if running.load(Ordering::Relaxed) >= ROOM {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(perform(vec![Refuse(20)], postbox, leave.clone()));
                    continue;
                }
                most.fetch_max(running.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                let (running, leave) = (running.clone(), leave.clone());
                tokio::spawn(async move {
                    perform(vec![Accept, Wait(40)], postbox.clone(), leave.clone()).await;
                    running.fetch_sub(1, Ordering::Relaxed);
                    perform(vec![Respond("ok")], postbox, leave).await;
                });
            }
        });
        controllers.push((controller, events));
    }
    let ask = |controller: &Controller| {
        let controller = controller.clone();
        async move { load(&controller, 30, Duration::from_secs(10), any).await }
    };
    let ends = futures_util::future::join_all(controllers.iter().map(|(controller, _)| ask(controller))).await;
    assert_eq!(ends.iter().map(succeeded).sum::<usize>(), 900);
    assert_eq!(most.load(Ordering::Relaxed), ROOM);
    assert!(refused.load(Ordering::Relaxed) > 100, "{refused:?}");
    for (controller, events) in controllers {
        assert_eq!(controller.breaker_stats()[0].1.failure_count, 0);
        assert_at_rest(&controller);
        assert!(reasons(&controller, events).await.is_empty());
    }
}
