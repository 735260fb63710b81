//! HOW one request runs: attempts, limits on time, retries, streams.
