//! HOW one request runs: attempts, limits on time, retries, streams.
//!
//! | file | what it does |
//! |---|---|
//! | `controller`, `core` | the door, and what all parts of one controller share |
//! | `lifecycle`, `membership`, `probes` | start, drain, stop; who comes and goes |
//! | `call` | one request: who is asked, who is asked next, what the caller is told |
//! | `attempt`, `limits` | one attempt under its four timers |
//! | `retry` | whether and when another worker is tried; pure |
//! | `admission` | the queue of requests that find every worker full |
//! | `stream`, `answer` | tokens as they come, and the whole |
//! | `events`, `left_out` | what is told of it |
//!
//! Dropping a future of this room at any point undoes everything through guards. The room knows transports by their trait;
//! only its start names NATS, and only what looks at servers names HTTP.

mod admission;
mod answer;
mod attempt;
mod call;
mod controller;
mod core;
mod events;
mod left_out;
mod lifecycle;
mod limits;
mod membership;
mod probes;
mod retry;
mod stream;

pub use answer::Answer;
pub use controller::{CallOptions, ClusterStatus, Controller, ControllerState, RequestCounts, WorkerCounts};
pub use events::{Event, Events};
pub use stream::TokenStream;
