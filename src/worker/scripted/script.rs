//! What a scripted worker does, as plain values: steps for one request, and which request gets which steps.
//!
//! Nothing here waits, sends or knows the time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::error::ControllerErrorCode;
use crate::wire::{FinishReason, Json, Usage};

/// The pieces of an answer where a script names none.
pub const PIECES: [&str; 4] = ["Hel", "lo", ", wor", "ld"];
/// The first token id where a script names none.
const FIRST_ID: u32 = 1000;
/// What a prompt costs where a script says nothing of it.
const PROMPT_TOKENS: u64 = 4;

/// What a worker does with the requests that reach it.
#[derive(Clone, Debug, PartialEq)]
pub enum Script {
    /// The same with each.
    Plan(Plan),
    /// So many requests get the first script, so many of the next ones the second; the last script stays.
    InTurn(Vec<(u64, Script)>),
    /// Each n-th request gets the first script, all others the second.
    Every(u64, Box<Script>, Box<Script>),
}

/// What a worker does with one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One after the other.
    pub steps: Arc<[Step]>,
    /// Whether the answer goes out in tokens even where nobody asked for a stream.
    pub streamed: bool,
}

/// One thing that a worker does.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Says that it takes the request.
    Accept,
    /// The next piece of the answer. Where no stream is wanted it is kept for the end.
    Token {
        /// The text.
        text: String,
        /// The tokens; one is made up where there are none.
        token_ids: Vec<u32>,
    },
    /// The next token is counted from so many places further on, or back.
    Shift(i64),
    /// The end of a good answer.
    Finish {
        /// Why.
        reason: FinishReason,
        /// What it cost; where nothing is said, a short prompt and the tokens that were sent.
        usage: Option<Usage>,
        /// The functions that the model wants called, in the OpenAI API's shape.
        tool_calls: Option<Json>,
    },
    /// The end of a failed one.
    Fail {
        /// The code, as it stands on the wire.
        code: Option<String>,
        /// For people.
        message: String,
        /// When to come back; −1: never.
        retry_after_ms: Option<i64>,
    },
    /// A message of these fields, with the request's id among them where they name none.
    Say(Map<String, Value>),
    /// A message of these bytes.
    Raw(Bytes),
    /// A while in which nothing is said.
    Wait(Duration),
    /// Nothing more. The request stays with the worker until it is told to stop.
    Stall,
    /// The end of the worker.
    Die,
}

/// What is wrong with an answer of a worker that babbles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Babble {
    /// A message that is no reply.
    Malformed,
    /// A token comes twice.
    Duplicate,
    /// Two tokens come in the wrong order.
    Reordered,
    /// A token is left out.
    Missing,
}

/// Goes through a script, request by request.
#[derive(Debug)]
pub(super) enum Prompter {
    Plan(Plan),
    InTurn { scripts: Vec<(u64, Prompter)>, at: usize, given: u64 },
    Every { n: u64, count: u64, script: Box<Prompter>, otherwise: Box<Prompter> },
}

// === impl Script ===

impl Script {
    /// These steps for each request.
    #[must_use]
    pub fn steps(steps: impl Into<Arc<[Step]>>) -> Self {
        Self::Plan(Plan { steps: steps.into(), streamed: false })
    }

    /// These pieces, then a good end.
    #[must_use]
    pub fn answer(pieces: &[&str]) -> Self {
        let tokens = pieces.iter().map(|piece| Step::token(piece));
        Self::steps([Step::Accept].into_iter().chain(tokens).chain([Step::finish()]).collect::<Vec<_>>())
    }

    /// So many tokens, then nothing.
    #[must_use]
    pub fn stall(after_tokens: u64) -> Self {
        Self::steps(begun(after_tokens, Step::Stall))
    }

    /// So many tokens, then an error.
    #[must_use]
    pub fn fail(code: ControllerErrorCode, after_tokens: u64) -> Self {
        Self::steps(begun(after_tokens, Step::fail(code.as_str(), None)))
    }

    /// There is no room.
    #[must_use]
    pub fn refuse(retry_after_ms: Option<i64>) -> Self {
        Self::steps([Step::fail(ControllerErrorCode::WorkerOverloaded.as_str(), retry_after_ms)])
    }

    /// So many tokens, then the end of the worker.
    #[must_use]
    pub fn die(after_tokens: u64) -> Self {
        Self::steps(begun(after_tokens, Step::Die))
    }

    /// An answer in tokens, right for so many of them, then wrong in this way, then as if nothing had been.
    ///
    /// A token can be repeated only after one: `Duplicate` repeats none where `after_tokens` is 0.
    #[must_use]
    pub fn babble(how: Babble, after_tokens: u64) -> Self {
        let (before, next, after) = (beginning(after_tokens), piece(after_tokens), piece(after_tokens + 1));
        let wrong = match how {
            Babble::Malformed => vec![Step::Raw(Bytes::from_static(b"{\"type\": \"token\", \"tok")), next],
            Babble::Duplicate => match after_tokens.checked_sub(1) {
                Some(last) => vec![Step::Shift(-1), piece(last), next],
                None => vec![next],
            },
            Babble::Reordered => vec![Step::Shift(1), after, Step::Shift(-2), next, Step::Shift(1)],
            Babble::Missing => vec![Step::Shift(1), after],
        };
        let steps = [Step::Accept].into_iter().chain(before).chain(wrong).chain([Step::finish()]);
        Self::Plan(Plan { steps: steps.collect(), streamed: true })
    }

