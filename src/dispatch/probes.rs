//! Workers that do not announce themselves: each is looked at every so often, and what is seen reaches the registry as its
//! registration and its heartbeats.
//!
//! One that nobody listens for gets nothing new at once; when it answers again it is another life of its worker, with a breaker
//! of its own, for it was probably started anew. One that is silent or unwell goes offline as any worker does, and comes back
//! as what it was.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::core::Core;
use crate::config::StaticWorker;
use crate::error::epoch_ms;
use crate::routing::{Carrier, HeartbeatVerdict, IgnoredBecause, Registered};
use crate::transport::http::Absence;
use crate::wire::{Capacity, Heartbeat, HeartbeatMetrics, PROTOCOL, Phase, Registration, Skills, WorkerId, WorkerStatus};

/// One that is away is looked at as often as this, or as often as others.
const AWAY_EVERY: Duration = Duration::from_secs(1);
/// However many attempts fail, it is not looked at more often.
const APART: Duration = Duration::from_millis(250);
/// One look takes no longer.
const LOOK_LONGEST: Duration = Duration::from_secs(5);
/// How often a server is asked for its models.
const MODELS_EVERY: Duration = Duration::from_secs(60);

/// What is known of one of them.
struct Watch {
    core: Arc<Core>,
    worker: WorkerId,
    config: StaticWorker,
    /// The life that is registered; empty before the first.
    incarnation: String,
    sequence: u64,
    /// Nobody listened for this life: the next answer is another one's.
    is_over: bool,
    models: Vec<String>,
    /// When it was asked for them.
    asked: Option<Instant>,
    /// What is wrong with it, as the log was told.
    told: Option<String>,
}

/// Looks at a server until the controller stops.
pub(super) async fn watch(core: Arc<Core>, config: StaticWorker) {
    // Checked with the configuration.
    let Ok(worker) = WorkerId::new(&config.worker_id) else { return };
    let interval = Duration::from_millis(core.config.discovery.heartbeat_interval_ms);
    let http = core.http.clone();
    let models = config.served().into_iter().flatten().map(|(name, _)| name.to_owned()).collect();
    let mut watch = Watch {
        core,
        worker: worker.clone(),
        config,
        incarnation: String::new(),
        sequence: 0,
        is_over: false,
        models,
        asked: None,
        told: None,
    };
    loop {
        let began = Instant::now();
        let is_there = watch.look(interval.min(LOOK_LONGEST)).await;
        let wait = if is_there { interval } else { interval.min(AWAY_EVERY) };
        let apart = wait.min(APART);
        sleep(apart).await;
        tokio::select! {
            // From one look's beginning to the next one's: a slow server is not to be heard from less often.
            () = sleep_until(began + wait) => {}
            () = http.doubted(&worker) => {}
        }
    }
}

// === impl Watch ===

impl Watch {
    /// Looks once; whether it is there. That it is counts before it is asked for its models, which may take long.
    async fn look(&mut self, limit: Duration) -> bool {
        let mut seen = self.core.http.look(&self.worker, limit).await;
        if seen.is_ok() {
            if !self.models.is_empty() {
                self.is_there(false, Instant::now());
            }
            seen = match self.ask_for_models(limit).await {
                Ok(true) => {
                    self.is_there(true, Instant::now());
                    Ok(())
                }
                Ok(false) => Ok(()),
                Err(absence) => Err(absence),
            };
        }
        let Err(absence) = seen else { return true };
        if absence == Absence::NobodyListens {
            self.is_over = true;
            self.core.router.lost(&self.worker, &self.incarnation, Instant::now());
        }
        if matches!(absence, Absence::Unknown(_)) {
            self.stays(Instant::now());
        }
        self.tell(Some(absence.to_string()));
        false
    }

    /// Nobody could look: who was there still is.
    fn stays(&mut self, now: Instant) {
        let known = self.core.router.worker(&self.worker, now);
        if known.is_some_and(|known| known.status != WorkerStatus::Offline && known.incarnation == self.incarnation) {
            let heartbeat = self.heartbeat();
            self.core.router.heartbeat(&heartbeat, &|_| false, now);
        }
    }

