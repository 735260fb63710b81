//! Workers that speak the OpenAI API over HTTP/1.1 and answer at once: what stands behind every HTTP router of the comparison.
//!
//! Several addresses, so that a router has a choice, and one thread, so that they take little of the machine. A stream sends
//! one token by itself and then lets the others have their turn, as an engine does that works in batches.

use std::convert::Infallible;
use std::error::Error;
use std::io::Read;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use crate::load::say;
use crate::setup::Setup;

const WORKERS: usize = 4;

/// What it reads of a request.
#[derive(Deserialize)]
struct Question {
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: StreamOptions,
}

#[derive(Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// All that it ever says, encoded beforehand.
struct Answers {
    whole: Bytes,
    /// The event of one token.
    token: Bytes,
    tokens: u64,
    /// The last events, without the usage and with it.
    last: [Bytes; 2],
    models: Bytes,
    /// For whoever asks after its health, or what kind of server it is.
    about: Bytes,
}

/// A stream on its way: a token, then the others' turn.
struct Tokens {
    answers: Rc<Answers>,
    include_usage: bool,
    sent: u64,
    turn_of_others: bool,
}

/// Says where it listens, then serves until standard input ends.
pub async fn run(setup: Setup) -> Result<(), Box<dyn Error>> {
    let answers = Rc::new(Answers::new(&setup)?);
    let mut listeners = Vec::new();
    let mut ports = Vec::new();
    for _ in 0..WORKERS {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        ports.push(listener.local_addr()?.port());
        listeners.push(listener);
    }
    let local = LocalSet::new();
    for listener in listeners {
        local.spawn_local(listen(listener, Rc::clone(&answers)));
    }
    let end = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    say(&json!({"ports": ports}))?;
    local.run_until(end).await??;
    Ok(())
}

async fn listen(listener: TcpListener, answers: Rc<Answers>) {
    while let Ok((connection, _)) = listener.accept().await {
        let _ = connection.set_nodelay(true);
        let answers = Rc::clone(&answers);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| answer(Rc::clone(&answers), request));
            // It ends with an error when the router closes the connection, which is the router's business.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
        });
    }
}

async fn answer(
    answers: Rc<Answers>,
    request: Request<Incoming>,
) -> Result<Response<Either<Full<Bytes>, Tokens>>, Box<dyn Error + Send + Sync>> {
    let is_question = request.method() == Method::POST;
    let asks_for_models = request.uri().path().ends_with("/models");
    let body = request.into_body().collect().await?.to_bytes();
    let (content_type, body) = if is_question {
        let question: Question = serde_json::from_slice(&body)?;
        if question.stream {
            ("text/event-stream", Either::Right(Tokens::new(answers, question.stream_options.include_usage)))
        } else {
            ("application/json", Either::Left(Full::new(answers.whole.clone())))
        }
    } else if asks_for_models {
        ("application/json", Either::Left(Full::new(answers.models.clone())))
    } else {
        ("application/json", Either::Left(Full::new(answers.about.clone())))
    };
    Ok(Response::builder().header(CONTENT_TYPE, content_type).body(body)?)
}

// === impl Answers ===

impl Answers {
    fn new(setup: &Setup) -> Result<Self, serde_json::Error> {
        let usage = json!({"prompt_tokens": 32, "completion_tokens": setup.tokens, "total_tokens": 32 + setup.tokens});
        let chunk = |choices: Value, usage: Option<&Value>| {
            let mut chunk = json!({
                "id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": setup.model, "choices": choices,
            });
            if let Some(usage) = usage {
                chunk["usage"] = usage.clone();
            }
            format!("data: {chunk}\n\n")
        };
        let finish = chunk(json!([{"index": 0, "delta": {}, "finish_reason": "length"}]), None);
        let counted = chunk(json!([]), Some(&usage));
        let message = json!({"role": "assistant", "content": setup.answer});
        Ok(Self {
            whole: encoded(&json!({
                "id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": setup.model, "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
            }))?,
            token: chunk(json!([{"index": 0, "delta": {"content": " token"}, "finish_reason": null}]), None).into(),
            tokens: setup.tokens,
            last: [format!("{finish}data: [DONE]\n\n").into(), format!("{finish}{counted}data: [DONE]\n\n").into()],
            models: encoded(&json!({"object": "list", "data": [{"id": setup.model, "object": "model"}]}))?,
            about: encoded(&json!({"status": "ok", "model_path": setup.model, "served_model_name": setup.model}))?,
        })
    }
}

fn encoded(value: &Value) -> Result<Bytes, serde_json::Error> {
    serde_json::to_vec(value).map(Bytes::from)
}

// === impl Tokens ===

impl Tokens {
    fn new(answers: Rc<Answers>, include_usage: bool) -> Self {
        Self { answers, include_usage, sent: 0, turn_of_others: false }
    }
}

impl Body for Tokens {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // hyper writes what it has when there is nothing more to be had, so each token goes out by itself.
        self.turn_of_others = !self.turn_of_others;
        if !self.turn_of_others && self.sent <= self.answers.tokens {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let frame = match self.sent.cmp(&self.answers.tokens) {
            std::cmp::Ordering::Less => self.answers.token.clone(),
            std::cmp::Ordering::Equal => self.answers.last[usize::from(self.include_usage)].clone(),
            std::cmp::Ordering::Greater => return Poll::Ready(None),
        };
        self.sent += 1;
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }
}
