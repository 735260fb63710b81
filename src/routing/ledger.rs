//! The requests in flight of all workers side by side, so that one pass over thousands of them takes microseconds.
//!
//! Each life of a worker has an account: a number that holds its requests and marks for what keeps further ones away. A
//! marked worker is no candidate, and its load is never less than its account says; who is not marked may still refuse, and
//! has to be asked. What the clock alone takes away — a mark, or requests in a report that has grown old — is taken away
//! when [`Ledger::is_due`] says so.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use tokio::time::Instant;

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Ledger {
    /// The distance of two accounts, as a power of two.
    spread: u32,
    pages: Mutex<Pages>,
    /// Times below are told from here: when the first account was opened.
    epoch: OnceLock<Instant>,
    /// The soonest that an account is wrong by the clock alone, in nanoseconds since `epoch`.
    due: AtomicU64,
}

#[derive(Debug, Default)]
struct Pages {
    pages: Vec<Arc<Page>>,
    /// Numbers of accounts that were closed.
    free: Vec<u32>,
}

/// Accounts that lie together.
#[derive(Debug)]
pub(super) struct Page([AtomicU64; PAGE]);

/// One worker's account. Closed, it is another's: by the worker's drop.
#[derive(Clone, Debug)]
pub(super) struct Account {
    ledger: Arc<Ledger>,
    page: Arc<Page>,
    number: u32,
    at: usize,
}

/// What an account says: from the lowest bit on 32 of the router's own requests, 28 of all requests, 4 marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

/// Places of a page.
const PAGE: usize = 1_024;
/// Accounts that are not read in passes lie so far apart, as a power of two, that threads do not share lines of the cache.
const APART: u32 = 3;
const TOTAL: u32 = 32;

// === impl Ledger ===

impl Ledger {
    /// An empty one. `in_passes`: accounts are read one after the other, and not only each for itself.
    pub(super) fn new(in_passes: bool) -> Self {
        let spread = if in_passes { 0 } else { APART };
        Self { spread, pages: Mutex::default(), epoch: OnceLock::new(), due: AtomicU64::new(u64::MAX) }
    }

    /// A new account.
    pub(super) fn open(self: &Arc<Self>, now: Instant) -> Account {
        self.epoch.get_or_init(|| now);
        let mut pages = self.pages.lock();
        if pages.free.is_empty() {
            let first = pages.pages.len() * PAGE;
            pages.pages.push(Arc::new(Page(std::array::from_fn(|_| AtomicU64::new(0)))));
            pages.free.extend((first..first + PAGE).step_by(1 << self.spread).rev().map(|at| (at >> self.spread) as u32));
        }
        let number = pages.free.pop().unwrap_or_default();
        let place = self.place(number);
        let account = Account { ledger: self.clone(), page: pages.pages[place / PAGE].clone(), number, at: place % PAGE };
        account.cell().store(0, Ordering::Relaxed);
        account
    }

    /// All pages until now, closed accounts in them too.
    pub(super) fn pages(&self) -> Box<[Arc<Page>]> {
        self.pages.lock().pages.as_slice().into()
    }

    /// Where in the pages an account lies.
    pub(super) fn place(&self, number: u32) -> usize {
        (number as usize) << self.spread
    }

    /// Whether an account may be wrong by the clock alone: all have to be set right, see [`Self::settle`].
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.nanos(now) >= self.due.load(Ordering::Acquire)
    }

    /// There are accounts that were not set right with the others: all are due.
    pub(super) fn hurry(&self) {
        self.due.store(0, Ordering::Release);
    }

    /// All accounts are about to be set right: each says again when it is due.
    pub(super) fn settle(&self) {
        self.due.swap(u64::MAX, Ordering::AcqRel);
    }

    fn nanos(&self, at: Instant) -> u64 {
        let epoch = *self.epoch.get_or_init(|| at);
        u64::try_from(at.saturating_duration_since(epoch).as_nanos()).unwrap_or(u64::MAX)
    }
}

// === impl Page ===

impl Page {
    /// What the account at a place of these pages says.
    pub(super) fn read(pages: &[Arc<Self>], place: usize) -> Entry {
        Entry(pages[place / PAGE].0[place % PAGE].load(Ordering::Relaxed))
    }

    /// Whether any of the accounts at these places has one of some marks.
    pub(super) fn any(pages: &[Arc<Self>], mut places: Range<usize>, marks: u64) -> bool {
        let mut said = 0;
        while !places.is_empty() {
            let first = places.start % PAGE;
            let last = PAGE.min(first + places.len());
            said |= pages[places.start / PAGE].0[first..last].iter().fold(0, |said, cell| said | cell.load(Ordering::Relaxed));
            places.start += last - first;
        }
        said & marks != 0
    }
}

// === impl Account ===

impl Account {
    /// What tells it from others that are open.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// What it says.
    pub(super) fn entry(&self) -> Entry {
        Entry(self.cell().load(Ordering::Acquire))
    }

    /// Writes what `change` makes of what it says, in one step, and gives what it said before; where `change` makes nothing of
    /// it, nothing is written.
    pub(super) fn update(&self, mut change: impl FnMut(Entry) -> Option<Entry>) -> Result<Entry, Entry> {
        let changed = |said| change(Entry(said)).map(|entry| entry.0);
        self.cell().fetch_update(Ordering::AcqRel, Ordering::Acquire, changed).map(Entry).map_err(Entry)
    }

    /// Sets a mark, or takes it away.
    pub(super) fn mark(&self, mark: u64, set: bool) {
        if self.entry().has(mark) == set {
        } else if set {
            self.cell().fetch_or(mark, Ordering::AcqRel);
        } else {
            self.cell().fetch_and(!mark, Ordering::AcqRel);
        }
    }

