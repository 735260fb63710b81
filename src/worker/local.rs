//! A worker's place with a controller of its own process: it serves the port, and says of itself what others publish.
//!
//! Silence means nothing there, so that heartbeats are for what they say: phases, models, what the caches hold.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::desk::Desk;
use super::intake;
use super::membership::Stage;
use super::pulse::Pulse;
use crate::transport::{LocalNews, LocalPort};
use crate::wire::WorkerStatus;

/// Serves one port until the controller has gone, drained or not.
pub(super) async fn serve(
    desk: Arc<Desk>,
    mut port: LocalPort,
    mut pulse: Pulse,
    heartbeat_interval: Duration,
    mut stage: watch::Receiver<Stage>,
) {
    let mut board = desk.board.subscribe();
    board.mark_changed(); // what it is doing now
    let mut controller: Option<Arc<str>> = None;
    let mut tick = tokio::time::interval_at(Instant::now() + heartbeat_interval, heartbeat_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut serving = true;
    loop {
        tokio::select! {
            biased;
            Ok(()) = stage.changed(), if serving => {
                serving = false;
                port.tell(LocalNews::Deregister);
            }
            // Before requests: a request for a model that is being loaded meets a controller that knows.
            Ok(()) = board.changed(), if serving => port.tell(LocalNews::Heartbeat(Box::new(pulse.beat(WorkerStatus::Online)))),
            message = port.recv() => match message {
                Some(message) => intake::from_port(&desk, &mut controller, message).await,
                None => return,
            },
            _ = tick.tick(), if serving => port.tell(LocalNews::Heartbeat(Box::new(pulse.beat(WorkerStatus::Online)))),
        }
    }
}
