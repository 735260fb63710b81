//! A simulated worker: what it is asked, what it answers, and the acts of its life. It notes everything.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use mlx_serving_router::routing::{Carrier, HeartbeatVerdict};
use mlx_serving_router::transport::{LocalMessage, LocalPort, Postbox};
use mlx_serving_router::wire::{
    Capacity, Heartbeat, HeartbeatMetrics, InferenceRequest, PROTOCOL, Phase, Registration, Skills, WorkerId, WorkerStatus,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::plan::{Act, BEAT_MS, Dice, MachinePlan, Mood};
use crate::script::{self, Asked, Post, Posted, Script};
use crate::world::World;

/// One attempt, as the worker saw it.
pub struct Served {
    pub prompt: String,
    pub request_id: String,
    pub attempt: u32,
    pub model: String,
    pub streaming: bool,
    pub worker: String,
    pub life: u32,
    /// When it was read.
    pub at: u64,
    pub timeout: Duration,
    /// Nobody waited any more when it was read.
    pub stale: bool,
    pub posts: Vec<Posted>,
    pub cancelled: Option<u64>,
    pub postbox: Option<Postbox>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    life: u32,
    frozen: bool,
    /// It has left; whether somebody still listens in its place.
    left: Option<bool>,
}

struct Machine {
    world: Arc<World>,
    plan: MachinePlan,
    id: WorkerId,
    dice: Dice,
    port: Option<LocalPort>,
    state: watch::Sender<State>,
    mood: Mood,
    asked: u64,
    beat_at: Instant,
    sequence: u64,
    degraded: bool,
    loading_until: Option<Instant>,
    foreign: usize,
    performing: Vec<(String, u32, JoinHandle<()>)>,
}

/// Lives the life of a machine, as long as the simulation takes.
pub async fn live(world: Arc<World>, plan: MachinePlan, number: u64) {
    let mut acts = plan.acts.clone().into_iter().peekable();
    let mut machine = Machine::new(world.clone(), plan, number);
    machine.begin();
    loop {
        let next = acts.peek().map(|(at, _)| world.at(*at));
        tokio::select! {
            biased;
            () = sleep_until(next.unwrap_or_else(|| world.at(0))), if next.is_some() => {
                if let Some((_, act)) = acts.next() {
                    machine.act(act);
                }
            }
            () = sleep_until(machine.beat_at), if machine.beats() => machine.beat(),
            message = recv(&mut machine.port), if machine.reads() => match message {
                Some(message) => machine.take(message),
                None => machine.port = None,
            },
            else => std::future::pending().await,
        }
    }
}

async fn recv(port: &mut Option<LocalPort>) -> Option<LocalMessage> {
    port.as_mut()?.recv().await
}

// === impl Served ===

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} for {} by life {} of {}", self.request_id, self.attempt, self.model, self.life, self.worker)?;
        write!(f, ", at {} for {:?}, stale {}, cancelled {:?}:", self.at, self.timeout, self.stale, self.cancelled)?;
        self.posts.iter().try_for_each(|Posted { at, post, taken }| write!(f, " {at} {post:?} ({taken})"))
    }
}

// === impl Machine ===

impl Machine {
    fn new(world: Arc<World>, plan: MachinePlan, number: u64) -> Self {
        let seed = world.plan.seed.wrapping_mul(1_000).wrapping_add(number);
        Self {
            id: WorkerId::new(&plan.id).unwrap(),
            dice: Dice::new(seed),
            port: None,
            state: watch::Sender::new(State { life: 0, frozen: false, left: None }),
            mood: plan.mood,
            asked: 0,
            beat_at: Instant::now(),
            sequence: 0,
            degraded: false,
            loading_until: None,
            foreign: 0,
            performing: Vec::new(),
            plan,
            world,
        }
    }

    fn begin(&mut self) {
        self.attach();
        if self.plan.distant {
            // Its way is that of a local worker; what it says of itself takes the place of that.
            self.state.send_modify(|state| state.life += 1);
            self.register();
            self.beat();
        }
    }

    fn attach(&mut self) {
        self.port = self.world.controller.attach_local(&self.registration()).ok();
    }

