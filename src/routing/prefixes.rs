//! Which workers most likely hold which prefixes in their caches: a bounded map that forgets what was not used for longest.
//!
//! It learns from requests that a worker began to answer and from what heartbeats name; it is never told that a cache let
//! something go, so that it guesses by age. A worker is known by the serial of its life: what was known of a life that is
//! over is found by nobody any more, and is pushed out or grows old like everything else.

use std::hash::RandomState;
use std::time::Duration;

use hashlink::LinkedHashMap;
use tokio::time::Instant;

use super::worker::Life;

/// The most prefixes that are known: some 15 MB, and the prompts of some 3,000 conversations of 8 KB each.
pub(super) const MOST_PREFIXES: usize = 65_536;
/// What was not used for so long has most likely been pushed out of the worker's cache.
pub(super) const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// The most workers that are known for one prefix; a further one takes the place of the one that used it longest ago.
const HOLDERS: usize = 8;
/// The most workers that are found for one prompt.
const FOUND: usize = 32;

#[derive(Debug)]
pub(super) struct PrefixIndex {
    cap: usize,
    ttl: Duration,
    /// When it learned something for the first time.
    born: Option<Instant>,
    /// By the prefix's hash, the least recently used one first.
    entries: LinkedHashMap<u64, Holders, RandomState>,
}

/// A worker, and how many of a prompt's prefixes it holds: at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) life: Life,
    pub(super) prefixes: usize,
}

/// The most recent one first; those behind the last one are vacant.
#[derive(Debug)]
struct Holders([Option<Holder>; HOLDERS]);

#[derive(Clone, Copy, Debug)]
struct Holder {
    serial: u64,
    account: u32,
    /// In seconds since the index learned something for the first time.
    used: u32,
}

// === impl PrefixIndex ===

impl PrefixIndex {
    pub(super) fn new(cap: usize, ttl: Duration) -> Self {
        Self { cap: cap.max(1), ttl, born: None, entries: LinkedHashMap::default() }
    }

    /// A worker holds the prefixes with these hashes.
    pub(super) fn learn(&mut self, hashes: impl IntoIterator<Item = u64>, life: Life, now: Instant) {
        self.born.get_or_insert(now);
        self.expire(now);
        let holder = Holder { serial: life.serial, account: life.account, used: self.seconds(now) };
        for hash in hashes {
            if let Some(holders) = self.entries.to_back(&hash) {
                holders.put_first(holder);
                continue;
            }
            if self.entries.len() >= self.cap {
                self.entries.pop_front();
            }
            self.entries.insert(hash, Holders::of(holder));
        }
    }

    /// Who holds something of a prompt whose prefixes have these hashes, the shortest first: each worker once, with the
    /// longest prefix that it holds, those who hold most first. Looking is not using.
    pub(super) fn find(&self, hashes: &[u64], now: Instant) -> Vec<Held> {
        let now = self.seconds(now);
        let mut found: Vec<Held> = Vec::new();
        for (index, hash) in hashes.iter().enumerate().rev() {
            let Some(Holders(holders)) = self.entries.get(hash) else { continue };
            for holder in holders.iter().flatten().filter(|holder| self.is_fresh(holder, now)) {
                if found.len() < FOUND && found.iter().all(|known| known.life.serial != holder.serial) {
                    found.push(Held { life: Life { serial: holder.serial, account: holder.account }, prefixes: index + 1 });
                }
            }
        }
        found
    }

    /// Forgets what nobody has used for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let now = self.seconds(now);
        while self
            .entries
            .front()
            .is_some_and(|(_, Holders([latest, ..]))| !latest.is_some_and(|latest| self.is_fresh(&latest, now)))
        {
            self.entries.pop_front();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn is_fresh(&self, holder: &Holder, now: u32) -> bool {
        u64::from(now.saturating_sub(holder.used)) < self.ttl.as_secs()
    }

    fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.born.unwrap_or(now)).as_secs()).unwrap_or(u32::MAX)
    }
}

// === impl Holders ===

impl Holders {
    fn of(holder: Holder) -> Self {
        let mut holders = [None; HOLDERS];
        holders[0] = Some(holder);
        Self(holders)
    }

