//! What a scripted worker was asked and told, and what it works on. The newest of it: the oldest goes when there is no room.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::wire::{Cancel, InferenceRequest};
use crate::worker::cancels::{Cancellation, Key};

/// How many requests, and how many cancellations, are remembered.
const CAPACITY: usize = 1000;

/// A request as it reached the worker.
#[derive(Clone, Debug)]
pub struct Received {
    /// What was asked.
    pub request: Arc<InferenceRequest>,
    /// 1 for the first worker that was asked, 2 for the second, and so on.
    pub attempt: u32,
    /// Who asked.
    pub controller_id: Arc<str>,
    /// How long it may take, to its end.
    pub timeout: Duration,
}

/// A cancellation as it reached the worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cancelled {
    /// The request.
    pub request_id: String,
    /// Its attempt.
    pub attempt: u32,
}

/// Everything in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests so far, also those that are not remembered any more.
    pub requests: u64,
    /// Cancellations so far, also those that are not remembered any more.
    pub cancels: u64,
    /// Requests that it works on.
    pub in_flight: usize,
}

/// The record of one worker.
#[derive(Debug, Default)]
pub(super) struct Record {
    pages: Mutex<Pages>,
    counts: watch::Sender<Counts>,
}

#[derive(Debug, Default)]
struct Pages {
    requests: VecDeque<Received>,
    cancels: VecDeque<Cancelled>,
    running: BTreeMap<u64, Running>,
    serial: u64,
}

#[derive(Debug)]
struct Running {
    key: Key,
    cancelled: CancellationToken,
}

/// A request in work, until it is dropped.
#[derive(Debug)]
pub(super) struct InWork {
    record: Arc<Record>,
    serial: u64,
    pub(super) cancelled: CancellationToken,
}

// === impl Record ===

impl Record {
    pub(super) fn requests(&self) -> Vec<Received> {
        self.pages.lock().requests.iter().cloned().collect()
    }

    pub(super) fn cancels(&self) -> Vec<Cancelled> {
        self.pages.lock().cancels.iter().cloned().collect()
    }

    pub(super) fn counts(&self) -> watch::Receiver<Counts> {
        self.counts.subscribe()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.counts.borrow().in_flight
    }

    /// The ids of what it works on, oldest first.
    pub(super) fn running_ids(&self) -> Vec<String> {
        self.pages.lock().running.values().map(|running| running.key.request_id.clone()).collect()
    }

    /// A request came.
    pub(super) fn received(&self, received: Received) {
        keep(&mut self.pages.lock().requests, received);
        self.counts.send_modify(|counts| counts.requests += 1);
    }

    /// It is worked on.
    pub(super) fn begin(self: &Arc<Self>, received: &Received, reply_to: Option<&str>) -> InWork {
        let cancelled = CancellationToken::new();
        let mut pages = self.pages.lock();
        pages.serial += 1;
        let serial = pages.serial;
        let key = Key {
            request_id: received.request.request_id.clone(),
            attempt: received.attempt,
            controller: received.controller_id.clone(),
            reply_to: reply_to.map(str::to_owned),
        };
        pages.running.insert(serial, Running { key, cancelled: cancelled.clone() });
        self.counts.send_modify(|counts| counts.in_flight = pages.running.len());
        InWork { record: self.clone(), serial, cancelled }
    }

    /// Everything that it works on ends.
    pub(super) fn dismiss(&self) {
        self.pages.lock().running.values().for_each(|running| running.cancelled.cancel());
    }

    /// A cancellation came; `obeys`: the request that it means ends.
    pub(super) fn cancelled(&self, cancellation: &Cancellation, obeys: bool) {
        let mut pages = self.pages.lock();
        if obeys {
            let meant = pages.running.values().filter(|running| cancellation.means(&running.key));
            meant.for_each(|running| running.cancelled.cancel());
        }
        let Cancel { request_id, attempt } = cancellation.cancel.clone();
        keep(&mut pages.cancels, Cancelled { request_id, attempt });
        drop(pages);
        self.counts.send_modify(|counts| counts.cancels += 1);
    }
}

/// Puts one at the end, in the place of the oldest where there is no room.
fn keep<T>(page: &mut VecDeque<T>, entry: T) {
    if page.len() == CAPACITY {
        page.pop_front();
    }
    page.push_back(entry);
}

// === impl InWork ===

impl Drop for InWork {
    fn drop(&mut self) {
        let mut pages = self.record.pages.lock();
        pages.running.remove(&self.serial);
        self.record.counts.send_modify(|counts| counts.in_flight = pages.running.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(id: &str) -> Received {
        let request = InferenceRequest { request_id: id.into(), ..InferenceRequest::default() };
        Received { request: Arc::new(request), attempt: 1, controller_id: "c".into(), timeout: Duration::ZERO }
    }

    fn cancel(id: &str, controller: Option<&str>) -> Cancellation {
        let cancel = Cancel { request_id: id.into(), attempt: 1 };
        Cancellation { cancel, controller: controller.map(Into::into), reply_to: None }
    }

    #[test]
    fn the_newest_are_remembered_and_all_are_counted() {
        let record = Record::default();
        for number in 0..CAPACITY + 5 {
            record.received(received(&number.to_string()));
            record.cancelled(&cancel(&number.to_string(), None), true);
        }
        let (requests, cancels) = (record.requests(), record.cancels());
        assert_eq!((requests.len(), &*requests[0].request.request_id), (CAPACITY, "5"));
        assert_eq!((cancels.len(), &*cancels[0].request_id), (CAPACITY, "5"));
        let all = CAPACITY as u64 + 5;
        assert_eq!(*record.counts().borrow(), Counts { requests: all, cancels: all, in_flight: 0 });
    }

    #[test]
    fn a_cancellation_ends_what_it_means_and_nothing_else() {
        let record = Arc::new(Record::default());
        let (one, two) = (record.begin(&received("one"), None), record.begin(&received("two"), None));
        record.cancelled(&cancel("one", Some("another")), true);
        record.cancelled(&cancel("two", Some("c")), false);
        assert!(!one.cancelled.is_cancelled() && !two.cancelled.is_cancelled());
        record.cancelled(&cancel("one", Some("c")), true);
        assert!(one.cancelled.is_cancelled() && !two.cancelled.is_cancelled());
        drop(one);
        assert_eq!((record.in_flight(), record.running_ids()), (1, vec!["two".to_owned()]));
    }
}
