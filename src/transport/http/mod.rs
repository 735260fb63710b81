//! Attempts over HTTP, to servers that speak the OpenAI API: `mlx_lm.server`, and others like it.
//!
//! | file | what it does |
//! |---|---|
//! | `server` | one server: addresses, key, names of models |
//! | `client` | connections, and what it means that there is none |
//! | `exchange` | one attempt, from its request to the end of its answer |
//! | `request`, `answer`, `refusal`, `sse` | their words and ours; pure |
//! | `relayed` | answers of endpoints that the fleet has no words for, handed on as they came |
//! | `probe` | whether a server is there, and what it serves |
//!
//! An attempt counts as accepted once its request is on its way over a connection: these servers send the first word of a
//! response when they take a request up, which may be long after they have it. An attempt that nobody waits for any more
//! closes its connection, and so tells the server to stop.

mod answer;
mod client;
mod exchange;
mod probe;
mod refusal;
mod relayed;
mod request;
mod server;
mod sse;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};

use client::Client;
pub use probe::Absence;
use server::Server;

use super::{Mailbox, Outgoing, Transport, mailbox};
use crate::config::StaticWorker;
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{RelayedTo, WorkerId};

/// The carrier between one controller and the servers of its configuration.
pub struct HttpTransport {
    client: Arc<Client>,
    servers: BTreeMap<WorkerId, Arc<Server>>,
}

// === impl HttpTransport ===

impl HttpTransport {
    /// A carrier to these servers. A connection may take at most `connect_limit` to be made. Needs no runtime.
    ///
    /// # Errors
    /// REQUEST_VALIDATION_FAILED names the key that no address or header can be made of.
    pub fn new(workers: &[StaticWorker], connect_limit: Duration) -> Result<Self, ControllerError> {
        let mut servers = BTreeMap::new();
        for (number, worker) in workers.iter().enumerate() {
            let server = Server::new(worker, &format!("workers.static[{number}]"))?;
            servers.insert(server.worker.clone(), Arc::new(server));
        }
        let with_tls = servers.values().any(|server| server.chat.scheme_str() == Some("https"));
        let client = Client::new(connect_limit, with_tls).map_err(|error| {
            let message = format!("https needs the certificates of this machine, and there are none: {error}");
            ControllerError::validation("workers.static", message)
        })?;
        Ok(Self { client: Arc::new(client), servers })
    }

    /// The servers that said lately that they have no such endpoint for this model.
    pub fn lacking<'a>(&'a self, to: RelayedTo, model: &'a str) -> impl Iterator<Item = &'a WorkerId> {
        self.servers.values().filter(move |server| server.is_lacking(to, model)).map(|server| &server.worker)
    }

    /// The server of a worker lives anew: what it lacked before it may have.
    pub fn lives_anew(&self, worker: &WorkerId) {
        if let Some(server) = self.server(worker) {
            server.may_have_all();
        }
    }

    fn server(&self, worker: &WorkerId) -> Option<&Arc<Server>> {
        self.servers.get(worker)
    }
}

impl Transport for HttpTransport {
    fn send<'a>(&'a self, outgoing: &'a Outgoing) -> BoxFuture<'a, Result<Mailbox, ControllerError>> {
        let Some(server) = self.server(&outgoing.worker).cloned() else {
            let what = format!("worker {} is no entry of workers.static", outgoing.worker);
            return ready(Err(ControllerError::new(ControllerErrorCode::InternalError, what))).boxed();
        };
        let (postbox, mailbox) = mailbox();
        tokio::spawn(exchange::run(self.client.clone(), server, outgoing.clone(), postbox));
        ready(Ok(mailbox)).boxed()
    }

    /// The connection says it: it is closed when the mailbox is.
    fn cancel(&self, _outgoing: &Outgoing, _mailbox: &Mailbox) {}
}

impl std::fmt::Debug for HttpTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpTransport").field("servers", &self.servers.keys()).finish_non_exhaustive()
    }
}