    /// This for the first request, or as often as it was told, then another.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        let mut scripts = match self {
            Self::InTurn(scripts) => scripts,
            once => vec![(1, once)],
        };
        match next {
            Self::InTurn(more) => scripts.extend(more),
            last => scripts.push((1, last)),
        }
        Self::InTurn(scripts)
    }

    /// This for so many requests, before what comes [`then`](Self::then).
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self::InTurn(vec![(count, self)])
    }

    /// This for each n-th request, something else for the others.
    #[must_use]
    pub fn every(self, n: u64, otherwise: Self) -> Self {
        Self::Every(n, Box::new(self), Box::new(otherwise))
    }
}

impl Default for Script {
    fn default() -> Self {
        Self::answer(&PIECES)
    }
}

// === impl Step ===

impl Step {
    /// A piece with a made-up token.
    #[must_use]
    pub fn token(text: &str) -> Self {
        Self::Token { text: text.to_owned(), token_ids: Vec::new() }
    }

    /// The usual end.
    #[must_use]
    pub fn finish() -> Self {
        Self::Finish { reason: FinishReason::Stop, usage: None, tool_calls: None }
    }

    /// An error of this code.
    #[must_use]
    pub fn fail(code: &str, retry_after_ms: Option<i64>) -> Self {
        Self::Fail { code: Some(code.to_owned()), message: "as scripted".to_owned(), retry_after_ms }
    }

    /// What an answer of so many tokens cost where the script does not say.
    pub(super) const fn usage(tokens: u64) -> Usage {
        Usage { prompt_tokens: PROMPT_TOKENS, completion_tokens: tokens, cached_tokens: 0 }
    }

    /// The made-up token of a place.
    pub(super) fn token_id(index: u64) -> u32 {
        FIRST_ID.saturating_add(u32::try_from(index).unwrap_or(u32::MAX))
    }
}

/// The beginning of an answer, and what comes instead of its end.
fn begun(tokens: u64, end: Step) -> Vec<Step> {
    [Step::Accept].into_iter().chain(beginning(tokens)).chain([end]).collect()
}

/// The first so many tokens of an answer of the usual pieces, again and again.
pub fn beginning(tokens: u64) -> impl Iterator<Item = Step> {
    (0..tokens).map(piece)
}

fn piece(index: u64) -> Step {
    Step::token(PIECES[usize::try_from(index).unwrap_or(0) % PIECES.len()])
}

// === impl Prompter ===

impl Prompter {
    /// At the beginning of a script.
    pub(super) fn new(script: &Script) -> Self {
        match script {
            Script::Plan(plan) => Self::Plan(plan.clone()),
            Script::InTurn(scripts) => {
                let scripts = scripts.iter().map(|(times, script)| (*times, Self::new(script))).collect();
                Self::InTurn { scripts, at: 0, given: 0 }
            }
            Script::Every(n, script, otherwise) => {
                Self::Every { n: *n, count: 0, script: Box::new(Self::new(script)), otherwise: Box::new(Self::new(otherwise)) }
            }
        }
    }

    /// What is done with the next request.
    pub(super) fn next(&mut self) -> Plan {
        match self {
            Self::Plan(plan) => plan.clone(),
            Self::InTurn { scripts, at, given } => {
                while scripts.get(*at).is_some_and(|(times, _)| *given >= *times) && *at + 1 < scripts.len() {
                    (*at, *given) = (*at + 1, 0);
                }
                *given += 1;
                // A script without scripts has nothing to say.
                scripts.get_mut(*at).map_or_else(|| Plan { steps: [].into(), streamed: false }, |(_, script)| script.next())
            }
            Self::Every { n, count, script, otherwise } => {
                *count += 1;
                if count.is_multiple_of(*n) { script.next() } else { otherwise.next() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(script: &Script, requests: usize) -> String {
        let mut prompter = Prompter::new(script);
        let letter = |plan: Plan| match &plan.steps[..] {
            [Step::Fail { code, .. }] => code.clone().unwrap_or_default(),
            _ => ".".to_owned(),
        };
        (0..requests).map(|_| letter(prompter.next())).collect()
    }

    fn fails(code: &str) -> Script {
        Script::steps([Step::fail(code, None)])
    }

    #[test]
    fn the_last_script_stays() {
        assert_eq!(given(&fails("a"), 3), "aaa");
        assert_eq!(given(&fails("a").then(fails("b")), 4), "abbb");
        assert_eq!(given(&fails("a").times(3).then(Script::default()), 5), "aaa..");
        assert_eq!(given(&fails("a").times(2).then(fails("b").times(2)).then(fails("c")), 6), "aabbcc");
        assert_eq!(given(&fails("a").times(2), 4), "aaaa");
    }

    #[test]
    fn each_nth_request_is_another_one() {
        let third = fails("a").every(3, Script::default());
        assert_eq!(given(&third, 7), "..a..a.");
        assert_eq!(given(&third.clone().times(3).then(fails("b")), 5), "..abb");
        assert_eq!(given(&fails("a").then(fails("b")).every(2, third), 8), ".a.bab.b");
    }

    #[test]
    fn a_script_without_any_says_nothing() {
        assert!(Prompter::new(&Script::InTurn(Vec::new())).next().steps.is_empty());
    }
}
