//! Whose a session is, as the specification says it: a list in the order of use.

use std::time::Duration;

use mlx_serving_router::routing::Choice;
use tokio::time::Instant;

pub const TTL: Duration = Duration::from_millis(1_000);
pub const MOST_SESSIONS: usize = 3;

/// All sessions, the one not used for longest first.
#[derive(Default)]
pub struct Sessions {
    list: Vec<Session>,
    /// Moves that have to be told: to whom, from whom.
    pub told: Vec<(String, String)>,
}

struct Session {
    name: String,
    home: Home,
    used: Instant,
}

/// One life of one worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Home {
    pub worker: String,
    pub life: u32,
}

/// A worker as a selection finds it.
pub struct Seen {
    pub home: Home,
    /// It is online, and keeps the sessions that it has.
    pub keeps: bool,
    /// It can take this request; the first choice is 0, the second, which only counts without one of the first, 1.
    pub takes: Option<u8>,
    /// It failed this request.
    pub tried: bool,
}

#[derive(Debug, PartialEq)]
pub struct Chosen {
    pub home: Home,
    pub choice: Choice,
    /// A success moves the session here from there.
    pub moves_from: Option<Home>,
    pub why: &'static str,
}

impl Sessions {
    /// A request of a session is a use of it, whatever becomes of it.
    pub fn select(&mut self, session: &str, fleet: &[Seen], now: Instant) -> Option<Chosen> {
        let bound = self.used(session, now);
        let best = fleet.iter().filter_map(|seen| seen.takes).min()?;
        let free: Vec<_> = fleet.iter().filter(|seen| seen.takes == Some(best)).collect();
        if let Some(own) = free.iter().find(|seen| Some(&seen.home) == bound.as_ref()) {
            return Some(Chosen { home: own.home.clone(), choice: Choice::Affinity, moves_from: None, why: "its own worker" });
        }
        // The highest score takes it, of equal ones the first by name.
        let mut chosen = free[0];
        for seen in free {
            if score(session, &seen.home.worker) > score(session, &chosen.home.worker) {
                chosen = seen;
            }
        }
        let chosen = &chosen.home;
        let (mut moves_from, mut why) = (None, "elsewhere: its own worker cannot take it now");
        match bound {
            Some(bound) if fleet.iter().any(|seen| seen.tried && seen.home.worker == bound.worker) => {
                (moves_from, why) = (Some(bound), "elsewhere: its own worker failed");
            }
            Some(bound) if fleet.iter().any(|seen| seen.keeps && seen.home == bound) => {}
            bound => {
                why = match &bound {
                    Some(bound) if bound.worker == chosen.worker => "bound anew: a new life of its own worker",
                    Some(_) => "bound anew: its own worker is gone",
                    None if self.list.len() == MOST_SESSIONS => "new, in the place of the oldest",
                    None => "new",
                };
                self.bind(session, chosen, now);
                self.tell(bound.as_ref(), chosen);
            }
        }
        Some(Chosen { home: chosen.clone(), choice: Choice::Rendezvous, moves_from, why })
    }

    /// A request that was to move a session succeeded; it does, unless somebody else has moved it.
    pub fn succeeded(&mut self, session: &str, from: &Home, to: &Home, now: Instant) {
        if self.used(session, now).is_none_or(|bound| bound == *from) {
            self.bind(session, to, now);
            self.tell(Some(from), to);
        }
    }

    fn used(&mut self, name: &str, now: Instant) -> Option<Home> {
        self.list.retain(|session| now - session.used < TTL);
        let at = self.list.iter().position(|session| session.name == name)?;
        let session = self.list.remove(at);
        let home = session.home.clone();
        self.list.push(Session { used: now, ..session });
        Some(home)
    }

    fn bind(&mut self, name: &str, home: &Home, now: Instant) {
        self.list.retain(|session| session.name != name);
        self.list.push(Session { name: name.to_owned(), home: home.clone(), used: now });
        let over = self.list.len().saturating_sub(MOST_SESSIONS);
        self.list.drain(..over);
    }

    fn tell(&mut self, from: Option<&Home>, to: &Home) {
        if let Some(from) = from.filter(|from| from.worker != to.worker) {
            self.told.push((to.worker.clone(), from.worker.clone()));
        }
    }
}

/// `mix(fnv(session) ^ mix(fnv(worker)))`, as `rendezvous` documents it for all controllers of a fleet.
fn score(session: &str, worker: &str) -> u64 {
    mix(fnv(session) ^ mix(fnv(worker)))
}

/// FNV-1a with 64 bits: offset basis and prime as Fowler, Noll and Vo publish them.
fn fnv(text: &str) -> u64 {
    let mut hash = 14_695_981_039_346_656_037_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(1_099_511_628_211);
    }
    hash
}

/// The last steps of splitmix64.
fn mix(mut bits: u64) -> u64 {
    for (shift, factor) in [(30, 0xbf58_476d_1ce4_e5b9_u64), (27, 0x94d0_49bb_1331_11eb)] {
        bits ^= bits >> shift;
        bits = bits.wrapping_mul(factor);
    }
    bits ^ bits >> 31
}
