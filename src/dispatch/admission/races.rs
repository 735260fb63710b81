//! Callers that wait for places while these come and go, in many orders (feature `shuttle`).
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use shuttle::future::{block_on, spawn};

use super::*;
use crate::sync::explore;

const ORDERS: usize = 1_000;

/// Workers with so many places, as the router's: a place is taken at once or not at all, and who gives one back says so.
struct Places {
    free: crate::sync::atomic::AtomicUsize,
    freed: Notify,
    admission: Arc<Admission>,
    served: AtomicUsize,
}

struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, SeqCst);
        self.0.freed.notify_waiters();
    }
}

impl Places {
    fn new(free: usize, max_queue: usize) -> Arc<Self> {
        let admission = Admission::new(&AdmissionConfig { max_queue, max_wait_ms: 10_000 });
        Arc::new(Self { free: free.into(), freed: Notify::new(), admission, served: AtomicUsize::new(0) })
    }

    fn take(self: &Arc<Self>) -> Option<Place> {
        let taken = self.free.fetch_update(SeqCst, SeqCst, |free| free.checked_sub(1));
        taken.is_ok().then(|| Place(self.clone()))
    }

    /// As a request goes about it (`call.rs`): behind those who wait already, else at once, else in the queue.
    async fn find(self: &Arc<Self>, priority: Priority, choosy: bool) -> Result<Place, ControllerError> {
        let mut ticket: Option<Ticket> = None;
        loop {
            let may = ticket.is_some() || !self.admission.is_waiting("m", |_| false);
            if let Some(place) = may.then(|| self.take()).flatten() {
                return Ok(place);
            }
            if ticket.is_none() {
                let now = Instant::now();
                let joined = self.admission.join("m", priority, choosy, now + Duration::from_secs(3_600), now)?;
                joined.nudge(now);
                ticket = Some(joined);
            }
            if let Some(ticket) = &ticket {
                ticket.turn().await?;
            }
        }
    }

    /// As the controller goes about it (`lifecycle.rs`).
    async fn usher(self: Arc<Self>) {
        loop {
            self.admission.somebody_waits().await;
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            self.admission.wake(Instant::now());
            freed.await;
        }
    }
}

/// Time stands still: whoever is not woken waits for ever, and shuttle sees that.
fn standing_still(orders: usize, test: impl Fn() + Send + Sync + Copy + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _entered = runtime.enter();
    explore(orders, test);
}

async fn all_served(places: &Arc<Places>, callers: Vec<shuttle::future::JoinHandle<()>>) {
    let usher = spawn(places.clone().usher());
    let count = callers.len();
    for caller in callers {
        caller.await.unwrap();
    }
    usher.abort();
    assert_eq!(places.served.load(SeqCst), count);
    assert_eq!(places.admission.waiting(), 0);
}

#[test]
fn every_place_that_becomes_free_finds_somebody_who_waits() {
    standing_still(ORDERS, || {
        block_on(async {
            let places = Places::new(1, 16);
            let callers = [(Priority::Normal, false), (Priority::High, false), (Priority::Low, true), (Priority::Normal, true)];
            let callers = callers.map(|(priority, choosy)| {
                let places = places.clone();
                spawn(async move {
                    let place = places.find(priority, choosy).await.unwrap();
                    places.served.fetch_add(1, SeqCst);
                    shuttle::future::yield_now().await;
                    drop(place);
                })
            });
            all_served(&places, callers.into()).await;
        });
    });
}

#[test]
fn a_caller_that_gives_up_hands_its_turn_on() {
    standing_still(ORDERS, || {
        block_on(async {
            let places = Places::new(1, 16);
            let held = places.take().unwrap();
            let impatient = (0..2).map(|_| {
                let places = places.clone();
                spawn(async move {
                    let find = places.find(Priority::High, false);
                    tokio::pin!(find);
                    // It goes away at any time, also when it was just told that it is its turn.
                    let gone = async {
                        shuttle::future::yield_now().await;
                        shuttle::future::yield_now().await;
                    };
                    tokio::select! {
                        biased;
                        () = gone => {}
                        place = &mut find => drop(place),
                    }
                    places.served.fetch_add(1, SeqCst);
                })
            });
            let mut callers: Vec<_> = impatient.collect();
            let patient = places.clone();
            callers.push(spawn(async move {
                drop(patient.find(Priority::Normal, false).await.unwrap());
                patient.served.fetch_add(1, SeqCst);
            }));
            let holder = places.clone();
            callers.push(spawn(async move {
                drop(held);
                holder.served.fetch_add(1, SeqCst);
            }));
            all_served(&places, callers).await;
        });
    });
}

#[test]
fn one_that_is_shed_hears_of_it_and_the_line_is_never_longer_than_it_may_be() {
    standing_still(ORDERS, || {
        block_on(async {
            let places = Places::new(0, 1);
            let [low, high] = [Priority::Low, Priority::High].map(|priority| {
                let places = places.clone();
                spawn(async move {
                    let result = places.find(priority, false).await;
                    assert!(places.admission.waiting() <= 1);
                    places.served.fetch_add(1, SeqCst);
                    result.map(drop).map_err(|error| error.code())
                })
            });
            // Only the one that is not shed or refused is still there when a place comes.
            let gone = low.await.unwrap();
            assert_eq!(gone, Err(ControllerErrorCode::QueueFull));
            let usher = spawn(places.clone().usher());
            drop(Place(places.clone()));
            assert_eq!(high.await.unwrap(), Ok(()));
            usher.abort();
        });
    });
}
