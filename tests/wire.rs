//! The golden messages of `tests/fixtures/wire`: every one is read as what it means and written as it stands there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use mlx_serving_router::error::{ControllerError, ControllerErrorCode};
use mlx_serving_router::wire::{
    Cancel, Capacity, ControllerNotice, Deregistration, Feature, Finish, Heartbeat, HeartbeatMetrics, InferenceRequest, Json,
    Phase, PrefixHashes, Priority, Registration, Reply, Resume, Skills, Token, WorkerId, WorkerStatus, header, older, subject,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: Value,
    #[serde(default)]
    on: String,
    message: Option<Value>,
    text: Option<String>,
    rewritten: Option<Value>,
    #[serde(default)]
    means: Value,
    #[serde(default)]
    verdict: String,
    #[serde(default)]
    prefix: String,
    #[serde(default, rename = "workerId")]
    worker_id: Option<WorkerId>,
    #[serde(default)]
    subject: String,
}

impl Case {
    fn bytes(&self) -> Vec<u8> {
        match (&self.message, &self.text) {
            (Some(message), None) => serde_json::to_vec(message).unwrap(),
            (None, Some(text)) => text.clone().into_bytes(),
            _ => panic!("{}: either message or text", self.name),
        }
    }

    fn rewritten(&self) -> &Value {
        self.rewritten.as_ref().or(self.message.as_ref()).unwrap()
    }

    /// Reads the message, writes it again, compares, and gives it.
    fn there_and_back<T: DeserializeOwned + Serialize>(&self) -> T {
        let read: T = serde_json::from_slice(&self.bytes()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        assert_same(&serde_json::to_value(&read).unwrap(), self.rewritten(), &self.name);
        read
    }
}

fn cases(file: &str) -> Vec<Case> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wire").join(file);
    let file: File = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(!file.cases.is_empty());
    file.cases
}

fn case(file: &str, name: &str) -> Case {
    cases(file).into_iter().find(|case| case.name == name).unwrap()
}

