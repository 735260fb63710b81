//! A routing controller for a fleet of mlx-lm inference workers.
//!
//! | room | it decides or does |
//! |---|---|
//! | [`config`], [`error`], [`wire`] | the words that everything else is said in |
//! | [`routing`] | WHO gets a request: pure, synchronous, without a clock of its own |
//! | [`transport`] | WHAT carries it: NATS, this process |
//! | [`dispatch`] | HOW one request runs: attempts, limits on time, retries, streams |
//! | [`worker`] | the worker's runtime: register, give signs of life, queue, publish, cancel, drain |
//! | [`openai`] | the OpenAI API: bytes in, bytes out |
//! | [`signal`] | news that come once and concern many, for all rooms |
//! | [`telemetry`] | what is remembered and told of requests |
//! | `python` | the extension module; the only room that names pyo3 (feature `python`) |
//!
//! Dependencies point one way: python → dispatch, worker → routing, transport → wire, config, error.

#![forbid(unsafe_code)]

pub mod config;
pub mod dispatch;
pub mod error;
mod fnv;
#[cfg(test)]
#[path = "../tests/common/histories.rs"]
mod histories;
pub mod openai;
#[cfg(feature = "python")]
mod python;
pub mod routing;
pub mod signal;
mod sync;
pub mod telemetry;
pub mod transport;
pub mod wire;
pub mod worker;
