//! One attempt: the request goes out, the response is read, and every piece of it is posted as it comes.
//!
//! A reader that does not keep up holds the server back, for a while; the memory for it is that of its mailbox. Nothing is read
//! without a bound: heads, lines and answers by their length, streams by the limits of the attempt as well, which closes its mailbox
//! when one of them passes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::{Answer, protocol_error};
use super::client::{Client, Payload};
use super::refusal;
use super::relayed;
use super::request;
use super::server::{Server, Work};
use super::sse::Decoder;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::{Delivery, Outgoing, Postbox};
use crate::wire::{ANSWER_MOST, Reply};

/// How long a server may take for its counts and its end after the answer is complete.
const AFTER_FINISH: Duration = Duration::from_secs(2);
/// How long, and for how many bytes, the end of a body is waited for, so that its connection can be used again.
const DRAIN_LONGEST: Duration = Duration::from_secs(1);
const DRAIN_MOST: usize = 64 * 1024;
/// How long the words of a refusal are waited for, and how many of them are read.
const WORDS_LONGEST: Duration = Duration::from_secs(2);
pub(super) const WORDS_MOST: usize = 64 * 1024;
/// A trace context has 55 characters in its first version, and may have more in later ones.
const TRACEPARENT_LONGEST: usize = 256;
/// What a server may know us by.
pub(super) const AGENT: HeaderValue = HeaderValue::from_static(concat!("mlx-serving-router/", env!("CARGO_PKG_VERSION")));

/// Runs an attempt until its answer has been posted, or nobody waits for it.
pub(super) async fn run(client: Arc<Client>, server: Arc<Server>, outgoing: Outgoing, postbox: Postbox) {
    let work = Work::new(server.clone());
    let rest = tokio::select! {
        biased;
        // With the response the connection goes, and the server notices.
        () = postbox.closed() => None,
        rest = exchange(&client, &server, &work, &outgoing, &postbox) => rest,
    };
    drop(work);
    if let Some(rest) = rest {
        drain(rest).await;
    }
}

/// The rest of a body whose answer is complete, if there may be some.
async fn exchange(
    client: &Client,
    server: &Server,
    work: &Arc<Work>,
    outgoing: &Outgoing,
    postbox: &Postbox,
) -> Option<Incoming> {
    let began = Instant::now();
    match answer(client, server, work, outgoing, postbox, began).await {
        Ok((reply, rest)) => {
            if let Some(asked) = &outgoing.request.relayed {
                server.has(asked.to, &outgoing.request.model_id);
            }
            postbox.post_in_time(Delivery::Reply(reply)).await;
            rest
        }
        Err(error) => {
            server.note(&error);
            if let Some(asked) = outgoing.request.relayed.as_ref().filter(|_| error.lacks_endpoint()) {
                server.lacks(asked.to, &outgoing.request.model_id);
            }
            postbox.post_in_time(Delivery::Failed(error)).await;
            None
        }
    }
}

async fn answer(
    client: &Client,
    server: &Server,
    work: &Arc<Work>,
    outgoing: &Outgoing,
    postbox: &Postbox,
    began: Instant,
) -> Result<(Reply, Option<Incoming>), ControllerError> {
    let request = build(server, work, outgoing, postbox)?;
    let uri = request.uri().clone();
    let response = client.send(request).await.map_err(|error| client.failure(&error, &uri))?;
    server.heard();
    server.is_known_by(response.headers());
    if response.status() != StatusCode::OK {
        let (head, body) = response.into_parts();
        let mut words = Vec::new();
        // Late: what has come by then is better than nothing.
        let _ = timeout(WORDS_LONGEST, collect(body, WORDS_MOST, &mut words)).await;
        return Err(match &outgoing.request.relayed {
            Some(asked) => refusal::of_endpoint(asked.to.path(), head.status, &head.headers, &words, &uri),
            None => refusal::by_status(head.status, &head.headers, &words, &uri),
        });
    }
    server.took_key();
    match &outgoing.request.relayed {
        Some(asked) if outgoing.request.stream => relayed::events(asked.to, server, response, postbox).await,
        Some(asked) => Ok((relayed::whole(asked.to, response).await?, None)),
        None => read(server, response, postbox, began).await,
    }
}

