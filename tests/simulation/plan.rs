//! What a seed says: the configuration, the machines and the acts of their lives, the calls, the operator's hand.
//!
//! Times are milliseconds since the beginning. Everything is short: a second here stands for a minute.

use std::collections::BTreeMap;

use mlx_serving_router::config::{ClusterConfig, NatsMode, Strategy};
use mlx_serving_router::error::ControllerErrorCode as Code;
use mlx_serving_router::wire::Priority;

/// How often workers give a sign of life.
pub const BEAT_MS: u64 = 300;
/// The model that nobody serves.
pub const NOBODYS: &str = "nobodys";
/// The model that nobody serves, and that may have others in its place.
pub const BIG: &str = "big";

#[derive(Debug)]
pub struct Plan {
    pub seed: u64,
    pub config: ClusterConfig,
    pub machines: Vec<MachinePlan>,
    pub calls: Vec<CallPlan>,
    pub hand: Vec<(u64, Hand)>,
    /// When the controller is told to stop, and how long it lets requests finish.
    pub stop: Option<(u64, u64)>,
}

/// A worker.
#[derive(Clone, Debug)]
pub struct MachinePlan {
    pub id: String,
    /// It registers and gives signs of life by messages, as over NATS; one of the controller's process otherwise.
    pub distant: bool,
    pub models: Vec<&'static str>,
    pub max_concurrent: u32,
    pub memory_gb: f64,
    pub mood: Mood,
    pub acts: Vec<(u64, Act)>,
}

/// What happens to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    Mood(Mood),
    /// It leaves without a word, with all its requests. Over NATS the controller hears of it if nobody `listens` any more.
    Leave {
        listens: bool,
    },
    /// It is back, as another incarnation.
    Return,
    /// It says that it wants nothing new, and finishes what it has.
    Deregister,
    /// It does nothing at all, until it is woken.
    Freeze,
    Wake,
    Degraded(bool),
    /// For so long it loads its first model.
    Load(u64),
    /// So many requests of other controllers run on it.
    Foreign(usize),
}

/// How a worker treats requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Answers,
    Slow,
    Whole,
    Empty,
    Fails(Option<&'static str>),
    FailsEvery(u64),
    Refuses(i64),
    Stalls,
    Babbles,
    NobodyListens,
    LosesAnswers,
    /// Anything of these.
    Moody,
}

/// A request.
#[derive(Clone, Debug)]
pub struct CallPlan {
    pub at: u64,
    pub request_id: String,
    pub model: &'static str,
    pub streaming: bool,
    pub session: Option<String>,
    pub priority: Priority,
    pub worker: Option<String>,
    pub timeout: Option<u64>,
    pub prompt: String,
    pub max_tokens: Option<i64>,
    pub leaves: Leaves,
    /// How long the reader of a stream takes for what it got.
    pub reads: u64,
}

/// When the caller goes away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Leaves {
    Never,
    After(u64),
    AfterTokens(usize),
    /// It ends the stream with an error of its own.
    GivesUpAfterTokens(usize),
}

/// What somebody does who looks after the fleet, or what happens to the controller's connection.
#[derive(Clone, Debug)]
pub enum Hand {
    ForceOpen(String),
    Reset(String),
    Drain(String),
    LinkDown,
    LinkUp,
}

/// Random choices.
pub struct Dice(pub fastrand::Rng);

// === impl Dice ===

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.0.usize(..of.len())].clone()
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.0.u32(..100) < percent
    }

    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        self.0.u64(least..=most)
    }
}

// === impl Plan ===

impl Plan {
    pub fn new(seed: u64) -> Self {
        let dice = &mut Dice::new(seed);
        let length = dice.between(400, 2_400);
        let config = config(dice);
        let machines: Vec<_> = (0..dice.between(1, 8)).map(|number| machine(number, length, dice)).collect();
        let calls = calls(&machines, length, dice);
        let hand = hand(&machines, length, dice);
        let stop = dice.chance(8).then(|| (dice.between(length / 4, length), dice.pick(&[0, 50, 400])));
        Self { seed, config, machines, calls, hand, stop }
    }
}