    fn registration(&self) -> Registration {
        Registration {
            protocol: Some(PROTOCOL),
            worker_id: self.id.clone(),
            incarnation: self.incarnation(),
            hostname: String::new(),
            ip: String::new(),
            port: 0,
            skills: Skills { available_models: self.plan.models.iter().map(ToString::to_string).collect(), ..Skills::default() },
            capacity: Capacity { max_concurrent: self.plan.max_concurrent, max_queue: 0, memory_gb: self.plan.memory_gb },
            features: Vec::new(),
            status: WorkerStatus::Online,
            timestamp: 0,
        }
    }

    fn incarnation(&self) -> String {
        format!("{}-{}", self.id, self.state.borrow().life)
    }

    fn register(&self) {
        let registered = self.world.controller.router().register(&self.registration(), Carrier::Nats, Instant::now());
        self.world.note(|| format!("{} registers: {registered:?}", self.id));
    }

    fn beats(&self) -> bool {
        let state = *self.state.borrow();
        self.plan.distant && !state.frozen && state.left.is_none()
    }

    fn reads(&self) -> bool {
        self.port.is_some() && !self.state.borrow().frozen
    }

    fn beat(&mut self) {
        self.beat_at = Instant::now() + Duration::from_millis(BEAT_MS);
        self.sequence += 1;
        let own = self.world.log.lock().served.iter().filter(|served| self.is_open(served)).count();
        let foreign = (0..self.foreign).map(|number| format!("x{number}"));
        let loading = self.loading_until.filter(|until| *until > Instant::now());
        let beat = Heartbeat {
            worker_id: self.id.clone(),
            incarnation: self.incarnation(),
            sequence: self.sequence,
            status: if self.degraded { WorkerStatus::Degraded } else { WorkerStatus::Online },
            timestamp: 0,
            metrics: HeartbeatMetrics {
                active_requests: u32::try_from(own + self.foreign).unwrap(),
                models_loaded: vec![self.plan.models[0].into()],
                ..HeartbeatMetrics::default()
            },
            queue_depth: 0,
            active_request_ids: self.dice.chance(80).then(|| foreign.collect()),
            tokens_generated: 0,
            phase: if loading.is_some() { Phase::Loading } else { Phase::Ready },
            loading_models: loading.map(|_| self.plan.models[0].into()).into_iter().collect(),
            cached_prefixes: Vec::new(),
        };
        let verdict = self.world.controller.router().heartbeat(&beat, &|id| id.starts_with('r'), Instant::now());
        if verdict == HeartbeatVerdict::Unknown {
            self.register();
        }
    }

    fn is_open(&self, served: &Served) -> bool {
        let is_closed = served.postbox.as_ref().is_none_or(Postbox::is_closed);
        served.worker == self.plan.id && served.life == self.state.borrow().life && !served.stale && !is_closed
    }

    fn act(&mut self, act: Act) {
        self.world.note(|| format!("{} {act:?}", self.id));
        match act {
            Act::Mood(mood) => self.mood = mood,
            Act::Leave { listens } => {
                self.state.send_modify(|state| state.left = Some(listens));
                if !self.plan.distant {
                    self.port = None;
                }
            }
            Act::Return => {
                // What has come before is the former life's.
                while let Some(message) = self.port.as_mut().and_then(|port| port.recv().now_or_never().flatten()) {
                    self.take(message);
                }
                if !self.plan.distant && self.port.is_some() {
                    return;
                }
                self.state.send_modify(|state| *state = State { life: state.life + 1, frozen: state.frozen, left: None });
                (self.sequence, self.degraded, self.foreign) = (0, false, 0);
                if self.plan.distant {
                    self.register();
                    self.beat_at = Instant::now() + Duration::from_millis(BEAT_MS);
                } else {
                    self.attach();
                }
            }
            Act::Deregister => self.world.controller.router().deregister(&self.id, Instant::now()),
            Act::Freeze => self.state.send_modify(|state| state.frozen = true),
            Act::Wake => self.state.send_modify(|state| state.frozen = false),
            Act::Degraded(degraded) => {
                self.degraded = degraded;
                self.beat_now();
            }
            Act::Load(span) => {
                let until = Instant::now() + Duration::from_millis(span);
                self.loading_until = Some(until);
                self.beat_now();
                self.beat_at = self.beat_at.min(until);
            }
            Act::Foreign(count) => {
                self.foreign = count;
                self.beat_now();
            }
        }
    }

    fn beat_now(&mut self) {
        if self.beats() {
            self.beat();
        }
    }

