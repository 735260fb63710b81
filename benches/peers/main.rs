//! The Rust processes of the benchmark: the workers that answer at once, the bare clients, and the controller.
//!
//! Started by benches/main.py and other programs there, which say what to do as JSON: once on the command line
//! ([`setup::Setup`]), then a line of standard input for each round. A process ends with its standard input.

mod controller;
mod direct;
mod http_worker;
mod load;
mod paced;
mod raw;
mod setup;
mod worker;

use std::error::Error;

use setup::Setup;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(role), Some(setup)) = (arguments.next(), arguments.next()) else {
        println!("The benchmark is started by `make bench`.");
        return Ok(());
    };
    let setup: Setup = serde_json::from_str(&setup)?;
    match role.as_str() {
        // One thread, so that it takes as little as possible of a machine that it shares with what is measured.
        "worker" => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(worker::run(setup)),
        "http-worker" => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(http_worker::run(setup)),
        "paced" => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(paced::run(setup)),
        "raw" => tokio::runtime::Runtime::new()?.block_on(raw::run(setup, None)),
        "raw-headers" => tokio::runtime::Runtime::new()?.block_on(raw::run(setup, Some(raw::headers()))),
        "direct" => tokio::runtime::Runtime::new()?.block_on(direct::run(setup)),
        "controller" => tokio::runtime::Runtime::new()?.block_on(controller::run(setup)),
        other => {
            Err(format!("{other:?} is no role: worker, http-worker, paced, raw, raw-headers, direct and controller are").into())
        }
    }
}