/// Numbers as numbers: JSON has one kind.
fn plain(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64().unwrap()),
        Value::Array(values) => values.iter().map(plain).collect(),
        Value::Object(members) => {
            members.iter().map(|(key, value)| (key.clone(), plain(value))).collect::<serde_json::Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

#[track_caller]
fn assert_same(found: &Value, expected: &Value, name: &impl Debug) {
    assert_eq!(plain(found), plain(expected), "{name:?}");
}

fn means(reply: &Reply) -> Value {
    let finish = |finish: &Finish| {
        json!({
            "finishReason": finish.reason,
            "promptTokens": finish.usage.prompt_tokens,
            "completionTokens": finish.usage.completion_tokens,
            "cachedTokens": finish.usage.cached_tokens,
            "toolCalls": finish.tool_calls,
        })
    };
    let with_logprobs = |mut value: Value, logprobs: &Option<Json>| {
        if let Some(logprobs) = logprobs {
            value["logprobs"] = logprobs.read().unwrap();
        }
        value
    };
    match reply {
        Reply::Accepted { queue_position } => json!({"queuePosition": queue_position}),
        Reply::Token(token) => with_logprobs(
            json!({"text": token.text, "index": token.index, "tokenIds": token.token_ids, "width": token.width()}),
            &token.logprobs,
        ),
        Reply::Done(end) => finish(end),
        Reply::Response { text, finish: end, logprobs } => {
            let mut value = finish(end);
            value["text"] = json!(text);
            with_logprobs(value, logprobs)
        }
        Reply::Error { message, code, retry_after_ms } => json!({"error": message, "code": code, "retryAfterMs": retry_after_ms}),
    }
}

#[test]
fn subjects() {
    for case in cases("subjects.json") {
        let prefix = case.prefix.as_str();
        let worker = || case.worker_id.as_ref().unwrap();
        let made = match case.name.as_str().unwrap() {
            "register" => subject::register(prefix),
            "heartbeat" => subject::heartbeat(prefix),
            "deregister" => subject::deregister(prefix),
            "reregister" => subject::reregister(prefix, worker()),
            "hello" => subject::controller_hello(prefix),
            "controllerHeartbeat" => subject::controller_heartbeat(prefix),
            "inference" => subject::inference(prefix, worker()),
            "cancel" => subject::cancel(prefix, worker()),
            other => panic!("{other}"),
        };
        assert_eq!(made, case.subject);
    }
}

#[test]
fn registrations() {
    for case in cases("registration.json") {
        let read: Registration = case.there_and_back();
        let meant = json!({
            "protocol": read.protocol,
            "models": read.skills.available_models,
            "maxConcurrent": read.capacity.max_concurrent,
            "status": read.status.as_str(),
        });
        assert_same(&meant, &case.means, &case.name);
    }
    let llama = "mlx-community/Llama-3.2-3B-Instruct-4bit".to_owned();
    let expected = Registration {
        protocol: Some(1),
        worker_id: WorkerId::new("mac-studio-1").unwrap(),
        incarnation: "9f1c2d3e4b5a69788796a5b4c3d2e1f0".into(),
        hostname: "studio.local".into(),
        ip: "192.0.2.7".into(),
        port: 8080,
        skills: Skills {
            available_models: vec![llama, "tiny".into()],
            model_paths: BTreeMap::from([("tiny".into(), "/models/tiny".into())]),
            total_model_size: 1_807_496_278,
            last_scanned: 1_762_732_800_000,
        },
        capacity: Capacity { max_concurrent: 8, max_queue: 64, memory_gb: 64.0 },
        features: vec![Feature::Resume, Feature::Cancel, Feature::Batch],
        status: WorkerStatus::Online,
        timestamp: 1_762_732_800_000,
    };
    assert_eq!(case("registration.json", "every field").there_and_back::<Registration>(), expected);
}

#[test]
fn heartbeats() {
    for case in cases("heartbeat.json") {
        let read: Heartbeat = case.there_and_back();
        let meant = json!({
            "phase": read.phase.as_str(),
            "status": read.status.as_str(),
            "loaded": read.metrics.models_loaded,
            "loading": read.loading_models,
        });
        assert_same(&meant, &case.means, &case.name);
    }
    let expected = Heartbeat {
        worker_id: WorkerId::new("mac-studio-1").unwrap(),
        incarnation: "9f1c2d3e4b5a69788796a5b4c3d2e1f0".into(),
        sequence: 42,
        status: WorkerStatus::Online,
        timestamp: 1_762_732_805_000,
        metrics: HeartbeatMetrics {
            cpu_usage_percent: 12.5,
            memory_used_gb: 20.1,
            gpu_utilization_percent: 0.0,
            active_requests: 2,
            total_requests_handled: 311,
            avg_latency_ms: 840.2,
            models_loaded: vec!["mlx-community/Llama-3.2-3B-Instruct-4bit".into()],
        },
        queue_depth: 1,
        active_request_ids: Some(vec!["0b0e5a6c-1d7f-4d0e-9f6b-2f1a3c4d5e6f".into(), "r-2".into()]),
        tokens_generated: 81_234,
        phase: Phase::Ready,
        loading_models: vec![],
        cached_prefixes: vec!["f7277613608874dd".into()],
    };
    assert_eq!(case("heartbeat.json", "every field").there_and_back::<Heartbeat>(), expected);
}

#[test]
fn what_prompts_begin_with() {
    for case in cases("prefixes.json") {
        let request: InferenceRequest = serde_json::from_slice(&case.bytes()).unwrap();
        let prefixes = PrefixHashes::of(&request);
        let hashes: Vec<_> = prefixes.hashes().iter().map(|hash| format!("{hash:016x}")).collect();
        assert_eq!(json!({"bytes": prefixes.bytes(), "hashes": hashes}), case.means, "{}", case.name);
        assert!(hashes.iter().zip(prefixes.hashes()).all(|(text, hash)| PrefixHashes::parse(text) == Some(*hash)));
    }
}

#[test]
fn deregistrations() {
    for case in cases("deregistration.json") {
        case.there_and_back::<Deregistration>();
    }
}

#[test]
fn what_controllers_say() {
    let worker = WorkerId::new("mac-studio-1").unwrap();
    for case in cases("controller.json") {
        let made = match case.name.as_str().unwrap() {
            "hello" => subject::controller_hello(""),
            "heartbeat" => subject::controller_heartbeat(""),
            "reregister" => {
                assert_eq!(case.bytes(), b"");
                assert_eq!(subject::reregister("", &worker), case.subject);
                continue;
            }
            other => panic!("{other}"),
        };
        assert_eq!(made, case.subject);
        let read: ControllerNotice = case.there_and_back();
        assert_eq!((read.controller_id.as_str(), read.heartbeat_interval_ms), ("front-1", 5000));
    }
}

#[test]
fn requests() {
    for case in cases("request.json") {
        let read: InferenceRequest = case.there_and_back();
        assert!(read.validate().is_ok(), "{}: {:?}", case.name, read.validate());
    }
    let read: InferenceRequest = case("request.json", "every field").there_and_back();
    assert_eq!((read.request_id.as_str(), read.model_id.as_str()), ("0b0e5a6c-1d7f-4d0e-9f6b-2f1a3c4d5e6f", "tiny"));
    assert_eq!((read.prompt, read.max_tokens, read.temperature, read.top_p), (None, Some(16), Some(0.7), Some(0.95)));
    assert_eq!((read.top_k, read.min_p, read.seed, read.logprobs), (Some(40), Some(0.05), Some(7), Some(2)));
    assert_eq!(read.stop, Some(vec!["\n\n".to_owned(), "END".to_owned()]));
    let penalties = (read.repetition_penalty, read.presence_penalty, read.frequency_penalty);
    assert_eq!(penalties, (Some(1.1), Some(-0.5), Some(0.25)));
    assert_eq!((read.session_id.as_deref(), read.stream, read.priority), (Some("s-1"), true, Priority::High));
    assert_eq!(read.tool_choice.unwrap().text(), "\"auto\"");

    let resumed: InferenceRequest = case("request.json", "to be continued after what another worker delivered").there_and_back();
    assert_eq!(resumed.resume, Some(Resume { token_ids: vec![9906, 11], text: " upon a".into() }));
}

#[test]
fn headers() {
    let known = [header::REQUEST_ID, header::ATTEMPT, header::CONTROLLER_ID, header::TIMEOUT_MS, header::TRACEPARENT];
    let full = case("headers.json", "every header").message.unwrap();
    let written: Vec<&str> = full.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(written.len(), known.len());
    assert!(known.iter().all(|name| written.contains(name)), "{written:?}");
}

#[test]
fn cancels() {
    let read: Cancel = case("cancel.json", "every field").there_and_back();
    assert_eq!(read, Cancel { request_id: "0b0e5a6c-1d7f-4d0e-9f6b-2f1a3c4d5e6f".into(), attempt: 2 });
}

#[test]
fn replies() {
    for case in cases("replies.json") {
        let read = Reply::decode(&case.bytes()).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        assert_same(&means(&read), &case.means, &case.name);
        let again: Value = serde_json::from_slice(&read.encode("r-1")).unwrap();
        assert_same(&again, case.rewritten(), &case.name);
        let kind = case.message.as_ref().unwrap()["type"].as_str().unwrap();
        assert_eq!(read.is_terminal(), matches!(kind, "done" | "response" | "error"), "{}", case.name);
    }
}

#[test]
fn codes_of_workers() {
    for case in cases("codes.json") {
        assert_eq!(ControllerErrorCode::from_worker(case.name.as_str()).as_str(), case.means, "{}", case.name);
    }
}

#[test]
fn the_older_dialect() {
    for case in cases("older.json") {
        let bytes = case.bytes();
        let meant = match case.name.as_str().unwrap() {
            "registration" => {
                let read: Registration = serde_json::from_slice(&bytes).unwrap();
                json!({
                    "protocol": read.protocol,
                    "incarnation": read.incarnation,
                    "models": read.skills.available_models,
                    "maxConcurrent": read.capacity.max_concurrent,
                    "status": read.status.as_str(),
                })
            }
            "heartbeat" => {
                let read: Heartbeat = serde_json::from_slice(&bytes).unwrap();
                json!({
                    "incarnation": read.incarnation,
                    "sequence": read.sequence,
                    "activeRequestIds": read.active_request_ids,
                    "activeRequests": read.metrics.active_requests,
                    "loaded": read.metrics.models_loaded,
                    "phase": read.phase.as_str(),
                })
            }
            "deregistration" => {
                serde_json::from_slice::<Deregistration>(&bytes).unwrap();
                json!({})
            }
            "request" => {
                let expected = case.message.as_ref().unwrap();
                let mut asked = expected.clone();
                asked.as_object_mut().unwrap().remove("prompt");
                asked["messages"] = case.means["messages"].clone();
                asked["stream"] = json!(false);
                assert_same(&asked_of_older(&asked).unwrap(), expected, &case.name);
                let id = WorkerId::new("3f8e1c2a-7d3b-4e7c-9a53-6f0d1b2c3d4e").unwrap();
                assert_eq!(older::inference(&id), case.on);
                continue;
            }
            "token" | "done" | "error" => means(&Reply::decode(&bytes).unwrap()),
            other => panic!("{other}"),
        };
        assert_same(&meant, &case.means, &case.name);
    }
}

fn asked_of_older(request: &Value) -> Result<Value, ControllerError> {
    let id = request["requestId"].as_str().unwrap();
    let request = InferenceRequest { request_id: "the caller's".into(), ..serde_json::from_str(&request.to_string()).unwrap() };
    older::request(&request, id).map(|body| serde_json::from_slice(&body).unwrap())
}

#[test]
fn what_else_is_asked_stays_in_the_older_dialect() {
    let asked = case("request.json", "every field").message.unwrap();
    for (priority, written) in [("normal", None), ("low", Some("low")), ("high", Some("high"))] {
        let mut asked = asked.clone();
        asked["priority"] = json!(priority);
        let mut expected = asked.clone();
        expected.as_object_mut().unwrap().retain(|key, _| !matches!(key.as_str(), "messages" | "resume" | "priority"));
        let contents = asked["messages"].as_array().unwrap().iter().map(|message| message["content"].as_str().unwrap());
        expected["prompt"] = json!(contents.collect::<Vec<_>>().join("\n"));
        expected["stream"] = json!(true);
        if let Some(written) = written {
            expected["priority"] = json!(written);
        }
        assert_same(&asked_of_older(&asked).unwrap(), &expected, &priority);
    }
    let resumed = json!({"requestId": "r", "modelId": "m", "prompt": "Hello", "resume": {"tokenIds": [1], "text": "a"}});
    let expected = json!({"requestId": "r", "modelId": "m", "prompt": "Hello", "stream": true});
    assert_same(&asked_of_older(&resumed).unwrap(), &expected, &"a prompt stays");
}

fn prompt_of_older(messages: Value) -> Result<Value, ControllerError> {
    asked_of_older(&json!({"requestId": "r", "modelId": "m", "messages": messages})).map(|body| body["prompt"].clone())
}

#[test]
fn messages_become_lines_in_the_older_dialect() {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say \"hi\""}, {"type": "text", "text": " 🙂"}]},
        {"role": "assistant", "content": null, "tool_calls": []},
        {"role": "assistant"},
        {"role": "user", "content": "Now\nthen"},
    ]);
    assert_eq!(prompt_of_older(messages).unwrap(), "Be brief.\nSay \"hi\" 🙂\nNow\nthen");
    for content in [json!([{"type": "image_url", "image_url": {}}]), json!([{"type": "text"}]), json!(7), json!({})] {
        let messages = json!([{"role": "user", "content": "a secret"}, {"role": "user", "content": content}]);
        let error = prompt_of_older(messages).unwrap_err();
        assert_eq!(error.code(), ControllerErrorCode::RequestValidationFailed);
        assert_eq!(error.context()["field"], "messages[1].content");
        assert!(!error.to_string().contains("secret"));
    }
}

