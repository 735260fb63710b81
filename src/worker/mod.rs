//! The worker's runtime.
