//! WHO gets a request. Pure and synchronous: time and random numbers come in, decisions come out.
//!
//! [`Router::select`] gives a [`Lease`] or a [`Refusal`]; the lease's end is the report. Between the two lie:
//!
//! | file | what it decides |
//! |---|---|
//! | `registry`, `history` | who is in the fleet: incarnations, signs of life, silence, returns |
//! | `fleet` | the picture of the fleet that selections read, swapped whole when membership changes |
//! | `worker`, `load` | one life of one worker: its standing, its requests in flight, its speed |
//! | `breaker/` | whether a worker that failed is left alone |
//! | `sessions`, `rendezvous` | which worker a session belongs to |
//! | `prefixes` | which workers most likely hold which prompts in their caches |
//! | `ledger` | what all requests in flight are, side by side, for one pass over all workers |
//! | `hub` | what workers and leases share: settings, the picture, whom to tell |
//! | `lease` | what a request holds of a worker, and gives back |
//! | `dice` | every random choice, by a seed |
//! | `selection` | who gets a request, or why nobody does |
//! | `strategy/` | which of the candidates is taken |
//!
//! The room knows no transport, no task and no clock. The observer is never called under a lock.

mod breaker;
mod dice;
mod event;
mod fleet;
mod history;
mod hub;
mod lease;
mod ledger;
mod load;
mod prefixes;
#[cfg(all(test, feature = "shuttle"))]
mod races;
mod registry;
mod rendezvous;
mod router;
mod selection;
mod sessions;
mod settings;
mod snapshot;
mod strategy;
mod worker;

pub use breaker::{BreakerReason, BreakerStats, CircuitState};
pub use event::{Observer, RouterEvent};
pub use lease::{Choice, Lease, Outcome};
pub use registry::{HeartbeatVerdict, IgnoredBecause, Registered};
pub use router::Router;
pub use selection::{LeftOut, Query, Refusal, Wanted};
pub use settings::{BreakerSettings, RouterSettings};
pub use snapshot::WorkerSnapshot;
pub use worker::Carrier;