#[test]
fn what_is_malformed_is_refused() {
    for case in cases("malformed.json") {
        let bytes = case.bytes();
        let (refused, verdict) = match case.on.as_str() {
            "worker.register" => (serde_json::from_slice::<Registration>(&bytes).is_err(), "dropped"),
            "worker.heartbeat" => (serde_json::from_slice::<Heartbeat>(&bytes).is_err(), "dropped"),
            "worker.deregister" => (serde_json::from_slice::<Deregistration>(&bytes).is_err(), "dropped"),
            "reply" => (Reply::decode(&bytes).is_err(), "protocol error"),
            "inference" => {
                let read = serde_json::from_slice::<InferenceRequest>(&bytes);
                (read.map_or(true, |request| request.validate().is_err()), "refused")
            }
            other => panic!("{other}"),
        };
        assert!(refused, "{} on {}", case.name, case.on);
        assert_eq!(case.verdict, verdict);
    }
}

#[test]
fn no_answer_is_printed() {
    let secret = || "a secret".to_owned();
    let whole = Reply::Response { text: secret(), finish: Finish::default(), logprobs: None };
    assert!(!format!("{whole:?}").contains("secret"));
    let token = Reply::Token(Token { text: secret(), index: 0, token_ids: vec![1].into(), logprobs: None });
    assert!(!format!("{token:?}").contains("secret"));
}
