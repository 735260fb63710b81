//! A carrier and a reader that meet where a mailbox is full, in many orders (feature `shuttle`).
#![allow(clippy::unwrap_used)]

use shuttle::future::{block_on, spawn};

use super::*;
use crate::sync::explore;

const ORDERS: usize = 1_000;

fn accepted() -> Delivery {
    Delivery::Reply(Reply::Accepted { queue_position: 0 })
}

/// Posts so many, and gives how many were taken.
async fn post(to: Postbox, count: usize) -> usize {
    let mut taken = 0;
    for _ in 0..count {
        taken += usize::from(to.post(accepted()));
        shuttle::future::yield_now().await;
    }
    taken
}

#[test]
fn a_reader_gets_what_was_taken_and_then_hears_that_more_came() {
    explore(ORDERS, || {
        block_on(async {
            let (postbox, mut mailbox) = mailbox();
            assert!((0..CAPACITY - 1).all(|_| postbox.post(accepted())));
            let posters = [spawn(post(postbox.clone(), 2)), spawn(post(postbox.clone(), 2))];
            let reader = spawn(async move {
                let mut read = 0;
                // The carrier stays: a reader that is not told waits for ever, and shuttle sees that.
                loop {
                    match mailbox.recv().await.unwrap() {
                        Delivery::Overflow => return (read, true),
                        _ => read += 1,
                    }
                    if read == CAPACITY + 3 {
                        return (read, false);
                    }
                }
            });
            let mut taken = CAPACITY - 1;
            for poster in posters {
                taken += poster.await.unwrap();
            }
            let (read, overflowed) = reader.await.unwrap();
            assert_eq!((read, overflowed), (taken, taken < CAPACITY + 3));
            assert!(!overflowed || !postbox.post(accepted()), "one that was full once takes nothing more");
        });
    });
}

#[test]
fn a_reader_hears_that_its_carriers_have_gone() {
    explore(ORDERS, || {
        block_on(async {
            let (postbox, mut mailbox) = mailbox();
            let carriers = [spawn(post(postbox.clone(), 1)), spawn(post(postbox, 1))];
            let mut read = 0;
            // One that is not told waits for ever, and shuttle sees that.
            while mailbox.recv().await.is_some() {
                read += 1;
            }
            let mut taken = 0;
            for carrier in carriers {
                taken += carrier.await.unwrap();
            }
            assert_eq!((taken, read), (2, 2));
        });
    });
}

#[test]
fn a_late_wake_finds_a_reader_that_has_looked_before() {
    explore(ORDERS, || {
        block_on(async {
            let (postbox, mut mailbox) = mailbox();
            let carrier = spawn(async move {
                for _ in 0..2 {
                    let (taken, wake) = postbox.post_quietly(accepted());
                    assert!(taken);
                    shuttle::future::yield_now().await;
                    wake.wake();
                }
                postbox
            });
            for _ in 0..2 {
                assert!(mailbox.recv().await.is_some());
            }
            drop(carrier.await.unwrap());
        });
    });
}
