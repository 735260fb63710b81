//! Two workers of one name: which of them gives way.
//!
//! The newer one stays, and newer means registered later: a registration that comes after our own on the subject is
//! newer, one that came before it is not, and its sender sees ours after its own. Workers register again, though: each
//! registration says how long ago its sender first registered (`ageMs`, a field of ours that others ignore), measured by
//! the sender's own clocks, and whoever was there before gives way.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::epoch_ms;

/// One worker's view of others of its name.
pub(super) struct Rivals {
    incarnation: String,
    first: Option<(Instant, u64)>,
    /// Our own registration has come back to us.
    echoed: bool,
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
        Self { incarnation, first: None, echoed: false }
    }

    /// How long ago we first registered; the first call is that moment.
    ///
    /// The longer of two clocks: a monotonic one may stand still while a machine sleeps, the wall clock may be set back.
    pub(super) fn age(&mut self) -> Duration {
        let Some((instant, epoch)) = self.first else {
            self.first = Some((Instant::now(), epoch_ms()));
            return Duration::ZERO;
        };
        instant.elapsed().max(Duration::from_millis(epoch_ms().saturating_sub(epoch)))
    }

    /// Judges a registration under our name, our own among them. `age`: what it says of itself.
    pub(super) fn judge(&mut self, incarnation: &str, age: Option<Duration>) -> Verdict {
        if incarnation == self.incarnation {
            self.echoed = true;
        }
        if incarnation == self.incarnation || !self.echoed {
            return Verdict::Ignore;
        }
        match age {
            Some(theirs) if theirs >= self.age() => Verdict::Assert,
            // One that does not say registers once, at its start.
            _ => Verdict::GiveWay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// One that has registered, and has seen itself do so.
    fn registered(incarnation: &str) -> Rivals {
        let mut rivals = Rivals::new(incarnation.into());
        rivals.age();
        assert_eq!(rivals.judge(incarnation, Some(Duration::ZERO)), Verdict::Ignore);
        rivals
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_that_registered_later_stays() {
        let mut old = registered("a");
        tokio::time::advance(HOUR).await;
        let mut new = Rivals::new("b".into());
        assert_eq!(new.judge("a", Some(HOUR)), Verdict::Ignore, "not registered yet");
        assert_eq!(old.judge("b", Some(new.age())), Verdict::GiveWay);
        let mut new = registered("b");
        assert_eq!(new.judge("a", Some(HOUR)), Verdict::Assert);
        tokio::time::advance(HOUR).await;
        assert_eq!(new.judge("a", Some(2 * HOUR)), Verdict::Assert, "the old one was away and is back");
        assert_eq!(old.judge("b", Some(HOUR)), Verdict::GiveWay);
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_start_at_once_the_one_whose_word_came_later_stays() {
        let (mut one, mut two) = (Rivals::new("b".into()), Rivals::new("a".into()));
        let ages = [one.age(), two.age()];
        tokio::time::advance(Duration::from_millis(1)).await;
        // Both see the same order on the subject: one, then two.
        assert_eq!(one.judge("b", Some(ages[0])), Verdict::Ignore);
        assert_eq!(two.judge("b", Some(ages[0])), Verdict::Ignore);
        assert_eq!(one.judge("a", Some(ages[1])), Verdict::GiveWay);
        assert_eq!(two.judge("a", Some(ages[1])), Verdict::Ignore);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_says_no_age_is_as_new_as_its_word() {
        let mut rivals = Rivals::new("a".into());
        rivals.age();
        assert_eq!(rivals.judge("b", None), Verdict::Ignore);
        assert_eq!(registered("a").judge("b", None), Verdict::GiveWay);
    }
}
