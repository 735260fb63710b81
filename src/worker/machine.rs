//! What a worker says of its machine.

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use crate::wire::WorkerId;

const GIB: f64 = (1_u64 << 30) as f64;
/// How much of a host's name goes into a worker's; with the suffix it stays below the 64 that are allowed.
const HOST_PART: usize = 48;
const SUFFIX: usize = 6;

/// Measures this process and its machine.
pub(super) struct Machine {
    system: System,
    pid: Option<Pid>,
}

// === impl Machine ===

impl Machine {
    pub(super) fn new() -> Self {
        Self { system: System::new(), pid: sysinfo::get_current_pid().ok() }
    }

    /// The use of all cores together in percent since the last call, and the resident memory of this process in GiB.
    pub(super) fn read(&mut self) -> (f64, f64) {
        self.system.refresh_cpu_usage();
        let cpu = f64::from(self.system.global_cpu_usage());
        let memory = self.pid.map_or(0.0, |pid| {
            let wanted = ProcessRefreshKind::nothing().with_memory();
            self.system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, wanted);
            self.system.process(pid).map_or(0.0, |process| gib(process.memory()))
        });
        (if cpu.is_finite() { cpu.clamp(0.0, 100.0) } else { 0.0 }, memory)
    }
}

/// The machine's name.
pub(super) fn host_name() -> String {
    System::host_name().unwrap_or_default()
}

/// The machine's memory in GiB.
pub(super) fn total_memory() -> f64 {
    let mut system = System::new();
    system.refresh_memory();
    gib(system.total_memory())
}

/// A worker's name where none is given: the host's, as far as it may stand in one, and a random suffix.
pub(super) fn default_worker_id(host: &str) -> WorkerId {
    let suffix: String = std::iter::repeat_with(|| fastrand::char('a'..='z')).take(SUFFIX).collect();
    let short = host.split('.').next().unwrap_or_default();
    let allowed: String =
        short.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).take(HOST_PART).collect();
    let host = allowed.trim_matches('-');
    let host = if host.is_empty() { "worker" } else { host };
    // Allowed characters alone, and few enough: the second name is never needed.
    WorkerId::new(&format!("{host}-{suffix}")).unwrap_or_else(|_| default_worker_id("worker"))
}

fn gib(bytes: u64) -> f64 {
    // A megabyte is exact enough, and shorter.
    (bytes as f64 / GIB * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_name_is_the_hosts_and_can_be_part_of_a_subject() {
        for (host, start) in [("studio.local", "studio-"), ("Mäc Böök", "M-c-B--k-"), ("", "worker-"), ("...", "worker-")] {
            let id = default_worker_id(host);
            assert!(id.starts_with(start) && id.len() == start.len() + SUFFIX, "{id}");
        }
        assert!(default_worker_id(&"x".repeat(300)).len() <= 64);
        assert_ne!(default_worker_id("a"), default_worker_id("a"));
    }

    #[test]
    fn this_process_uses_memory() {
        let (cpu, memory) = Machine::new().read();
        assert!((0.0..=100.0).contains(&cpu));
        assert!(memory > 0.0 && memory < total_memory());
    }
}
