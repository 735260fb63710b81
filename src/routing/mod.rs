//! WHO gets a request. Pure and synchronous: time and random numbers come in, decisions come out.
//!
//! [`Router::select`] gives a [`Lease`] or a [`Refusal`]; the lease's end is the report. Between the two lie:
//!
//! | file | what it decides |
//! |---|---|
//! | `registry` | who is in the fleet: incarnations, signs of life, silence |
//! | `fleet` | the picture of the fleet that selections read, swapped whole when membership changes |
//! | `worker`, `load` | one life of one worker: its standing, its requests in flight, its speed |
//! | `breaker`, `window` | whether a worker that failed is left alone |
//! | `sessions`, `rendezvous` | which worker a session belongs to |
//! | `strategy/` | which of the candidates is taken |
//!
//! The room knows no transport, no task and no clock. The observer is never called under a lock.

mod breaker;
mod dice;
mod event;
mod fleet;
mod lease;
mod load;
mod registry;
mod rendezvous;
mod router;
mod sessions;
mod settings;
mod snapshot;
mod strategy;
mod window;
mod worker;

pub use breaker::{BreakerReason, BreakerStats, CircuitState};
pub use event::{Observer, RouterEvent};
pub use lease::{Choice, Lease, Outcome};
pub use registry::{HeartbeatVerdict, IgnoredBecause, Registered};
pub use router::{Query, Refusal, Router};
pub use settings::{BreakerSettings, RouterSettings};
pub use snapshot::WorkerSnapshot;
pub use worker::Carrier;
