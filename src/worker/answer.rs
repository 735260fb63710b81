//! The answer of one attempt: it counts the indexes, merges what piles up, and lets exactly one end through.
//!
//! Nothing here waits. What the carrier does not take at once is kept, in order; pieces with token ids grow together
//! meanwhile, so that what is kept stays a few messages however long the carrier takes. An answer that still outgrows its
//! bound says so, and the attempt ends with an error.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use super::outbox::Outbox;
use crate::error::ControllerErrorCode;
use crate::transport::nats::Asked;
use crate::transport::{Delivery, Postbox};
use crate::wire::{Finish, Json, Reply, Token};

/// The most text of one message, in bytes: even written as JSON escapes it stays below NATS's 1 MiB.
const CHUNK: usize = 64 * 1024;
/// An engine is asked to wait beyond so many messages or bytes that the carrier has not taken.
const ROOM_MESSAGES: usize = 1024;
const ROOM_BYTES: usize = 1024 * 1024;
/// An engine that does not wait loses the attempt beyond so many times as much.
const OVERFLOW: usize = 4;
/// The longest text of an answer in one piece, in bytes.
const GATHERED_BYTES: usize = 16 * 1024 * 1024;

/// Where an answer goes.
pub(super) enum Target {
    /// Over NATS.
    Nats(Box<Asked>),
    /// Within this process.
    Local(Postbox),
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is part of the answer.
    Yes,
    /// The answer is over: it has no effect.
    Over,
    /// Nobody waits for the answer any more.
    Gone,
    /// The carrier has taken nothing for too long, or the answer is too long.
    Overflow,
}

/// The answer of one attempt.
pub(super) struct Answer {
    request_id: String,
    target: Target,
    chunk: usize,
    outbox: Arc<Outbox>,
    state: Mutex<State>,
    room: Condvar,
    room_async: Notify,
}

#[derive(Default)]
struct State {
    outgoing: VecDeque<Reply>,
    bytes: usize,
    next_index: u64,
    /// Of an answer in one piece: what has come so far.
    gathered: Option<Gathered>,
    /// No further piece, no second end.
    over: bool,
    /// It stands in the outbox, or what was taken off it is on its way.
    scheduled: bool,
    /// A message did not fit into the carrier's largest: the end has been said.
    broken: bool,
}

#[derive(Default)]
struct Gathered {
    text: String,
    logprobs: Option<Json>,
}

// === impl Target ===

impl Target {
    /// The subject, where it is one.
    pub(super) fn address(&self) -> Option<String> {
        match self {
            Self::Nats(asked) => asked.reply_to().map(str::to_owned),
            Self::Local(_) => None,
        }
    }

    /// Sends the only message of a refused request.
    pub(super) async fn refuse(&self, request_id: &str, reply: Reply) {
        match self {
            // Lost with the connection: the attempt that asked has lost its own, or meets its accept limit.
            Self::Nats(asked) => drop(asked.finish(reply.encode(request_id).into()).await),
            Self::Local(postbox) => drop(postbox.post(Delivery::Reply(reply))),
        }
    }
}

// === impl Answer ===

impl Answer {
    /// An answer without a word so far. `stream`: its pieces go out as they come, else all of them in one message.
    pub(super) fn new(request_id: String, stream: bool, target: Target, outbox: Arc<Outbox>) -> Arc<Self> {
        let chunk = match &target {
            Target::Nats(asked) => CHUNK.min(asked.max_payload() / 8).max(64),
            Target::Local(_) => CHUNK,
        };
        let state = State { gathered: (!stream).then(Gathered::default), ..State::default() };
        Arc::new(Self {
            request_id,
            target,
            chunk,
            outbox,
            state: Mutex::new(state),
            room: Condvar::new(),
            room_async: Notify::new(),
        })
    }

    /// Where it goes.
    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// The request that it answers.
    pub(super) fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The first message: the request is taken.
    pub(super) fn accept(self: &Arc<Self>, queue_position: u32) {
        self.push(&mut self.state.lock(), Reply::Accepted { queue_position });
    }

