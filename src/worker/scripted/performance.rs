//! One request played: steps go in, what is to be sent or waited for comes out. Nothing here waits or sends.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;

use super::script::{Plan, Step};
use crate::wire::{Finish, FinishReason, Json, Reply, Token, Usage};

/// What comes next.
#[derive(Debug, PartialEq)]
pub(super) enum Cue {
    /// A message.
    Send(Said),
    /// A while without one.
    Wait(Duration),
    /// Nothing more, but the request is not over.
    Stall,
    /// The worker is over.
    Die,
    /// The request is over.
    End,
}

/// A message.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    /// One that the protocol knows.
    Reply(Reply),
    /// Any bytes.
    Raw(Bytes),
}

/// A request in play.
#[derive(Debug)]
pub(super) struct Performance {
    request_id: String,
    steps: Arc<[Step]>,
    at: usize,
    /// In tokens, or in one piece.
    streams: bool,
    /// The place of the next token.
    index: u64,
    /// How many tokens were said.
    tokens: u64,
    /// What is kept for an answer in one piece.
    text: String,
}

// === impl Performance ===

impl Performance {
    /// `stream` is what was asked for.
    pub(super) fn new(plan: Plan, request_id: &str, stream: bool) -> Self {
        Self {
            request_id: request_id.to_owned(),
            steps: plan.steps,
            at: 0,
            streams: stream || plan.streamed,
            index: 0,
            tokens: 0,
            text: String::new(),
        }
    }

    pub(super) fn next(&mut self) -> Cue {
        loop {
            let Some(step) = self.steps.get(self.at).cloned() else { return Cue::End };
            self.at += 1;
            return match step {
                Step::Accept => Cue::Send(Said::Reply(Reply::Accepted { queue_position: 0 })),
                Step::Token { text, token_ids } => match self.token(text, token_ids) {
                    Some(token) => Cue::Send(Said::Reply(Reply::Token(token))),
                    None => continue,
                },
                Step::Shift(by) => {
                    self.index = self.index.saturating_add_signed(by);
                    continue;
                }
                Step::Finish { reason, usage, tool_calls } => Cue::Send(Said::Reply(self.finish(reason, usage, tool_calls))),
                Step::Fail { code, message, retry_after_ms } => {
                    Cue::Send(Said::Reply(Reply::Error { message, code, retry_after_ms }))
                }
                Step::Say(mut fields) => {
                    fields.entry("requestId").or_insert_with(|| Value::from(self.request_id.as_str()));
                    Cue::Send(Said::Raw(Value::Object(fields).to_string().into()))
                }
                Step::Raw(bytes) => Cue::Send(Said::Raw(bytes)),
                Step::Wait(pause) => Cue::Wait(pause),
                Step::Stall => Cue::Stall,
                Step::Die => Cue::Die,
            };
        }
    }

    fn token(&mut self, text: String, mut token_ids: Vec<u32>) -> Option<Token> {
        if token_ids.is_empty() {
            token_ids.push(Step::token_id(self.index));
        }
        let token = Token { text, index: self.index, token_ids: token_ids.into(), logprobs: None };
        self.index += token.width();
        self.tokens += token.width();
        if self.streams {
            return Some(token);
        }
        self.text.push_str(&token.text);
        None
    }

    fn finish(&self, reason: FinishReason, usage: Option<Usage>, tool_calls: Option<Json>) -> Reply {
        let usage = usage.unwrap_or_else(|| Step::usage(self.tokens));
        let finish = Finish { reason, usage, tool_calls, latency_ms: 1.0 };
        if self.streams { Reply::Done(finish) } else { Reply::Response { text: self.text.clone(), finish, logprobs: None } }
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::{Babble, Script};
    use super::*;

    /// The cues of a script, in short.
    fn played(script: Script, stream: bool) -> Vec<String> {
        let Script::Plan(plan) = script else { return Vec::new() };
        let mut performance = Performance::new(plan, "r", stream);
        let mut cues = Vec::new();
        loop {
            cues.push(match performance.next() {
                Cue::Send(Said::Reply(Reply::Accepted { .. })) => "accepted".to_owned(),
                Cue::Send(Said::Reply(Reply::Token(token))) => format!("{} {}", token.index, token.text),
                Cue::Send(Said::Reply(Reply::Done(finish))) => format!("done {}", finish.usage.completion_tokens),
                Cue::Send(Said::Reply(Reply::Response { text, .. })) => format!("response {text}"),
                Cue::Send(Said::Reply(Reply::Error { code, .. })) => code.unwrap_or_default(),
                Cue::Send(Said::Raw(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
                Cue::Wait(pause) => format!("wait {}", pause.as_millis()),
                Cue::Stall => "stall".to_owned(),
                Cue::Die => "die".to_owned(),
                Cue::End => return cues,
            });
            if cues.last().is_some_and(|cue| ["stall", "die"].contains(&cue.as_str())) {
                return cues;
            }
        }
    }

    #[test]
    fn an_answer_comes_in_tokens_or_in_one_piece() {
        assert_eq!(played(Script::answer(&["a", "b"]), true), ["accepted", "0 a", "1 b", "done 2"]);
        assert_eq!(played(Script::answer(&["a", "b"]), false), ["accepted", "response ab"]);
    }

    #[test]
    fn what_begins_may_stop_fail_or_die() {
        assert_eq!(played(Script::stall(1), true), ["accepted", "0 Hel", "stall"]);
        assert_eq!(played(Script::stall(1), false), ["accepted", "stall"]);
        assert_eq!(played(Script::die(0), true), ["accepted", "die"]);
        let code = crate::error::ControllerErrorCode::WorkerUnavailable;
        assert_eq!(played(Script::fail(code, 0), false), ["accepted", "WORKER_UNAVAILABLE"]);
        assert_eq!(played(Script::refuse(Some(5)), true), ["WORKER_OVERLOADED"]);
    }

    #[test]
    fn babble_is_wrong_in_one_place() {
        let of = |how, after| played(Script::babble(how, after), false).join(" | ");
        assert_eq!(of(Babble::Duplicate, 1), "accepted | 0 Hel | 0 Hel | 1 lo | done 3");
        assert_eq!(of(Babble::Reordered, 1), "accepted | 0 Hel | 2 , wor | 1 lo | done 3");
        assert_eq!(of(Babble::Missing, 1), "accepted | 0 Hel | 2 , wor | done 2");
        assert_eq!(of(Babble::Malformed, 0), r#"accepted | {"type": "token", "tok | 0 Hel | done 1"#);
    }

    #[test]
    fn a_message_of_ones_own_carries_the_requests_id() {
        let fields = |json: &str| serde_json::from_str(json).unwrap_or_default();
        let steps = [Step::Say(fields(r#"{"type":"song"}"#)), Step::Say(fields(r#"{"requestId":"x"}"#))];
        assert_eq!(played(Script::steps(steps), true), [r#"{"requestId":"r","type":"song"}"#, r#"{"requestId":"x"}"#]);
    }

    #[test]
    fn a_place_may_be_left_out_and_tokens_may_be_wide() {
        let wide = Step::Token { text: "ab".into(), token_ids: vec![1, 2] };
        assert_eq!(played(Script::steps([wide, Step::Shift(1), Step::token("c")]), true), ["0 ab", "3 c"]);
    }
}
