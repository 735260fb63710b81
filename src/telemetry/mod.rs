//! What is remembered and told of requests: metadata, Prometheus metrics, log records.
