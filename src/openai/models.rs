//! What is served.

use serde::Serialize;

use super::encode;

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

/// The body of `/v1/models`. `created` is in seconds since the epoch, the same for all: models have no birthday here.
#[must_use]
pub fn models<S: AsRef<str>>(ids: &[S], created: u64) -> Vec<u8> {
    encode(&List { object: "list", data: ids.iter().map(|id| entry(id.as_ref(), created)).collect() })
}

/// The body of `/v1/models/{id}`.
#[must_use]
pub fn model(id: &str, created: u64) -> Vec<u8> {
    encode(&entry(id, created))
}

fn entry(id: &str, created: u64) -> Model<'_> {
    Model { id, object: "model", created, owned_by: "mlx_serving_router" }
}