fn config(dice: &mut Dice) -> ClusterConfig {
    let mut config = ClusterConfig::default();
    config.nats.mode = NatsMode::None;
    config.controller.worker_offline_timeout_ms = 3 * BEAT_MS + 100;
    config.controller.flap_hold_max_ms = dice.pick(&[0, 1_500, 60_000]);
    config.discovery.heartbeat_interval_ms = BEAT_MS;
    config.request_metrics.max_entries = 1_000;

    let balancing = &mut config.load_balancing;
    balancing.strategy = dice.pick(&[
        Strategy::RoundRobin,
        Strategy::LeastRequests,
        Strategy::WeightedRandom,
        Strategy::SkillsBased,
        Strategy::PeakEwma,
        Strategy::PrefixAware,
    ]);
    balancing.session_affinity = dice.chance(80);
    balancing.slow_start_ms = dice.chance(20).then_some(1_000);
    balancing.weights = [("w0".into(), 3.0), ("w1".into(), 0.0)].into();

    let routing = &mut config.request_routing;
    routing.timeout_ms = dice.pick(&[150, 400, 1_000]);
    routing.streaming_timeout_ms = dice.pick(&[150, 400, 1_000]);
    routing.accept_timeout_ms = dice.pick(&[60, 200, 500]);
    routing.stream_idle_timeout_ms = dice.pick(&[60, 200, 500]);
    routing.stream_total_timeout_ms = dice.pick(&[300, 1_000, 2_500]);
    routing.model_load_timeout_ms = dice.pick(&[300, 1_000]);
    routing.session_ttl = dice.pick(&[300, 100_000]);
    routing.max_sessions = dice.pick(&[1, 3, 1_000]);
    if dice.chance(40) {
        routing.fallback_models = BTreeMap::from([(BIG.into(), vec!["m".into(), "n".into()]), ("m".into(), vec!["n".into()])]);
    }

    let retry = &mut routing.retry;
    retry.enabled = dice.chance(92);
    retry.max_retries = dice.pick(&[0, 1, 2, 2, 4, 7]);
    retry.retry_delay_ms = dice.pick(&[0, 10, 100]);
    retry.max_delay_ms = dice.pick(&[20, 200]);
    retry.revisit_failed_workers = dice.chance(20);
    retry.budget_percent = dice.pick(&[0.0, 20.0, 20.0, 1_000.0]);
    retry.budget_min_per_second = dice.pick(&[0.0, 1.0, 10.0, 10_000.0]);
    if dice.chance(20) {
        retry.retry_on_errors = vec![Code::WorkerTimeout, dice.pick(&[Code::WorkerOverloaded, Code::WorkerUnavailable])];
    }

    let breaker = &mut routing.circuit_breaker;
    breaker.enabled = dice.chance(85);
    breaker.failure_threshold = dice.pick(&[1, 2, 3, 5, 100]);
    breaker.success_threshold = dice.pick(&[1, 2, 3]);
    breaker.timeout_ms = dice.pick(&[100, 500, 5_000]);
    breaker.max_timeout_ms = dice.pick(&[500, 50_000]);
    breaker.failure_rate_percent = dice.pick(&[10.0, 50.0, 100.0]);
    breaker.minimum_requests = dice.pick(&[2, 5, 10, 1_000]);
    breaker.window_ms = dice.pick(&[500, 60_000]);
    breaker.half_open_requests = dice.pick(&[1, 1, 2]);
    breaker.max_open_percent = dice.pick(&[0.0, 50.0, 100.0]);
    breaker.slow_first_token_ms = dice.chance(15).then_some(50);

    routing.admission.max_queue = dice.pick(&[0, 1, 3, 100]);
    routing.admission.max_wait_ms = dice.pick(&[0, 100, 500, 3_000]);
    config
}

fn machine(number: u64, length: u64, dice: &mut Dice) -> MachinePlan {
    let distant = dice.chance(65);
    let acts = dice.pick(&[0, 1, 3, 8]);
    let mut acts: Vec<_> = (0..acts).flat_map(|_| act(distant, length, dice)).collect();
    acts.sort_by_key(|(at, _)| *at);
    MachinePlan {
        id: format!("w{number}"),
        distant,
        models: dice.pick(&[vec!["m"], vec!["m"], vec!["m", "n"], vec!["n"]]),
        max_concurrent: dice.pick(&[0, 1, 2, 4]),
        memory_gb: dice.pick(&[0.0, 16.0, 64.0]),
        mood: mood(dice),
        acts,
    }
}

fn mood(dice: &mut Dice) -> Mood {
    if dice.chance(45) {
        return Mood::Answers;
    }
    let code = dice.pick(&CODES);
    let (every, after) = (dice.between(2, 4), dice.pick(&[-1, 0, 100, 500]));
    dice.pick(&[
        Mood::Slow,
        Mood::Whole,
        Mood::Empty,
        Mood::Fails(code),
        Mood::Fails(Some("WORKER_UNAVAILABLE")),
        Mood::FailsEvery(every),
        Mood::Refuses(after),
        Mood::Stalls,
        Mood::Babbles,
        Mood::NobodyListens,
        Mood::LosesAnswers,
        Mood::Moody,
        Mood::Moody,
    ])
}

