//! Who is in the fleet, as the specification says it: every list is searched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mlx_serving_router::routing::{Carrier, HeartbeatVerdict, IgnoredBecause, Registered, RouterEvent};
use mlx_serving_router::wire::{Capacity, Heartbeat, Registration, WorkerId};
use tokio::time::Instant;

use super::member::{History, Member, Standing};

pub const OFFLINE_AFTER: Duration = Duration::from_millis(15_000);
pub const SUSPECT_AFTER: Duration = Duration::from_millis(12_500);
pub const FORGOTTEN_AFTER: Duration = Duration::from_millis(20 * 15_000);
pub const DRAIN_LIMIT: Duration = Duration::from_millis(60_000);
pub const HISTORY_FOR: Duration = Duration::from_millis(3_600_000);
pub const HEARTBEAT: Duration = Duration::from_millis(5_000);
pub const LONGEST_HOLD: Duration = Duration::from_millis(8_000);
pub const MOST_WORKERS: usize = 3;

#[derive(Default)]
pub struct Fleet {
    pub members: BTreeMap<WorkerId, Member>,
    /// Those who are not in the fleet, and when each was last heard from.
    departed: Vec<(WorkerId, History, Instant)>,
    /// Deregistered lives that were replaced before their last request ended.
    leaving: Vec<Member>,
    frozen: Option<Instant>,
    presences: u64,
    /// Presences that are over: their requests are cut off.
    pub gone: BTreeSet<u64>,
    pub told: Vec<RouterEvent>,
}

impl Fleet {
    pub fn register(&mut self, said: &Registration, carrier: Carrier, now: Instant) -> Registered {
        let (id, incarnation) = (&said.worker_id, &said.incarnation);
        let Some(member) = self.members.get_mut(id) else {
            if self.departed(id).is_some_and(|history| history.over.contains(incarnation)) {
                return Registered::Ignored(IgnoredBecause::Deregistered);
            }
            if self.members.len() == MOST_WORKERS {
                return Registered::Ignored(IgnoredBecause::FleetFull);
            }
            let known = self.departed(id).cloned();
            self.departed.retain(|(departed, ..)| departed != id);
            self.admit(said, carrier, known.is_some(), known.unwrap_or_default(), now);
            self.tell_registered(id);
            return Registered::New;
        };
        if member.history.over.contains(incarnation) {
            return Registered::Ignored(IgnoredBecause::Superseded);
        }
        if !incarnation.is_empty() && member.said.incarnation == *incarnation {
            if member.deregistered.is_some() {
                return Registered::Ignored(IgnoredBecause::Deregistered);
            }
            let before = self.heard(id, now);
            self.members.get_mut(id).unwrap().said = said.clone();
            self.tell_change(id, before);
            return Registered::Renewed;
        }
        // Another life.
        let mut old = self.members.remove(id).unwrap();
        old.history.end(&old.said.incarnation);
        let history = old.history.clone();
        let previous = old.said.incarnation.clone();
        if old.deregistered.is_some() && old.in_flight > 0 {
            self.leaving.push(old);
        } else {
            self.gone.insert(old.presence);
        }
        self.admit(said, carrier, true, history, now);
        self.told.push(RouterEvent::WorkerReplaced { worker_id: id.clone(), incarnation: incarnation.clone(), previous });
        Registered::Replaced
    }

