//! Where attempts come in: off NATS, or out of a port of this process.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::answer::Target;
use super::cancels::Cancellation;
use super::desk::{Arrival, Desk, Intake, refused};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::transport::LocalMessage;
use crate::transport::nats::{Asked, Incoming, Subscription, WorkerService};
use crate::wire::{Cancel, InferenceRequest, header};

/// A year: a longer `Timeout-Ms` means as much.
const LONGEST_MS: u64 = 31_536_000_000;

/// Serves one worker's subjects until `closing` fires or the connection is closed; then leaves them.
/// `unsaid` is how long an attempt may take that does not say.
///
/// Requests go before cancellations that are there at the same time: they were sent in that order, and arrive on
/// subscriptions of their own.
pub(super) async fn from_nats(
    desk: Arc<Desk>,
    mut service: WorkerService,
    mut cancels: Subscription,
    unsaid: Duration,
    closing: CancellationToken,
) {
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            asked = service.next() => match asked {
                Some(asked) => take(&desk, asked, unsaid).await,
                None => break,
            },
            message = cancels.next() => match message {
                Some(message) => cancel(&desk, &message),
                None => break,
            },
        }
    }
    service.close().await;
}

/// A message of a controller of this process, whose `name` is known once it has asked something.
pub(super) async fn from_port(desk: &Desk, name: &mut Option<Arc<str>>, message: LocalMessage) {
    match message {
        LocalMessage::Request { request, attempt, timeout, controller_id, postbox } => {
            *name = Some(controller_id.clone());
            let request_id = request.request_id.clone();
            let arrival = Arrival { request, attempt, controller: controller_id, timeout, size: 0 };
            settle(desk.take(arrival, Target::Local(postbox)), &request_id).await;
        }
        LocalMessage::Cancel { request_id, attempt } => {
            let cancel = Cancel { request_id, attempt };
            desk.cancel(Cancellation { cancel, controller: name.clone(), reply_to: None });
        }
    }
}

async fn take(desk: &Desk, asked: Asked, unsaid: Duration) {
    if asked.reply_to().is_none() {
        tracing::debug!("a request without a subject for its answer is dropped");
        return;
    }
    match read(&asked, unsaid) {
        Ok(arrival) => {
            let request_id = arrival.request.request_id.clone();
            settle(desk.take(arrival, Target::Nats(Box::new(asked))), &request_id).await;
        }
        Err(error) => {
            let request_id = asked.header(header::REQUEST_ID).unwrap_or_default().to_owned();
            let reply = refused(ControllerErrorCode::RequestValidationFailed, error.message().to_owned(), None);
            Target::Nats(Box::new(asked)).refuse(&request_id, reply).await;
        }
    }
}

async fn settle(intake: Intake, request_id: &str) {
    match intake {
        Intake::Taken => {}
        Intake::Repeated => tracing::debug!(request_id, "an attempt that is here already is ignored"),
        Intake::Refused(target, reply) => target.refuse(request_id, reply).await,
    }
}

fn read(asked: &Asked, unsaid: Duration) -> Result<Arrival, ControllerError> {
    let mut request: InferenceRequest = serde_json::from_slice(asked.payload()).map_err(|error| {
        // Where it is wrong, not what stands there: the words of serde may repeat a value.
        let place = format!("is no request: line {}, column {}", error.line(), error.column());
        ControllerError::validation("body", place)
    })?;
    if request.request_id.is_empty() {
        request.request_id = asked.header(header::REQUEST_ID).unwrap_or_default().to_owned();
    }
    let attempt = number(asked, header::ATTEMPT)?.unwrap_or(1);
    let timeout = number(asked, header::TIMEOUT_MS)?.map_or(unsaid, |ms| Duration::from_millis(ms.min(LONGEST_MS)));
    Ok(Arrival {
        request: Arc::new(request),
        attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
        controller: asked.header(header::CONTROLLER_ID).unwrap_or_default().into(),
        timeout,
        size: asked.payload().len(),
    })
}

fn number(asked: &Asked, name: &str) -> Result<Option<u64>, ControllerError> {
    let Some(text) = asked.header(name) else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => {
            let shown: String = text.chars().take(40).collect();
            Err(ControllerError::validation(name, format!("{shown:?} is no whole number")))
        }
    }
}

fn cancel(desk: &Desk, message: &Incoming) {
    match Cancellation::read(message) {
        Some(cancellation) => desk.cancel(cancellation),
        None => tracing::debug!("a cancellation that cannot be read is dropped"),
    }
}
