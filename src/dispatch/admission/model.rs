//! The queue against a model of it: a list of those who wait, searched for whoever is first.
#![allow(clippy::unwrap_used)]

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::histories::{Coverage, run};

const LINES: [&str; 2] = ["m", "@w"];
const MOST: usize = 4;
const MAX_WAIT: u64 = 100;

#[derive(Clone, Copy, Debug)]
enum Event {
    Join {
        line: usize,
        priority: Priority,
        choosy: bool,
        deadline: u64,
    },
    /// A place may have become free.
    Wake,
    /// One of those who wait, counted from the first to arrive, looks whether it is its turn.
    Look(usize),
    /// One looks that is the first of its line.
    LookFirst(usize),
    /// Whoever is asked looks.
    LookAsked,
    /// One goes away, since it has found a place or does not want one any more.
    Leave(usize),
    Nudge(usize),
    /// Whoever was asked long ago is passed over.
    MoveOn,
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let priority = prop_oneof![1 => Just(Priority::High), 2 => Just(Priority::Normal), 2 => Just(Priority::Low)];
    let deadline = prop_oneof![2 => Just(10 * MAX_WAIT), 1 => 0..2 * MAX_WAIT];
    let waiter = || 0..2 * MOST;
    prop_oneof![
        10 => (0..2_usize, priority, prop::bool::weighted(0.3), deadline)
            .prop_map(|(line, priority, choosy, deadline)| Event::Join { line, priority, choosy, deadline }),
        4 => Just(Event::Wake),
        4 => waiter().prop_map(Event::Look),
        3 => (0..2_usize).prop_map(Event::LookFirst),
        8 => Just(Event::LookAsked),
        3 => waiter().prop_map(Event::Leave),
        1 => waiter().prop_map(Event::Nudge),
        2 => Just(Event::MoveOn),
        3 => prop_oneof![0..20_u64, Just(MAX_WAIT - 1), Just(MAX_WAIT)].prop_map(Event::Pass),
    ]
}

/// Somebody who wants a place.
struct Wants {
    line: usize,
    priority: Priority,
    choosy: bool,
    until: Instant,
    /// It stands in its line.
    stands: bool,
    /// It is to be asked whether there is a place for it.
    owed: bool,
    /// It was told that it is its turn, and has not looked since.
    told: bool,
    /// It has looked, and not said yet that there was none.
    looks: bool,
    ticket: Ticket,
}

#[derive(Debug, PartialEq)]
enum Turn {
    Now,
    NotYet,
    /// QUEUE_FULL.
    Over,
}

/// All who want a place and have not gone away, in the order of their arrival, and when one of them was asked that has not
/// looked since, by the number of its arrival.
#[derive(Default)]
struct Model(Vec<Wants>, Option<(u64, Instant)>);

impl Model {
    /// A line: by priority, and of equal ones in the order of arrival.
    fn line(&self, line: usize) -> Vec<usize> {
        let mut standing: Vec<_> = (0..self.0.len()).filter(|at| self.0[*at].stands && self.0[*at].line == line).collect();
        standing.sort_by_key(|at| Reverse(self.0[*at].priority));
        standing
    }

    /// Those who may try for a place: the first, and behind choosy ones the next.
    fn heads(&self, line: usize) -> Vec<usize> {
        let line = self.line(line);
        let last = line.iter().position(|at| !self.0[*at].choosy);
        line[..last.map_or(line.len(), |last| last + 1)].to_vec()
    }

    fn owe_heads(&mut self, line: usize) {
        for at in self.heads(line) {
            self.0[at].owed = true;
        }
    }

    /// Of the heads that are owed it, the first by priority and then by arrival has its turn, unless somebody else has it for
    /// no more than a while.
    fn ask(&mut self, now: Instant) {
        if self.1.is_some_and(|(_, since)| now < since + PASSED_OVER_AFTER) {
            return;
        }
        self.1 = None;
        let mut owed: Vec<_> = (0..self.0.len()).filter(|at| self.0[*at].stands && self.0[*at].owed).collect();
        owed.sort_by_key(|at| Reverse(self.0[*at].priority));
        for at in owed {
            self.0[at].owed = false;
            if self.heads(self.0[at].line).contains(&at) {
                self.0[at].told = true;
                self.1 = Some((self.0[at].ticket.place.1, now));
                return;
            }
        }
    }

    /// One has looked in vain, or gone.
    fn pass(&mut self, arrival: u64, now: Instant) {
        self.1 = self.1.filter(|(asked, _)| *asked != arrival);
        self.ask(now);
    }

    /// The one who gives way to a newcomer of this priority, or whether there is no room for it.
    fn room(&self, line: usize, priority: Priority) -> Result<Option<usize>, ()> {
        let standing = self.line(line);
        if standing.len() < MOST {
            return Ok(None);
        }
        standing.last().copied().filter(|last| self.0[*last].priority < priority).map(Some).ok_or(())
    }

    fn look(&mut self, at: usize, now: Instant) -> Turn {
        let arrival = self.0[at].ticket.place.1;
        if std::mem::take(&mut self.0[at].looks) {
            self.pass(arrival, now);
        }
        loop {
            let wants = &mut self.0[at];
            if !wants.stands {
                return Turn::Over;
            }
            let told = std::mem::take(&mut wants.told);
            if now >= wants.until {
                return Turn::Over;
            }
            if !told {
                return Turn::NotYet;
            }
            if self.heads(self.0[at].line).contains(&at) {
                self.0[at].looks = true;
                return Turn::Now;
            }
            self.pass(arrival, now);
        }
    }