    /// A piece.
    pub(super) fn piece(self: &Arc<Self>, text: &str, token_ids: &[u32], logprobs: Option<Json>) -> Taken {
        let mut state = self.state.lock();
        if state.over {
            return Taken::Over;
        }
        if state.broken {
            return Taken::Overflow;
        }
        if matches!(&self.target, Target::Local(postbox) if postbox.is_closed()) {
            return Taken::Gone;
        }
        if text.is_empty() && token_ids.is_empty() && logprobs.is_none() {
            return Taken::Yes;
        }
        if let Some(gathered) = &mut state.gathered {
            if gathered.text.len() + text.len() > GATHERED_BYTES {
                return Taken::Overflow;
            }
            gathered.text.push_str(text);
            gathered.logprobs = join_logprobs(gathered.logprobs.take(), logprobs);
            state.next_index += (token_ids.len() as u64).max(1);
            return Taken::Yes;
        }
        if state.outgoing.len() > ROOM_MESSAGES * OVERFLOW || state.bytes > ROOM_BYTES * OVERFLOW {
            return Taken::Overflow;
        }
        self.push_pieces(&mut state, text, token_ids, logprobs);
        Taken::Yes
    }

    /// How many tokens have come.
    pub(super) fn tokens(&self) -> u64 {
        self.state.lock().next_index
    }

    /// Claims the right to end it: true for the first caller alone, who has to call [`Self::finish`] or [`Self::fail`].
    pub(super) fn close(&self) -> bool {
        !std::mem::replace(&mut self.state.lock().over, true)
    }

    /// Its good end.
    pub(super) fn finish(self: &Arc<Self>, finish: Finish) {
        let mut state = self.state.lock();
        match state.gathered.take() {
            None => self.push(&mut state, Reply::Done(finish)),
            Some(Gathered { text, logprobs }) if text.len() <= self.chunk || matches!(self.target, Target::Local(_)) => {
                self.push(&mut state, Reply::Response { text, finish, logprobs });
            }
            Some(Gathered { text, logprobs }) => {
                // Too long for one message: the controller gathers the pieces.
                state.next_index = 0;
                self.push_pieces(&mut state, &text, &[], logprobs);
                self.push(&mut state, Reply::Done(finish));
            }
        }
    }

    /// Its bad end.
    pub(super) fn fail(self: &Arc<Self>, code: &str, message: &str, retry_after_ms: Option<i64>) {
        let reply = Reply::Error { message: message.to_owned(), code: Some(code.to_owned()), retry_after_ms };
        self.push(&mut self.state.lock(), reply);
    }

    /// Whether the carrier keeps up.
    pub(super) fn has_room(&self) -> bool {
        self.state.lock().has_room()
    }

    /// Waits until the carrier has caught up, the answer is over, or the time has passed. Blocks the thread.
    pub(super) fn wait_for_room(&self, limit: Duration) {
        self.room.wait_while_for(&mut self.state.lock(), |state| !state.has_room(), limit);
    }

    /// Waits until the carrier has caught up or the answer is over.
    pub(super) async fn room(&self) {
        loop {
            let taken = self.room_async.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            if self.has_room() {
                return;
            }
            taken.await;
        }
    }

    /// Takes off what is to be sent. [`Self::settle`] has to follow.
    pub(super) fn take(&self) -> VecDeque<Reply> {
        let mut state = self.state.lock();
        state.bytes = 0;
        self.room.notify_all();
        self.room_async.notify_waiters();
        std::mem::take(&mut state.outgoing)
    }

