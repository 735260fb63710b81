//! An answer as it comes: tokens in order, a commit point, one end.

use futures_util::FutureExt;
use tokio::time::Instant;

use super::answer::{Answer, Logprobs};
use super::attempt::{Attempt, Step, Whole};
use super::call::Call;
use crate::error::ControllerError;
use crate::wire::{Finish, Token, TokenIds, WorkerId};

/// Tokens that one batch has at most.
const TOGETHER: usize = 1024;

/// An answer as it comes. Dropping it before its end cancels the work on the worker.
pub struct TokenStream {
    // Before the call: what the attempt holds is free before the request's record ends.
    attempt: Option<Attempt>,
    call: Call,
    worker_id: WorkerId,
    /// What is there and has not been given out.
    ready: Vec<Token>,
    text: String,
    outcome: Option<Result<Answer, ControllerError>>,
}

// === impl TokenStream ===

impl TokenStream {
    /// Makes attempts until one of them gives a first token, or an answer without any.
    pub(super) async fn open(mut call: Call) -> Result<Self, ControllerError> {
        loop {
            let mut attempt = call.attempt().await?;
            let worker_id = attempt.worker().clone();
            match attempt.next().await {
                Err(error) => call.failed(attempt, error).boxed().await?,
                first => {
                    let attempt = Some(attempt);
                    let mut stream = Self { attempt, call, worker_id, ready: Vec::new(), text: String::new(), outcome: None };
                    stream.follow(first);
                    stream.call.record_tokens();
                    return Ok(stream);
                }
            }
        }
    }

    /// The model that answers: the one asked for, or one that stands in for it.
    #[must_use]
    pub fn model_id(&self) -> &str {
        &self.call.request().model_id
    }

    /// The request.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.call.request().request_id
    }

    /// Who answers.
    #[must_use]
    pub fn worker_id(&self) -> &WorkerId {
        &self.worker_id
    }

    /// The next tokens: waits for one, and gives all that are there. Empty: the answer is complete, and
    /// [`Self::response`] has it. Cancel-safe: a dropped future loses no token.
    ///
    /// # Errors
    /// STREAM_INTERRUPTED: the worker failed; CONTROLLER_NOT_READY: the controller stopped. The stream is over, and says the
    /// same when it is asked again.
    pub async fn next_batch(&mut self) -> Result<Vec<Token>, ControllerError> {
        self.fetch().await?;
        Ok(std::mem::take(&mut self.ready))
    }

    /// As [`Self::next_batch`], into a buffer that is used again and again. `false`: the answer is complete.
    ///
    /// # Errors
    /// As [`Self::next_batch`].
    pub async fn next_into(&mut self, tokens: &mut Vec<Token>) -> Result<bool, ControllerError> {
        self.fetch().await?;
        let more = !self.ready.is_empty();
        tokens.append(&mut self.ready);
        Ok(more)
    }

    /// Waits for a token, and takes all that are there.
    async fn fetch(&mut self) -> Result<(), ControllerError> {
        let now = match &mut self.attempt {
            Some(attempt) if self.ready.is_empty() => {
                let step = attempt.next().await;
                let now = attempt.latest();
                self.follow(step);
                now
            }
            _ => Instant::now(),
        };
        // Not without an end: the time that counts is looked at once.
        while self.ready.len() < TOGETHER
            && let Some(step) = self.attempt.as_mut().and_then(|attempt| attempt.try_next(now).transpose())
        {
            self.follow(step);
        }
        self.call.record_tokens();
        match &self.outcome {
            Some(Err(error)) if self.ready.is_empty() => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// The whole answer, once the stream is complete.
    #[must_use]
    pub fn response(&self) -> Option<&Answer> {
        self.outcome.as_ref()?.as_ref().ok()
    }

    /// Ends a stream that its reader cannot follow: with an error that blames no worker, and is what the stream says from now
    /// on. Without effect where it has ended.
    pub fn abandon(&mut self, error: ControllerError) {
        if let Some(attempt) = self.attempt.take() {
            self.ready.clear();
            self.outcome = Some(Err(self.call.abandoned(attempt, error)));
        }
    }

    fn follow(&mut self, step: Result<Step, ControllerError>) {
        match step {
            Ok(Step::Token(token)) => {
                self.call.tokens(token.width());
                self.give(token);
            }
            Ok(Step::End(finish)) => self.complete(finish),
            Ok(Step::Whole(Whole { text, finish, logprobs })) => {
                self.call.tokens(finish.usage.completion_tokens);
                if !text.is_empty() {
                    self.give(Token { text, index: 0, token_ids: TokenIds::new(), logprobs });
                }
                self.complete(finish);
            }
            Err(error) => {
                let Some(attempt) = self.attempt.take() else { return };
                self.outcome = Some(Err(self.call.interrupted(attempt, error)));
            }
        }
    }

    fn give(&mut self, token: Token) {
        self.call.first_token();
        // Events of another API make no text together.
        if self.call.request().relayed.is_none() {
            self.text.push_str(&token.text);
        }
        self.ready.push(token);
    }

    fn complete(&mut self, finish: Finish) {
        let Some(attempt) = self.attempt.take() else { return };
        self.outcome = Some(Ok(self.call.complete(attempt, finish, std::mem::take(&mut self.text), None)));
    }
}

/// Makes attempts until one of them gives a whole answer.
pub(super) async fn gather(mut call: Call) -> Result<Answer, ControllerError> {
    loop {
        let mut attempt = call.attempt().await?;
        let mut text = String::new();
        let mut logprobs = Logprobs::default();
        let failed = loop {
            match attempt.next().await {
                Ok(Step::Token(token)) => {
                    call.first_token();
                    call.tokens(token.width());
                    call.record_tokens();
                    text.push_str(&token.text);
                    logprobs.add(token.logprobs);
                }
                Ok(Step::End(finish)) => return Ok(call.complete(attempt, finish, text, logprobs.whole())),
                Ok(Step::Whole(Whole { text, finish, logprobs })) => {
                    call.tokens(finish.usage.completion_tokens);
                    return Ok(call.complete(attempt, finish, text, logprobs));
                }
                Err(error) => break error,
            }
        };
        call.failed(attempt, failed).boxed().await?;
    }
}
