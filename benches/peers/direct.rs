//! A worker over HTTP, asked without a router: the bound for the controller's way to such workers.
//!
//! The client is the controller's, with the same pool. A request was encoded beforehand, and asks for what its caller wants: a
//! whole answer in one piece, or a stream. What comes is read as JSON, as any client has to, and nothing decides anything.

use std::error::Error;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::load::{self, Side};
use crate::setup::Setup;

#[derive(Clone)]
struct Direct {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    whole: Bytes,
    stream: Bytes,
    setup: Setup,
}

/// What is read of an answer, or of an event of one.
#[derive(Deserialize)]
struct Chunk {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(alias = "message")]
    delta: Delta,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

/// Asks the first of the addresses, and takes rounds.
pub async fn run(setup: Setup) -> Result<(), Box<dyn Error>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let base = setup.workers.first().ok_or("no address of a worker")?;
    let direct = Direct {
        client: Client::builder(TokioExecutor::new()).build(connector),
        uri: format!("{base}/v1/chat/completions").parse()?,
        whole: body(&setup, json!({}))?,
        stream: body(&setup, json!({"stream": true, "stream_options": {"include_usage": true}}))?,
        setup,
    };
    load::serve(direct).await
}

fn body(setup: &Setup, how: Value) -> Result<Bytes, serde_json::Error> {
    let mut body = json!({
        "model": setup.model, "messages": [{"role": "user", "content": setup.prompt}], "max_tokens": setup.tokens,
    });
    if let (Some(body), Value::Object(how)) = (body.as_object_mut(), how) {
        body.extend(how);
    }
    serde_json::to_vec(&body).map(Bytes::from)
}

// === impl Direct ===

impl Direct {
    async fn ask(&self, body: &Bytes) -> Result<Response<Incoming>, String> {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        request.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
        self.client.request(request).await.map_err(|error| error.to_string())
    }
}

impl Side for Direct {
    async fn buffered(&self, _: u64) -> Result<(), String> {
        let body = self.ask(&self.whole).await?.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        if text(&body)?.is_some_and(|text| text == self.setup.answer) {
            Ok(())
        } else {
            Err("another text than the worker's".to_owned())
        }
    }

    async fn streaming(&self, _: u64) -> Result<(Instant, u64), String> {
        let mut body = self.ask(&self.stream).await?.into_body();
        let mut unread = BytesMut::new();
        let (mut first, mut tokens) = (None, 0);
        while let Some(frame) = body.frame().await.transpose().map_err(|error| error.to_string())? {
            unread.extend_from_slice(frame.data_ref().map_or(&[], |data| data.as_ref()));
            while let Some(end) = unread.windows(2).position(|two| two == b"\n\n") {
                let event = unread.split_to(end + 2);
                let data = event.trim_ascii().strip_prefix(b"data: ").ok_or("an event without data")?;
                if data != b"[DONE]" && text(data)?.is_some() {
                    first.get_or_insert_with(Instant::now);
                    tokens += 1;
                }
            }
        }
        match first {
            Some(first) if tokens == self.setup.tokens => Ok((first, tokens)),
            _ => Err(format!("{tokens} tokens instead of {}", self.setup.tokens)),
        }
    }
}

fn text(data: &[u8]) -> Result<Option<String>, String> {
    let chunk: Chunk = serde_json::from_slice(data).map_err(|error| error.to_string())?;
    Ok(chunk.choices.into_iter().next().and_then(|choice| choice.delta.content))
}