fn build(server: &Server, work: &Arc<Work>, outgoing: &Outgoing, postbox: &Postbox) -> Result<Request<Payload>, ControllerError> {
    let asked = &outgoing.request;
    let own_name = server.own_name(&asked.model_id);
    let stream = asked.stream || asked.relayed.is_none() && server.notices_late();
    let (uri, body) = match &asked.relayed {
        Some(relayed) => (server.relays(relayed.to), relayed.body(own_name, stream)),
        None if asked.messages.is_some() => (&server.chat, request::body(asked, own_name, stream)?),
        None => (&server.text, request::body(asked, own_name, stream)?),
    };
    let mut request = Request::new(Payload::new(body, postbox.clone(), work.clone()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static(if stream { "text/event-stream" } else { "application/json" }));
    headers.insert(USER_AGENT, AGENT);
    if let Some(key) = &server.key {
        headers.insert(AUTHORIZATION, key.clone());
    }
    if let Ok(id) = HeaderValue::from_str(&asked.request_id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    // One that is no trace context is left out, as W3C's specification wants it.
    if let Some(traceparent) = outgoing.traceparent.as_ref().filter(|text| text.len() <= TRACEPARENT_LONGEST)
        && let Ok(value) = HeaderValue::from_str(traceparent)
    {
        headers.insert(HeaderName::from_static("traceparent"), value);
    }
    Ok(request)
}

/// Reads a response, and posts the tokens in it. Gives its end, and what may be left of the body.
///
/// What a body is, its first character says: servers are not to be trusted with content types.
async fn read(
    server: &Server,
    response: Response<Incoming>,
    postbox: &Postbox,
    began: Instant,
) -> Result<(Reply, Option<Incoming>), ControllerError> {
    let mut body = response.into_body();
    let mut events = Decoder::default();
    let mut answer = Answer::default();
    let mut is_known = false;
    // For what may follow once the answer is complete.
    let mut limit = None;
    loop {
        let next = if answer.is_finished() {
            let limit = *limit.get_or_insert_with(|| Instant::now() + AFTER_FINISH);
            // Late is as good as never: the answer is complete. What is there already comes before the clock, without end.
            if Instant::now() >= limit { Ok(None) } else { timeout_at(limit, data(&mut body)).await.unwrap_or(Ok(None)) }
        } else {
            data(&mut body).await
        };
        let more = match next {
            Ok(Some(bytes)) => {
                server.heard();
                if !is_known && let Some(first) = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
                    match first {
                        b'{' => {
                            let whole = whole(bytes, body).await?;
                            return Ok((answer.whole(&whole, began.elapsed())?, None));
                        }
                        b'<' => return Err(protocol_error("it sent a page in place of an answer")),
                        _ => is_known = true,
                    }
                }
                events.push(&bytes);
                true
            }
            Ok(None) => {
                events.end();
                false
            }
            Err(_) if answer.is_finished() => {
                events.end();
                false
            }
            Err(_) => return Err(broken()),
        };
        while let Some(event) = events.next().map_err(|_| protocol_error("a line of its answer does not end"))? {
            if let Some(token) = answer.event(&event)?
                && !postbox.post_in_time(Delivery::Reply(Reply::Token(token))).await
            {
                // Nobody waits any more, or not for this.
                return Err(broken());
            }
            if answer.is_done() {
                break;
            }
        }
        if answer.is_done() || !more {
            let rest = (more && !body.is_end_stream()).then_some(body);
            return Ok((Reply::Done(answer.end(began.elapsed())?), rest));
        }
    }
}

/// The next bytes; `None` at the end.
pub(super) async fn data(body: &mut Incoming) -> Result<Option<Bytes>, hyper::Error> {
    loop {
        match body.frame().await.transpose()? {
            // Trailers say nothing that is asked for.
            Some(frame) => match frame.into_data() {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(_) => continue,
            },
            None => return Ok(None),
        }
    }
}

/// The whole of a body that begins so.
async fn whole(begin: Bytes, body: Incoming) -> Result<Vec<u8>, ControllerError> {
    let mut bytes = Vec::from(begin);
    if !collect(body, ANSWER_MOST, &mut bytes).await {
        return Err(broken());
    }
    Ok(bytes)
}

/// Adds what comes of a body, up to so many bytes. Whether that is all of it.
pub(super) async fn collect(mut body: Incoming, most: usize, bytes: &mut Vec<u8>) -> bool {
    loop {
        match data(&mut body).await {
            Ok(Some(more)) => {
                let room = most.saturating_sub(bytes.len());
                bytes.extend_from_slice(&more[..more.len().min(room)]);
                if more.len() > room {
                    return false;
                }
            }
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

async fn drain(mut body: Incoming) {
    let drained = async {
        let mut left = DRAIN_MOST;
        while let Ok(Some(bytes)) = data(&mut body).await {
            if bytes.len() > left {
                return;
            }
            left -= bytes.len();
        }
    };
    // Late: the connection is closed instead.
    let _ = timeout(DRAIN_LONGEST, drained).await;
}

pub(super) fn broken() -> ControllerError {
    ControllerError::new(ControllerErrorCode::WorkerUnavailable, "the worker broke its answer off: the connection was lost")
}
