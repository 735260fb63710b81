//! News that come once and concern many: a worker is gone, the controller stops.
//!
//! Every request in flight listens to the same few signals, and is woken for each message that it gets meanwhile. A
//! [`Listener`] therefore enters itself once, and then costs a look at a flag each time; tokio-util's cancellation tokens enter and
//! leave a list that all share each time they are waited for.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Fires once. Clones are the same signal.
#[derive(Clone, Debug, Default)]
pub struct Signal(Arc<Shared>);

/// Somebody who wants to know. Leaves when it is dropped.
#[derive(Debug)]
pub struct Listener {
    signal: Signal,
    entry: Option<Entry>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Set before anybody is woken, and read under the lock by those who enter.
    fired: AtomicBool,
    listening: Mutex<Slab<Waker>>,
}

#[derive(Debug)]
struct Entry {
    key: usize,
    waker: Waker,
}

// === impl Signal ===

impl Signal {
    /// One that has not fired.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Fires: from now on, for everybody. Without effect where it has.
    pub fn fire(&self) {
        self.0.fired.store(true, Ordering::Release);
        let listening = std::mem::take(&mut *self.0.listening.lock());
        for (_, waker) in listening {
            waker.wake();
        }
    }

    /// Whether it has fired.
    #[must_use]
    pub fn has_fired(&self) -> bool {
        self.0.fired.load(Ordering::Acquire)
    }

    /// Somebody who wants to know.
    #[must_use]
    pub fn listen(&self) -> Listener {
        Listener { signal: self.clone(), entry: None }
    }

    /// Returns when it has fired.
    pub async fn fired(&self) {
        self.listen().fired().await;
    }
}

// === impl Listener ===

impl Listener {
    /// Returns when the signal has fired. Cancel-safe, and cheap to wait for again and again.
    pub async fn fired(&mut self) {
        poll_fn(|context| self.poll_fired(context)).await;
    }

    /// As [`Self::fired`], to be polled.
    pub fn poll_fired(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.signal.has_fired() {
            return Poll::Ready(());
        }
        if self.entry.as_ref().is_some_and(|entry| entry.waker.will_wake(context.waker())) {
            return Poll::Pending;
        }
        self.enter(context.waker().clone())
    }

    fn enter(&mut self, waker: Waker) -> Poll<()> {
        let mut listening = self.signal.0.listening.lock();
        // Whoever fires does so before it takes the list.
        if self.signal.has_fired() {
            return Poll::Ready(());
        }
        match &mut self.entry {
            Some(entry) => {
                listening[entry.key] = waker.clone();
                entry.waker = waker;
            }
            none => *none = Some(Entry { key: listening.insert(waker.clone()), waker }),
        }
        Poll::Pending
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(entry) = &self.entry {
            let left = self.signal.0.listening.lock().try_remove(entry.key);
            drop(left);
        }
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod races {
    use shuttle::future::{block_on, spawn};

    use super::*;
    use crate::sync::explore;

    #[test]
    fn whoever_listens_while_it_fires_hears_of_it() {
        explore(1_000, || {
            block_on(async {
                let signal = Signal::new();
                let listeners = [(); 2].map(|()| {
                    let mut listener = signal.listen();
                    spawn(async move {
                        shuttle::future::yield_now().await;
                        // One that is not told waits for ever, and shuttle sees that.
                        listener.fired().await;
                    })
                });
                let leaves = signal.listen();
                let left = spawn(async move { drop(leaves) });
                let fires = signal.clone();
                spawn(async move { fires.fire() }).await.unwrap_or_else(|error| panic!("{error}"));
                for listener in listeners {
                    listener.await.unwrap_or_else(|error| panic!("{error}"));
                }
                left.await.unwrap_or_else(|error| panic!("{error}"));
                assert!(signal.has_fired());
            });
        });
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn waker() -> (Arc<Counted>, Waker) {
        let counted = Arc::<Counted>::default();
        (Arc::clone(&counted), counted.into())
    }

    #[test]
    fn each_listener_is_woken_once_through_the_waker_it_had_last() {
        let signal = Signal::new();
        let mut listener = signal.listen();
        let ((before, first), (after, last)) = (waker(), waker());
        for waker in [&first, &first, &last, &last] {
            assert!(listener.poll_fired(&mut Context::from_waker(waker)).is_pending());
        }
        assert_eq!(signal.0.listening.lock().len(), 1);
        signal.fire();
        signal.fire();
        assert_eq!((before.0.load(Ordering::Relaxed), after.0.load(Ordering::Relaxed)), (0, 1));
        assert!(listener.poll_fired(&mut Context::from_waker(&first)).is_ready());
    }

    #[test]
    fn a_listener_that_goes_leaves_nothing_behind() {
        let signal = Signal::new();
        let (woken, waker) = waker();
        let mut listeners = [signal.listen(), signal.listen()];
        for listener in &mut listeners {
            assert!(listener.poll_fired(&mut Context::from_waker(&waker)).is_pending());
        }
        let [gone, mut stays] = listeners;
        drop(gone);
        assert_eq!(signal.0.listening.lock().len(), 1);
        signal.fire();
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(stays.poll_fired(&mut Context::from_waker(&waker)).is_ready());
        drop(stays);
        assert!(signal.listen().poll_fired(&mut Context::from_waker(&waker)).is_ready());
        assert!(signal.0.listening.lock().is_empty());
    }
}
