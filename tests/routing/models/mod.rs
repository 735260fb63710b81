//! Reference models: each part of the room said again, as plainly as its specification says it, and compared with the
//! program after every event of random histories. A model is written to be read, not to be fast; it knows nothing of how
//! the program does it.

mod breaker;
#[path = "../../common/histories.rs"]
mod histories;
mod registry;
mod sessions;