    pub fn heartbeat(&mut self, beat: &Heartbeat, now: Instant) -> HeartbeatVerdict {
        let (id, incarnation) = (&beat.worker_id, &beat.incarnation);
        if !self.members.contains_key(id) {
            let over = self.departed(id).is_some_and(|history| history.over.contains(incarnation));
            if over || self.members.len() == MOST_WORKERS {
                return HeartbeatVerdict::Ignored;
            }
            if !incarnation.is_empty() {
                return HeartbeatVerdict::Unknown;
            }
            let mut said = crate::registration(id, "", &[], 0);
            said.protocol = None;
            said.hostname = String::new();
            said.skills.available_models.clone_from(&beat.metrics.models_loaded);
            said.capacity = Capacity::default();
            said.features.clear();
            said.status = beat.status;
            self.register(&said, Carrier::Nats, now);
        }
        let member = self.members.get_mut(id).unwrap();
        if member.said.incarnation != *incarnation {
            let over = incarnation.is_empty() || member.history.over.contains(incarnation);
            return if over { HeartbeatVerdict::Ignored } else { HeartbeatVerdict::Unknown };
        }
        let latest = member.report.as_ref().map_or(0, |(report, _)| report.sequence);
        if !incarnation.is_empty() && beat.sequence < latest {
            return HeartbeatVerdict::Ignored;
        }
        if member.deregistered.is_some() {
            (member.seen, member.silent_since) = (now, now);
            return HeartbeatVerdict::Ignored;
        }
        let before = self.heard(id, now);
        let member = self.members.get_mut(id).unwrap();
        member.foreign = match &beat.active_request_ids {
            Some(ids) => ids.iter().filter(|id| !id.starts_with("ours")).count() as u32,
            None => beat.metrics.active_requests.saturating_sub(member.in_flight),
        };
        member.said.status = beat.status;
        if member.is_older() {
            let models = &mut member.said.skills.available_models;
            for model in &beat.metrics.models_loaded {
                if !models.contains(model) {
                    models.push(model.clone());
                }
            }
        }
        member.report = Some((beat.clone(), now));
        self.tell_change(id, before);
        HeartbeatVerdict::Taken
    }

    pub fn deregister(&mut self, id: &WorkerId, now: Instant) {
        self.change(id, |member| member.deregistered = member.deregistered.or(Some(now)));
    }

    pub fn drain(&mut self, id: &WorkerId, now: Instant) -> bool {
        self.change(id, |member| member.drained = member.drained.or(Some(now)));
        self.members.contains_key(id)
    }

    pub fn remove(&mut self, id: &WorkerId) {
        let Some(mut member) = self.members.remove(id) else { return };
        self.gone.insert(member.presence);
        if member.deregistered.is_some() {
            member.history.end(&member.said.incarnation);
        }
        self.told.push(RouterEvent::WorkerRemoved { worker_id: id.clone() });
        self.departed.push((id.clone(), member.history, member.seen));
        if self.departed.len() > MOST_WORKERS {
            // Whoever was not heard from for longest is forgotten; of several, the first by name.
            let oldest = self.departed.iter().map(|(id, _, seen)| (*seen, id.clone())).min().unwrap();
            self.departed.retain(|(id, ..)| *id != oldest.1);
        }
    }

    pub fn freeze(&mut self, now: Instant) {
        self.frozen = self.frozen.or(Some(now));
    }

    /// Silence is counted anew, the limits of those who leave and of those who are offline stood still.
    pub fn thaw(&mut self, now: Instant) {
        let Some(frozen) = self.frozen.take() else { return };
        for member in self.members.values_mut().chain(&mut self.leaving).filter(|member| member.carrier == Carrier::Nats) {
            member.unheard = true;
            member.silent_since = now;
            member.deregistered = member.deregistered.map(|at| at + (now - frozen));
            member.offline = member.offline.map(|at| at + (now - frozen));
        }
    }

