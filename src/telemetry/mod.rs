//! What is remembered and told of requests: their metadata for those who ask later, and numbers for Prometheus.
//!
//! This room records what it is told and decides nothing. It knows no connections and no routing, and nothing of prompts
//! or tokens beyond their count. Everything in it is bounded.

mod metadata;
mod metrics;
mod requests;

pub use metadata::{Attempt, FinalError, LeftOut, RequestMetadata, RequestStatus};
pub use metrics::{CONTENT_TYPE, Gauges, Metrics, WorkerGauges};
pub use requests::{RequestRecord, Requests};
