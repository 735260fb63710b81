//! Rounds of load: so many callers, each with one request at a time, for so long.

use std::error::Error;
use std::future::Future;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// A side of the comparison. Clones share their connection.
pub trait Side: Clone + Send + Sync + 'static {
    /// Has one request answered in one piece, and checks the answer.
    fn buffered(&self, number: u64) -> impl Future<Output = Result<(), String>> + Send;

    /// Has one request answered as a stream, and gives the time of its first token and how many there were.
    fn streaming(&self, number: u64) -> impl Future<Output = Result<(Instant, u64), String>> + Send;
}

/// One round.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Command {
    mode: Mode,
    /// How many callers.
    concurrency: u64,
    /// No request begins after so long.
    seconds: f64,
    /// Nor after so many.
    requests: u64,
    /// The number of the first request.
    seed: u64,
    /// A request that has no end so long after that has failed.
    patience: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Buffered,
    Streaming,
}

/// What a round gave. `benches/measure.py` has the same.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    seconds: f64,
    /// User and system time of this process.
    cpu_seconds: f64,
    latencies_ns: Vec<u64>,
    first_token_ns: Vec<u64>,
    tokens: u64,
    failures: Vec<String>,
}

/// Says that the side is ready, then works off standard input, a round a line.
pub async fn serve(side: impl Side) -> Result<(), Box<dyn Error>> {
    say(&serde_json::json!({"ready": true}))?;
    loop {
        let line = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).map(|_| line)
        });
        let line = line.await??;
        if line.is_empty() {
            return Ok(());
        }
        say(&round(side.clone(), serde_json::from_str(&line)?).await)?;
    }
}

/// Writes a line.
pub fn say(value: &impl Serialize) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

async fn round(side: impl Side, command: Command) -> Outcome {
    let begun = Arc::new(AtomicU64::new(0));
    let (cpu, started) = (cpu_seconds(), Instant::now());
    let mut callers = JoinSet::new();
    for _ in 0..command.concurrency {
        callers.spawn(call(side.clone(), command, started, Arc::clone(&begun)));
    }
    let mut outcome = Outcome::default();
    // One limit for the whole round: a timer for each request would be a cost of the benchmark's own.
    let limit = Duration::from_secs_f64(command.seconds + command.patience);
    let ended = timeout(limit, async {
        while let Some(done) = callers.join_next().await {
            match done {
                Ok(part) => outcome.add(part),
                Err(error) => outcome.failures.push(error.to_string()),
            }
        }
    });
    if ended.await.is_err() {
        outcome.failures.push(format!("{} requests had no end within {} s", callers.len(), command.patience));
    }
    outcome.seconds = started.elapsed().as_secs_f64();
    outcome.cpu_seconds = cpu_seconds() - cpu;
    outcome
}

/// One caller: asks, waits for the end, asks again. Stops at the first failure.
async fn call(side: impl Side, command: Command, started: Instant, begun: Arc<AtomicU64>) -> Outcome {
    let mut outcome = Outcome::default();
    let last = started + Duration::from_secs_f64(command.seconds);
    loop {
        let number = begun.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        if number >= command.requests || began >= last {
            return outcome;
        }
        match ask(&side, command.mode, command.seed + number).await {
            Ok(first) => {
                outcome.latencies_ns.push(nanoseconds(began.elapsed()));
                if let Some((at, tokens)) = first {
                    outcome.first_token_ns.push(nanoseconds(at - began));
                    outcome.tokens += tokens;
                }
            }
            Err(failure) => {
                outcome.failures.push(failure);
                return outcome;
            }
        }
    }
}

async fn ask(side: &impl Side, mode: Mode, number: u64) -> Result<Option<(Instant, u64)>, String> {
    match mode {
        Mode::Buffered => side.buffered(number).await.map(|()| None),
        Mode::Streaming => side.streaming(number).await.map(Some),
    }
}

fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), u32::try_from(used.tv_nsec).unwrap_or(0)).as_secs_f64()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Outcome ===

impl Outcome {
    fn add(&mut self, part: Self) {
        self.latencies_ns.extend(part.latencies_ns);
        self.first_token_ns.extend(part.first_token_ns);
        self.tokens += part.tokens;
        self.failures.extend(part.failures);
    }
}
