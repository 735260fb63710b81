//! The deciding core by itself: what one decision costs, and what a large fleet takes.
//!
//! `cargo bench --bench routing` measures decisions with criterion; with `figures` as its argument the program prints what
//! criterion has no measure for, as one line of JSON. `make bench` does both and sets the targets beside them.

mod attempts;
mod decisions;
mod figures;
mod fleet;
#[allow(dead_code, reason = "it is the room's own file: the benchmark uses some of it")]
#[path = "../../src/dispatch/limits.rs"]
mod limits;
mod threads;

// The names by which limits.rs knows them.
use mlx_serving_router::{config, error};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).is_some_and(|argument| argument == "figures") {
        let quick = std::env::args().any(|argument| argument == "--quick");
        println!("{}", serde_json::to_string(&figures::all(quick)?)?);
        return Ok(());
    }
    let mut criterion = criterion::Criterion::default().configure_from_args().without_plots();
    decisions::all(&mut criterion);
    attempts::timers(&mut criterion);
    criterion.final_summary();
    Ok(())
}