    fn take(&mut self, message: LocalMessage) {
        match message {
            LocalMessage::Request { request, attempt, timeout, postbox, .. } => self.serve(&request, attempt, timeout, postbox),
            LocalMessage::Cancel { request_id, attempt } => self.cancel(&request_id, attempt),
        }
    }

    fn cancel(&mut self, request_id: &str, attempt: u32) {
        let now = self.world.now();
        self.world.note(|| format!("{} is told to stop {request_id}/{attempt}", self.id));
        let mut log = self.world.log.lock();
        let is_meant =
            |served: &&mut Served| served.worker == self.plan.id && served.request_id == request_id && served.attempt == attempt;
        match log.served.iter_mut().rev().find(is_meant) {
            Some(served) if served.cancelled.is_none() => served.cancelled = Some(now),
            Some(_) => log.complaints.push(format!("{} was told twice to stop {request_id}/{attempt}", self.id)),
            None => log.complaints.push(format!("{} was told to stop {request_id}/{attempt}, and never asked", self.id)),
        }
        drop(log);
        if self.dice.chance(50) {
            let meant = self.performing.iter().find(|(id, number, _)| id == request_id && *number == attempt);
            if let Some((_, _, performing)) = meant {
                performing.abort();
            }
        }
    }

    fn serve(&mut self, request: &InferenceRequest, attempt: u32, timeout: Duration, postbox: Postbox) {
        let state = *self.state.borrow();
        let served = Served {
            prompt: request.prompt.clone().unwrap_or_default(),
            request_id: request.request_id.clone(),
            attempt,
            model: request.model_id.clone(),
            streaming: request.stream,
            worker: self.plan.id.clone(),
            life: state.life,
            at: self.world.now(),
            timeout,
            stale: postbox.is_closed(),
            posts: Vec::new(),
            cancelled: None,
            postbox: Some(postbox.clone()),
        };
        let stale = served.stale;
        self.world.note(|| format!("{} is asked {}/{attempt} for {}", self.id, request.request_id, request.model_id));
        let (place, open) = {
            let mut log = self.world.log.lock();
            log.served.push(served);
            let open = log.served.iter().filter(|served| self.is_open(served)).count();
            (log.served.len() - 1, open)
        };
        let room = self.plan.max_concurrent as usize;
        if room > 0 && open > room {
            let what = format!("{} has {open} requests at {}, and room for {room}", self.id, self.world.now());
            self.world.log.lock().complaints.push(what);
        }
        let script = match state.left {
            _ if stale => return,
            Some(true) => return,
            Some(false) => vec![(0, Post::NobodyListens)],
            None => self.script(request, attempt),
        };
        let performing = perform(self.world.clone(), place, script, postbox, self.state.subscribe(), state.life);
        self.performing.push((request.request_id.clone(), attempt, tokio::spawn(performing)));
    }

    fn script(&mut self, request: &InferenceRequest, attempt: u32) -> Script {
        self.asked += 1;
        let loads = self.loading_until.map(|until| until.saturating_duration_since(Instant::now()).as_millis());
        let asked = Asked {
            name: format!("{}/{}/{attempt}", self.plan.id, request.request_id),
            streaming: request.stream,
            number: self.asked,
            loads: loads.filter(|loads| *loads > 0).map(|loads| u64::try_from(loads).unwrap()),
        };
        script::script(self.mood, asked, &mut self.dice)
    }
}

/// Says what the script says, as long as the machine lives this life, and keeps quiet afterwards.
async fn perform(
    world: Arc<World>,
    place: usize,
    script: Script,
    postbox: Postbox,
    mut state: watch::Receiver<State>,
    life: u32,
) {
    for (wait, post) in script {
        if wait > 0 {
            sleep(Duration::from_millis(wait)).await;
        }
        let awake = state.wait_for(|state| !state.frozen || state.life != life || state.left.is_some()).await.map(|state| *state);
        if !awake.is_ok_and(|state| state.life == life && state.left.is_none() || post == Post::NobodyListens) {
            return;
        }
        if post == Post::Lost {
            let mut log = world.log.lock();
            log.served[place].postbox = None;
            let taken = !postbox.is_closed();
            log.served[place].posts.push(Posted { at: world.now(), post, taken });
            return;
        }
        let taken = postbox.post(script::delivery(&post));
        world.note(|| format!("  {post:?} of {} taken: {taken}", world.log.lock().served[place].worker));
        world.log.lock().served[place].posts.push(Posted { at: world.now(), post, taken });
    }
}