    fn put_first(&mut self, holder: Holder) {
        let is_its_own = |known: &Option<Holder>| known.is_none_or(|known| known.serial == holder.serial);
        let last = self.0.iter().position(is_its_own).unwrap_or(HOLDERS - 1);
        self.0[..=last].rotate_right(1);
        self.0[0] = Some(holder);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{PrefixHashes, prefix_bytes};

    const TTL: u64 = 60;

    fn life(serial: u64) -> Life {
        Life { serial, account: 0 }
    }

    /// Everything that was ever learned: a text, the serial of who holds it, and when.
    #[derive(Default)]
    struct Model(Vec<(String, u64, u64)>);

    impl Model {
        /// For each worker the most prefixes that a text has in common with one of its own.
        fn find(&self, text: &str, now: u64) -> Vec<(u64, usize)> {
            let common = |other: &str| {
                let same = text.bytes().zip(other.bytes()).take_while(|(mine, theirs)| mine == theirs).count() as u64;
                (0..).take_while(|&index| prefix_bytes(index) <= same).count()
            };
            let mut found = std::collections::BTreeMap::new();
            for (known, serial, at) in &self.0 {
                if now - at < TTL {
                    let most: &mut usize = found.entry(*serial).or_default();
                    *most = common(known).max(*most);
                }
            }
            found.into_iter().filter(|(_, prefixes)| *prefixes > 0).collect()
        }
    }

    /// Texts that begin alike and part sooner or later.
    fn text() -> impl Strategy<Value = String> {
        prop::collection::vec(0..3_u8, 0..12)
            .prop_map(|words| words.into_iter().map(|word| char::from(b'a' + word).to_string().repeat(200)).collect())
    }

    proptest! {
        #[test]
        fn the_longest_common_prefix_is_found(
            steps in prop::collection::vec((text(), 0..HOLDERS as u64, 0..20_u64), 1..60),
            asked in prop::collection::vec(text(), 1..10),
        ) {
            let start = Instant::now();
            let mut index = PrefixIndex::new(10_000, Duration::from_secs(TTL));
            let mut model = Model::default();
            let mut now = 0;
            for (text, serial, pause) in steps {
                now += pause;
                let hashes = PrefixHashes::of_prompt("m", &text);
                index.learn(hashes.hashes().iter().copied(), life(serial), start + Duration::from_secs(now));
                model.0.push((text, serial, now));
                for asked in &asked {
                    let hashes = PrefixHashes::of_prompt("m", asked);
                    let found = index.find(hashes.hashes(), start + Duration::from_secs(now));
                    prop_assert!(found.is_sorted_by(|one, next| one.prefixes >= next.prefixes));
                    let mut found: Vec<_> = found.iter().map(|held| (held.life.serial, held.prefixes)).collect();
                    found.sort_unstable();
                    prop_assert_eq!(found, model.find(asked, now));
                }
            }
        }

        #[test]
        fn bounds_hold_whatever_is_learned(
            cap in 1..20_usize,
            steps in prop::collection::vec((prop::collection::vec(0..40_u64, 0..8), 0..20_u64, 0..10_u64), 1..100),
        ) {
            let start = Instant::now();
            let mut index = PrefixIndex::new(cap, Duration::from_secs(TTL));
            let mut now = start;
            for (hashes, serial, pause) in steps {
                now += Duration::from_secs(pause);
                index.learn(hashes.iter().copied(), life(serial), now);
                prop_assert!(index.entries.len() <= cap);
                if let Some(last) = hashes.last() {
                    prop_assert_eq!(index.find(&[*last], now)[0], Held { life: life(serial), prefixes: 1 });
                }
                prop_assert!(index.find(&(0..40).collect::<Vec<_>>(), now).len() <= FOUND);
            }
            index.expire(now + Duration::from_secs(TTL));
            prop_assert_eq!(index.entries.len(), 0);
        }
    }

    #[test]
    fn a_million_prompts_stay_at_the_cap() {
        let now = Instant::now();
        let mut index = PrefixIndex::new(1_000, FORGOTTEN_AFTER);
        for number in 0..1_000_000_u64 {
            index.learn([number.wrapping_mul(0x9e37_79b9_7f4a_7c15)], life(number % 5), now);
        }
        assert_eq!(index.entries.len(), 1_000);
        assert!(index.entries.capacity() <= 4_096);
    }

    #[test]
    fn a_further_holder_takes_the_place_of_the_oldest() {
        let now = Instant::now();
        let mut index = PrefixIndex::new(10, FORGOTTEN_AFTER);
        (0..8).chain([0, 8]).for_each(|serial| index.learn([1], life(serial), now));
        let serials: Vec<_> = index.find(&[1], now).iter().map(|held| held.life.serial).collect();
        assert_eq!(serials, [8, 0, 7, 6, 5, 4, 3, 2]);
    }
}
