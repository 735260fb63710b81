//! A worker that does what a script says, for tests of what stands before it: it answers, stalls, fails, refuses, babbles,
//! dies, freezes, loads slowly, and remembers what it was asked.
//!
//! It is no [`Worker`](super::Worker) with an engine of its own: that one keeps to the protocol whatever its engine does.
//! What both say of themselves is the same, so that controllers know no difference.
//!
//! | file | it does |
//! |---|---|
//! | `script` | what is done with which request, as values |
//! | `performance` | one request played, step by step |
//! | `record` | what it was asked, and what it works on |
//! | `line` | what carries it: NATS, or a port of this process |
//! | `runtime`, `stage` | its life, from outside and from inside |

mod line;
mod performance;
mod record;
mod runtime;
mod script;
mod stage;

pub use record::{Cancelled, Counts, Received};
pub use runtime::{ScriptedOptions, ScriptedState, ScriptedWorker};
pub use script::{Babble, PIECES, Plan, Script, Step, beginning};
