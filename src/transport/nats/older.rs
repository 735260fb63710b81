//! Attempts to workers of the older dialect: published without a subject for the reply; the answer comes on a subject
//! that is named by the attempt's own id.
//!
//! One subscription for each attempt, which ends with its mailbox, so there are never more of them than attempts. A wildcard
//! for all would bring every token that other controllers' workers say in the same fleet. It needs no round trip before the
//! request: a server takes a client's words in their order, as it does along the routes of a cluster.
//!
//! Without a subject for the reply no server says that nobody listens: that a worker is gone shows in its silence alone.

use std::sync::Arc;

use super::connection::{NatsConnection, Subscription};
use super::inbox::Inbox;
use crate::error::ControllerError;
use crate::transport::{Mailbox, Outgoing, Postbox};
use crate::wire::{Reply, older};

/// Listens, then publishes.
pub(super) async fn publish(
    connection: &NatsConnection,
    inbox: &Arc<Inbox>,
    outgoing: &Outgoing,
) -> Result<Mailbox, ControllerError> {
    let request_id = uuid::Uuid::new_v4();
    let payload = older::request(&outgoing.request, &request_id.to_string())?;
    // Nobody listens for an answer to what is not sent.
    connection.ready_for(payload.len())?;
    let answer = connection.subscribe(older::response(&request_id)).await?;
    let (postbox, mailbox) = inbox.admit();
    connection.publish(older::inference(&outgoing.worker), payload.into()).await?;
    tokio::spawn(listen(answer, postbox));
    Ok(mailbox)
}

/// Hands on what the worker says, until its answer or the interest in it ends.
async fn listen(mut answer: Subscription, postbox: Postbox) {
    let mut next = 0;
    loop {
        let message = tokio::select! {
            message = answer.next() => message,
            () = postbox.closed() => return,
        };
        // The connection is closed: the inbox says so.
        let Some(message) = message else { return };
        let reply = Reply::decode_older(&message.payload, next);
        if let Ok(Reply::Token(token)) = &reply {
            next = token.index.saturating_add(token.width());
        }
        let is_last = reply.as_ref().map_or(true, Reply::is_terminal);
        // One that is full says so itself; without an index a gap would not show.
        if !postbox.post(reply.into()) || is_last {
            return;
        }
    }
}