    pub fn expire(&mut self, now: Instant) {
        if self.frozen.is_some() {
            return;
        }
        self.departed.retain(|(_, _, seen)| now - *seen < HISTORY_FOR);
        let mut removed = Vec::new();
        for (id, member) in &mut self.members {
            let silence = now - member.silent_since;
            member.held = member.held.filter(|until| now < *until);
            if let Some(at) = member.deregistered {
                let late = now - at >= DRAIN_LIMIT;
                // One of the older dialect would come back with its next heartbeat.
                let quiet = !member.is_older() || silence >= OFFLINE_AFTER;
                if (late || member.in_flight == 0) && quiet {
                    removed.push(id.clone());
                } else if late {
                    self.gone.insert(member.presence);
                }
            } else if let Some(at) = member.offline {
                if now - at >= FORGOTTEN_AFTER {
                    removed.push(id.clone());
                }
            } else if member.carrier == Carrier::Nats && silence >= OFFLINE_AFTER {
                member.offline = Some(now);
                self.gone.insert(member.presence);
                self.told.push(RouterEvent::WorkerOffline { worker_id: id.clone() });
            } else if member.carrier == Carrier::Nats && silence >= SUSPECT_AFTER && !member.suspect {
                member.suspect = true;
            } else if member.drained.is_some_and(|at| now - at >= DRAIN_LIMIT) {
                self.gone.insert(member.presence);
            }
        }
        removed.iter().for_each(|id| self.remove(id));
        for life in &self.leaving {
            if now - life.deregistered.unwrap() >= DRAIN_LIMIT {
                self.gone.insert(life.presence);
            }
        }
    }

    /// Whether this life finishes what it has behind another one.
    pub fn is_leaving(&self, life: u64) -> bool {
        self.leaving.iter().any(|member| member.life == life)
    }

    /// Whether this member finishes what it has, by its own wish or an operator's.
    pub fn leaves(&self, life: u64) -> bool {
        let mut members = self.members.values();
        members.any(|member| member.life == life && (member.drained.is_some() || member.deregistered.is_some()))
    }

    /// A request of this life ended.
    pub fn ended(&mut self, life: u64) {
        let mut lives = self.members.values_mut().chain(&mut self.leaving);
        if let Some(member) = lives.find(|member| member.life == life) {
            member.in_flight -= 1;
        }
    }

    fn departed(&self, id: &WorkerId) -> Option<&History> {
        self.departed.iter().find(|(departed, ..)| departed == id).map(|(_, history, _)| history)
    }

    fn admit(&mut self, said: &Registration, carrier: Carrier, is_back: bool, mut history: History, now: Instant) {
        self.presences += 1;
        let held = if is_back && carrier == Carrier::Nats { history.back(now) } else { None };
        let member = Member {
            history,
            said: said.clone(),
            carrier,
            life: self.presences,
            presence: self.presences,
            report: None,
            foreign: 0,
            seen: now,
            silent_since: now,
            unheard: false,
            suspect: false,
            held,
            drained: None,
            deregistered: None,
            offline: None,
            in_flight: 0,
        };
        self.members.insert(said.worker_id.clone(), member);
    }

    /// A sign of life. Gives how the worker stood before.
    fn heard(&mut self, id: &WorkerId, now: Instant) -> Standing {
        let member = self.members.get_mut(id).unwrap();
        let before = member.standing();
        (member.seen, member.silent_since, member.unheard, member.suspect) = (now, now, false, false);
        member.held = member.held.filter(|until| now < *until);
        if member.offline.take().is_some() {
            member.held = member.history.back(now).or(member.held);
            self.presences += 1;
            member.presence = self.presences;
        }
        before
    }

    fn change(&mut self, id: &WorkerId, change: impl FnOnce(&mut Member)) {
        if let Some(member) = self.members.get_mut(id) {
            let before = member.standing();
            change(member);
            self.tell_change(id, before);
        }
    }

    fn tell_change(&mut self, id: &WorkerId, before: Standing) {
        let after = self.members[id].standing();
        if before == Standing::Offline && after != Standing::Offline {
            self.tell_registered(id);
        } else if before < Standing::Draining && after == Standing::Draining {
            self.told.push(RouterEvent::WorkerDraining { worker_id: id.clone() });
        }
    }

    fn tell_registered(&mut self, id: &WorkerId) {
        let said = &self.members[id].said;
        self.told.push(RouterEvent::WorkerRegistered {
            worker_id: id.clone(),
            incarnation: said.incarnation.clone(),
            models: said.skills.available_models.clone(),
        });
    }
}