    /// Puts back what could not be sent, in front of what came meanwhile. True: there is something to send, and the answer
    /// belongs into the outbox again.
    pub(super) fn settle(&self, mut unsent: VecDeque<Reply>) -> bool {
        let mut state = self.state.lock();
        if state.broken {
            state.outgoing.clear();
        }
        state.bytes += unsent.iter().map(size).sum::<usize>();
        unsent.append(&mut state.outgoing);
        state.outgoing = unsent;
        state.scheduled = !state.outgoing.is_empty();
        state.scheduled
    }

    /// What takes the place of a message that does not fit into the carrier's largest; nothing follows it.
    pub(super) fn too_large(&self) -> Reply {
        self.state.lock().broken = true;
        Reply::Error {
            message: "the answer has a part that does not fit into one message of the NATS server".into(),
            code: Some(ControllerErrorCode::PayloadTooLarge.as_str().into()),
            retry_after_ms: None,
        }
    }

    fn push_pieces(self: &Arc<Self>, state: &mut State, text: &str, token_ids: &[u32], logprobs: Option<Json>) {
        let (mut ids, mut logprobs) = (token_ids, logprobs);
        let mut rest = text;
        loop {
            let (head, tail) = rest.split_at(boundary(rest, self.chunk));
            let token = Token {
                text: head.to_owned(),
                index: state.next_index,
                token_ids: std::mem::take(&mut ids).into(),
                logprobs: logprobs.take(),
            };
            state.next_index += token.width();
            self.push(state, Reply::Token(token));
            if tail.is_empty() {
                return;
            }
            rest = tail;
        }
    }

    fn push(self: &Arc<Self>, state: &mut State, reply: Reply) {
        if state.broken {
            return;
        }
        if let Target::Local(postbox) = &self.target
            && !state.scheduled
            && postbox.has_room()
        {
            postbox.post(Delivery::Reply(reply));
            return;
        }
        state.bytes += size(&reply);
        match (state.outgoing.back_mut(), reply) {
            (Some(Reply::Token(last)), Reply::Token(next)) if mergeable(last, &next, self.chunk) => {
                last.text.push_str(&next.text);
                last.token_ids.extend_from_slice(&next.token_ids);
            }
            (_, reply) => state.outgoing.push_back(reply),
        }
        if !std::mem::replace(&mut state.scheduled, true) {
            self.outbox.add(Arc::clone(self));
        }
    }
}

// === impl State ===

impl State {
    fn has_room(&self) -> bool {
        self.over || (self.outgoing.len() < ROOM_MESSAGES && self.bytes < ROOM_BYTES)
    }
}

/// Only where every piece says its tokens does the sum take as many places as its parts.
fn mergeable(last: &Token, next: &Token, most: usize) -> bool {
    !last.token_ids.is_empty()
        && !next.token_ids.is_empty()
        && last.logprobs.is_none()
        && next.logprobs.is_none()
        && last.text.len() + next.text.len() <= most
        && last.token_ids.len() * 8 <= most
}

/// The last place at or before `most` at which a text may be cut.
fn boundary(text: &str, most: usize) -> usize {
    if text.len() <= most { text.len() } else { (0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0) }
}

fn size(reply: &Reply) -> usize {
    match reply {
        Reply::Token(token) => token.text.len() + 4 * token.token_ids.len(),
        _ => 0,
    }
}

/// Appends the lists of one object of log probabilities to those of another: each is in the OpenAI API's shape, which is
/// an object of lists.
fn join_logprobs(so_far: Option<Json>, next: Option<Json>) -> Option<Json> {
    let (Some(first), Some(second)) = (&so_far, &next) else { return so_far.or(next) };
    let mut joined: serde_json::Map<String, serde_json::Value> = first.read().ok()?;
    let further: serde_json::Map<String, serde_json::Value> = second.read().ok()?;
    for (key, value) in further {
        match (joined.get_mut(&key), value) {
            (Some(serde_json::Value::Array(list)), serde_json::Value::Array(more)) => list.extend(more),
            (None | Some(serde_json::Value::Null), value) => drop(joined.insert(key, value)),
            _ => {}
        }
    }
    Json::from_value(&joined).ok()
}
