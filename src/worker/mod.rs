//! The worker's runtime: what stands between an inference engine and the controllers that ask it.
//!
//! | file | it does |
//! |---|---|
//! | `runtime`, `options` | the life of a worker: start, drain, stop |
//! | `membership`, `rivals`, `pulse`, `machine`, `board` | what the fleet is told, and who else claims the same name |
//! | `local` | the same for a controller of this process |
//! | `intake` | where attempts come in |
//! | `desk`, `cancels`, `liveness`, `tally` | order, places, deadlines, cancellations |
//! | `job` | the engine's view of its work |
//! | `answer`, `outbox` | the way back: indexes, merging, the one end |
//! | `scripted` | a worker that misbehaves as it is told, for tests |

mod answer;
mod board;
mod cancels;
mod desk;
mod intake;
mod job;
mod liveness;
mod local;
mod machine;
mod membership;
mod options;
mod outbox;
mod pulse;
mod rivals;
mod runtime;
pub mod scripted;
mod tally;

pub use job::{Job, JobQueue, Piece};
pub use options::{ModelFiles, WorkerOptions};
pub use runtime::{Worker, WorkerState};
