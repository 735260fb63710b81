//! Looking whether a server is there, and what it serves.
//!
//! `/health` says whether it can serve; where it knows no such path, `/v1/models` does. A server that is at work on a request
//! of ours is there, too, even if it cannot answer anything else meanwhile.

use std::time::Duration;

use hyper::header::{AUTHORIZATION, CONNECTION, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode, Uri};
use serde::Deserialize;
use tokio::time::timeout;

use super::HttpTransport;
use super::client::{Payload, is_our_lack, is_refused};
use super::exchange::{AGENT, WORDS_MOST, collect};
use super::server::Server;
use crate::wire::WorkerId;

/// The longest list of models that is read, in bytes, and what of it counts.
const LIST_MOST: usize = 1 << 20;
const MODELS_MOST: usize = 1_024;
const NAME_LONGEST: usize = 512;

/// Why a server that was looked at is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// Nobody listens at its address: it does not run.
    NobodyListens,
    /// It did not answer in time.
    Silent,
    /// Nobody could look: this machine had no files, ports or network for it.
    Unknown(String),
    /// It answered, but not well.
    Unfit(String),
}

#[derive(Deserialize)]
struct List {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
}

// === impl HttpTransport ===

impl HttpTransport {
    /// Whether a worker's server can serve, by what it says within `limit`.
    ///
    /// # Errors
    /// It cannot, or nobody knows.
    pub async fn look(&self, worker: &WorkerId, limit: Duration) -> Result<(), Absence> {
        let Some(server) = self.server(worker) else { return Err(Absence::NobodyListens) };
        let said = timeout(limit, self.is_fit(server)).await.unwrap_or(Err(Absence::Silent));
        // Asked at every look: what came before this one says nothing at the next.
        let shows_life = server.shows_life();
        match said {
            Err(Absence::Silent) if shows_life => Ok(()),
            said => said,
        }
    }

    /// The models that a worker's server lists, within `limit`.
    ///
    /// # Errors
    /// It lists none.
    pub async fn models(&self, worker: &WorkerId, limit: Duration) -> Result<Vec<String>, Absence> {
        let Some(server) = self.server(worker) else { return Err(Absence::NobodyListens) };
        timeout(limit, self.list(server)).await.unwrap_or(Err(Absence::Silent))
    }

    /// Returns when a worker has failed in a way that makes a look at it worth while. Never for one that is not known.
    pub async fn doubted(&self, worker: &WorkerId) {
        match self.server(worker) {
            Some(server) => server.doubted().await,
            None => std::future::pending().await,
        }
    }

    async fn is_fit(&self, server: &Server) -> Result<(), Absence> {
        match self.get(server, &server.health, WORDS_MOST).await? {
            (status, _) if status.is_success() => return Ok(()),
            (status, _) if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => {
                return Err(Absence::Unfit(format!("{} answers {status}", server.health.path())));
            }
            _ => {}
        }
        match self.get(server, &server.models, LIST_MOST).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, _) => Err(server.unfit(status)),
        }
    }

    async fn list(&self, server: &Server) -> Result<Vec<String>, Absence> {
        let (status, body) = self.get(server, &server.models, LIST_MOST).await?;
        if !status.is_success() {
            return Err(server.unfit(status));
        }
        let list: List = serde_json::from_slice(&body)
            .map_err(|_| Absence::Unfit(format!("{} is no list of models", server.models.path())))?;
        let is_name = |id: &String| (1..=NAME_LONGEST).contains(&id.len()) && !id.chars().any(char::is_control);
        let names: Vec<String> = list.data.into_iter().map(|entry| entry.id).filter(is_name).take(MODELS_MOST).collect();
        if names.is_empty() { Err(Absence::Unfit(format!("{} lists no model", server.models.path()))) } else { Ok(names) }
    }

    async fn get(&self, server: &Server, uri: &Uri, most: usize) -> Result<(StatusCode, Vec<u8>), Absence> {
        let mut request = Request::new(Payload::empty());
        *request.uri_mut() = uri.clone();
        request.headers_mut().insert(USER_AGENT, AGENT);
        // A connection of its own: one that requests leave behind may be closed by now, which says nothing of the server.
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        if let Some(key) = &server.key {
            request.headers_mut().insert(AUTHORIZATION, key.clone());
        }
        let response = self.client.send(request).await.map_err(|error| {
            if is_refused(&error) {
                return Absence::NobodyListens;
            }
            let why = self.client.failure(&error, uri).message().into();
            if is_our_lack(&error) { Absence::Unknown(why) } else { Absence::Unfit(why) }
        })?;
        let status = response.status();
        server.is_known_by(response.headers());
        let mut body = Vec::new();
        collect(response.into_body(), most, &mut body).await;
        Ok((status, body))
    }
}

// === impl Server ===

impl Server {
    fn unfit(&self, status: StatusCode) -> Absence {
        let path = self.models.path();
        Absence::Unfit(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                format!("{path} answers {status}: it wants another workers.static[].apiKey")
            }
            StatusCode::NOT_FOUND => format!("{path} answers {status}: is workers.static[].url a server with the OpenAI API?"),
            _ => format!("{path} answers {status}"),
        })
    }
}

// === impl Absence ===

impl std::fmt::Display for Absence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NobodyListens => "nobody listens at its address",
            Self::Silent => "it does not answer",
            Self::Unknown(why) | Self::Unfit(why) => why,
        })
    }
}
