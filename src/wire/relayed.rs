//! A request in the OpenAI API's own words, for servers that speak it. It is no message of the fleet: NATS never carries it.

use std::fmt;

use bytes::Bytes;

/// An endpoint that messages between controllers and workers have no words for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RelayedTo {
    /// `/v1/embeddings`.
    Embeddings,
    /// `/v1/responses`.
    Responses,
}

/// A client's body, to be sent as it came but for the name of the model, by which each server may know it differently, and for
/// what only the router reads.
#[derive(Clone, PartialEq, Eq)]
pub struct Relayed {
    /// Where it goes.
    pub to: RelayedTo,
    /// All members but the model and whether a stream is wanted, each with a comma before it.
    pub members: Bytes,
}

// === impl RelayedTo ===

impl RelayedTo {
    /// The address below that of a server.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
        }
    }
}

// === impl Relayed ===

impl Relayed {
    /// The body for a server that calls the model `model`. `stream`: the answer is wanted as it comes.
    #[must_use]
    pub fn body(&self, model: &str, stream: bool) -> Vec<u8> {
        let name = serde_json::Value::from(model).to_string();
        let stream = if stream { r#","stream":true"# } else { "" };
        [br#"{"model":"#, name.as_bytes(), &self.members, stream.as_bytes(), b"}"].concat()
    }
}

/// Says the size alone: what is asked is never printed.
impl fmt::Debug for Relayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes for {}>", self.members.len(), self.to.path())
    }
}