    /// Whether it serves others than before. One that is known to serve something is asked every so often, whatever it answers.
    async fn ask_for_models(&mut self, limit: Duration) -> Result<bool, Absence> {
        let is_known = !self.models.is_empty();
        let now = Instant::now();
        let is_recent = self.asked.is_some_and(|asked| now.saturating_duration_since(asked) < MODELS_EVERY);
        if self.config.served().is_some() || is_known && is_recent {
            return Ok(false);
        }
        self.asked = Some(now);
        match self.core.http.models(&self.worker, limit).await {
            Ok(models) => {
                let are_others = models != self.models;
                self.models = models;
                Ok(are_others)
            }
            // It serves what it did.
            Err(_) if is_known => Ok(false),
            Err(Absence::Unfit(why)) => Err(Absence::Unfit(format!("{why}; say what it serves in workers.static[].models"))),
            Err(absence) => Err(absence),
        }
    }

    fn is_there(&mut self, are_others: bool, now: Instant) {
        let router = self.core.router.clone();
        let known = router.worker(&self.worker, now);
        if let Some(other) =
            known.as_ref().filter(|known| known.carrier != Carrier::Http && known.status != WorkerStatus::Offline)
        {
            let what = format!("a worker of this name has come another way, as {}; give each its own", other.incarnation);
            self.tell(Some(what));
            return;
        }
        let lives = !self.is_over && known.is_some_and(|known| known.incarnation == self.incarnation);
        if lives && !are_others && router.heartbeat(&self.heartbeat(), &|_| false, now) == HeartbeatVerdict::Taken {
            self.tell(None);
            return;
        }
        if !lives {
            self.incarnation = uuid::Uuid::new_v4().to_string();
            self.core.http.lives_anew(&self.worker);
            self.sequence = 0;
            self.is_over = false;
        }
        if let Registered::Ignored(IgnoredBecause::FleetFull) = router.register(&self.registration(), Carrier::Http, now) {
            let max = self.core.config.controller.max_workers;
            self.tell(Some(format!("no room for it: controller.maxWorkers is {max}")));
            return;
        }
        router.heartbeat(&self.heartbeat(), &|_| false, now);
        self.tell(None);
    }

    fn registration(&self) -> Registration {
        Registration {
            protocol: Some(PROTOCOL),
            worker_id: self.worker.clone(),
            incarnation: self.incarnation.clone(),
            hostname: String::new(),
            ip: String::new(),
            port: 0,
            skills: Skills { available_models: self.models.clone(), ..Skills::default() },
            capacity: Capacity { max_concurrent: self.config.max_concurrent.unwrap_or(0), ..Capacity::default() },
            features: Vec::new(),
            status: WorkerStatus::Online,
            timestamp: epoch_ms(),
        }
    }

    fn heartbeat(&mut self) -> Heartbeat {
        self.sequence += 1;
        // Of several nobody knows which are in memory.
        let models_loaded = if self.models.len() == 1 { self.models.clone() } else { Vec::new() };
        Heartbeat {
            worker_id: self.worker.clone(),
            incarnation: self.incarnation.clone(),
            sequence: self.sequence,
            status: WorkerStatus::Online,
            timestamp: epoch_ms(),
            metrics: HeartbeatMetrics { models_loaded, ..HeartbeatMetrics::default() },
            queue_depth: 0,
            active_request_ids: Some(Vec::new()),
            tokens_generated: 0,
            phase: Phase::Ready,
            loading_models: Vec::new(),
            cached_prefixes: Vec::new(),
        }
    }

    /// Tells the log what is wrong, once.
    fn tell(&mut self, wrong: Option<String>) {
        if self.told == wrong {
            return;
        }
        let worker_id = self.worker.as_str();
        match &wrong {
            Some(why) => tracing::warn!(worker_id, "HTTP worker is not there: {why}"),
            None => tracing::debug!(worker_id, "HTTP worker is there"),
        }
        self.told = wrong;
    }
}