    /// From this time on it may be wrong.
    pub(super) fn is_due_at(&self, at: Instant) {
        self.ledger.due.fetch_min(self.ledger.nanos(at), Ordering::AcqRel);
    }

    /// Gives it up, for another worker to have.
    pub(super) fn close(&self) {
        self.ledger.pages.lock().free.push(self.number);
    }

    fn cell(&self) -> &AtomicU64 {
        &self.page.0[self.at]
    }
}

// === impl Entry ===

impl Entry {
    /// The most requests that are counted.
    pub(super) const MOST: u32 = (1 << 28) - 1;
    /// No further request fits.
    pub(super) const FULL: u64 = 1 << 63;
    /// The worker stands somewhere else than online.
    pub(super) const ASIDE: u64 = 1 << 62;
    /// Its breaker lets nothing through.
    pub(super) const SHUT: u64 = 1 << 61;
    /// It asked to be left alone.
    pub(super) const HELD: u64 = 1 << 60;
    /// All of them.
    pub(super) const MARKS: u64 = Self::FULL | Self::ASIDE | Self::SHUT | Self::HELD;

    /// Of some marks those that are set.
    pub(super) fn marks(self, of: u64) -> u64 {
        self.0 & of
    }

    pub(super) fn has(self, mark: u64) -> bool {
        self.marks(mark) != 0
    }

    /// The router's own requests.
    pub(super) fn own(self) -> u32 {
        self.0 as u32
    }

    /// All requests.
    pub(super) fn total(self) -> u32 {
        (self.0 >> TOTAL) as u32 & Self::MOST
    }

    /// All requests, where of the marks in `of` those in `set` are set and no others; else more than [`Self::MOST`].
    pub(super) fn load_unless(self, of: u64, set: u64) -> u32 {
        (((self.0 & (of | u64::from(Self::MOST) << TOTAL)) ^ set) >> TOTAL) as u32
    }

    /// Requests of others.
    pub(super) fn foreign(self) -> u32 {
        self.total().saturating_sub(self.own())
    }

    /// One more of our own, where there are fewer than the limit (0: none).
    pub(super) fn enter(self, limit: u32) -> Option<Self> {
        let most = if limit == 0 { Self::MOST } else { limit.min(Self::MOST) };
        (self.total() < most).then(|| Self(self.0 + (1 << TOTAL) + 1).limited(limit))
    }

    /// One less of our own.
    pub(super) fn leave(self, limit: u32) -> Self {
        Self(self.0 - (1 << TOTAL) - 1).limited(limit)
    }

    /// So many requests of others.
    pub(super) fn with_foreign(self, foreign: u32, limit: u32) -> Self {
        let total = self.own().saturating_add(foreign).min(Self::MOST);
        Self(self.0 & (Self::MARKS | u64::from(u32::MAX)) | u64::from(total) << TOTAL).limited(limit)
    }

    /// Marked as full where that is so.
    pub(super) fn limited(self, limit: u32) -> Self {
        let is_full = limit != 0 && self.total() >= limit;
        Self(self.0 & !Self::FULL | if is_full { Self::FULL } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_keeps_its_parts_apart() {
        let entered = Entry(Entry::SHUT).with_foreign(3, 0).enter(5);
        assert_eq!(entered.map(|entry| (entry.own(), entry.foreign(), entry.total())), Some((1, 3, 4)));
        let full = entered.and_then(|entry| entry.enter(5));
        assert_eq!(full.map(|entry| entry.marks(Entry::MARKS)), Some(Entry::SHUT | Entry::FULL));
        assert_eq!(full.and_then(|entry| entry.enter(5)), None);
        assert_eq!(full.map(|entry| entry.leave(5)), entered);
        assert_eq!(full.map(|entry| entry.with_foreign(0, 5).total()), Some(2));
        assert_eq!(Entry(0).with_foreign(u32::MAX, 0).enter(0), None);
        assert_eq!(Entry(0).with_foreign(u32::MAX, 9).marks(Entry::MARKS), Entry::FULL);
    }

    #[tokio::test(start_paused = true)]
    async fn closed_accounts_are_opened_again_and_begin_with_nothing() {
        for in_passes in [true, false] {
            let ledger = Arc::new(Ledger::new(in_passes));
            let now = Instant::now();
            let accounts: Vec<_> = (0..3_000).map(|_| ledger.open(now)).collect();
            let numbers: std::collections::BTreeSet<_> = accounts.iter().map(Account::number).collect();
            assert_eq!(numbers, (0..3_000).collect());
            let pages = ledger.pages();
            for account in &accounts {
                assert!(account.update(|entry| entry.enter(0)).is_ok());
                assert_eq!(Page::read(&pages, ledger.place(account.number())), account.entry());
            }
            accounts[2_000].close();
            let again = ledger.open(now);
            assert_eq!((again.number(), again.entry()), (2_000, Entry(0)));
            assert_eq!(pages.len(), ledger.pages().len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_due_when_the_first_account_is() {
        let ledger = Arc::new(Ledger::new(true));
        let now = Instant::now();
        let at = |seconds| now + std::time::Duration::from_secs(seconds);
        let account = ledger.open(now);
        assert!(!ledger.is_due(at(1_000)));
        account.is_due_at(at(20));
        account.is_due_at(at(10));
        assert!(!ledger.is_due(at(9)) && ledger.is_due(at(10)));
        ledger.settle();
        assert!(!ledger.is_due(at(10)));
        ledger.hurry();
        assert!(ledger.is_due(now));
    }
}