    /// Takes one out, for its ticket to be dropped.
    fn leave(&mut self, at: usize, now: Instant) -> Ticket {
        let gone = self.0.remove(at);
        self.1 = self.1.filter(|(asked, _)| *asked != gone.ticket.place.1);
        self.owe_heads(gone.line);
        self.ask(now);
        gone.ticket
    }

    /// One gives way to a newcomer.
    fn shed(&mut self, at: usize) {
        self.0[at].stands = false;
        let arrival = self.0[at].ticket.place.1;
        self.1 = self.1.filter(|(asked, _)| *asked != arrival);
    }
}

fn look(wants: &Wants) -> Turn {
    match wants.ticket.turn().now_or_never() {
        None => Turn::NotYet,
        Some(Ok(())) => Turn::Now,
        Some(Err(error)) => {
            assert_eq!(error.code(), ControllerErrorCode::QueueFull);
            Turn::Over
        }
    }
}

fn behaves(events: Vec<Event>, seen: &Coverage) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _entered = runtime.enter();
    let admission = Admission::new(&AdmissionConfig { max_queue: MOST, max_wait_ms: MAX_WAIT });
    let mut model = Model::default();
    for event in events {
        let now = Instant::now();
        match event {
            Event::Join { line, priority, choosy, deadline } => {
                let deadline = now + Duration::from_millis(deadline);
                let room = model.room(line, priority);
                match (admission.join(LINES[line], priority, choosy, deadline, now), room) {
                    (Ok(ticket), Ok(shed)) => {
                        if let Some(shed) = shed {
                            seen.saw("one of a lower priority is shed");
                            model.shed(shed);
                        }
                        let until = deadline.min(now + Duration::from_millis(MAX_WAIT));
                        model.0.push(Wants {
                            line,
                            priority,
                            choosy,
                            until,
                            stands: true,
                            owed: false,
                            told: false,
                            looks: false,
                            ticket,
                        });
                    }
                    (Err(error), Err(())) => {
                        seen.saw("refused: the line is full");
                        prop_assert_eq!(error.code(), ControllerErrorCode::QueueFull);
                    }
                    (joined, room) => return Err(TestCaseError::fail(format!("{joined:?} where there is {room:?}"))),
                }
            }
            Event::Wake => {
                admission.wake(now);
                if model.0.iter().any(|wants| wants.stands) {
                    (0..LINES.len()).for_each(|line| model.owe_heads(line));
                    model.ask(now);
                }
            }
            Event::Look(_) | Event::LookFirst(_) | Event::LookAsked => {
                let at = match event {
                    Event::Look(at) => Some(at).filter(|_| !model.0.is_empty()).map(|at| at % model.0.len()),
                    Event::LookFirst(line) => model.line(line).first().copied(),
                    Event::LookAsked => {
                        let asked = model.1.map(|(asked, _)| asked);
                        model.0.iter().position(|wants| Some(wants.ticket.place.1) == asked)
                    }
                    _ => None,
                };
                let Some(at) = at else { continue };
                let late = model.0[at].told && model.0[at].stands && now >= model.0[at].until;
                let is_second = model.line(model.0[at].line).first() != Some(&at);
                let turn = model.look(at, now);
                prop_assert_eq!(&look(&model.0[at]), &turn);
                match turn {
                    Turn::Now if is_second => seen.saw("the turn of one behind choosy ones"),
                    Turn::Now => seen.saw("the turn of the first"),
                    Turn::NotYet => seen.saw("not yet"),
                    Turn::Over if late => seen.saw("told, but too late"),
                    Turn::Over if model.0[at].stands => seen.saw("waited too long"),
                    Turn::Over => seen.saw("was shed"),
                }
                if turn == Turn::Over {
                    drop(model.leave(at, now));
                }
            }
            Event::MoveOn => {
                admission.move_on(now);
                model.ask(now);
            }
            Event::Leave(at) if !model.0.is_empty() => drop(model.leave(at % model.0.len(), now)),
            Event::Nudge(at) if !model.0.is_empty() => {
                let at = at % model.0.len();
                model.0[at].ticket.nudge(now);
                if model.heads(model.0[at].line).contains(&at) {
                    (0..LINES.len()).for_each(|line| model.owe_heads(line));
                    model.ask(now);
                }
            }
            Event::Leave(_) | Event::Nudge(_) => {}
            Event::Pass(millis) => runtime.block_on(tokio::time::advance(Duration::from_millis(millis))),
        }
        let lines = admission.lines.lock();
        for (at, name) in LINES.into_iter().enumerate() {
            let places: Vec<Place> = lines.by_name.get(name).into_iter().flat_map(BTreeMap::keys).copied().collect();
            let expected: Vec<Place> = model.line(at).into_iter().map(|at| model.0[at].ticket.place).collect();
            prop_assert_eq!((lines.by_name.contains_key(name), &places), (!expected.is_empty(), &expected));
        }
        prop_assert_eq!(lines.waiting, model.line(0).len() + model.line(1).len());
    }
    drop(model);
    prop_assert_eq!((admission.waiting(), admission.lines.lock().by_name.len()), (0, 0));
    Ok(())
}

#[test]
fn the_queue_is_what_its_model_says() {
    let reached = [
        "one of a lower priority is shed",
        "refused: the line is full",
        "the turn of one behind choosy ones",
        "the turn of the first",
        "not yet",
        "told, but too late",
        "waited too long",
        "was shed",
    ];
    run(2_000, prop::collection::vec(event(), 1..150), &reached, 20, behaves);
}
