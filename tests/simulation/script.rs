//! What a simulated worker says about a request, and after how long.

use mlx_serving_router::error::{ControllerError, ControllerErrorCode as Code};
use mlx_serving_router::transport::Delivery;
use mlx_serving_router::wire::{Finish, Reply, Token, Usage};

use crate::plan::{CODES, Dice, Mood};

/// The tokens that a worker counts of a whole answer.
pub const WHOLE_TOKENS: u64 = 3;

#[derive(Clone, Debug)]
pub struct Posted {
    pub at: u64,
    pub post: Post,
    /// Somebody still waited for it.
    pub taken: bool,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq)]
pub enum Post {
    Accepted,
    Token {
        text: String,
        index: u64,
        width: u64,
    },
    Done(u64),
    Response(String),
    Error {
        code: Option<&'static str>,
        after: Option<i64>,
    },
    NobodyListens,
    Unreadable,
    /// The way back is lost.
    Lost,
}

/// A request, as far as a script is concerned.
pub struct Asked {
    /// What every text of the answer begins with: the worker, the request and the attempt.
    pub name: String,
    pub streaming: bool,
    /// How many requests this worker has had, this one included.
    pub number: u64,
    /// For so long the worker loads its model.
    pub loads: Option<u64>,
}

/// Each thing that is said, and how long after the one before it.
pub type Script = Vec<(u64, Post)>;

/// What it does about a request, and after how long.
pub fn script(mood: Mood, asked: Asked, dice: &mut Dice) -> Script {
    let mood = match mood {
        Mood::Moody => {
            let (every, after) = (dice.between(2, 3), dice.pick(&[-1, 0, 50, 300]));
            let code = dice.pick(&CODES);
            let fails = Mood::Fails(code);
            dice.pick(&[
                Mood::Answers,
                Mood::Answers,
                Mood::Slow,
                Mood::Whole,
                Mood::Empty,
                fails,
                fails,
                Mood::FailsEvery(every),
                Mood::Refuses(after),
                Mood::Stalls,
                Mood::Babbles,
                Mood::Babbles,
                Mood::NobodyListens,
                Mood::LosesAnswers,
            ])
        }
        mood => mood,
    };
    let mood = match mood {
        Mood::FailsEvery(every) if asked.number.is_multiple_of(every) => Mood::Fails(Some("WORKER_UNAVAILABLE")),
        Mood::FailsEvery(_) => Mood::Answers,
        mood => mood,
    };
    let Asked { name, streaming, loads, .. } = asked;
    let mut script = Vec::new();
    if dice.chance(80) && mood != Mood::NobodyListens {
        script.push((dice.pick(&[0, 0, 2]), Post::Accepted));
    }
    // The rest comes when the model is there.
    script.extend(loads.map(|loads| (loads, Post::Accepted)));
    let mut index = 0;
    let mut tokens = |count: u64, waits: &[u64], gaps: &[u64], dice: &mut Dice, script: &mut Script| {
        for number in 0..count {
            let width = dice.pick(&[1, 1, 1, 3]);
            let wait = dice.pick(if number == 0 { waits } else { gaps });
            script.push((wait, Post::Token { text: format!("{name}:{index} "), index, width }));
            index += width;
        }
        index
    };
    match mood {
        Mood::Answers | Mood::Slow if !streaming && dice.chance(40) => {
            let wait = if mood == Mood::Slow { dice.between(50, 1_200) } else { dice.pick(&[0, 1, 10, 40]) };
            script.push((wait, Post::Response(name)));
        }
        Mood::Answers | Mood::Slow => {
            let count = dice.between(0, 5);
            let total = match mood {
                Mood::Slow => tokens(count, &[50, 150, 500, 1_200], &[20, 100, 300], dice, &mut script),
                _ => tokens(count, &[0, 1, 10, 40], &[0, 0, 1, 10], dice, &mut script),
            };
            script.push((dice.pick(&[0, 0, 3]), Post::Done(total)));
        }
        Mood::Whole => script.push((dice.pick(&[0, 1, 30, 200]), Post::Response(name))),
        Mood::Empty if dice.chance(50) => script.push((dice.pick(&[0, 10]), Post::Response(String::new()))),
        Mood::Empty => script.push((dice.pick(&[0, 10]), Post::Done(0))),
        Mood::Fails(code) => {
            let count = dice.pick(&[0, 0, 0, 1, 3]);
            tokens(count, &[0, 5], &[0, 5], dice, &mut script);
            let after = dice.pick(&[None, None, None, Some(-1), Some(20)]);
            script.push((dice.pick(&[0, 1, 20, 100]), Post::Error { code, after }));
        }
        Mood::Refuses(after) => script.push((0, Post::Error { code: Some("WORKER_OVERLOADED"), after: Some(after) })),
        Mood::Stalls => {
            let count = dice.pick(&[0, 0, 1, 3]);
            tokens(count, &[0, 20], &[0, 20], dice, &mut script);
        }
        Mood::Babbles => {
            let count = dice.between(0, 3);
            let total = tokens(count, &[0, 5], &[0, 5], dice, &mut script);
            let token = |index| Post::Token { text: format!("{name}:wrong "), index, width: 1 };
            let right = Post::Token { text: format!("{name}:{total} "), index: total, width: 1 };
            let babble = match dice.0.u32(..8) {
                0 => vec![token(total + 1)],
                1 => vec![right, token(total)],
                2 => vec![right, token(total + 1), token(0)],
                3 => vec![Post::Done(total), Post::Done(total)],
                4 => vec![Post::Done(total), token(total)],
                5 => vec![Post::Accepted, Post::Accepted, right, Post::Accepted, Post::Done(total + 1)],
                6 => vec![right, Post::Response(name)],
                _ => vec![Post::Unreadable],
            };
            let gap = dice.pick(&[0, 1]);
            script.extend(babble.into_iter().map(|post| (gap, post)));
        }
        Mood::NobodyListens => script.push((0, Post::NobodyListens)),
        Mood::LosesAnswers => {
            let count = dice.between(0, 2);
            tokens(count, &[0, 5], &[0, 5], dice, &mut script);
            script.push((dice.pick(&[0, 5, 50]), Post::Lost));
        }
        Mood::FailsEvery(_) | Mood::Moody => {}
    }
    script
}

/// The same as the controller gets it.
pub fn delivery(post: &Post) -> Delivery {
    let reply = match post {
        Post::Accepted => Reply::Accepted { queue_position: 0 },
        Post::Token { text, index, width } => {
            let token_ids = (0..*width).map(|number| u32::try_from(index + number).unwrap()).collect();
            Reply::Token(Token { text: text.clone(), index: *index, token_ids, logprobs: None })
        }
        Post::Done(tokens) => Reply::Done(finish(*tokens)),
        Post::Response(text) => Reply::Response { text: text.clone(), finish: finish(WHOLE_TOKENS), logprobs: None },
        Post::Error { code, after } => {
            Reply::Error { message: "as told".into(), code: code.map(Into::into), retry_after_ms: *after }
        }
        Post::NobodyListens => {
            let error = ControllerError::new(Code::WorkerUnavailable, "nobody listens").with("noResponders", true);
            return Delivery::Failed(error);
        }
        Post::Unreadable | Post::Lost => {
            let error =
                ControllerError::new(Code::WorkerUnavailable, "a message that is none").with("protocolError", "unreadable");
            return Delivery::Failed(error);
        }
    };
    Delivery::Reply(reply)
}

fn finish(tokens: u64) -> Finish {
    let usage = Usage { prompt_tokens: 2, completion_tokens: tokens, cached_tokens: 0 };
    Finish { usage, ..Finish::default() }
}