/// What workers call their failures.
pub const CODES: [Option<&str>; 12] = [
    Some("WORKER_UNAVAILABLE"),
    Some("WORKER_OVERLOADED"),
    Some("QUEUE_FULL"),
    Some("MODEL_LOAD_FAILED"),
    Some("MODEL_NOT_FOUND"),
    Some("REQUEST_VALIDATION_FAILED"),
    Some("PAYLOAD_TOO_LARGE"),
    Some("WORKER_TIMEOUT"),
    Some("CANCELLED"),
    Some("NATS_ERROR"),
    Some("SOMETHING_ELSE"),
    None,
];

/// Something that happens to a worker, and what follows from it.
fn act(distant: bool, length: u64, dice: &mut Dice) -> Vec<(u64, Act)> {
    let at = dice.between(0, length);
    let later = at + dice.pick(&[1, 30, 300, 900, 1_500]);
    let mut choices = vec![vec![(at, Act::Mood(mood(dice)))], vec![(at, Act::Leave { listens: false }), (later, Act::Return)]];
    choices.push(vec![(at, Act::Freeze), (later, Act::Wake)]);
    if distant {
        let foreign = dice.0.usize(0..4);
        choices.extend([
            vec![(at, Act::Leave { listens: true }), (later, Act::Return)],
            vec![(at, Act::Leave { listens: true })],
            vec![(at, Act::Return)],
            vec![(at, Act::Deregister), (later, Act::Return)],
            vec![(at, Act::Deregister)],
            vec![(at, Act::Degraded(true)), (later, Act::Degraded(false))],
            vec![(at, Act::Load(later - at))],
            vec![(at, Act::Foreign(foreign)), (later, Act::Foreign(0))],
            (0..4)
                .flat_map(|turn| [(at + turn * 200, Act::Leave { listens: false }), (at + turn * 200 + 100, Act::Return)])
                .collect(),
        ]);
    }
    dice.pick(&choices)
}

fn calls(machines: &[MachinePlan], length: u64, dice: &mut Dice) -> Vec<CallPlan> {
    let count = dice.pick(&[3, 10, 20, 40]);
    let bursts = dice.chance(40);
    let patient = dice.chance(40);
    let mut at = 0;
    let mut calls: Vec<CallPlan> = Vec::new();
    for number in 0..count {
        at = match bursts {
            true if !dice.chance(10) => at,
            true => dice.between(0, length),
            false => dice.between(0, length),
        };
        let streaming = dice.chance(50);
        let tokens = dice.0.usize(0..5);
        let leaves = match dice.0.u32(..100) {
            _ if patient => Leaves::Never,
            0..15 => Leaves::After(dice.pick(&[0, 1, 5, 20, 60, 200, 700])),
            15..25 if streaming => Leaves::AfterTokens(tokens),
            25..28 if streaming => Leaves::GivesUpAfterTokens(tokens),
            _ => Leaves::Never,
        };
        let twice = calls.last_mut().filter(|_| dice.chance(2)).map(|last| {
            // A late reader would find the record of the other one.
            last.reads = 0;
            last.request_id.clone()
        });
        let is_twin = twice.is_some();
        let session = match dice.0.u32(..100) {
            0..50 => None,
            50..99 => Some(format!("s-{}", dice.0.u32(..4))),
            _ => Some("\n".into()),
        };
        calls.push(CallPlan {
            at,
            request_id: twice.unwrap_or_else(|| format!("r{number}")),
            model: match dice.0.u32(..100) {
                0..70 => "m",
                70..90 => "n",
                90..97 => BIG,
                _ => NOBODYS,
            },
            streaming,
            session,
            priority: dice.pick(&[Priority::Low, Priority::Normal, Priority::Normal, Priority::High]),
            worker: match dice.0.u32(..100) {
                0..8 => Some(dice.pick(machines).id),
                8..9 => Some("nobody".into()),
                _ => None,
            },
            timeout: dice.chance(20).then(|| dice.pick(&[1, 20, 100, 500, 3_000])),
            prompt: format!("{:0>300} {number}", dice.0.u32(..3)),
            max_tokens: dice.chance(2).then_some(-1),
            leaves,
            reads: if dice.chance(15) && !is_twin { dice.between(1, 150) } else { 0 },
        });
    }
    calls
}

fn hand(machines: &[MachinePlan], length: u64, dice: &mut Dice) -> Vec<(u64, Hand)> {
    let mut hand = Vec::new();
    if dice.chance(30) {
        for _ in 0..dice.between(1, 3) {
            let (at, id) = (dice.between(0, length), dice.pick(machines).id);
            hand.push((at, dice.pick(&[Hand::ForceOpen(id.clone()), Hand::Reset(id.clone()), Hand::Drain(id)])));
        }
    }
    if dice.chance(10) {
        let at = dice.between(0, length);
        hand.extend([(at, Hand::LinkDown), (at + dice.pick(&[50, 500, 2_000]), Hand::LinkUp)]);
    }
    hand.sort_by_key(|(at, _)| *at);
    hand
}
