//! The hot paths, each done so many times, for a count of their instructions: `make bench-check`.
//!
//! Without arguments the program lists its cases, a line each: the name, and how often it has to be done for a sum that says
//! something. With a name and a number it does that case so often and ends. What a case needs beforehand is the same
//! whatever the number, so that the difference of two counts is the case alone. Nothing here depends on the clock, on chance
//! or on a second thread.

mod codec;
mod decisions;
#[allow(dead_code, reason = "it is another benchmark's own file: this one uses some of it")]
#[path = "../routing/fleet.rs"]
mod fleet;
mod requests;

/// A hot path.
struct Case {
    name: &'static str,
    /// How often it is done at least.
    times: u64,
    run: fn(u64),
}

fn main() {
    let cases: Vec<Case> = [decisions::cases(), codec::cases(), requests::cases()].into_iter().flatten().collect();
    let mut arguments = std::env::args().skip(1);
    let (Some(name), Some(times)) = (arguments.next(), arguments.next()) else {
        for case in cases {
            println!("{} {}", case.name, case.times);
        }
        return;
    };
    let case = cases.into_iter().find(|case| case.name == name);
    let case = case.unwrap_or_else(|| panic!("{name:?} is no case; without arguments the program lists them"));
    (case.run)(times.parse().unwrap_or_else(|error| panic!("{times:?}: {error}")));
}

/// The value of what cannot fail here.
fn sound<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("{error:?}"))
}
