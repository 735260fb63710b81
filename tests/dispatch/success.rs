use super::*;

#[tokio::test(start_paused = true)]
async fn a_whole_answer() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Accept, Respond("Hello, world")]);
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.worker_id.as_str(), &*answer.model_id), ("Hello, world", "w", "m"));
    assert_eq!(answer.usage.completion_tokens, 3);
    assert_eq!((answer.metadata.retry_count, answer.metadata.tokens), (0, 3));
    assert_eq!(*answer.metadata, controller.request_metrics("r").unwrap());
    assert!(!format!("{answer:?}").contains("Hello"), "answers are never printed");
    let asked = worker.last();
    assert!(!asked.request.stream);
    assert_eq!((asked.attempt, asked.timeout), (1, Duration::from_secs(30)));
    assert_eq!(worker.cancellations(), 0);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn tokens_of_a_worker_that_streams_are_gathered() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Accept, Say("Hel"), Wait(5), Say("lo"), Done]);
    let answer = buffered(&controller).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.metadata.tokens), ("Hello", 2));
    assert_eq!(answer.metadata.time_to_first_token_ms, Some(0.0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_as_it_comes() {
    let controller = controller(json!({})).await;
    let worker = worker(&controller, "w", &[Accept, Wait(40), Say("a"), Say("b"), Wait(10), Say("c"), Done]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!((stream.request_id(), stream.worker_id().as_str()), ("r", "w"));
    assert!(stream.response().is_none());
    let indexes = |tokens: Vec<Token>| tokens.into_iter().map(|token| (token.index, token.text)).collect::<Vec<_>>();
    assert_eq!(indexes(stream.next_batch().await.unwrap()), [(0, "a".to_owned()), (1, "b".to_owned())]);
    assert_eq!(indexes(stream.next_batch().await.unwrap()), [(2, "c".to_owned())]);
    assert!(stream.next_batch().await.unwrap().is_empty());
    assert!(stream.next_batch().await.unwrap().is_empty());
    let answer = stream.response().unwrap();
    assert_eq!((answer.text.as_str(), answer.metadata.tokens), ("abc", 3));
    assert_eq!(answer.metadata.time_to_first_token_ms, Some(40.0));
    assert!(worker.last().request.stream);
    assert_eq!(worker.last().timeout, Duration::from_secs(600));
    assert_eq!(worker.cancellations(), 0);
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_tokens_is_a_success() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Accept, Done]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "");
    assert_eq!(stream.response().unwrap().metadata.time_to_first_token_ms, None);
    assert_eq!(buffered(&controller).await.unwrap().text, "");
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_whole_answer_to_a_streaming_request_is_one_token() {
    let controller = controller(json!({})).await;
    worker(&controller, "w", &[Respond("all at once")]);
    let mut stream = streaming(&controller).await.unwrap();
    assert_eq!(read(&mut stream).await.unwrap(), "all at once");
    assert_eq!(stream.response().unwrap().metadata.tokens, 3);
}

#[tokio::test(start_paused = true)]
async fn requests_are_spread_and_sessions_stay() {
    let controller = controller(json!({})).await;
    let workers: Vec<_> = (0..3).map(|n| worker(&controller, &format!("w{n}"), &[Wait(50), Respond("ok")])).collect();
    let calls = (0..12).map(|_| controller.buffered(request(), CallOptions::default()));
    futures_util::future::try_join_all(calls).await.unwrap();
    assert!(workers.iter().all(|worker| worker.asked() == 4));
    let session = |n: u32| InferenceRequest { session_id: Some(format!("s-{n}")), ..request() };
    for n in 0..5 {
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(controller.buffered(session(n), CallOptions::default()).await.unwrap().worker_id);
        }
        assert!(seen.iter().all(|worker| *worker == seen[0]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_fallback_model_answers_under_its_own_name() {
    let controller = controller(json!({"fallbackModels": {"big": ["huge", "m"]}})).await;
    let worker = worker(&controller, "w", &[Respond("small")]);
    let answer =
        controller.buffered(InferenceRequest { model_id: "big".into(), ..request() }, CallOptions::default()).await.unwrap();
    assert_eq!(&*answer.model_id, "m");
    assert_eq!(worker.last().request.model_id, "m");
}

#[tokio::test(start_paused = true)]
async fn a_worker_can_be_named() {
    let controller = controller(json!({})).await;
    let named = worker(&controller, "w0", &[Fail("WORKER_UNAVAILABLE")]);
    worker(&controller, "w1", &[Respond("ok")]);
    let options = |id: &str| CallOptions { worker_id: Some(id.into()), ..CallOptions::default() };
    assert_eq!(controller.buffered(request(), options("w1")).await.unwrap().worker_id.as_str(), "w1");
    let error = controller.buffered(request(), options("w0")).await.unwrap_err();
    assert_eq!((error.code(), named.asked()), (Code::WorkerUnavailable, 1));
    let error = controller.buffered(request(), options("nobody")).await.unwrap_err();
    assert_eq!(error.code(), Code::WorkerOffline);
    assert!(controller.force_open_breaker("w1"));
    let error = controller.buffered(request(), options("w1")).await.unwrap_err();
    assert_eq!(error.code(), Code::CircuitBreakerOpen);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_failed_is_not_asked_for_a_fallback_either() {
    let controller = controller(json!({"fallbackModels": {"big": ["m"]}})).await;
    let dead = worker_for(&controller, &registration("w0", &["big", "m"], 0), &[Fail("WORKER_UNAVAILABLE")]);
    worker(&controller, "w1", &[Respond("small")]);
    let answer =
        controller.buffered(InferenceRequest { model_id: "big".into(), ..request() }, CallOptions::default()).await.unwrap();
    assert_eq!((answer.worker_id.as_str(), dead.asked()), ("w1", 1));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_could_not_be_loaded_is_replaced_on_the_same_worker() {
    let controller = controller(json!({"fallbackModels": {"big": ["m"]}})).await;
    let worker = worker_for(&controller, &registration("w", &["big", "m"], 0), &[Fail("MODEL_LOAD_FAILED")]);
    let asks = controller.buffered(InferenceRequest { model_id: "big".into(), ..request() }, CallOptions::default());
    assert_eq!(asks.await.unwrap_err().code(), Code::NoWorkersAvailable);
    let models: Vec<_> = worker.asked.lock().iter().map(|asked| asked.request.model_id.clone()).collect();
    assert_eq!(models, ["big", "m"]);
}

/// Three workers under `prefix_aware`, of which each has answered the first turn of one of three conversations.
async fn conversations() -> (Controller, Vec<Scripted>, [(&'static str, WorkerId); 3]) {
    let config = json!({"nats": {"mode": "none"}, "loadBalancing": {"strategy": "prefix_aware"}});
    let controller = Controller::new(ClusterConfig::from_value(config).unwrap(), Some("c".into())).unwrap();
    controller.start(None).await.unwrap();
    let workers = (0..3).map(|n| worker(&controller, &format!("w{n}"), &[Accept, Wait(50), Say("ok"), Done])).collect();
    let asking = &controller;
    let first = |name| async move {
        let mut stream = asking.streaming(turn(name, 1), CallOptions::default()).await.unwrap();
        read(&mut stream).await.unwrap();
        (name, stream.response().unwrap().worker_id.clone())
    };
    let owners = futures_util::future::join_all(["a", "b", "c"].map(first)).await.try_into().unwrap();
    (controller, workers, owners)
}

/// A turn of a conversation: all that was said before, and one thing more.
fn turn(name: &str, turns: usize) -> InferenceRequest {
    let system = json!({"role": "system", "content": format!("{name}: {}", "be kind to whoever asks. ".repeat(20))});
    let mut messages = vec![system];
    for turn in 0..turns {
        messages.push(json!({"role": "user", "content": format!("And what of number {turn}?")}));
        messages.push(json!({"role": "assistant", "content": "It is well, too. ".repeat(10)}));
    }
    messages.pop();
    let messages = Some(Json::from_value(&messages).unwrap());
    InferenceRequest { model_id: "m".into(), messages, ..InferenceRequest::default() }
}

#[tokio::test(start_paused = true)]
async fn a_conversation_without_a_session_returns_to_its_worker() {
    let (controller, workers, owners) = conversations().await;
    assert!(workers.iter().all(|worker| worker.asked() == 1));
    for turns in 2..6 {
        for (name, owner) in owners.iter().rev() {
            let answer = controller.buffered(turn(name, turns), CallOptions::default()).await.unwrap();
            assert_eq!((&answer.worker_id, &*answer.metadata.attempts[0].choice), (owner, "prefix"));
        }
    }
    assert_at_rest(&controller);
}

#[tokio::test(start_paused = true)]
async fn a_conversation_moves_with_the_answer_when_its_worker_fails() {
    let (controller, workers, owners) = conversations().await;
    let (name, owner) = &owners[0];
    workers.iter().find(|worker| worker.id == *owner).unwrap().now_does(&[Fail("WORKER_UNAVAILABLE")]);
    let answer = controller.buffered(turn(name, 5), CallOptions::default()).await.unwrap();
    let choices: Vec<_> = answer.metadata.attempts.iter().map(|attempt| &*attempt.choice).collect();
    assert_eq!((answer.worker_id == *owner, choices), (false, vec!["prefix", "strategy"]));
    let next = controller.buffered(turn(name, 6), CallOptions::default()).await.unwrap();
    assert_eq!((next.worker_id, next.metadata.retry_count), (answer.worker_id, 0));
}
