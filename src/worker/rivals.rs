//! Two workers of one name: which of them gives way.
//!
//! The newer one stays, and newer means registered later. Each registration therefore says how long ago its sender first
//! registered (`ageMs`, a field of ours that others ignore), measured by the sender's own clocks; whoever was there before
//! gives way. Two that register within a moment of each other cannot tell who was first: the greater incarnation stays.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::epoch_ms;

/// Two that both registered within this time may have crossed each other on the way.
const CROSSING: Duration = Duration::from_secs(1);

/// One worker's view of others of its name.
pub(super) struct Rivals {
    incarnation: String,
    first: Option<(Instant, u64)>,
}

/// What to do about another worker of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is ourselves, or one from before our time.
    Ignore,
    /// It is older and does not know of us: we register again.
    Assert,
    /// It is newer: we stop.
    GiveWay,
}

// === impl Rivals ===

impl Rivals {
    pub(super) fn new(incarnation: String) -> Self {
        Self { incarnation, first: None }
    }

    /// How long ago we first registered; the first call is that moment.
    ///
    /// The longer of two clocks: a monotonic one may stand still while a machine sleeps, the wall clock may be set back.
    pub(super) fn age(&mut self) -> Duration {
        let (instant, epoch) = *self.first.get_or_insert_with(|| (Instant::now(), epoch_ms()));
        instant.elapsed().max(Duration::from_millis(epoch_ms().saturating_sub(epoch)))
    }

    /// Judges a registration under our name. `age`: what it says of itself.
    pub(super) fn judge(&mut self, incarnation: &str, age: Option<Duration>) -> Verdict {
        if incarnation == self.incarnation || self.first.is_none() {
            return Verdict::Ignore;
        }
        let ours = self.age();
        match age {
            Some(theirs) if theirs < CROSSING && ours < CROSSING => {
                if incarnation > self.incarnation.as_str() {
                    Verdict::GiveWay
                } else {
                    Verdict::Assert
                }
            }
            Some(theirs) if theirs >= ours => Verdict::Assert,
            // One that does not say registers once, at its start.
            None if ours < CROSSING => Verdict::Ignore,
            _ => Verdict::GiveWay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn the_one_that_registered_later_stays() {
        let mut old = Rivals::new("a".into());
        old.age();
        tokio::time::advance(HOUR).await;
        let mut new = Rivals::new("b".into());
        assert_eq!(new.judge("a", Some(HOUR)), Verdict::Ignore, "not registered yet");
        assert_eq!(old.judge("b", Some(new.age())), Verdict::GiveWay);
        assert_eq!(new.judge("a", Some(HOUR)), Verdict::Assert);
        tokio::time::advance(HOUR).await;
        assert_eq!(new.judge("a", Some(2 * HOUR)), Verdict::Assert, "the old one was away and is back");
        assert_eq!(old.judge("b", Some(HOUR)), Verdict::GiveWay);
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_cross_exactly_one_stays() {
        let (mut one, mut two) = (Rivals::new("a".into()), Rivals::new("b".into()));
        let (age_one, age_two) = (one.age(), two.age());
        assert_eq!(one.judge("b", Some(age_two)), Verdict::GiveWay);
        assert_eq!(two.judge("a", Some(age_one)), Verdict::Assert);
    }

    #[tokio::test(start_paused = true)]
    async fn its_own_registration_and_a_silent_stranger_at_its_start_change_nothing() {
        let mut rivals = Rivals::new("a".into());
        rivals.age();
        assert_eq!(rivals.judge("a", Some(Duration::ZERO)), Verdict::Ignore);
        assert_eq!(rivals.judge("b", None), Verdict::Ignore);
        tokio::time::advance(HOUR).await;
        assert_eq!(rivals.judge("a", Some(HOUR)), Verdict::Ignore);
        assert_eq!(rivals.judge("b", None), Verdict::GiveWay);
    }
}
